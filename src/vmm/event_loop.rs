//! The event loop on the main thread: executes commands of the shim and serves the devices that have no thread. It
//! never waits for the guest. Besides epoll, two calls block: the write of a notice while the shim does not read, and
//! the resize of a machine until the file server has mapped the new memory (at most a few seconds).

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    thread,
};

use nutshell_protocol::{FIRST_DISK_SLOT, disk_serial};
use rustix::{buffer::spare_capacity, event::epoll};
use vmm_sys_util::eventfd::EventFd;

use super::{
    end_signal::EndSignal, machine::RunningMachine, resources::open_disk, serial_console::SerialConsole, system_calls,
};
use crate::{
    control::{Channel, Command, ControlError, EndReason, MemoryState, Notice},
    devices::{
        console_tail::ConsoleTail,
        virtio::{
            console::Console,
            device::serve_or_reset,
            named_port::NamedPort,
            queue::QueueError,
            rng::Rng,
            vsock::{Vsock, muxer::StreamNotice},
        },
    },
    jail::seccomp,
};

/// The source of an event, which is the data of its epoll entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum EventSource {
    Control,
    End,
    Streams,
    VsockReceive,
    VsockTransmit,
    ConsoleTransmit,
    Rng,
    Balloon,
    SecondBalloonQueue,
    Memory,
    StallTimer,
    SerialConsole,
    GuestAgent,
}

const EVENT_SOURCES: [EventSource; 13] = [
    EventSource::Control,
    EventSource::End,
    EventSource::Streams,
    EventSource::VsockReceive,
    EventSource::VsockTransmit,
    EventSource::ConsoleTransmit,
    EventSource::Rng,
    EventSource::Balloon,
    EventSource::SecondBalloonQueue,
    EventSource::Memory,
    EventSource::StallTimer,
    EventSource::SerialConsole,
    EventSource::GuestAgent,
];

/// Why the event loop ended.
#[derive(Debug)]
pub(super) enum LoopExit {
    /// The machine has ended, which must be reported to the shim.
    Ended(EndReason),
    /// The shim is gone: the reason cannot be reported.
    ShimGone,
}

/// Drives the machine until it ends.
pub(super) fn run(
    machine: &mut RunningMachine,
    channel: &Channel,
    end: &EndSignal,
    console_tail: &ConsoleTail,
) -> LoopExit {
    let epoll = match create_epoll(&*machine, channel, end) {
        Ok(epoll) => epoll,
        Err(error) => return failed("watch the sources of events", error),
    };
    let mut events: Vec<epoll::Event> = Vec::with_capacity(EVENT_SOURCES.len());
    loop {
        if let Err(exit) = wait(&epoll, &mut events) {
            return exit;
        }
        for event in &events {
            let number = event.data.u64();
            let Some(source) = EVENT_SOURCES.into_iter().find(|source| *source as u64 == number) else {
                continue;
            };
            if let Some(exit) = handle_event(source, machine, channel, end, console_tail) {
                return exit;
            }
        }
        if let Err(exit) = report_streams(&mut machine.vsock.lock(), channel) {
            return exit;
        }
    }
}

/// Waits for events. May return without any.
fn wait(epoll: &OwnedFd, events: &mut Vec<epoll::Event>) -> Result<(), LoopExit> {
    events.clear();
    match epoll::wait(epoll, spare_capacity(events), None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(failed("wait for events", error.into())),
    }
}

/// The end of a machine whose event loop cannot continue.
fn failed(step: &str, error: io::Error) -> LoopExit {
    LoopExit::Ended(EndReason::DeviceFailed(format!("event loop: cannot {step}: {error}")))
}

/// The end of a machine whose control channel failed. The reason can be reported unless the shim is gone.
fn channel_failed(error: &ControlError) -> LoopExit {
    match error {
        ControlError::Closed => LoopExit::ShimGone,
        error => LoopExit::Ended(EndReason::DeviceFailed(format!("event loop: {error}"))),
    }
}

/// The end of a machine whose shim sent a command that is not possible, which is a bug in the shim.
fn invalid_command(reason: &str) -> LoopExit {
    LoopExit::Ended(EndReason::DeviceFailed(format!(
        "event loop: invalid command: {reason}"
    )))
}

