//! The vmm's own thread: carries the shim's commands to the devices and moves the bytes of the
//! devices that have no thread of their own. Sleeps in one epoll; nothing here waits for a guest.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::Arc,
    thread,
};

use nutshell_protocol::FIRST_DISK_SLOT;
use rustix::{buffer::spare_capacity, event::epoll};
use vmm_sys_util::eventfd::EventFd;

use super::{end::End, machine::RunningMachine};
use crate::{
    control::{Channel, Command, EndReason, Notice},
    devices::virtio::{
        Device,
        block::Backing,
        console::Log,
        mmio::HotplugSlot,
        queue::QueueError,
        vsock::{Vsock, muxer::StreamNotice},
    },
};

/// What an event is about; epoll's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum Source {
    Control,
    End,
    Streams,
    VsockReceive,
    VsockTransmit,
    ConsoleTransmit,
    RngRequest,
    BalloonReport,
    MemoryRequest,
}

const SOURCES: [Source; 9] = [
    Source::Control,
    Source::End,
    Source::Streams,
    Source::VsockReceive,
    Source::VsockTransmit,
    Source::ConsoleTransmit,
    Source::RngRequest,
    Source::BalloonReport,
    Source::MemoryRequest,
];

/// Why the loop was left.
#[derive(Debug)]
pub(crate) enum LoopExit {
    /// The machine has ended; the shim is to be told.
    Ended(EndReason),
    /// The shim is gone, or talks nonsense: there is nobody to tell.
    ShimGone,
}

/// Drives the machine until it ends.
pub(crate) fn run(running: &mut RunningMachine, channel: &Channel, end: &End, log: &Arc<Log>) -> LoopExit {
    let failed = |error: io::Error| LoopExit::Ended(EndReason::DeviceFailed(format!("event loop: {error}")));
    let epoll = match watch(&*running, channel, end) {
        Ok(epoll) => epoll,
        Err(error) => return failed(error),
    };
    let mut events: Vec<epoll::Event> = Vec::with_capacity(SOURCES.len());
    loop {
        events.clear();
        match epoll::wait(&epoll, spare_capacity(&mut events), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return failed(error.into()),
        }
        for event in &events {
            let number = event.data.u64();
            let Some(source) = SOURCES.into_iter().find(|source| *source as u64 == number) else {
                continue;
            };
            if let Some(left) = handle(source, running, channel, end, log) {
                return left;
            }
        }
        if let Err(left) = tell_of_streams(&mut running.vsock.lock(), channel) {
            return left;
        }
    }
}

fn watch(running: &RunningMachine, channel: &Channel, end: &End) -> io::Result<OwnedFd> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let add = |source: Source, descriptor: BorrowedFd<'_>| {
        let data = epoll::EventData::new_u64(source as u64);
        epoll::add(&epoll, descriptor, data, epoll::EventFlags::IN)
    };
    add(Source::Control, channel.as_fd())?;
    add(Source::End, end.event())?;
    add(Source::Streams, running.vsock.lock().muxer().poller())?;
    add(Source::VsockReceive, borrow(&running.vsock_receive))?;
    add(Source::VsockTransmit, borrow(&running.vsock_transmit))?;
    add(Source::ConsoleTransmit, borrow(&running.console_transmit))?;
    add(Source::RngRequest, borrow(&running.rng_request))?;
    add(Source::BalloonReport, borrow(&running.balloon_report))?;
    add(Source::MemoryRequest, borrow(running.growth().request()))?;
    Ok(epoll)
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd stays open for as long as the borrow of it lasts.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

fn handle(
    source: Source,
    running: &mut RunningMachine,
    channel: &Channel,
    end: &End,
    log: &Arc<Log>,
) -> Option<LoopExit> {
    let kicked = |event: &EventFd| {
        // Readable, so it does not block; its count does not matter.
        let _ = event.read();
    };
    let broken = |error: QueueError| LoopExit::Ended(EndReason::DeviceFailed(format!("vsock: {error}")));
    match source {
        Source::Control => commands(running, channel, log).err(),
        Source::End => end.reason().map(LoopExit::Ended),
        Source::Streams => running.vsock.lock().poll().err().map(broken),
        Source::VsockReceive => {
            kicked(&running.vsock_receive);
            running.vsock.lock().deliver().err().map(broken)
        }
        Source::VsockTransmit => {
            kicked(&running.vsock_transmit);
            // A guest dials a port that it was told of over a stream. The command that opened the port
            // was sent before, and must not be overtaken.
            if let Err(left) = commands(running, channel, log) {
                return Some(left);
            }
            running.vsock.lock().transmit().err().map(broken)
        }
        Source::ConsoleTransmit => {
            kicked(&running.console_transmit);
            let mut console = running.console.lock();
            // A guest that breaks its console or its entropy source goes on without.
            if console.transmit().is_err() {
                console.reset();
            }
            None
        }
        Source::RngRequest => {
            kicked(&running.rng_request);
            let mut rng = running.rng.lock();
            if rng.fill().is_err() {
                rng.reset();
            }
            None
        }
        Source::BalloonReport => {
            kicked(&running.balloon_report);
            let mut balloon = running.balloon.lock();
            // A guest that breaks its balloon keeps its pages.
            if balloon.serve().is_err() {
                balloon.reset();
            }
            None
        }
        Source::MemoryRequest => {
            kicked(running.growth().request());
            running.growth().serve();
            tell_of_memory(running, channel).err()
        }
    }
}

