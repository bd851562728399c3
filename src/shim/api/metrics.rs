//! The resource use of a container as containerd expects it: the metrics of cgroup v2, regardless of the host's
//! cgroup version (github.com/containerd/cgroups `cgroup2/stats/metrics.proto`). All submessages are set, because
//! clients read some of them without a check.

use containerd_shim::{
    protos::{
        cgroups_v2::metrics::{
            CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PidsStat, RdmaStat,
        },
        protobuf::{MessageField, well_known_types::any::Any},
    },
    util::convert_to_any,
};
use nutshell_protocol::ContainerStats;

/// Encodes the resource use as a `Metrics` message.
pub(super) fn encode_metrics(stats: &ContainerStats) -> Any {
    let message = Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids.current,
            limit: stats.pids.limit,
            ..PidsStat::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: stats.cpu.usage_usec,
            user_usec: stats.cpu.user_usec,
            system_usec: stats.cpu.system_usec,
            nr_periods: stats.cpu.nr_periods,
            nr_throttled: stats.cpu.nr_throttled,
            throttled_usec: stats.cpu.throttled_usec,
            ..CPUStat::default()
        }),
        memory: MessageField::some(memory_stat(stats)),
        rdma: MessageField::some(RdmaStat::default()),
        io: MessageField::some(IOStat {
            usage: stats.io.iter().map(io_entry).collect(),
            ..IOStat::default()
        }),
        memory_events: MessageField::some(MemoryEvents {
            low: stats.memory_events.low,
            high: stats.memory_events.high,
            max: stats.memory_events.max,
            oom: stats.memory_events.oom,
            oom_kill: stats.memory_events.oom_kill,
            oom_group_kill: stats.memory_events.oom_group_kill,
            ..MemoryEvents::default()
        }),
        network: stats.network.iter().map(network_stat).collect(),
        ..Metrics::default()
    };
    // Encoding into memory cannot fail: the message has no required fields.
    convert_to_any(Box::new(message)).unwrap_or_default()
}

fn io_entry(stats: &nutshell_protocol::IoStats) -> IOEntry {
    IOEntry {
        major: stats.major,
        minor: stats.minor,
        rbytes: stats.rbytes,
        wbytes: stats.wbytes,
        rios: stats.rios,
        wios: stats.wios,
        ..IOEntry::default()
    }
}

fn network_stat(stats: &nutshell_protocol::NetworkStats) -> NetworkStat {
    NetworkStat {
        name: stats.name.clone(),
        rx_bytes: stats.rx_bytes,
        rx_packets: stats.rx_packets,
        rx_errors: stats.rx_errors,
        rx_dropped: stats.rx_dropped,
        tx_bytes: stats.tx_bytes,
        tx_packets: stats.tx_packets,
        tx_errors: stats.tx_errors,
        tx_dropped: stats.tx_dropped,
        ..NetworkStat::default()
    }
}

fn memory_stat(stats: &ContainerStats) -> MemoryStat {
    let mut memory = MemoryStat {
        usage: stats.memory.usage,
        usage_limit: stats.memory.usage_limit,
        swap_usage: stats.memory.swap_usage,
        swap_limit: stats.memory.swap_limit,
        ..MemoryStat::default()
    };
    for (name, value) in &stats.memory.stat {
        if let Some(field) = memory_field(&mut memory, name) {
            *field = field.saturating_add(*value);
        }
    }
    memory
}

/// The field for the line `name` of the cgroup's `memory.stat`. `None` if the message lacks it.
fn memory_field<'a>(memory: &'a mut MemoryStat, name: &str) -> Option<&'a mut u64> {
    Some(match name {
        "active_anon" => &mut memory.active_anon,
        "active_file" => &mut memory.active_file,
        "anon" => &mut memory.anon,
        "anon_thp" => &mut memory.anon_thp,
        "file" => &mut memory.file,
        "file_dirty" => &mut memory.file_dirty,
        "file_mapped" => &mut memory.file_mapped,
        "file_writeback" => &mut memory.file_writeback,
        "inactive_anon" => &mut memory.inactive_anon,
        "inactive_file" => &mut memory.inactive_file,
        "kernel_stack" => &mut memory.kernel_stack,
        "pgactivate" => &mut memory.pgactivate,
        "pgdeactivate" => &mut memory.pgdeactivate,
        "pgfault" => &mut memory.pgfault,
        "pglazyfree" => &mut memory.pglazyfree,
        "pglazyfreed" => &mut memory.pglazyfreed,
        "pgmajfault" => &mut memory.pgmajfault,
        "pgrefill" => &mut memory.pgrefill,
        "pgscan" => &mut memory.pgscan,
        "pgsteal" => &mut memory.pgsteal,
        "shmem" => &mut memory.shmem,
        "slab" => &mut memory.slab,
        "slab_reclaimable" => &mut memory.slab_reclaimable,
        "slab_unreclaimable" => &mut memory.slab_unreclaimable,
        "sock" => &mut memory.sock,
        "thp_collapse_alloc" => &mut memory.thp_collapse_alloc,
        "thp_fault_alloc" => &mut memory.thp_fault_alloc,
        "unevictable" => &mut memory.unevictable,
        "workingset_activate_anon" | "workingset_activate_file" | "workingset_activate" => {
            &mut memory.workingset_activate
        }
        "workingset_nodereclaim" => &mut memory.workingset_nodereclaim,
        "workingset_refault_anon" | "workingset_refault_file" | "workingset_refault" => &mut memory.workingset_refault,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use containerd_shim::protos::protobuf::Message;

    use super::*;

    fn encode_and_decode(stats: &ContainerStats) -> Metrics {
        let any = encode_metrics(stats);
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        Metrics::parse_from_bytes(&any.value).unwrap()
    }

    #[test]
    fn empty_statistics_have_all_submessages() {
        let message = encode_and_decode(&ContainerStats::default());
        assert!(message.pids.is_some() && message.cpu.is_some() && message.memory.is_some());
        assert!(message.memory_events.is_some() && message.io.is_some());
    }

    #[test]
    fn lines_of_memory_stat_are_stored_in_their_fields_and_unknown_ones_ignored() {
        let mut stats = ContainerStats::default();
        stats.memory.usage = 1;
        stats.memory.usage_limit = u64::MAX;
        let lines = [
            "anon",
            "inactive_file",
            "pgmajfault",
            "workingset_refault_anon",
            "workingset_refault_file",
            "line_of_a_later_kernel",
        ];
        stats.memory.stat = lines
            .iter()
            .zip(2..)
            .map(|(name, value)| ((*name).to_owned(), value))
            .collect();

        let message = encode_and_decode(&stats);

        let memory = &message.memory;
        assert_eq!((memory.usage, memory.usage_limit), (1, u64::MAX));
        assert_eq!((memory.anon, memory.inactive_file, memory.pgmajfault), (2, 3, 4));
        assert_eq!(memory.workingset_refault, 5 + 6);
    }
}
