//! Steps on the host that the creation of a container and of a sandbox have in common: the pod, the pid on the
//! host, the hooks.

use std::{path::Path, sync::Arc, time::Duration};

use crate::shim::tasks::{
    container::{Container, hooks},
    table::Tasks,
};
use crate::{
    oci::{ContainerId, Hooks, Network, PlanError},
    shim::{
        blocking,
        error::{ErrorCode, TaskError},
        pod::{
            Admission, Creation, NetworkNamespace, PidHolder, Pod, PodError, PodRequirements, open_network_namespace,
        },
        record::ResourceRecord,
        vm::VmError,
    },
};

/// The prefix of the error text of a failed creation: the same as in runc's shim, because users search for it.
pub(in crate::shim::tasks) const CREATE_CONTEXT: &str = "OCI runtime create failed";

/// The prefix of the error texts of a failed Start of an exec: the same as in runc's shim.
pub(in crate::shim::tasks) const EXEC_CONTEXT: &str =
    "OCI runtime exec failed: exec failed: unable to start container process";

impl Tasks {
    /// Starts a pod for the container or sandbox `id`, which was requested at `requested_at`. Returns before its
    /// machine has booted.
    pub(in crate::shim::tasks) async fn start_pod(
        self: &Arc<Self>,
        id: &ContainerId,
        requested_at: Duration,
        bundle: &Path,
        requirements: PodRequirements,
    ) -> Result<Arc<Pod>, TaskError> {
        let pod = self.start_unwatched_pod(id, requested_at, bundle, requirements).await?;
        self.watch_machine(&pod);
        Ok(pod)
    }

    /// [`Self::start_pod`] for a caller that handles the end of the pod's machine.
    pub(in crate::shim::tasks) async fn start_unwatched_pod(
        self: &Arc<Self>,
        id: &ContainerId,
        requested_at: Duration,
        bundle: &Path,
        requirements: PodRequirements,
    ) -> Result<Arc<Pod>, TaskError> {
        let record = ResourceRecord {
            cgroups: requirements.cgroup_paths(),
        };
        if let Err(error) = record.store(bundle) {
            log::warn!("task {id}: cannot store the record of its resources: {error}");
        }
        let tasks = Arc::downgrade(self);
        let pod = Pod::start(self.launcher.as_ref(), requested_at, requirements, move |pod, event| {
            if let Some(tasks) = tasks.upgrade() {
                tasks.on_event(pod, event);
            }
        })
        .await
        .map_err(create_error)?;
        log::debug!(
            "task {id}: vmm process {} is booting its virtual machine",
            pod.machine().pid()
        );
        Ok(pod)
    }
}

/// The error of a Create call whose pod could not be started.
pub(in crate::shim::tasks) fn create_error(error: PodError) -> TaskError {
    TaskError::unknown(error.to_string()).during(CREATE_CONTEXT)
}

/// The error of a Create call for which no plan could be made: `INVALID_ARGUMENT` if the request or the spec is wrong.
pub(in crate::shim::tasks) fn plan_error(error: &PlanError) -> TaskError {
    let code = match error {
        PlanError::Missing(_) | PlanError::Invalid { .. } | PlanError::Unsupported { .. } => ErrorCode::InvalidArgument,
        _ => ErrorCode::Unknown,
    };
    TaskError::new(code, error.to_string()).during(CREATE_CONTEXT)
}

/// The error of a call for a virtual machine: `INVALID_ARGUMENT` if the image or an annotation is wrong.
pub(in crate::shim::tasks) fn vm_error(error: &VmError) -> TaskError {
    let code = match error {
        VmError::Image { .. }
        | VmError::Volume { .. }
        | VmError::KernelFile { .. }
        | VmError::Seed(_)
        | VmError::NoDisk => ErrorCode::InvalidArgument,
        _ => ErrorCode::Unknown,
    };
    TaskError::new(code, error.to_string())
}

/// Starts the holder whose pid is the container's pid on the host, in the network namespace that the spec selects. The
/// holder joins the pod's control group, because clients look up the group by that pid.
pub(in crate::shim::tasks) async fn assign_host_pid(container: &Container, network: &Network) -> Result<(), TaskError> {
    let holder = PidHolder::spawn(&network_namespace(network).await?)
        .map_err(|error| TaskError::unknown(format!("create the host process of the container: {error}")))?;
    let added = container.pod.add_process(holder.pid());
    added.map_err(|error| TaskError::unknown(error.to_string()))?;
    container.init.set_pid_holder(Arc::new(holder));
    Ok(())
}

async fn network_namespace(network: &Network) -> Result<NetworkNamespace, TaskError> {
    const HOST_NETWORK_REFUSAL: &str = "linux.namespaces: a virtual machine cannot share the network of its host: \
        give the container a network namespace, or set `host_namespaces = \"pod-and-network\"` in section [pod] of the \
        configuration to use the machine's";
    match network {
        Network::Host => Err(TaskError::new(ErrorCode::InvalidArgument, HOST_NETWORK_REFUSAL)),
        Network::Loopback => Ok(NetworkNamespace::New),
        Network::Namespace(path) => {
            let wanted = path.clone();
            let opened = blocking::run("look up the path", move || open_network_namespace(&wanted)).await;
            let failed = |error: String| {
                let text = format!("open the network namespace {}: {error}", path.display());
                TaskError::unknown(text)
            };
            let namespace = opened
                .map_err(|error| failed(error.to_string()))?
                .map_err(|error| failed(error.to_string()))?;
            Ok(NetworkNamespace::Join(namespace))
        }
    }
}

/// Runs the prestart and createRuntime hooks. Most of them configure the holder's network namespace.
pub(in crate::shim::tasks) async fn run_create_hooks(container: &Container) -> Result<(), TaskError> {
    let Hooks {
        prestart,
        create_runtime,
        ..
    } = &container.hooks;
    for (moment, hooks) in [("prestart", prestart), ("createRuntime", create_runtime)] {
        hooks::run(moment, hooks, "creating", container.hook_container())
            .await
            .map_err(|error| TaskError::unknown(error.to_string()))?;
    }
    Ok(())
}

/// Permits a creation in the pod of a sandbox.
///
/// # Errors
///
/// Another creation that is in progress there excludes it.
pub(in crate::shim::tasks) fn admit(pod: &Pod, creation: Creation) -> Result<Admission, TaskError> {
    pod.admit(creation).map_err(|other| {
        let text = match other {
            Creation::VirtualMachine => "a virtual machine is being created in this pod, which runs no other container",
            Creation::Container => {
                "a virtual machine needs a pod for itself, and a container is being created in this one: remove \
                 sidecars, or run them as init containers"
            }
        };
        TaskError::new(ErrorCode::FailedPrecondition, text)
    })
}
