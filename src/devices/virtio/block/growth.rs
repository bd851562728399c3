//! Growth of disks: a thread compares the sizes of their files with their capacities, and tells the drivers of larger
//! ones (virtio 1.3 §5.2.5: a change of `capacity` is a configuration change).
//!
//! A timer, because no event of the host fits: inotify reports each write of the guest as well, and a block device has
//! no inotify event. A thread, because a file system that hangs blocks the check.

use std::{
    convert::Infallible,
    fmt, io,
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use parking_lot::Mutex;

use super::disk::{Disk, SECTOR_SIZE};
use crate::{
    devices::{system_calls, virtio::interrupt::Interrupt},
    jail::seccomp,
};

/// The time between two checks.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// The configuration interrupt of a device. It is connected while a driver uses the device.
#[derive(Default)]
pub(super) struct ConfigInterrupt(Mutex<Option<Arc<dyn Interrupt>>>);

impl ConfigInterrupt {
    pub(super) fn connect(&self, interrupt: Arc<dyn Interrupt>) {
        *self.0.lock() = Some(interrupt);
    }

    pub(super) fn disconnect(&self) {
        self.0.lock().take();
    }

    pub(super) fn raise(&self) {
        if let Some(interrupt) = &*self.0.lock() {
            interrupt.notify_config_change();
        }
    }
}

impl fmt::Debug for ConfigInterrupt {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let connected = self.0.lock().is_some();
        formatter
            .debug_struct("ConfigInterrupt")
            .field("connected", &connected)
            .finish()
    }
}

/// A disk whose file may grow.
#[derive(Debug)]
pub(crate) struct GrowingDisk {
    disk: Arc<Disk>,
    config_interrupt: Arc<ConfigInterrupt>,
    /// The problem that the last check found. It is logged when it changes.
    problem: Option<String>,
}

impl GrowingDisk {
    pub(super) fn new(disk: Arc<Disk>, config_interrupt: Arc<ConfigInterrupt>) -> Self {
        Self {
            disk,
            config_interrupt,
            problem: None,
        }
    }

    /// Reads the size of the file. If it is larger than the disk, the disk grows, and the driver gets an interrupt. A
    /// disk never shrinks: the guest may have data there. Can block on the file system of the host.
    pub(super) fn check(&mut self) {
        let capacity = self.disk.capacity.sectors();
        let problem = match self.disk.backing.size() {
            Ok(size) if size / SECTOR_SIZE > capacity => {
                self.disk.capacity.grow(size / SECTOR_SIZE);
                self.config_interrupt.raise();
                None
            }
            Ok(size) if size / SECTOR_SIZE < capacity => Some(format!(
                "its file has shrunk to {size} bytes, and the disk keeps {} bytes: the guest gets I/O errors for the \
                 missing part. Extend the file again",
                capacity * SECTOR_SIZE
            )),
            Ok(_) => None,
            Err(error) => Some(format!(
                "the guest does not learn about a new size of the disk: {error}"
            )),
        };
        if let Some(text) = problem.as_ref().filter(|_| problem != self.problem) {
            log::warn!(target: self.disk.serial(), "{text}");
        }
        self.problem = problem;
    }
}

/// The thread that checks the sizes of disks. It ends when this is dropped, or after the checks that are in progress.
#[derive(Debug)]
pub(crate) struct GrowthWatch {
    _stop: mpsc::Sender<Infallible>,
}

impl GrowthWatch {
    /// Starts the thread for `disks`, unless there are none.
    ///
    /// # Errors
    ///
    /// The thread cannot be created.
    pub(crate) fn start(disks: Vec<GrowingDisk>) -> io::Result<Option<Self>> {
        Self::start_with_interval(disks, CHECK_INTERVAL)
    }

    fn start_with_interval(mut disks: Vec<GrowingDisk>, interval: Duration) -> io::Result<Option<Self>> {
        if disks.is_empty() {
            return Ok(None);
        }
        let (stop, stopped) = mpsc::channel::<Infallible>();
        let thread = thread::Builder::new()
            .name("disk sizes".to_owned())
            .stack_size(128 << 10);
        thread.spawn(move || {
            seccomp::confine_thread(&system_calls::DISK_SIZES);
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(interval) {
                for disk in &mut disks {
                    disk.check();
                }
            }
        })?;
        Ok(Some(Self { _stop: stop }))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::unix::fs::FileExt,
        sync::atomic::{AtomicUsize, Ordering},
        time::Instant,
    };

    use nutshell_disk_image::Image;
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    use vmm_sys_util::eventfd::EventFd;

    use super::{
        super::{Backing, Block},
        *,
    };
    use crate::devices::{
        log_capture::LogCapture,
        virtio::{
            device::{Activation, Device},
            mock::{memory, stall_timer},
        },
    };

    #[derive(Debug, Default)]
    struct ConfigChanges(AtomicUsize);

