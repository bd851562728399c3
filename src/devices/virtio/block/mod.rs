//! virtio-blk (virtio 1.3 §5.2) on a file, block device or disk image of the host.
//!
//! Belongs here: the device, its configuration, and one worker thread per queue. [`disk`] is the disk of the host,
//! [`joined`] is a disk that consists of several files, [`request`] parses and executes one request, [`transfer`] connects guest memory
//! with files and disk images, [`growth`] tells the driver when a disk has grown.

mod disk;
#[cfg(any(test, fuzzing))]
mod fuzz;
mod growth;
mod joined;
mod request;
mod transfer;

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

#[cfg(any(test, fuzzing))]
pub use self::fuzz::serve_disk;
pub(crate) use self::{
    disk::Backing,
    growth::{GrowingDisk, GrowthWatch},
    joined::{JoinedFile, JoinedFiles, JoinedFilesError},
};
use self::{
    disk::{Disk, SECTOR_SIZE},
    growth::ConfigInterrupt,
};
use super::{
    device::{ActivateError, Activation, COMMON_FEATURES, Device, copy_config},
    queue::{DeviceQueue, QueueError},
};
use crate::{
    devices::{counters::Counters, stall_timer::StallTimer, system_calls},
    jail::seccomp,
};

const QUEUE_SIZE: u16 = 256;

/// The maximum number of data segments of a request: the descriptors of a queue, minus header and status.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;

#[derive(Debug)]
pub(crate) struct Block {
    disk: Arc<Disk>,
    config_interrupt: Arc<ConfigInterrupt>,
    is_watched: bool,
    queue_sizes: Vec<u16>,
    workers: Vec<Worker>,
}

impl Block {
    /// A device with `queues` queues, at least one, for the disk on `backing`. `stall_timer` is started while a request
    /// is in progress.
    ///
    /// # Errors
    ///
    /// The size of the disk cannot be read.
    pub(crate) fn new(
        serial: String,
        backing: Backing,
        queues: u16,
        stall_timer: &Arc<StallTimer>,
    ) -> io::Result<Self> {
        let queues = usize::from(queues.max(1));
        let counters = Counters::with_queues(serial, queues, stall_timer);
        Ok(Self {
            disk: Arc::new(Disk::new(backing, counters)?),
            config_interrupt: Arc::default(),
            is_watched: false,
            queue_sizes: vec![QUEUE_SIZE; queues],
            workers: Vec::new(),
        })
    }

    /// The disk for [`GrowthWatch`]. `None` if its size cannot change.
    pub(crate) fn growing_disk(&mut self) -> Option<GrowingDisk> {
        self.is_watched = self.disk.backing.can_grow();
        self.is_watched
            .then(|| GrowingDisk::new(self.disk.clone(), self.config_interrupt.clone()))
    }

    /// struct virtio_blk_config (virtio 1.3 §5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut field = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
        field(0, &self.disk.capacity.sectors().to_le_bytes());
        field(12, &MAX_SEGMENTS.to_le_bytes());
        field(20, &u32::try_from(SECTOR_SIZE).unwrap_or(0).to_le_bytes());
        field(34, &u16::try_from(self.queue_sizes.len()).unwrap_or(1).to_le_bytes());
        // Discard: the maximum number of sectors, one segment, alignment. Then write-zeroes: the maximum number of
        // sectors, one segment, may unmap.
        field(36, &request::MAX_ZERO_SECTORS.to_le_bytes());
        field(40, &1_u32.to_le_bytes());
        field(44, &self.disk.backing.discard_alignment().to_le_bytes());
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

    fn counters(&self) -> Arc<Counters> {
        self.disk.counters.clone()
    }

