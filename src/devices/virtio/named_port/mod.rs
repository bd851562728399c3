//! virtio-console with VIRTIO_CONSOLE_F_MULTIPORT (virtio 1.3 §5.3): one port with a name, whose bytes flow between the
//! guest and a socket of the host. Linux names it in `/sys/class/virtio-ports`, and udev makes a link of that name in
//! `/dev/virtio-ports`.
//!
//! Belongs here: the device and its [`control`] messages. Does not belong here: what the bytes mean. The event loop of
//! the vmm calls [`NamedPort::serve`] when [`NamedPort::poller`] is readable.
//!
//! No byte is kept outside of the socket and the guest's buffers. If the socket is full, the guest's buffers wait in
//! their queue, and the driver makes the program that writes wait. If the guest has no buffers, bytes wait in the
//! socket. While no program in the guest has the port open, bytes from the host are dropped: the next program must not
//! get what was meant for an earlier one.

mod control;
#[cfg(any(test, fuzzing))]
mod fuzz;
#[cfg(test)]
mod tests;

#[cfg(any(test, fuzzing))]
pub use self::fuzz::control_port;

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use rustix::{
    buffer::spare_capacity,
    event::{Timespec, epoll},
    io::Errno,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::eventfd::EventFd;

use self::control::{MESSAGE_SIZE, PortState};
use super::{
    device::{ActivateError, Activation, COMMON_FEATURES, Device, copy_config},
    queue::{DeviceQueue, QueueError, QueueFault},
};
use crate::devices::{
    counters::{Counters, Obstacle},
    stall_timer::StallTimer,
};

/// VIRTIO_CONSOLE_F_MULTIPORT (virtio 1.3 §5.3.3), which virtio-bindings lacks.
const MULTIPORT: u64 = 1 << 1;

/// The queues (virtio 1.3 §5.3.2): receive and transmit of port 0, control receive and transmit, receive and transmit
/// of port 1.
const QUEUE_SIZES: [u16; 6] = [16, 16, 16, 16, 32, 32];

const CONSOLE_TRANSMIT: usize = 1;

/// The receive queue of port 1. The counters record that it waits while the socket has bytes and the guest provides no
/// buffers.
const PORT_RECEIVE: u16 = 4;

/// `struct virtio_console_config`: columns, rows, the maximum number of ports, and the emergency write.
const CONFIG: [u8; 12] = [0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];

/// The maximum number of chains of a queue that one call of [`NamedPort::serve`] takes.
const MAX_CHAINS_PER_TURN: usize = 64;

/// The maximum number of bytes from the host that one call of [`drop_input`] drops.
const MAX_DROPPED_PER_TURN: usize = 64 << 10;

/// The data of the socket's epoll entry. The data of a kick's entry is the index of its queue.
const SOCKET: u64 = u64::MAX;

#[derive(Debug)]
pub(crate) struct NamedPort {
    name: &'static str,
    counters: Arc<Counters>,
    poller: OwnedFd,
    /// The kicks of the queues, once they are watched.
    kicks: Vec<EventFd>,
    /// `None` after the shim has closed its end, or after the socket has failed.
    socket: Option<OwnedFd>,
    /// The events of the socket that are watched now.
    watched: epoll::EventFlags,
    /// The transmit queue of port 0. Its output is dropped, but its buffers are returned: a driver without MULTIPORT
    /// waits until the device has returned each buffer.
    console: Option<DeviceQueue>,
    port: Option<Port>,
}

/// The port of a driver with MULTIPORT.
#[derive(Debug)]
struct Port {
    state: PortState,
    control_receive: DeviceQueue,
    control_transmit: DeviceQueue,
    receive: DeviceQueue,
    transmit: DeviceQueue,
    /// How many bytes of the next chain of `transmit` the socket has taken.
    sent: usize,
    /// The guest has no buffers for bytes that wait in the socket.
    is_starved: bool,
    /// The socket is full.
    is_blocked: bool,
    /// Bytes for a program that has closed the port may be left in the socket.
    has_stale_input: bool,
}

/// Whether a transfer has found the socket still usable.
#[derive(Debug, PartialEq, Eq)]
enum SocketState {
    Open,
    Closed,
}

impl NamedPort {
    /// A device whose port has the name `name`, and whose counters have the name `device`. `socket` is a stream socket,
    /// non-blocking.
    ///
    /// # Errors
    ///
    /// The errors of epoll_create(2) and epoll_ctl(2).
    pub(crate) fn new(
        name: &'static str,
        device: &str,
        socket: OwnedFd,
        stall_timer: &Arc<StallTimer>,
    ) -> io::Result<Self> {
        let mut port = Self {
            name,
            counters: Counters::with_queues(device, QUEUE_SIZES.len(), stall_timer),
            poller: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            kicks: Vec::new(),
            socket: Some(socket),
            watched: epoll::EventFlags::empty(),
            console: None,
            port: None,
        };
        port.watch_socket()?;
        Ok(port)
    }

    /// Makes [`Self::poller`] readable on these kicks, one for each queue.
    ///
    /// # Errors
    ///
    /// The errors of epoll_ctl(2).
    pub(crate) fn watch_kicks(&mut self, kicks: Vec<EventFd>) -> io::Result<()> {
        for (queue, kick) in (0..).zip(&kicks) {
            // SAFETY: the eventfd is open for as long as it is borrowed.
            let kick = unsafe { BorrowedFd::borrow_raw(kick.as_raw_fd()) };
            epoll::add(
                &self.poller,
                kick,
                epoll::EventData::new_u64(queue),
                epoll::EventFlags::IN,
            )?;
        }
        self.kicks = kicks;
        Ok(())
    }

    /// A descriptor that is readable when [`Self::serve`] has something to do.
    pub(crate) fn poller(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }

    /// Whether a program in the guest has the port open.
    pub(crate) fn is_open_in_guest(&self) -> bool {
        self.port.as_ref().is_some_and(|port| port.state.guest_open)
    }

    /// Moves what can be moved without waiting.
    pub(crate) fn serve(&mut self) -> Result<(), QueueError> {
        self.take_kicks();
        if let Some(console) = &mut self.console {
            console.serve(|_| 0)?;
        }
        if self.port.is_some() {
            self.receive_control()?;
            self.move_from_guest()?;
        }
        self.move_to_guest()?;
        // Last, because the steps above may close the socket, which the driver must then be told.
        self.send_control()?;
        if let Err(error) = self.watch_socket() {
            self.warn(&format!(
                "cannot watch the shim's socket, so the port stays closed until the machine boots again: {error}"
            ));
            self.close_socket();
        }
        Ok(())
    }

    /// Clears the kicks that were signalled.
    fn take_kicks(&self) {
        let mut events = Vec::with_capacity(QUEUE_SIZES.len() + 1);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if let Err(error) = epoll::wait(&self.poller, spare_capacity(&mut events), Some(&now))
            && error != Errno::INTR
        {
            self.warn(&format!("cannot wait for events: {error}"));
        }
        for event in events {
            let kick = usize::try_from(event.data.u64())
                .ok()
                .and_then(|queue| self.kicks.get(queue));
            // The eventfd is readable, so this does not block. The count does not matter.
            if let Some(Err(error)) = kick.map(EventFd::read) {
                self.warn(&format!("cannot read a kick: {error}"));
            }
        }
    }

    fn receive_control(&mut self) -> Result<(), QueueError> {
        let Some(Port {
            state,
            control_transmit,
            has_stale_input,
            ..
        }) = &mut self.port
        else {
            return Ok(());
        };
        control_transmit.serve(|chain| {
            let mut message = [0; MESSAGE_SIZE];
            if chain.readable.take(&mut message) {
                let was_open = state.guest_open;
                state.receive(message);
                // Recorded here: a later message of this turn may open the port again, and then `guest_open` does not show
                // that it was closed.
                *has_stale_input |= was_open && !state.guest_open;
            }
            0
        })
    }

    fn send_control(&mut self) -> Result<(), QueueError> {
        let Some(Port {
            state,
            control_receive: queue,
            ..
        }) = &mut self.port
        else {
            return Ok(());
        };
        for _ in 0..MAX_CHAINS_PER_TURN {
            let Some(message) = state.next() else { break };
            let Some(mut chain) = queue.pop()? else {
                if queue.resume_kicks()? {
                    continue;
                }
                break;
            };
            let bytes = message.encode(self.name, self.socket.is_some());
            if chain.writable.len() < bytes.len() {
                return Err(queue.error(QueueFault::BufferTooSmall(chain.writable.len())));
            }
            let written = chain.writable.put(&bytes);
            queue.add_used(chain.head, u32::try_from(written).unwrap_or(0))?;
            state.mark_sent(message);
        }
        queue.notify_driver()
    }

    /// Moves bytes from the guest to the socket, until it is full.
    fn move_from_guest(&mut self) -> Result<(), QueueError> {
        let Some(port) = &mut self.port else { return Ok(()) };
        let end = port.send_to(self.socket.as_ref().map(AsFd::as_fd), &self.counters)?;
        self.close_if(&end);
        Ok(())
    }

    /// Moves bytes from the socket to the guest, until the guest has no buffers. Drops them while the port is not open.
    fn move_to_guest(&mut self) -> Result<(), QueueError> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let is_wanted = |port: &Port| port.state.guest_open && !port.has_stale_input;
        if !self.port.as_ref().is_some_and(is_wanted) {
            let (end, is_empty) = drop_input(socket.as_fd(), &self.counters);
            if let Some(port) = &mut self.port {
                port.set_starved(false, &self.counters);
                port.has_stale_input &= !is_empty;
            }
            self.close_if(&end);
        }
        // The stale input may be gone now. Then a port that was opened again can receive.
        if let (Some(socket), Some(port)) = (&self.socket, &mut self.port)
            && is_wanted(port)
        {
            let end = port.receive_from(socket.as_fd(), &self.counters)?;
            self.close_if(&end);
        }
        Ok(())
    }

    fn close_if(&mut self, end: &SocketState) {
        if *end == SocketState::Closed {
            self.close_socket();
        }
    }

    fn close_socket(&mut self) {
        let Some(socket) = self.socket.take() else { return };
        // Another process may have a descriptor of the same socket, which would keep the entry.
        match epoll::delete(&self.poller, &socket) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => self.warn(&format!(
                "cannot stop watching the shim's socket, which is closed: {error}"
            )),
        }
        self.watched = epoll::EventFlags::empty();
        if let Some(port) = &mut self.port {
            port.state.host_closed();
            port.is_blocked = false;
            port.set_starved(false, &self.counters);
        }
    }

    /// Watches the events of the socket that can be handled.
    fn watch_socket(&mut self) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let mut wanted = epoll::EventFlags::empty();
        wanted.set(
            epoll::EventFlags::IN,
            !self.port.as_ref().is_some_and(|port| port.is_starved),
        );
        wanted.set(
            epoll::EventFlags::OUT,
            self.port.as_ref().is_some_and(|port| port.is_blocked),
        );
        let data = epoll::EventData::new_u64(SOCKET);
        match (self.watched.is_empty(), wanted.is_empty()) {
            _ if wanted == self.watched => {}
            (true, _) => epoll::add(&self.poller, socket, data, wanted)?,
            // An entry without events would still report that the shim's end is closed, again and again.
            (false, true) => epoll::delete(&self.poller, socket)?,
            (false, false) => epoll::modify(&self.poller, socket, data, wanted)?,
        }
        self.watched = wanted;
        Ok(())
    }

    fn warn(&self, text: &str) {
        self.counters.add_error();
        log::warn!(target: self.counters.name(), "{text}");
    }
}

