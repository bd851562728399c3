//! Tests of containers: drives an agent over Unix sockets, as the shim does over vsock. The containers are real.
//!
//! Needs root, cgroup v2, and a machine whose mounts and cgroups may be changed: `run-in-lab` runs it.

#![allow(clippy::tests_outside_test_module, reason = "this crate contains only tests")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "shared with the tests of machines, which use the rest")]
mod harness;

mod blocked;
mod exec;
mod lifecycle;
mod limits;
mod service;
mod settings;
mod streams;
