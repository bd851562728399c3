//! Drives a real agent over sockets, as the shim would over vsock, and real containers under it.
//!
//! Needs root, a cgroup v2 hierarchy and a machine that may be messed with: run by `run-in-lab`.

mod harness;

mod lifecycle;
mod streams;
