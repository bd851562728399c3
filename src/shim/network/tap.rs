//! Tap devices: the kernel's end of a link whose other end a machine has (Linux,
//! `Documentation/networking/tuntap.rst`).

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage},
};
use nix::{
    fcntl::{OFlag, open},
    libc,
    net::if_::if_nametoindex,
    sys::stat::Mode,
};

use super::{
    discovery::Link,
    netlink::{Netlink, NetlinkError},
};
use crate::control::VNET_HEADER_SIZE;

/// The kernel puts a number in place of `%d`.
const NAME: &[u8] = b"nutshell%d\0";

/// `IFF_TAP | IFF_MULTI_QUEUE | IFF_NO_PI | IFF_VNET_HDR` (`linux/if_tun.h`).
const FLAGS: libc::c_short = 0x0002 | 0x0100 | 0x1000 | 0x4000;

/// A new tap device. It lives as long as a queue of it is open.
#[derive(Debug)]
pub(super) struct Tap {
    /// The number of the interface.
    pub(super) index: u32,
    /// Its queues, non-blocking.
    pub(super) queues: Vec<OwnedFd>,
}

/// Makes one in the calling thread's network namespace. On failure: the step that failed, and why.
pub(super) fn make(queues: usize) -> Result<Tap, (&'static str, io::Error)> {
    // SAFETY: all zeroes is a valid value of this structure of C.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(NAME) {
        *place = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags = FLAGS;
    let header = libc::c_int::try_from(VNET_HEADER_SIZE).unwrap_or(libc::c_int::MAX);
    let queues = (0..queues.max(1))
        .map(|_| {
            let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
            let queue = open("/dev/net/tun", flags, Mode::empty())
                .map_err(|errno| ("open /dev/net/tun (is the kernel's module tun there?)", errno.into()))?;
            // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is.
            check(unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETIFF as libc::Ioctl, &raw mut request) })
                .map_err(|error| ("TUNSETIFF", error))?;
            // SAFETY: TUNSETVNETHDRSZ reads one `int`, which `header` is.
            check(unsafe {
                libc::ioctl(
                    queue.as_raw_fd(),
                    libc::TUNSETVNETHDRSZ as libc::Ioctl,
                    &raw const header,
                )
            })
            .map_err(|error| ("TUNSETVNETHDRSZ", error))?;
            Ok(queue)
        })
        .collect::<Result<Vec<_>, (&'static str, io::Error)>>()?;
    let name: Vec<u8> = request
        .ifr_name
        .iter()
        .map(|byte| byte.cast_unsigned())
        .take_while(|byte| *byte != 0)
        .collect();
    let index = if_nametoindex(name.as_slice()).map_err(|errno| ("find the device", errno.into()))?;
    Ok(Tap { index, queues })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Brings the tap device `index` up with the MTU of `link`. The host itself says nothing on it: it gets
/// no address of IPv6.
pub(super) fn set_up(netlink: &mut Netlink, index: u32, link: &Link) -> Result<(), NetlinkError> {
    let quiet = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
        In6AddrGenMode::None,
    )])]);
    match netlink.change("keep the host off a tap device", set(index, vec![quiet]), 0) {
        // No IPv6 in this namespace, or none with so small an MTU.
        Err(error) if [Some(libc::EAFNOSUPPORT), Some(libc::EINVAL)].contains(&error.errno()) => {}
        other => other?,
    }
    let RouteNetlinkMessage::SetLink(mut message) = set(index, vec![LinkAttribute::Mtu(link.mtu.into())]) else {
        return Ok(());
    };
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    let what = format!("bring the tap device for {} up", link.name);
    netlink.change(&what, RouteNetlinkMessage::SetLink(message), 0)
}

fn set(index: u32, attributes: Vec<LinkAttribute>) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes;
    RouteNetlinkMessage::SetLink(message)
}