/// Takes all commands of the shim that wait.
fn commands(running: &mut RunningMachine, channel: &Channel, log: &Arc<Log>) -> Result<(), LoopExit> {
    while let Some((next, descriptors)) = channel.try_receive().map_err(|_| LoopExit::ShimGone)? {
        command(next, descriptors, running, channel, log)?;
    }
    Ok(())
}

fn command(
    command: Command,
    descriptors: Vec<OwnedFd>,
    running: &mut RunningMachine,
    channel: &Channel,
    log: &Arc<Log>,
) -> Result<(), LoopExit> {
    let mut descriptors = descriptors.into_iter();
    let mut vsock = running.vsock.lock();
    match command {
        Command::Boot(_) => return Err(LoopExit::ShimGone),
        Command::OpenStream { port, input, output } => {
            let input = if input { descriptors.next() } else { None };
            let output = if output { descriptors.next() } else { None };
            if vsock.muxer().open(port, input, output).is_err() {
                tell(channel, &Notice::StreamClosed { port })?;
            }
        }
        Command::Drain { port, bytes } => vsock.muxer().drain(port, bytes),
        Command::CloseStream { port } => {
            vsock.muxer().close(port);
            vsock
                .deliver()
                .map_err(|error| LoopExit::Ended(EndReason::DeviceFailed(format!("vsock: {error}"))))?;
        }
        Command::PlugDisk { slot, read_only } => {
            drop(vsock);
            let file = descriptors.next().ok_or(LoopExit::ShimGone)?.into();
            let result = running.plug_disk(slot, Backing { file, read_only });
            let result = result.map_err(|error| error.to_string());
            let slot = FIRST_DISK_SLOT.saturating_add(slot);
            tell(channel, &Notice::Plugged { slot, result })?;
        }
        Command::UnplugDisk { slot } => {
            drop(vsock);
            let place = running.forget_disk(slot);
            unplug(place, slot, channel).map_err(|error| disk_failed(slot, &error))?;
        }
        Command::PlugLink { slot, mac, mtu } => {
            let result = running.plug_link(slot, mac, mtu, descriptors.collect());
            let result = result.map_err(|error| error.to_string());
            tell(channel, &Notice::Plugged { slot, result })?;
        }
        Command::Resize { memory, vcpus } => {
            drop(vsock);
            let result = running.resize(memory, vcpus).map_err(|error| error.to_string());
            tell(channel, &Notice::Resized { result })?;
            tell_of_memory(running, channel)?;
        }
        Command::ReadConsole => tell(channel, &Notice::Console(log.tail()))?,
    }
    Ok(())
}

/// Takes the disk out of its place, and says so. In a thread of its own: it ends with the request that the disk is
/// at, and how long that one takes is the guest's choice and the host's disk's.
fn unplug(place: Option<HotplugSlot>, slot: u32, channel: &Channel) -> io::Result<()> {
    let channel = channel.try_clone()?;
    let slot = FIRST_DISK_SLOT.saturating_add(slot);
    let empty = move || {
        if let Some(place) = place {
            place.empty();
        }
        // The event loop sees that the shim is gone.
        let _ = channel.send(&Notice::Unplugged { slot }, &[]);
    };
    let thread = thread::Builder::new().name("unplug".to_owned()).stack_size(128 << 10);
    thread.spawn(empty).map(drop)
}

fn disk_failed(slot: u32, error: &io::Error) -> LoopExit {
    LoopExit::Ended(EndReason::DeviceFailed(format!("disk in slot {slot}: {error}")))
}

/// Says what memory the guest has, if that is what it should have and was not said.
fn tell_of_memory(running: &mut RunningMachine, channel: &Channel) -> Result<(), LoopExit> {
    running
        .growth_mut()
        .newly_settled()
        .map_or(Ok(()), |bytes| tell(channel, &Notice::MemoryPlugged { bytes }))
}

fn tell_of_streams(vsock: &mut Vsock, channel: &Channel) -> Result<(), LoopExit> {
    for notice in vsock.muxer().take_notices() {
        tell(
            channel,
            &match notice {
                StreamNotice::Drained(port) => Notice::Drained { port },
                StreamNotice::Closed(port) => Notice::StreamClosed { port },
            },
        )?;
    }
    Ok(())
}

fn tell(channel: &Channel, notice: &Notice) -> Result<(), LoopExit> {
    channel.send(notice, &[]).map_err(|_| LoopExit::ShimGone)
}
