//! A queue of a tap device, and what only a tap device does (Linux,
//! `Documentation/networking/tuntap.rst`).

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
};

use nix::libc;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

/// What the driver takes, and the flag by which the tap device hears of it (`linux/if_tun.h`).
const RECEIVED: [(u32, libc::c_ulong); 6] = [
    (VIRTIO_NET_F_GUEST_CSUM, 0x01),
    (VIRTIO_NET_F_GUEST_TSO4, 0x02),
    (VIRTIO_NET_F_GUEST_TSO6, 0x04),
    (VIRTIO_NET_F_GUEST_ECN, 0x08),
    (VIRTIO_NET_F_GUEST_USO4, 0x20),
    (VIRTIO_NET_F_GUEST_USO6, 0x40),
];

/// The flags of both offloads of UDP.
const USO: libc::c_ulong = 0x20 | 0x40;

/// Requests of TUNSETQUEUE (`linux/if_tun.h`).
const ATTACH: libc::c_short = 0x0200;
const DETACH: libc::c_short = 0x0400;

/// A queue.
#[derive(Debug)]
pub(super) struct Tap {
    queue: OwnedFd,
    attached: AtomicBool,
}

impl Tap {
    pub(super) fn new(queue: OwnedFd) -> Self {
        Self {
            queue,
            attached: AtomicBool::new(true),
        }
    }

    /// Tells the device which packets its reader takes, by the driver's features: larger ones than the
    /// MTU, and such whose checksum is not filled in.
    pub(super) fn set_offloads(&self, features: u64) -> io::Result<()> {
        let mut flags: libc::c_ulong = RECEIVED
            .iter()
            .filter(|(feature, _)| features & 1 << feature != 0)
            .map(|(_, flag)| flag)
            .sum();
        // The kernel takes both or none (`set_offload` in `drivers/net/tun.c`); a driver may take one, and
        // never has to be sent such packets.
        if flags & USO != USO {
            flags &= !USO;
        }
        // SAFETY: TUNSETOFFLOAD takes a number.
        check(unsafe { libc::ioctl(self.queue.as_raw_fd(), libc::TUNSETOFFLOAD as libc::Ioctl, flags) })
    }

    /// Whether the device puts packets into this queue.
    pub(super) fn set_attached(&self, attached: bool) -> io::Result<()> {
        if self.attached.load(Ordering::SeqCst) == attached {
            return Ok(());
        }
        // SAFETY: all zeroes is a valid value of this structure of C.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = if attached { ATTACH } else { DETACH };
        // SAFETY: TUNSETQUEUE reads one `ifreq`, which `request` is.
        check(unsafe {
            libc::ioctl(
                self.queue.as_raw_fd(),
                libc::TUNSETQUEUE as libc::Ioctl,
                &raw const request,
            )
        })?;
        self.attached.store(attached, Ordering::SeqCst);
        Ok(())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
