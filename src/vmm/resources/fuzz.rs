//! The entry point of the fuzz target for commands of the shim.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

use std::os::fd::AsFd;

use rustix::fs::{MemfdFlags, memfd_create};

use super::*;
use crate::control::{Channel, Command, fuzz::send_packets};

/// Receives the packets in `data` as commands. A boot command gets empty files, and their number is `data`'s first
/// byte.
///
/// # Panics
///
/// If a command changes when it is sent again, or a boot command takes other descriptors than it has.
pub(crate) fn receive_commands(data: &[u8]) {
    let Some((files, data)) = data.split_first() else {
        return;
    };
    let (shim, vmm) = Channel::pair().unwrap();
    send_packets(&shim, data);
    drop(shim);
    while let Ok((command, descriptors)) = vmm.receive::<Command>() {
        assert_eq!(descriptors.len(), 0);
        let file = memfd_create("file", MemfdFlags::CLOEXEC).unwrap();
        let sent: Vec<_> = (0..files % 16).map(|_| file.as_fd()).collect();
        let command = send_again(command, &sent);
        if let (Command::Boot(config, software), descriptors) = command {
            let (count, disks) = (descriptors.len(), config.disks.len());
            if let Ok(resources) = BootResources::parse(config, software, descriptors) {
                assert!(count >= 2 && resources.config.vcpus > 0);
                assert_eq!(resources.disks.len(), disks);
            }
        }
    }
}

/// Sends and receives a command again.
fn send_again(command: Command, descriptors: &[std::os::fd::BorrowedFd<'_>]) -> (Command, Vec<OwnedFd>) {
    let (left, right) = Channel::pair().unwrap();
    left.send(&command, descriptors).unwrap();
    let (received, files) = right.receive::<Command>().unwrap();
    assert_eq!(files.len(), descriptors.len());
    assert_eq!(format!("{command:?}"), format!("{received:?}"));
    (received, files)
}
