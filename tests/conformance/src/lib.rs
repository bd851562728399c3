//! A stand-in for containerd that drives the shim through every part of its interface.
//!
//! Belongs here: the start of the executable as each version of containerd does it ([`bootstrap`]), bundles and root
//! file systems ([`bundle`], [`layers`]), Task calls ([`task`]), the events service and the rules for the order of
//! events ([`events`]), fifos ([`stdio`]), containers ([`container`]), pods with both sandbox APIs ([`pod`]), and
//! inspection of the host ([`host`]). Does not belong here: code of nutshell; no test may depend on it. Used by the
//! tests in
//! `tests/direct`, which run in the lab.
//!
//! A test is a closure that [`with_fake_containerd`] runs.

#![allow(clippy::unwrap_used, reason = "all of this is for tests: they fail by panic")]

pub mod bootstrap;
pub mod bundle;
pub mod container;
pub mod events;
pub mod fake_containerd;
pub mod host;
pub mod layers;
pub mod pod;
pub mod stdio;
pub mod task;

use std::time::Duration;

pub use fake_containerd::{FakeContainerd, with_fake_containerd};

/// Time limit of a call or of a wait. The lab is emulated and slow; nothing takes this long unless it hangs.
pub const TIMEOUT: Duration = Duration::from_secs(60);
