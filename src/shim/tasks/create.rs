//! Create: everything up to the first instruction of a container, which waits for Start.

use std::{path::PathBuf, sync::Arc, time::Duration};

use containerd_shim::protos::{
    events::task::{TaskCreate, TaskIO},
    protobuf::MessageField,
    types::mount::Mount,
};
use nutshell_protocol::{CreateContainer, PidNamespace, Request, Rootfs, Stdio};

use super::{
    agent_call::{call_agent, machine_ended},
    container::{Container, Role, SandboxApi, lifecycle::Phase},
    delete::remove_from_guest,
    limits::CREATE_LIMIT,
    steps::host::{CREATE_CONTEXT, admit, assign_host_pid, create_error, plan_error, run_create_hooks, vm_error},
    table::Tasks,
};
use crate::{
    oci::{
        self, BundlePlan, BundleSpec, ContainerId, HostInspector, HostMount, Network, Placement, Plan, Root, VmPlan,
    },
    shim::{
        blocking,
        error::{ErrorCode, TaskError},
        machine::describe_request,
        pod::{Creation, DiskContents, Pod, PodRequirements},
        stdio::{StdioContext, StdioSpec},
        vm::{ImageRoot, KernelCache, VmFiles},
    },
};

/// The plan of a task: of a container or sandbox, or of a virtual machine with its opened files.
#[derive(Debug)]
enum TaskPlan {
    Bundle(BundlePlan),
    VirtualMachine(Box<VmPlan>, Box<VmFiles>),
}

/// A container to create.
#[derive(Debug)]
pub(crate) struct CreateRequest {
    pub(crate) id: ContainerId,
    /// When the request came, on the clock of [`monotonic_now`](crate::control::monotonic_now).
    pub(crate) requested_at: Duration,
    /// The bundle's folder, an absolute path.
    pub(crate) bundle: PathBuf,
    /// The mounts of its snapshot.
    pub(crate) rootfs: Vec<HostMount>,
    /// Its standard streams.
    pub(crate) stdio: StdioSpec,
}

impl Tasks {
    /// Creates a container or a sandbox that is a task, and returns its pid. Leaves nothing behind after an error.
    pub(crate) async fn create(self: &Arc<Self>, request: CreateRequest) -> Result<u32, TaskError> {
        let reservation = self.reserve(&request.id)?;
        log::debug!("task {}: create", request.id);
        let created = self.create_reserved(&request).await;
        let pid = created.inspect_err(|_| request.stdio.close_unused(self.streaming()))?;
        log::debug!("task {}: created", request.id);
        reservation.keep();
        Ok(pid)
    }

    async fn create_reserved(self: &Arc<Self>, request: &CreateRequest) -> Result<u32, TaskError> {
        let container = match self.plan(request).await? {
            TaskPlan::VirtualMachine(plan, files) => self.create_virtual_machine(request, *plan, *files).await?,
            TaskPlan::Bundle(BundlePlan::Sandbox(plan)) => {
                let stdio = request.stdio.clone();
                let (id, requested_at) = (&request.id, request.requested_at);
                self.build_sandbox(id, requested_at, &request.bundle, stdio, *plan, SandboxApi::Task)
                    .await?
            }
            TaskPlan::Bundle(BundlePlan::Container(plan)) => {
                for warning in &plan.warnings {
                    log::warn!("task {}: {warning}", request.id);
                }
                match plan.placement.clone() {
                    Placement::Single => self.create_single(request, *plan).await?,
                    Placement::Member { sandbox } => self.create_member(request, *plan, &sandbox).await?,
                }
            }
        };
        self.watch_pid_holder(&container, &container.init);
        self.events
            .publish(request.id.as_ref(), create_event(request, container.init.pid()));
        container.note_created();
        container.init.lifecycle.mark_created();
        Ok(container.init.pid())
    }

