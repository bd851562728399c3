//! Work that blocks on a file system, with a deadline. A hung volume must not hang the shim: a call that does not
//! return occupies a separate thread until the file system answers, and its caller gets an error.

use std::{
    cell::Cell,
    io,
    ops::{Deref, DerefMut},
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::oneshot};

/// How long a file system of the host may take for one step of a call: a few lookups, an open, or a mount.
pub(crate) const FILE_SYSTEM_LIMIT: Duration = Duration::from_secs(8);

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BlockingError {
    /// The work continues on its thread.
    #[error(
        "{action}: not done within {} s, because a file system of this host does not answer: look for a dead network \
         file system or FUSE server among the container's volumes",
        limit.as_secs_f32()
    )]
    TimedOut { action: &'static str, limit: Duration },
    /// The work panicked, or the runtime is shutting down.
    #[error("{0}: interrupted by a bug in the shim (see containerd's log) or by its shutdown")]
    Lost(&'static str),
}

/// Runs `work` on another thread, and waits for at most `limit`, without the Tokio runtime: for the commands of an
/// administrator, such as `check`. Work that takes longer continues on its thread.
///
/// # Errors
///
/// [`io::ErrorKind::TimedOut`], the error of the start of a thread, or another one if `work` panics.
pub(crate) fn run_without_runtime<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (sender, receiver) = mpsc::sync_channel(1);
    thread::Builder::new().name("blocking".to_owned()).spawn(move || {
        // The caller may have given up.
        let _ = sender.send(work());
    })?;
    receiver.recv_timeout(limit).map_err(|error| match error {
        RecvTimeoutError::Timeout => {
            let text = format!(
                "not done within {} s, because a file system of this host does not answer: look for a dead network \
                 file system or FUSE server",
                limit.as_secs_f32()
            );
            io::Error::new(io::ErrorKind::TimedOut, text)
        }
        RecvTimeoutError::Disconnected => io::Error::other("interrupted by a bug: see the message of the panic above"),
    })
}

/// Runs `work` on another thread, and waits for at most [`FILE_SYSTEM_LIMIT`]. `action` names it in errors. A result
/// that comes later is dropped. Needs the Tokio runtime.
pub(crate) async fn run<T: Send + 'static>(
    action: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, BlockingError> {
    run_or_undo(action, FILE_SYSTEM_LIMIT, work, drop).await
}

/// Like [`run`], with a `limit`. A result that comes later is passed to `undo`, on the same thread.
pub(crate) async fn run_or_undo<T: Send + 'static>(
    action: &'static str,
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
    undo: impl FnOnce(T) + Send + 'static,
) -> Result<T, BlockingError> {
    let (sender, mut receiver) = oneshot::channel();
    // Locked while a result is delivered and while the caller gives up, so that exactly one of them happens.
    let abandoned = Arc::new(Mutex::new(false));
    let abandoned_by_caller = abandoned.clone();
    tokio::task::spawn_blocking(move || {
        MAY_BLOCK.set(true);
        let result = work();
        let abandoned = abandoned_by_caller.lock();
        if *abandoned {
            drop(abandoned);
            undo(result);
        } else if let Err(result) = sender.send(result) {
            // The caller's future was dropped.
            drop(abandoned);
            undo(result);
        }
    });
    if let Ok(result) = tokio::time::timeout(limit, &mut receiver).await {
        return result.map_err(|_| BlockingError::Lost(action));
    }
    let mut abandoned = abandoned.lock();
    // The result may have been sent just now.
    receiver.try_recv().map_err(|_| {
        *abandoned = true;
        BlockingError::TimedOut { action, limit }
    })
}

thread_local! {
    /// Whether this is a thread of the pool for work that blocks. It is never reset: such a thread runs nothing else.
    static MAY_BLOCK: Cell<bool> = const { Cell::new(false) };
}

/// An open file of a user, or several: close(2) can wait for its file system, because NFS writes back and FUSE asks its
/// server. So it is dropped on another thread, unless this one runs the work of [`run`] or is outside of a Tokio
/// runtime. To wait for the close, drop it in the work of [`run`].
#[derive(Debug)]
pub(crate) struct DropOffThread<T: Send + 'static>(Option<T>);

impl<T: Send + 'static> DropOffThread<T> {
    /// The value, which the caller drops.
    pub(crate) fn into_inner(mut self) -> T {
        self.0.take().expect(PRESENT)
    }
}

/// Only [`DropOffThread::into_inner`] and the drop take the value, and nothing uses it after them.
const PRESENT: &str = "the value is present until the end";

