//! Create: a container up to, not including, its first instruction.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
};

use containerd_shim_protos::{
    events::task::{TaskCreate, TaskIO},
    protobuf::MessageField,
    types::mount::Mount,
};
use nutshell_protocol::{CreateContainer, Request, Rootfs, Stdio};

use super::{CREATE_LIMIT, Container, Role, Tasks, ask, gone};
use crate::{
    oci::{self, ContainerId, Hooks, HostMount, Network, Placement, Plan, PlanError, Root, SourceKind},
    shim::{
        error::{Kind, TaskError},
        holder::{self, Holder, Namespace},
        hooks, log,
        pod::{Needs, Pod, PodError},
        process::Process,
        record::Record,
        stdio,
    },
};

/// What runc's shim says first when a container cannot be created; users search for it.
const CONTEXT: &str = "OCI runtime create failed";

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
    pub(crate) stdio: stdio::Request,
}

/// An id that no other container can have, until this is dropped.
struct Reservation<'a> {
    tasks: &'a Tasks,
    id: &'a ContainerId,
    kept: bool,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if !self.kept {
            let mut table = self.tasks.table();
            table.taken.remove(self.id);
            if let Some(container) = table.containers.remove(self.id) {
                container.init.lifecycle.abandoned();
                container.init.release();
            }
        }
    }
}

impl Tasks {
    /// Creates a container and returns its pid. A failure leaves nothing.
    pub(crate) async fn create(self: &Arc<Self>, request: CreateRequest) -> Result<u32, TaskError> {
        let mut reservation = self.reserve(&request.id)?;
        log::debug(&format!("task {}: create", request.id));
        let plan = self.plan(&request)?;
        for warning in &plan.warnings {
            log::warn(&format!("task {}: {warning}", request.id));
        }
        let container = match plan.placement.clone() {
            Placement::Single | Placement::Sandbox => {
                let pod = self.start_pod(&request, &plan).await.map_err(failed)?;
                let container = match &plan.placement {
                    Placement::Sandbox => self.sandbox(&request, plan, &pod).await,
                    _ => self.populate(&request, plan, &pod).await,
                };
                match container {
                    Ok(container) => container,
                    Err(error) => {
                        pod.end().await;
                        return Err(error.during(CONTEXT));
                    }
                }
            }
            Placement::Member { sandbox } => {
                let pod = self.pod_of(&sandbox)?;
                match self.populate(&request, plan, &pod).await {
                    Ok(container) => container,
                    Err(error) => {
                        pod.detach(&request.id).await;
                        return Err(error.during(CONTEXT));
                    }
                }
            }
        };
        self.follow_holder(&container, &container.init);
        self.events.publish(&event(&request, container.init.pid()));
        container.init.lifecycle.created();
        log::debug(&format!("task {}: created", request.id));
        reservation.kept = true;
        Ok(container.init.pid())
    }