    /// Translates the bundle. Inspects the sources of its mounts, and the image of a virtual machine, whose file
    /// systems may hang.
    async fn plan(&self, request: &CreateRequest) -> Result<TaskPlan, TaskError> {
        let (bundle, id, rootfs) = (request.bundle.clone(), request.id.clone(), request.rootfs.clone());
        let (sizing, host_namespaces) = (self.configuration.sizing, self.configuration.host_namespaces);
        let policy = self.configuration.virtual_machines;
        let cache = KernelCache::of_host(self.configuration.kernel_cache_bytes);
        let plan = blocking::run("inspect the sources of the container's mounts", move || {
            let spec = BundleSpec::read(&bundle).map_err(|error| plan_error(&error))?;
            let inspect = HostInspector::default();
            let image = spec
                .virtual_machine_image(&rootfs)
                .map_err(|error| plan_error(&error))?;
            if let Some(image) = image {
                let root = ImageRoot::mount(&image, &bundle.join("rootfs")).map_err(|error| vm_error(&error))?;
                let disk = root.open_disk().map_err(|error| vm_error(&error))?;
                if disk.is_some() || spec.has_boot_annotation().map_err(|error| plan_error(&error))? {
                    let plan = spec
                        .plan_virtual_machine(policy, &sizing, &inspect)
                        .map_err(|error| plan_error(&error))?;
                    let entry = cache.as_ref().zip(disk.as_ref());
                    let entry = entry.and_then(|(cache, disk)| cache.entry(&image, disk));
                    let files = VmFiles::open(&plan, &root, disk, entry).map_err(|error| vm_error(&error))?;
                    return Ok(TaskPlan::VirtualMachine(Box::new(plan), Box::new(files)));
                }
            }
            spec.plan(&id, &rootfs, &sizing, host_namespaces, &inspect)
                .map(TaskPlan::Bundle)
                .map_err(|error| plan_error(&error))
        });
        plan.await
            .map_err(|error| TaskError::unknown(error.to_string()).during(CREATE_CONTEXT))?
    }

    /// Creates a container in a pod of its own.
    async fn create_single(self: &Arc<Self>, request: &CreateRequest, plan: Plan) -> Result<Arc<Container>, TaskError> {
        let (requirements, boot_disk) = PodRequirements::for_container(&plan).await.map_err(create_error)?;
        let pod = self
            .start_pod(&request.id, request.requested_at, &request.bundle, requirements)
            .await?;
        match self
            .create_in_pod(request, plan, boot_disk, PidNamespace::Specified, &pod)
            .await
        {
            Ok(container) => Ok(container),
            Err(error) => {
                pod.end().await;
                Err(error.during(CREATE_CONTEXT))
            }
        }
    }

    /// Creates a container in the pod of a sandbox.
    async fn create_member(
        self: &Arc<Self>,
        request: &CreateRequest,
        plan: Plan,
        sandbox: &str,
    ) -> Result<Arc<Container>, TaskError> {
        let pod = self
            .pod_of_sandbox(sandbox)
            .map_err(|error| error.during(CREATE_CONTEXT))?;
        let _admission = admit(&pod, Creation::Container).map_err(|error| error.during(CREATE_CONTEXT))?;
        self.check_runs_containers(&pod)
            .map_err(|error| error.during(CREATE_CONTEXT))?;
        let pids = self
            .resolve_pid_namespace(&pod, plan.pid_namespace)
            .map_err(|error| error.during(CREATE_CONTEXT))?;
        match self.create_in_pod(request, plan, None, pids, &pod).await {
            Ok(container) => Ok(container),
            Err(error) => {
                pod.detach(&request.id).await;
                Err(error.during(CREATE_CONTEXT))
            }
        }
    }

