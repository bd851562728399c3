//! Create: a container up to, not including, its first instruction.

use std::{path::PathBuf, sync::Arc, time::SystemTime};

use containerd_shim_protos::{
    events::task::{TaskCreate, TaskIO},
    protobuf::MessageField,
    types::mount::Mount,
};
use nutshell_protocol::{CreateContainer, PidNamespace, Request, Rootfs, Stdio};
use parking_lot::Mutex;

use super::{CREATE_LIMIT, Container, Role, SandboxApi, Tasks, ask, gone};
use crate::{
    oci::{
        self, BundlePlan, ContainerId, Hooks, HostMount, Limits, Network, Placement, Plan, PlanError, Root, SourceKind,
    },
    shim::{
        error::{Kind, TaskError},
        pod::{NetworkNamespace, PidHolder, Pod, PodError, PodRequirements, open_network_namespace},
        record::Record,
        stdio,
        tasks::hooks,
        tasks::lifecycle::Phase,
        tasks::process::Process,
    },
};

/// What runc's shim says first when a container cannot be created; users search for it.
pub(super) const CONTEXT: &str = "OCI runtime create failed";

/// A container to create.
#[derive(Debug)]
pub(crate) struct CreateRequest {
    /// Its id.
    pub(crate) id: ContainerId,
    /// Its folder.
    pub(crate) bundle: PathBuf,
    /// The mounts of its snapshot.
    pub(crate) rootfs: Vec<HostMount>,
    /// Its standard streams.
    pub(crate) stdio: stdio::StdioSpec,
}

/// An id that no other container can have, until this is dropped.
pub(super) struct Reservation<'a> {
    tasks: &'a Arc<Tasks>,
    id: &'a ContainerId,
    /// It is a container's now.
    pub(super) kept: bool,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if !self.kept {
            let entered = {
                let mut table = self.tasks.table();
                table.taken.remove(self.id);
                table.containers.remove(self.id)
            };
            if let Some(container) = entered {
                container.init.lifecycle.abandoned();
                container.init.release();
                self.tasks.fit_without(&container);
            }
        }
    }
}

impl Tasks {
    /// Creates a container and returns its pid. A failure leaves nothing.
    pub(crate) async fn create(self: &Arc<Self>, request: CreateRequest) -> Result<u32, TaskError> {
        let mut reservation = self.reserve(&request.id)?;
        log::debug!("task {}: create", request.id);
        let container = match self.plan(&request)? {
            BundlePlan::Sandbox(plan) => self.sandbox(&request, *plan, SandboxApi::Task).await?,
            BundlePlan::Container(plan) => {
                for warning in &plan.warnings {
                    log::warn!("task {}: {warning}", request.id);
                }
                match plan.placement.clone() {
                    Placement::Single => self.single(&request, *plan).await?,
                    Placement::Member { sandbox } => self.member(&request, *plan, &sandbox).await?,
                }
            }
        };
        self.follow_holder(&container, &container.init);
        self.events.publish(&event(&request, container.init.pid()));
        container.init.lifecycle.created();
        log::debug!("task {}: created", request.id);
        reservation.kept = true;
        Ok(container.init.pid())
    }

    pub(super) fn reserve<'a>(self: &'a Arc<Self>, id: &'a ContainerId) -> Result<Reservation<'a>, TaskError> {
        if *self.stopping.borrow() {
            return Err(TaskError::new(Kind::Unavailable, "the shim is shutting down"));
        }
        if !self.table().taken.insert(id.clone()) {
            return Err(TaskError::new(Kind::AlreadyExists, format!("task {id} already exists")));
        }
        Ok(Reservation {
            tasks: self,
            id,
            kept: false,
        })
    }

    fn plan(&self, request: &CreateRequest) -> Result<BundlePlan, TaskError> {
        oci::plan_bundle(
            &request.bundle,
            &request.id,
            &request.rootfs,
            &self.configuration.sizing,
            self.configuration.host_namespaces,
            &SourceKind::inspect,
        )
        .map_err(|error| unplanned(&error).during(CONTEXT))
    }

    async fn single(self: &Arc<Self>, request: &CreateRequest, plan: Plan) -> Result<Arc<Container>, TaskError> {
        let requirements = PodRequirements::for_container(&plan).map_err(|error| failed(error.into()))?;
        let pod = self.start_pod(request, requirements).await.map_err(failed)?;
        match self.populate(request, plan, PidNamespace::Specified, &pod).await {
            Ok(container) => Ok(container),
            Err(error) => {
                pod.end().await;
                Err(error.during(CONTEXT))
            }
        }
    }

    async fn member(
        self: &Arc<Self>,
        request: &CreateRequest,
        plan: Plan,
        sandbox: &str,
    ) -> Result<Arc<Container>, TaskError> {
        let pod = self.pod_of(sandbox).map_err(|error| error.during(CONTEXT))?;
        let pids = self
            .pid_namespace(&pod, plan.pid_namespace)
            .map_err(|error| error.during(CONTEXT))?;
        match self.populate(request, plan, pids, &pod).await {
            Ok(container) => Ok(container),
            Err(error) => {
                pod.detach(&request.id).await;
                Err(error.during(CONTEXT))
            }
        }
    }

