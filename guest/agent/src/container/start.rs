//! The start of a created container: its first process runs the `startContainer` hooks, then its program.

use std::io;
use std::os::fd::OwnedFd;
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

/// The named pipe in the bundle through which the first process says why it cannot start, if it has
/// hooks to run. It ends without a word when the program is executed.
const START_PIPE: &str = "starting";

/// What a container's first process runs before its program, and where it says that one failed.
#[derive(Debug, Clone)]
pub(super) struct StartHooks {
    hooks: Vec<Hook>,
    /// OCI spec, "State", but for the pid.
    state: Value,
    words: Arc<OwnedFd>,
}

impl StartHooks {
    /// Makes the pipe in the `bundle` that the start will listen to.
    pub(super) fn new(id: &str, bundle: &Path, spec: &Spec, hooks: Vec<Hook>) -> io::Result<Self> {
        let pipe = bundle.join(START_PIPE);
        rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
        // For reading too, as nobody listens yet.
        let words = rustix::fs::open(&pipe, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
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
            words: Arc::new(words),
        })
    }

    pub(super) fn run(&self) -> Result<(), String> {
        let mut state = self.state.clone();
        state["pid"] = json!(std::process::id());
        hooks::run("startContainer", &self.hooks, &state.to_string())
    }

    pub(super) fn report(&self, words: &str) {
        // Nobody may be listening: the process ends all the same.
        let _ = rustix::io::write(&*self.words, words.as_bytes());
    }
}

/// Whether the start of a created container must be watched: it runs hooks first.
pub(crate) fn has_start_hooks(id: &str) -> bool {
    bundle_path(id).join(START_PIPE).exists()
}

/// Lets the first process of a created container run its hooks and its program, and hears whether
/// they do.
pub(crate) fn start_with_hooks(id: &str) -> Result<(), Failure> {
    // Before it may write. Without a writer this does not wait.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let words = rustix::fs::open(bundle_path(id).join(START_PIPE), flags, Mode::empty())
        .context(|| "open a pipe".to_owned())?;
    start(id).context(|| format!("start container {id}"))?;
    let mut reason = Vec::new();
    let mut hear = || -> std::io::Result<()> {
        loop {
            rustix::io::retry_on_intr(|| rustix::event::poll(&mut [PollFd::new(&words, PollFlags::IN)], None))?;
            let mut bytes = [0; 1024];
            match rustix::io::read(&words, &mut bytes) {
                Ok(0) => return Ok(()),
                Ok(read) => reason.extend_from_slice(&bytes[..read]),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    };
    hear().context(|| "hear of the process".to_owned())?;
    match String::from_utf8_lossy(&reason) {
        reason if reason.is_empty() => Ok(()),
        reason => Err(Failure::internal(reason)),
    }
}

/// Lets the first process of a created container run.
pub(crate) fn start(id: &str) -> std::io::Result<()> {
    let socket = state_path(id).join(libcontainer::notify_socket::NOTIFY_FILE);
    let mut notify = libcontainer::notify_socket::NotifySocket::new(socket);
    notify.notify_container_start().map_err(std::io::Error::other)
}
