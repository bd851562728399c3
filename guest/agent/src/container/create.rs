//! The job that creates a container. At its end the container's first process waits for the start request.

use std::fs;
use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nutshell_protocol::{CreateContainer, Failure};
use oci_spec::runtime::{Hooks, LinuxNamespace, LinuxNamespaceType, Spec};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use super::diagnosis::Diagnosis;
use super::executor::ProgramExecutor;
use super::start::StartHooks;
use super::{STATE_PATH, bundle_path, delete, hooks, rootfs, spec};
use crate::cgroup::{Cgroup, devices};
use crate::failure::{Context, FailureExt};
use crate::job::Outcome;
use crate::pod::Pod;
use crate::stdio::ProcessEnds;

/// The resources that a container shares with the other containers of its pod.
#[derive(Debug)]
pub(crate) struct PodContext<'a> {
    /// The pod, unless the machine runs a single container.
    pub(crate) pod: Option<&'a Pod>,
    /// The pid namespace that the container joins. `None` if the spec selects the namespace.
    pub(crate) pid_namespace: Option<BorrowedFd<'a>>,
}

impl PodContext<'_> {
    fn apply_to(&self, spec: &mut Spec) {
        if let Some(pod) = self.pod {
            pod.add_shared_mounts(spec);
        }
        if let (Some(pid_namespace), Some(linux)) = (self.pid_namespace, spec.linux_mut()) {
            // libcontainer opens this path in a process that has inherited the descriptor.
            let mut namespace = LinuxNamespace::default();
            namespace
                .set_typ(LinuxNamespaceType::Pid)
                .set_path(Some(format!("/proc/self/fd/{}", pid_namespace.as_raw_fd()).into()));
            let mut namespaces = linux.namespaces().clone().unwrap_or_default();
            namespaces.retain(|other| other.typ() != LinuxNamespaceType::Pid);
            namespaces.push(namespace);
            linux.set_namespaces(Some(namespaces));
        }
    }
}

/// Creates the container. If that fails, removes the parts that exist.
pub(crate) fn create(
    request: &CreateContainer,
    pod_context: &PodContext<'_>,
    stdio: &ProcessEnds,
) -> Result<(Outcome, Option<OwnedFd>), Failure> {
    let cgroup = Cgroup::of_container(&request.container);
    let mut spec = spec::parse(&request.spec)?;
    pod_context.apply_to(&mut spec);
    let prepared = spec::prepare(spec, &cgroup, request.stdio.terminal)?;
    let pod_member = pod_context.pod.map(|_| request.container.as_str());
    let result = build(request, stdio, prepared, &cgroup, pod_member);
    if result.is_err() {
        // The first error is the one to report.
        let _ = delete::remove_all(&request.container);
    }
    result
}

