//! The answers to an administrator.

use std::{process, time::Duration};

use super::{
    container::{Container, Role},
    table::Tasks,
};
use crate::shim::{
    error::{ErrorCode, TaskError},
    report::{ContainerReport, MachineReport, ShimReport},
};

impl Tasks {
    /// The state of this shim. Never waits.
    pub(crate) fn report(&self) -> ShimReport {
        let mut containers: Vec<_> = self.all().iter().map(|container| report_of(container)).collect();
        containers.sort_by(|one, other| one.id.cmp(&other.id));
        ShimReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: process::id(),
            namespace: self.stdio.namespace.clone(),
            containers,
        }
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

fn report_of(container: &Container) -> ContainerReport {
    let (init, pod) = (&container.init, &container.pod);
    let phase = init.lifecycle.phase();
    let size = pod.current_size();
    let mut execs: Vec<_> = container.execs().keys().cloned().collect();
    execs.sort();
    let timings = container.timings();
    let boot = pod.machine().boot();
    ContainerReport {
        id: container.id.to_string(),
        kind: match container.role {
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
        execs,
        age_seconds: timings.age.as_secs(),
        create_milliseconds: timings.create.map(milliseconds),
        start_milliseconds: timings.start.map(milliseconds),
        machine: MachineReport {
            pid: pod.machine().pid(),
            file_server_pid: pod.file_server_pid(),
            memory_bytes: size.memory,
            vcpus: size.vcpus,
            kernel: boot.map(|(ready, _)| ready.kernel.clone()),
            boot_milliseconds: boot.map(|(_, took)| milliseconds(*took)),
        },
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