    pub(super) async fn start_pod(
        self: &Arc<Self>,
        request: &CreateRequest,
        requirements: PodRequirements,
    ) -> Result<Arc<Pod>, PodError> {
        let record = Record {
            cgroups: requirements.cgroup_paths(),
            ..Record::default()
        };
        if let Err(error) = record.store(&request.bundle) {
            log::warn!("task {}: {error}", request.id);
        }
        let tasks = Arc::downgrade(self);
        let pod = Pod::start(self.launcher.as_ref(), requirements, move |pod, event| {
            if let Some(tasks) = tasks.upgrade() {
                tasks.on_event(pod, event);
            }
        })
        .await?;
        log::debug!("task {}: virtual machine {} boots", request.id, pod.machine().pid());
        self.follow_machine(&pod);
        Ok(pod)
    }

    /// The pod that a container can be created in.
    fn pod_of(&self, sandbox: &str) -> Result<Arc<Pod>, TaskError> {
        let precondition = |text| TaskError::new(Kind::FailedPrecondition, text);
        let container = self
            .created(sandbox)
            .ok_or_else(|| precondition(format!("sandbox {sandbox} is not in this shim")))?;
        if !container.is_sandbox() {
            return Err(precondition(format!("task {sandbox} is not a sandbox")));
        }
        match container.init.lifecycle.phase() {
            Phase::Creating | Phase::Created | Phase::Starting | Phase::Running | Phase::Paused => {
                Ok(container.pod.clone())
            }
            phase => Err(precondition(format!("sandbox {sandbox} is {}", phase.name()))),
        }
    }

    /// Whose processes a container of `pod` shares: the spec has the host's pid of a task.
    fn pid_namespace(&self, pod: &Pod, asked: oci::PidNamespace) -> Result<PidNamespace, TaskError> {
        let pid = match asked {
            oci::PidNamespace::Specified => return Ok(PidNamespace::Specified),
            oci::PidNamespace::Pod => return Ok(PidNamespace::Pod),
            oci::PidNamespace::Task(pid) => pid,
        };
        let members = self.members(pod.number());
        match members.iter().find(|member| member.init.pid() == pid) {
            Some(sandbox) if sandbox.is_sandbox() => Ok(PidNamespace::Pod),
            Some(target) if target.init.lifecycle.phase().exit().is_none() => {
                Ok(PidNamespace::Container(target.id.to_string()))
            }
            Some(target) => {
                let text = format!("linux.namespaces: pid: container {} has ended", target.id);
                Err(TaskError::new(Kind::FailedPrecondition, text))
            }
            None => {
                let text = format!("linux.namespaces: pid: no container of this pod has pid {pid}");
                Err(TaskError::new(Kind::InvalidArgument, text))
            }
        }
    }

    /// Creates a container in a machine that may be booting still.
    async fn populate(
        self: &Arc<Self>,
        request: &CreateRequest,
        plan: Plan,
        pids: PidNamespace,
        pod: &Arc<Pod>,
    ) -> Result<Arc<Container>, TaskError> {
        let writes_disk = matches!(plan.root, Root::Disk { read_only: false, .. });
        let role = match plan.placement {
            Placement::Single => Role::Alone { writes_disk },
            Placement::Member { .. } => Role::Member { writes_disk },
        };
        let container = self.enter(request, role, pod, plan.hooks, plan.limits);
        let (root, shares) = (plan.root, plan.shares);
        // All of this while the guest boots; both to their end, so that nothing is still under way
        // when a failure is cleaned up.
        let (rootfs, streams) = tokio::join!(
            pod.attach(&request.id, &request.bundle, root, shares),
            prepare(&container, &plan.network, plan.console_size, &self.stdio),
        );
        let created = async {
            log::debug!("task {}: files and streams are in place", request.id);
            let rootfs = rootfs.map_err(|error| TaskError::unknown(error.to_string()))?;
            let stdio = streams?;
            let ready = pod.machine().ready(self.configuration.ready_timeout).await;
            let ready = ready.map_err(|ending| TaskError::unknown(ending.to_string()))?;
            log::debug!(
                "task {}: agent {} on Linux {} is ready",
                request.id,
                ready.version,
                ready.kernel
            );
            self.set_up(pod).await?;
            // Limits are no promise: a machine that cannot grow runs what fits.
            if let Err(error) = self.fit(pod).await {
                log::warn!("task {}: {error}", request.id);
            }
            create_in_guest(request, plan.spec, pids, rootfs, stdio, pod).await
        };
        match created.await {
            Ok(guest_pid) => {
                container.init.set_guest_pid(guest_pid);
                Ok(container)
            }
            Err(error) => {
                container.init.close_streams(pod.machine()).await;
                container.init.release();
                Err(error)
            }
        }
    }