    /// Finds the pod of a sandbox. Fails if the sandbox does not exist or has ended.
    pub(super) fn pod_of_sandbox(&self, sandbox: &str) -> Result<Arc<Pod>, TaskError> {
        let precondition = |text| TaskError::new(ErrorCode::FailedPrecondition, text);
        let container = self
            .created_container(sandbox)
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

    /// Translates the pid namespace of a spec, which may refer to a task by its host pid, to one in the guest.
    fn resolve_pid_namespace(&self, pod: &Pod, namespace: oci::PidNamespace) -> Result<PidNamespace, TaskError> {
        let pid = match namespace {
            oci::PidNamespace::Specified => return Ok(PidNamespace::Specified),
            oci::PidNamespace::Pod => return Ok(PidNamespace::Pod),
            oci::PidNamespace::Task(pid) => pid,
        };
        let tasks = self.tasks_of_pod(pod.number());
        match tasks.iter().find(|task| task.init.pid() == pid) {
            Some(sandbox) if sandbox.is_sandbox() => Ok(PidNamespace::Pod),
            Some(target) if target.init.lifecycle.phase().exit().is_none() => {
                Ok(PidNamespace::Container(target.id.to_string()))
            }
            Some(target) => {
                let text = format!("linux.namespaces: pid: container {} has ended", target.id);
                Err(TaskError::new(ErrorCode::FailedPrecondition, text))
            }
            // The pid is that of no task of this pod: only the pod's own namespace can be shared.
            None => Ok(PidNamespace::Pod),
        }
    }

    /// Creates a container in a pod whose machine may still be booting. `boot_disk` is what is on the disk that the
    /// machine boots with.
    async fn create_in_pod(
        self: &Arc<Self>,
        request: &CreateRequest,
        plan: Plan,
        boot_disk: Option<DiskContents>,
        pids: PidNamespace,
        pod: &Arc<Pod>,
    ) -> Result<Arc<Container>, TaskError> {
        let writes_disk = matches!(&plan.root, Root::Disk(disk) if !disk.is_read_only());
        if matches!(plan.placement, Placement::Member { .. }) {
            pod.protect_from_oom(plan.oom_score_adj);
        }
        let role = match plan.placement {
            Placement::Single => Role::Single { writes_disk },
            Placement::Member { .. } => Role::Member { writes_disk },
        };
        let container = Container::new(
            request.id.clone(),
            request.bundle.clone(),
            role,
            pod.clone(),
            request.stdio.clone(),
            plan.hooks,
            plan.limits,
        );
        let container = self.insert(container.with_request_time(request.requested_at));
        let (root, shares) = (plan.root, plan.shares);
        // Both run while the guest boots. If one fails, the other still runs to completion: the cleanup must not start
        // while it is in progress.
        let (files, streams) = tokio::join!(
            pod.attach(&request.id, &request.bundle, root, boot_disk, shares),
            prepare_host_side(&container, &plan.network, plan.console_size, &self.stdio),
        );
        let created = async {
            log::debug!("task {}: files and streams are in place", request.id);
            let files = files.map_err(|error| TaskError::unknown(error.to_string()))?;
            let stdio = streams?;
            let spec = plan.spec.encode(&files.share_paths);
            let spec = spec.map_err(|error| TaskError::unknown(error.to_string()))?;
            let ready = pod.machine().ready(self.configuration.ready_timeout).await;
            let ready = ready.map_err(|ending| TaskError::unknown(ending.to_string()))?;
            log::debug!(
                "task {}: agent {} on Linux {} is ready",
                request.id,
                ready.version,
                ready.kernel
            );
            self.set_up_pod(pod).await?;
            // A limit is not a guarantee: in a machine that cannot grow, the container runs with less.
            if let Err(error) = self.resize_to_limits(pod).await {
                log::warn!(
                    "task {}: the container may get less than its limits: cannot {error}",
                    request.id
                );
            }
            create_in_guest(request, spec, pids, files.rootfs, stdio, pod).await
        };
        match created.await {
            Ok(guest_pid) => {
                container.init.set_guest_pid(guest_pid);
                Ok(container)
            }
            Err(error) => {
                container.init.close_streams(&pod.machine()).await;
                container.init.release_pid();
                Err(error)
            }
        }
    }
}

/// Opens the standard streams and hands them to the machine, creates the host pid, and runs the hooks.
async fn prepare_host_side(
    container: &Container,
    network: &Network,
    terminal_size: Option<(u16, u16)>,
    context: &StdioContext,
) -> Result<Stdio, TaskError> {
    let init = &container.init;
    let opened = init
        .stdio_spec
        .open(container.id.as_str(), context)
        .await
        .map_err(|error| TaskError::unknown(error.to_string()))?;
    assign_host_pid(container, network).await?;
    let (streams, stdio) = match opened.connect(&container.pod.machine(), terminal_size).await {
        Ok(connected) => connected,
        Err(error) => {
            let ended = machine_ended(&container.pod, &error).await;
            return Err(TaskError::unknown(ended.to_string()));
        }
    };
    init.set_streams(streams);
    run_create_hooks(container).await?;
    Ok(stdio)
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
    let (machine, action) = (pod.machine(), describe_request(&create));
    let created = call_agent(pod, CREATE_LIMIT, &action, machine.agent().create(create)).await;
    if created
        .as_ref()
        .is_err_and(|error| error.code() == ErrorCode::Unavailable)
        && !pod.machine().has_ended()
    {
        pod.machine().log_console().await;
        // The guest may create it later, and must not have it then.
        remove_from_guest(pod, &request.id).await;
    }
    created.map_err(|error| {
        // containerd would take NOT_FOUND to mean that the task is gone.
        let code = match error.code() {
            ErrorCode::InvalidArgument => ErrorCode::InvalidArgument,
            _ => ErrorCode::Unknown,
        };
        TaskError::new(code, error.to_string()).during("unable to start container process")
    })
}

fn create_event(request: &CreateRequest, pid: u32) -> TaskCreate {
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
