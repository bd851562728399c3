//! The daemon: serves containerd until the last container is gone.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use containerd_shim::protos::ttrpc::{self, asynchronous::Server};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use super::{
    connection::{self, Written},
    services::services,
};
use crate::oci::ContainerId;
use crate::shim::{
    configuration::Configuration,
    events::{BinaryForwarder, EventQueue, NoForwarder, TtrpcForwarder},
    pod::HostLauncher,
    stdio::{StdioContext, StreamRegistry},
    tasks::Tasks,
};

/// How long containerd may take to take the last events, and the last reply, and to hang up then.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);
const REPLY_LIMIT: Duration = Duration::from_millis(500);
const CLOSE_LIMIT: Duration = Duration::from_millis(500);

/// What the daemon is started with.
#[derive(Debug)]
pub(crate) struct ServeContext {
    /// The container, or sandbox, that the shim was started for. Others may join it.
    pub(crate) id: ContainerId,
    /// containerd's namespace of all containers of this shim.
    pub(crate) namespace: String,
    /// The path of containerd's gRPC socket.
    pub(crate) address: String,
    /// The path of containerd's ttrpc socket, to which events are forwarded.
    pub(crate) ttrpc_address: Option<String>,
    /// containerd's executable: publishes events where there is no ttrpc socket.
    pub(crate) publish_binary: Option<PathBuf>,
    /// Bound, listening, non-blocking.
    pub(crate) listener: UnixListener,
    /// The listener's path, to unlink when the shim ends.
    pub(crate) socket: PathBuf,
    /// Open and locked for the shim's life: proves to `delete` that it is alive.
    pub(crate) pid_file: OwnedFd,
    /// The host's configuration.
    pub(crate) configuration: Configuration,
}

/// Why the daemon cannot serve.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("prepare to serve: {0}")]
    System(#[from] io::Error),
    #[error("serve ttrpc: {0}")]
    Server(#[from] ttrpc::Error),
}

/// Serves until containerd shuts the shim down. To be called on the main thread, which is the only
/// one of the daemon that stays: its children are bound to it.
pub(crate) fn serve(context: ServeContext) -> ExitCode {
    let socket = context.socket.clone();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(8)
        .build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(serve_until_stopped(context)),
        Err(error) => Err(error.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}");
            remove(&socket);
            ExitCode::FAILURE
        }
    }
}

async fn serve_until_stopped(context: ServeContext) -> Result<(), ServeError> {
    outlive_signals()?;
    let host = HostLauncher::new(context.configuration.clone());
    let events = match (&context.ttrpc_address, context.publish_binary) {
        (Some(socket), _) => EventQueue::start(&context.namespace, TtrpcForwarder::new(socket)),
        (None, Some(program)) => {
            let address = context.address;
            EventQueue::start(&context.namespace, BinaryForwarder { program, address })
        }
        (None, None) => EventQueue::start(&context.namespace, NoForwarder),
    };
    let stdio = StdioContext {
        namespace: context.namespace,
        streaming: StreamRegistry::default(),
    };
    let tasks = Tasks::new(context.configuration, host, events.clone(), stdio);
    let written = Written::none();
    let mut server = Server::new()
        .add_listener(connection::listener(context.listener, written.clone())?)
        .register_service(services(&tasks, &written));
    server.start().await?;

    log::debug!("the shim of {} serves", context.id);

    tasks.stopped().await;
    // From here on a new shim may be started, and `delete` knows that this one ends by itself.
    remove(&context.socket);
    if tokio::time::timeout(REPLY_LIMIT, written.last()).await.is_err() {
        log::debug!("nobody took the last reply");
    }
    tasks.end_all().await;
    events.flush(FLUSH_LIMIT).await;
    if tokio::time::timeout(CLOSE_LIMIT, written.taken()).await.is_err() {
        log::debug!("who asked for the shutdown stays connected");
    }
    drop(context.pid_file);
    Ok(())
}

fn remove(socket: &Path) {
    if let Err(error) = fs::remove_file(socket) {
        log::warn!("remove {}: {error}", socket.display());
    }
}

/// As containerd's own shims: told to end by a signal, a shim goes on, because its containers would
/// end with it. Children that are executed do not inherit a handler.
fn outlive_signals() -> io::Result<()> {
    extern "C" fn ignore(_: libc::c_int) {}
    let action = SigAction::new(SigHandler::Handler(ignore), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1] {
        // SAFETY: the handler does nothing, so it may run at any point of any code.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}
