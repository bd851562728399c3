//! The seed of a virtual machine: a small read-only disk with the user's configuration for cloud-init or Ignition in
//! the guest.
//!
//! The configuration is a Secret or ConfigMap, which the kubelet mounts as a directory: one file for each key. The shim
//! copies their bytes into a FAT file system and parses none of them. A Secret or ConfigMap with other keys becomes
//! such a disk too ([`files`]).
//!
//! Belongs here: the names of keys and files, the defaults for what the user leaves out, and the image. Does not belong
//! here: attaching the disk. The code that opens the files and the volumes of a machine calls [`make_disk`] and
//! [`make_disk_of_files`].

mod data_source;
mod files;
pub(in crate::shim) mod identity;
mod image;
mod keys;
#[cfg(test)]
pub(in crate::shim::vm) mod tests;

use std::{fs::File, io};

pub(in crate::shim) use self::identity::Identity;
use self::keys::KeysError;
pub(in crate::shim::vm) use self::{
    files::make_disk_of_files,
    keys::{CURRENT_VERSION, KeyDirectory},
};
use crate::oci::DataSource;

/// Why a seed disk cannot be made.
#[derive(Debug, thiserror::Error)]
pub(in crate::shim) enum SeedError {
    #[error(transparent)]
    Keys(#[from] KeysError),
    #[error("cannot make the image of the seed disk: {0}")]
    Image(#[source] io::Error),
}

/// Makes the seed disk from the keys in `directory`. `identity` fills in the metadata that the user leaves out, and
/// `vendor_data` the vendor data of NoCloud. Equal arguments and keys result in equal disks.
///
/// Returns a sealed memfd: neither its bytes nor its size can change. The size is a multiple of 4096 bytes.
///
/// Blocks on the file system of `directory`: run it with [`crate::shim::blocking::run`].
pub(in crate::shim) fn make_disk(
    directory: &KeyDirectory,
    source: DataSource,
    identity: &Identity,
    vendor_data: Option<Vec<u8>>,
) -> Result<File, SeedError> {
    let mut keys = keys::read(directory)?;
    if source == DataSource::NoCloud {
        keys.vendor_data = keys.vendor_data.or(vendor_data);
    }
    let contents = source.arrange(keys, identity);
    image::write(&contents).map_err(SeedError::Image)
}
