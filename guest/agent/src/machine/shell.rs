//! Shells in the guest for the host's administrator, outside of all containers. Two processes run each shell: the shell
//! itself, and its parent, which relays between the shell and the stream to the host.

use std::convert::Infallible;
use std::ffi::{CString, NulError};
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::thread;

use nutshell_protocol::{
    Failure, FrameBuffer, MAX_SHELL_DATA, MAX_SHELL_FRAME, OpenShell, ShellInput, ShellOutput, ShellTerminal, encode,
};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, WaitOptions};
use rustix::pty::OpenptFlags;

use crate::connection::await_connection;
use crate::failure::{Context, FailureExt};
use crate::stdio;
use crate::sys;

/// The directory of [`PROGRAM`]. Only root may enter it.
const PROGRAM_DIRECTORY: &str = "/run/nutshell/shell";

/// BusyBox. Its shell finds all other programs in itself.
const PROGRAM: &str = "busybox";

/// How many bytes of output are relayed after the end of the shell. A program that it left behind may write more.
const MAX_FINAL_OUTPUT: usize = 1 << 20;

/// Starts a shell whose messages go through `stream`. Call this in a job.
pub(crate) fn start(stream: &OwnedFd, request: &OpenShell) -> Result<(), Failure> {
    let path = Path::new(PROGRAM_DIRECTORY).join(PROGRAM);
    install(&path, &request.program).context(|| format!("write the shell to {}", path.display()))?;
    let command = Command::new(&path, request.terminal.as_ref())
        .map_err(|error| Failure::invalid(format!("the kind of the terminal: {error}")))?;
    await_connection(stream).context(|| "wait for the stream to the host to connect".to_owned())?;
    rustix::io::ioctl_fionbio(stream, false)
        .map_err(io::Error::from)
        .context(|| "set the stream to the host to blocking".to_owned())?;
    let (ours, theirs) =
        open_ends(request.terminal.as_ref()).context(|| "open the standard streams of the shell".to_owned())?;
    let forked = sys::fork().context(|| "fork the process that relays the shell's streams".to_owned())?;
    if forked.is_some() {
        return Ok(());
    }
    sys::close_all_but(&[stream.as_fd(), ours.as_fd(), theirs.as_fd()]);
    let relayed = run(stream, &ours, theirs, &command);
    if let Err(error) = &relayed {
        eprintln!("nutshell-agent: cannot start the processes of an administrator's shell: {error}");
    }
    sys::exit_now(relayed.is_err().into())
}

/// Writes the program, unless an earlier shell has done so.
fn install(path: &Path, program: &[u8]) -> io::Result<()> {
    if fs::metadata(path).is_ok_and(|file| file.len() == program.len() as u64) {
        return Ok(());
    }
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
        fs::set_permissions(directory, fs::Permissions::from_mode(0o700))?;
    }
    // Another shell may be started at the same time.
    let temporary = path.with_extension(std::process::id().to_string());
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o700)
        .open(&temporary)?;
    file.write_all(program)?;
    drop(file);
    fs::rename(&temporary, path)
}

/// Opens a terminal, or a pair of sockets. Returns the relay's end and the shell's.
fn open_ends(terminal: Option<&ShellTerminal>) -> io::Result<(OwnedFd, OwnedFd)> {
    let Some(terminal) = terminal else {
        let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
        return Ok(rustix::net::socketpair(family, kind, SocketFlags::CLOEXEC, None)?);
    };
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&master)?;
    let size = (terminal.size.columns, terminal.size.rows);
    let slave = stdio::set_up_terminal(&master, Some(size), 0)?;
    Ok((master, slave))
}

/// The shell's program, arguments and environment.
#[derive(Debug)]
struct Command {
    program: CString,
    args: Vec<CString>,
    env: Vec<CString>,
    has_terminal: bool,
}

impl Command {
    fn new(program: &Path, terminal: Option<&ShellTerminal>) -> Result<Self, NulError> {
        let kind = terminal.map_or("dumb", |terminal| terminal.kind.as_str());
        let env = [
            format!("PATH={PROGRAM_DIRECTORY}"),
            "HOME=/".to_owned(),
            "PS1=guest:\\w# ".to_owned(),
            format!("TERM={kind}"),
        ];
        Ok(Self {
            program: CString::new(program.as_os_str().as_encoded_bytes())?,
            args: vec![CString::from(c"sh")],
            env: env.into_iter().map(CString::new).collect::<Result<_, _>>()?,
            has_terminal: terminal.is_some(),
        })
    }
}

