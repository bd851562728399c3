//! The other end of the shim: everything that containerd does to one, without any containerd.
//!
//! Lives here: starting the executable as each containerd does ([`bootstrap`]), bundles and their
//! root file systems ([`bundle`]), Task calls ([`task`]), the service that takes events and the rules
//! of their order ([`events`]), fifos ([`stdio`]), containers made of all that ([`container`]), pods
//! in both of containerd's ways ([`pod`]), and what may not be left on the host afterwards ([`host`]). May not live here: anything of the product;
//! no test may depend on its code. Used by the tests in `tests/direct`, which run in the lab.
//!
//! A test is a closure that [`with_containerd`] runs.

#![allow(clippy::unwrap_used, reason = "all of this is for tests: they fail by panic")]

pub mod bootstrap;
pub mod bundle;
pub mod container;
pub mod containerd;
pub mod events;
pub mod host;
pub mod pod;
pub mod stdio;
pub mod task;

use std::time::Duration;

pub use containerd::{Containerd, with_containerd};

/// Longer than anything takes in the lab, which is emulated: reaching it is a failure.
pub const PATIENCE: Duration = Duration::from_secs(60);
