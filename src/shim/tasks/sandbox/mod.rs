//! The sandbox of a pod, and the calls of the Sandbox service.
//!
//! Belongs here: sandboxes of both APIs, whose state is the [`Phase`] of their first process. Does not belong here: the
//! containers of the pod. `create` calls it for sandboxes that are tasks, and `api` for the Sandbox service.
//!
//! A sandbox is a pid on the host, in the pod's network namespace, and a machine, which boots in the background and
//! runs the containers that are created later. containerd creates, starts and ends it by one of two [`SandboxApi`]s.

mod metrics;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use nutshell_protocol::{PodFile, SetUpPod};

use super::{
    container::{
        Container, Role, SandboxApi,
        lifecycle::{Deletion, Exit, Phase},
    },
    limits::WRITE_BACK_LIMIT,
    steps::host::{CREATE_CONTEXT, assign_host_pid, create_error, plan_error, run_create_hooks},
    table::Tasks,
};
use crate::{
    oci::{self, ContainerId, Limits, PodPlan, PodShared, ResolvConf},
    shim::{
        blocking,
        error::{ErrorCode, TaskError},
        pod::PodRequirements,
        stdio::StdioSpec,
    },
};

/// The resolver configuration of a pod for which no DNS server is configured.
const HOST_RESOLV_CONF: &str = "/etc/resolv.conf";

/// A sandbox to create by the Sandbox service.
#[derive(Debug)]
pub(crate) struct SandboxRequest {
    pub(crate) id: ContainerId,
    /// When the request came, on the clock of [`monotonic_now`](crate::control::monotonic_now).
    pub(crate) requested_at: Duration,
    /// The bundle's folder, an absolute path.
    pub(crate) bundle: PathBuf,
    /// Type URL and bytes of its configuration, a `PodSandboxConfig` of the CRI.
    pub(crate) options: Option<(String, Vec<u8>)>,
    /// The path of its network namespace, empty for a new one.
    pub(crate) network: String,
    /// The annotations that containerd's configuration passes on.
    pub(crate) annotations: HashMap<String, String>,
}

/// The response to SandboxStatus.
#[derive(Debug)]
pub(crate) struct SandboxStatus {
    /// The pid on this host.
    pub(crate) pid: u32,
    /// It accepts containers.
    pub(crate) ready: bool,
    /// On the host's clock.
    pub(crate) created_at: SystemTime,
    /// `None` while it has not ended.
    pub(crate) exit: Option<Exit>,
    /// Details for users. Empty unless the request was verbose.
    pub(crate) info: HashMap<String, String>,
}

impl Tasks {
    /// Creates a sandbox, which is not started yet. Its machine boots in the background.
    pub(super) async fn build_sandbox(
        self: &Arc<Self>,
        id: &ContainerId,
        requested_at: Duration,
        bundle: &Path,
        stdio: StdioSpec,
        plan: PodPlan,
        api: SandboxApi,
    ) -> Result<Arc<Container>, TaskError> {
        let shared = set_up_request(&plan.shared)
            .await
            .map_err(|error| error.during(CREATE_CONTEXT))?;
        let requirements = PodRequirements::for_pod(&plan, shared).map_err(create_error)?;
        let pod = self.start_pod(id, requested_at, bundle, requirements).await?;
        let container = Container::new(
            id.clone(),
            bundle.to_owned(),
            Role::Sandbox(api),
            pod.clone(),
            stdio,
            plan.hooks,
            Limits::default(),
        );
        let container = self.insert(container.with_request_time(requested_at));
        let prepared = async {
            assign_host_pid(&container, &plan.network).await?;
            run_create_hooks(&container).await
        };
        if let Err(error) = prepared.await {
            container.init.release_pid();
            pod.end().await;
            return Err(error.during(CREATE_CONTEXT));
        }
        let (tasks, id) = (self.clone(), id.clone());
        tokio::spawn(async move {
            if let Err(error) = tasks.set_up_pod(&pod).await
                && !pod.machine().was_stopped()
            {
                log::error!("sandbox {id}: cannot start: {error}");
            }
        });
        Ok(container)
    }

