//! The answer to [`crate::Request::Stats`].

use serde::{Deserialize, Serialize};

use crate::bounds;

/// The largest length of each list in [`ContainerStats`].
pub const MAX_STATISTICS: usize = 256;

/// The resource usage of a container. Fields are named after the files of its cgroup (v2) that they come from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerStats {
    /// `cpu.stat`.
    pub cpu: CpuStats,
    /// `io.stat`, one entry for each device.
    #[serde(deserialize_with = "bounds::list::<_, _, MAX_STATISTICS>")]
    pub io: Vec<IoStats>,
    /// `memory.stat`, `memory.current`, `memory.max` and the same for swap.
    pub memory: MemoryStats,
    /// The counters of the cgroup file `memory.events`.
    pub memory_events: MemoryEvents,
    /// The interfaces in the container's network namespace, except `lo`.
    #[serde(deserialize_with = "bounds::list::<_, _, MAX_STATISTICS>")]
    pub network: Vec<NetworkStats>,
    /// `pids.current` and `pids.max`.
    pub pids: PidsStats,
}

/// The counters of `cpu.stat`. Times are in microseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named as in cpu.stat")]
pub struct CpuStats {
    pub usage_usec: u64,
    pub user_usec: u64,
    pub system_usec: u64,
    pub nr_periods: u64,
    pub nr_throttled: u64,
    pub throttled_usec: u64,
}

/// The counters of one device in `io.stat`: bytes and operations, read and written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named as in io.stat")]
pub struct IoStats {
    pub major: u64,
    pub minor: u64,
    pub rbytes: u64,
    pub wbytes: u64,
    pub rios: u64,
    pub wios: u64,
}

/// The memory usage of a container, in bytes. Some values of `memory.stat` are counts of events.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStats {
    /// `memory.current`.
    pub usage: u64,
    /// `memory.max`; `u64::MAX` means unlimited.
    pub usage_limit: u64,
    /// `memory.swap.current`.
    pub swap_usage: u64,
    /// `memory.swap.max`; `u64::MAX` means unlimited.
    pub swap_limit: u64,
    /// The lines of `memory.stat`, in their order.
    #[serde(deserialize_with = "bounds::list::<_, _, MAX_STATISTICS>")]
    pub stat: Vec<(String, u64)>,
}

/// The counters of `memory.events`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named as in memory.events")]
pub struct MemoryEvents {
    pub low: u64,
    pub high: u64,
    pub max: u64,
    pub oom: u64,
    pub oom_kill: u64,
    pub oom_group_kill: u64,
}

/// The counters of one network interface: bytes and packets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named as in /proc/net/dev")]
pub struct NetworkStats {
    pub name: String,
    pub rx_bytes: u64,
    pub rx_packets: u64,
    pub rx_errors: u64,
    pub rx_dropped: u64,
    pub tx_bytes: u64,
    pub tx_packets: u64,
    pub tx_errors: u64,
    pub tx_dropped: u64,
}

/// The number of processes and threads, and its limit; a limit of `u64::MAX` means unlimited.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named as in the cgroup's files")]
pub struct PidsStats {
    pub current: u64,
    pub limit: u64,
}
