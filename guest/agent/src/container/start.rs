//! The start of a created container: its first process runs the `startContainer` hooks, then its program.

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use nutshell_protocol::Failure;
use oci_spec::runtime::{Hook, Spec};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use serde_json::{Value, json};

use super::{bundle_path, hooks, state_path};
use crate::failure::{Context, FailureExt};

/// A FIFO in the bundle of a container with `startContainer` hooks. The first process writes an error text to it if it
/// cannot start, or closes it by executing the program.
const START_FIFO: &str = "starting";

/// The `startContainer` hooks, which the first process runs before its program, and the FIFO for their errors.
#[derive(Debug, Clone)]
pub(super) struct StartHooks {
    hooks: Vec<Hook>,
    /// The container's state without the pid (OCI runtime spec, "State").
    state: Value,
    fifo: Arc<OwnedFd>,
}

impl StartHooks {
    /// Creates the FIFO in `bundle`, from which [`start_with_hooks`] reads.
    pub(super) fn new(id: &str, bundle: &Path, spec: &Spec, hooks: Vec<Hook>) -> io::Result<Self> {
        let path = bundle.join(START_FIFO);
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
        // Opened for reading, too: opening a FIFO only for writing would wait for a reader.
        let fifo = rustix::fs::open(&path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let state = json!({
            "ociVersion": spec.version(),
            "id": id,
            "status": "created",
            "bundle": bundle,
            "annotations": spec.annotations().clone().unwrap_or_default(),
        });
        Ok(Self {
            hooks,
            state,
            fifo: Arc::new(fifo),
        })
    }

    /// The FIFO for errors, which the first process keeps open until it executes its program.
    pub(super) fn fifo(&self) -> BorrowedFd<'_> {
        self.fifo.as_fd()
    }

    /// Runs the hooks, up to the first that fails. The error is the text for the user.
    pub(super) fn run(&self) -> Result<(), String> {
        let mut state = self.state.clone();
        state["pid"] = json!(std::process::id());
        hooks::run("startContainer", &self.hooks, &state.to_string())
    }

    /// Reports an error to the job that starts the container.
    pub(super) fn report(&self, error: &str) {
        // The job may be gone. The process ends in any case.
        let _ = rustix::io::write(&*self.fifo, error.as_bytes());
    }
}

/// Whether a created container has `startContainer` hooks, so that it must be started with [`start_with_hooks`].
pub(crate) fn has_start_hooks(id: &str) -> bool {
    bundle_path(id).join(START_FIFO).exists()
}

/// Starts a created container that has `startContainer` hooks, and waits until its first process executes the
/// program or fails.
pub(crate) fn start_with_hooks(id: &str) -> Result<(), Failure> {
    // Opened before the process may write. With O_NONBLOCK this does not wait for a writer.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fifo = rustix::fs::open(bundle_path(id).join(START_FIFO), flags, Mode::empty())
        .context(|| format!("open the FIFO for the start of container {id}"))?;
    start(id).context(|| format!("start container {id}"))?;
    let mut error_text = Vec::new();
    let mut read_all = || -> std::io::Result<()> {
        loop {
            rustix::io::retry_on_intr(|| rustix::event::poll(&mut [PollFd::new(&fifo, PollFlags::IN)], None))?;
            let mut bytes = [0; 1024];
            match rustix::io::read(&fifo, &mut bytes) {
                Ok(0) => return Ok(()),
                Ok(read) => error_text.extend_from_slice(&bytes[..read]),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    };
    read_all().context(|| format!("wait for the start of container {id}"))?;
    match String::from_utf8_lossy(&error_text) {
        text if text.is_empty() => Ok(()),
        text => Err(Failure::internal(text)),
    }
}

/// Tells the first process of a created container to start its program, and does not wait until it has.
pub(crate) fn start(id: &str) -> io::Result<()> {
    send_start_message(&state_path(id))
}

/// Sends the start message to the socket in `state_directory` on which libcontainer's first process waits.
///
/// libcontainer's own function changes the current directory, because the path can be longer than the address of a
/// socket may be, and after a failure does not change it back. The path through a descriptor is always short.
fn send_start_message(state_directory: &Path) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(state_directory, flags, Mode::empty())?;
    let socket = Path::new("/proc/self/fd")
        .join(directory.as_raw_fd().to_string())
        .join(libcontainer::notify_socket::NOTIFY_FILE);
    // The process waits for the end of the stream and does not interpret the text.
    UnixStream::connect(socket)?.write_all(b"start container")
}

#[cfg(test)]
mod tests {
    use super::*;
    use libcontainer::notify_socket::{NOTIFY_FILE, NotifyListener};

    #[test]
    fn start_message_arrives_although_the_path_is_long() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("x".repeat(120));
        std::fs::create_dir(&state).unwrap();
        let listener = NotifyListener::new(&state.join(NOTIFY_FILE)).unwrap();
        send_start_message(&state).unwrap();
        listener.wait_for_container_start().unwrap();
    }

    #[test]
    fn failed_start_keeps_the_current_directory() {
        let state = tempfile::tempdir().unwrap();
        let before = std::env::current_dir().unwrap();
        let error = send_start_message(state.path()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(std::env::current_dir().unwrap(), before);
    }
}
