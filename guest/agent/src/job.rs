//! Jobs: forked copies of the agent for work that may take long, that may block on a container's files, or that
//! accesses objects under a container's control. Meanwhile the event loop continues. A job sends one report and ends.
//!
//! The event loop starts jobs and receives their reports. The work itself is not here.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nutshell_protocol::{DiskKernel, Failure, FrameBuffer, encode};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use crate::failure::{FailureExt, at_step};
use crate::sys;

/// The result of a successful job.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Outcome {
    /// The work is done. It created no process that outlives the job.
    Done,
    /// The job has created a process, which is a child of the agent.
    Process { pid: u32 },
    /// The job has sent the kernel and the initrd of a disk to the host. The value describes them.
    DiskKernel(DiskKernel),
}

/// A job's report: its result, and the master of the new process's terminal if it has one.
pub(crate) type Report = (Result<Outcome, Failure>, Option<OwnedFd>);

/// A running job.
#[derive(Debug)]
pub(crate) struct Job {
    /// The forked process.
    pub(crate) pid: Pid,
    socket: OwnedFd,
}

/// The largest body of a report's frame, in bytes. An error text of more than half of this is cut to an eighth of it, in
/// characters, so that its encoded form fits.
const MAX_REPORT_BODY: usize = 64 << 10;

/// A job's work. It returns the parts of a [`Report`].
pub(crate) type JobWork<'a> = &'a mut dyn FnMut() -> Result<(Outcome, Option<OwnedFd>), Failure>;

impl Job {
    /// Calls `watch` with the descriptor that becomes readable when the report arrives; then forks and runs `work` in
    /// the child. If `watch` fails, nothing is forked, so no job can run unwatched. The child keeps the standard
    /// descriptors and those in `keep`, and closes all others.
    pub(crate) fn start(
        keep: &[BorrowedFd<'_>],
        watch: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
        work: JobWork<'_>,
    ) -> io::Result<Self> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        watch(ours.as_fd()).map_err(at_step("watch for its report"))?;
        if let Some(pid) = sys::fork()? {
            return Ok(Self { pid, socket: ours });
        }
        let mut kept = keep.to_vec();
        kept.push(theirs.as_fd());
        sys::close_all_but(&kept);
        sys::unblock_signals();
        let status = match work() {
            Ok((outcome, terminal)) => send_report(&theirs, &Ok(outcome), terminal.as_ref()),
            Err(failure) => send_report(&theirs, &Err(failure), None),
        };
        sys::exit_now(i32::from(status.is_err()))
    }

    /// Receives the report, or returns `None` if it has not arrived. A job that ended without a report has failed.
    /// `purpose` is a verb with its object, for that failure.
    pub(crate) fn receive_report(&self, purpose: &impl fmt::Display) -> Option<Report> {
        let mut bytes = vec![0; MAX_REPORT_BODY + size_of::<u32>()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        );
        let length = match received {
            Ok(message) if message.bytes > 0 => message.bytes,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return None,
            Ok(_) | Err(_) => {
                let text =
                    format!("{purpose}: its job ended without a report: it was killed, or the guest is out of memory");
                return Some((Err(Failure::internal(text)), None));
            }
        };
        let terminal = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        let mut frame = FrameBuffer::new(MAX_REPORT_BODY);
        frame.push(&bytes[..length]);
        let result = match frame.next() {
            Ok(Some(result)) => result,
            _ => Err(Failure::internal(format!("{purpose}: its job sent a malformed report"))),
        };
        Some((result, terminal))
    }
}

fn send_report(socket: &OwnedFd, result: &Result<Outcome, Failure>, terminal: Option<&OwnedFd>) -> io::Result<()> {
    let encode = |result| encode(result, MAX_REPORT_BODY).map_err(io::Error::other);
    let frame = match result {
        Err(failure) if failure.message.len() > MAX_REPORT_BODY / 2 => {
            let message = failure.message.chars().take(MAX_REPORT_BODY / 8).collect();
            encode(&Err(Failure {
                message,
                kind: failure.kind,
            }))?
        }
        result => encode(result)?,
    };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = terminal.map(|fd| [fd.as_fd()]);
    if let Some(descriptors) = &descriptors {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(&frame)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nutshell_protocol::FailureKind;
    use rustix::event::{PollFd, PollFlags, poll};

    fn unwatched(_: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }

    fn wait_for_report(job: &Job) -> Report {
        poll(&mut [PollFd::new(&job.socket, PollFlags::IN)], None).unwrap();
        let report = job
            .receive_report(&"test")
            .expect("poll returned, so there is a report");
        rustix::process::waitpid(Some(job.pid), rustix::process::WaitOptions::empty()).unwrap();
        report
    }

    #[test]
    fn job_reports_its_process_with_the_terminal() {
        let job = Job::start(&[], unwatched, &mut || {
            let outcome = Outcome::Process { pid: 7 };
            let (terminal, _) = rustix::pipe::pipe().map_err(|error| Failure::internal(error.to_string()))?;
            Ok((outcome, Some(terminal)))
        })
        .unwrap();
        let (result, terminal) = wait_for_report(&job);
        assert_eq!(result, Ok(Outcome::Process { pid: 7 }));
        assert!(terminal.is_some());
    }

    #[test]
    fn job_that_ends_without_a_report_is_a_failure() {
        let job = Job::start(&[], unwatched, &mut || sys::exit_now(9)).unwrap();
        assert_eq!(wait_for_report(&job).0.unwrap_err().kind, FailureKind::Internal);
    }

    #[test]
    fn job_that_cannot_be_watched_does_not_run() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let failing_watch = |_: BorrowedFd<'_>| Err(io::Error::from(rustix::io::Errno::NOSPC));
        let error = Job::start(&[writer.as_fd()], failing_watch, &mut || {
            let _ = rustix::io::write(&writer, b"ran");
            Ok((Outcome::Done, None))
        })
        .unwrap_err();
        drop(writer);
        assert_eq!(rustix::io::read(&reader, &mut [0; 4]).unwrap(), 0);
        assert!(error.to_string().starts_with("watch for its report: "), "{error}");
    }

    #[test]
    fn job_closes_the_agents_descriptors() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let (blocked_reader, blocked_writer) = rustix::pipe::pipe().unwrap();
        let job = Job::start(&[blocked_reader.as_fd()], unwatched, &mut || {
            let mut byte = [0];
            let _ = rustix::io::read(&blocked_reader, &mut byte);
            Ok((Outcome::Done, None))
        })
        .unwrap();
        drop(writer);
        let mut byte = [0];
        assert_eq!(rustix::io::read(&reader, &mut byte).unwrap(), 0);
        drop(blocked_writer);
        assert_eq!(wait_for_report(&job).0, Ok(Outcome::Done));
    }

    #[test]
    fn long_failure_is_truncated() {
        let job = Job::start(&[], unwatched, &mut || {
            Err(Failure::internal("x".repeat(MAX_REPORT_BODY * 2)))
        })
        .unwrap();
        assert_eq!(wait_for_report(&job).0.unwrap_err().message.len(), MAX_REPORT_BODY / 8);
    }
}
