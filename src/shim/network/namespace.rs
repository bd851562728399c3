//! Working in another network namespace.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    thread,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::sync::oneshot;

/// Runs `work` in `namespace`, on a thread of its own: a thread that has entered one is of no further
/// use. Sockets that are opened there stay in it.
pub(super) async fn within<T: Send + 'static>(
    namespace: &OwnedFd,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let namespace = namespace.try_clone()?;
    let (sender, receiver) = oneshot::channel();
    thread::Builder::new().name("network".to_owned()).spawn(move || {
        let entered = move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network));
        drop(namespace);
        // Whoever stopped waiting does not miss it.
        let _ = sender.send(entered.map(|()| work()));
    })?;
    let done = receiver.await.map_err(|_| io::Error::other("the thread ended early"))?;
    Ok(done?)
}