    fn features(&self) -> u64 {
        let mut features = COMMON_FEATURES | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
        if self.queue_sizes.len() > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        features
            | if self.disk.backing.is_read_only() {
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

    fn config_generation(&self) -> u32 {
        self.disk.capacity.generation()
    }

    fn changes_configuration(&self) -> bool {
        self.is_watched
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        for queue in activation.queues {
            // A driver takes completed requests from the used ring at once, unless its guest hangs. So the queue is also
            // pending while some are not taken.
            self.disk.counters.watch_used_chains(queue.index(), queue.used_chains());
            match Worker::start(self.disk.clone(), queue) {
                Ok(worker) => self.workers.push(worker),
                Err(error) => {
                    // The other queues must not be served: the driver is told that the device does not work.
                    self.reset();
                    return Err(ActivateError::Backend(format!(
                        "cannot start the thread of a queue: {error}"
                    )));
                }
            }
        }
        self.config_interrupt.connect(activation.interrupt);
        if self.disk.capacity.generation() != 0 {
            // The driver may have read the capacity before the disk has grown.
            self.config_interrupt.raise();
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.config_interrupt.disconnect();
        self.workers.clear();
        for queue in (0..).take(self.queue_sizes.len()) {
            self.disk.counters.watch_used_chains(queue, None);
        }
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
                seccomp::confine_thread(&system_calls::BLOCK);
                // Serve before the first wait: the first kick may have happened before the thread started.
                while !stopped.load(Ordering::SeqCst) {
                    let served = serve(&disk, &mut queue, &stopped)
                        .map_err(|error| error.to_string())
                        .and_then(|()| {
                            let wait = |error| format!("queue {}: cannot wait for requests: {error}", queue.index());
                            queue.kick().read().map_err(wait)
                        });
                    if let Err(error) = served {
                        disk.counters.add_error();
                        log::warn!(
                            target: disk.serial(),
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
        // The counter cannot overflow: each write adds one.
        let _ = self.kick.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread ends the process.
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
            let written = request::process(chain, disk, queue.index());
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

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        time::{Duration, Instant},
    };

    use super::{disk::Capacity, *};
    use crate::{
        devices::{
            log_capture::LogCapture,
            virtio::mock::{InterruptCounter, NEXT, WRITE, descriptor, device_queue, memory, stall_timer},
        },
        memory::MemoryRegions,
    };
    use nix::{
        fcntl::AT_FDCWD,
        sys::fanotify::{EventFFlags, Fanotify, FanotifyResponse, InitFlags, MarkFlags, MaskFlags, Response},
    };
    use virtio_queue::{Queue, QueueT, mock::MockSplitQueue};
    use vm_memory::{Bytes, GuestAddress};

    /// Waits until `condition` returns a value.
    fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(value) = condition() {
                return value;
            }
            assert!(Instant::now() < deadline, "{what}");
            thread::yield_now();
        }
    }

    fn disk(name: &str, file: File) -> Arc<Disk> {
        Arc::new(Disk {
            backing: Backing::File { file, read_only: false },
            capacity: Capacity::new(8),
            counters: Counters::with_queues(name, 1, &stall_timer()),
        })
    }

    #[test]
    fn worker_that_ends_because_of_a_broken_queue_names_disk_and_queue() {
        let log = LogCapture::start("broken-disk");
        let memory = memory();
        let mock = MockSplitQueue::new(&*memory, 16);
        mock.avail().idx().store(17);
        let disk = disk("broken-disk", tempfile::tempfile().unwrap());

        let worker = Worker::start(disk.clone(), device_queue(&mock, &memory).0).unwrap();
        let line = wait_for("no line", || log.lines().pop());
        drop(worker);

        assert!(
            line.starts_with(
                "a queue is no longer served, its requests are not completed: queue 0: the virtqueue is broken"
            ),
            "{line}"
        );
        assert_eq!(disk.counters.read().errors, 1);
    }

    /// Stores a request that reads one sector, in the first descriptors of `mock`.
    fn store_read_request(mock: &MockSplitQueue<'_, MemoryRegions>) {
        let layout = [(0x8000, 16, NEXT), (0x9000, 512, NEXT | WRITE), (0xf000, 1, WRITE)];
        for (index, (address, length, flags)) in (0..).zip(layout) {
            let entry = descriptor(address, length, flags, index + 1);
            mock.desc_table().store(index, entry).unwrap();
        }
    }

    /// In another monitor, the completion of one of the two requests freed the buffer of the other.
    #[test]
    fn request_made_available_twice_is_served_twice_cve_2026_45782() {
        let memory = memory();
        let mock = MockSplitQueue::new(&*memory, 16);
        store_read_request(&mock);
        for slot in 0..2 {
            mock.avail().ring().ref_at(slot).unwrap().store(0);
        }
        mock.avail().idx().store(2);
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let disk = disk("duplicate", file);

        let worker = Worker::start(disk.clone(), device_queue(&mock, &memory).0).unwrap();
        wait_for("the requests are not served", || {
            (mock.used().idx().load() == 2).then_some(())
        });
        drop(worker);

        for slot in 0..2 {
            let element = mock.used().ring().ref_at(slot).unwrap().load();
            assert_eq!((element.id(), element.len()), (0, 513));
        }
        let counters = disk.counters.read();
        assert_eq!((counters.requests, counters.errors), (2, 0));
    }

    #[test]
    fn queue_is_pending_while_the_guest_does_not_take_completed_requests() {
        let memory = memory();
        let mock = MockSplitQueue::new(&*memory, 16);
        // A request without a header, which fails.
        mock.desc_table().store(0, descriptor(0xf000, 1, WRITE, 0)).unwrap();
        mock.avail().ring().ref_at(0).unwrap().store(0);
        mock.avail().idx().store(1);
        let mut queue: Queue = mock.create_queue().unwrap();
        queue.set_event_idx(true);
        let used_event = GuestAddress(queue.avail_ring() + 4 + 2 * 16);
        memory.write_obj(0_u16, used_event).unwrap();
        let (kick, interrupt) = (EventFd::new(0).unwrap(), Arc::new(InterruptCounter::default()));
        let backing = Backing::File {
            file: tempfile::tempfile().unwrap(),
            read_only: false,
        };
        let mut block = Block::new("untaken".to_owned(), backing, 1, &stall_timer()).unwrap();
        let activation = Activation {
            memory: memory.clone(),
            features: block.features(),
            queues: vec![DeviceQueue::new(0, queue, kick, memory.clone(), interrupt.clone())],
            interrupt,
        };
        block.activate(activation).unwrap();
        wait_for("the request is not served", || {
            (mock.used().idx().load() == 1).then_some(())
        });

        let [pending] = &block.counters().pending()[..] else {
            panic!("{:?}", block.counters());
        };
        assert_eq!(pending.place, "queue 0");
        assert_eq!(
            pending.reason,
            "the guest has not taken its completed requests (1) from the used ring: it may hang"
        );

        memory.write_obj(1_u16, used_event).unwrap();
        assert_eq!(block.counters().pending(), []);
        memory.write_obj(0_u16, used_event).unwrap();
        block.reset();
        assert_eq!(block.counters().pending(), []);
    }

    #[test]
    fn queue_is_pending_while_the_host_does_not_complete_a_read() {
        let memory = memory();
        let mock = MockSplitQueue::new(&*memory, 16);
        store_read_request(&mock);
        mock.avail().ring().ref_at(0).unwrap().store(0);
        mock.avail().idx().store(1);
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        // The kernel holds each read of the file until this process allows it: a host whose storage hangs.
        let hold = Fanotify::init(InitFlags::FAN_CLASS_CONTENT, EventFFlags::O_RDONLY).unwrap();
        hold.mark(
            MarkFlags::FAN_MARK_ADD,
            MaskFlags::FAN_ACCESS_PERM,
            AT_FDCWD,
            Some(file.path()),
        )
        .unwrap();
        let disk = disk("slow-disk", file.reopen().unwrap());

        let worker = Worker::start(disk.clone(), device_queue(&mock, &memory).0).unwrap();
        let event = hold.read_events().unwrap().remove(0);

        let [pending] = &disk.counters.pending()[..] else {
            panic!("{:?}", disk.counters);
        };
        assert_eq!(pending.place, "queue 0");
        assert!(
            pending.reason.starts_with("a read of the disk's file does not return"),
            "{pending:?}"
        );

        let allow = FanotifyResponse::new(event.fd().unwrap(), Response::FAN_ALLOW);
        hold.write_response(allow).unwrap();
        wait_for("the request is not served", || {
            (mock.used().idx().load() == 1).then_some(())
        });
        drop(worker);

        assert_eq!(disk.counters.pending(), []);
        let counters = disk.counters.read();
        assert_eq!(
            (counters.requests, counters.bytes_to_guest, counters.errors),
            (1, 512, 0)
        );
    }
}