/// Runs the shell, and relays until it has ended. The end of this process closes the terminal, by which the kernel
/// ends a shell whose client is gone.
fn run(stream: &OwnedFd, ours: &OwnedFd, theirs: OwnedFd, command: &Command) -> io::Result<()> {
    let Some(pid) = sys::fork()? else {
        let Err(error) = become_shell(&theirs, command);
        eprintln!("nutshell-agent: cannot start an administrator's shell: {error}");
        sys::exit_now(127)
    };
    drop(theirs);
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    thread::scope(|scope| {
        scope.spawn(|| {
            let result = relay_input(stream, ours, command.has_terminal);
            // The client is gone.
            sys::exit_now(result.is_err().into())
        });
        let relayed = relay_output(stream, ours, &pidfd)
            .and_then(|()| wait(pid))
            .and_then(|status| send(stream, &ShellOutput::Exited(status)));
        if let Err(error) = &relayed {
            eprintln!("nutshell-agent: cannot relay the output of an administrator's shell: {error}");
        }
        // The scope would wait for the end of the input.
        sys::exit_now(relayed.is_err().into())
    })
}

fn become_shell(end: &OwnedFd, command: &Command) -> io::Result<Infallible> {
    rustix::process::setsid()?;
    if command.has_terminal {
        sys::set_controlling_terminal(end)?;
    }
    rustix::stdio::dup2_stdin(end)?;
    rustix::stdio::dup2_stdout(end)?;
    rustix::stdio::dup2_stderr(end)?;
    sys::close_all_but(&[]);
    rustix::process::chdir("/")?;
    // When memory runs out, the shell and its programs can be killed; the agent cannot.
    fs::write("/proc/self/oom_score_adj", "0")?;
    sys::restore_sigpipe();
    Err(sys::execve(&command.program, &command.args, &command.env))
}

/// Relays input until the client closes the stream.
fn relay_input(stream: &OwnedFd, shell: &OwnedFd, has_terminal: bool) -> io::Result<()> {
    let mut frames = FrameBuffer::new(MAX_SHELL_FRAME);
    let mut bytes = vec![0; MAX_SHELL_DATA];
    loop {
        let count = rustix::io::retry_on_intr(|| rustix::io::read(stream, &mut bytes[..]))?;
        if count == 0 {
            return Ok(());
        }
        frames.push(&bytes[..count]);
        while let Some(input) = frames.next().map_err(io::Error::other)? {
            match input {
                ShellInput::Data(data) => match write_all(shell, &data) {
                    // The shell has ended, and its exit is about to be reported.
                    Err(error) if is_end_of_shell(&error) => {}
                    written => written?,
                },
                ShellInput::End if has_terminal => {}
                ShellInput::End => rustix::net::shutdown(shell, Shutdown::Write)?,
                ShellInput::Resize(size) if has_terminal => stdio::resize_terminal(shell, size.columns, size.rows)?,
                ShellInput::Resize(_) => {}
            }
        }
    }
}

/// Whether a write to the shell failed because nothing reads its input any more.
fn is_end_of_shell(error: &io::Error) -> bool {
    // ECONNRESET: it left input unread. EAGAIN: `relay_final_output` has made its end non-blocking.
    const ERRORS: [i32; 4] = [libc::EIO, libc::EPIPE, libc::ECONNRESET, libc::EAGAIN];
    error.raw_os_error().is_some_and(|error| ERRORS.contains(&error))
}

/// Relays output until the shell has ended.
fn relay_output(stream: &OwnedFd, shell: &OwnedFd, pidfd: &OwnedFd) -> io::Result<()> {
    loop {
        let mut ends = [PollFd::new(pidfd, PollFlags::IN), PollFd::new(shell, PollFlags::IN)];
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut ends, None))?;
        if !ends[0].revents().is_empty() {
            return relay_final_output(stream, shell);
        }
        if relay_once(stream, shell)?.is_none_or(|count| count == 0) {
            // All programs have closed their end, but the shell still runs.
            rustix::io::retry_on_intr(|| rustix::event::poll(&mut ends[..1], None))?;
            return Ok(());
        }
    }
}

/// Relays output that was written before the shell ended.
fn relay_final_output(stream: &OwnedFd, shell: &OwnedFd) -> io::Result<()> {
    rustix::io::ioctl_fionbio(shell, true)?;
    let mut relayed = 0;
    while let Some(count @ 1..) = relay_once(stream, shell)? {
        relayed += count;
        if relayed > MAX_FINAL_OUTPUT {
            break;
        }
    }
    Ok(())
}

/// Relays the output of one read. Returns its length in bytes, or `None` if there is none yet.
fn relay_once(stream: &OwnedFd, shell: &OwnedFd) -> io::Result<Option<usize>> {
    let mut bytes = vec![0; MAX_SHELL_DATA];
    let count = match rustix::io::retry_on_intr(|| rustix::io::read(shell, &mut bytes[..])) {
        // EIO: no process has the terminal open. ECONNRESET: the last process has left input unread.
        Err(Errno::IO | Errno::CONNRESET) => 0,
        Err(Errno::AGAIN) => return Ok(None),
        count => count?,
    };
    bytes.truncate(count);
    if count > 0 {
        send(stream, &ShellOutput::Data(bytes))?;
    }
    Ok(Some(count))
}