    /// CreateSandbox: returns before the machine has booted.
    pub(crate) async fn create_sandbox(self: &Arc<Self>, request: SandboxRequest) -> Result<(), TaskError> {
        let SandboxRequest {
            id,
            requested_at,
            bundle,
            options,
            network,
            annotations,
        } = request;
        let reservation = self.reserve(&id)?;
        log::debug!("sandbox {id}: create");
        let plan = oci::plan_pod(
            &id,
            options
                .as_ref()
                .map(|(name, message)| (name.as_str(), message.as_slice())),
            &network,
            &annotations,
            &self.configuration.sizing,
            self.configuration.host_namespaces,
        )
        .map_err(|error| plan_error(&error))?;
        let stdio = StdioSpec::default();
        let container = self
            .build_sandbox(&id, requested_at, &bundle, stdio, plan, SandboxApi::Service)
            .await?;
        self.watch_pid_holder(&container, &container.init);
        container.note_created();
        container.init.lifecycle.mark_created();
        reservation.keep();
        Ok(())
    }

    /// StartSandbox: waits until the sandbox accepts containers. Returns its pid and the time of its creation.
    pub(crate) async fn start_sandbox(self: &Arc<Self>, id: &str) -> Result<(u32, SystemTime), TaskError> {
        let Ok(container) = self.find_sandbox(id) else {
            let text = format!("sandbox {id} was not created");
            return Err(TaskError::new(ErrorCode::FailedPrecondition, text));
        };
        let pid = self.start_init(&container).await?;
        Ok((pid, container.created_at))
    }

    /// StopSandbox: ends the sandbox with all its containers. The guest has `limit` to write its disks back, by default
    /// and at most [`WRITE_BACK_LIMIT`].
    pub(crate) async fn stop_sandbox(&self, id: &str, limit: Option<Duration>) -> Result<(), TaskError> {
        let container = self.find_sandbox(id)?;
        let limit = limit.map_or(WRITE_BACK_LIMIT, |limit| limit.min(WRITE_BACK_LIMIT));
        self.end_sandbox(&container, 0, limit).await;
        Ok(())
    }

    /// WaitSandbox: returns when the sandbox has ended.
    pub(crate) async fn wait_sandbox(&self, id: &str) -> Result<Exit, TaskError> {
        let container = self.find_sandbox(id)?;
        Ok(container.init.lifecycle.wait_exit().await)
    }

    /// SandboxStatus. Never waits.
    pub(crate) fn sandbox_status(&self, id: &str, verbose: bool) -> Result<SandboxStatus, TaskError> {
        let container = self.find_sandbox(id)?;
        let phase = container.init.lifecycle.phase();
        let info = match verbose {
            true => self.verbose_info(&container),
            false => HashMap::new(),
        };
        Ok(SandboxStatus {
            pid: container.init.pid(),
            ready: phase == Phase::Running,
            created_at: container.created_at,
            exit: phase.exit(),
            info,
        })
    }

    /// PingSandbox: fails if the sandbox does not exist or has ended.
    pub(crate) fn ping_sandbox(&self, id: &str) -> Result<(), TaskError> {
        let container = self.find_sandbox(id)?;
        match container.init.lifecycle.phase() {
            phase if phase.exit().is_none() => Ok(()),
            phase => {
                let text = format!("sandbox {id} is {}", phase.name());
                Err(TaskError::new(ErrorCode::FailedPrecondition, text))
            }
        }
    }