fn create_epoll(machine: &RunningMachine, channel: &Channel, end: &EndSignal) -> io::Result<OwnedFd> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let add = |source: EventSource, descriptor: BorrowedFd<'_>| {
        let data = epoll::EventData::new_u64(source as u64);
        epoll::add(&epoll, descriptor, data, epoll::EventFlags::IN)
    };
    add(EventSource::Control, channel.as_fd())?;
    add(EventSource::End, end.event())?;
    add(EventSource::Streams, machine.vsock.lock().muxer().poller())?;
    add(EventSource::VsockReceive, borrow(&machine.vsock_receive_kick))?;
    add(EventSource::VsockTransmit, borrow(&machine.vsock_transmit_kick))?;
    if let Some((_, transmit_kick)) = &machine.console {
        add(EventSource::ConsoleTransmit, borrow(transmit_kick))?;
    }
    add(EventSource::Rng, borrow(&machine.rng_kick))?;
    add(EventSource::Balloon, borrow(&machine.balloon_kick))?;
    if let Some(kick) = &machine.second_balloon_kick {
        add(EventSource::SecondBalloonQueue, borrow(kick))?;
    }
    add(EventSource::Memory, borrow(machine.growth.kick()))?;
    add(EventSource::StallTimer, machine.stall_timer.as_fd())?;
    if let Some(console) = &machine.serial_console {
        add(EventSource::SerialConsole, console.poller())?;
    }
    if let Some(port) = &machine.guest_agent {
        add(EventSource::GuestAgent, port.lock().poller())?;
    }
    Ok(epoll)
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd is open for as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

fn handle_event(
    source: EventSource,
    machine: &mut RunningMachine,
    channel: &Channel,
    end: &EndSignal,
    console_tail: &ConsoleTail,
) -> Option<LoopExit> {
    let drain = |kick: &EventFd| {
        // The eventfd is readable, so this does not block. The count does not matter.
        if let Err(error) = kick.read() {
            log::warn!(target: "virtual machine", "event loop: cannot read the eventfd of {source:?}: {error}");
        }
    };
    match source {
        EventSource::Control => execute_commands(machine, channel, console_tail).err(),
        EventSource::End => end.reason().map(LoopExit::Ended),
        EventSource::Streams => machine.vsock.lock().serve_streams().err().map(vsock_failed),
        EventSource::VsockReceive => {
            drain(&machine.vsock_receive_kick);
            machine.vsock.lock().deliver().err().map(vsock_failed)
        }
        EventSource::VsockTransmit => {
            drain(&machine.vsock_transmit_kick);
            // Execute pending commands first: the guest connects to a port as soon as the shim has sent it the number
            // over a stream. The shim sends the command that opens the port first, but this loop may not have received
            // it yet.
            if let Err(exit) = execute_commands(machine, channel, console_tail) {
                return Some(exit);
            }
            machine.vsock.lock().serve_transmit().err().map(vsock_failed)
        }
        EventSource::ConsoleTransmit => {
            // A guest that breaks a queue of its console, rng, balloon or agent's port continues without that device.
            if let Some((console, transmit_kick)) = &machine.console {
                drain(transmit_kick);
                serve_or_reset(&mut *console.lock(), Console::serve);
            }
            None
        }
        EventSource::Rng => {
            drain(&machine.rng_kick);
            serve_or_reset(&mut *machine.rng.lock(), Rng::serve);
            None
        }
        EventSource::Balloon => {
            drain(&machine.balloon_kick);
            serve_balloon(machine, channel).err()
        }
        EventSource::SecondBalloonQueue => {
            if let Some(kick) = &machine.second_balloon_kick {
                drain(kick);
            }
            serve_balloon(machine, channel).err()
        }
        EventSource::Memory => {
            drain(machine.growth.kick());
            machine.growth.serve();
            report_memory(machine, channel).err()
        }
        EventSource::StallTimer => {
            machine.check_stalls();
            None
        }
        EventSource::SerialConsole => {
            let served = machine.serial_console.as_mut().map(SerialConsole::serve);
            let failed = served.and_then(Result::err);
            failed.map(|error| LoopExit::Ended(EndReason::DeviceFailed(format!("serial console: {error}"))))
        }
        EventSource::GuestAgent => {
            if let Some(port) = &machine.guest_agent {
                serve_or_reset(&mut *port.lock(), NamedPort::serve);
            }
            None
        }
    }
}