fn send(stream: &OwnedFd, output: &ShellOutput) -> io::Result<()> {
    let frame = encode(output, MAX_SHELL_FRAME).map_err(io::Error::other)?;
    write_all(stream, &frame)
}

fn write_all(end: &OwnedFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(end, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Waits for the shell's end. Returns its exit status, or 128 plus the number of the signal that killed it.
fn wait(pid: Pid) -> io::Result<u8> {
    let waited = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(pid), WaitOptions::empty()))?;
    let status = waited.and_then(|(_, status)| {
        let signal = status.terminating_signal().map(|signal| 128 + signal);
        status.exit_status().or(signal)
    });
    Ok(status.and_then(|status| u8::try_from(status).ok()).unwrap_or(u8::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nutshell_protocol::TerminalSize;

    /// Sends `inputs` to a shell of this host, and returns its output and status.
    fn run_script(terminal: Option<&ShellTerminal>, inputs: &[ShellInput]) -> (String, u8) {
        let (client, stream) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        let (ours, theirs) = open_ends(terminal).unwrap();
        let command = Command::new(Path::new("/bin/sh"), terminal).unwrap();
        let relay = sys::fork().unwrap();
        if relay.is_none() {
            sys::close_all_but(&[stream.as_fd(), ours.as_fd(), theirs.as_fd()]);
            let result = run(&stream, &ours, theirs, &command);
            sys::exit_now(result.is_err().into())
        }
        drop((stream, ours, theirs));
        for input in inputs {
            match write_all(&client, &encode(input, MAX_SHELL_FRAME).unwrap()) {
                // The shell has ended before it read all input.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
                written => written.unwrap(),
            }
        }
        let (mut frames, mut text, mut bytes) = (FrameBuffer::new(MAX_SHELL_FRAME), Vec::new(), [0; 4096]);
        loop {
            let count = rustix::io::read(&client, &mut bytes[..]).unwrap();
            assert!(count > 0, "no exit status after {:?}", String::from_utf8_lossy(&text));
            frames.push(&bytes[..count]);
            while let Some(output) = frames.next().unwrap() {
                match output {
                    ShellOutput::Data(data) => text.extend(data),
                    ShellOutput::Exited(status) => {
                        rustix::process::waitpid(relay, WaitOptions::empty()).unwrap();
                        return (String::from_utf8(text).unwrap(), status);
                    }
                }
            }
        }
    }

    /// Commands for a shell of this host, which finds no programs in itself.
    fn data(text: &str) -> ShellInput {
        ShellInput::Data(format!("PATH=/bin:/usr/bin\n{text}").into_bytes())
    }

    #[test]
    fn script_on_a_pipe_returns_its_output_and_status() {
        let inputs = [data("echo one; echo two >&2; exit 3\n"), ShellInput::End];
        assert_eq!(run_script(None, &inputs), ("one\ntwo\n".to_owned(), 3));
        let inputs = [data("kill -9 $$\n"), ShellInput::End];
        assert_eq!(run_script(None, &inputs), (String::new(), 137));
        assert_eq!(run_script(None, &[ShellInput::End]), (String::new(), 0));
    }

    #[test]
    fn final_output_arrives_although_a_program_stays_behind() {
        let inputs = [data("sleep 1000 & seq 20000; kill $!; exit 0\n"), ShellInput::End];
        let (output, status) = run_script(None, &inputs);
        assert!(output.ends_with("\n20000\n"), "{}", output.len());
        assert_eq!(status, 0);
    }

    #[test]
    fn status_arrives_although_the_shell_leaves_input_unread() {
        let terminal = ShellTerminal {
            size: TerminalSize { columns: 80, rows: 25 },
            kind: "dumb".to_owned(),
        };
        let mut inputs = vec![data("exit 5\n")];
        inputs.extend((0..8).map(|_| ShellInput::Data(vec![b'\n'; MAX_SHELL_DATA])));
        for attempt in 0..50 {
            assert_eq!(run_script(None, &inputs).1, 5, "attempt {attempt} on a pipe");
            assert_eq!(
                run_script(Some(&terminal), &inputs).1,
                5,
                "attempt {attempt} on a terminal"
            );
        }
    }

    #[test]
    fn shell_on_a_terminal_has_its_size_and_follows_changes() {
        let terminal = ShellTerminal {
            size: TerminalSize { columns: 91, rows: 17 },
            kind: "vt100".to_owned(),
        };
        let resize = ShellInput::Resize(TerminalSize { columns: 60, rows: 30 });
        let script = data("stty size; echo $TERM; tty\nexit 5\n");
        for (inputs, expected) in [(vec![script.clone()], "17 91"), (vec![resize, script], "30 60")] {
            let (output, status) = run_script(Some(&terminal), &inputs);
            for part in [expected, "vt100", "/dev/pts/"] {
                assert!(output.contains(part), "{part} is not in {output}");
            }
            assert_eq!(status, 5);
        }
    }
}
