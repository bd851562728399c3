//! The entry point of the fuzz target for the file server's replies.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

use std::{io::Write, net::Shutdown, os::unix::net::UnixStream};

use super::{Backend, Fs};
use crate::devices::virtio::{device::SharedDevice, fuzz::driver::Driver};

/// The maximum number of bytes that the file server sends. They fit into the buffer of its socket.
const MAX_REPLIES: usize = 4096;

/// Activates a device whose file server sends `data` and then closes its end, and adds memory.
///
/// # Panics
///
/// If memory can be added although the file server has sent too few replies to the requests.
pub fn receive_replies(data: &[u8]) {
    let data = &data[..data.len().min(MAX_REPLIES)];
    let (mut server, socket) = UnixStream::pair().unwrap();
    server.write_all(data).unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    let fs = SharedDevice::new(Fs::new("share", socket));
    let mut driver = Driver::new(Box::new(fs.clone()), Driver::kicks(&fs));
    driver.negotiate(u64::MAX, usize::MAX);
    driver.guest.grow();
    for replies in 3.. {
        let is_serving = matches!(fs.lock().backend, Backend::Serving { .. });
        let grown = fs.lock().grow(driver.guest.memory.regions());
        if !is_serving || grown.is_err() {
            break;
        }
        assert!(data.len() >= replies * super::connection::REPLY_SIZE);
    }
}
