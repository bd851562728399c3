//! What is found on disks of distributions, and on broken and hostile disks.

#![allow(clippy::tests_outside_test_module, reason = "this crate contains only tests")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod entries;
mod errors;
mod grub;
mod harness;
mod images;
mod other;
