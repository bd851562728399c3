//! Processes that hold a pid on the host for a process in the guest.
//!
//! containerd and its clients expect each task to have a live pid, which `ps` lists and whose `/proc/<pid>/ns/net` is
//! the container's network namespace. A holder is the smallest such process: it shares the shim's memory, so that no
//! page table is copied and nothing is executed; it has no descriptors; and it sleeps. Each init process and each exec
//! has one, so that a reported pid never names an unrelated process. A signal that kills a holder is meant for the
//! process in the guest: [`PidHolder::signalled`] reports it.

use std::{
    io::{self, Read},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    ptr,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use nix::libc;
use nix::sys::signal::{SigSet, SigmaskHow};
use parking_lot::Mutex;
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    process::{Pid, Signal, WaitOptions},
};

use super::system_calls;
use crate::{
    jail::seccomp,
    shim::child::{Child, WaitStatus},
};

/// The network namespace that a holder runs in.
#[derive(Debug)]
pub(crate) enum NetworkNamespace {
    /// The network namespace of the shim.
    Inherited,
    /// A new one, with only a loopback interface.
    New,
    /// An existing one, from [`open_network_namespace`].
    Join(OwnedFd),
}

/// A sleeping process. It is killed and reaped on drop.
#[derive(Debug)]
pub(crate) struct PidHolder {
    child: Child,
    released: AtomicBool,
    /// Must outlive the process.
    _memory: Box<HolderMemory>,
}

/// The memory that the process uses.
#[derive(Debug)]
#[repr(C, align(16))]
struct HolderMemory {
    stack: [u8; STACK_SIZE],
    parameters: HolderParameters,
}

/// In bytes. [`run_holder`] needs a few hundred of them in a build without optimization.
const STACK_SIZE: usize = 8 << 10;

#[derive(Debug)]
struct HolderParameters {
    parent: libc::pid_t,
    /// The network namespace to join; negative for none.
    namespace: RawFd,
    /// The directory that becomes the root.
    root: RawFd,
    /// The pipe for the result: one byte, an errno or 0.
    report: RawFd,
    /// The filter of its system calls.
    filter: &'static [libc::sock_filter],
}

/// The filter of every holder's system calls ([`system_calls::HOLDER`]).
fn filter() -> io::Result<&'static [libc::sock_filter]> {
    static PROGRAM: OnceLock<Vec<libc::sock_filter>> = OnceLock::new();
    if let Some(program) = PROGRAM.get() {
        return Ok(program);
    }
    let program = seccomp::compile(&system_calls::HOLDER).map_err(io::Error::other)?;
    Ok(PROGRAM.get_or_init(|| program))
}

impl PidHolder {
    /// Starts a holder. It is in its namespace, and has its name and its signal mask, when this returns. Call it on a
    /// thread that lives as long as the shim: the kernel kills the holder when that thread ends. Needs the Tokio
    /// runtime.
    pub(crate) fn spawn(namespace: &NetworkNamespace) -> io::Result<Self> {
        let root = empty_directory()?;
        let (mut report, reporter) = io::pipe()?;
        let mut memory = Box::new(HolderMemory {
            stack: [0; STACK_SIZE],
            parameters: HolderParameters {
                parent: rustix::process::getpid().as_raw_nonzero().get(),
                namespace: match namespace {
                    NetworkNamespace::Join(namespace) => namespace.as_raw_fd(),
                    NetworkNamespace::Inherited | NetworkNamespace::New => -1,
                },
                root: root.as_raw_fd(),
                report: reporter.as_raw_fd(),
                filter: filter()?,
            },
        });
        let flags = match namespace {
            NetworkNamespace::New => libc::CLONE_VM | libc::CLONE_NEWNET,
            NetworkNamespace::Inherited | NetworkNamespace::Join(_) => libc::CLONE_VM,
        };
        let child = {
            // A signal handler of the shim must not run in the holder, which shares the shim's memory.
            let _blocked = SignalsBlocked::all()?;
            let top = memory.stack.as_mut_ptr_range().end;
            // SAFETY: `run_holder` uses only `stack` and `parameters`, both in `memory`. The box is freed only after
            // the process was reaped, by `PidHolder` or by the error path below. The process shares this address space,
            // but makes nothing but system calls and does not return to Rust code (see `run_holder`).
            let pid = unsafe {
                libc::clone(
                    run_holder,
                    top.cast(),
                    flags | libc::SIGCHLD,
                    ptr::from_mut(&mut memory.parameters).cast(),
                )
            };
            if pid < 0 {
                return Err(io::Error::last_os_error());
            }
            Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidData)?
        };
        let child = Child::new(child).inspect_err(|_| {
            // Before `memory` is freed. Neither call can fail for a child that was not reaped.
            let _ = rustix::process::kill_process(child, Signal::KILL);
            let _ = rustix::process::waitpid(Some(child), WaitOptions::empty());
        })?;
        let holder = Self {
            child,
            released: AtomicBool::new(false),
            _memory: memory,
        };
        drop(reporter);
        // The end of the pipe without a byte means that the process was killed at once.
        let mut result = [0];
        report.read_exact(&mut result)?;
        match result[0] {
            0 => Ok(holder),
            errno => Err(io::Error::from_raw_os_error(i32::from(errno))),
        }
    }

    /// On the host: what containerd gets as the pid of the container or exec.
    pub(crate) fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Waits until another process kills the holder, and returns the signal. The pid stays taken until
    /// [`Self::release`]; `None` after that.
    pub(crate) async fn signalled(&self) -> Option<u32> {
        let ended = self.child.wait().await;
        if self.released.load(Ordering::Relaxed) {
            return None;
        }
        match ended {
            Ok(WaitStatus::Killed(signal)) => Some(signal.unsigned_abs()),
            // A holder never exits by itself.
            Ok(WaitStatus::Exited(_)) | Err(_) => Some(libc::SIGKILL.unsigned_abs()),
        }
    }

    /// Kills and reaps the process, which frees its pid.
    pub(crate) fn release(&self) {
        if !self.released.swap(true, Ordering::Relaxed) {
            self.child.kill_and_reap();
        }
    }
}

