//! virtio-blk (virtio 1.3 §5.2) on a file or block device of the host.
//!
//! Belongs here: the device, its configuration, and one worker thread per queue. [`disk`] is the disk of the host,
//! [`request`] parses and executes one request.

mod disk;
mod request;

use std::{
    io,
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

pub(crate) use self::disk::Backing;
use self::disk::{Disk, SECTOR_SIZE};
use super::{
    device::{ActivateError, Activation, COMMON_FEATURES, Device, copy_config},
    queue::{DeviceQueue, QueueError},
};

const QUEUE_SIZE: u16 = 256;

/// The maximum number of data segments of a request: the descriptors of a queue, minus header and status.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;

#[derive(Debug)]
pub(crate) struct Block {
    disk: Arc<Disk>,
    queue_sizes: Vec<u16>,
    workers: Vec<Worker>,
}

impl Block {
    /// A device with `queues` queues, at least one, for the disk on `backing`.
    ///
    /// # Errors
    ///
    /// The size of the disk cannot be read.
    pub(crate) fn new(serial: String, backing: Backing, queues: u16) -> io::Result<Self> {
        Ok(Self {
            disk: Arc::new(Disk::new(backing, serial)?),
            queue_sizes: vec![QUEUE_SIZE; usize::from(queues.max(1))],
            workers: Vec::new(),
        })
    }

    /// struct virtio_blk_config (virtio 1.3 §5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut field = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
        field(0, &self.disk.capacity.to_le_bytes());
        field(12, &MAX_SEGMENTS.to_le_bytes());
        field(20, &u32::try_from(SECTOR_SIZE).unwrap_or(0).to_le_bytes());
        field(34, &u16::try_from(self.queue_sizes.len()).unwrap_or(1).to_le_bytes());
        // Discard: the maximum number of sectors, one segment, alignment of one sector. Then write-zeroes: the maximum
        // number of sectors, one segment, may unmap.
        field(36, &request::MAX_ZERO_SECTORS.to_le_bytes());
        field(40, &1_u32.to_le_bytes());
        field(44, &1_u32.to_le_bytes());
        field(48, &request::MAX_ZERO_SECTORS.to_le_bytes());
        field(52, &1_u32.to_le_bytes());
        field(56, &[1]);
        config
    }
}

impl Device for Block {
    fn device_id(&self) -> u32 {
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

/// A thread that serves one queue. Dropping it stops and joins the thread.
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
                // Serve before the first wait: the first kick may have happened before the thread started.
                while !stopped.load(Ordering::SeqCst) {
                    let served = serve(&disk, &mut queue, &stopped)
                        .map_err(|error| error.to_string())
                        .and_then(|()| {
                            queue
                                .kick()
                                .read()
                                .map_err(|error| format!("wait for requests: {error}"))
                        });
                    if let Err(error) = served {
                        log::warn!(
                            target: disk.serial.as_str(),
                            "a queue is no longer served, its requests are not completed: {error}"
                        );
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

/// Serves the available requests of a queue until none is left or `stopped` is set.
fn serve(disk: &Disk, queue: &mut DeviceQueue, stopped: &AtomicBool) -> Result<(), QueueError> {
    loop {
        queue.pause_kicks()?;
        while let Some(chain) = queue.pop()? {
            let head = chain.head;
            let written = request::process(chain, disk);
            queue.add_used(head, written)?;
            queue.notify_driver()?;
            if stopped.load(Ordering::SeqCst) {
                return Ok(());
            }
        }
        if !queue.resume_kicks()? {
            return Ok(());
        }
    }
}
