//! The calls that Rust's standard library and the C library make in every thread.

use super::{Call, Refusal, allowed, refused};

/// The flags with which the C library starts a thread (`create_thread` in glibc).
const THREAD_FLAGS: u32 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u32;

/// `include/uapi/linux/prctl.h`, Linux 6.4. Older kernels return EINVAL.
const PR_GET_AUXV: u32 = 0x4155_5856;

const PROT_EXEC: u32 = libc::PROT_EXEC as u32;

/// What a thread needs, whatever its work is.
pub(crate) const EVERY_THREAD: &[Call] = &[
    allowed!(SYS_brk, "the allocator"),
    allowed!(SYS_mmap[2] without PROT_EXEC, "the allocator, stacks of threads"),
    allowed!(SYS_mprotect[2] without PROT_EXEC, "the allocator, guard pages of stacks"),
    allowed!(SYS_mremap, "the allocator: large reallocations"),
    allowed!(SYS_munmap, "the allocator, stacks of threads"),
    allowed!(SYS_madvise, "the allocator, stacks of ended threads"),
    allowed!(SYS_futex, "locks"),
    allowed!(SYS_sched_yield, "locks"),
    allowed!(
        SYS_restart_syscall,
        "a wait with a time limit that SIGSTOP and SIGCONT have interrupted"
    ),
    allowed!(
        SYS_sched_getaffinity,
        "the allocator: the number of CPUs; the start of a thread: the bounds of its stack"
    ),
    allowed!(SYS_clock_gettime, "time, on hosts whose clock the vDSO cannot read"),
    allowed!(SYS_getrandom, "seeds of hash maps"),
    allowed!(SYS_prctl[0] in [PR_GET_AUXV], "rustix: the size of a page and the address of the vDSO"),
    allowed!(SYS_gettid, "locks, names of threads"),
    allowed!(SYS_getpid, "abort after a panic"),
    allowed!(
        SYS_rt_sigprocmask,
        "the start and the end of a thread, abort after a panic"
    ),
    allowed!(SYS_sigaltstack, "the start and the end of a thread"),
    allowed!(SYS_rt_sigaction[0] in [libc::SIGABRT as u32, libc::SIGSEGV as u32, libc::SIGBUS as u32], "abort after a panic or a crash"),
    allowed!(SYS_rt_sigreturn, "the return from the handler of a crash"),
    allowed!(SYS_tgkill[2] in [libc::SIGABRT as u32], "abort after a panic"),
    allowed!(SYS_read, "descriptors that this thread has"),
    allowed!(
        SYS_write,
        "descriptors that this thread has, messages on standard error"
    ),
    allowed!(SYS_fcntl[1] in [libc::F_DUPFD_CLOEXEC as u32, libc::F_GETFD as u32], "duplicates of descriptors; in debug builds, a check of each one that is closed"),
    allowed!(SYS_close, "descriptors that this thread has"),
    allowed!(SYS_exit, "the end of a thread"),
    allowed!(SYS_exit_group, "the end of the process"),
];

/// The calls of a thread that waits with rustix's epoll.
pub(crate) const WAIT_FOR_EVENTS: &[Call] = &[
    allowed!(SYS_epoll_create1, "the wait for events"),
    allowed!(SYS_epoll_ctl, "the wait for events"),
    allowed!(SYS_epoll_pwait, "the wait for events"),
];

/// The calls of a thread that waits with the C library's epoll.
pub(crate) const WAIT_FOR_EVENTS_WITH_LIBC: &[Call] = &[
    allowed!(SYS_epoll_create1, "the wait for events"),
    allowed!(SYS_epoll_ctl, "the wait for events"),
    allowed!(SYS_epoll_wait, "the wait for events"),
];

/// glibc's signal with which a change of the user reaches all threads (`SIGSETXID` in nptl).
const SIGSETXID: u32 = 33;

/// The calls of a thread that starts other threads, and those of the new threads until they install their own list.
pub(crate) const START_OF_THREADS: &[Call] = &[
    allowed!(SYS_clone[0] in [THREAD_FLAGS], "the start of a thread"),
    allowed!(SYS_rt_sigaction[0] in [SIGSETXID], "the first start of a thread"),
    allowed!(SYS_rseq, "the start of a thread"),
    allowed!(SYS_set_robust_list, "the start of a thread"),
    allowed!(SYS_prctl[0] in [libc::PR_SET_NAME as u32], "the name of a thread"),
    // This call can only add restrictions.
    allowed!(SYS_seccomp, "the list of a thread"),
];

/// Calls that fail instead of ending the process, because the C library or Rust continues without them.
pub(crate) const REFUSED: &[Refusal] = &[
    // A filter cannot check its flags, which are in memory.
    refused!(SYS_clone3, ENOSYS, "the start of a thread: glibc then uses clone"),
    refused!(SYS_getcwd, ENOENT, "a backtrace shortens paths"),
];

/// [`REFUSED`], and calls that open files, for a thread that opens none.
pub(crate) const REFUSED_WITHOUT_FILES: &[Refusal] = &[
    refused!(SYS_clone3, ENOSYS, "the start of a thread: glibc then uses clone"),
    refused!(
        SYS_openat,
        ENOENT,
        "the allocator of glibc reads /proc/sys/vm/overcommit_memory; a backtrace reads /proc/self/maps"
    ),
    refused!(SYS_open, ENOENT, "a backtrace reads this executable"),
    refused!(SYS_readlink, ENOENT, "a backtrace searches this executable"),
    refused!(SYS_getcwd, ENOENT, "a backtrace shortens paths"),
];
