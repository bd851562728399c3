//! The output of the serial port, between the vCPU that writes it and the event loop that moves it to a descriptor. The
//! guest never waits for the reader: if the ring is full, the oldest bytes are dropped.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::devices::output_sink::OutputSink;

/// The maximum size of one write to the descriptor, in bytes.
const MAX_WRITE_SIZE: usize = 4096;

/// A bounded queue of bytes.
#[derive(Debug)]
pub(crate) struct OutputRing {
    bytes: Mutex<VecDeque<u8>>,
    capacity: usize,
    dropped: AtomicU64,
    ready: EventFd,
}

impl OutputRing {
    /// An empty ring for `capacity` bytes.
    pub(crate) fn new(capacity: usize) -> io::Result<Self> {
        Ok(Self {
            bytes: Mutex::new(VecDeque::new()),
            capacity,
            dropped: AtomicU64::new(0),
            ready: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })
    }

    /// A descriptor that becomes readable when bytes arrive in the empty ring. [`OutputMover::serve`] clears it.
    pub(crate) fn ready(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open for as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ready.as_raw_fd()) }
    }

    /// Clears the descriptor of [`Self::ready`], for a ring without a reader.
    pub(crate) fn discard_ready(&self) {
        // There may be nothing to read.
        let _ = self.ready.read();
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.lock().is_empty()
    }

    /// The number of bytes that were dropped because the ring was full, or because the descriptor failed.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Moves the oldest bytes to the end of `target`, at most `count`.
    fn take(&self, count: usize, target: &mut Vec<u8>) {
        let mut ring = self.bytes.lock();
        let count = count.min(ring.len());
        target.extend(ring.drain(..count));
    }

    fn count_dropped(&self, bytes: usize) {
        self.dropped.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn signal(&self) {
        // Fails only if the counter is full, and then the descriptor is readable.
        let _ = self.ready.write(1);
    }
}

impl OutputSink for OutputRing {
    /// Appends `bytes` and drops the oldest bytes beyond the capacity.
    fn append(&self, bytes: &[u8]) {
        let mut ring = self.bytes.lock();
        let was_empty = ring.is_empty();
        let kept = &bytes[bytes.len().saturating_sub(self.capacity)..];
        let surplus = (ring.len() + kept.len()).saturating_sub(self.capacity);
        ring.drain(..surplus);
        ring.extend(kept);
        let dropped = surplus + bytes.len() - kept.len();
        let signal = was_empty && !ring.is_empty();
        drop(ring);
        self.count_dropped(dropped);
        if signal {
            self.signal();
        }
    }
}

/// What the caller of [`OutputMover::serve`] must wait for before the next call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WaitFor {
    /// [`OutputRing::ready`] to be readable. The ring is empty, or the call has written as many bytes as it may.
    Ring,
    /// The descriptor to be writable. It takes no more bytes now.
    Output,
}

/// Moves bytes from a ring to a descriptor.
#[derive(Debug)]
pub(crate) struct OutputMover {
    ring: Arc<OutputRing>,
    /// Bytes that have left the ring, and that the descriptor has not taken yet.
    chunk: Vec<u8>,
}

impl OutputMover {
    pub(crate) fn new(ring: Arc<OutputRing>) -> Self {
        Self {
            ring,
            chunk: Vec::with_capacity(MAX_WRITE_SIZE),
        }
    }

