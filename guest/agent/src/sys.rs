//! The system calls that rustix has no safe form of. The one place of `unsafe` in the agent.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nutshell_linux::bpf::Instruction;
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::process::Pid;

/// Forks. `None` in the child, which must end by [`exit_now`] and never return to the event loop.
pub(crate) fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: the agent has one thread, so the child may call anything.
    let pid = check(unsafe { libc::fork() })?;
    Ok(Pid::from_raw(pid))
}

/// Forks a brother: a child of the caller's parent, born in `cgroup`. `None` in the child.
///
/// The child joins the pid namespace that the caller set for its children.
pub(crate) fn fork_brother_into(cgroup: BorrowedFd<'_>) -> io::Result<Option<Pid>> {
    /// clone(2); the constant of this name in libc has too narrow a type.
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    fork_brother(CLONE_INTO_CGROUP, cgroup.as_raw_fd().unsigned_abs().into())
}

/// Forks a brother: a child of the caller's parent, the first process of a new pid namespace, in a
/// mount namespace of its own. `None` in the child.
pub(crate) fn fork_first_brother() -> io::Result<Option<Pid>> {
    const FLAGS: libc::c_int = libc::CLONE_NEWPID | libc::CLONE_NEWNS;
    fork_brother(FLAGS.unsigned_abs().into(), 0)
}

fn fork_brother(flags: u64, cgroup: u64) -> io::Result<Option<Pid>> {
    const CLONE_PARENT: u64 = libc::CLONE_PARENT.unsigned_abs() as u64;
    // With CLONE_PARENT the exit signal must be none: it is the one of the caller.
    let arguments = libc::clone_args {
        flags: flags | CLONE_PARENT,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: 0,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup,
    };
    // SAFETY: `arguments` outlives the call; without CLONE_VM the child has a copy of the one thread's stack.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
    let pid = check(i32::try_from(pid).unwrap_or(-1))?;
    Ok(Pid::from_raw(pid))
}

/// Ends the process without running anything that the agent registered to run at its end.
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: `_exit` has no requirements.
    unsafe { libc::_exit(status) }
}

/// A descriptor that the program which executed this one left open, to be called once for a number.
pub(crate) fn inherited_descriptor(number: i32) -> Option<OwnedFd> {
    // SAFETY: F_GETFD takes no argument and fails for a number that is no open descriptor.
    let open = number > 2 && check(unsafe { libc::fcntl(number, libc::F_GETFD) }).is_ok();
    // SAFETY: it is open, and nobody else in this process owns what came from another.
    open.then(|| unsafe { OwnedFd::from_raw_fd(number) })
}

/// Becomes another program. Returns only where that fails.
pub(crate) fn execve(path: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings
            .iter()
            .map(|string| string.as_ptr())
            .chain([std::ptr::null()])
            .collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: `path` and the null-terminated arrays of C strings outlive the call.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Blocks SIGCHLD and makes it readable from the returned descriptor, which does not block.
pub(crate) fn child_signals() -> io::Result<OwnedFd> {
    let mut set = empty_signal_set();
    // SAFETY: `set` is an initialised signal set and SIGCHLD a signal.
    unsafe { libc::sigaddset(&raw mut set, libc::SIGCHLD) };
    // SAFETY: `set` is initialised; no old set is asked for.
    check(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) })?;
    // SAFETY: `set` is initialised; -1 asks for a new descriptor.
    let fd = check(unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) })?;
    // SAFETY: the kernel just gave this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Unblocks every signal, as a program that is not the agent expects to start.
pub(crate) fn unblock_signals() {
    let set = empty_signal_set();
    // SAFETY: `set` is initialised; no old set is asked for. It cannot fail with SIG_SETMASK.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) };
}

/// Gives SIGPIPE, which Rust ignores, its default action back: an ignored signal outlives execve(2).
pub(crate) fn restore_sigpipe() {
    // SAFETY: SIG_DFL is a valid disposition for SIGPIPE.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Has the kernel reap this process's children as they end.
pub(crate) fn reap_by_itself() {
    // SAFETY: SIG_IGN is a valid disposition for SIGCHLD (sigaction(2), NOTES).
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Sleeps for good.
pub(crate) fn sleep_forever() -> ! {
    loop {
        // SAFETY: pause has no requirements.
        unsafe { libc::pause() };
    }
}

fn empty_signal_set() -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the whole set.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    }
}

/// The process that a number means.
pub(crate) fn pid(number: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(number).ok()?)
}

/// The number of a process.
pub(crate) fn number(pid: Pid) -> u32 {
    pid.as_raw_nonzero().get().unsigned_abs()
}

/// Sends any signal number, real-time ones included.
pub(crate) fn kill(pid: Pid, signal: u32) -> io::Result<()> {
    let signal = i32::try_from(signal).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: kill has no memory requirements; a `Pid` is positive, so exactly one process is meant.
    check(unsafe { libc::kill(pid.as_raw_nonzero().get(), signal) }).map(drop)
}

