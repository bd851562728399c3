//! Steps that several calls have in common.
//!
//! Belongs here: steps on the host ([`host`]), steps in the guest before its first container (`guest`), and the start
//! of an exec ([`exec`]). Does not belong here: the calls themselves, which are in the other files of [`super`] and
//! call this.

pub(super) mod exec;
mod guest;
pub(super) mod host;
