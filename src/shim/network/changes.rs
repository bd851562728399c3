//! Reports changes in a network namespace (rtnetlink(7) multicast groups).

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket},
};
use tokio::io::{Interest, unix::AsyncFd};

use super::netlink::NetlinkError;

/// The multicast groups for links, addresses and routes, one bit each.
const RTNETLINK_GROUPS: u32 = (libc::RTMGRP_LINK
    | libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV6_ROUTE)
    .cast_unsigned();

/// A socket that receives the changes since it was opened.
#[derive(Debug)]
pub(super) struct ChangeSocket(OwnedFd);

impl ChangeSocket {
    /// Opens one for the calling thread's network namespace.
    pub(super) fn open() -> Result<Self, NetlinkError> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute);
        let bound = socket.and_then(|socket| {
            bind(socket.as_raw_fd(), &NetlinkAddr::new(0, RTNETLINK_GROUPS))?;
            Ok(Self(socket))
        });
        bound.map_err(|errno| NetlinkError::new("watch the pod's network", errno.into()))
    }

    /// Registers the socket with the current Tokio runtime.
    pub(super) fn listen(self) -> io::Result<ChangeListener> {
        // SAFETY: the descriptor of an `OwnedFd` stays open and does not change while it is owned, and `AsyncFd` owns
        // it from here on.
        let socket = unsafe { AsyncFd::register_with_interest(self.0, Interest::READABLE) }?;
        Ok(ChangeListener(socket))
    }
}

/// A [`ChangeSocket`] that is registered with the Tokio runtime.
#[derive(Debug)]
pub(super) struct ChangeListener(AsyncFd<OwnedFd>);

impl ChangeListener {
    /// Waits until at least one change has happened since the last call. Cancel safe.
    pub(super) async fn next(&mut self) -> io::Result<()> {
        let mut has_changed = false;
        loop {
            if has_changed {
                return Ok(());
            }
            let mut ready = self.0.readable().await?;
            loop {
                // The content does not matter: the caller reads the whole configuration again.
                match recv(self.0.get_ref().as_raw_fd(), &mut [0; 1], MsgFlags::MSG_TRUNC) {
                    // ENOBUFS: changes were lost because the socket's buffer was full.
                    Ok(_) | Err(Errno::ENOBUFS) => has_changed = true,
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) => break,
                    Err(errno) => return Err(errno.into()),
                }
            }
            ready.clear_ready();
        }
    }
}