    /// ShutdownSandbox: frees everything that the sandbox and its containers hold on this host, and ends the shim. Also
    /// ends a shim that has no sandbox.
    pub(crate) async fn shut_down_sandbox(self: &Arc<Self>, id: &str) -> Result<(), TaskError> {
        match self.find_sandbox(id) {
            Ok(container) => {
                self.end_sandbox(&container, 0, WRITE_BACK_LIMIT).await;
                match container.init.lifecycle.begin_deletion()? {
                    Deletion::Begun(_) => {
                        self.release_members(&container).await;
                        self.free_resources(&container).await;
                        container.init.lifecycle.mark_deleted();
                    }
                    Deletion::InProgress => drop(container.init.lifecycle.wait_deleted().await),
                }
                self.remove(&container.id);
            }
            Err(error) if !self.is_empty() => return Err(error),
            // containerd calls this after a failed creation.
            Err(_) => {}
        }
        self.shut_down(true);
        Ok(())
    }

    /// Frees the pids of containers that were not deleted, because the pod's control group is removed next.
    async fn release_members(&self, sandbox: &Container) {
        let tasks = self.tasks_of_pod(sandbox.pod.number());
        for member in tasks.iter().filter(|task| !task.is_sandbox()) {
            member.init.lifecycle.wait_exit().await;
            for exec in member.all_execs() {
                exec.release_pid();
            }
            member.init.release_pid();
        }
    }

    /// Finds a sandbox of the Sandbox service.
    fn find_sandbox(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        self.created_container(id)
            .filter(|container| container.role == Role::Sandbox(SandboxApi::Service))
            .ok_or_else(|| TaskError::new(ErrorCode::NotFound, format!("sandbox {id} not found")))
    }

    fn verbose_info(&self, sandbox: &Container) -> HashMap<String, String> {
        let tasks = self.tasks_of_pod(sandbox.pod.number());
        let containers = tasks
            .iter()
            .filter(|task| !task.is_sandbox())
            .map(|container| container.id.as_str());
        let containers: Vec<_> = containers.collect();
        let size = self.machine_size(&sandbox.pod);
        HashMap::from([
            ("vmmPid".to_owned(), sandbox.pod.machine().pid().to_string()),
            ("memoryMiB".to_owned(), (size.memory >> 20).to_string()),
            ("vcpus".to_owned(), size.vcpus.to_string()),
            ("containers".to_owned(), containers.join(" ")),
        ])
    }
}

/// The request that sets up the resources that the pod's containers share.
async fn set_up_request(shared: &PodShared) -> Result<SetUpPod, TaskError> {
    let files = match &shared.resolv_conf {
        None => Vec::new(),
        Some(resolv_conf) => pod_files(shared.hostname.as_deref(), resolv_conf).await?,
    };
    Ok(SetUpPod {
        hostname: shared.hostname.clone(),
        domainname: shared.domainname.clone(),
        sysctls: shared.sysctls.clone(),
        shm_size: shared.shm_size,
        files,
    })
}

/// The files that the shim provides for a pod of the Sandbox service. With `sandboxer = "podsandbox"`, containerd's CRI
/// provides them (containerd `internal/cri/server/podsandbox`, `setupSandboxFiles`).
async fn pod_files(hostname: Option<&str>, resolv_conf: &ResolvConf) -> Result<Vec<PodFile>, TaskError> {
    const HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";
    let resolv_conf = match resolv_conf {
        ResolvConf::Contents(text) => text.clone().into_bytes(),
        ResolvConf::Host => match blocking::run("read the host's resolv.conf", || std::fs::read(HOST_RESOLV_CONF))
            .await
            .map_err(|error| TaskError::unknown(error.to_string()))?
        {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(TaskError::unknown(format!("read {HOST_RESOLV_CONF}: {error}"))),
        },
    };
    let contents = [
        ("/etc/resolv.conf", Some(resolv_conf)),
        ("/etc/hosts", Some(HOSTS.into())),
        ("/etc/hostname", hostname.map(|name| format!("{name}\n").into_bytes())),
    ];
    let files = contents.into_iter().filter_map(|(destination, content)| {
        Some(PodFile {
            destination: destination.to_owned(),
            content: content?,
        })
    });
    Ok(files.collect())
}
