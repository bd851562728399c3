//! From the process that `start` spawned to the shim that serves: its own session and mount
//! namespace, the descriptors it was given, its log and configuration. All of it before there is a
//! second thread.

use std::{
    env, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::Path,
};

use nix::sched::{CloneFlags, unshare};
use rustix::{
    fs::{Mode, OFlags},
    mount::{MountPropagationFlags, mount_change},
    net::sockopt::socket_acceptconn,
    stdio::{dup2_stdin, dup2_stdout},
};

use crate::shim::{
    api::ServeContext,
    configuration::{Configuration, ConfigurationError},
    entry::arguments::{CONFIGURATION_VARIABLE, Serve, Target},
    logging,
};

/// Why the shim cannot serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    /// It was not started by `start`.
    #[error("standard input is not a listening socket: a shim is started with the action `start`")]
    NoListener,
    /// The configuration cannot be used.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// The operating system refuses.
    #[error("{doing}: {source}")]
    System {
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn system<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> DaemonError {
    move |source| DaemonError::System {
        doing,
        source: source.into(),
    }
}

/// Makes this process the shim of `target`.
pub(crate) fn become_shim(target: Target, serve: Serve) -> Result<ServeContext, DaemonError> {
    let bundle = env::current_dir().map_err(system("find the bundle"))?;
    let (listener, pid_file) = descriptors()?;
    logging::start(&bundle, target.debug);
    log_panics();
    let configuration = Configuration::load(env::var_os(CONFIGURATION_VARIABLE).as_deref().map(Path::new))?;
    if configuration.debug {
        logging::enable_debug();
    }
    detach()?;
    Ok(ServeContext {
        address: target.address,
        ttrpc_address: env::var("TTRPC_ADDRESS").ok().filter(|address| !address.is_empty()),
        publish_binary: target.publish_binary,
        listener,
        socket: serve.socket,
        pid_file,
        configuration,
        id: target.id,
        namespace: target.namespace,
    })
}

/// The listener from standard input and the locked pid file from standard output; no child inherits
/// them, and the standard streams lead nowhere.
fn descriptors() -> Result<(UnixListener, OwnedFd), DaemonError> {
    let stdin = io::stdin();
    if !socket_acceptconn(stdin.as_fd()).unwrap_or(false) {
        return Err(DaemonError::NoListener);
    }
    let keep = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map_err(system("keep a descriptor"));
    let listener = UnixListener::from(keep(stdin.as_fd())?);
    listener
        .set_nonblocking(true)
        .map_err(system("make the listener non-blocking"))?;
    let pid_file = keep(io::stdout().as_fd())?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(system("open /dev/null"))?;
    dup2_stdin(&null).map_err(system("redirect standard input"))?;
    dup2_stdout(&null).map_err(system("redirect standard output"))?;
    Ok((listener, pid_file))
}

/// Own session, so that no terminal's or process group's signal ends it; children of dead children
/// come here; and mounts of its own that end with it, while the host's still arrive. Its 3 MiB stay
/// that: khugepaged would round them up to whole pages of 2 MiB in each of a node's shims.
fn detach() -> Result<(), DaemonError> {
    // A kernel without huge pages refuses, and has none. Hooks and logging programs inherit it; vmm and fs undo it.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    // It fails only for the leader of a process group, which `start` does not make it.
    rustix::process::setsid().map_err(system("setsid"))?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).map_err(system("become a subreaper"))?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(system("unshare the mount namespace"))?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(system("make the mounts slaves of the host's"))
}

/// Nobody reads standard error.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| log::error!("{panic}")));
}
