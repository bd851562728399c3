//! The sandbox of a pod, and the calls of the Sandbox service.
//!
//! A sandbox is a pid on the host, in the pod's network namespace, and a machine that boots meanwhile,
//! for the members to come. containerd creates, starts and ends it in one of two [`SandboxApi`]s; either way
//! its state is the [`Phase`] of what its pid stands for: created, running, stopped, deleted.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use nutshell_protocol::{ContainerStats, PodFile, Request, SetUpPod};

use super::{
    CREATE_LIMIT, Container, CreateRequest, Role, SandboxApi, Tasks, WRITE_BACK_LIMIT, ask,
    create::{CONTEXT, failed, hold, run_hooks, unplanned},
    totals,
};
use crate::{
    oci::{self, ContainerId, Limits, PodPlan, PodShared, ResolvConf},
    shim::{
        error::{Kind, TaskError},
        pod::{Pod, PodRequirements},
        stdio,
        tasks::lifecycle::{Deletion, Exit, Phase},
    },
};

/// Whom a pod asks for names where nobody is named for it.
const HOSTS_RESOLVER: &str = "/etc/resolv.conf";

/// A sandbox to create, of the Sandbox service.
#[derive(Debug)]
pub(crate) struct SandboxRequest {
    /// Its id.
    pub(crate) id: ContainerId,
    /// Its folder.
    pub(crate) bundle: PathBuf,
    /// The type and bytes of its configuration.
    pub(crate) options: Option<(String, Vec<u8>)>,
    /// The path of its network namespace, empty for a new one.
    pub(crate) network: String,
    /// What containerd has chosen to tell the runtime.
    pub(crate) annotations: HashMap<String, String>,
}

/// How a sandbox is.
#[derive(Debug)]
pub(crate) struct SandboxStatus {
    /// The pid on this host.
    pub(crate) pid: u32,
    /// It takes containers.
    pub(crate) ready: bool,
    /// Host clock.
    pub(crate) created_at: SystemTime,
    /// Once it has ended.
    pub(crate) exit: Option<Exit>,
    /// For people; only where it was asked for.
    pub(crate) info: HashMap<String, String>,
}

impl Tasks {
    /// Makes a sandbox up to, not including, its start.
    pub(super) async fn sandbox(
        self: &Arc<Self>,
        request: &CreateRequest,
        plan: PodPlan,
        api: SandboxApi,
    ) -> Result<Arc<Container>, TaskError> {
        let shared = set_up_request(&plan.shared).map_err(|error| error.during(CONTEXT))?;
        let requirements = PodRequirements::for_pod(&plan, shared);
        let pod = self.start_pod(request, requirements).await.map_err(failed)?;
        let container = self.enter(request, Role::Sandbox(api), &pod, plan.hooks, Limits::default());
        let held = async {
            hold(&container, &plan.network)?;
            run_hooks(&container).await
        };
        if let Err(error) = held.await {
            container.init.release();
            pod.end().await;
            return Err(error.during(CONTEXT));
        }
        let tasks = self.clone();
        tokio::spawn(async move {
            if let Err(error) = tasks.set_up(&pod).await
                && !pod.machine().was_stopped()
            {
                log::error!("a pod cannot be used: {error}");
            }
        });
        Ok(container)
    }

    /// Waits until the guest of a pod is ready and has what the pod's containers share. The same
    /// answer every time; at once for a container alone.
    pub(super) async fn set_up(&self, pod: &Pod) -> Result<(), TaskError> {
        pod.set_up(|request| async {
            let ready = pod.machine().ready(self.configuration.ready_timeout).await;
            ready.map_err(|ending| TaskError::unknown(ending.to_string()))?;
            // Settings of the pod may be about its links, which CNI has made before the sandbox.
            let members = self.members(pod.number());
            if let Some(sandbox) = members.iter().find(|member| member.is_sandbox()) {
                self.connect_network(pod, sandbox.init.pid(), true).await?;
            }
            let asked = pod.machine().agent().run(Request::SetUpPod(request));
            ask(pod, CREATE_LIMIT, asked)
                .await
                .map_err(|error| error.during("set up the pod"))
        })
        .await
    }

    /// CreateSandbox.
    pub(crate) async fn create_sandbox(self: &Arc<Self>, request: SandboxRequest) -> Result<(), TaskError> {
        let SandboxRequest {
            id,
            bundle,
            options,
            network,
            annotations,
        } = request;
        let mut reservation = self.reserve(&id)?;
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
        .map_err(|error| unplanned(&error).during(CONTEXT))?;
        let request = CreateRequest {
            id: id.clone(),
            bundle,
            rootfs: Vec::new(),
            stdio: stdio::StdioSpec::default(),
        };
        let container = self.sandbox(&request, plan, SandboxApi::Service).await?;
        self.follow_holder(&container, &container.init);
        container.init.lifecycle.created();
        reservation.kept = true;
        Ok(())
    }

    /// StartSandbox: once it takes containers, its pid and when it was created.
    pub(crate) async fn start_sandbox(&self, id: &str) -> Result<(u32, SystemTime), TaskError> {
        let Ok(container) = self.created_sandbox(id) else {
            let text = format!("sandbox {id} was not created");
            return Err(TaskError::new(Kind::FailedPrecondition, text));
        };
        let pid = self.start_init(&container).await?;
        Ok((pid, container.created_at))
    }

