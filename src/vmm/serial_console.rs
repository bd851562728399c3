//! Moves the bytes of the serial port COM1 between the guest and the descriptors of the task's standard streams.
//!
//! The guest never waits for a reader: its output passes through a ring that drops the oldest bytes. Input waits in the
//! descriptor until the guest has read what came before.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, epoll, poll},
    io::Errno,
};

use crate::devices::{
    counters::Counters,
    pc::{
        output_ring::{OutputMover, OutputRing, WaitFor},
        serial::Serial,
    },
};

/// The capacity of the ring in bytes: what a guest may write while its reader is slow. A boot writes about 50 KiB.
const RING_CAPACITY: usize = 256 << 10;

/// The size of the buffer for input in bytes.
const INPUT_BUFFER: usize = 4096;

/// How long the end of a machine may wait for the reader of the last output.
const FINAL_OUTPUT_TIMEOUT: Duration = Duration::from_secs(10);

/// The source of an event, which is the data of its epoll entry.
const RING_READY: u64 = 0;
const OUTPUT_WRITABLE: u64 = 1;
const INPUT_READABLE: u64 = 2;
const PORT_ACCEPTS_INPUT: u64 = 3;

/// The descriptors behind a serial port.
#[derive(Debug)]
pub(super) struct SerialConsole {
    poller: OwnedFd,
    serial: Serial,
    ring: Arc<OutputRing>,
    mover: OutputMover,
    /// `None` without a reader, or if the reader is gone. The ring then keeps only the latest bytes.
    output: Option<OwnedFd>,
    input: Option<OwnedFd>,
    /// Input that the port has not taken yet.
    pending_input: Vec<u8>,
    reported_drops: u64,
}

impl SerialConsole {
    /// A ring for the output of a port.
    pub(super) fn create_ring() -> io::Result<Arc<OutputRing>> {
        OutputRing::new(RING_CAPACITY).map(Arc::new)
    }

