//! Runs code in another network namespace.

use std::{
    os::fd::{AsFd, OwnedFd},
    thread,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::sync::oneshot;

use super::error::NetworkError;

/// Runs `work` in `namespace`, on a new thread that ends afterwards. Sockets that `work` opens stay in the namespace.
pub(super) async fn run_in_namespace<T: Send + 'static>(
    namespace: &OwnedFd,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NetworkError> {
    let namespace = namespace
        .try_clone()
        .map_err(NetworkError::namespace("duplicate the descriptor of"))?;
    let (sender, receiver) = oneshot::channel();
    let thread = thread::Builder::new().name("network".to_owned()).spawn(move || {
        let entered = move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network));
        drop(namespace);
        // The receiver may have been dropped.
        let _ = sender.send(entered.map(|()| work()));
    });
    thread.map_err(NetworkError::namespace("start a thread for"))?;
    let done = receiver.await.map_err(|_| NetworkError::Interrupted)?;
    done.map_err(NetworkError::namespace("enter"))
}
