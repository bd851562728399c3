//! The shim, driven directly: each file has the tests of one part of containerd's contract with it.
//! docs/CONFORMANCE.md says which line each shows. Run in the lab by `tests/suites/direct.sh`.

#![allow(clippy::tests_outside_test_module, reason = "all of this is tests")]
#![allow(clippy::unwrap_used, reason = "a test fails by panic")]

mod bootstrap;
mod create;
mod delete;
mod events;
mod exec;
mod failures;
mod growth;
mod kill;
mod lifecycle;
mod pods;
mod resources;
mod sandboxes;
