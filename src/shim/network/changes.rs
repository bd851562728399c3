//! Tells when something in a network namespace may have changed.

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

/// The groups of rtnetlink(7) for links, addresses and routes, a bit each.
const GROUPS: u32 = (libc::RTMGRP_LINK
    | libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV6_ROUTE)
    .cast_unsigned();

/// A socket that hears of changes from now on.
#[derive(Debug)]
pub(super) struct Changes(OwnedFd);

impl Changes {
    /// In the calling thread's namespace.
    pub(super) fn watch() -> Result<Self, NetlinkError> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute);
        let bound = socket.and_then(|socket| {
            bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
            Ok(Self(socket))
        });
        bound.map_err(|errno| NetlinkError::new("watch the pod's network", errno.into()))
    }

    /// Needs the runtime.
    pub(super) fn listen(self) -> io::Result<Listener> {
        // SAFETY: an `OwnedFd` is open and stays the same descriptor for as long as it is owned, and
        // `AsyncFd` owns it from here on.
        let socket = unsafe { AsyncFd::register_with_interest(self.0, Interest::READABLE) }?;
        Ok(Listener(socket))
    }
}

/// Hears of changes.
#[derive(Debug)]
pub(super) struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    /// Waits for the next change, however many there were since the last.
    pub(super) async fn next(&mut self) -> io::Result<()> {
        let mut some = false;
        loop {
            if some {
                return Ok(());
            }
            let mut ready = self.0.readable().await?;
            loop {
                // What it says does not matter: the namespace is looked at anew.
                match recv(self.0.get_ref().as_raw_fd(), &mut [0; 1], MsgFlags::MSG_TRUNC) {
                    // Too many to keep is many.
                    Ok(_) | Err(Errno::ENOBUFS) => some = true,
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) => break,
                    Err(errno) => return Err(errno.into()),
                }
            }
            ready.clear_ready();
        }
    }
}
