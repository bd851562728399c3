//! Inspection of the host: container logs, control groups, links, addresses, processes.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use crate::wait::POLL_INTERVAL;

/// A line of a container log in Kubernetes' format: time, stream, tag `F` (full) or `P` (partial), text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LogLine {
    /// `stdout` or `stderr`.
    pub(crate) stream: String,
    /// Whether the tag is `F`. Otherwise the next line of the same stream continues the text.
    pub(crate) is_complete: bool,
    pub(crate) text: String,
}

/// Reads the lines of a container log: none if the file does not exist, without an incomplete line at the end.
pub(crate) fn read_log(path: &Path) -> Vec<LogLine> {
    let text = fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default();
    text.split_inclusive('\n')
        .filter(|line| line.ends_with('\n'))
        .map(parse_line)
        .collect()
}

fn parse_line(line: &str) -> LogLine {
    let mut parts = line.trim_end_matches('\n').splitn(4, ' ');
    let (Some(time), Some(stream), Some(tag), Some(text)) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        panic!("not a log line: {line:?}");
    };
    // RFC 3339 with nanoseconds.
    assert!(
        time.len() >= 20 && time.as_bytes()[10] == b'T',
        "no valid time: {line:?}"
    );
    assert!(["stdout", "stderr"].contains(&stream), "no valid stream: {line:?}");
    assert!(["F", "P"].contains(&tag), "no valid tag: {line:?}");
    LogLine {
        stream: stream.to_owned(),
        is_complete: tag == "F",
        text: text.to_owned(),
    }
}

/// Removes a pod's control group as a kubelet does: descendants first, with retries for 5 s, since the last process of
/// the pod may still be about to exit.
pub(crate) fn remove_cgroup(group: &Path) -> io::Result<()> {
    let start = Instant::now();
    loop {
        let mut last = Ok(());
        for folder in cgroups_at(group).iter().rev() {
            last = fs::remove_dir(folder);
        }
        if last.is_ok() || start.elapsed() > Duration::from_secs(5) {
            return last;
        }
        sleep(POLL_INTERVAL);
    }
}

/// The control group `group` and its descendants, parents first.
pub(crate) fn cgroups_at(group: &Path) -> Vec<PathBuf> {
    let mut found = vec![group.to_owned()];
    let below = fs::read_dir(group).into_iter().flatten().filter_map(Result::ok);
    for entry in below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        found.extend(cgroups_at(&entry.path()));
    }
    found
}

/// Network namespaces, links and addresses that removed pods have left on the host, one text each. No pod may exist.
pub(crate) fn network_leftovers() -> Vec<String> {
    let names = |folder: &str| {
        fs::read_dir(folder)
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect::<Vec<_>>()
    };
    let namespaces = names("/run/netns")
        .into_iter()
        .map(|name| format!("network namespace {name} is left"));
    let links = names("/sys/class/net/pods/brif")
        .into_iter()
        .map(|name| format!("link {name} is left"));
    let addresses = names("/run/cni/addresses/pods")
        .into_iter()
        .filter(|name| name.starts_with("10.") || name.starts_with("fd00"))
        .map(|name| format!("address {name} is left"));
    namespaces
        .chain(links)
        .chain(addresses)
        .chain(held_namespaces())
        .collect()
}

/// Processes that are in another network namespace or have one open, one text each. They keep the namespace alive.
fn held_namespaces() -> Vec<String> {
    let name = |path: &Path| fs::read_link(path).ok()?.to_str().map(str::to_owned);
    let own = name(Path::new("/proc/self/ns/net"));
    let mut held = Vec::new();
    for process in fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
        let process = process.path();
        let descriptors = fs::read_dir(process.join("fd")).into_iter().flatten();
        let descriptors = descriptors.filter_map(Result::ok).map(|entry| entry.path());
        for path in descriptors.chain([process.join("ns/net")]) {
            let namespace = name(&path).filter(|namespace| namespace.starts_with("net:["));
            if namespace.is_some() && namespace != own {
                let program = fs::read_to_string(process.join("comm")).unwrap_or_default();
                held.push(format!(
                    "{} ({}) keeps a network namespace",
                    path.display(),
                    program.trim()
                ));
            }
        }
    }
    held
}

/// The resources of a process of the runtime: a shim, a vmm or a file server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RuntimeProcess {
    pub(crate) pid: u32,
    /// Number of open descriptors.
    pub(crate) descriptors: usize,
    /// With the main thread.
    pub(crate) threads: usize,
    /// Private dirty memory of a shim in KiB. 0 for other processes, which map the guest's memory.
    pub(crate) memory: u64,
}

/// The running shims and the processes of their machines, sorted by pid. Compares names by prefix, because the kernel
/// keeps only 15 bytes of a name.
pub(crate) fn runtime_processes() -> Vec<RuntimeProcess> {
    let mut found: Vec<_> = fs::read_dir("/proc")
        .unwrap()
        .filter_map(Result::ok)
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            ["containerd-shim", "nutshell-vmm", "nutshell-fs"]
                .iter()
                .any(|program| name.starts_with(program))
        })
        .map(read_process)
        .collect();
    found.sort_by_key(|process| process.pid);
    found
}

fn read_process(pid: u32) -> RuntimeProcess {
    let read = |file| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let count = |folder| fs::read_dir(format!("/proc/{pid}/{folder}")).unwrap().count();
    let rollup = read("smaps_rollup");
    let memory = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Private_Dirty:"))
        .unwrap();
    let memory = memory.trim().trim_end_matches(" kB").parse().unwrap();
    RuntimeProcess {
        pid,
        descriptors: count("fd"),
        threads: count("task"),
        memory: if read("comm").starts_with("containerd-shim") {
            memory
        } else {
            0
        },
    }
}
