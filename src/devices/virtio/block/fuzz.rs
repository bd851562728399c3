//! The entry point of the fuzz target for disks. No thread serves the queues: the target serves each after a kick.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

use std::{fs::File, os::unix::fs::FileExt};

use arbitrary::{Result, Unstructured};
use nutshell_disk_image::Image;
use rustix::fs::{MemfdFlags, memfd_create};

use super::*;
use crate::devices::virtio::{
    device::SharedDevice,
    fuzz::{
        driver::{Driver, Subject},
        guest::{Request, sizes},
    },
};

/// The size of a disk in bytes: three clusters of an image.
const DISK_SIZE: u64 = 3 << 16;

const MAX_DISK_SIZE: u64 = DISK_SIZE + (1 << 16);

/// A disk whose queues wait for [`DiskSubject`] instead of a thread each.
struct UnservedBlock {
    block: Block,
    queues: Vec<DeviceQueue>,
}

impl Device for UnservedBlock {
    fn device_id(&self) -> u32 {
        self.block.device_id()
    }

    fn counters(&self) -> Arc<Counters> {
        self.block.counters()
    }

    fn features(&self) -> u64 {
        self.block.features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.block.queue_sizes()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.block.read_config(offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.block.config_generation()
    }

    fn activate(&mut self, mut activation: Activation) -> std::result::Result<(), ActivateError> {
        self.queues = std::mem::take(&mut activation.queues);
        for queue in &self.queues {
            self.block
                .disk
                .counters
                .watch_used_chains(queue.index(), queue.used_chains());
        }
        self.block.activate(activation)
    }

    fn reset(&mut self) {
        self.queues.clear();
        self.block.reset();
    }
}

struct DiskSubject {
    device: SharedDevice<UnservedBlock>,
    growing: Option<GrowingDisk>,
    can_resize: bool,
    file: File,
    /// The size of `file`, which only the host changes.
    size: u64,
    /// The smallest size that `file` has had: up to here it has its original contents unless the guest has written.
    kept: u64,
    /// The guest cannot write `file`.
    is_protected: bool,
    capacity: u64,
}

/// Interprets `data`, whose first byte selects the kind of disk, as requests of a driver and changes of the file.
///
/// # Panics
///
/// If the guest extends a file beyond the disk, writes a file that it may only read, or the disk shrinks.
pub fn serve_disk(data: &[u8]) {
    let Some((selection, data)) = data.split_first() else {
        return;
    };
    let file = disk_file();
    let clone = || file.try_clone().unwrap();
    let is_joined = selection & 8 != 0;
    let backing = match selection & 3 {
        _ if is_joined => join_files(clone()),
        kind @ (0 | 1) => Backing::File {
            file: clone(),
            read_only: kind == 1,
        },
        2 => Backing::Image(Box::new(Image::open_read_only(Box::new(clone())).unwrap())),
        _ => {
            let cow = File::from(memfd_create("cow", MemfdFlags::CLOEXEC).unwrap());
            let image = Image::open_raw(Box::new(clone()), Box::new(cow), [1; 16]);
            Backing::Image(Box::new(image.unwrap()))
        }
    };
    let timer = Arc::new(StallTimer::new().unwrap());
    let queues = u16::from(selection >> 2 & 1) + 1;
    let mut block = Block::new("nutshell-fuzz".to_owned(), backing, queues, &timer).unwrap();
    let growing = block.growing_disk();
    let device = SharedDevice::new(UnservedBlock {
        block,
        queues: Vec::new(),
    });
    let kicks = Driver::kicks(&device);
    let mut subject = DiskSubject {
        device: device.clone(),
        can_resize: growing.is_some(),
        growing,
        is_protected: is_joined || selection & 3 != 0,
        size: DISK_SIZE,
        kept: DISK_SIZE,
        file,
        capacity: DISK_SIZE / SECTOR_SIZE,
    };
    Driver::new(Box::new(device), kicks).run(&mut Unstructured::new(data), &mut subject);
    if subject.is_protected {
        let mut bytes = vec![0; usize::try_from(subject.kept).unwrap()];
        subject.file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(
            bytes == contents()[..bytes.len()],
            "a guest wrote a file that it may only read"
        );
    }
}

/// A disk whose first part is a read-only file, and whose second a writable one.
fn join_files(file: File) -> Backing {
    const FIRST_LENGTH: u64 = DISK_SIZE / 3;
    let writable = File::from(memfd_create("writable", MemfdFlags::CLOEXEC).unwrap());
    writable.set_len(DISK_SIZE - FIRST_LENGTH).unwrap();
    let files = vec![
        JoinedFile {
            file,
            length: FIRST_LENGTH,
            read_only: true,
        },
        JoinedFile {
            file: writable,
            length: DISK_SIZE - FIRST_LENGTH,
            read_only: false,
        },
    ];
    Backing::Joined(JoinedFiles::new(files).unwrap())
}

fn contents() -> Vec<u8> {
    (0..DISK_SIZE).map(|index| (index % 251) as u8).collect()
}

fn disk_file() -> File {
    let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(&contents(), 0).unwrap();
    file
}

impl Subject for DiskSubject {
    fn request(&mut self, input: &mut Unstructured<'_>, _queue: usize) -> Result<Request> {
        let kind = *input.choose(&[0_u32, 1, 4, 8, 11, 13, 2, 0x77])?;
        let sector = match input.int_in_range(0..=7_u8)? {
            0 => input.arbitrary()?,
            1 => DISK_SIZE / SECTOR_SIZE - u64::from(input.arbitrary::<u8>()? & 3),
            _ => u64::from(input.arbitrary::<u16>()? & 0x1ff),
        };
        let mut readable = [u64::from(kind).to_le_bytes(), sector.to_le_bytes()].concat();
        let mut writable = Vec::new();
        match kind {
            1 => {
                let sectors = usize::from(input.arbitrary::<u8>()? & 0x1f);
                readable.extend(vec![b'w'; sectors * 512]);
                if input.ratio(1_u8, 16)? {
                    readable.push(0);
                }
            }
            11 | 13 => {
                let count = if input.ratio(7_u8, 8)? {
                    u32::from(input.arbitrary::<u8>()?)
                } else {
                    input.arbitrary()?
                };
                let flags = u32::from(input.ratio(1_u8, 4)?);
                let start = u64::from(input.arbitrary::<u16>()? & 0x1ff);
                readable.extend(start.to_le_bytes());
                readable.extend([count, flags].map(u32::to_le_bytes).concat());
            }
            0 if input.ratio(7_u8, 8)? => {
                for _ in 0..input.int_in_range(1..=3_u8)? {
                    writable.push(u32::from(input.arbitrary::<u8>()? & 0x1f) * 512);
                }
            }
            0 => writable = sizes(input)?,
            8 => writable.push(20),
            _ => {}
        }
        if input.ratio(1_u8, 16)? {
            readable.truncate(usize::from(input.arbitrary::<u8>()? & 0x1f));
        }
        if input.ratio(15_u8, 16)? {
            writable.push(1);
        }
        Ok(Request { readable, writable })
    }

    fn serve(&mut self, queue: usize) {
        let device = &mut *self.device.lock();
        let stopped = AtomicBool::new(false);
        let disk = device.block.disk.clone();
        // A worker ends when its queue is broken.
        if let Some(queue) = device.queues.get_mut(queue)
            && serve(&disk, queue, &stopped).is_err()
        {
            device.queues.clear();
        }
    }

    fn act_on_host(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        if self.can_resize {
            if input.ratio(1_u8, 4)? {
                self.size = input.int_in_range(0..=MAX_DISK_SIZE)?;
                self.file.set_len(self.size).unwrap();
                self.kept = self.kept.min(self.size);
            }
            self.growing.as_mut().unwrap().check();
        }
        let _ = self.device.lock().counters().pending();
        Ok(())
    }

    fn check(&mut self, _driver: &Driver) {
        let capacity = self.device.lock().block.disk.capacity.sectors();
        // A write behind the end of a file that has shrunk extends it.
        let size = self.file.metadata().unwrap().len();
        assert!(size >= self.size && size <= self.size.max(capacity * SECTOR_SIZE));
        assert!(capacity >= self.capacity);
        self.capacity = capacity;
    }
}
