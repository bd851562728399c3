//! Threads that continue to serve the queues while a request hangs, for example at a dead NFS or FUSE server, or at a
//! frozen file system. Only requests for that file system then wait.
//!
//! One thread watches the thread that serves. If a request takes longer than [`HANG_LIMIT`], the watching thread serves
//! the queues itself, and another one watches it. When the first thread returns from its request, it serves again, and
//! the others end. While the queues are empty, all threads sleep.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, unshare};
use parking_lot::Mutex;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use vhost_user_backend::{VringMutex, VringT};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{guest_memory::Memory, system_calls};
use crate::jail::seccomp;

/// How long a request may take before another thread serves the queues.
const HANG_LIMIT: Duration = Duration::from_millis(50);

/// How many requests may hang before no thread is left to serve the queues.
pub(super) const MAX_HUNG_REQUESTS: u32 = 64;

/// When to try again if no thread can serve the queues.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// The stack of a thread, in bytes.
const STACK_SIZE: usize = 512 << 10;

/// The handling of requests.
pub(super) trait ServeQueue: Send + Sync + 'static {
    /// Handles all requests in the queue of `ring`, on the thread of `worker`. Passes those that may hang to
    /// [`Standby::watch`].
    fn serve_queue(&self, ring: &VringMutex<Memory>, worker: &Worker);
}

/// A thread that serves the queues.
#[derive(Debug, Default)]
pub(super) struct Worker {
    /// When the request that it handles began, in milliseconds since [`Standby::epoch`], at least 1. 0 between
    /// requests.
    started: AtomicU64,
    /// Another thread serves the queues, because a request hung.
    replaced: AtomicBool,
}

/// The threads of a file server.
#[derive(Debug)]
pub(super) struct Standby {
    epoch: Instant,
    timer: OwnedFd,
    /// Whether the timer will wake the watching thread.
    is_armed: AtomicBool,
    /// The thread of the vhost-user daemon.
    main: Arc<Worker>,
    /// The thread that serves the queues, and is watched.
    current: Mutex<Arc<Worker>>,
    hung_requests: AtomicU32,
    has_watcher: OnceLock<()>,
}

impl Standby {
    pub(super) fn new() -> io::Result<Self> {
        let main = Arc::new(Worker::default());
        Ok(Self {
            epoch: Instant::now(),
            timer: timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?,
            is_armed: AtomicBool::new(false),
            current: Mutex::new(main.clone()),
            main,
            hung_requests: AtomicU32::new(0),
            has_watcher: OnceLock::new(),
        })
    }

    /// The thread of the vhost-user daemon.
    pub(super) fn main(&self) -> &Arc<Worker> {
        &self.main
    }

    /// Runs `handle`, a request that may hang, on the thread of `worker`.
    pub(super) fn watch<T>(&self, worker: &Worker, handle: impl FnOnce() -> T) -> T {
        // Sequentially consistent, as in `wait_for_hang`: each thread writes one of `started` and `is_armed` and then
        // reads the other, and one of them must see what the other wrote.
        worker.started.store(self.now(), Ordering::SeqCst);
        // The timer stays armed while requests keep coming, so that most of them need not arm it.
        if !self.is_armed.load(Ordering::SeqCst) && !self.is_armed.swap(true, Ordering::SeqCst) {
            self.arm(HANG_LIMIT);
        }
        let result = handle();
        worker.started.store(0, Ordering::Release);
        result
    }

