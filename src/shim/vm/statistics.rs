//! The resource use of a virtual machine, as the host sees it: that of the vmm process.

use std::{fs, io};

use nutshell_protocol::{ContainerStats, CpuStats, MemoryStats, PidsStats};
use rustix::param::{clock_ticks_per_second, page_size};

use crate::oci::Size;

/// The resource use of the vmm process `pid` of a machine of `size`. CPU time counts from the last boot.
///
/// # Errors
///
/// The process is gone.
pub(crate) fn process_statistics(pid: u32, size: Size) -> io::Result<ContainerStats> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let statm = fs::read_to_string(format!("/proc/{pid}/statm"))?;
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "malformed statistics of a process");
    let [user, system] = cpu_ticks(&stat).ok_or_else(malformed)?;
    let to_microseconds = |ticks: u64| ticks.saturating_mul(1_000_000) / clock_ticks_per_second().max(1);
    let (user_usec, system_usec) = (to_microseconds(user), to_microseconds(system));
    let resident: u64 = statm
        .split_ascii_whitespace()
        .nth(1)
        .and_then(|pages| pages.parse().ok())
        .ok_or_else(malformed)?;
    Ok(ContainerStats {
        cpu: CpuStats {
            usage_usec: user_usec.saturating_add(system_usec),
            user_usec,
            system_usec,
            ..CpuStats::default()
        },
        memory: MemoryStats {
            usage: resident.saturating_mul(page_size() as u64),
            usage_limit: size.memory,
            swap_limit: u64::MAX,
            ..MemoryStats::default()
        },
        pids: PidsStats {
            current: 1,
            limit: u64::MAX,
        },
        ..ContainerStats::default()
    })
}

/// The CPU time in user mode and in the kernel, in ticks, from a line of `/proc/<pid>/stat` (proc_pid_stat(5), fields
/// 14 and 15). The name in field 2 may contain spaces and parentheses.
fn cpu_ticks(stat: &str) -> Option<[u64; 2]> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_ascii_whitespace().skip(11);
    let mut next = || fields.next()?.parse().ok();
    Some([next()?, next()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_read_after_any_name() {
        let stat = "7 (a) b) R 1 2 3 4 5 6 7 8 9 10 1200 34 0 0 20 0 1 0 99 1000 50";
        assert_eq!(cpu_ticks(stat), Some([1200, 34]));
        assert_eq!(cpu_ticks("7 (x) R 1"), None);
        assert_eq!(cpu_ticks(""), None);
    }

    #[test]
    fn statistics_of_this_process_are_plausible() {
        let size = Size {
            memory: 1 << 30,
            vcpus: 1,
        };
        let stats = process_statistics(std::process::id(), size).unwrap();
        assert!(stats.memory.usage > 1 << 16, "{stats:?}");
        assert_eq!((stats.memory.usage_limit, stats.pids.current), (1 << 30, 1));
        process_statistics(u32::MAX, size).unwrap_err();
    }
}
