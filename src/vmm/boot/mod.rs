//! The content of guest memory at the first instruction: the kernel ([`kernel`]), the list of vCPUs and interrupt lines
//! ([`mptable`]), and the structures of Linux's 64-bit boot protocol ([`tables`]). [`layout`] has the addresses.
//!
//! The PC board has [`acpi`], [`smbios`] and [`reset_vector`] in place of the MP table. [`pc_layout`] has its
//! addresses, I/O ports and interrupt lines.
//!
//! Does not belong here: anything about KVM, such as the initial registers, which [`super::kvm`] sets. [`super::build`]
//! calls [`kernel`] and [`tables`]; [`super::board`] calls the rest.

pub(super) mod acpi;
pub(super) mod kernel;
pub(super) mod layout;
pub(super) mod mptable;
pub(super) mod pc_layout;
pub(super) mod reset_vector;
pub(super) mod smbios;
pub(super) mod tables;

pub(super) use self::{smbios::SmbiosError, tables::BootError};
