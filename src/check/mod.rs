//! `containerd-shim-nutshell-v2 check` reports whether this host can run guests. It boots a guest without containers,
//! in the same jail and with the same code as a pod's, prints the result, and ends the guest. A table of the host's
//! settings follows, with advice ([`host`]). An argument after `check` is added to the guest kernel's command line, and
//! the kernel's log is then printed in place of the table. `check --system-calls` boots nothing, and prints which
//! system calls the jailed processes may make, and why ([`system_calls`]).
//!
//! Belongs here: what an administrator wants to know of a host. Does not belong here: anything that a pod needs; the
//! executable's `main` is the only caller.

mod host;
pub(crate) mod system_calls;

use std::{
    env,
    ffi::OsString,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::{Child, ExitCode, Stdio},
    time::{Duration, Instant},
};

use nutshell_protocol::{FrameBuffer, FrameError, FromAgent, MAX_FROM_AGENT, Ready};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use self::host::Host;
use crate::{
    control::{BoardKind, Channel, Command, ControlError, MachineConfig, Notice, Software},
    guest_image::{self, GuestImageError},
    jail::RoleCommand,
    shim::blocking::{self, FILE_SYSTEM_LIMIT},
    vmm,
};

/// The first argument that selects this role.
pub(crate) const ROLE: &str = "check";

/// Guest memory in bytes. Small, so that the boot time does not depend on memory.
const MEMORY: u64 = 128 << 20;

