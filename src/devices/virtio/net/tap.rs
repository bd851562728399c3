//! One queue of a tap device, and the ioctls of tap devices (Linux, `Documentation/networking/tuntap.rst`).

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

/// The driver's features for received packets, and the TUNSETOFFLOAD flag of each.
const RECEIVE_OFFLOADS: [(u32, libc::c_uint); 6] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_USO4, libc::TUN_F_USO4),
    (VIRTIO_NET_F_GUEST_USO6, libc::TUN_F_USO6),
];

/// Both flags of UDP segmentation offload.
const UDP_SEGMENTATION: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// One queue of a tap device.
#[derive(Debug)]
pub(super) struct TapQueue {
    file: OwnedFd,
    attached: AtomicBool,
}

impl TapQueue {
    /// The queue of `file`, which must be attached, as a new queue is.
    pub(super) fn new(file: OwnedFd) -> Self {
        Self {
            file,
            attached: AtomicBool::new(true),
        }
    }

    /// Enables the receive offloads in `features`. The tap device may then pass packets that are larger than the MTU or
    /// have no computed checksum.
    pub(super) fn set_offloads(&self, features: u64) -> io::Result<()> {
        let mut flags: libc::c_uint = RECEIVE_OFFLOADS
            .iter()
            .filter(|(feature, _)| features & 1 << feature != 0)
            .map(|(_, flag)| flag)
            .sum();
        // The kernel accepts both UDP flags or none (`set_offload` in `drivers/net/tun.c`). If a driver accepts only
        // one of them, neither is set: the driver then receives no such packets.
        if flags & UDP_SEGMENTATION != UDP_SEGMENTATION {
            flags &= !UDP_SEGMENTATION;
        }
        let flags = libc::c_ulong::from(flags);
        // SAFETY: the argument of TUNSETOFFLOAD is a number.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD as libc::Ioctl, flags) })
    }

    /// Sets whether the tap device puts packets into this queue.
    pub(super) fn set_attached(&self, attached: bool) -> io::Result<()> {
        if self.attached.load(Ordering::SeqCst) == attached {
            return Ok(());
        }
        // SAFETY: all zeroes is a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let flag = if attached {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flag).unwrap_or(0);
        // SAFETY: TUNSETQUEUE reads one `ifreq`, which `request` is.
        check(unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETQUEUE as libc::Ioctl,
                &raw const request,
            )
        })?;
        self.attached.store(attached, Ordering::SeqCst);
        Ok(())
    }
}

impl AsFd for TapQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
