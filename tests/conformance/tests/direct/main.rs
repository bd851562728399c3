//! Tests of the shim without containerd. Each file covers one part of the interface; docs/CONFORMANCE.md lists which
//! test shows which requirement. `tests/suites/direct.sh` runs them in the lab.

#![allow(clippy::tests_outside_test_module, reason = "all of this is tests")]
#![allow(clippy::unwrap_used, reason = "a test fails by panic")]

mod bootstrap;
mod create;
mod delete;
mod events;
mod exec;
mod failures;
mod kill;
mod leaks;
mod lifecycle;
mod pods;
mod resources;
mod sandboxes;
