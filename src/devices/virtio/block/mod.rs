//! virtio-blk (virtio 1.3 §5.2) over a file or block device of the host.
//!
//! [`request`] parses and answers one request; here is the device: its configuration, and one
//! worker thread per queue.

pub(crate) mod request;

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
        VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
    },
    virtio_ids::VIRTIO_ID_BLOCK,
};
use vmm_sys_util::eventfd::EventFd;

use self::request::SECTOR;
use super::{
    ActivateError, Activation, COMMON_FEATURES, Device, copy_config,
    queue::{DeviceQueue, QueueError},
};

const QUEUE_SIZE: u16 = 256;

/// The most segments of a request: a queue's descriptors less header and status.
const SEG_MAX: u32 = 254;

/// The most sectors of one discard or write-zeroes request, 1 GiB: one slow call bounds the next.
const MAX_ZERO_SECTORS: u32 = 1 << 21;

/// What a disk's bytes are kept in.
#[derive(Debug)]
pub(crate) struct Backing {
    /// The file or block device.
    pub(crate) file: File,
    /// The guest may only read.
    pub(crate) read_only: bool,
}

/// What the worker threads of a device share.
#[derive(Debug)]
struct Disk {
    backing: Backing,
    /// In sectors.
    capacity: u64,
    serial: String,
}

/// The device.
#[derive(Debug)]
pub(crate) struct Block {
    disk: Arc<Disk>,
    queue_sizes: Vec<u16>,
    workers: Vec<Worker>,
}

impl Block {
    /// A device with `queues` queues for a disk with serial `serial` on `backing`.
    pub(crate) fn new(serial: String, backing: Backing, queues: u16) -> io::Result<Self> {
        let capacity = sectors(&backing.file)?;
        Ok(Self {
            disk: Arc::new(Disk {
                backing,
                capacity,
                serial,
            }),
            queue_sizes: vec![QUEUE_SIZE; usize::from(queues.max(1))],
            workers: Vec::new(),
        })
    }

    /// The configuration (virtio 1.3 §5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut field = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
        field(0, &self.disk.capacity.to_le_bytes());
        field(12, &SEG_MAX.to_le_bytes());
        field(20, &512_u32.to_le_bytes());
        field(34, &u16::try_from(self.queue_sizes.len()).unwrap_or(1).to_le_bytes());
        // Discard, then write-zeroes: the most sectors, one segment, any alignment.
        field(36, &MAX_ZERO_SECTORS.to_le_bytes());
        field(40, &1_u32.to_le_bytes());
        field(44, &1_u32.to_le_bytes());
        field(48, &MAX_ZERO_SECTORS.to_le_bytes());
        field(52, &1_u32.to_le_bytes());
        field(56, &[1]);
        config
    }
}

impl Device for Block {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let mut features = COMMON_FEATURES | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
        if self.queue_sizes.len() > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        features
            | if self.disk.backing.read_only {
                1 << VIRTIO_BLK_F_RO
            } else {
                1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
            }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.queue_sizes.clone()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let failed = |error: io::Error| ActivateError::Backend(error.to_string());
        for queue in activation.queues {
            self.workers
                .push(Worker::start(self.disk.clone(), queue).map_err(failed)?);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.clear();
    }
}

/// A thread that serves one queue; stops and is joined when dropped.
#[derive(Debug)]
struct Worker {
    stop: Arc<AtomicBool>,
    kick: EventFd,
    thread: Option<thread::JoinHandle<()>>,
}

impl Worker {
    fn start(disk: Arc<Disk>, mut queue: DeviceQueue) -> io::Result<Self> {
        let kick = queue.kick().try_clone()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::Builder::new()
            .name("block".to_owned())
            .stack_size(128 << 10)
            .spawn(move || {
                // Requests may have come before the thread did.
                loop {
                    if stopped.load(Ordering::SeqCst) || serve(&disk, &mut queue, &stopped).is_err() {
                        // A broken queue is not served any more; the driver's requests time out.
                        return;
                    }
                    if queue.kick().read().is_err() {
                        return;
                    }
                }
            })?;
        Ok(Self {
            stop,
            kick,
            thread: Some(thread),
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = self.kick.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Serves all that is available on a queue, until it is to stop.
fn serve(disk: &Disk, queue: &mut DeviceQueue, stopped: &AtomicBool) -> Result<(), QueueError> {
    loop {
        queue.pause_kicks()?;
        while let Some(chain) = queue.pop()? {
            let head = chain.head;
            let written = request::answer(chain, &disk.backing, disk.capacity, &disk.serial);
            queue.add_used(head, written)?;
            queue.notify()?;
            if stopped.load(Ordering::SeqCst) {
                return Ok(());
            }
        }
        if !queue.resume_kicks()? {
            return Ok(());
        }
    }
}

/// The size of a file or block device in whole sectors.
fn sectors(file: &File) -> io::Result<u64> {
    use std::os::unix::fs::FileTypeExt;

    let metadata = file.metadata()?;
    let bytes = if metadata.file_type().is_block_device() {
        // The position of a block device is nobody's: requests carry their offset.
        io::Seek::seek(&mut &*file, io::SeekFrom::End(0)).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("size of block device {}: {error}", file.as_raw_fd()),
            )
        })?
    } else {
        metadata.len()
    };
    Ok(bytes / SECTOR)
}
