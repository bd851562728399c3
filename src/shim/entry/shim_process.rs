//! The set-up of the shim process, which `start` has spawned: descriptors, log, configuration, session and mount
//! namespace. All of it happens before the process has a second thread.

use std::{
    env, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
};

use nix::sched::{CloneFlags, unshare};
use rustix::{
    fs::{Mode, OFlags},
    mount::{MountPropagationFlags, mount_change},
    net::sockopt::socket_acceptconn,
    stdio::{dup2_stdin, dup2_stdout},
};

use super::arguments::{CONFIGURATION_VARIABLE, Target};
use crate::shim::{
    api::ServeContext,
    configuration::{Configuration, ConfigurationError},
    descriptor_limit, logging,
};

/// A failure of the set-up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShimProcessError {
    /// `start` did not start this process.
    #[error("standard input is not a listening socket: a shim is started with the action `start`")]
    NoListener,
    /// The configuration cannot be used.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// A system call failed.
    #[error("cannot {action}: {source}")]
    System { action: &'static str, source: io::Error },
}

fn system_error<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> ShimProcessError {
    move |source| ShimProcessError::System {
        action,
        source: source.into(),
    }
}

/// Turns this process into the shim of `target`, which listens on `socket`.
pub(super) fn become_shim(target: Target, socket: PathBuf) -> Result<ServeContext, ShimProcessError> {
    let bundle = env::current_dir().map_err(system_error("find the bundle"))?;
    let (listener, pid_file) = take_descriptors()?;
    logging::start(&bundle, target.debug);
    log_panics();
    if let Err(error) = descriptor_limit::raise() {
        log::warn!("cannot raise the limit of open descriptors, so fewer containers fit: {error}");
    }
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
        socket,
        pid_file,
        configuration,
        id: target.id,
        namespace: target.namespace,
    })
}

/// Takes the listener from standard input and the locked pid file from standard output, which become `/dev/null`.
/// Children inherit neither.
fn take_descriptors() -> Result<(UnixListener, OwnedFd), ShimProcessError> {
    let stdin = io::stdin();
    if !socket_acceptconn(stdin.as_fd()).unwrap_or(false) {
        return Err(ShimProcessError::NoListener);
    }
    let keep =
        |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map_err(system_error("duplicate a descriptor"));
    let listener = UnixListener::from(keep(stdin.as_fd())?);
    listener
        .set_nonblocking(true)
        .map_err(system_error("make the listener non-blocking"))?;
    let pid_file = keep(io::stdout().as_fd())?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(system_error("open /dev/null"))?;
    dup2_stdin(&null).map_err(system_error("redirect standard input"))?;
    dup2_stdout(&null).map_err(system_error("redirect standard output"))?;
    Ok((listener, pid_file))
}

/// Separates this process from its caller:
///
/// - it gets no huge pages: khugepaged would round the 3 MiB of every shim on the node up to pages of 2 MiB;
/// - it gets a new session, so that signals of a terminal or process group do not end it;
/// - orphaned descendants become its children;
/// - it gets a new mount namespace, which ends with the shim and still receives the mounts of the host.
fn detach() -> Result<(), ShimProcessError> {
    // Fails on a kernel without huge pages, which needs no setting. Hooks and logging programs inherit the setting; vmm
    // and fs revert it.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    // Fails only for a process group leader. This process is not one, because `start` creates no group for it.
    rustix::process::setsid().map_err(system_error("start a session (setsid)"))?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(system_error("become a subreaper"))?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(system_error("unshare the mount namespace"))?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(system_error("make the mounts slaves of the host's"))
}

/// Logs panics, because standard error is `/dev/null`.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| log::error!("{panic}")));
}
