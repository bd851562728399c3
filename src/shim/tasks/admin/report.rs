//! The answers to an administrator.

use std::{collections::HashMap, process, sync::Arc, time::Duration};

use crate::{
    control::{DeviceCounters, MachineStatistics},
    oci::Size,
    shim::{
        error::{ErrorCode, TaskError},
        machine::Machine,
        pod::Pod,
        report::{ContainerReport, DeviceReport, MachinePhases, MachineReport, ShimReport},
        tasks::{
            Tasks,
            container::{Container, Role},
            virtual_machine::exec::guest_agent_version,
        },
    },
};

impl Tasks {
    /// The state of this shim, without the statistics of its vmms. Never waits.
    pub(crate) fn report(&self) -> ShimReport {
        self.report_with(&HashMap::new())
    }

    /// The state of this shim. Asks its vmms and the guest agents of virtual machines: one that does not answer delays
    /// the report by a second at most.
    pub(crate) async fn full_report(&self) -> ShimReport {
        let mut calls = HashMap::new();
        for container in self.all() {
            let machine = container.pod.machine();
            let call = || tokio::spawn(async move { machine.statistics().await.map_err(|error| error.to_string()) });
            calls.entry(container.pod.number()).or_insert_with(call);
        }
        let mut agents = HashMap::new();
        for container in self.all() {
            if let Some(machine) = container.virtual_machine.clone() {
                let call = tokio::spawn(async move { guest_agent_version(&machine).await });
                agents.insert(container.id.to_string(), call);
            }
        }
        let mut statistics = HashMap::new();
        for (pod, call) in calls {
            let answer = call.await.unwrap_or_else(|error| Err(error.to_string()));
            statistics.insert(pod, answer);
        }
        let mut report = self.report_with(&statistics);
        for container in &mut report.containers {
            if let Some(call) = agents.remove(&container.id) {
                container.guest_agent = call.await.unwrap_or_default();
            }
        }
        report
    }

    /// `statistics` are the vmms' answers, by the number of the pod.
    fn report_with(&self, statistics: &HashMap<u64, Result<MachineStatistics, String>>) -> ShimReport {
        let all = self.all();
        let owners = all
            .iter()
            .filter(|container| !matches!(container.role, Role::Member { .. }));
        let owners: HashMap<_, _> = owners
            .map(|container| (container.pod.number(), container.id.to_string()))
            .collect();
        let report = |container: &Arc<Container>| {
            let pod = container.pod.number();
            let sandbox = owners.get(&pod).cloned().unwrap_or_default();
            report_of(
                container,
                self.machine_size(&container.pod),
                sandbox,
                statistics.get(&pod),
            )
        };
        let mut containers: Vec<_> = all.iter().map(report).collect();
        containers.sort_by(|one, other| one.id.cmp(&other.id));
        ShimReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: process::id(),
            namespace: self.stdio.namespace.clone(),
            containers,
        }
    }

    /// The current size of the pod's machine. An update changes the memory of a virtual machine without the pod.
    pub(in crate::shim::tasks) fn machine_size(&self, pod: &Pod) -> Size {
        let tasks = self.tasks_of_pod(pod.number());
        let mut machines = tasks.iter().filter_map(|task| task.virtual_machine.as_ref());
        machines
            .next()
            .map_or_else(|| pod.current_size(), |machine| machine.current_size())
    }

    /// The end of the console of the guest in which the container `id` runs.
    ///
    /// # Errors
    ///
    /// `NOT_FOUND`.
    pub(crate) async fn console(&self, id: &str) -> Result<String, TaskError> {
        let container = self
            .created_container(id)
            .ok_or_else(|| TaskError::new(ErrorCode::NotFound, format!("container {id} not found")))?;
        Ok(container.pod.machine().read_console().await)
    }
}

fn report_of(
    container: &Container,
    size: Size,
    sandbox: String,
    statistics: Option<&Result<MachineStatistics, String>>,
) -> ContainerReport {
    let (init, pod) = (&container.init, &container.pod);
    let phase = init.lifecycle.phase();
    let mut execs: Vec<_> = container.execs().keys().cloned().collect();
    execs.sort();
    let timings = container.timings();
    ContainerReport {
        id: container.id.to_string(),
        kind: match container.role {
            _ if container.virtual_machine.is_some() => "vm",
            Role::Single { .. } => "container",
            Role::Sandbox(_) => "sandbox",
            Role::Member { .. } => "member",
        }
        .to_owned(),
        state: phase.name().to_owned(),
        exit_status: phase.exit().map(|exit| exit.status),
        pid: init.pid(),
        guest_pid: init.guest_pid(),
        bundle: container.bundle().display().to_string(),
        guest_agent: None,
        execs,
        age_seconds: timings.age.as_secs(),
        create_milliseconds: timings.created.map(milliseconds),
        started_milliseconds: timings.started.map(milliseconds),
        start_milliseconds: timings.start.map(milliseconds),
        machine: machine_report(pod, size, sandbox, statistics),
    }
}

fn machine_report(
    pod: &Pod,
    size: Size,
    sandbox: String,
    statistics: Option<&Result<MachineStatistics, String>>,
) -> MachineReport {
    let machine = pod.machine();
    let answer = statistics.and_then(|statistics| statistics.as_ref().ok());
    let phases = machine.start_phases(answer);
    let devices = answer.map(|statistics| &statistics.devices[..]).unwrap_or_default();
    MachineReport {
        pid: machine.pid(),
        sandbox,
        file_server_pid: pod.file_server_pid(),
        memory_bytes: size.memory,
        vcpus: size.vcpus,
        kernel: machine.ready_message().map(|ready| ready.kernel.clone()),
        boot_milliseconds: phases.boot.map(milliseconds),
        phases: MachinePhases {
            spawn_milliseconds: milliseconds(phases.spawned),
            vmm_ready_milliseconds: phases.vmm_ready.map(milliseconds),
            kernel_milliseconds: phases.kernel.map(milliseconds),
            agent_ready_milliseconds: phases.agent_ready.map(milliseconds),
        },
        devices: devices.iter().map(|device| device_report(&machine, device)).collect(),
        devices_error: statistics.and_then(|statistics| statistics.as_ref().err().cloned()),
    }
}

fn device_report(machine: &Machine, device: &DeviceCounters) -> DeviceReport {
    DeviceReport {
        name: device.name.clone(),
        path: machine.disk_path(&device.name).map(|path| path.display().to_string()),
        requests: device.requests,
        errors: device.errors,
        bytes_to_guest: device.bytes_to_guest,
        bytes_from_guest: device.bytes_from_guest,
        stalls: device.stalls,
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
