//! The memory of a guest and its virtqueues, which the input of a fuzz target fills.

use std::{fs::File, ops::Range, sync::LazyLock};

use arbitrary::{Result, Unstructured};
use parking_lot::{Mutex, MutexGuard};
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

use crate::{
    devices::virtio::buffers::Buffers,
    memory::{GuestMemory, MemoryRegions},
};

/// Descriptor flags (virtio 1.3 §2.7.5).
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// The memory that the guest boots with: two regions with a hole between them.
pub(crate) const LOW: Range<u64> = 0..0x1_0000;
pub(crate) const HIGH: Range<u64> = 0x2_0000..0x3_0000;

/// The region that is added to a running guest. It fills the hole, so a buffer can span all three regions.
pub(crate) const ADDED: Range<u64> = 0x1_0000..0x2_0000;

/// The memory that virtio-mem plugs: four blocks.
pub(crate) const PLUGGABLE: Range<u64> = 0x4000_0000..0x4080_0000;

/// The maximum number of entries of a queue.
pub(crate) const MAX_QUEUE_SIZE: u16 = 16;

/// The distance between the starts of two queues in memory, in bytes.
pub(crate) const QUEUE_STRIDE: usize = 0x400;

/// Offsets of the rings from the start of their queue, in bytes.
const AVAILABLE_RING: u64 = 0x200;
const USED_RING: u64 = 0x300;

/// The address of the first buffer, behind the queues.
const BUFFERS: u64 = 0x2000;

// A process never unmaps guest memory, so all inputs use the same.
static BOOT: LazyLock<MemoryRegions> = LazyLock::new(|| {
    let ranges =
        [LOW, HIGH, PLUGGABLE].map(|range| (GuestAddress(range.start), size(&range), Some(memory_file(&range))));
    MemoryRegions::from_ranges_with_files(&ranges).unwrap()
});
static GROWN: LazyLock<MemoryRegions> = LazyLock::new(|| {
    let region = MmapRegion::from_file(memory_file(&ADDED), size(&ADDED)).unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(ADDED.start)).unwrap();
    BOOT.insert_region(region.into()).unwrap()
});

fn memory_file(range: &Range<u64>) -> FileOffset {
    let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(range.end - range.start).unwrap();
    FileOffset::new(file, 0)
}

/// All memory that a guest can have.
pub(crate) fn grown_memory() -> &'static MemoryRegions {
    &GROWN
}

/// Held by the guest that uses the memory: unit tests run at the same time.
static MEMORY_IN_USE: Mutex<()> = Mutex::new(());

fn size(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).unwrap()
}

/// The memory of a guest, and where its driver puts the next buffer.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) memory: GuestMemory,
    next_buffer: u64,
    _memory_use: MutexGuard<'static, ()>,
}

impl Guest {
    /// A guest whose memory is zero.
    pub(crate) fn new() -> Self {
        let memory_use = MEMORY_IN_USE.lock();
        ignore_broken_pipes();
        let zeroes = vec![0; size(&LOW)];
        for region in [LOW, ADDED, HIGH] {
            GROWN.write_slice(&zeroes, GuestAddress(region.start)).unwrap();
        }
        let pluggable = Buffers::from_range(&GROWN, PLUGGABLE.start, size(&PLUGGABLE)).unwrap();
        pluggable.discard(&GROWN).unwrap();
        Self {
            memory: GuestMemory::from_table(&BOOT),
            next_buffer: BUFFERS,
            _memory_use: memory_use,
        }
    }

    /// Adds [`ADDED`] to the memory.
    pub(crate) fn grow(&self) {
        self.memory.set_table(&GROWN);
    }

