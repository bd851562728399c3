//! The virtio-blk devices of the machine's disk slots.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nutshell_protocol::disk_serial;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};

/// How long a disk that the host has announced may take to appear.
const PATIENCE: Duration = Duration::from_secs(10);

/// The device node of the disk in `slot`, once it has a size.
///
/// The host tells of a disk in a request, which may overtake the interrupt that tells the kernel.
pub(crate) fn find(slot: u32) -> io::Result<PathBuf> {
    let serial = disk_serial(slot);
    if let Some(device) = look(slot, &serial) {
        return Ok(device);
    }
    let uevents = listen()?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(device) = look(slot, &serial) {
            return Ok(device);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let text = format!("no disk with serial {serial} and a size appeared within {PATIENCE:?}");
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        wait_for_event(&uevents, left)?;
    }
}

/// The disk, if it is there and not empty.
fn look(slot: u32, serial: &str) -> Option<PathBuf> {
    // The kernel names disks in the order of slots as a rule, and asking a disk for its serial costs
    // a request: the likely one is asked first.
    let likely = u8::try_from(slot)
        .ok()
        .filter(|slot| *slot < 26)
        .map(|slot| format!("vd{}", char::from(b'a' + slot)));
    let all = || {
        let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned())
    };
    let name = likely
        .into_iter()
        .chain(all())
        .find(|name| serial_of(name).as_deref() == Some(serial))?;
    let size = fs::read_to_string(Path::new("/sys/block").join(&name).join("size")).ok()?;
    (size.trim() != "0").then(|| Path::new("/dev").join(name))
}

fn serial_of(name: &str) -> Option<String> {
    let serial = fs::read_to_string(Path::new("/sys/block").join(name).join("serial")).ok()?;
    Some(serial.trim_end_matches(['\n', '\0']).to_owned())
}

/// Hears of every device from now on (`NETLINK_KOBJECT_UEVENT`, group 1: the kernel's own).
fn listen() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(KOBJECT_UEVENT))?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 1))?;
    Ok(socket)
}

fn wait_for_event(uevents: impl AsFd, patience: Duration) -> io::Result<()> {
    let timeout = Timespec::try_from(patience).map_err(io::Error::other)?;
    let mut poll = [PollFd::new(&uevents, PollFlags::IN)];
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut poll, Some(&timeout)))?;
    // What it says does not matter, the disk is looked at again.
    let mut event = [0; 4096];
    while rustix::net::recv(&uevents, &mut event, RecvFlags::DONTWAIT).is_ok() {}
    Ok(())
}