    /// StopSandbox: ends it with all its containers. The guest has `limit` to write its disks back.
    pub(crate) async fn stop_sandbox(&self, id: &str, limit: Option<Duration>) -> Result<(), TaskError> {
        let container = self.created_sandbox(id)?;
        let limit = limit.map_or(WRITE_BACK_LIMIT, |limit| limit.min(WRITE_BACK_LIMIT));
        self.end_sandbox(&container, 0, limit).await;
        Ok(())
    }

    /// WaitSandbox: for its end.
    pub(crate) async fn wait_sandbox(&self, id: &str) -> Result<Exit, TaskError> {
        let container = self.created_sandbox(id)?;
        Ok(container.init.lifecycle.exit().await)
    }

    /// SandboxStatus. Never waits.
    pub(crate) fn sandbox_status(&self, id: &str, verbose: bool) -> Result<SandboxStatus, TaskError> {
        let container = self.created_sandbox(id)?;
        let phase = container.init.lifecycle.phase();
        let info = match verbose {
            true => self.information(&container),
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

    /// PingSandbox: no error while there is one that can be used.
    pub(crate) fn ping_sandbox(&self, id: &str) -> Result<(), TaskError> {
        let container = self.created_sandbox(id)?;
        match container.init.lifecycle.phase() {
            phase if phase.exit().is_none() => Ok(()),
            phase => {
                let text = format!("sandbox {id} is {}", phase.name());
                Err(TaskError::new(Kind::FailedPrecondition, text))
            }
        }
    }

    /// ShutdownSandbox: takes everything back that the sandbox and its containers have on this host, and
    /// ends the shim, also one whose sandbox was never made.
    pub(crate) async fn shut_down_sandbox(self: &Arc<Self>, id: &str) -> Result<(), TaskError> {
        match self.created_sandbox(id) {
            Ok(container) => {
                self.end_sandbox(&container, 0, WRITE_BACK_LIMIT).await;
                match container.init.lifecycle.begin_deletion()? {
                    Deletion::Begun(_) => {
                        self.forget_members(&container).await;
                        self.forget(&container).await;
                        container.init.lifecycle.deleted();
                    }
                    Deletion::UnderWay => drop(container.init.lifecycle.deletion().await),
                }
                let mut table = self.table();
                table.containers.remove(&container.id);
                table.taken.remove(&container.id);
            }
            Err(error) if !self.table().taken.is_empty() => return Err(error),
            // What containerd does after a creation that failed.
            Err(_) => {}
        }
        self.shut_down(true);
        Ok(())
    }

    /// Gives back the pids of containers that nobody has deleted: what they are counted to goes next.
    async fn forget_members(&self, sandbox: &Container) {
        let members = self.members(sandbox.pod.number());
        for member in members.iter().filter(|member| !member.is_sandbox()) {
            member.init.lifecycle.exit().await;
            for exec in member.all_execs() {
                exec.release();
            }
            member.init.release();
        }
    }

    /// SandboxMetrics: what all containers of the pod use together.
    pub(crate) async fn sandbox_metrics(&self, id: &str) -> Result<ContainerStats, TaskError> {
        let sandbox = self.created_sandbox(id)?;
        let mut sum = ContainerStats::default();
        for member in self.members(sandbox.pod.number()) {
            if member.is_sandbox() || member.init.lifecycle.phase().exit().is_some() {
                continue;
            }
            match self.stats(member.id.as_str()).await {
                Ok(stats) => totals::add(&mut sum, stats),
                // It ended meanwhile, or is still being made.
                Err(error) if matches!(error.kind(), Kind::NotFound | Kind::FailedPrecondition) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(sum)
    }

    /// A sandbox of the Sandbox service.
    fn created_sandbox(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        self.created(id)
            .filter(|container| container.role == Role::Sandbox(SandboxApi::Service))
            .ok_or_else(|| TaskError::new(Kind::NotFound, format!("sandbox {id} not found")))
    }

    fn information(&self, sandbox: &Container) -> HashMap<String, String> {
        let members = self.members(sandbox.pod.number());
        let containers = members
            .iter()
            .filter(|member| !member.is_sandbox())
            .map(|member| member.id.as_str());
        let containers: Vec<_> = containers.collect();
        let size = sandbox.pod.current_size();
        HashMap::from([
            ("vmmPid".to_owned(), sandbox.pod.machine().pid().to_string()),
            ("memoryMiB".to_owned(), (size.memory >> 20).to_string()),
            ("vcpus".to_owned(), size.vcpus.to_string()),
            ("containers".to_owned(), containers.join(" ")),
        ])
    }
}

/// What the agent is asked for.
fn set_up_request(shared: &PodShared) -> Result<SetUpPod, TaskError> {
    let files = match &shared.resolv_conf {
        None => Vec::new(),
        Some(resolver) => files(shared.hostname.as_deref(), resolver)?,
    };
    Ok(SetUpPod {
        hostname: shared.hostname.clone(),
        domainname: shared.domainname.clone(),
        sysctls: shared.sysctls.clone(),
        shm_size: shared.shm_size,
        files,
    })
}

/// What containerd's CRI makes for pods whose sandboxes are its own (`internal/cri/server/podsandbox`,
/// `setupSandboxFiles`).
fn files(hostname: Option<&str>, resolver: &ResolvConf) -> Result<Vec<PodFile>, TaskError> {
    const HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";
    let resolver = match resolver {
        ResolvConf::Contents(text) => text.clone().into_bytes(),
        ResolvConf::Host => match std::fs::read(HOSTS_RESOLVER) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(TaskError::unknown(format!("read {HOSTS_RESOLVER}: {error}"))),
        },
    };
    let contents = [
        ("/etc/resolv.conf", Some(resolver)),
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