    /// Writes to memory. An address without memory has no effect.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        // A part may have been written.
        let _ = self.memory.write_slice(bytes, GuestAddress(address));
    }

    /// Reads from memory. `None` if there is no memory at the address.
    pub(crate) fn read(&self, address: u64, count: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).ok()?;
        Some(bytes)
    }

    /// Chooses an address for a buffer of `length` bytes: mostly one that no other buffer uses, else one at the border
    /// of regions, or anywhere.
    pub(crate) fn place(&mut self, input: &mut Unstructured<'_>, length: u32) -> Result<u64> {
        let offset = u64::from(length / 2);
        Ok(match input.int_in_range(0..=15_u8)? {
            0 => LOW.end.saturating_sub(offset),
            1 => ADDED.end.saturating_sub(offset),
            2 => HIGH.start + u64::from(input.arbitrary::<u16>()?),
            3 => ADDED.start + u64::from(input.arbitrary::<u16>()?),
            4 => input.arbitrary::<u64>()?,
            5 => u64::from(input.arbitrary::<u16>()?),
            6 => PLUGGABLE.start + u64::from(input.arbitrary::<u32>()? & 0x7f_ffff),
            _ => {
                let address = self.next_buffer;
                self.next_buffer = (address + u64::from(length)).next_multiple_of(16);
                if self.next_buffer >= LOW.end {
                    self.next_buffer = BUFFERS;
                }
                address
            }
        })
    }
}

/// A buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Buffer {
    pub(crate) address: u64,
    pub(crate) length: u32,
    pub(crate) flags: u16,
}

/// A request of the driver: bytes for the device, and the sizes of the buffers for its answer.
#[derive(Debug, Default)]
pub(crate) struct Request {
    pub(crate) readable: Vec<u8>,
    pub(crate) writable: Vec<u32>,
}

/// The driver's side of a virtqueue.
#[derive(Debug, Clone)]
pub(crate) struct Ring {
    pub(crate) base: u64,
    pub(crate) size: u16,
    /// The available index.
    pub(crate) available: u16,
    next_descriptor: u16,
}

impl Ring {
    pub(crate) fn new(base: u64, size: u16) -> Self {
        Self {
            base,
            size,
            available: 0,
            next_descriptor: 0,
        }
    }

    pub(crate) fn available_ring(&self) -> u64 {
        self.base.wrapping_add(AVAILABLE_RING)
    }

    pub(crate) fn used_ring(&self) -> u64 {
        self.base.wrapping_add(USED_RING)
    }