impl Drop for PidHolder {
    fn drop(&mut self) {
        self.release();
    }
}

/// Opens a network namespace by its path: `/proc/<pid>/ns/net`, or a file that it is bound to. Any other file is an
/// error, and is not opened: that can block, or have effects on the host. The lookup of a path that a client has chosen
/// can block on a file system.
pub(crate) fn open_network_namespace(path: &std::path::Path) -> io::Result<OwnedFd> {
    let other_file = || io::Error::new(io::ErrorKind::InvalidInput, "not a network namespace");
    let found = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    if rustix::fs::fstatfs(&found)?.f_type != NSFS_MAGIC {
        return Err(other_file());
    }
    let same_file = format!("/proc/thread-self/fd/{}", found.as_raw_fd());
    let file = rustix::fs::open(same_file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    match namespace_type(file.as_fd()) {
        Some(libc::CLONE_NEWNET) => Ok(file),
        _ => Err(other_file()),
    }
}

/// The file system of namespaces (`linux/magic.h`).
const NSFS_MAGIC: rustix::fs::FsWord = 0x6e73_6673;

fn namespace_type(file: BorrowedFd<'_>) -> Option<libc::c_int> {
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    // SAFETY: NS_GET_NSTYPE takes no argument and writes no memory; on other files it fails (ioctl_ns(2)).
    let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
    (kind >= 0).then_some(kind)
}

/// A directory that stays empty: it is deleted, so nothing can be created in it. As the root of a holder it keeps
/// programs that look for the container's files at `/proc/<pid>/root`, such as `nerdctl cp`, from the files of the
/// host.
fn empty_directory() -> io::Result<OwnedFd> {
    static OPENED: Mutex<Option<OwnedFd>> = Mutex::new(None);
    let mut opened = OPENED.lock();
    if let Some(directory) = &*opened {
        return directory.try_clone();
    }
    let name = format!("/run/nutshell-empty-{}", rustix::process::getpid().as_raw_nonzero());
    match rustix::fs::mkdir(&name, Mode::from_raw_mode(0o755)) {
        // Left by a process with this pid that was killed.
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let directory = rustix::fs::open(&name, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    rustix::fs::rmdir(&name)?;
    let directory = directory?;
    let copy = directory.try_clone()?;
    *opened = Some(directory);
    Ok(copy)
}

/// Blocks all signals on this thread until it is dropped.
struct SignalsBlocked(SigSet);

impl SignalsBlocked {
    fn all() -> io::Result<Self> {
        Ok(Self(SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK)?))
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // Cannot fail for a mask that the kernel returned (sigprocmask(2)).
        let _ = self.0.thread_set_mask();
    }
}

/// The main function of a holder. It shares all memory with the shim, including the thread-local storage of the thread
/// that started it. So it makes plain system calls and nothing else: no allocation, no `errno`.
extern "C" fn run_holder(parameters: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `PidHolder::spawn` passes its `HolderParameters`, which outlive this process and are not written.
    let parameters = unsafe { &*parameters.cast::<HolderParameters>() };
    match prepare(parameters) {
        Ok(()) => {
            // All descriptors of the shim but the pipe are closed before the report, and the pipe after it.
            let report = register(parameters.report);
            if report > 0 {
                system_call(libc::SYS_close_range, [0, report - 1, 0, 0]);
            }
            system_call(libc::SYS_close_range, [report + 1, usize::MAX >> 32, 0, 0]);
            report_errno(parameters.report, 0);
            system_call(libc::SYS_close_range, [report, report, 0, 0]);
            loop {
                system_call(libc::SYS_ppoll, [0; 4]);
            }
        }
        Err(errno) => {
            report_errno(parameters.report, errno);
            1
        }
    }
}

fn prepare(parameters: &HolderParameters) -> Result<(), u8> {
    check(system_call(
        libc::SYS_prctl,
        [register(libc::PR_SET_PDEATHSIG), register(libc::SIGKILL), 0, 0],
    ))?;
    if system_call(libc::SYS_getppid, [0; 4]) != i64::from(parameters.parent) {
        return Err(ERRNO_ORPHANED);
    }
    let name = c"nutshell-holder".as_ptr().addr();
    check(system_call(libc::SYS_prctl, [register(libc::PR_SET_NAME), name, 0, 0]))?;
    if parameters.namespace >= 0 {
        check(system_call(
            libc::SYS_setns,
            [register(parameters.namespace), register(libc::CLONE_NEWNET), 0, 0],
        ))?;
    }
    check(system_call(libc::SYS_fchdir, [register(parameters.root), 0, 0, 0]))?;
    let here = c".".as_ptr().addr();
    check(system_call(libc::SYS_chroot, [here, 0, 0, 0]))?;
    // SIGTERM and SIGKILL kill the holder; all other signals are blocked.
    let default_action = [0_usize; 4];
    check(system_call(
        libc::SYS_rt_sigaction,
        [
            register(libc::SIGTERM),
            default_action.as_ptr().addr(),
            0,
            SIGNAL_SET_BYTES,
        ],
    ))?;
    let all_but_term = !(1_u64 << (libc::SIGTERM - 1));
    check(system_call(
        libc::SYS_rt_sigprocmask,
        [
            register(libc::SIG_SETMASK),
            ptr::from_ref(&all_but_term).addr(),
            0,
            SIGNAL_SET_BYTES,
        ],
    ))?;
    check(system_call(
        libc::SYS_prctl,
        [register(libc::PR_SET_NO_NEW_PRIVS), 1, 0, 0],
    ))?;
    let filter = libc::sock_fprog {
        len: u16::try_from(parameters.filter.len()).unwrap_or(0),
        filter: parameters.filter.as_ptr().cast_mut(),
    };
    check(system_call(
        libc::SYS_seccomp,
        [
            libc::SECCOMP_SET_MODE_FILTER as usize,
            0,
            ptr::from_ref(&filter).addr(),
            0,
        ],
    ))
}

/// The size of the kernel's signal set, in bytes (rt_sigaction(2)).
const SIGNAL_SET_BYTES: usize = 8;

/// ESRCH: the shim died before PR_SET_PDEATHSIG was in effect.
const ERRNO_ORPHANED: u8 = 3;

fn report_errno(report: RawFd, errno: u8) {
    system_call(libc::SYS_write, [register(report), ptr::from_ref(&errno).addr(), 1, 0]);
}

fn check(result: i64) -> Result<(), u8> {
    if result < 0 {
        Err(u8::try_from(-result).unwrap_or(u8::MAX))
    } else {
        Ok(())
    }
}

/// A non-negative C integer as a system call argument.
fn register(value: libc::c_int) -> usize {
    value.unsigned_abs() as usize
}

/// Makes a system call with at most four arguments; the fifth is 0. Returns the kernel's result: a negative errno on
/// failure. Only for the calls above, whose pointers are to live values of the right size.
fn system_call(number: libc::c_long, arguments: [usize; 4]) -> i64 {
    let result;
    // SAFETY: the x86-64 system call convention: number and result in rax, rcx and r11 clobbered. The calls made here
    // write no memory of this process.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            // prctl(2) refuses another value.
            in("r8") 0_usize,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::fs::MetadataExt, path::Path};

    use super::*;

    fn network_namespace_of(pid: u32) -> u64 {
        std::fs::metadata(format!("/proc/{pid}/ns/net")).unwrap().ino()
    }

    #[tokio::test]
    async fn holder_is_a_separate_process_without_descriptors() {
        let holder = PidHolder::spawn(&NetworkNamespace::Inherited).unwrap();
        let status = std::fs::read_to_string(format!("/proc/{}/status", holder.pid())).unwrap();

        assert!(
            status.contains(&format!("\nPPid:\t{}\n", std::process::id())),
            "{status}"
        );
        assert!(status.contains(&format!("\nTgid:\t{}\n", holder.pid())), "{status}");
        assert!(status.starts_with("Name:\tnutshell-holder\n"), "{status}");
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", holder.pid())).unwrap();
        // The holder closes the pipe of its report only after the report.
        assert!(descriptors.count() <= 1);
        assert_eq!(
            network_namespace_of(holder.pid()),
            network_namespace_of(std::process::id())
        );
    }

    #[tokio::test]
    async fn holder_has_its_list_of_system_calls() {
        let holder = PidHolder::spawn(&NetworkNamespace::New).unwrap();
        let status = std::fs::read_to_string(format!("/proc/{}/status", holder.pid())).unwrap();
        for line in ["NoNewPrivs:\t1\n", "Seccomp:\t2\n", "Seccomp_filters:\t1\n"] {
            assert!(status.contains(line), "{status}");
        }
    }

    #[tokio::test]
    async fn root_of_a_holder_is_empty_and_cannot_be_written() {
        let holder = PidHolder::spawn(&NetworkNamespace::Inherited).unwrap();
        let root = format!("/proc/{}/root", holder.pid());
        assert_eq!(std::fs::read_dir(format!("{root}/.")).unwrap().count(), 0);
        assert!(std::fs::write(format!("{root}/file"), "text").is_err());
        assert!(std::fs::metadata(format!("{root}/etc/passwd")).is_err());
        assert!(std::fs::metadata(format!("{root}/../etc/passwd")).is_err());
    }

    #[tokio::test]
    async fn new_and_joined_network_namespaces_are_in_place_when_spawn_returns() {
        let first = PidHolder::spawn(&NetworkNamespace::New).unwrap();
        assert_ne!(
            network_namespace_of(first.pid()),
            network_namespace_of(std::process::id())
        );

        let namespace = open_network_namespace(Path::new(&format!("/proc/{}/ns/net", first.pid()))).unwrap();
        let second = PidHolder::spawn(&NetworkNamespace::Join(namespace)).unwrap();
        assert_eq!(network_namespace_of(second.pid()), network_namespace_of(first.pid()));
    }

    #[test]
    fn files_other_than_network_namespaces_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let fifo = fifo.display().to_string();
        for path in ["/proc/self/ns/mnt", "/dev/null", "/no/such/file", &fifo] {
            // A call that opens the fifo would wait for a writer.
            let (sender, opened) = std::sync::mpsc::channel();
            let copy = path.to_owned();
            std::thread::spawn(move || sender.send(open_network_namespace(Path::new(&copy))));
            let opened = opened.recv_timeout(std::time::Duration::from_secs(20));
            assert!(opened.expect("it waits").is_err(), "{path}");
        }
        open_network_namespace(Path::new("/proc/self/ns/net")).unwrap();
    }

    #[tokio::test]
    async fn term_and_kill_end_a_holder_and_other_signals_do_not() {
        for (signal, number) in [(Signal::TERM, 15), (Signal::KILL, 9)] {
            let holder = PidHolder::spawn(&NetworkNamespace::Inherited).unwrap();
            holder.child.signal(Signal::HUP);
            holder.child.signal(Signal::INT);
            holder.child.signal(signal);
            assert_eq!(holder.signalled().await, Some(number));
            assert!(std::fs::exists(format!("/proc/{}", holder.pid())).unwrap());
        }
    }

    #[tokio::test]
    async fn released_holder_is_reaped_and_reports_no_signal() {
        let holder = PidHolder::spawn(&NetworkNamespace::Inherited).unwrap();
        let proc = format!("/proc/{}", holder.pid());
        holder.release();
        assert!(!std::fs::exists(proc).unwrap());
        assert_eq!(holder.signalled().await, None);
    }

    #[tokio::test]
    async fn failure_to_join_is_reported_with_its_errno() {
        let not_a_namespace = File::open("/dev/null").unwrap();
        let error = PidHolder::spawn(&NetworkNamespace::Join(not_a_namespace.into())).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}
