//! The guest's kernel and initramfs: embedded in this executable, or files that the host's
//! configuration names. The shim opens them; the vmm maps what it is handed.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use crate::control::Extent;

include!(concat!(env!("OUT_DIR"), "/embedded_guest.rs"));

/// Page alignment lets the vmm map the kernel straight from this executable's file.
#[repr(C, align(4096))]
struct PageAligned<T: ?Sized>(T);

/// Why there is no guest.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestImageError {
    /// Built without a guest, and none configured.
    #[error(
        "this executable was built without a guest {0}: build it with `make build`, or name one in the configuration"
    )]
    NotEmbedded(&'static str),
    /// The executable's own file cannot be found in its mappings.
    #[error("cannot find the embedded guest in /proc/self/maps")]
    NotMapped,
    /// A file cannot be read.
    #[error("guest {what} {}: {source}", path.display())]
    Unreadable {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The files that a machine boots from.
#[derive(Debug)]
pub(crate) struct GuestImage {
    /// Holds an uncompressed ELF `vmlinux`.
    pub(crate) kernel: File,
    /// Where in it.
    pub(crate) kernel_extent: Extent,
    /// Holds a cpio archive.
    pub(crate) initramfs: File,
    /// Where in it.
    pub(crate) initramfs_extent: Extent,
}

/// Opens the guest: the files named, or what is embedded.
pub(crate) fn open(kernel: Option<&Path>, initramfs: Option<&Path>) -> Result<GuestImage, GuestImageError> {
    let (kernel, kernel_extent) = open_part("kernel", kernel, &KERNEL.0)?;
    let (initramfs, initramfs_extent) = open_part("initramfs", initramfs, &INITRAMFS.0)?;
    Ok(GuestImage {
        kernel,
        kernel_extent,
        initramfs,
        initramfs_extent,
    })
}

fn open_part(
    what: &'static str,
    configured: Option<&Path>,
    embedded: &'static [u8],
) -> Result<(File, Extent), GuestImageError> {
    let path = configured.unwrap_or(Path::new("/proc/self/exe"));
    let unreadable = |source| GuestImageError::Unreadable {
        what,
        path: path.to_owned(),
        source,
    };
    if configured.is_none() && embedded.is_empty() {
        return Err(GuestImageError::NotEmbedded(what));
    }
    let file = File::open(path).map_err(unreadable)?;
    let extent = if configured.is_none() {
        Extent {
            offset: file_offset(embedded)?,
            length: embedded.len() as u64,
        }
    } else {
        Extent {
            offset: 0,
            length: file.metadata().map_err(unreadable)?.len(),
        }
    };
    Ok((file, extent))
}

/// Where in this executable's file `embedded` lies, from the mapping that holds its address
/// (proc_pid_maps(5)): the loader may have put the segment anywhere.
fn file_offset(embedded: &'static [u8]) -> Result<u64, GuestImageError> {
    let address = embedded.as_ptr().addr() as u64;
    let maps = fs::read_to_string("/proc/self/maps").map_err(|_| GuestImageError::NotMapped)?;
    maps.lines()
        .find_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let (start, end) = fields.next()?.split_once('-')?;
            let offset = fields.nth(1)?;
            let [start, end, offset] = [start, end, offset].map(|hex| u64::from_str_radix(hex, 16));
            let start = start.ok()?;
            (start..end.ok()?).contains(&address).then_some(())?;
            Some(offset.ok()? + (address - start))
        })
        .ok_or(GuestImageError::NotMapped)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    static MARKER: &PageAligned<[u8]> = &PageAligned(*b"a page-aligned static to find again in the file");

    #[test]
    fn static_is_found_in_the_executables_file_at_a_page_boundary() {
        let offset = file_offset(&MARKER.0).unwrap();
        let mut bytes = vec![0; MARKER.0.len()];
        File::open("/proc/self/exe")
            .unwrap()
            .read_exact_at(&mut bytes, offset)
            .unwrap();
        assert_eq!(bytes, &MARKER.0);
        assert_eq!(offset % 4096, 0);
    }

    #[test]
    fn missing_configured_kernel_is_named_in_the_error() {
        let error = open(Some(Path::new("/no/such/vmlinux")), None).unwrap_err();
        assert!(error.to_string().contains("/no/such/vmlinux"), "{error}");
    }
}
