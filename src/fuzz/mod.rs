//! The entry points of the fuzz targets for the executable's code.
//!
//! Belongs here: functions that pass the bytes of an input to code that reads untrusted bytes, and panic if it breaks its
//! contract. Does not belong here: anything that runs outside of tests. An entry point that needs private items is next to
//! them, in a file `fuzz.rs`. The targets in `fuzz/fuzz_targets` call these functions, and so do the tests, with the
//! stored inputs.

pub use crate::devices::virtio::net::answer_request;

#[cfg(test)]
mod tests;
