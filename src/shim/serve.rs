//! The daemon: serves containerd until the last container is gone.

use std::{fs, io, path::Path, process::ExitCode, time::Duration};

use containerd_shim_protos::ttrpc::{self, asynchronous::Server};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use super::{
    ServeContext,
    connection::{self, Written},
    events::{Containerd, EventQueue, Nowhere, Publisher},
    log,
    pod::ThisHost,
    service::services,
    stdio::{Streaming, Surroundings},
    tasks::Tasks,
};

/// How long containerd may take to take the last events, and the last reply, and to hang up then.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);
const REPLY_LIMIT: Duration = Duration::from_millis(500);
const CLOSE_LIMIT: Duration = Duration::from_millis(500);

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
pub(crate) fn run(context: ServeContext) -> ExitCode {
    let socket = context.socket.clone();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(8)
        .build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(serve(context)),
        Err(error) => Err(error.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error(&error.to_string());
            remove(&socket);
            ExitCode::FAILURE
        }
    }
}

async fn serve(context: ServeContext) -> Result<(), ServeError> {
    outlive_signals()?;
    let host = ThisHost::new(context.configuration.clone());
    let events = match (&context.ttrpc_address, context.publish_binary) {
        (Some(socket), _) => EventQueue::start(&context.namespace, Containerd::at(socket)),
        (None, Some(program)) => {
            let address = context.address;
            EventQueue::start(&context.namespace, Publisher { program, address })
        }
        (None, None) => EventQueue::start(&context.namespace, Nowhere),
    };
    let around = Surroundings {
        namespace: context.namespace,
        streaming: Streaming::default(),
    };
    let tasks = Tasks::new(context.configuration, host, events.clone(), around);
    let written = Written::none();
    let mut server = Server::new()
        .add_listener(connection::listener(context.listener, written.clone())?)
        .register_service(services(&tasks, &written));
    server.start().await?;

    log::debug(&format!("the shim of {} serves", context.id));

    tasks.stopped().await;
    // From here on a new shim may be started, and `delete` knows that this one ends by itself.
    remove(&context.socket);
    if tokio::time::timeout(REPLY_LIMIT, written.last()).await.is_err() {
        log::debug("nobody took the last reply");
    }
    tasks.end_all().await;
    events.flush(FLUSH_LIMIT).await;
    if tokio::time::timeout(CLOSE_LIMIT, written.taken()).await.is_err() {
        log::debug("who asked for the shutdown stays connected");
    }
    drop(context.pid_file);
    Ok(())
}

fn remove(socket: &Path) {
    if let Err(error) = fs::remove_file(socket) {
        log::warn(&format!("remove {}: {error}", socket.display()));
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
