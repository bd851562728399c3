//! The virtual machine of a user's disk, as the shim sees it: what the shim prepares for it on the host.
//!
//! Belongs here: the choice and preparation of disks and of the data that they carry. Does not belong here: parsing
//! bytes that a user or a guest wrote, which only jailed processes and guests do. [`super::tasks`] calls it.

#[cfg_attr(
    not(test),
    expect(dead_code, reason = "machines of users' disks cannot be created yet")
)]
pub(super) mod seed;
