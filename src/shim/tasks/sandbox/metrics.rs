//! The resource use of a pod: the sum over its containers.

use nutshell_protocol::ContainerStats;

use crate::shim::{
    error::{ErrorCode, TaskError},
    tasks::table::Tasks,
};

impl Tasks {
    /// SandboxMetrics: the total resource use of the pod's containers.
    pub(crate) async fn sandbox_metrics(&self, id: &str) -> Result<ContainerStats, TaskError> {
        let sandbox = self.find_sandbox(id)?;
        let mut sum = ContainerStats::default();
        for task in self.tasks_of_pod(sandbox.pod.number()) {
            if task.is_sandbox() || task.init.lifecycle.phase().exit().is_some() {
                continue;
            }
            match self.stats(task.id.as_str()).await {
                Ok(stats) => add(&mut sum, stats),
                // The container ended meanwhile, or its creation is still in progress.
                Err(error) if matches!(error.code(), ErrorCode::NotFound | ErrorCode::FailedPrecondition) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(sum)
    }
}

/// Adds the resource use of one container of a pod to `sum`. Network interfaces belong to the pod, so they are taken
/// from one container. Limits of containers do not add up to a limit of the pod, so the sum has none.
fn add(sum: &mut ContainerStats, one: ContainerStats) {
    let ContainerStats {
        cpu,
        io,
        memory,
        memory_events,
        network,
        pids,
    } = one;
    let add = |sum: &mut u64, one: u64| *sum = sum.saturating_add(one);
    add(&mut sum.cpu.usage_usec, cpu.usage_usec);
    add(&mut sum.cpu.user_usec, cpu.user_usec);
    add(&mut sum.cpu.system_usec, cpu.system_usec);
    add(&mut sum.cpu.nr_periods, cpu.nr_periods);
    add(&mut sum.cpu.nr_throttled, cpu.nr_throttled);
    add(&mut sum.cpu.throttled_usec, cpu.throttled_usec);
    for device in io {
        match sum
            .io
            .iter_mut()
            .find(|other| (other.major, other.minor) == (device.major, device.minor))
        {
            None => sum.io.push(device),
            Some(other) => {
                add(&mut other.rbytes, device.rbytes);
                add(&mut other.wbytes, device.wbytes);
                add(&mut other.rios, device.rios);
                add(&mut other.wios, device.wios);
            }
        }
    }
    add(&mut sum.memory.usage, memory.usage);
    add(&mut sum.memory.swap_usage, memory.swap_usage);
    for (name, value) in memory.stat {
        match sum.memory.stat.iter_mut().find(|(other, _)| *other == name) {
            None => sum.memory.stat.push((name, value)),
            Some((_, other)) => add(other, value),
        }
    }
    (sum.memory.usage_limit, sum.memory.swap_limit) = (u64::MAX, u64::MAX);
    add(&mut sum.memory_events.low, memory_events.low);
    add(&mut sum.memory_events.high, memory_events.high);
    add(&mut sum.memory_events.max, memory_events.max);
    add(&mut sum.memory_events.oom, memory_events.oom);
    add(&mut sum.memory_events.oom_kill, memory_events.oom_kill);
    add(&mut sum.memory_events.oom_group_kill, memory_events.oom_group_kill);
    add(&mut sum.pids.current, pids.current);
    sum.pids.limit = u64::MAX;
    if sum.network.is_empty() {
        sum.network = network;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_of_containers_is_added_and_limits_are_not() {
        let container = |usage, device| {
            let mut stats = ContainerStats::default();
            stats.cpu.usage_usec = usage;
            stats.memory.usage = usage;
            stats.memory.usage_limit = 5;
            stats.memory.stat = vec![("anon".to_owned(), usage)];
            stats.pids.current = 1;
            stats.io = vec![nutshell_protocol::IoStats {
                major: device,
                rbytes: usage,
                ..nutshell_protocol::IoStats::default()
            }];
            stats
        };
        let mut sum = ContainerStats::default();
        for one in [container(1, 8), container(2, 8), container(4, 9)] {
            add(&mut sum, one);
        }
        assert_eq!((sum.cpu.usage_usec, sum.memory.usage, sum.pids.current), (7, 7, 3));
        assert_eq!(sum.memory.stat, [("anon".to_owned(), 7)]);
        assert_eq!(sum.memory.usage_limit, u64::MAX);
        let io: Vec<_> = sum.io.iter().map(|device| (device.major, device.rbytes)).collect();
        assert_eq!(io, [(8, 3), (9, 4)]);
    }
}
