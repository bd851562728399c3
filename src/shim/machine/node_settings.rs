//! The settings of this node that containers also have in the guest.

use std::{fs, path::Path};

use nutshell_protocol::GuestSettings;

/// Limits of the kernel that apply to all containers of a node together, or to each network namespace. The guest's
/// kernel derives many of them from the machine's memory, which is small, but a container may rely on what it has on
/// the node.
const LIMITS: [&str; 37] = [
    "fs.aio-max-nr",
    "fs.epoll.max_user_watches",
    "fs.file-max",
    "fs.inotify.max_queued_events",
    "fs.inotify.max_user_instances",
    "fs.inotify.max_user_watches",
    "fs.mount-max",
    "fs.nr_open",
    "fs.pipe-max-size",
    "fs.pipe-user-pages-soft",
    "kernel.keys.maxbytes",
    "kernel.keys.maxkeys",
    "kernel.keys.root_maxbytes",
    "kernel.keys.root_maxkeys",
    "kernel.pid_max",
    "kernel.pty.max",
    "kernel.threads-max",
    "net.core.optmem_max",
    "net.core.rmem_max",
    "net.core.wmem_max",
    "net.ipv4.tcp_max_orphans",
    "net.ipv4.tcp_max_syn_backlog",
    "net.ipv4.tcp_max_tw_buckets",
    "net.netfilter.nf_conntrack_max",
    "user.max_cgroup_namespaces",
    "user.max_fanotify_groups",
    "user.max_fanotify_marks",
    "user.max_inotify_instances",
    "user.max_inotify_watches",
    "user.max_ipc_namespaces",
    "user.max_mnt_namespaces",
    "user.max_net_namespaces",
    "user.max_pid_namespaces",
    "user.max_time_namespaces",
    "user.max_user_namespaces",
    "user.max_uts_namespaces",
    "vm.max_map_count",
];

/// Parameters that are not limits and belong to no namespace: containers see the value of the node.
/// `vm.overcommit_memory` is left out if it is [`STRICT_OVERCOMMIT`].
const PARAMETERS: [&str; 1] = ["vm.overcommit_memory"];

/// The value with which the kernel bounds allocations by its memory (proc_sys_vm(5)). In the guest that is the small
/// memory of the machine, so containers could allocate less than on the node.
const STRICT_OVERCOMMIT: &str = "2";

/// Reads the settings. What this node does not have is left out.
pub(super) fn read() -> GuestSettings {
    let parameter = |name: &str| {
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        Some(fs::read_to_string(path).ok()?.trim().to_owned())
    };
    GuestSettings {
        hostname: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        minimum_limits: LIMITS
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), parameter(name)?.parse().ok()?)))
            .collect(),
        parameters: PARAMETERS
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), parameter(name)?)))
            .filter(|(_, value)| value != STRICT_OVERCOMMIT)
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_those_of_this_node() {
        let settings = read();
        let limit = |wanted: &str| {
            let found = settings.minimum_limits.iter().find(|(name, _)| name == wanted);
            found.map(|(_, value)| *value)
        };
        assert!(limit("fs.nr_open") >= Some(1 << 16), "{settings:?}");
        assert!(limit("kernel.pid_max") >= Some(1 << 15), "{settings:?}");
        assert!(!settings.hostname.is_empty());
        let strict = fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap().trim() == STRICT_OVERCOMMIT;
        let passed_on = settings
            .parameters
            .iter()
            .any(|(name, _)| name == "vm.overcommit_memory");
        assert_ne!(passed_on, strict);
    }
}
