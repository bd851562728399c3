//! The threads for requests that wait for a disk: fsync, fsyncdir and syncfs. One thread serves all of them until one
//! is slow. As long as all threads are busy, each further request gets a new thread, up to [`MAX_SYNC_THREADS`], so
//! that a flush that hangs, for example at a dead NFS server, delays no flush of another file system.

use std::{
    collections::VecDeque,
    io,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, MutexGuard};

/// How many flushes may hang before all others wait.
pub(super) const MAX_SYNC_THREADS: u32 = 16;

/// How long a request waits for a thread before this is reported.
const REPORT_AFTER: Duration = Duration::from_secs(10);

/// The stack of a thread, in bytes.
const STACK_SIZE: usize = 512 << 10;

/// The threads, and the requests of type `R` that wait for one. Clones share them.
pub(super) struct SyncThreads<R>(Arc<Shared<R>>);

struct Shared<R> {
    state: Mutex<State<R>>,
    /// Signalled for each request that is added for an idle thread.
    added: Condvar,
    max_threads: u32,
    max_waiting: usize,
}

struct State<R> {
    /// Requests that no thread has taken, each with the time of its arrival.
    waiting: VecDeque<(Instant, R)>,
    threads: u32,
    /// The number of threads that take the next request without waiting for a file system.
    idle: u32,
    is_reported: bool,
}

/// Why a request is not handled by a thread.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused<R> {
    /// More requests wait than the queues have descriptors.
    TooMany,
    /// No thread exists, and none can be started.
    NoThread(R),
}

impl<R: Send + 'static> SyncThreads<R> {
    /// Without threads. At most `max_waiting` requests wait for one.
    pub(super) fn new(max_waiting: usize) -> Self {
        Self::with_limits(MAX_SYNC_THREADS, max_waiting)
    }

    /// Never starts a thread.
    #[cfg(any(test, fuzzing))]
    pub(super) fn without_threads() -> Self {
        Self::with_limits(0, 1)
    }

    fn with_limits(max_threads: u32, max_waiting: usize) -> Self {
        Self(Arc::new(Shared {
            state: Mutex::new(State {
                waiting: VecDeque::new(),
                threads: 0,
                idle: 0,
                is_reported: false,
            }),
            added: Condvar::new(),
            max_threads,
            max_waiting,
        }))
    }

    /// Has a thread call `flush` with `request`, and then `reply`, which cannot hang, with the result. Each new thread
    /// calls `prepare` first.
    pub(super) fn submit<T>(
        &self,
        request: R,
        prepare: fn(),
        flush: impl FnMut(R) -> T + Send + 'static,
        reply: impl FnMut(T) + Send + 'static,
    ) -> Result<(), Refused<R>> {
        let mut state = self.0.state.lock();
        if state.waiting.len() >= self.0.max_waiting {
            return Err(Refused::TooMany);
        }
        if state.idle as usize > state.waiting.len() {
            state.waiting.push_back((Instant::now(), request));
            self.0.added.notify_one();
            return Ok(());
        }
        if state.threads < self.0.max_threads {
            match self.spawn(prepare, flush, reply) {
                Ok(()) => state.threads += 1,
                Err(error) => log::error!("cannot start a thread for fsync: {error}"),
            }
        }
        if state.threads == 0 {
            return Err(Refused::NoThread(request));
        }
        state.waiting.push_back((Instant::now(), request));
        state.report_hang();
        Ok(())
    }

    fn spawn<T>(
        &self,
        prepare: fn(),
        flush: impl FnMut(R) -> T + Send + 'static,
        reply: impl FnMut(T) + Send + 'static,
    ) -> io::Result<()> {
        let shared = self.0.clone();
        let thread = thread::Builder::new().name("sync".to_owned()).stack_size(STACK_SIZE);
        thread
            .spawn(move || {
                prepare();
                shared.serve(flush, reply)
            })
            .map(drop)
    }
}

impl<R> Shared<R> {
    /// Handles requests for ever.
    fn serve<T>(&self, mut flush: impl FnMut(R) -> T, mut reply: impl FnMut(T)) -> ! {
        let mut state = self.state.lock();
        loop {
            while let Some((_, request)) = state.waiting.pop_front() {
                state.is_reported = false;
                let result = MutexGuard::unlocked(&mut state, || flush(request));
                // Before the reply: the guest's next request must find this thread idle.
                state.idle += 1;
                MutexGuard::unlocked(&mut state, || reply(result));
                state.idle -= 1;
            }
            state.idle += 1;
            self.added.wait(&mut state);
            state.idle -= 1;
        }
    }
}

impl<R> State<R> {
    /// Reports once that all threads hang.
    fn report_hang(&mut self) {
        let longest = self.waiting.front().map(|(arrived, _)| arrived.elapsed());
        if self.threads == MAX_SYNC_THREADS && !self.is_reported && longest.is_some_and(|waited| waited > REPORT_AFTER)
        {
            self.is_reported = true;
            log::error!(
                "{MAX_SYNC_THREADS} flushes (fsync) hang: all further ones of this pod wait for file systems of the \
                 host that do not answer"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Long enough for any thread to start.
    const LIMIT: Duration = Duration::from_secs(20);

    /// A request that ends when its sender is dropped, and what it reports to.
    struct Flush {
        hung: mpsc::Receiver<()>,
        started: mpsc::Sender<usize>,
        number: usize,
    }

    fn handle(flush: Flush) {
        flush.started.send(flush.number).unwrap();
        let _ = flush.hung.recv();
    }

    #[test]
    fn flush_that_hangs_delays_no_other_until_all_threads_hang() {
        let threads = SyncThreads::new(MAX_SYNC_THREADS as usize + 2);
        let (started, starts) = mpsc::channel();
        let mut hang = Vec::new();
        let mut submit = |number| {
            let (end, hung) = mpsc::channel();
            let started = started.clone();
            let submitted = threads.submit(Flush { hung, started, number }, || {}, handle, drop);
            hang.push(end);
            submitted.is_ok()
        };
        for number in 0..MAX_SYNC_THREADS as usize {
            assert!(submit(number));
            assert_eq!(starts.recv_timeout(LIMIT), Ok(number));
        }

        assert!(submit(100));
        assert_eq!(threads.0.state.lock().threads, MAX_SYNC_THREADS);
        assert!(starts.recv_timeout(Duration::from_millis(100)).is_err());
        hang.remove(3);
        assert_eq!(starts.recv_timeout(LIMIT), Ok(100));
    }

    #[test]
    fn flushes_one_after_the_other_need_one_thread() {
        let threads = SyncThreads::new(4);
        let (done, finished) = mpsc::channel();
        for number in 0..100 {
            let done = done.clone();
            let submitted = threads.submit(number, || {}, |number| number, move |number| done.send(number).unwrap());
            assert_eq!(submitted, Ok(()));
            assert_eq!(finished.recv_timeout(LIMIT), Ok(number));
        }
        assert_eq!(threads.0.state.lock().threads, 1);
    }

    #[test]
    fn requests_beyond_the_limit_are_refused() {
        let threads = SyncThreads::new(1);
        let (_end, hung) = mpsc::channel::<()>();
        let hung = Arc::new(Mutex::new(hung));
        let results: Vec<_> = (0..MAX_SYNC_THREADS + 8)
            .map(|number| {
                let hung = hung.clone();
                threads.submit(number, || {}, move |_| hung.lock().recv(), |_| {})
            })
            .collect();
        assert!(results.contains(&Err(Refused::TooMany)), "{results:?}");
        assert!(threads.0.state.lock().waiting.len() <= 1);
    }
}
