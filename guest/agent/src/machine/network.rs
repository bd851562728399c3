//! Network devices that the host adds, and their configuration.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nutshell_protocol::Failure;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::slot;
use crate::failure::{Context, at_step};

/// The size of `struct nlmsghdr` (netlink(7)), in bytes.
const HEADER_SIZE: usize = 16;

/// Binds the driver of the network device in bus slot `slot`, and returns the index of its interface.
pub(crate) fn probe(slot: u32) -> io::Result<u32> {
    let device = slot::bind(slot)?;
    let interface = find_entry(&device, "virtio")
        .and_then(|virtio| find_entry(&virtio.join("net"), ""))
        .map_err(at_step(format!("find the interface of {}", device.display())))?;
    let path = interface.join("ifindex");
    fs::read_to_string(&path)
        .and_then(|index| index.trim().parse().map_err(io::Error::other))
        .map_err(at_step(format!("read {}", path.display())))
}

/// Finds the entry of a directory whose name begins with `prefix`.
fn find_entry(directory: &Path, prefix: &str) -> io::Result<std::path::PathBuf> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            return Ok(entry.path());
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// Sends rtnetlink requests to the kernel, in order, until one fails. `EEXIST` counts as success, since the object
/// exists. Each message comes with its purpose for the error text. If a container has disabled IPv6 with a sysctl
/// (`EACCES`), the requests for IPv6 are optional.
pub(crate) fn configure(messages: &[(String, Vec<u8>)]) -> Result<(), Failure> {
    // Protocol 0 is NETLINK_ROUTE.
    let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
    let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None).map_err(io::Error::from);
    let socket = socket.context(|| "open a netlink socket".to_owned())?;
    let mut ipv6_disabled = false;
    for (purpose, message) in messages {
        match send_request(&socket, message) {
            Err(error) if is_ipv6(message) && (ipv6_disabled || error.kind() == io::ErrorKind::PermissionDenied) => {
                ipv6_disabled = true;
            }
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::EXIST.raw_os_error()) => {}
            answer => answer.context(|| purpose.clone())?,
        }
    }
    Ok(())
}

/// Whether a request concerns IPv6. The structure after `struct nlmsghdr` begins with the address family: `ifaddrmsg`,
/// `rtmsg`, `fib_rule_hdr`, `ndmsg` (rtnetlink(7)).
fn is_ipv6(message: &[u8]) -> bool {
    message
        .get(HEADER_SIZE)
        .is_some_and(|family| u16::from(*family) == AddressFamily::INET6.as_raw())
}

/// Sends one request, which has `NLM_F_ACK` set, and reads the acknowledgement (netlink(7)): a `struct nlmsghdr`,
/// followed by the error.
fn send_request(socket: &OwnedFd, message: &[u8]) -> io::Result<()> {
    rustix::net::send(socket.as_fd(), message, SendFlags::empty())?;
    let mut answer = [0; 4096];
    let (length, _) = rustix::net::recv(socket.as_fd(), &mut answer[..], RecvFlags::empty())?;
    let error = answer[..length]
        .get(HEADER_SIZE..HEADER_SIZE + 4)
        .and_then(|bytes| <[u8; 4]>::try_from(bytes).ok())
        .map(i32::from_le_bytes);
    match error {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(error.saturating_neg())),
        None => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the kernel's answer is too short",
        )),
    }
}
