//! Tap devices: each is the host's counterpart of one network device of a machine (kernel,
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
    netlink::{NetlinkError, NetlinkSocket},
};
use crate::control::VNET_HEADER_SIZE;

/// The name of a new device. The kernel replaces `%d` with a number.
const TAP_NAME_PATTERN: &[u8] = b"nutshell%d\0";

/// Whether a link with this name is a tap device of a machine.
pub(super) fn is_tap_name(name: &str) -> bool {
    let number = name.strip_prefix("nutshell");
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// `IFF_TAP | IFF_MULTI_QUEUE | IFF_NO_PI | IFF_VNET_HDR` (`linux/if_tun.h`).
const TAP_FLAGS: libc::c_short = 0x0002 | 0x0100 | 0x1000 | 0x4000;

/// A new tap device. The kernel removes it when the last of its queues is closed.
#[derive(Debug)]
pub(super) struct Tap {
    /// The interface index.
    pub(super) index: u32,
    /// One non-blocking descriptor for each queue.
    pub(super) queues: Vec<OwnedFd>,
}

/// Creates a device with at least one queue in the calling thread's network namespace. An error has the step that
/// failed.
pub(super) fn create(queues: usize) -> Result<Tap, (&'static str, io::Error)> {
    // SAFETY: all zeroes is a valid value of this C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name.iter_mut().zip(TAP_NAME_PATTERN) {
        *target = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags = TAP_FLAGS;
    let header = libc::c_int::try_from(VNET_HEADER_SIZE).unwrap_or(libc::c_int::MAX);
    let queues = (0..queues.max(1))
        .map(|_| {
            let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
            let queue = open("/dev/net/tun", flags, Mode::empty())
                .map_err(|errno| ("open /dev/net/tun (is the kernel module tun loaded?)", errno.into()))?;
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
    let index = if_nametoindex(name.as_slice()).map_err(|errno| ("find the interface of the device", errno.into()))?;
    Ok(Tap { index, queues })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Brings the tap device `index` up with the MTU of `link`. The host does not use it itself: it gets no IPv6 address,
/// which would make the host send packets.
pub(super) fn bring_up(netlink: &mut NetlinkSocket, index: u32, link: &Link) -> Result<(), NetlinkError> {
    let no_address = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
        In6AddrGenMode::None,
    )])]);
    let action = format!("disable IPv6 addresses of the tap device for {}", link.name);
    match netlink.change(&action, set_link(index, vec![no_address]), 0) {
        // This namespace has no IPv6, or the MTU is too small for it.
        Err(error) if [Some(libc::EAFNOSUPPORT), Some(libc::EINVAL)].contains(&error.errno()) => {}
        other => other?,
    }
    let RouteNetlinkMessage::SetLink(mut message) = set_link(index, vec![LinkAttribute::Mtu(link.mtu.into())]) else {
        return Ok(());
    };
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    let action = format!("bring the tap device for {} up", link.name);
    netlink.change(&action, RouteNetlinkMessage::SetLink(message), 0)
}

fn set_link(index: u32, attributes: Vec<LinkAttribute>) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes;
    RouteNetlinkMessage::SetLink(message)
}