/// How long the guest may take to boot.
const BOOT_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the vmm may take to answer, or to report the end of its machine.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why this host cannot run guests.
#[derive(Debug, thiserror::Error)]
enum CheckError {
    #[error("cannot open /dev/kvm: {0}: load the module kvm_intel or kvm_amd, and run this as root")]
    Kvm(#[source] io::Error),
    #[error("the argument for the guest's kernel is not UTF-8")]
    Argument,
    #[error("cannot read this executable: {0}")]
    Executable(#[source] io::Error),
    #[error(transparent)]
    Guest(#[from] GuestImageError),
    #[error("cannot {step}: {source}")]
    System { step: &'static str, source: io::Error },
    #[error("cannot print the guest's console: {0}")]
    Print(#[source] io::Error),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("the agent in the guest sent a malformed message: {0}")]
    Agent(#[from] FrameError),
    #[error("the guest did not start: {reason}{console}")]
    Ended { reason: String, console: String },
    #[error(
        "the guest was not ready within {} s: it hangs, or KVM on this host is very slow (nested, for example): run \
         this again with loglevel=7 to see the guest's console",
        BOOT_TIMEOUT.as_secs()
    )]
    TimedOut,
    #[error("the vmm process does not answer within {} s: it hangs in the host's kernel", .0.as_secs_f32())]
    NoNotice(Duration),
}

fn system_error<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> CheckError {
    move |source| CheckError::System {
        step,
        source: source.into(),
    }
}

/// Boots a guest, and prints its kernel's release and the boot time, and the table of the host's settings.
pub(crate) fn main() -> ExitCode {
    let argument = env::args_os().nth(2);
    if argument.as_deref().is_some_and(|argument| argument == "--system-calls") {
        // The reader may have closed the pipe.
        let _ = io::stdout().write_all(system_calls::table().as_bytes());
        return ExitCode::SUCCESS;
    }
    let prints_table = argument.is_none();
    let result = parse_kernel_arguments(argument).and_then(boot);
    let status = report(&result);
    if prints_table {
        match blocking::run_without_runtime(FILE_SYSTEM_LIMIT, || host::table(&Host::at("/").examine())) {
            // The reader may have closed the pipe; the status is what counts.
            Ok(table) => drop(io::stdout().write_all(table.as_bytes())),
            Err(error) => eprintln!("cannot read the settings of this host: {error}"),
        }
    }
    status
}

/// Parses the argument after `check`.
fn parse_kernel_arguments(argument: Option<OsString>) -> Result<Option<String>, CheckError> {
    let argument = argument.map(OsString::into_string).transpose();
    argument.map_err(|_| CheckError::Argument)
}

fn report(result: &Result<(Ready, Duration), CheckError>) -> ExitCode {
    match result {
        Ok((ready, took)) => {
            println!(
                "guest kernel {} ready after {:.1} ms: this host can run nutshell",
                ready.kernel,
                took.as_secs_f64() * 1e3
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("this host cannot run nutshell: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Boots a guest and ends it. Returns the agent's first message, and the time from the start of the vmm to that
/// message. With `kernel_arguments`, prints the guest's console.
fn boot(kernel_arguments: Option<String>) -> Result<(Ready, Duration), CheckError> {
    let prints_console = kernel_arguments.is_some();
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(CheckError::Kvm)?;
    let image = blocking::run_without_runtime(FILE_SYSTEM_LIMIT, || guest_image::open(None, None))
        .map_err(CheckError::Executable)??;

    let (channel, vmm_channel) = Channel::pair()?;
    let (agent, vmm_agent) = UnixStream::pair().map_err(system_error("make the stream to the agent"))?;
    let started = Instant::now();
    // Every return below ends the vmm.
    let _vmm = KillOnDrop(
        RoleCommand::new(vmm::ROLE)
            .and_then(|mut vmm| vmm.stdin(OwnedFd::from(vmm_channel)).stdout(Stdio::null()).spawn())
            .map_err(system_error("start the vmm process"))?,
    );

    let machine = MachineConfig {
        memory: MEMORY,
        max_memory: MEMORY,
        vcpus: 1,
        max_vcpus: 1,
        file_server: false,
        disks: Vec::new(),
        hotplug_disks: 0,
        kernel: image.kernel_extent,
    };
    let software = Software::Agent {
        board: BoardKind::Container,
        initramfs: image.initramfs_extent,
        kernel_arguments: kernel_arguments.unwrap_or_default(),
    };
    let descriptors = [
        kvm.as_fd(),
        image.kernel.as_fd(),
        image.initramfs.as_fd(),
        vmm_agent.as_fd(),
    ];
    channel.send(&Command::Boot(machine, software), &descriptors)?;
    drop(vmm_agent);

    let ready = wait_for_ready(&agent, &channel)?;
    let took = started.elapsed();
    if prints_console {
        print_console(&channel)?;
    }
    Ok((ready, took))
}

/// Kills and reaps the child process when it is dropped.
struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        // Both can fail only if the child was already reaped, and nothing else reaps it.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits for the agent's first message. If the machine ends, the agent's stream ends.
fn wait_for_ready(mut agent: &UnixStream, channel: &Channel) -> Result<Ready, CheckError> {
    agent
        .set_read_timeout(Some(BOOT_TIMEOUT))
        .map_err(system_error("limit the wait for the agent"))?;
    let mut frames = FrameBuffer::new(MAX_FROM_AGENT);
    let mut bytes = [0; 4096];
    loop {
        match agent.read(&mut bytes) {
            Ok(0) => return Err(end_reason(channel)),
            Ok(count) => frames.push(&bytes[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(CheckError::TimedOut),
            Err(error) => return Err(system_error("read from the guest's agent")(error)),
        }
        if let Some(FromAgent::Ready(ready)) = frames.next()? {
            return Ok(ready);
        }
    }
}

/// Prints the guest's console.
fn print_console(channel: &Channel) -> Result<(), CheckError> {
    channel.send(&Command::ReadConsole, &[])?;
    let mut notices = Notices::new(channel, NOTICE_TIMEOUT);
    loop {
        if let Notice::Console(tail) = notices.next()? {
            print!("{}", String::from_utf8_lossy(&tail));
            return io::stdout().flush().map_err(CheckError::Print);
        }
    }
}

/// Waits for the vmm's notice that the machine has ended.
fn end_reason(channel: &Channel) -> CheckError {
    let mut notices = Notices::new(channel, NOTICE_TIMEOUT);
    loop {
        match notices.next() {
            Ok(Notice::Ended { reason, console }) => {
                let console = String::from_utf8_lossy(&console).into_owned();
                return CheckError::Ended {
                    reason: reason.to_string(),
                    console: if console.is_empty() {
                        console
                    } else {
                        format!("\n{console}")
                    },
                };
            }
            Ok(_) => {}
            Err(error) => return error,
        }
    }
}

/// The notices of the vmm, until a deadline.
struct Notices<'c> {
    channel: &'c Channel,
    timeout: Duration,
    deadline: Instant,
}

impl<'c> Notices<'c> {
    fn new(channel: &'c Channel, timeout: Duration) -> Self {
        Self {
            channel,
            timeout,
            deadline: Instant::now() + timeout,
        }
    }

    fn next(&mut self) -> Result<Notice, CheckError> {
        const WAIT: &str = "wait for a notice of the vmm";
        let left = self.deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|error| system_error(WAIT)(io::Error::other(error)))?;
        match poll(&mut [PollFd::new(self.channel, PollFlags::IN)], Some(&left)) {
            Ok(0) => Err(CheckError::NoNotice(self.timeout)),
            Ok(_) => Ok(self.channel.receive()?.0),
            Err(error) => Err(system_error(WAIT)(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::ffi::OsStringExt, path::Path, process};

    use super::*;

    #[test]
    fn argument_for_the_kernel_must_be_utf_8() {
        assert_eq!(parse_kernel_arguments(None).unwrap(), None);
        let argument = parse_kernel_arguments(Some("debug".into())).unwrap();
        assert_eq!(argument.as_deref(), Some("debug"));
        let error = parse_kernel_arguments(Some(OsString::from_vec(vec![0xff])));
        assert!(matches!(error, Err(CheckError::Argument)));
    }

    #[test]
    fn vmm_that_sends_no_notice_is_an_error_after_the_timeout() {
        let (channel, vmm) = Channel::pair().unwrap();
        let drained = Notice::Drained { port: 1 };
        vmm.send(&drained, &[]).unwrap();
        let mut notices = Notices::new(&channel, Duration::from_millis(20));
        assert!(matches!(notices.next(), Ok(Notice::Drained { port: 1 })));

        let error = notices.next().unwrap_err().to_string();

        assert_eq!(
            error,
            "the vmm process does not answer within 0.02 s: it hangs in the host's kernel"
        );
        drop(vmm);
        let mut notices = Notices::new(&channel, NOTICE_TIMEOUT);
        assert!(matches!(notices.next(), Err(CheckError::Control(ControlError::Closed))));
    }

    #[test]
    fn dropped_child_is_killed_and_reaped() {
        let child = process::Command::new("sleep").arg("600").spawn().unwrap();
        let entry = format!("/proc/{}", child.id());
        assert!(Path::new(&entry).exists());

        drop(KillOnDrop(child));

        assert!(!Path::new(&entry).exists(), "a zombie would still have an entry");
    }
}