    fn reserve<'a>(&'a self, id: &'a ContainerId) -> Result<Reservation<'a>, TaskError> {
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

    fn plan(&self, request: &CreateRequest) -> Result<Plan, TaskError> {
        oci::plan(
            &request.bundle,
            &request.id,
            &request.rootfs,
            &self.configuration.sizing,
            &SourceKind::of,
        )
        .map_err(|error| {
            let kind = match error {
                PlanError::Missing(_) | PlanError::Invalid { .. } | PlanError::Unsupported { .. } => {
                    Kind::InvalidArgument
                }
                _ => Kind::Unknown,
            };
            TaskError::new(kind, error.to_string()).during(CONTEXT)
        })
    }

    async fn start_pod(self: &Arc<Self>, request: &CreateRequest, plan: &Plan) -> Result<Arc<Pod>, PodError> {
        let needs = Needs::of(plan)?;
        let record = Record {
            cgroups: needs.groups(),
            ..Record::default()
        };
        if let Err(error) = record.store(&request.bundle) {
            log::warn(&format!("task {}: {error}", request.id));
        }
        let tasks = Arc::downgrade(self);
        let pod = Pod::start(self.host.as_ref(), needs, move |pod, event| {
            if let Some(tasks) = tasks.upgrade() {
                tasks.on_event(pod, event);
            }
        })
        .await?;
        log::debug(&format!(
            "task {}: virtual machine {} boots",
            request.id,
            pod.machine().pid()
        ));
        self.follow_machine(&pod);
        Ok(pod)
    }

    fn pod_of(&self, sandbox: &str) -> Result<Arc<Pod>, TaskError> {
        let container = self.container(sandbox).map_err(|_| {
            let text = format!("sandbox {sandbox} is not in this shim");
            TaskError::new(Kind::FailedPrecondition, text).during(CONTEXT)
        })?;
        if container.role == Role::Sandbox {
            Ok(container.pod.clone())
        } else {
            let text = format!("task {sandbox} is not a sandbox");
            Err(TaskError::new(Kind::FailedPrecondition, text).during(CONTEXT))
        }
    }

    /// A sandbox is a pid on the host. Its machine boots meanwhile, for the members to come.
    async fn sandbox(
        self: &Arc<Self>,
        request: &CreateRequest,
        plan: Plan,
        pod: &Arc<Pod>,
    ) -> Result<Arc<Container>, TaskError> {
        let container = self.enter(request, Role::Sandbox, pod, plan.hooks);
        let held = async {
            hold(&container, &plan.network)?;
            run_hooks(&container).await
        };
        if let Err(error) = held.await {
            container.init.release();
            return Err(error);
        }
        let (pod, limit) = (pod.clone(), self.configuration.ready_timeout);
        tokio::spawn(async move {
            if let Err(ending) = pod.machine().ready(limit).await {
                log::error(&format!("the machine of a pod did not start: {ending}"));
            }
        });
        Ok(container)
    }

    /// Creates a container in a machine that may be booting still.
    async fn populate(
        self: &Arc<Self>,
        request: &CreateRequest,
        plan: Plan,
        pod: &Arc<Pod>,
    ) -> Result<Arc<Container>, TaskError> {
        let role = match (&plan.placement, &plan.root) {
            (Placement::Single, Root::Disk { read_only, .. }) => Role::Alone {
                writes_disk: !read_only,
            },
            (Placement::Single, Root::Share { .. }) => Role::Alone { writes_disk: false },
            _ => Role::Member,
        };
        let container = self.enter(request, role, pod, plan.hooks);
        let (root, shares) = (plan.root, plan.shares);
        // All of this while the guest boots; both to their end, so that nothing is still under way
        // when a failure is cleaned up.
        let (rootfs, streams) = tokio::join!(
            pod.attach(&request.id, &request.bundle, root, shares),
            prepare(&container, &plan.network, plan.console_size, &self.around),
        );
        let created = async {
            log::debug(&format!("task {}: files and streams are in place", request.id));
            let rootfs = rootfs.map_err(|error| TaskError::unknown(error.to_string()))?;
            let stdio = streams?;
            let ready = pod.machine().ready(self.configuration.ready_timeout).await;
            let ready = ready.map_err(|ending| TaskError::unknown(ending.to_string()))?;
            log::debug(&format!(
                "task {}: agent {} on Linux {} is ready",
                request.id, ready.version, ready.kernel
            ));
            create_in_guest(request, plan.spec, rootfs, stdio, pod).await
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
    fn enter(&self, request: &CreateRequest, role: Role, pod: &Arc<Pod>, hooks: Hooks) -> Arc<Container> {
        let container = Arc::new(Container {
            id: request.id.clone(),
            bundle: request.bundle.clone(),
            role,
            pod: pod.clone(),
            init: Arc::new(Process::init(request.stdio.clone())),
            execs: Mutex::default(),
            hooks,
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
    around: &stdio::Surroundings,
) -> Result<Stdio, TaskError> {
    let init = &container.init;
    let opened = init
        .request
        .open(container.id.as_str(), around)
        .await
        .map_err(|error| TaskError::unknown(error.to_string()))?;
    hold(container, network)?;
    let (standard, stdio) = match opened.connect(container.pod.machine(), size).await {
        Ok(connected) => connected,
        Err(error) => return Err(gone(&container.pod, &error).await),
    };
    init.set_standard(standard);
    run_hooks(container).await?;
    Ok(stdio)
}

/// Those that set up what the pid on the host stands for, mostly its network.
async fn run_hooks(container: &Container) -> Result<(), TaskError> {
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
    rootfs: Rootfs,
    stdio: Stdio,
    pod: &Pod,
) -> Result<u32, TaskError> {
    let create = Request::CreateContainer(CreateContainer {
        container: request.id.to_string(),
        spec,
        rootfs,
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
fn hold(container: &Container, network: &Network) -> Result<(), TaskError> {
    let holder = Holder::spawn(&namespace(network)?)
        .map_err(|error| TaskError::unknown(format!("make a pid for the container: {error}")))?;
    container.pod.add(holder.pid());
    container.init.hold(Arc::new(holder));
    Ok(())
}

fn namespace(network: &Network) -> Result<Namespace, TaskError> {
    const HOST: &str = "linux.namespaces: a virtual machine cannot share the network of its host: \
        give the container a network namespace";
    match network {
        Network::Host => Err(TaskError::new(Kind::InvalidArgument, HOST)),
        Network::Loopback => Ok(Namespace::New),
        Network::Namespace(path) => match holder::open_namespace(path) {
            Ok(namespace) => Ok(Namespace::Join(namespace)),
            Err(error) => {
                let text = format!("open the network namespace {}: {error}", path.display());
                Err(TaskError::unknown(text))
            }
        },
    }
}

fn failed(error: PodError) -> TaskError {
    TaskError::unknown(error.to_string()).during(CONTEXT)
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