    /// Connects `serial`, which writes to `ring`, to `input` and `output`, which are non-blocking.
    pub(super) fn new(
        serial: Serial,
        ring: Arc<OutputRing>,
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
    ) -> io::Result<Self> {
        let poller = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let watch = |descriptor: BorrowedFd<'_>, source| {
            epoll::add(
                &poller,
                descriptor,
                epoll::EventData::new_u64(source),
                epoll::EventFlags::IN,
            )
        };
        watch(ring.ready(), RING_READY)?;
        watch(serial.input_ready(), PORT_ACCEPTS_INPUT)?;
        let input = match input {
            // epoll cannot watch a regular file or /dev/null. Such an input is ignored.
            Some(input) => match watch(input.as_fd(), INPUT_READABLE) {
                Ok(()) => Some(input),
                Err(Errno::PERM) => None,
                Err(error) => return Err(error.into()),
            },
            None => None,
        };
        Ok(Self {
            poller,
            serial,
            mover: OutputMover::new(ring.clone()),
            ring,
            output,
            input,
            pending_input: Vec::new(),
            reported_drops: 0,
        })
    }

    /// The counters of the port.
    pub(super) fn counters(&self) -> Arc<Counters> {
        self.serial.counters()
    }

    /// A descriptor that is readable when [`Self::serve`] has something to do.
    pub(super) fn poller(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }

    /// Moves as many bytes as possible in both directions without waiting.
    pub(super) fn serve(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(4);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        match epoll::wait(&self.poller, rustix::buffer::spare_capacity(&mut events), Some(&now)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in events {
            match event.data.u64() {
                INPUT_READABLE => self.read_input()?,
                PORT_ACCEPTS_INPUT => self.send_pending_input()?,
                source => {
                    if source == OUTPUT_WRITABLE
                        && let Some(output) = &self.output
                    {
                        epoll::delete(&self.poller, output)?;
                    }
                    self.move_output()?;
                }
            }
        }
        Ok(())
    }

    fn move_output(&mut self) -> io::Result<()> {
        let Some(output) = &self.output else {
            // There is no reader. Clear the event; the ring keeps the latest bytes.
            self.ring.discard_ready();
            return Ok(());
        };
        match self.mover.serve(output.as_fd()) {
            Ok(WaitFor::Ring) => {}
            Ok(WaitFor::Output) => {
                let data = epoll::EventData::new_u64(OUTPUT_WRITABLE);
                match epoll::add(&self.poller, output, data, epoll::EventFlags::OUT) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Err(error) => {
                log::warn!(target: "serial", "cannot write the console's output, it is dropped from now on: {error}");
                // There is an entry if the output was full before. Closing the descriptor does not remove the entry
                // while another process has it open.
                match epoll::delete(&self.poller, output) {
                    Ok(()) | Err(Errno::NOENT | Errno::PERM) => {}
                    Err(error) => return Err(error.into()),
                }
                self.output = None;
            }
        }
        self.report_drops();
        Ok(())
    }

    fn report_drops(&mut self) {
        let dropped = self.ring.dropped();
        if dropped > self.reported_drops {
            let new = dropped - self.reported_drops;
            self.reported_drops = dropped;
            log::warn!(
                target: "serial",
                "{new} bytes of the console's output are lost: it has no reader, or the reader is slower than the guest"
            );
        }
    }

    fn read_input(&mut self) -> io::Result<()> {
        let Some(input) = &self.input else { return Ok(()) };
        let mut buffer = [0; INPUT_BUFFER];
        match rustix::io::read(input, &mut buffer) {
            // A serial port has no end of file: the guest waits for more.
            Ok(0) => self.close_input(),
            Ok(count) => {
                self.pending_input.extend_from_slice(&buffer[..count]);
                // Stop watching until the port has taken all of it.
                epoll::delete(&self.poller, input)?;
                self.send_pending_input()
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => {
                log::warn!(target: "serial", "cannot read the console's input, which is closed: {error}");
                self.close_input()
            }
        }
    }

    fn close_input(&mut self) -> io::Result<()> {
        if let Some(input) = self.input.take() {
            epoll::delete(&self.poller, &input)?;
        }
        Ok(())
    }

    /// Sends input to the port, and watches the descriptor again if the port has taken all of it.
    fn send_pending_input(&mut self) -> io::Result<()> {
        let taken = self.serial.send_input(&self.pending_input);
        self.pending_input.drain(..taken);
        if self.pending_input.is_empty()
            && let Some(input) = &self.input
        {
            let data = epoll::EventData::new_u64(INPUT_READABLE);
            match epoll::add(&self.poller, input, data, epoll::EventFlags::IN) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Delivers the last output of a machine that has ended. Waits for the reader at most 10 s.
    pub(super) fn finish(&mut self) {
        if self.output.is_none() {
            // Without an output, there is no reader who misses bytes. If the output failed, that was logged then.
            return;
        }
        let deadline = Instant::now() + FINAL_OUTPUT_TIMEOUT;
        while let Some(output) = &self.output {
            let served = self.mover.serve(output.as_fd());
            if matches!(served, Ok(WaitFor::Ring)) && self.ring.is_empty() {
                break;
            }
            if let Err(error) = served.and_then(|_| wait_until_writable(output, deadline)) {
                let reason = match error.kind() {
                    io::ErrorKind::TimedOut => {
                        format!("its reader has not read it within {} s", FINAL_OUTPUT_TIMEOUT.as_secs())
                    }
                    _ => format!("cannot write it: {error}"),
                };
                log::warn!(target: "serial", "the last output of the console is lost: {reason}");
                break;
            }
        }
        self.report_drops();
    }
}

/// Waits until `output` can be written. Fails with [`io::ErrorKind::TimedOut`] at `deadline`.
fn wait_until_writable(output: &OwnedFd, deadline: Instant) -> io::Result<()> {
    let remaining = deadline.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(remaining).map_err(io::Error::other)?;
    if remaining.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut polled = [PollFd::new(output, PollFlags::OUT)];
    match poll(&mut polled, Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, PipeWriter, Read, Write, pipe};

    use rustix::fs::{OFlags, fcntl_setfl};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::{
        devices::{bus::Registers, log_capture::LogCapture},
        jail::seccomp,
        vmm::system_calls,
    };

    const DATA: u64 = 0;
    const LINE_STATUS: u64 = 5;
    const DATA_READY: u8 = 1;

    struct Fixture {
        console: SerialConsole,
        port: Serial,
        output: PipeReader,
        input: PipeWriter,
    }

    fn fixture() -> Fixture {
        let (output, output_end) = pipe().unwrap();
        let (input_end, input) = pipe().unwrap();
        for end in [output_end.as_fd(), input_end.as_fd()] {
            fcntl_setfl(end, OFlags::NONBLOCK).unwrap();
        }
        let ring = SerialConsole::create_ring().unwrap();
        let port = Serial::new(EventFd::new(EFD_NONBLOCK).unwrap(), vec![ring.clone()]).unwrap();
        let console = SerialConsole::new(port.clone(), ring, Some(input_end.into()), Some(output_end.into())).unwrap();
        Fixture {
            console,
            port,
            output,
            input,
        }
    }

    /// Serves the console until nothing is left to do.
    fn settle(console: &mut SerialConsole) {
        let is_ready = |console: &SerialConsole| {
            let mut polled = [PollFd::from_borrowed_fd(console.poller(), PollFlags::IN)];
            poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
        };
        let mut turns = 0;
        while is_ready(console) {
            console.serve().unwrap();
            turns += 1;
            assert!(turns < 10_000, "the console is always ready");
        }
    }

    fn read_port(port: &mut Serial) -> Vec<u8> {
        let mut bytes = Vec::new();
        loop {
            let mut byte = [0];
            port.read(LINE_STATUS, &mut byte);
            if byte[0] & DATA_READY == 0 {
                return bytes;
            }
            port.read(DATA, &mut byte);
            bytes.push(byte[0]);
        }
    }

    #[test]
    fn output_reaches_the_descriptor_and_input_the_guest() {
        let mut fixture = fixture();
        fixture.port.write(DATA, b"login: ");
        fixture.input.write_all(&[b'x'; 1000]).unwrap();

        let mut received = Vec::new();
        while received.len() < 1000 {
            settle(&mut fixture.console);
            received.extend(read_port(&mut fixture.port));
        }

        let mut output = [0; 7];
        fixture.output.read_exact(&mut output).unwrap();
        assert_eq!(&output, b"login: ");
        assert_eq!(received, [b'x'; 1000]);
        drop(fixture.input);
        settle(&mut fixture.console);
    }

    #[test]
    fn input_that_the_guest_does_not_read_stays_in_its_descriptor_cve_2020_27174() {
        let mut fixture = fixture();
        fcntl_setfl(&fixture.input, OFlags::NONBLOCK).unwrap();
        let (mut written, mut is_full) = (0, false);
        while !is_full {
            match fixture.input.write(&[b'x'; INPUT_BUFFER]) {
                Ok(count) => written += count,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    is_full = written > 0;
                }
            }
            assert!(written < 16 << 20, "the console takes any amount of input");
            settle(&mut fixture.console);
        }
        let capacity = rustix::pipe::fcntl_getpipe_size(&fixture.input).unwrap();
        assert!(written <= capacity + 2 * INPUT_BUFFER, "{written}");
        assert!(fixture.console.pending_input.capacity() <= 2 * INPUT_BUFFER);

        let mut received = 0;
        while received < written {
            settle(&mut fixture.console);
            received += read_port(&mut fixture.port).len();
        }
        assert_eq!(received, written);
    }

    #[test]
    fn flood_without_a_reader_keeps_the_last_output() {
        let mut fixture = fixture();
        for _ in 0..1000 {
            fixture.port.write(DATA, &[b'-'; 1024]);
            settle(&mut fixture.console);
        }
        fixture.port.write(DATA, b"the end");
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            fixture.output.read_to_end(&mut bytes).unwrap();
            bytes
        });
        seccomp::testing::limit_thread(&system_calls::EVENT_LOOP);

        fixture.console.finish();
        drop(fixture.console);

        let bytes = reader.join().unwrap();
        assert!(bytes.ends_with(b"the end"));
        assert!(bytes.len() >= RING_CAPACITY, "{}", bytes.len());
        assert!(bytes.len() < 1000 * 1024, "{}", bytes.len());
    }

    #[test]
    fn console_without_a_reader_is_not_always_ready() {
        let mut fixture = fixture();
        drop(fixture.output);
        fixture.port.write(DATA, b"x");
        settle(&mut fixture.console);
        fixture.port.write(DATA, &[b'x'; 4096]);
        settle(&mut fixture.console);
        fixture.console.finish();
    }

    #[test]
    fn console_without_an_output_logs_no_lost_bytes() {
        let log = LogCapture::on_this_thread("serial");
        let ring = SerialConsole::create_ring().unwrap();
        let mut port = Serial::new(EventFd::new(EFD_NONBLOCK).unwrap(), vec![ring.clone()]).unwrap();
        let mut console = SerialConsole::new(port.clone(), ring, None, None).unwrap();
        for _ in 0..2 * RING_CAPACITY / 1024 {
            port.write(DATA, &[b'-'; 1024]);
            settle(&mut console);
        }

        console.finish();

        assert_eq!(log.lines(), [""; 0]);
    }

    #[test]
    fn input_that_epoll_cannot_watch_is_ignored() {
        let ring = SerialConsole::create_ring().unwrap();
        let port = Serial::new(EventFd::new(EFD_NONBLOCK).unwrap(), vec![ring.clone()]).unwrap();
        for path in ["/dev/null", "/proc/self/exe"] {
            let input = std::fs::File::open(path).unwrap();
            let mut console = SerialConsole::new(port.clone(), ring.clone(), Some(input.into()), None).unwrap();
            settle(&mut console);
        }
    }

    #[test]
    fn full_output_whose_reader_leaves_is_no_longer_watched() {
        let mut fixture = fixture();
        // Keeps the descriptor's file open, as the shim may.
        let _output_end = fixture.console.output.as_ref().unwrap().try_clone().unwrap();
        for _ in 0..256 {
            fixture.port.write(DATA, &[b'-'; 1024]);
            settle(&mut fixture.console);
        }
        drop(fixture.output);
        settle(&mut fixture.console);
        fixture.port.write(DATA, b"more");
        settle(&mut fixture.console);
        assert!(fixture.console.output.is_none());
    }
}
