//! Runs code in another network namespace.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    thread,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::sync::oneshot;

/// Runs `work` in `namespace`, on a new thread that ends afterwards. Sockets that `work` opens stay in the namespace.
pub(super) async fn run_in_namespace<T: Send + 'static>(
    namespace: &OwnedFd,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let namespace = namespace.try_clone()?;
    let (sender, receiver) = oneshot::channel();
    thread::Builder::new().name("network".to_owned()).spawn(move || {
        let entered = move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network));
        drop(namespace);
        // The receiver may have been dropped.
        let _ = sender.send(entered.map(|()| work()));
    })?;
    let done = receiver
        .await
        .map_err(|_| io::Error::other("the thread for a network namespace panicked"))?;
    Ok(done?)
}
