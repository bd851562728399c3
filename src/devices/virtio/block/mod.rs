//! virtio-blk (virtio 1.3 §5.2) over a file or block device of the host.
//!
//! [`request`] parses and answers one request; here is the device: its configuration, one worker
//! thread a queue, and a backing that may grow while the guest runs.

pub(crate) mod request;

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
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
    ActivateError, Activation, COMMON_FEATURES, Device, Interrupt, copy_config,
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

/// A disk as the vmm holds it after its device went to the transport.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    backing: Backing,
    /// In sectors.
    capacity: AtomicU64,
    interrupt: RwLock<Option<Arc<dyn Interrupt>>>,
    serial: String,
}

impl std::fmt::Debug for dyn Interrupt {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Interrupt")
    }
}

impl Disk {
    /// A disk with serial `serial` on `backing`.
    pub(crate) fn new(serial: String, backing: Backing) -> io::Result<Self> {
        let capacity = sectors(&backing.file)?;
        Ok(Self {
            shared: Arc::new(Shared {
                backing,
                capacity: AtomicU64::new(capacity),
                interrupt: RwLock::new(None),
                serial,
            }),
        })
    }

    /// Looks at the size of the backing again and announces it.
    pub(crate) fn grow(&self) -> io::Result<()> {
        let capacity = sectors(&self.shared.backing.file)?;
        self.shared.capacity.store(capacity, Ordering::SeqCst);
        let interrupt = self.shared.interrupt.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(interrupt) = &*interrupt {
            interrupt.config_changed();
        }
        Ok(())
    }
}

/// The device.
#[derive(Debug)]
pub(crate) struct Block {
    disk: Disk,
    queue_sizes: Vec<u16>,
    workers: Vec<Worker>,
}

impl Block {
    /// A device for `disk` with `queues` queues.
    pub(crate) fn new(disk: Disk, queues: u16) -> Self {
        Self {
            disk,
            queue_sizes: vec![QUEUE_SIZE; usize::from(queues.max(1))],
            workers: Vec::new(),
        }
    }

    /// The configuration (virtio 1.3 §5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut field = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
        field(0, &self.disk.shared.capacity.load(Ordering::SeqCst).to_le_bytes());
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
            | if self.disk.shared.backing.read_only {
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
        *self
            .disk
            .shared
            .interrupt
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Some(activation.interrupt);
        for queue in activation.queues {
            self.workers
                .push(Worker::start(self.disk.shared.clone(), queue).map_err(failed)?);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.clear();
        *self
            .disk
            .shared
            .interrupt
            .write()
            .unwrap_or_else(PoisonError::into_inner) = None;
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
    fn start(shared: Arc<Shared>, mut queue: DeviceQueue) -> io::Result<Self> {
        let kick = queue.kick().try_clone()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::Builder::new()
            .name("block".to_owned())
            .stack_size(128 << 10)
            .spawn(move || {
                // Requests may have come before the thread did.
                loop {
                    if stopped.load(Ordering::SeqCst) || serve(&shared, &mut queue, &stopped).is_err() {
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
fn serve(shared: &Shared, queue: &mut DeviceQueue, stopped: &AtomicBool) -> Result<(), QueueError> {
    loop {
        queue.pause_kicks()?;
        while let Some(chain) = queue.pop()? {
            let head = chain.head;
            let capacity = shared.capacity.load(Ordering::SeqCst);
            let written = request::answer(chain, &shared.backing, capacity, &shared.serial);
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
