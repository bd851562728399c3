//! The entry point of the fuzz target for kernels.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

use std::{fs::File, io::Write, sync::LazyLock};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::{
    control::Extent,
    memory::{MemoryRegions, allocate},
    vmm::boot::layout::HIGH_MEMORY_START,
};

/// The size of the guest's memory in bytes.
const MEMORY_SIZE: u64 = 32 << 20;

/// The memory of the guest. A process never unmaps it, so all inputs use the same.
static MEMORY: LazyLock<MemoryRegions> = LazyLock::new(|| allocate(MEMORY_SIZE, None).unwrap());

/// The offset of the kernel in its file, in bytes.
const OFFSET: usize = 4096;

/// Loads the kernel in `data` from the middle of a file.
///
/// # Panics
///
/// If a kernel is loaded that does not lie in guest memory above 1 MiB.
pub fn load_kernel(data: &[u8]) {
    let mut file = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(&[0; OFFSET]).unwrap();
    file.write_all(data).unwrap();
    let extent = Extent {
        offset: OFFSET as u64,
        length: data.len() as u64,
    };
    if let Ok(kernel) = super::load(&MEMORY, &file, extent) {
        assert!((HIGH_MEMORY_START..=MEMORY_SIZE).contains(&kernel.end), "{kernel:?}");
        assert!((HIGH_MEMORY_START..kernel.end).contains(&kernel.entry), "{kernel:?}");
        let _ = (kernel.max_initramfs_address(), kernel.max_command_line());
    }
}