/// Closes every descriptor above standard error that is not in `keep`.
pub(crate) fn close_all_but(keep: &[BorrowedFd<'_>]) {
    let mut kept: Vec<u32> = keep.iter().map(|fd| fd.as_raw_fd().unsigned_abs()).collect();
    kept.sort_unstable();
    let mut from = 3;
    for fd in kept {
        if fd > from {
            close_range(from, fd - 1);
        }
        from = from.max(fd + 1);
    }
    close_range(from, u32::MAX);
}

fn close_range(first: u32, last: u32) {
    // SAFETY: only called in a forked child that never touches the owners of these descriptors again.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

/// Makes the memory of this process unreadable for processes of containers that it is about to join.
pub(crate) fn set_undumpable() -> io::Result<()> {
    // SAFETY: PR_SET_DUMPABLE takes an integer.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) }).map(drop)
}

/// Inherits the children of descendants that end, as PID 1 would (only of use where we are not).
pub(crate) fn become_subreaper() -> io::Result<()> {
    // SAFETY: PR_SET_CHILD_SUBREAPER takes an integer.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }).map(drop)
}

/// Makes `terminal` the controlling terminal of this process, which leads its session.
pub(crate) fn set_controlling_terminal(terminal: impl AsFd) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer.
    check(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}

/// `struct sched_attr` of sched_setattr(2), in its first version.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct SchedulingAttributes {
    /// The struct's own, in bytes; as [`Default`] has it.
    pub(crate) size: u32,
    /// `SCHED_*`.
    pub(crate) policy: u32,
    /// `SCHED_FLAG_*`.
    pub(crate) flags: u64,
    /// Of the policies that have one.
    pub(crate) nice: i32,
    /// Of the real-time policies.
    pub(crate) priority: u32,
    /// Of SCHED_DEADLINE, in nanoseconds, as are the next two.
    pub(crate) runtime: u64,
    /// Of SCHED_DEADLINE.
    pub(crate) deadline: u64,
    /// Of SCHED_DEADLINE.
    pub(crate) period: u64,
}

impl Default for SchedulingAttributes {
    fn default() -> Self {
        Self {
            size: u32::try_from(size_of::<Self>()).unwrap_or_default(),
            policy: 0,
            flags: 0,
            nice: 0,
            priority: 0,
            runtime: 0,
            deadline: 0,
            period: 0,
        }
    }
}

/// Has the kernel schedule this process as `attributes` say (sched_setattr(2)).
pub(crate) fn set_scheduling(attributes: &SchedulingAttributes) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes of `attributes` as its first field says, all of them.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, std::ptr::from_ref(attributes), 0) };
    check(i32::try_from(result).unwrap_or(-1)).map(drop)
}

/// Gives this process a class and level of disk access (ioprio_set(2)).
pub(crate) fn set_io_priority(priority: u32) -> io::Result<()> {
    /// `IOPRIO_WHO_PROCESS` of `linux/ioprio.h`.
    const PROCESS: libc::c_int = 1;
    // SAFETY: ioprio_set takes numbers only.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, PROCESS, 0, priority) };
    check(i32::try_from(result).unwrap_or(-1)).map(drop)
}

/// Brings the loopback interface up.
pub(crate) fn loopback_up(socket: impl AsFd) -> io::Result<()> {
    // SAFETY: an all-zero `ifreq` is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or(1);
    // SAFETY: SIOCSIFFLAGS reads an `ifreq`, which outlives the call.
    check(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }).map(drop)
}

/// `union bpf_attr` for BPF_PROG_LOAD, as far as it is used; what is missing counts as zero (bpf(2)).
#[repr(C)]
struct BpfLoad {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
}

/// `union bpf_attr` for BPF_PROG_ATTACH, as far as it is used.
#[repr(C)]
struct BpfAttach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

/// Loads a program of type BPF_PROG_TYPE_CGROUP_DEVICE.
pub(crate) fn load_device_program(program: &[Instruction]) -> io::Result<OwnedFd> {
    const PROG_LOAD: libc::c_int = 5;
    const CGROUP_DEVICE: u32 = 15;
    let attributes = BpfLoad {
        kind: CGROUP_DEVICE,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr().addr() as u64,
        license: c"".as_ptr().addr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
    };
    // SAFETY: the attributes, and the instructions and string that they point to, outlive the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const attributes, size_of::<BpfLoad>()) };
    let fd = check(i32::try_from(fd).unwrap_or(-1))?;
    // SAFETY: the kernel just gave this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a program of [`load_device_program`] to a cgroup, whose folder is open.
pub(crate) fn attach_device_program(program: impl AsFd, cgroup: impl AsFd) -> io::Result<()> {
    const PROG_ATTACH: libc::c_int = 8;
    const CGROUP_DEVICE: u32 = 6;
    const ALLOW_MULTI: u32 = 2;
    let attributes = BpfAttach {
        target: cgroup.as_fd().as_raw_fd().unsigned_abs(),
        program: program.as_fd().as_raw_fd().unsigned_abs(),
        kind: CGROUP_DEVICE,
        flags: ALLOW_MULTI,
    };
    // SAFETY: the attributes outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            PROG_ATTACH,
            &raw const attributes,
            size_of::<BpfAttach>(),
        )
    };
    check(i32::try_from(result).unwrap_or(-1)).map(drop)
}

/// An address of AF_VSOCK (virtio 1.3 §5.10.4).
#[derive(Debug, Clone, Copy)]
pub(crate) struct VsockAddress {
    /// The context id.
    pub(crate) cid: u32,
    /// The port.
    pub(crate) port: u32,
}

// SAFETY: the closure gets a pointer to a whole, initialised `sockaddr_vm` that lives through the call.
unsafe impl SocketAddrArg for VsockAddress {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        // SAFETY: an all-zero `sockaddr_vm` is a valid one.
        let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
        address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap_or_default();
        address.svm_cid = self.cid;
        address.svm_port = self.port;
        let length = SocketAddrLen::try_from(size_of::<libc::sockaddr_vm>()).unwrap_or_default();
        f((&raw const address).cast(), length)
    }
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
