//! `start`: finds or starts the shim of a container's group, and prints its address.
//!
//! containerd waits for it when it creates a container, so it is a plain process without threads: it reads the bundle,
//! binds one socket and spawns one process. The shim gets the listening socket as its standard input and the
//! locked pid file as its standard output. Clients can connect as soon as the address is printed.

use std::{
    env, fs,
    io::{self, Write},
    os::unix::process::parent_id,
    path::Path,
    process::{Command, Stdio},
};

use rustix::thread::{CoreSchedulingScope, create_core_scheduling_cookie};

use super::{
    arguments::{CONFIGURATION_VARIABLE, Target},
    configuration_source::{ConfigurationSourceError, select_configuration},
    group::Group,
    options::Options,
    socket::{self, Acquired, SocketError},
    start_request::{StartRequest, StartRequestError},
};
use crate::oci::{self, PlanError};
use crate::shim::record::{PidFile, RecordError};

const OOM_SCORE_ADJ_MAX: i32 = 1000;

/// A failure to start the shim. Its text is one line, which containerd shows to its user.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootstrapError {
    /// containerd's request cannot be read.
    #[error(transparent)]
    Request(#[from] StartRequestError),
    /// The configuration cannot be used.
    #[error(transparent)]
    Configuration(#[from] ConfigurationSourceError),
    /// The bundle's spec cannot be read.
    #[error(transparent)]
    Spec(#[from] PlanError),
    /// The socket cannot be created.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The pid file cannot be created or locked.
    #[error("{0}: another shim may hold its lock")]
    PidFile(#[from] RecordError),
    /// A system call failed.
    #[error("cannot {action}: {source}")]
    System {
        /// The operation and its object.
        action: String,
        /// The error of the operating system.
        source: io::Error,
    },
}

fn system_error(action: impl Into<String>) -> impl FnOnce(io::Error) -> BootstrapError {
    let action = action.into();
    |source| BootstrapError::System { action, source }
}

/// Starts the shim of `target`, whose bundle is the current directory.
pub(crate) fn start(target: &Target) -> Result<(), BootstrapError> {
    let bundle = env::current_dir().map_err(system_error("find the bundle"))?;
    let request = StartRequest::read(target)?;
    let configuration = select_configuration(&request.options, &bundle)?;
    let group =
        Group::from_annotations(&oci::read_annotations(&bundle)?).map_or(target.id.to_string(), Group::into_key);
    let socket = socket::path(
        request.socket_directory.as_deref(),
        &target.address,
        &target.namespace,
        &group,
    );
    let address = format!("unix://{}", socket.display());
    let mut new_shim = None;
    if let Acquired::New(listener) = socket::acquire(&socket)? {
        let started = prepare_process(&request.options).and_then(|()| {
            let pid_file = PidFile::create(&bundle)?;
            let mut shim = shim_command(target, &request, &socket, configuration.as_deref())?;
            shim.stdin(Stdio::from(listener));
            shim.stdout(Stdio::from(
                pid_file.share().map_err(system_error("share the pid file"))?,
            ));
            let mut shim = shim.spawn().map_err(system_error("start the shim"))?;
            pid_file.write(shim.id()).map_err(|error| {
                // Without its pid, `delete` could not end the shim. Neither call fails for a child that is not reaped.
                let _ = shim.kill();
                let _ = shim.wait();
                system_error("write the pid file")(error)
            })?;
            Ok(shim)
        });
        match started {
            Ok(shim) => new_shim = Some(shim),
            Err(error) => {
                // This process has closed its listener by now. The error of the start is the one to report.
                let _ = socket::remove_stale(&socket);
                return Err(error);
            }
        }
    }
    announce(&bundle, &address, &request).inspect_err(|_| {
        // containerd does not learn the address of a shim whose start has failed, so nothing else would end it.
        if let Some(mut shim) = new_shim {
            let _ = shim.kill();
            let _ = shim.wait();
            let _ = socket::remove_stale(&socket);
        }
    })
}

/// Tells containerd the address of the shim.
fn announce(bundle: &Path, address: &str, request: &StartRequest) -> Result<(), BootstrapError> {
    fs::write(bundle.join("address"), address).map_err(system_error("write the address into the bundle"))?;
    let answer = serde_json::json!({"version": request.answer_version(), "address": address, "protocol": "ttrpc"});
    io::stdout()
        .write_all(answer.to_string().as_bytes())
        .map_err(system_error("print the address"))
}

/// Sets the attributes that the shim inherits from this process: core scheduling, cgroup and OOM score.
fn prepare_process(options: &Options) -> Result<(), BootstrapError> {
    if env::var_os("SCHED_CORE").is_some_and(|value| !value.is_empty()) {
        create_core_scheduling_cookie(rustix::process::getpid(), CoreSchedulingScope::ProcessGroup)
            .map_err(|error| system_error("create a core scheduling cookie (SCHED_CORE)")(error.into()))?;
    }
    if let Some(cgroup) = &options.shim_cgroup {
        let processes = Path::new("/sys/fs/cgroup")
            .join(cgroup.trim_start_matches('/'))
            .join("cgroup.procs");
        fs::write(&processes, "0").map_err(system_error(format!("join shim_cgroup: write {}", processes.display())))?;
    }
    let parent = format!("/proc/{}/oom_score_adj", parent_id());
    let score = fs::read_to_string(&parent).map_err(system_error(format!("read {parent}")))?;
    // The kernel prints a number from -1000 to 1000 there (proc_pid_oom_score_adj(5)). The shim's is one higher than
    // containerd's, so that the kernel kills a shim before containerd.
    let score = score.trim().parse().unwrap_or(0).min(OOM_SCORE_ADJ_MAX - 1) + 1;
    let own = "/proc/self/oom_score_adj";
    fs::write(own, score.to_string()).map_err(system_error(format!("write {own}")))
}

/// The command that runs the shim.
fn shim_command(
    target: &Target,
    request: &StartRequest,
    socket: &Path,
    configuration: Option<&Path>,
) -> Result<Command, BootstrapError> {
    let mut shim = Command::new(env::current_exe().map_err(system_error("find this executable"))?);
    // Otherwise glibc would make a heap for each thread that waits for a file system, and keep it (mallopt(3)).
    shim.env("MALLOC_ARENA_MAX", "1");
    shim.args([
        "-namespace",
        &target.namespace,
        "-id",
        target.id.as_str(),
        "-address",
        &target.address,
    ]);
    if let Some(publish_binary) = &target.publish_binary {
        shim.arg("-publish-binary").arg(publish_binary);
    }
    if target.debug || request.debug {
        shim.arg("-debug");
    }
    shim.arg("-socket").arg(socket);
    match configuration {
        Some(configuration) => shim.env(CONFIGURATION_VARIABLE, configuration),
        None => shim.env_remove(CONFIGURATION_VARIABLE),
    };
    if let Some(address) = &request.ttrpc_address {
        shim.env("TTRPC_ADDRESS", address);
    }
    shim.stderr(Stdio::null());
    Ok(shim)
}