fn build(
    request: &CreateContainer,
    stdio: &ProcessEnds,
    mut prepared: spec::Prepared,
    cgroup: &Cgroup,
    pod_member: Option<&str>,
) -> Result<(Outcome, Option<OwnedFd>), Failure> {
    let id = &request.container;
    let bundle = bundle_path(id);
    let rootfs = bundle.join("rootfs");
    fs::create_dir_all(&rootfs).context(|| format!("create {}", rootfs.display()))?;
    fs::create_dir_all(STATE_PATH).context(|| format!("create {STATE_PATH}"))?;
    let mounts = prepared.spec.mounts().as_deref().unwrap_or_default();
    rootfs::mount(&request.rootfs, mounts, &rootfs, pod_member)?;
    if let Some(mounts) = prepared.spec.mounts_mut() {
        rootfs::adapt_mounts(&rootfs, mounts).context(|| "resolve the mount points of the OCI spec".to_owned())?;
    }
    let linux = prepared.spec.linux().clone().unwrap_or_default();
    let filled_mounts = match prepared.spec.mounts_mut() {
        Some(mounts) => rootfs::fill_mounts(&bundle, &rootfs, &linux, mounts)?,
        None => rootfs::FilledMounts::default(),
    };
    prepared.machine_settings.apply()?;
    rootfs::create_working_directory(&rootfs, &prepared.program.cwd)
        .context(|| format!("create the working directory {}", prepared.program.cwd.display()))?;
    stdio
        .set_owner(prepared.outer_uid)
        .context(|| "set the owner of the standard streams".to_owned())?;
    cgroup
        .create()
        .context(|| format!("create cgroup {}", cgroup.path().display()))?;
    // Children inherit the agent's score, which would exempt the container from the out-of-memory killer.
    fs::write("/proc/self/oom_score_adj", "0").context(|| "reset oom_score_adj".to_owned())?;

    let console = request.stdio.terminal.then(|| console_listener(&bundle)).transpose()?;
    let cwd = prepared.program.cwd.clone();
    let diagnosis = Diagnosis::listen().context(|| "open the pipe for error causes".to_owned())?;
    let hooks = prepared.hooks;
    if !hooks.create_container.is_empty() {
        let process = prepared.spec.process().as_ref();
        let capabilities = spec::complete_capabilities(process.and_then(|process| process.capabilities().clone()));
        let hook = hooks::agent_as_hook(&hooks.create_container, &rootfs, capabilities, &diagnosis.writer());
        let hook = hook.map_err(Failure::internal)?;
        let mut only = Hooks::default();
        only.set_create_container(Some(vec![hook]));
        prepared.spec.set_hooks(Some(only));
    }
    let start_hooks = (!hooks.start_container.is_empty())
        .then(|| StartHooks::new(id, &bundle, &prepared.spec, hooks.start_container))
        .transpose()
        .context(|| format!("create the FIFO for the start of container {id}"))?;
    // libcontainer reads the spec from this file.
    write_config(&bundle, &prepared.spec)?;
    let executor = ProgramExecutor::new(prepared.program, start_hooks, diagnosis.writer());
    let [stdin, stdout, stderr] = [0, 1, 2].map(|index| stdio.ends[index].try_clone());
    let failed = |error| Failure::internal(format!("duplicate the standard streams: {error}"));
    let built = ContainerBuilder::new(id.clone(), SyscallType::Linux)
        .with_executor(executor)
        .with_console_socket(console.is_some().then(|| bundle.join(CONSOLE_SOCKET)))
        .with_stdin(stdin.map_err(failed)?)
        .with_stdout(stdout.map_err(failed)?)
        .with_stderr(stderr.map_err(failed)?)
        .with_root_path(STATE_PATH)
        .and_then(|builder| {
            builder
                .as_init(&bundle)
                .with_systemd(false)
                .with_detach(true)
                // The agent becomes the parent of the process, and not this job.
                .as_sibling(true)
                .build()
        });
    drop(filled_mounts);
    let container = built.map_err(|error| Failure::internal(diagnosis.explain(&error, &cwd)))?;
    let pid = container
        .pid()
        .ok_or_else(|| Failure::internal("libcontainer created no process"))?;
    // Apply the rules only now: they must restrict the container's program, but not the mounts that libcontainer has
    // just made.
    devices::confine(cgroup, &prepared.devices).context(|| "apply the device rules".to_owned())?;
    let terminal = console.map(|listener| receive_terminal(&listener)).transpose()?;
    if let Some(terminal) = &terminal {
        crate::stdio::set_up_terminal(terminal, request.stdio.size, prepared.outer_uid)
            .context(|| "set up the terminal".to_owned())?;
    }
    let outcome = Outcome::Process {
        pid: pid.as_raw().unsigned_abs(),
    };
    Ok((outcome, terminal))
}

fn write_config(bundle: &Path, spec: &oci_spec::runtime::Spec) -> Result<(), Failure> {
    let path = bundle.join("config.json");
    let json = serde_json::to_vec(spec).context(|| "encode the OCI spec".to_owned())?;
    fs::File::create(&path)
        .and_then(|mut file| file.write_all(&json))
        .context(|| format!("write {}", path.display()))
}

/// The socket in the bundle through which libcontainer passes the master of the terminal.
const CONSOLE_SOCKET: &str = "console.sock";

fn console_listener(bundle: &Path) -> Result<UnixListener, Failure> {
    // A relative path, because the absolute one may be too long for the address of a socket.
    rustix::process::chdir(bundle).context(|| format!("change to {}", bundle.display()))?;
    let listener = UnixListener::bind(CONSOLE_SOCKET).context(|| format!("bind {CONSOLE_SOCKET}"));
    rustix::process::chdir("/").context(|| "change to /".to_owned())?;
    listener
}

/// Receives the master of the terminal, which libcontainer sent before `build` returned.
fn receive_terminal(listener: &UnixListener) -> Result<OwnedFd, Failure> {
    let receive = || {
        let (stream, _) = listener.accept()?;
        let mut name = [0; 256];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [IoSliceMut::new(&mut name)];
        rustix::net::recvmsg(&stream, &mut bytes, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        let terminal = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        Ok::<_, std::io::Error>(terminal)
    };
    receive()
        .context(|| "receive the terminal".to_owned())?
        .ok_or_else(|| Failure::internal("libcontainer sent no terminal"))
}
