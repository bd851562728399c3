//! The methods of the administrator's service: reports on this shim, and shells in the guest.
//!
//! Belongs here: what the actions `ps`, `inspect`, `metrics`, `console` and `shell` ask of a shim. Does not belong
//! here: what they print ([`crate::admin`]). `api` calls the methods, which extend [`super::Tasks`].

mod report;
mod shell;
