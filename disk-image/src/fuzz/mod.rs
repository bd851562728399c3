//! The entry points of the fuzz targets for disk images.
//!
//! Belongs here: functions that pass the bytes of an input to this crate and panic if it breaks its contract. Does not
//! belong here: anything that the vmm needs. The targets in `fuzz/fuzz_targets` call these functions, and so do the
//! tests, with the stored inputs.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

mod copy_on_write;
mod qcow2;
mod storage;

pub use self::{copy_on_write::change_disk, qcow2::read_qcow2};

#[cfg(test)]
mod tests {
    use nutshell_fixtures::replay_corpus;

    #[test]
    fn stored_qcow2_images_are_read_or_refused() {
        replay_corpus("qcow2", super::read_qcow2);
    }

    #[test]
    fn stored_changes_of_disks_have_the_expected_result() {
        replay_corpus("copy_on_write", super::change_disk);
    }
}
