//! The action `shell`: connects the standard streams of this process to a shell in a guest.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use nutshell_protocol::{
    FrameBuffer, FrameError, MAX_SHELL_DATA, MAX_SHELL_FRAME, ShellInput, ShellOutput, ShellTerminal, TerminalSize,
    encode,
};
use parking_lot::Mutex;
use rustix::{
    fs::Mode,
    stdio::{stdin, stdout},
    termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr},
};
use tokio::signal::unix::{SignalKind, signal};

use super::client::{CallError, call_shell};
use crate::shim::report::ShellRequest;

/// A shell that could not be opened, or whose connection broke.
#[derive(Debug, thiserror::Error)]
pub(super) enum ShellError {
    #[error("cannot listen at {}: {source}: run this as root", path.display())]
    Listen { path: PathBuf, source: io::Error },
    #[error("{0}")]
    Call(#[from] CallError),
    #[error("cannot {step}: {source}")]
    System { step: &'static str, source: io::Error },
    #[error("the guest's shell sent an invalid message: {0}")]
    Frame(#[from] FrameError),
    #[error("the connection to the guest's shell was closed: the guest or its shim has ended")]
    Closed,
}

fn system_error(step: &'static str) -> impl FnOnce(io::Error) -> ShellError {
    move |source| ShellError::System { step, source }
}

/// Runs a shell in the guest of the container `id`, whose shim listens at `shim`. Returns the exit status of the shell.
/// `state` is a directory that only root can write to.
pub(super) fn run(runtime: &tokio::runtime::Runtime, shim: &Path, id: &str, state: &Path) -> Result<u8, ShellError> {
    let has_terminal = isatty(stdin()) && isatty(stdout());
    let listener = Listener::bind(state)?;
    let request = ShellRequest {
        id: id.to_owned(),
        socket: listener.path.clone(),
        terminal: has_terminal
            .then(terminal)
            .transpose()
            .map_err(system_error("read the size of the terminal"))?,
    };
    runtime.block_on(call_shell(shim, &request))?;
    // The shim connects before it answers the request.
    let accepted = listener.socket.accept();
    let (connection, _) = accepted.map_err(system_error("accept the connection of the shim"))?;
    drop(listener);
    let raw_mode = has_terminal.then(RawMode::enter).transpose();
    let raw_mode = raw_mode.map_err(system_error("put the terminal into raw mode"))?;
    let input = connection.try_clone();
    let input = input.map_err(system_error("duplicate the connection to the shell"))?;
    let input = Arc::new(Mutex::new(input));
    if has_terminal {
        watch_size(input.clone());
    }
    // The thread still waits in a read of standard input when the shell has ended. It ends with the process.
    thread::spawn(move || send_input(&input));
    let status = print_output(connection);
    drop(raw_mode);
    status
}

/// A socket that only root can connect to. Its file is removed on drop.
struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    fn bind(directory: &Path) -> Result<Self, ShellError> {
        let path = directory.join(format!("nutshell-shell.{}", std::process::id()));
        let mask = rustix::process::umask(Mode::from_raw_mode(0o177));
        let bound = UnixListener::bind(&path);
        rustix::process::umask(mask);
        match bound {
            Ok(socket) => Ok(Self { socket, path }),
            Err(source) => Err(ShellError::Listen { path, source }),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            eprintln!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn terminal() -> io::Result<ShellTerminal> {
    Ok(ShellTerminal {
        size: terminal_size()?,
        kind: std::env::var("TERM").unwrap_or_else(|_| "dumb".to_owned()),
    })
}

fn terminal_size() -> io::Result<TerminalSize> {
    let size = tcgetwinsize(stdin())?;
    Ok(TerminalSize {
        columns: size.ws_col,
        rows: size.ws_row,
    })
}

/// The terminal is in raw mode, so that it passes on each key at once, until this is dropped.
struct RawMode(Termios);

impl RawMode {
    fn enter() -> io::Result<Self> {
        let original = tcgetattr(stdin())?;
        let mut raw = original.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Drain, &raw)?;
        Ok(Self(original))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(stdin(), OptionalActions::Drain, &self.0) {
            eprintln!("cannot restore the terminal's settings, run `stty sane`: {error}");
        }
    }
}

/// Sends each change of the terminal's size, on a separate thread.
fn watch_size(input: Arc<Mutex<UnixStream>>) {
    thread::spawn(move || -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut changes = signal(SignalKind::window_change())?;
            while changes.recv().await.is_some() {
                send(&input, &ShellInput::Resize(terminal_size()?))?;
            }
            Ok(())
        })
    });
}

/// Sends standard input until its end, or until the shell has ended.
fn send_input(input: &Mutex<UnixStream>) {
    let mut bytes = vec![0; MAX_SHELL_DATA];
    loop {
        let message = match io::stdin().read(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Ok(0) | Err(_) => ShellInput::End,
            Ok(count) => ShellInput::Data(bytes[..count].to_vec()),
        };
        let sent = send(input, &message);
        if sent.is_err() || message == ShellInput::End {
            return;
        }
    }
}

fn send(input: &Mutex<UnixStream>, message: &ShellInput) -> io::Result<()> {
    let frame = encode(message, MAX_SHELL_FRAME).map_err(io::Error::other)?;
    input.lock().write_all(&frame)
}

/// Prints output until the shell has ended. Returns its exit status.
fn print_output(mut connection: UnixStream) -> Result<u8, ShellError> {
    let mut frames = FrameBuffer::new(MAX_SHELL_FRAME);
    let mut bytes = vec![0; MAX_SHELL_DATA];
    loop {
        let count = connection
            .read(&mut bytes)
            .map_err(system_error("read from the shell"))?;
        if count == 0 {
            return Err(ShellError::Closed);
        }
        frames.push(&bytes[..count]);
        while let Some(output) = frames.next()? {
            match output {
                ShellOutput::Data(data) => {
                    let mut stdout = io::stdout().lock();
                    stdout
                        .write_all(&data)
                        .and_then(|()| stdout.flush())
                        .map_err(system_error("print the output of the shell"))?;
                }
                ShellOutput::Exited(status) => return Ok(status),
            }
        }
    }
}