    impl Interrupt for ConfigChanges {
        fn notify_used(&self, _queue_index: u16) {}

        fn notify_config_change(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }

        fn delegate(&self, _queue_index: u16) -> io::Result<EventFd> {
            EventFd::new(0)
        }
    }

    fn block(serial: &str, backing: Backing) -> Block {
        Block::new(serial.to_owned(), backing, 1, &stall_timer()).unwrap()
    }

    fn raw(serial: &str, size: u64) -> (Block, File) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        let backing = Backing::File {
            file: file.try_clone().unwrap(),
            read_only: false,
        };
        (block(serial, backing), file)
    }

    fn activate(block: &mut Block) -> Arc<ConfigChanges> {
        let interrupt = Arc::new(ConfigChanges::default());
        let activation = Activation {
            memory: memory(),
            features: block.features(),
            queues: Vec::new(),
            interrupt: interrupt.clone(),
        };
        block.activate(activation).unwrap();
        interrupt
    }

    fn capacity(block: &Block) -> u64 {
        let mut bytes = [0; 8];
        block.read_config(0, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn driver_learns_about_a_larger_file_by_an_interrupt_and_a_new_generation() {
        let (mut block, file) = raw("grows", 4096);
        let interrupt = activate(&mut block);
        let mut disk = block.growing_disk().unwrap();
        disk.check();
        assert_eq!((capacity(&block), interrupt.0.load(Ordering::SeqCst)), (8, 0));
        for (changes, size, sectors) in [(1, 8192, 16), (2, (5 << 40) + 511, 5 << 31)] {
            let before = block.config_generation();
            file.set_len(size).unwrap();

            disk.check();
            disk.check();

            assert_eq!(capacity(&block), sectors);
            assert_ne!(block.config_generation(), before);
            assert_eq!(interrupt.0.load(Ordering::SeqCst), changes);
        }
        block.reset();
        file.set_len((6 << 40) + 511).unwrap();
        disk.check();
        assert_eq!(
            interrupt.0.load(Ordering::SeqCst),
            2,
            "a device without a driver interrupts"
        );
        assert_eq!(capacity(&block), 6 << 31);
    }

    #[test]
    fn driver_that_read_the_capacity_before_the_growth_is_interrupted() {
        let (mut block, file) = raw("grows-early", 512);
        assert_eq!(activate(&mut block).0.load(Ordering::SeqCst), 0);
        block.reset();
        file.set_len(1024).unwrap();
        block.growing_disk().unwrap().check();
        assert_eq!(activate(&mut block).0.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn smaller_file_is_reported_once_and_the_disk_keeps_its_size() {
        let (mut block, file) = raw("shrinks", 8192);
        let interrupt = activate(&mut block);
        let mut disk = block.growing_disk().unwrap();
        let log = LogCapture::on_this_thread("shrinks");
        for size in [4096, 4096, 8192, 4096] {
            file.set_len(size).unwrap();
            disk.check();
        }
        let [first, second] = &log.lines()[..] else {
            panic!("{:?}", log.lines())
        };
        assert_eq!(first, second);
        assert!(
            first.starts_with("its file has shrunk to 4096 bytes, and the disk keeps 8192 bytes"),
            "{first}"
        );
        assert_eq!((capacity(&block), interrupt.0.load(Ordering::SeqCst)), (16, 0));
    }

    #[test]
    fn disk_that_cannot_grow_is_not_watched() {
        let base = tempfile::tempfile().unwrap();
        base.set_len(512).unwrap();
        let image = Backing::Image(Box::new(Image::open_read_only(Box::new(base)).unwrap()));
        assert!(block("image", image).growing_disk().is_none());
        let sealed = File::from(memfd_create("seed", MemfdFlags::ALLOW_SEALING).unwrap());
        sealed.write_all_at(&[0; 512], 0).unwrap();
        fcntl_add_seals(&sealed, SealFlags::GROW).unwrap();
        let sealed = Backing::File {
            file: sealed,
            read_only: true,
        };
        assert!(block("sealed", sealed).growing_disk().is_none());
        assert!(GrowthWatch::start(Vec::new()).unwrap().is_none());
    }

    #[test]
    fn thread_checks_until_the_watch_is_dropped() {
        let (mut block, file) = raw("watched", 512);
        let interrupt = activate(&mut block);
        let disks = vec![block.growing_disk().unwrap()];
        let watch = GrowthWatch::start_with_interval(disks, Duration::from_millis(1)).unwrap();
        file.set_len(1024).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while interrupt.0.load(Ordering::SeqCst) == 0 {
            assert!(Instant::now() < deadline);
            thread::yield_now();
        }
        assert_eq!(capacity(&block), 2);
        drop(watch);
        // The thread had a reference.
        while Arc::strong_count(&block.disk) > 1 {
            assert!(Instant::now() < deadline);
            thread::yield_now();
        }
    }
}