/// Executes all pending commands of the shim.
fn execute_commands(
    machine: &mut RunningMachine,
    channel: &Channel,
    console_tail: &ConsoleTail,
) -> Result<(), LoopExit> {
    while let Some((command, descriptors)) = channel.try_receive().map_err(|error| channel_failed(&error))? {
        execute(command, descriptors, machine, channel, console_tail)?;
    }
    Ok(())
}

fn execute(
    command: Command,
    descriptors: Vec<OwnedFd>,
    machine: &mut RunningMachine,
    channel: &Channel,
    console_tail: &ConsoleTail,
) -> Result<(), LoopExit> {
    let mut descriptors = descriptors.into_iter();
    match command {
        Command::Boot(..) => return Err(invalid_command("a second boot command")),
        Command::OpenStream { port, input, output } => {
            let input = if input { descriptors.next() } else { None };
            let output = if output { descriptors.next() } else { None };
            if let Err(error) = machine.vsock.lock().muxer().open(port, input, output) {
                log::warn!(
                    target: "vsock",
                    "cannot open the stream of port {port}, so a process has no input or output: {error}"
                );
                send(channel, &Notice::StreamClosed { port })?;
            }
        }
        Command::Drain { port, bytes } => machine.vsock.lock().muxer().drain(port, bytes),
        Command::CloseStream { port } => {
            let mut vsock = machine.vsock.lock();
            vsock.muxer().close(port);
            vsock.deliver().map_err(vsock_failed)?;
        }
        Command::PlugDisk { slot, access } => {
            let opened = open_disk(&disk_serial(slot), &access, || descriptors.next().map(File::from));
            let result = opened.and_then(|backing| machine.plug_disk(slot, backing));
            let result = result.map_err(|error| error.to_string());
            let slot = FIRST_DISK_SLOT.saturating_add(slot);
            send(channel, &Notice::Plugged { slot, result })?;
        }
        Command::UnplugDisk { slot } => {
            let unplug = machine.disk_slots.release(slot);
            unplug_in_background(unplug, slot, channel).map_err(|error| {
                let reason = format!("cannot start to unplug the disk in slot {slot}: {error}");
                LoopExit::Ended(EndReason::DeviceFailed(reason))
            })?;
        }
        Command::PlugNetworkDevice { slot, mac, mtu } => {
            let result = machine.plug_network_device(slot, mac, mtu, descriptors.collect(), None);
            let result = result.map_err(|error| error.to_string());
            send(channel, &Notice::Plugged { slot, result })?;
        }
        Command::Resize { memory, vcpus } => {
            let result = machine.resize(memory, vcpus).map_err(|error| error.to_string());
            send(channel, &Notice::Resized { result })?;
            report_memory(machine, channel)?;
        }
        Command::PressPowerButton => {
            let Some(power_button) = &machine.power_button else {
                return Err(invalid_command("PressPowerButton for a machine without a power button"));
            };
            if let Err(error) = power_button.press_power_button() {
                log::warn!(target: "virtual machine", "cannot signal the power button to the guest: {error}");
            }
        }
        Command::ReadProgress => send(
            channel,
            &Notice::Progress {
                count: machine.peripherals.progress.count(),
            },
        )?,
        Command::ReadConsole => send(channel, &Notice::Console(console_tail.to_vec()))?,
        Command::ReadStatistics => send(channel, &Notice::Statistics(machine.statistics()))?,
        Command::ReadGuestAgentPort => {
            let port = machine.guest_agent.as_ref();
            let open = port.is_some_and(|port| port.lock().is_open_in_guest());
            send(channel, &Notice::GuestAgentPort { open })?;
        }
        Command::ReadGuestMemory => {
            let mut is_requested = false;
            serve_or_reset(&mut *machine.balloon.lock(), |balloon| {
                is_requested = balloon.request_statistics()?;
                Ok(())
            });
            if !is_requested {
                report_guest_memory(machine, channel, None)?;
            }
        }
    }
    Ok(())
}

