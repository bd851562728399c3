//! The pid on the host of a process that runs in the guest.
//!
//! containerd and its clients want a live pid for each task, whose `/proc/<pid>/ns/net` is the
//! network namespace of the container and which `ps` knows. A holder is the smallest process that
//! can be: it shares the shim's memory (so no page table is copied and nothing is executed), has no
//! descriptor, and sleeps. Each init and each exec has one, so that no pid that is ever reported
//! names somebody else's process. Whoever kills a holder means the process it stands for:
//! [`PidHolder::signalled`] tells.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    ptr,
    sync::atomic::{AtomicBool, Ordering},
};

use nix::libc;
use nix::sys::signal::{SigSet, SigmaskHow};
use rustix::process::{Pid, Signal, WaitOptions};

use crate::shim::child::{Child, WaitStatus};

/// The network namespace that a holder lives in.
#[derive(Debug)]
pub(crate) enum NetworkNamespace {
    /// The shim's.
    Inherited,
    /// One of its own.
    New,
    /// This one.
    Join(OwnedFd),
}

/// A sleeping process.
#[derive(Debug)]
pub(crate) struct PidHolder {
    child: Child,
    released: AtomicBool,
    /// What the process runs on and reads; freed after it has ended.
    _memory: Box<Memory>,
}

/// Room for the process: its stack and what it is told.
#[derive(Debug)]
#[repr(C, align(16))]
struct Memory {
    stack: [u8; STACK],
    orders: Orders,
}

/// `hold` needs a few hundred bytes in a build without optimization.
const STACK: usize = 8 << 10;

#[derive(Debug)]
struct Orders {
    parent: libc::pid_t,
    namespace: RawFd,
    report: RawFd,
}

impl PidHolder {
    /// Starts a holder. To be called on a thread that lives as long as the shim: the kernel kills
    /// the holder with the thread that made it. Needs the runtime.
    pub(crate) fn spawn(namespace: &NetworkNamespace) -> io::Result<Self> {
        let (mut report, reporter) = io::pipe()?;
        let mut memory = Box::new(Memory {
            stack: [0; STACK],
            orders: Orders {
                // Pids fit in a pid_t: they come from one.
                parent: rustix::process::getpid().as_raw_nonzero().get(),
                namespace: match namespace {
                    NetworkNamespace::Join(namespace) => namespace.as_raw_fd(),
                    NetworkNamespace::Inherited | NetworkNamespace::New => -1,
                },
                report: reporter.as_raw_fd(),
            },
        });
        let flags = match namespace {
            NetworkNamespace::New => libc::CLONE_VM | libc::CLONE_NEWNET,
            NetworkNamespace::Inherited | NetworkNamespace::Join(_) => libc::CLONE_VM,
        };
        let child = {
            // A handler of the shim must not run in the holder, on the shim's memory.
            let _blocked = SignalsBlocked::all()?;
            let top = memory.stack.as_mut_ptr_range().end;
            // SAFETY: `hold` uses only `stack` and `orders`, both in `memory`, which is boxed and freed, by
            // `PidHolder` and the error path below, only after the process was reaped. It shares this address
            // space, but makes nothing but system calls and does not return to Rust code (see `hold`).
            let pid = unsafe {
                libc::clone(
                    hold,
                    top.cast(),
                    flags | libc::SIGCHLD,
                    ptr::from_mut(&mut memory.orders).cast(),
                )
            };
            if pid < 0 {
                return Err(io::Error::last_os_error());
            }
            Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidData)?
        };
        let child = Child::new(child).inspect_err(|_| {
            // Before `memory` is freed. Neither can fail for a child that was not waited for.
            let _ = rustix::process::kill_process(child, Signal::KILL);
            let _ = rustix::process::waitpid(Some(child), WaitOptions::empty());
        })?;
        let holder = Self {
            child,
            released: AtomicBool::new(false),
            _memory: memory,
        };
        drop(reporter);
        // Its word is one byte, an errno or 0; no byte means that it was killed at once.
        let mut word = [0];
        report.read_exact(&mut word)?;
        match word[0] {
            0 => Ok(holder),
            errno => Err(io::Error::from_raw_os_error(i32::from(errno))),
        }
    }

    /// Its pid on the host.
    pub(crate) fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Waits until somebody else kills the holder, and says with which signal; its pid stays taken.
    /// `None` once it was released.
    pub(crate) async fn signalled(&self) -> Option<u32> {
        let ended = self.child.wait().await;
        if self.released.load(Ordering::Relaxed) {
            return None;
        }
        match ended {
            Ok(WaitStatus::Killed(signal)) => Some(signal.unsigned_abs()),
            // It never exits by itself; whatever made it do so is treated as a kill.
            Ok(WaitStatus::Exited(_)) | Err(_) => Some(libc::SIGKILL.unsigned_abs()),
        }
    }

    /// Ends the process and frees its pid.
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

/// Opens a network namespace by its path (`/proc/<pid>/ns/net` or where CNI bound it).
pub(crate) fn open_network_namespace(path: &std::path::Path) -> io::Result<OwnedFd> {
    let file = File::open(path)?;
    if namespace_type(file.as_fd()) == Some(libc::CLONE_NEWNET) {
        Ok(file.into())
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "not a network namespace"))
    }
}

fn namespace_type(file: BorrowedFd<'_>) -> Option<libc::c_int> {
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    // SAFETY: NS_GET_NSTYPE takes no argument and writes no memory; on other files it fails
    // (ioctl_ns(2)).
    let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
    (kind >= 0).then_some(kind)
}

