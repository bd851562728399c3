//! Calls that use a file system that does not answer.

use std::{future::Future, sync::mpsc, thread, time::Duration};

use nutshell_fixtures::HungVolume;

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