impl Port {
    /// Sends the guest's bytes to `socket`. Drops them if there is none.
    fn send_to(&mut self, socket: Option<BorrowedFd<'_>>, counters: &Counters) -> Result<SocketState, QueueError> {
        self.is_blocked = false;
        for _ in 0..MAX_CHAINS_PER_TURN {
            let Some(mut chain) = self.transmit.pop()? else {
                self.transmit.notify_driver()?;
                if self.transmit.resume_kicks()? {
                    continue;
                }
                return Ok(SocketState::Open);
            };
            chain.readable.split_to(self.sent);
            let remaining = chain.readable.len();
            let outcome = match socket {
                Some(socket) if remaining > 0 => chain.readable.write_to(socket, None),
                _ => Ok(remaining),
            };
            match outcome {
                Ok(count) => {
                    counters.add_bytes_from_guest(count as u64);
                    if count == remaining {
                        self.sent = 0;
                        counters.add_requests(1);
                        self.transmit.add_used(chain.head, 0)?;
                        continue;
                    }
                    self.sent += count;
                    self.transmit.undo_pop();
                }
                Err(error) => {
                    self.transmit.undo_pop();
                    match error.kind() {
                        io::ErrorKind::Interrupted => {}
                        io::ErrorKind::WouldBlock => {
                            self.is_blocked = true;
                            self.transmit.notify_driver()?;
                            return Ok(SocketState::Open);
                        }
                        _ => {
                            // The rest is dropped at the next turn.
                            self.transmit.kick_again()?;
                            self.transmit.notify_driver()?;
                            return Ok(report_failure("write to", &error, counters));
                        }
                    }
                }
            }
        }
        self.transmit.kick_again()?;
        self.transmit.notify_driver()?;
        Ok(SocketState::Open)
    }

