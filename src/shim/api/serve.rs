//! The work of the shim process: it serves containerd until a shutdown is requested.

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
    connection::{self, LastReply},
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

/// How long the shim waits for containerd to accept the last events before it exits.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// How long the shim waits until the reply to Shutdown is written.
const REPLY_LIMIT: Duration = Duration::from_millis(500);

/// How long the shim waits until the client that received that reply closes its connection.
const CLOSE_LIMIT: Duration = Duration::from_millis(500);

/// The maximum number of calls that hang in file systems of the host at a time. Further ones are not started.
const MAX_BLOCKING_THREADS: usize = 128;

/// The inputs of [`serve`].
#[derive(Debug)]
pub(crate) struct ServeContext {
    /// The container or sandbox that the shim was started for. Others may join it.
    pub(crate) id: ContainerId,
    /// The containerd namespace of all containers of this shim.
    pub(crate) namespace: String,
    /// The path of containerd's gRPC socket.
    pub(crate) address: String,
    /// The path of containerd's ttrpc socket, to which events are forwarded.
    pub(crate) ttrpc_address: Option<String>,
    /// The path of containerd's executable, which publishes events if there is no ttrpc socket.
    pub(crate) publish_binary: Option<PathBuf>,
    /// The ttrpc socket, non-blocking.
    pub(crate) listener: UnixListener,
    /// The path of `listener`, to unlink when the shim exits.
    pub(crate) socket: PathBuf,
    /// Stays open until the shim exits: `delete` tests its lock to find out whether the shim is alive.
    pub(crate) pid_file: OwnedFd,
    pub(crate) configuration: Configuration,
}

/// A failure that ends the shim.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("cannot start the server for containerd: cannot {step}: {source}")]
    System { step: String, source: io::Error },
    #[error("cannot serve ttrpc: {0}")]
    Server(#[from] ttrpc::Error),
}

fn system_error(step: impl Into<String>) -> impl FnOnce(io::Error) -> ServeError {
    let step = step.into();
    |source| ServeError::System { step, source }
}

/// Serves until a shutdown is requested. Call it on the main thread: the kernel kills the shim's children when the
/// thread that started them exits (`PR_SET_PDEATHSIG`), and no other thread lives as long as the shim.
pub(crate) fn serve(context: ServeContext) -> ExitCode {
    let socket = context.socket.clone();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .build();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(serve_until_stopped(context));
            // Dropping it would wait for calls that hang in a file system.
            runtime.shutdown_background();
            result
        }
        Err(error) => Err(system_error("start the runtime for asynchronous calls")(error)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}");
            unlink_socket(&socket);
            ExitCode::FAILURE
        }
    }
}

async fn serve_until_stopped(context: ServeContext) -> Result<(), ServeError> {
    ignore_termination_signals().map_err(system_error("ignore termination signals"))?;
    let launcher = HostLauncher::new(context.configuration.clone());
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
    let tasks = Tasks::new(context.configuration, launcher, events.clone(), stdio);
    let last_reply = LastReply::new();
    let listener = connection::accept_own_user(context.listener, last_reply.clone());
    let listener = listener.map_err(system_error(format!("listen at {}", context.socket.display())))?;
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(services(&tasks, &last_reply));
    server.start().await?;

    log::debug!("the shim of {} is serving", context.id);

    tasks.stopped().await;
    // Without the socket, `start` starts a new shim, and `delete` gives this one time to exit.
    unlink_socket(&context.socket);
    if tokio::time::timeout(REPLY_LIMIT, last_reply.written()).await.is_err() {
        log::debug!("the reply to the shutdown could not be written");
    }
    tasks.end_all().await;
    events.flush(FLUSH_LIMIT).await;
    if tokio::time::timeout(CLOSE_LIMIT, last_reply.closed()).await.is_err() {
        log::debug!("the client that requested the shutdown is still connected");
    }
    drop(context.pid_file);
    Ok(())
}

fn unlink_socket(socket: &Path) {
    if let Err(error) = fs::remove_file(socket) {
        log::warn!("cannot remove the socket {}: {error}", socket.display());
    }
}

/// Ignores signals that would terminate the shim, as containerd's own shims do, because the containers would end with
/// the shim. Sets a handler instead of `SIG_IGN`, which executed children would inherit.
fn ignore_termination_signals() -> io::Result<()> {
    extern "C" fn ignore(_: libc::c_int) {}
    let action = SigAction::new(SigHandler::Handler(ignore), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1] {
        // SAFETY: the handler does nothing, so it may run at any point of any code.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}