/// Unplugs the disk in a slot and sends [`Notice::Unplugged`], on another thread: unplugging waits for the disk's
/// current request, whose duration depends on the guest and on the host's disk.
fn unplug_in_background(unplug: Option<Box<dyn FnOnce() + Send>>, slot: u32, channel: &Channel) -> io::Result<()> {
    let channel = channel.try_clone()?;
    let slot = FIRST_DISK_SLOT.saturating_add(slot);
    let unplug = move || {
        seccomp::confine_thread(&system_calls::UNPLUG);
        if let Some(unplug) = unplug {
            unplug();
        }
        // If the shim is gone, the event loop notices it.
        let _ = channel.send(&Notice::Unplugged { slot }, &[]);
    };
    let thread = thread::Builder::new().name("unplug".to_owned()).stack_size(128 << 10);
    thread.spawn(unplug).map(drop)
}

fn vsock_failed(error: QueueError) -> LoopExit {
    LoopExit::Ended(EndReason::DeviceFailed(format!("vsock: {error}")))
}

/// Reports the size of the guest's added memory if it has just reached the requested size.
fn report_memory(machine: &mut RunningMachine, channel: &Channel) -> Result<(), LoopExit> {
    match machine.growth.newly_settled_size() {
        Some(bytes) => send(channel, &Notice::MemoryPlugged { bytes }),
        None => Ok(()),
    }
}

/// Serves the queues of the balloon. Which of them has which kick depends on the features that the driver has accepted.
fn serve_balloon(machine: &mut RunningMachine, channel: &Channel) -> Result<(), LoopExit> {
    let mut total = None;
    serve_or_reset(&mut *machine.balloon.lock(), |balloon| {
        balloon.serve()?;
        total = balloon.serve_statistics()?;
        Ok(())
    });
    match total {
        Some(_) => report_guest_memory(machine, channel, total),
        None => Ok(()),
    }
}

fn report_guest_memory(machine: &RunningMachine, channel: &Channel, total: Option<u64>) -> Result<(), LoopExit> {
    let (has_driver, plugged) = machine.growth.driver_state();
    let state = MemoryState {
        has_driver,
        plugged,
        total,
    };
    send(channel, &Notice::GuestMemory(state))
}

fn report_streams(vsock: &mut Vsock, channel: &Channel) -> Result<(), LoopExit> {
    for notice in vsock.muxer().take_notices() {
        let notice = match notice {
            StreamNotice::Drained(port) => Notice::Drained { port },
            StreamNotice::Closed(port) => Notice::StreamClosed { port },
        };
        send(channel, &notice)?;
    }
    Ok(())
}

fn send(channel: &Channel, notice: &Notice) -> Result<(), LoopExit> {
    channel.send(notice, &[]).map_err(|error| channel_failed(&error))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::devices::virtio::queue::QueueFault;

    #[test]
    fn failure_of_the_event_loop_ends_the_machine_with_its_cause() {
        let null: OwnedFd = File::open("/dev/null").unwrap().into();
        let (shim, vmm) = Channel::pair().unwrap();
        rustix::net::send(&shim, &[0xff; 9], rustix::net::SendFlags::empty()).unwrap();
        let malformed = vmm.try_receive::<Command>().unwrap_err();
        let broken = QueueError {
            queue: 1,
            fault: QueueFault::BufferTooSmall(3),
        };
        for (exit, expected) in [
            (
                wait(&null, &mut Vec::with_capacity(1)).unwrap_err(),
                "event loop: cannot wait for events: Invalid argument (os error 22)",
            ),
            (
                channel_failed(&malformed),
                "event loop: cannot decode a message from the control channel: Found a varint that didn't terminate. Is the \
                 usize too big for this platform?",
            ),
            (
                invalid_command("a second boot command"),
                "event loop: invalid command: a second boot command",
            ),
            (
                vsock_failed(broken),
                "vsock: queue 1: the driver provided a buffer of 3 bytes, which is too small",
            ),
        ] {
            match exit {
                LoopExit::Ended(EndReason::DeviceFailed(reason)) => assert_eq!(reason, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
        drop(shim);
        assert!(matches!(
            channel_failed(&vmm.try_receive::<Command>().unwrap_err()),
            LoopExit::ShimGone
        ));
    }
}
