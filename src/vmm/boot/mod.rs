//! The content of guest memory at the first instruction: the kernel ([`kernel`]), the list of vCPUs and interrupt lines
//! ([`mptable`]), and the structures of Linux's 64-bit boot protocol ([`tables`]). [`layout`] has the addresses.
//!
//! Does not belong here: anything about KVM, such as the initial registers, which [`super::kvm`] sets. [`super::build`]
//! calls these functions.

pub(super) mod kernel;
pub(super) mod layout;
pub(super) mod mptable;
pub(super) mod tables;

pub(super) use self::tables::BootError;