    /// Milliseconds since `epoch`, at least 1.
    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis())
            .unwrap_or(u64::MAX)
            .max(1)
    }

    fn arm(&self, delay: Duration) {
        let timer = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec {
                tv_sec: i64::try_from(delay.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(delay.subsec_nanos().max(1)),
            },
        };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer) {
            log::error!("cannot watch for requests that hang: {error}");
        }
    }

    /// Called by the main thread when it has emptied a queue: from now on it serves the queues again.
    pub(super) fn main_returns(&self) {
        if self.main.replaced.swap(false, Ordering::AcqRel) {
            // Watched from now on, and not only when the other thread has noticed it.
            *self.current.lock() = self.main.clone();
        }
    }

    /// Starts the first watching thread, once.
    pub(super) fn start(self: &Arc<Self>, queues: &Arc<impl ServeQueue>, rings: &[VringMutex<Memory>]) {
        self.has_watcher.get_or_init(|| {
            if let Err(error) = self.spawn_watcher(queues, rings.to_vec()) {
                log::error!("cannot start a thread for requests that hang: {error}");
            }
        });
    }

    fn spawn_watcher(
        self: &Arc<Self>,
        queues: &Arc<impl ServeQueue>,
        rings: Vec<VringMutex<Memory>>,
    ) -> io::Result<()> {
        let (standby, queues) = (self.clone(), queues.clone());
        let is_inherited = seccomp::is_confined_to(&system_calls::WORKER);
        let watcher = thread::Builder::new().name("standby".to_owned()).stack_size(STACK_SIZE);
        watcher
            .spawn(move || {
                seccomp::confine_started_thread(&system_calls::WORKER, is_inherited);
                if let Err(error) = standby.watch_and_serve(&queues, rings) {
                    log::error!("a thread for requests that hang has ended: {error}");
                }
            })
            .map(drop)
    }

    /// Watches the serving thread until a request hangs, and then serves the queues until that is not needed any more.
    fn watch_and_serve(
        self: &Arc<Self>,
        queues: &Arc<impl ServeQueue>,
        rings: Vec<VringMutex<Memory>>,
    ) -> io::Result<()> {
        // Some requests change the working directory for a moment.
        unshare(CloneFlags::CLONE_FS)?;
        self.wait_for_hang()?;
        // Without a successor, a second request that hangs would stop everything.
        while let Err(error) = self.spawn_watcher(queues, rings.clone()) {
            log::error!("a request hangs, and no thread can be started to serve others: {error}");
            self.hung_requests.fetch_sub(1, Ordering::AcqRel);
            self.arm(RETRY_INTERVAL);
            self.wait_for_hang()?;
        }
        let worker = Arc::new(Worker::default());
        std::mem::replace(&mut *self.current.lock(), worker.clone())
            .replaced
            .store(true, Ordering::Release);
        self.arm(HANG_LIMIT);
        let served = self.serve(&**queues, &rings, &worker);
        if !worker.replaced.load(Ordering::Acquire) {
            *self.current.lock() = self.main.clone();
        }
        self.hung_requests.fetch_sub(1, Ordering::AcqRel);
        served
    }

    /// Returns when a request hangs, and this thread must serve the queues. The timer is armed.
    fn wait_for_hang(&self) -> io::Result<()> {
        let limit = u64::try_from(HANG_LIMIT.as_millis()).unwrap_or(u64::MAX);
        loop {
            rustix::io::retry_on_intr(|| rustix::io::read(&self.timer, &mut [0; 8]))?;
            let worker = self.current.lock().clone();
            let mut started = worker.started.load(Ordering::Acquire);
            if started == 0 {
                self.is_armed.store(false, Ordering::SeqCst);
                // A request may have begun just before, and not have armed the timer.
                started = worker.started.load(Ordering::SeqCst);
                if started == 0 || self.is_armed.swap(true, Ordering::SeqCst) {
                    continue;
                }
            }
            let took = self.now().saturating_sub(started);
            if took < limit {
                self.arm(Duration::from_millis(limit - took));
            } else if self.hung_requests.load(Ordering::Acquire) < MAX_HUNG_REQUESTS {
                self.hung_requests.fetch_add(1, Ordering::AcqRel);
                return Ok(());
            } else {
                log::error!(
                    "{MAX_HUNG_REQUESTS} requests hang: all files of this pod wait for file systems of the host that do \
                     not answer"
                );
                self.arm(RETRY_INTERVAL);
            }
        }
    }

    /// Serves the queues until the main thread serves them again, or another thread has replaced this one.
    fn serve(&self, queues: &impl ServeQueue, rings: &[VringMutex<Memory>], worker: &Worker) -> io::Result<()> {
        let epoll = Epoll::new()?;
        for ring in rings {
            // Edge-triggered, so that this thread does not read the eventfd: the main thread must still find it
            // readable.
            if let Some(kick) = ring.get_ref().get_kick() {
                let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
                epoll.ctl(ControlOperation::Add, kick.as_raw_fd(), event)?;
            }
        }
        loop {
            for ring in rings {
                queues.serve_queue(ring, worker);
            }
            let is_needed = || self.main.replaced.load(Ordering::Acquire) && !worker.replaced.load(Ordering::Acquire);
            if !is_needed() {
                return Ok(());
            }
            rustix::io::retry_on_intr(|| {
                epoll
                    .wait(-1, &mut [EpollEvent::default(); 2])
                    .map_err(|error| rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO))
            })?;
            if !is_needed() {
                return Ok(());
            }
        }
    }
}