    /// Fills the guest's buffers from `socket`.
    fn receive_from(&mut self, socket: BorrowedFd<'_>, counters: &Counters) -> Result<SocketState, QueueError> {
        let mut end = SocketState::Open;
        let mut is_starved = false;
        for _ in 0..MAX_CHAINS_PER_TURN {
            let Some(chain) = self.receive.pop()? else {
                if self.receive.resume_kicks()? {
                    continue;
                }
                match peek(socket) {
                    Ok(0) => end = SocketState::Closed,
                    Ok(_) => is_starved = true,
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    Err(error) => end = report_failure("read from", &error.into(), counters),
                }
                break;
            };
            if chain.writable.len() == 0 {
                self.receive.add_used(chain.head, 0)?;
                continue;
            }
            match chain.writable.read_from(socket, None) {
                Ok(0) => {
                    self.receive.undo_pop();
                    end = SocketState::Closed;
                    break;
                }
                Ok(count) => {
                    counters.add_requests(1);
                    counters.add_bytes_to_guest(count as u64);
                    self.receive
                        .add_used(chain.head, u32::try_from(count).unwrap_or(u32::MAX))?;
                }
                Err(error) => {
                    self.receive.undo_pop();
                    match error.kind() {
                        io::ErrorKind::Interrupted => {}
                        io::ErrorKind::WouldBlock => break,
                        _ => {
                            end = report_failure("read from", &error, counters);
                            break;
                        }
                    }
                }
            }
        }
        self.receive.notify_driver()?;
        self.set_starved(is_starved, counters);
        Ok(end)
    }