impl<T: Send + 'static> From<T> for DropOffThread<T> {
    fn from(value: T) -> Self {
        Self(Some(value))
    }
}

impl<T: Send + 'static> Deref for DropOffThread<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect(PRESENT)
    }
}

impl<T: Send + 'static> DerefMut for DropOffThread<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().expect(PRESENT)
    }
}

impl<T: Send + 'static> Drop for DropOffThread<T> {
    fn drop(&mut self) {
        let Some(value) = self.0.take() else { return };
        match Handle::try_current() {
            Ok(runtime) if !MAY_BLOCK.get() => drop(runtime.spawn_blocking(move || {
                MAY_BLOCK.set(true);
                drop(value);
            })),
            _ => drop(value),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{future::Future, thread::ThreadId};

    use nutshell_fixtures::HungVolume;

    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn result_in_time_is_returned_and_not_undone() {
        let result = run_or_undo("count", Duration::from_secs(20), || 7, |_| panic!("undone")).await;
        assert_eq!(result.unwrap(), 7);
    }

    #[tokio::test]
    async fn work_that_hangs_times_out_and_its_late_result_is_undone() {
        let (answer, hung) = mpsc::channel::<u32>();
        let (sender, undone) = mpsc::channel();
        let result = run_or_undo(
            "open it",
            SHORT,
            move || hung.recv().unwrap(),
            move |late| sender.send(late).unwrap(),
        );

        let error = result.await.unwrap_err().to_string();
        assert!(error.starts_with("open it: not done within 0.05 s"), "{error}");
        assert!(undone.try_recv().is_err());

        answer.send(7).unwrap();
        assert_eq!(undone.recv_timeout(Duration::from_secs(20)), Ok(7));
    }

    #[test]
    fn work_without_a_runtime_times_out_too() {
        let (_answer, hung) = mpsc::channel::<()>();
        let error = run_without_runtime(SHORT, move || hung.recv()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(run_without_runtime(Duration::from_secs(20), || 7).unwrap(), 7);
        let panicked = run_without_runtime::<()>(Duration::from_secs(20), || panic!("on purpose")).unwrap_err();
        assert!(panicked.to_string().starts_with("interrupted by a bug"), "{panicked}");
    }

    #[tokio::test]
    async fn hung_work_does_not_delay_other_work() {
        let (_answer, hung) = mpsc::channel::<()>();
        let hung = run_or_undo("hang", SHORT, move || hung.recv(), |_| {});
        let (hung, other) = tokio::join!(hung, run("work", || 7));
        assert!(matches!(hung, Err(BlockingError::TimedOut { .. })));
        assert_eq!(other.unwrap(), 7);
    }

    #[tokio::test]
    async fn panic_of_the_work_is_an_error() {
        let result = run::<()>("work", || panic!("on purpose")).await;
        let error = result.unwrap_err().to_string();
        assert!(error.starts_with("work: interrupted by a bug in the shim"), "{error}");
    }

    /// Sends the thread that drops it.
    struct DropProbe(mpsc::Sender<ThreadId>);

    impl Drop for DropProbe {
        fn drop(&mut self) {
            self.0.send(std::thread::current().id()).unwrap();
        }
    }

    #[tokio::test]
    async fn file_is_closed_on_another_thread_than_the_runtimes() {
        let (sender, dropped) = mpsc::channel();
        drop(DropOffThread::from(vec![DropProbe(sender)]));
        let thread = dropped.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_ne!(thread, std::thread::current().id());
    }

    #[tokio::test]
    async fn file_that_is_dropped_by_blocking_work_is_closed_before_the_work_ends() {
        let (sender, dropped) = mpsc::channel();
        let file = DropOffThread::from(DropProbe(sender));
        let worker = run("close it", move || {
            drop(file);
            std::thread::current().id()
        });
        assert_eq!(dropped.try_recv(), Err(mpsc::TryRecvError::Empty));
        let worker = worker.await.unwrap();
        assert_eq!(dropped.try_recv(), Ok(worker));
    }

    /// Whether this thread can do other work while `call` waits for a file of `volume`. `volume` is removed then.
    pub(crate) async fn leaves_thread_free(volume: HungVolume, call: impl Future) -> bool {
        let (checked, result) = mpsc::channel::<()>();
        let removal = thread::spawn(move || {
            volume.wait_for_request();
            // A call that blocks the thread ends when the volume is removed.
            let _ = result.recv_timeout(Duration::from_secs(5));
            drop(volume);
        });
        let is_free = tokio::time::timeout(Duration::from_millis(200), call).await.is_err();
        drop(checked);
        removal.join().unwrap();
        is_free
    }
}
