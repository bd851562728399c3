//! What the host shows of pods: logs, control groups, links, addresses, processes.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use crate::pod::PAUSE;

/// A line of a log in Kubernetes' format: time, stream, whether the line is whole, text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LogLine {
    /// `stdout` or `stderr`.
    pub(crate) stream: String,
    /// Whether the text ends here; else the next one of the same stream goes on.
    pub(crate) whole: bool,
    /// The text.
    pub(crate) text: String,
}

/// The lines of a log, none where there is no file yet. A line that is just being written is left out.
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
        panic!("not a line of a log: {line:?}");
    };
    // RFC 3339 with nanoseconds.
    assert!(time.len() >= 20 && time.as_bytes()[10] == b'T', "not a time: {line:?}");
    assert!(["stdout", "stderr"].contains(&stream), "not a stream: {line:?}");
    assert!(["F", "P"].contains(&tag), "not a tag: {line:?}");
    LogLine {
        stream: stream.to_owned(),
        whole: tag == "F",
        text: text.to_owned(),
    }
}

/// Removes a pod's control group as a kubelet does: from below, and again for a while, since the last
/// process of a pod may be on its way out.
pub(crate) fn remove_cgroup(group: &Path) -> io::Result<()> {
    let start = Instant::now();
    loop {
        let mut last = Ok(());
        for folder in groups_at(group).iter().rev() {
            last = fs::remove_dir(folder);
        }
        if last.is_ok() || start.elapsed() > Duration::from_secs(5) {
            return last;
        }
        sleep(PAUSE);
    }
}

/// The control group `group` and all below it, parents first.
pub(crate) fn groups_at(group: &Path) -> Vec<PathBuf> {
    let mut found = vec![group.to_owned()];
    let below = fs::read_dir(group).into_iter().flatten().filter_map(Result::ok);
    for entry in below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        found.extend(groups_at(&entry.path()));
    }
    found
}

/// What is left of pods' networks on a host without pods, in words.
pub(crate) fn left_of_networks() -> Vec<String> {
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

/// Network namespaces other than this one that a process is in or has open: they go when the last of these does.
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
                    "{} ({}) holds a network namespace",
                    path.display(),
                    program.trim()
                ));
            }
        }
    }
    held
}

/// What a process of the runtime holds: a shim, or what it has started for a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shim {
    /// Its process.
    pub(crate) pid: u32,
    /// Open descriptors.
    pub(crate) descriptors: usize,
    /// Threads.
    pub(crate) threads: usize,
    /// Of a shim, memory that it has written and nobody else maps, in KiB. (The others map the guest's.)
    pub(crate) memory: u64,
}

/// The shims that run now, and the processes of their machines. (Only the first 15 bytes of a process's name are
/// there to be compared.)
pub(crate) fn shims() -> Vec<Shim> {
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
        .map(shim)
        .collect();
    found.sort_by_key(|shim| shim.pid);
    found
}

fn shim(pid: u32) -> Shim {
    let read = |file| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let count = |folder| fs::read_dir(format!("/proc/{pid}/{folder}")).unwrap().count();
    let rollup = read("smaps_rollup");
    let memory = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Private_Dirty:"))
        .unwrap();
    let memory = memory.trim().trim_end_matches(" kB").parse().unwrap();
    Shim {
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