    /// Enters the container into the table, where events about it find it.
    pub(super) fn enter(
        &self,
        request: &CreateRequest,
        role: Role,
        pod: &Arc<Pod>,
        hooks: Hooks,
        limits: Limits,
    ) -> Arc<Container> {
        let container = Arc::new(Container {
            id: request.id.clone(),
            bundle: request.bundle.clone(),
            role,
            created_at: SystemTime::now(),
            pod: pod.clone(),
            init: Arc::new(Process::init(request.stdio.clone())),
            execs: Mutex::default(),
            hooks,
            limits: Mutex::new(limits),
            updating: tokio::sync::Mutex::default(),
        });
        self.table().containers.insert(request.id.clone(), container.clone());
        container
    }
}

/// Opens what the container has on the host and hands its streams to the machine.
async fn prepare(
    container: &Container,
    network: &Network,
    size: Option<(u16, u16)>,
    context: &stdio::StdioContext,
) -> Result<Stdio, TaskError> {
    let init = &container.init;
    let opened = init
        .request
        .open(container.id.as_str(), context)
        .await
        .map_err(|error| TaskError::unknown(error.to_string()))?;
    hold(container, network)?;
    let (streams, stdio) = match opened.connect(container.pod.machine(), size).await {
        Ok(connected) => connected,
        Err(error) => return Err(gone(&container.pod, &error).await),
    };
    init.set_streams(streams);
    run_hooks(container).await?;
    Ok(stdio)
}

/// Those that set up what the pid on the host stands for, mostly its network.
pub(super) async fn run_hooks(container: &Container) -> Result<(), TaskError> {
    let Hooks {
        prestart,
        create_runtime,
        ..
    } = &container.hooks;
    for (moment, hooks) in [("prestart", prestart), ("createRuntime", create_runtime)] {
        hooks::run(moment, hooks, "creating", container.subject())
            .await
            .map_err(|error| TaskError::unknown(error.to_string()))?;
    }
    Ok(())
}

async fn create_in_guest(
    request: &CreateRequest,
    spec: Vec<u8>,
    pid_namespace: PidNamespace,
    rootfs: Rootfs,
    stdio: Stdio,
    pod: &Pod,
) -> Result<u32, TaskError> {
    let create = Request::CreateContainer(CreateContainer {
        container: request.id.to_string(),
        spec,
        rootfs,
        pid_namespace,
        stdio,
    });
    ask(pod, CREATE_LIMIT, pod.machine().agent().create(create))
        .await
        .map_err(|error| {
            // "Not found" would be read as "the task is gone".
            let kind = match error.kind() {
                Kind::InvalidArgument => Kind::InvalidArgument,
                _ => Kind::Unknown,
            };
            TaskError::new(kind, error.to_string()).during("unable to start container process")
        })
}

/// Gives a container its pid on the host, in the network namespace that the spec asks for. Clients
/// also find the pod's control group by it.
pub(super) fn hold(container: &Container, network: &Network) -> Result<(), TaskError> {
    let holder = PidHolder::spawn(&namespace(network)?)
        .map_err(|error| TaskError::unknown(format!("make a pid for the container: {error}")))?;
    container.pod.add_process(holder.pid());
    container.init.hold(Arc::new(holder));
    Ok(())
}

fn namespace(network: &Network) -> Result<NetworkNamespace, TaskError> {
    const HOST: &str = "linux.namespaces: a virtual machine cannot share the network of its host: \
        give the container a network namespace";
    match network {
        Network::Host => Err(TaskError::new(Kind::InvalidArgument, HOST)),
        Network::Loopback => Ok(NetworkNamespace::New),
        Network::Namespace(path) => match open_network_namespace(path) {
            Ok(namespace) => Ok(NetworkNamespace::Join(namespace)),
            Err(error) => {
                let text = format!("open the network namespace {}: {error}", path.display());
                Err(TaskError::unknown(text))
            }
        },
    }
}

pub(super) fn failed(error: PodError) -> TaskError {
    TaskError::unknown(error.to_string()).during(CONTEXT)
}

/// Why there is no plan, as containerd's clients tell errors apart.
pub(super) fn unplanned(error: &PlanError) -> TaskError {
    let kind = match error {
        PlanError::Missing(_) | PlanError::Invalid { .. } | PlanError::Unsupported { .. } => Kind::InvalidArgument,
        _ => Kind::Unknown,
    };
    TaskError::new(kind, error.to_string())
}

fn event(request: &CreateRequest, pid: u32) -> TaskCreate {
    let mount = |mount: &HostMount| Mount {
        type_: mount.kind.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
        ..Mount::default()
    };
    TaskCreate {
        container_id: request.id.to_string(),
        bundle: request.bundle.display().to_string(),
        rootfs: request.rootfs.iter().map(mount).collect(),
        io: MessageField::some(TaskIO {
            stdin: request.stdio.stdin.clone(),
            stdout: request.stdio.stdout.clone(),
            stderr: request.stdio.stderr.clone(),
            terminal: request.stdio.terminal,
            ..TaskIO::default()
        }),
        pid,
        ..TaskCreate::default()
    }
}
