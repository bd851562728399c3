//! The lists of system calls of all jailed processes and their threads.

use std::fmt::Write;

use crate::{
    devices::system_calls as devices,
    disk::system_calls as disk,
    fs::system_calls as fs,
    jail::seccomp::{AllowedCall, CallList},
    shim::pod::system_calls as holder,
    vmm::system_calls as vmm,
};

/// The list of a process, and those of its threads, which inherit it.
struct Process {
    role: &'static str,
    list: CallList,
    threads: &'static [CallList],
}

const PROCESSES: [Process; 4] = [
    Process {
        role: crate::vmm::ROLE,
        list: vmm::PROCESS,
        threads: &[
            vmm::EVENT_LOOP,
            vmm::VCPU,
            vmm::UNPLUG,
            devices::BLOCK,
            devices::NET,
            devices::DISK_SIZES,
        ],
    },
    Process {
        role: crate::fs::ROLE,
        list: fs::PROCESS,
        threads: &[fs::WORKER, fs::SYNC],
    },
    Process {
        role: crate::disk::inspector::ROLE,
        list: disk::PROCESS,
        threads: &[],
    },
    Process {
        role: "holder",
        list: holder::HOLDER,
        threads: &[],
    },
];

/// A line for each call: process, thread, call with arguments, and reason, separated by tabs. The reason begins with
/// `for thread` if the call is on the list because a thread that inherits the list needs it.
pub(super) fn table() -> String {
    let mut table = String::new();
    for process in &PROCESSES {
        for list in std::iter::once(&process.list).chain(process.threads) {
            for AllowedCall { call, inherited_by } in list.calls() {
                let needed_by = inherited_by.map_or_else(String::new, |thread| format!("for thread {thread}: "));
                // Writing to a string cannot fail.
                let _ = writeln!(
                    table,
                    "{}\t{}\t{call}\t{needed_by}{}",
                    process.role, list.thread, call.reason
                );
            }
            for refusal in list.refused {
                let name = refusal.name.trim_start_matches("SYS_");
                let _ = writeln!(
                    table,
                    "{}\t{}\t{name}, fails with error {}\t{}",
                    process.role, list.thread, refusal.errno, refusal.reason
                );
            }
        }
    }
    table
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::jail::seccomp::{
        Arguments,
        testing::{Outcome, outcome_of},
    };

    fn lists() -> impl Iterator<Item = (&'static Process, &'static CallList)> {
        static PROCESSES: [Process; 4] = super::PROCESSES;
        PROCESSES.iter().flat_map(|process| {
            std::iter::once(&process.list)
                .chain(process.threads)
                .map(move |list| (process, list))
        })
    }

    /// The call numbers of the kernel's table, with a margin for newer kernels.
    const NUMBERS: std::ops::Range<libc::c_long> = 0..600;

    /// uretprobe and uprobe: newer kernels never filter them, and they have an effect only in traced functions.
    const NEVER_FILTERED: [libc::c_long; 2] = [335, 336];

    /// The forks of this process would keep descriptors of other tests open, so another process makes the calls.
    #[test]
    fn each_thread_can_make_the_calls_of_its_list_and_no_other() {
        let status = std::process::Command::new("/proc/self/exe").arg(ROLE).status().unwrap();
        assert!(status.success(), "{status}: see the output of this test");
    }

    /// The first argument of a test executable that runs [`check_every_call`].
    pub(crate) const ROLE: &str = "check-every-call";

    /// Makes every call under every list, and panics if one is wrongly allowed or forbidden.
    pub(crate) fn check_every_call() {
        for (process, list) in lists() {
            let about = |number| format!("{} {} call {number}", process.role, list.thread);
            for number in NUMBERS.filter(|number| !NEVER_FILTERED.contains(number)) {
                if let Some(refusal) = list.refused.iter().find(|refusal| refusal.number == number) {
                    let errno = refusal.errno;
                    assert_eq!(
                        outcome_of(list, number, [u64::MAX; 6]),
                        Outcome::Failed(errno),
                        "{}",
                        about(number)
                    );
                    continue;
                }
                let mut calls: Vec<_> = list.calls().into_iter().map(|allowed| allowed.call).collect();
                calls.retain(|call| call.number == number);
                let is_always_allowed = calls.iter().any(|call| matches!(call.arguments, Arguments::Any));
                // No list of allowed values contains `u64::MAX`, and it has every bit that a call must not have.
                let outcome = outcome_of(list, number, [u64::MAX; 6]);
                assert_eq!(
                    outcome == Outcome::Forbidden,
                    !is_always_allowed,
                    "{}: {outcome:?}",
                    about(number)
                );
                for call in calls {
                    let (index, values) = match call.arguments {
                        Arguments::Any => continue,
                        Arguments::OneOf(index, values) => (index, values),
                        Arguments::Without(index, _) => (index, &[0_u32][..]),
                    };
                    for value in values {
                        let mut arguments = [u64::MAX; 6];
                        arguments[usize::from(index)] = u64::from(*value);
                        let outcome = outcome_of(list, number, arguments);
                        assert_ne!(outcome, Outcome::Forbidden, "{} with {value:#x}", about(number));
                    }
                }
            }
            // The numbering of the x32 ABI: read(2) with its bit.
            assert_eq!(outcome_of(list, 0x4000_0000, [0; 6]), Outcome::Forbidden);
        }
    }

    /// A thread inherits the list of the thread that starts it.
    #[test]
    fn each_thread_has_every_call_of_the_threads_that_it_starts() {
        for (starter, started) in [
            (&vmm::PROCESS, &vmm::EVENT_LOOP),
            (&vmm::PROCESS, &vmm::VCPU),
            (&vmm::PROCESS, &devices::DISK_SIZES),
            (&vmm::EVENT_LOOP, &vmm::VCPU),
            (&vmm::EVENT_LOOP, &vmm::UNPLUG),
            (&vmm::VCPU, &devices::BLOCK),
            (&vmm::VCPU, &devices::NET),
            (&fs::PROCESS, &fs::WORKER),
            (&fs::WORKER, &fs::SYNC),
        ] {
            // Compare calls with their arguments: the starter must be able to make each call with the same arguments.
            let texts = |list: &CallList| -> BTreeSet<_> {
                list.calls().iter().map(|allowed| allowed.call.to_string()).collect()
            };
            let missing: Vec<_> = texts(started).difference(&texts(starter)).cloned().collect();
            assert_eq!(missing, [""; 0], "{} starts {}", starter.thread, started.thread);
        }
    }

    #[test]
    fn no_list_has_a_call_that_leaves_the_jail() {
        const FORBIDDEN: &[libc::c_long] = &[
            libc::SYS_socket,
            libc::SYS_socketpair,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_listen,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_clone3,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_kill,
            libc::SYS_tkill,
            libc::SYS_rt_sigqueueinfo,
            libc::SYS_pidfd_open,
            libc::SYS_pidfd_getfd,
            libc::SYS_pidfd_send_signal,
            libc::SYS_setns,
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_pivot_root,
            libc::SYS_chroot,
            libc::SYS_move_mount,
            libc::SYS_open_tree,
            libc::SYS_open_by_handle_at,
            libc::SYS_setuid,
            libc::SYS_setresuid,
            libc::SYS_setgid,
            libc::SYS_setgroups,
            libc::SYS_bpf,
            libc::SYS_userfaultfd,
            libc::SYS_perf_event_open,
            libc::SYS_keyctl,
            libc::SYS_add_key,
            libc::SYS_request_key,
            libc::SYS_io_uring_setup,
            libc::SYS_io_uring_enter,
            libc::SYS_io_uring_register,
            libc::SYS_init_module,
            libc::SYS_finit_module,
            libc::SYS_kexec_load,
            libc::SYS_kexec_file_load,
            libc::SYS_rt_tgsigqueueinfo,
            libc::SYS_fsopen,
            libc::SYS_fsmount,
            libc::SYS_mount_setattr,
        ];
        for (process, list) in lists() {
            for AllowedCall { call, .. } in list.calls() {
                assert!(
                    !FORBIDDEN.contains(&call.number),
                    "{} {}: {call}",
                    process.role,
                    list.thread
                );
            }
        }
    }

    #[test]
    fn no_list_allows_a_new_namespace_or_process() {
        const NAMESPACES: libc::c_int = libc::CLONE_NEWNS
            | libc::CLONE_NEWCGROUP
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWUSER
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWNET;
        for (process, list) in lists() {
            for AllowedCall { call, .. } in list.calls() {
                if ![libc::SYS_clone, libc::SYS_unshare].contains(&call.number) {
                    continue;
                }
                let about = format!("{} {}: {call}", process.role, list.thread);
                let Arguments::OneOf(0, flags) = call.arguments else {
                    panic!("{about}");
                };
                for flags in flags.iter().map(|flags| flags.cast_signed()) {
                    assert_eq!(flags & NAMESPACES, 0, "{about}");
                    let is_new_process = call.number == libc::SYS_clone && flags & libc::CLONE_THREAD == 0;
                    assert!(!is_new_process, "{about}");
                }
            }
        }
    }

    #[test]
    fn table_has_thread_call_and_reason() {
        let table = table();
        for line in [
            "vmm\tvcpu\tioctl, argument 2 one of 0xae80",
            "fs\tqueue\tunshare, argument 1 one of 0x200\ta working directory of this thread",
            "vmm\tblock\tclone3, fails with error 38\t",
            "vmm\tvcpu\tpreadv\tfor thread block: reads",
        ] {
            assert!(table.lines().any(|text| text.starts_with(line)), "{line}\n{table}");
        }
        assert!(
            table
                .lines()
                .all(|line| line.split('\t').all(|field| !field.is_empty()))
        );
    }
}