    fn set_starved(&mut self, is_starved: bool, counters: &Counters) {
        self.is_starved = is_starved;
        if is_starved {
            counters.wait(PORT_RECEIVE, Obstacle::NoGuestBuffers);
        } else {
            counters.resume(PORT_RECEIVE);
        }
    }
}

/// The number of bytes that wait in a socket, at most one. 0 means that the shim has closed its end.
fn peek(socket: BorrowedFd<'_>) -> rustix::io::Result<usize> {
    let (count, _) = rustix::net::recv(socket, &mut [0; 1][..], rustix::net::RecvFlags::PEEK)?;
    Ok(count)
}

/// Drops bytes that wait in a socket, at most [`MAX_DROPPED_PER_TURN`]. Also returns whether none is left.
fn drop_input(socket: BorrowedFd<'_>, counters: &Counters) -> (SocketState, bool) {
    let mut buffer = [0; 4096];
    for _ in 0..MAX_DROPPED_PER_TURN / buffer.len() {
        match rustix::io::read(socket, &mut buffer) {
            Ok(0) => return (SocketState::Closed, true),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return (SocketState::Open, true),
            Err(error) => return (report_failure("read from", &error.into(), counters), true),
        }
    }
    (SocketState::Open, false)
}

/// Logs that the socket failed, unless the shim has closed its end.
fn report_failure(step: &str, error: &io::Error, counters: &Counters) -> SocketState {
    if !matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) {
        counters.add_error();
        log::warn!(
            target: counters.name(),
            "cannot {step} the shim's socket, so the port stays closed until the machine boots again: {error}"
        );
    }
    SocketState::Closed
}

impl Device for NamedPort {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES | MULTIPORT
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&CONFIG, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        if activation.features & MULTIPORT == 0 {
            // The driver has port 0 only.
            if activation.queues.len() > CONSOLE_TRANSMIT {
                let console = activation.queues.swap_remove(CONSOLE_TRANSMIT);
                console.kick_again().map_err(ActivateError::Queue)?;
                self.console = Some(console);
            }
            return Ok(());
        }
        let [_, console, control_receive, control_transmit, receive, transmit] = activation.take_queues()?;
        // The event loop may have consumed kicks before activation.
        control_transmit.kick_again().map_err(ActivateError::Queue)?;
        self.console = Some(console);
        self.port = Some(Port {
            state: PortState::default(),
            control_receive,
            control_transmit,
            receive,
            transmit,
            sent: 0,
            is_starved: false,
            is_blocked: false,
            has_stale_input: false,
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.console = None;
        self.port = None;
        self.counters.resume(PORT_RECEIVE);
        if let Err(error) = self.watch_socket() {
            self.warn(&format!(
                "cannot watch the shim's socket, so the port passes no bytes: {error}"
            ));
        }
    }
}
