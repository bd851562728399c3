//! The `oom_score_adj` of a pod's processes on the host (proc_pid_oom_score_adj(5)). The processes
//! start with the shim's value, with which the kernel kills a process last. If they kept it, a pod without a memory
//! limit would make the kernel kill other tenants first.

use std::{
    fs,
    sync::atomic::{AtomicU32, Ordering},
};

use parking_lot::Mutex;

/// The value before the first container is known, which is that of an ordinary process.
const DEFAULT: i32 = 0;

/// Sets the `oom_score_adj` of the pod's vmm and file server to the lowest value of the pod's containers.
#[derive(Debug)]
pub(super) struct OomScore {
    /// The pid of the vmm.
    vmm: AtomicU32,
    /// The pid of the file server; 0 if there is none.
    file_server: AtomicU32,
    /// The lowest value of the pod's containers, which protects most. `None` before the first container is known: the
    /// processes have [`DEFAULT`] then.
    lowest: Mutex<Option<i32>>,
}

impl OomScore {
    /// For processes that still have the shim's value.
    pub(super) fn new(vmm: u32, file_server: Option<u32>) -> Self {
        Self {
            vmm: AtomicU32::new(vmm),
            file_server: AtomicU32::new(file_server.unwrap_or_default()),
            lowest: Mutex::default(),
        }
    }

    /// Gives another vmm process, which replaces the earlier one, the value that the earlier one has.
    pub(super) fn replace_vmm(&self, pid: u32) {
        self.vmm.store(pid, Ordering::Relaxed);
        let lowest = *self.lowest.lock();
        self.write(lowest.unwrap_or(DEFAULT));
    }

    /// Like [`Self::replace_vmm`], for the file server.
    pub(super) fn replace_file_server(&self, pid: u32) {
        self.file_server.store(pid, Ordering::Relaxed);
        let lowest = *self.lowest.lock();
        self.write(lowest.unwrap_or(DEFAULT));
    }

    /// Sets the value of the only container; `None` if the containers are not known yet.
    pub(super) fn set(&self, value: Option<i32>) {
        *self.lowest.lock() = value;
        self.write(value.unwrap_or(DEFAULT));
    }

    /// Takes another container into account: the end of the machine would end it too, so the lowest value counts.
    pub(super) fn lower_to(&self, value: i32) {
        let mut lowest = self.lowest.lock();
        if lowest.is_none_or(|lowest| value < lowest) {
            *lowest = Some(value);
            self.write(value);
        }
    }

    fn write(&self, value: i32) {
        let pids = [&self.vmm, &self.file_server].map(|pid| pid.load(Ordering::Relaxed));
        for pid in pids.into_iter().filter(|pid| *pid != 0) {
            let path = format!("/proc/{pid}/oom_score_adj");
            if let Err(error) = fs::write(&path, value.to_string()) {
                log::warn!("cannot write {value} to {path}: {error}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn lowest_value_of_the_containers_counts() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let value = || {
            let text = fs::read_to_string(format!("/proc/{}/oom_score_adj", child.id())).unwrap();
            text.trim().parse::<i32>().unwrap()
        };
        let score = OomScore::new(child.id(), None);
        score.set(None);
        assert_eq!(value(), DEFAULT);
        for (container, expected) in [(1000, 1000), (500, 500), (999, 500)] {
            score.lower_to(container);
            assert_eq!(value(), expected, "after {container}");
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
