//! The loopback interface and AF_VSOCK addresses.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};

use super::check;

/// Brings the loopback interface up. `socket` is any socket of the network namespace.
pub(crate) fn bring_loopback_up(socket: impl AsFd) -> io::Result<()> {
    // SAFETY: an `ifreq` may be all zeros.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or(1);
    // SAFETY: SIOCSIFFLAGS reads an `ifreq`, which outlives the call.
    check(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }).map(drop)
}

/// Moves the calling thread into a new network namespace.
#[cfg(test)]
pub(crate) fn unshare_network() -> io::Result<()> {
    // SAFETY: unshare takes an integer, and CLONE_NEWNET affects no descriptor.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) }).map(drop)
}

/// An AF_VSOCK address (vsock(7)).
#[derive(Debug, Clone, Copy)]
pub(crate) struct VsockAddress {
    /// The context id.
    pub(crate) cid: u32,
    pub(crate) port: u32,
}

// SAFETY: the closure gets a pointer to an initialised `sockaddr_vm` and its size; it outlives the call.
unsafe impl SocketAddrArg for VsockAddress {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        // SAFETY: a `sockaddr_vm` may be all zeros.
        let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
        address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap_or_default();
        address.svm_cid = self.cid;
        address.svm_port = self.port;
        let length = SocketAddrLen::try_from(size_of::<libc::sockaddr_vm>()).unwrap_or_default();
        f((&raw const address).cast(), length)
    }
}