    /// Writes bytes to `output`, which must be non-blocking. One call writes at most the capacity of the ring. If bytes
    /// are left, [`OutputRing::ready`] is readable.
    ///
    /// # Errors
    ///
    /// The write failed, for example with `EPIPE`. Its bytes are dropped. The caller may stop calling: the ring then
    /// drops its oldest bytes when it is full.
    pub(crate) fn serve(&mut self, output: BorrowedFd<'_>) -> io::Result<WaitFor> {
        // Clears readiness. There may be nothing to read, if the descriptor has become writable.
        let _ = self.ring.ready.read();
        let mut budget = self.ring.capacity;
        loop {
            if self.chunk.is_empty() {
                if budget == 0 {
                    self.ring.signal();
                    return Ok(WaitFor::Ring);
                }
                self.ring.take(MAX_WRITE_SIZE.min(budget), &mut self.chunk);
                budget -= self.chunk.len();
            }
            if self.chunk.is_empty() {
                return Ok(WaitFor::Ring);
            }
            match rustix::io::write(output, &self.chunk) {
                Ok(written) => {
                    self.chunk.drain(..written);
                }
                Err(Errno::AGAIN) => return Ok(WaitFor::Output),
                Err(Errno::INTR) => {}
                Err(error) => {
                    self.ring.count_dropped(self.chunk.len());
                    self.chunk.clear();
                    return Err(error.into());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, pipe},
        os::fd::AsFd,
        thread,
    };

    use rustix::{
        event::{PollFd, PollFlags, Timespec, poll},
        fs::{OFlags, fcntl_setfl},
        pipe::fcntl_setpipe_size,
    };

    use super::*;

    fn is_ready(ring: &OutputRing) -> bool {
        let mut descriptors = [PollFd::from_borrowed_fd(ring.ready(), PollFlags::IN)];
        poll(&mut descriptors, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    fn drain(ring: &OutputRing) -> Vec<u8> {
        let mut bytes = Vec::new();
        ring.take(usize::MAX, &mut bytes);
        bytes
    }

    #[test]
    fn full_ring_drops_the_oldest_bytes_and_counts_them() {
        let ring = OutputRing::new(8).unwrap();
        assert!(!is_ready(&ring));

        ring.append(b"01234567");
        assert_eq!(ring.dropped(), 0);
        assert!(is_ready(&ring));
        ring.append(b"89");
        assert_eq!(ring.dropped(), 2);
        ring.append(b"");
        assert_eq!(drain(&ring), b"23456789");

        ring.append(b"ab");
        ring.append(b"the last eight bytes");
        assert_eq!(drain(&ring), b"ht bytes");
        assert_eq!(ring.dropped(), 2 + 2 + 12);
    }

    #[test]
    fn output_reaches_a_slow_reader_in_order_and_without_loss() {
        let (mut reader, writer) = pipe().unwrap();
        fcntl_setpipe_size(&writer, 4096).unwrap();
        fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
        let ring = Arc::new(OutputRing::new(1 << 20).unwrap());
        let mut mover = OutputMover::new(ring.clone());
        let sent: Vec<u8> = (0..=250).cycle().take(100_000).collect();
        ring.append(&sent);

        assert_eq!(mover.serve(writer.as_fd()).unwrap(), WaitFor::Output);
        assert!(!is_ready(&ring), "the caller waits for the descriptor");
        let received = thread::spawn(move || {
            let mut received = Vec::new();
            reader.read_to_end(&mut received).unwrap();
            received
        });
        while mover.serve(writer.as_fd()).unwrap() == WaitFor::Output {
            let mut descriptors = [PollFd::new(&writer, PollFlags::OUT)];
            poll(&mut descriptors, None).unwrap();
        }
        drop(writer);

        assert_eq!(received.join().unwrap(), sent);
        assert_eq!(ring.dropped(), 0);
    }

    #[test]
    fn reader_that_does_not_read_costs_a_bounded_amount_of_memory() {
        let (_reader, writer) = pipe().unwrap();
        fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
        let ring = Arc::new(OutputRing::new(1 << 10).unwrap());
        let mut mover = OutputMover::new(ring.clone());
        for _ in 0..1000 {
            ring.append(&[b'x'; 1 << 10]);
            mover.serve(writer.as_fd()).unwrap();
        }
        assert!(ring.bytes.lock().capacity() <= 4 << 10);
        assert!(mover.chunk.capacity() <= MAX_WRITE_SIZE);
        assert!(ring.dropped() > 0);
    }

    #[test]
    fn one_call_writes_at_most_the_capacity_of_the_ring() {
        let (mut reader, writer) = pipe().unwrap();
        fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
        let ring = Arc::new(OutputRing::new(16).unwrap());
        let mut mover = OutputMover::new(ring.clone());
        ring.append(b"0123456789abcdef");
        assert!(is_ready(&ring));

        assert_eq!(mover.serve(writer.as_fd()).unwrap(), WaitFor::Ring);
        assert!(is_ready(&ring), "the budget is spent: the loop must come back");
        assert_eq!(mover.serve(writer.as_fd()).unwrap(), WaitFor::Ring);
        assert!(!is_ready(&ring));
        let mut received = [0; 16];
        reader.read_exact(&mut received).unwrap();
        assert_eq!(&received, b"0123456789abcdef");
    }

    #[test]
    fn reader_that_is_gone_is_an_error_and_the_ring_continues() {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let ring = Arc::new(OutputRing::new(16).unwrap());
        let mut mover = OutputMover::new(ring.clone());
        ring.append(b"lost");

        let error = mover.serve(writer.as_fd()).unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(ring.dropped(), 4);
        ring.append(b"kept");
        assert_eq!(drain(&ring), b"kept");
    }
}