    /// The index in the used ring. 0 if there is no memory.
    pub(crate) fn used_index(&self, guest: &Guest) -> u16 {
        let bytes = guest.read(self.used_ring().wrapping_add(2), 2);
        bytes.map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    /// Makes `request` available, in buffers of the input's choice.
    pub(crate) fn send(&mut self, guest: &mut Guest, input: &mut Unstructured<'_>, request: &Request) -> Result<()> {
        let mut buffers = Vec::new();
        let mut rest = &request.readable[..];
        while !rest.is_empty() {
            let last = buffers.len() == 3 || input.ratio(3_u8, 4)?;
            let count = if last {
                rest.len()
            } else {
                input.int_in_range(0..=rest.len())?
            };
            let (part, others) = rest.split_at(count);
            let length = u32::try_from(part.len()).unwrap();
            let address = guest.place(input, length)?;
            guest.write(address, part);
            buffers.push(Buffer {
                address,
                length,
                flags: 0,
            });
            rest = others;
        }
        for length in &request.writable {
            buffers.push(Buffer {
                address: guest.place(input, *length)?,
                length: *length,
                flags: WRITE,
            });
        }
        if input.ratio(1_u8, 16)? && !buffers.is_empty() {
            let index = input.int_in_range(0..=buffers.len() - 1)?;
            match input.int_in_range(0..=3_u8)? {
                0 => buffers[index].flags ^= WRITE,
                1 => buffers[index].length = input.arbitrary()?,
                2 => buffers.rotate_left(index),
                _ => buffers.push(buffers[index]),
            }
        }
        let indirect = if input.ratio(1_u8, 4)? {
            Some(guest.place(input, u32::try_from(buffers.len() * 16).unwrap())?)
        } else {
            None
        };
        self.offer(guest, &buffers, indirect);
        Ok(())
    }

    /// Makes a chain of `buffers` available, in an indirect table at `indirect` if there is an address.
    pub(crate) fn offer(&mut self, guest: &Guest, buffers: &[Buffer], indirect: Option<u64>) {
        let head = self.next_descriptor;
        let count = u16::try_from(buffers.len()).unwrap();
        let next = |number: u16| match indirect {
            Some(_) => number + 1,
            None => (head + number + 1) % self.size,
        };
        for (number, buffer) in (0..).zip(buffers) {
            let flags = buffer.flags | if number + 1 < count { NEXT } else { 0 };
            let address = match indirect {
                Some(table) => table.wrapping_add(16 * u64::from(number)),
                None => self.descriptor((head + number) % self.size),
            };
            write_descriptor(guest, address, *buffer, flags, next(number));
        }
        if let Some(table) = indirect {
            let buffer = Buffer {
                address: table,
                length: 16 * u32::from(count),
                flags: 0,
            };
            write_descriptor(guest, self.descriptor(head), buffer, INDIRECT, 0);
        }
        let used = if indirect.is_some() { 1 } else { count };
        self.next_descriptor = (head + used) % self.size;
        self.make_available(guest, head);
    }

    /// Makes the chain that begins with descriptor `head` available.
    pub(crate) fn make_available(&mut self, guest: &Guest, head: u16) {
        let slot = u64::from(self.available % self.size);
        guest.write(self.available_ring().wrapping_add(4 + 2 * slot), &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.write_available_index(guest);
    }

    pub(crate) fn write_available_index(&self, guest: &Guest) {
        guest.write(self.available_ring().wrapping_add(2), &self.available.to_le_bytes());
    }

    /// Sets `used_event`, the used index after which the driver wants an interrupt (virtio 1.3 §2.7.7).
    pub(crate) fn write_used_event(&self, guest: &Guest, index: u16) {
        let address = self.available_ring().wrapping_add(4 + 2 * u64::from(self.size));
        guest.write(address, &index.to_le_bytes());
    }

    /// Sets the flags of the available ring.
    pub(crate) fn write_flags(&self, guest: &Guest, flags: u16) {
        guest.write(self.available_ring(), &flags.to_le_bytes());
    }

    /// Writes descriptors, indices and ring entries that only a hostile driver writes.
    pub(crate) fn damage(&mut self, guest: &mut Guest, input: &mut Unstructured<'_>) -> Result<()> {
        match input.int_in_range(0..=4_u8)? {
            0 => {
                let length = if input.arbitrary()? {
                    u32::from(input.arbitrary::<u8>()?)
                } else {
                    input.arbitrary()?
                };
                let buffer = Buffer {
                    address: guest.place(input, length.min(0x1_0000))?,
                    length,
                    flags: 0,
                };
                let address = self.descriptor(input.int_in_range(0..=self.size - 1)?);
                let flags = u16::from(input.arbitrary::<u8>()? & 0xf);
                let next = u16::from(input.arbitrary::<u8>()? & 0x1f);
                write_descriptor(guest, address, buffer, flags, next);
            }
            1 => {
                let head = u16::from(input.arbitrary::<u8>()? & 0x1f);
                self.make_available(guest, head);
            }
            2 => {
                self.available = self.available.wrapping_add(input.int_in_range(0..=17)?);
                self.write_available_index(guest);
            }
            3 => self.write_used_event(guest, input.arbitrary()?),
            _ => self.write_flags(guest, u16::from(input.arbitrary::<u8>()? & 3)),
        }
        Ok(())
    }

    fn descriptor(&self, index: u16) -> u64 {
        self.base.wrapping_add(16 * u64::from(index))
    }
}

fn write_descriptor(guest: &Guest, at: u64, buffer: Buffer, flags: u16, next: u16) {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&buffer.address.to_le_bytes());
    bytes[8..12].copy_from_slice(&buffer.length.to_le_bytes());
    bytes[12..14].copy_from_slice(&(flags | buffer.flags).to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    guest.write(at, &bytes);
}

/// The sizes of up to three buffers.
pub(crate) fn sizes(input: &mut Unstructured<'_>) -> Result<Vec<u32>> {
    let mut sizes = Vec::new();
    for _ in 0..input.int_in_range(0..=3_u8)? {
        let size = match input.int_in_range(0..=3_u8)? {
            0 => u32::from(input.arbitrary::<u16>()?) * 2,
            1 => 0x1000 * u32::from(input.arbitrary::<u8>()? & 0xf),
            _ => u32::from(input.arbitrary::<u8>()?),
        };
        sizes.push(size);
    }
    Ok(sizes)
}

/// Makes a write to a pipe without a reader an error, as Rust's runtime does. A fuzz target has no such runtime.
fn ignore_broken_pipes() {
    // SAFETY: the call sets no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}
