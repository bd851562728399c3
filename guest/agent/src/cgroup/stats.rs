//! Reads the resource usage of a container from the files of its cgroup.

use std::fs;
use std::path::Path;

use nutshell_protocol::{
    ContainerStats, CpuStats, IoStats, MAX_STATISTICS, MemoryEvents, MemoryStats, NetworkStats, PidsStats,
};
use rustix::process::Pid;

use super::Cgroup;

/// Reads the resource usage. Values of missing files are 0, because the kernel may lack a controller. The network
/// interfaces are those of process `init`.
pub(crate) fn read(cgroup: &Cgroup, init: Option<Pid>) -> ContainerStats {
    let file = |name: &str| fs::read_to_string(cgroup.file(name)).unwrap_or_default();
    let number = |name: &str| parse_number(&file(name));
    let network = init.map(|init| format!("/proc/{}/net/dev", init.as_raw_nonzero()));
    ContainerStats {
        cpu: cpu(&file("cpu.stat")),
        io: first_entries(io(&file("io.stat"))),
        memory: MemoryStats {
            usage: number("memory.current"),
            usage_limit: number("memory.max"),
            swap_usage: number("memory.swap.current"),
            swap_limit: number("memory.swap.max"),
            stat: keyed(&file("memory.stat"))
                .map(|(key, value)| (key.to_owned(), value))
                .take(MAX_STATISTICS)
                .collect(),
        },
        memory_events: memory_events(&file("memory.events")),
        network: network.map_or_else(Vec::new, |path| {
            first_entries(network_interfaces(
                &fs::read_to_string(Path::new(&path)).unwrap_or_default(),
            ))
        }),
        pids: PidsStats {
            current: number("pids.current"),
            limit: number("pids.max"),
        },
    }
}

/// Cuts a list to what a response may hold: a container can create any number of network interfaces.
fn first_entries<T>(mut entries: Vec<T>) -> Vec<T> {
    entries.truncate(MAX_STATISTICS);
    entries
}

/// Parses a number. `max` is `u64::MAX`, invalid text is 0.
fn parse_number(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        number => number.parse().unwrap_or(0),
    }
}

/// Parses a flat keyed file (cgroup v2, "Format"): keys and their values.
fn keyed(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, parse_number(value)))
    })
}

fn cpu(text: &str) -> CpuStats {
    let mut stats = CpuStats::default();
    for (key, value) in keyed(text) {
        match key {
            "usage_usec" => stats.usage_usec = value,
            "user_usec" => stats.user_usec = value,
            "system_usec" => stats.system_usec = value,
            "nr_periods" => stats.nr_periods = value,
            "nr_throttled" => stats.nr_throttled = value,
            "throttled_usec" => stats.throttled_usec = value,
            _ => {}
        }
    }
    stats
}

/// Parses `io.stat`: lines such as `254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`.
fn io(text: &str) -> Vec<IoStats> {
    let device = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let mut stats = IoStats {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            ..IoStats::default()
        };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let value = parse_number(value);
            match key {
                "rbytes" => stats.rbytes = value,
                "wbytes" => stats.wbytes = value,
                "rios" => stats.rios = value,
                "wios" => stats.wios = value,
                _ => {}
            }
        }
        Some(stats)
    };
    text.lines().filter_map(device).collect()
}

fn memory_events(text: &str) -> MemoryEvents {
    let mut events = MemoryEvents::default();
    for (key, value) in keyed(text) {
        match key {
            "low" => events.low = value,
            "high" => events.high = value,
            "max" => events.max = value,
            "oom" => events.oom = value,
            "oom_kill" => events.oom_kill = value,
            "oom_group_kill" => events.oom_group_kill = value,
            _ => {}
        }
    }
    events
}

/// Parses `/proc/<pid>/net/dev`: two lines of headings, then for each interface its name, 8 receive counters and 8
/// transmit counters.
fn network_interfaces(text: &str) -> Vec<NetworkStats> {
    let interface = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        let counters: Vec<u64> = counters.split_whitespace().map(parse_number).collect();
        let [rx_bytes, rx_packets, rx_errors, rx_dropped] = *counters.first_chunk()?;
        let [tx_bytes, tx_packets, tx_errors, tx_dropped] = *counters.get(8..)?.first_chunk()?;
        Some(NetworkStats {
            name: name.trim().to_owned(),
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
        })
    };
    text.lines()
        .skip(2)
        .filter_map(interface)
        .filter(|interface| interface.name != "lo")
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_stat_is_parsed_by_key_and_unknown_keys_are_ignored() {
        let stats = cpu("usage_usec 30\nuser_usec 20\nsystem_usec 10\ncore_sched.force_idle_usec 1\nnr_throttled 4\n");
        assert_eq!(
            (stats.usage_usec, stats.user_usec, stats.system_usec, stats.nr_throttled),
            (30, 20, 10, 4)
        );
    }

    #[test]
    fn io_stat_is_parsed_for_each_device() {
        let stats = io("254:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n8:0 rbytes=7\njunk\n");
        assert_eq!(stats.len(), 2);
        assert_eq!(
            (stats[0].major, stats[0].minor, stats[0].wbytes, stats[0].wios),
            (254, 16, 2, 4)
        );
        assert_eq!((stats[1].major, stats[1].rbytes), (8, 7));
    }

    #[test]
    fn max_is_the_largest_number() {
        assert_eq!(parse_number("max\n"), u64::MAX);
        assert_eq!(parse_number("4096\n"), 4096);
        assert_eq!(parse_number(""), 0);
    }

    #[test]
    fn interfaces_are_parsed_without_lo() {
        let text = "Inter-|   Receive |  Transmit\n face |bytes packets\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n\
                    eth0: 10 2 3 4 5 6 7 8 90 10 11 12 13 14 15 16\n";
        let found = network_interfaces(text);
        assert_eq!(found.len(), 1);
        let eth0 = &found[0];
        assert_eq!((eth0.name.as_str(), eth0.rx_bytes, eth0.rx_dropped), ("eth0", 10, 4));
        assert_eq!(
            (eth0.tx_bytes, eth0.tx_packets, eth0.tx_errors, eth0.tx_dropped),
            (90, 10, 11, 12)
        );
    }

    #[test]
    fn memory_events_are_parsed_by_key() {
        let events = memory_events("low 1\nhigh 2\nmax 3\noom 4\noom_kill 5\noom_group_kill 6\n");
        assert_eq!((events.low, events.high, events.max), (1, 2, 3));
        assert_eq!((events.oom, events.oom_kill, events.oom_group_kill), (4, 5, 6));
    }
}