/// All signals, blocked on this thread while it lives.
struct SignalsBlocked(SigSet);

impl SignalsBlocked {
    fn all() -> io::Result<Self> {
        Ok(Self(SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK)?))
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // Cannot fail for a mask that the kernel returned before (sigprocmask(2)).
        let _ = self.0.thread_set_mask();
    }
}

/// The life of a holder. It shares all memory with the shim, the thread-local storage of the thread
/// that made it included, so it makes plain system calls and nothing else: no allocation, no `errno`.
extern "C" fn hold(orders: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `PidHolder::spawn` passes its `Orders`, which outlive this process, and does not write them.
    let orders = unsafe { &*orders.cast::<Orders>() };
    match prepare(orders) {
        Ok(()) => {
            // Whoever hears of it finds that it holds nothing of the shim's but the pipe, if that.
            let report = register(orders.report);
            if report > 0 {
                system_call(libc::SYS_close_range, [0, report - 1, 0, 0]);
            }
            system_call(libc::SYS_close_range, [report + 1, usize::MAX >> 32, 0, 0]);
            say(orders.report, 0);
            system_call(libc::SYS_close_range, [report, report, 0, 0]);
            loop {
                system_call(libc::SYS_pause, [0; 4]);
            }
        }
        Err(errno) => {
            say(orders.report, errno);
            1
        }
    }
}

fn prepare(orders: &Orders) -> Result<(), u8> {
    check(system_call(
        libc::SYS_prctl,
        [register(libc::PR_SET_PDEATHSIG), register(libc::SIGKILL), 0, 0],
    ))?;
    if system_call(libc::SYS_getppid, [0; 4]) != i64::from(orders.parent) {
        return Err(ERRNO_ORPHANED);
    }
    let name = c"nutshell-holder".as_ptr().addr();
    check(system_call(libc::SYS_prctl, [register(libc::PR_SET_NAME), name, 0, 0]))?;
    if orders.namespace >= 0 {
        check(system_call(
            libc::SYS_setns,
            [register(orders.namespace), register(libc::CLONE_NEWNET), 0, 0],
        ))?;
    }
    // SIGTERM ends the holder as SIGKILL does; nothing else reaches it.
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
    ))
}

/// The size of the kernel's signal set (rt_sigaction(2)).
const SIGNAL_SET_BYTES: usize = 8;

/// ESRCH: the shim died before its death could have killed the holder.
const ERRNO_ORPHANED: u8 = 3;

fn say(report: RawFd, errno: u8) {
    system_call(libc::SYS_write, [register(report), ptr::from_ref(&errno).addr(), 1, 0]);
}

fn check(result: i64) -> Result<(), u8> {
    if result < 0 {
        Err(u8::try_from(-result).unwrap_or(u8::MAX))
    } else {
        Ok(())
    }
}

/// A non-negative C integer as a register holds it.
fn register(value: libc::c_int) -> usize {
    value.unsigned_abs() as usize
}

/// One system call with at most four arguments. Returns what the kernel does: a negative errno on
/// failure. Only for the calls above, whose pointers are to living values of the right size.
fn system_call(number: libc::c_long, arguments: [usize; 4]) -> i64 {
    let result;
    // SAFETY: the x86-64 system call convention: number and result in rax, rcx and r11 clobbered.
    // The calls that are made write no memory of this process.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::MetadataExt, path::Path};

    use super::*;

    fn network_of(pid: u32) -> u64 {
        std::fs::metadata(format!("/proc/{pid}/ns/net")).unwrap().ino()
    }

    #[tokio::test]
    async fn holder_is_a_process_of_its_own_without_descriptors() {
        let holder = PidHolder::spawn(&NetworkNamespace::Inherited).unwrap();
        let status = std::fs::read_to_string(format!("/proc/{}/status", holder.pid())).unwrap();

        assert!(
            status.contains(&format!("\nPPid:\t{}\n", std::process::id())),
            "{status}"
        );
        assert!(status.contains(&format!("\nTgid:\t{}\n", holder.pid())), "{status}");
        assert!(status.starts_with("Name:\tnutshell-holder\n"), "{status}");
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", holder.pid())).unwrap();
        // The pipe by which it has reported may not be closed yet.
        assert!(descriptors.count() <= 1);
        assert_eq!(network_of(holder.pid()), network_of(std::process::id()));
    }

    #[tokio::test]
    async fn new_and_joined_network_namespaces_are_in_place_when_spawn_returns() {
        let first = PidHolder::spawn(&NetworkNamespace::New).unwrap();
        assert_ne!(network_of(first.pid()), network_of(std::process::id()));

        let namespace = open_network_namespace(Path::new(&format!("/proc/{}/ns/net", first.pid()))).unwrap();
        let second = PidHolder::spawn(&NetworkNamespace::Join(namespace)).unwrap();
        assert_eq!(network_of(second.pid()), network_of(first.pid()));
    }

    #[test]
    fn only_a_network_namespace_is_opened_as_one() {
        for path in ["/proc/self/ns/mnt", "/dev/null", "/no/such/file"] {
            assert!(open_network_namespace(Path::new(path)).is_err(), "{path}");
        }
        open_network_namespace(Path::new("/proc/self/ns/net")).unwrap();
    }

    #[tokio::test]
    async fn signals_that_kill_are_seen_and_others_are_not_felt() {
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
    async fn released_holder_is_gone_and_was_not_killed_by_anybody() {
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
