//! Drives a real agent over sockets, as the shim would over vsock, and real containers under it.
//!
//! Needs root, a cgroup v2 hierarchy and a machine that may be messed with: run by `run-in-lab`.

#![allow(clippy::tests_outside_test_module, reason = "all of this is tests")]
#![allow(clippy::unwrap_used, reason = "a test fails by panic")]

mod harness;

mod exec;
mod lifecycle;
mod limits;
mod settings;
mod streams;
