//! Creates virtual machines, in a new pod or in the pod of a sandbox.

use std::sync::Arc;

use crate::{
    oci::{Network, Placement, VmPlan},
    shim::{
        error::{ErrorCode, TaskError},
        pod::{Admission, Creation, Pod, PodRequirements},
        stdio::StdioContext,
        tasks::{
            Tasks,
            container::{Container, Role},
            create::CreateRequest,
            limits::DRAIN_LIMIT,
            steps::host::{CREATE_CONTEXT, admit, assign_host_pid, create_error, run_create_hooks, vm_error},
        },
        vm::{VirtualMachine, VmError, VmFiles},
    },
};

impl Tasks {
    /// Creates a virtual machine, in a new pod or in the pod of a sandbox: finds its kernel, and prepares the machine
    /// that Start boots.
    pub(in crate::shim::tasks) async fn create_virtual_machine(
        self: &Arc<Self>,
        request: &CreateRequest,
        plan: VmPlan,
        files: VmFiles,
    ) -> Result<Arc<Container>, TaskError> {
        let machine = Arc::new(VirtualMachine::new(plan.size, plan.on_reboot, plan.exec, files));
        // The admission lasts until the container is created.
        let (pod, role, _admission) = self
            .prepare_pod(request, &plan, &machine)
            .await
            .map_err(|error| error.during(CREATE_CONTEXT))?;
        match self.create_machine_in_pod(request, &plan, &machine, &pod, role).await {
            Ok(container) => {
                self.watch_virtual_machine(&container, &machine);
                Ok(container)
            }
            Err(error) => {
                if matches!(role, Role::Single { .. }) {
                    pod.end().await;
                } else {
                    // The pod stays, without a machine.
                    pod.machine().stop("its virtual machine could not be created");
                    pod.machine().ended().await;
                }
                machine.release(&request.id, DRAIN_LIMIT).await;
                Err(error.during(CREATE_CONTEXT))
            }
        }
    }

    /// Starts or finds the pod of a new virtual machine. Its machine is then the disk reader, or the machine to boot if
    /// the kernel is not on the disk.
    async fn prepare_pod(
        self: &Arc<Self>,
        request: &CreateRequest,
        plan: &VmPlan,
        machine: &VirtualMachine,
    ) -> Result<(Arc<Pod>, Role, Option<Admission>), TaskError> {
        let disk = machine.disk_to_read().map_err(|error| vm_error(&error))?;
        let Placement::Member { sandbox } = &plan.placement else {
            let requirements =
                PodRequirements::for_virtual_machine(plan.cgroup.as_ref(), plan.oom_score_adj, plan.size.boot, disk)
                    .map_err(create_error)?;
            let pod = self
                .start_unwatched_pod(&request.id, request.requested_at, &request.bundle, requirements)
                .await?;
            return Ok((pod, Role::Single { writes_disk: false }, None));
        };
        let pod = self.pod_of_sandbox(sandbox)?;
        let admission = admit(&pod, Creation::VirtualMachine)?;
        self.check_is_alone(&pod)?;
        pod.protect_from_oom(plan.oom_score_adj);
        let installed = match disk {
            Some(disk) => pod.start_disk_reader(self.launcher.as_ref(), disk).await,
            None => pod.prepare_user_machine(self.launcher.as_ref(), plan.size.boot).await,
        };
        installed.map_err(|error| TaskError::unknown(error.to_string()))?;
        // Start connects the links again, to the machine that boots then.
        pod.disconnect_network().await;
        Ok((pod, Role::Member { writes_disk: false }, Some(admission)))
    }

    /// Fails if a container of a pod has not ended: the machine of a pod runs either containers or one virtual machine.
    fn check_is_alone(&self, pod: &Pod) -> Result<(), TaskError> {
        let tasks = self.tasks_of_pod(pod.number());
        let mut others = tasks.iter().filter(|task| !task.is_sandbox());
        match others.find(|task| task.init.lifecycle.phase().exit().is_none()) {
            None => Ok(()),
            Some(other) => Err(TaskError::new(
                ErrorCode::FailedPrecondition,
                format!(
                    "a virtual machine needs a pod for itself, and container {} runs in this one: remove sidecars, or \
                     run them as init containers",
                    other.id
                ),
            )),
        }
    }

    /// Fails if a pod has a virtual machine, and therefore cannot run containers.
    pub(in crate::shim::tasks) fn check_runs_containers(&self, pod: &Pod) -> Result<(), TaskError> {
        let tasks = self.tasks_of_pod(pod.number());
        let machine = tasks.iter().find(|task| task.virtual_machine.is_some());
        match machine {
            None if pod.has_agent() => Ok(()),
            machine => Err(TaskError::new(
                ErrorCode::FailedPrecondition,
                format!(
                    "this pod is a virtual machine{}, which runs no other container",
                    machine.map_or_else(String::new, |task| format!(" ({})", task.id))
                ),
            )),
        }
    }

    async fn create_machine_in_pod(
        self: &Arc<Self>,
        request: &CreateRequest,
        plan: &VmPlan,
        machine: &Arc<VirtualMachine>,
        pod: &Arc<Pod>,
        role: Role,
    ) -> Result<Arc<Container>, TaskError> {
        let container = Container::new(
            request.id.clone(),
            request.bundle.clone(),
            role,
            pod.clone(),
            request.stdio.clone(),
            plan.hooks.clone(),
            plan.limits,
        );
        let container = self.insert(
            container
                .with_request_time(request.requested_at)
                .with_virtual_machine(machine.clone()),
        );
        let reader = pod.machine();
        // If one fails, the other still runs to completion: the cleanup must not start while it is in progress.
        let (found, prepared) = tokio::join!(
            machine.find_kernel(&request.id, &reader, self.configuration.ready_timeout),
            prepare_host_side(&container, machine, &plan.network, &self.stdio),
        );
        let created = async {
            prepared?;
            found.map_err(|error| TaskError::unknown(error.to_string()))?;
            if reader.has_agent() {
                let next = pod.prepare_user_machine(self.launcher.as_ref(), plan.size.boot).await;
                next.map_err(|error| TaskError::unknown(error.to_string()))?;
            }
            Ok(())
        };
        match created.await {
            Ok(()) => Ok(container),
            Err(error) => {
                container.init.release_pid();
                Err(error)
            }
        }
    }
}

/// Opens the console, creates the host pid, and runs the hooks.
async fn prepare_host_side(
    container: &Container,
    machine: &VirtualMachine,
    network: &Network,
    context: &StdioContext,
) -> Result<(), TaskError> {
    let opened = container
        .init
        .stdio_spec
        .open(container.id.as_str(), context)
        .await
        .map_err(|error| TaskError::unknown(error.to_string()))?;
    let console = opened.into_console().map_err(VmError::Console);
    machine.set_console(console.map_err(|error| TaskError::unknown(error.to_string()))?);
    assign_host_pid(container, network).await?;
    run_create_hooks(container).await
}
