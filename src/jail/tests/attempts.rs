//! What code in a compromised process would try. A jailed process must fail at all of it even without its list of
//! system calls, which is a second limit. Outside of the jail, each attempt succeeds or fails with another error, and
//! does no harm.

use std::{
    fs::File,
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::AsRawFd,
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream},
    },
    time::Duration,
};

use libc::c_long;

use super::*;

/// Sockets outside of the jail that accept every connection.
struct Outside {
    abstract_socket: UnixListener,
    listener: TcpListener,
}

/// What the process is told of them.
struct Target {
    /// The pid of the test on the host.
    pid: i32,
    name: String,
    port: u16,
}

impl Outside {
    fn open() -> Self {
        let name = format!("nutshell-jail-{}-{:?}", process::id(), std::thread::current().id());
        let address = UnixAddr::from_abstract_name(name).unwrap();
        Self {
            abstract_socket: UnixListener::bind_addr(&address).unwrap(),
            listener: TcpListener::bind("127.0.0.1:0").unwrap(),
        }
    }

    fn target(&self) -> Target {
        let address = self.abstract_socket.local_addr().unwrap();
        Target {
            pid: process::id().cast_signed(),
            name: String::from_utf8(address.as_abstract_name().unwrap().to_vec()).unwrap(),
            port: self.listener.local_addr().unwrap().port(),
        }
    }
}

impl Target {
    fn parse(words: &[&str]) -> Self {
        let [pid, name, port] = words else {
            panic!("pid, name and port expected: {words:?}")
        };
        Self {
            pid: pid.parse().unwrap(),
            name: (*name).to_owned(),
            port: port.parse().unwrap(),
        }
    }
}

struct Attempt {
    name: &'static str,
    run: fn(&Target) -> io::Result<()>,
    /// The errors that say that the jail has refused it.
    refused: &'static [i32],
}

const fn attempt(name: &'static str, refused: &'static [i32], run: fn(&Target) -> io::Result<()>) -> Attempt {
    Attempt { name, run, refused }
}

/// A system call with plain arguments.
fn call(number: c_long, arguments: [usize; 5]) -> io::Result<()> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: the calls below get numbers, null pointers, or pointers to values that live until they return.
    match unsafe { libc::syscall(number, a, b, c, d, e, 0_usize) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// A C integer as an argument, of which the kernel uses the lower 32 bits.
const fn register(value: i32) -> usize {
    value.cast_unsigned() as usize
}

const PERM: &[i32] = &[libc::EPERM];
const NO_SUCH_PROCESS: &[i32] = &[libc::ESRCH];
/// Landlock refuses a connection before the kernel finds that there is no network.
const NOT_REACHED: &[i32] = &[libc::ENETUNREACH, libc::ECONNREFUSED, libc::EACCES];
/// Landlock refuses before the kernel finds that there is no such file.
const NO_SUCH_FILE: &[i32] = &[libc::ENOENT, libc::EACCES];

const ATTEMPTS: &[Attempt] = &[
    attempt("read a file", NO_SUCH_FILE, |_| File::open("/etc/passwd").map(drop)),
    attempt("read /proc", NO_SUCH_FILE, |_| File::open("/proc/1/status").map(drop)),
    attempt("open a device", NO_SUCH_FILE, |_| File::open("/dev/null").map(drop)),
    attempt("open a file by its handle", PERM, |_| {
        // `struct file_handle`: 8 bytes, the type 1. Outside of the jail, there is no such file.
        let handle = [8_u32, 1, 0, 0];
        let pointer = handle.as_ptr().addr();
        call(
            libc::SYS_open_by_handle_at,
            [register(libc::AT_FDCWD), pointer, 0, 0, 0],
        )
    }),
    attempt("connect to an abstract socket", NOT_REACHED, |target| {
        UnixStream::connect_addr(&UnixAddr::from_abstract_name(&target.name)?).map(drop)
    }),
    attempt("connect to a port of the host", NOT_REACHED, |target| {
        let address = SocketAddr::from(([127, 0, 0, 1], target.port));
        TcpStream::connect_timeout(&address, Duration::from_secs(10)).map(drop)
    }),
    attempt("open a raw socket", PERM, |_| {
        call(
            libc::SYS_socket,
            [register(libc::AF_PACKET), register(libc::SOCK_RAW), 0, 0, 0],
        )
    }),
    attempt("signal the shim", NO_SUCH_PROCESS, |target| {
        call(libc::SYS_kill, [register(target.pid), 0, 0, 0, 0])
    }),
    attempt("signal every process", NO_SUCH_PROCESS, |_| {
        call(libc::SYS_kill, [register(-1), 0, 0, 0, 0])
    }),
    attempt("open the shim", NO_SUCH_PROCESS, |target| {
        call(libc::SYS_pidfd_open, [register(target.pid), 0, 0, 0, 0])
    }),
    attempt("read the shim's memory", NO_SUCH_PROCESS, |target| {
        let mut byte = 0_u8;
        let local = libc::iovec {
            iov_base: ptr::from_mut(&mut byte).cast(),
            iov_len: 1,
        };
        let pointer = ptr::from_ref(&local).addr();
        // Outside of the jail, the shim may have something else at this address, or nothing.
        call(
            libc::SYS_process_vm_readv,
            [register(target.pid), pointer, 1, pointer, 1],
        )
    }),
    attempt("trace the shim", NO_SUCH_PROCESS, |target| {
        // Outside of the jail, the options are invalid.
        call(libc::SYS_ptrace, [0x4206, register(target.pid), 0, usize::MAX, 0])
    }),
    attempt("read the shim's list of locks", NO_SUCH_PROCESS, |target| {
        call(libc::SYS_get_robust_list, [register(target.pid), 0, 0, 0, 0])
    }),
    attempt("read the priority of the shim", NO_SUCH_PROCESS, |target| {
        call(libc::SYS_sched_getscheduler, [register(target.pid), 0, 0, 0, 0])
    }),
    attempt("make a mount", PERM, |_| {
        call(libc::SYS_fsopen, [c"tmpfs".as_ptr().addr(), 0, 0, 0, 0])
    }),
    attempt("copy a mount", PERM, |_| {
        let here = c"/".as_ptr().addr();
        call(libc::SYS_open_tree, [register(libc::AT_FDCWD), here, 1, 0, 0])
    }),
    attempt("change the root", PERM, |_| {
        call(libc::SYS_chroot, [c"/".as_ptr().addr(), 0, 0, 0, 0])
    }),
    attempt("make a mount namespace", PERM, |_| {
        call(libc::SYS_unshare, [register(libc::CLONE_NEWNS), 0, 0, 0, 0])
    }),
    attempt("make a network namespace", PERM, |_| {
        call(libc::SYS_unshare, [register(libc::CLONE_NEWNET), 0, 0, 0, 0])
    }),
    attempt("set the host name", PERM, |_| {
        call(libc::SYS_sethostname, [0, usize::MAX, 0, 0, 0])
    }),
    attempt("switch the host off", PERM, |_| call(libc::SYS_reboot, [0; 5])),
    attempt("read the kernel's log", PERM, |_| {
        const SIZE_UNREAD: usize = 9;
        call(libc::SYS_syslog, [SIZE_UNREAD, 0, 0, 0, 0])
    }),
    attempt("use a file as swap", PERM, |_| {
        call(libc::SYS_swapon, [c"/no/such/file".as_ptr().addr(), 0, 0, 0, 0])
    }),
    attempt("count events of all processes", &[libc::EACCES, libc::EPERM], |_| {
        // `struct perf_event_attr` of version 0: a software event, the CPU clock.
        let mut attributes = [0_u64; 8];
        attributes[0] = 1 | 64 << 32;
        let pointer = attributes.as_ptr().addr();
        call(libc::SYS_perf_event_open, [pointer, register(-1), 0, register(-1), 0])
    }),
    attempt("gain priority", &[libc::EACCES, libc::EPERM], |_| {
        call(libc::SYS_setpriority, [0, 0, register(-5), 0, 0])
    }),
    attempt("become a real-time process", PERM, |_| {
        let priority = 1_i32;
        let pointer = ptr::from_ref(&priority).addr();
        call(
            libc::SYS_sched_setscheduler,
            [0, register(libc::SCHED_FIFO), pointer, 0, 0],
        )
    }),
    attempt("raise a limit", PERM, |_| {
        let limit = [4096_u64; 2];
        call(
            libc::SYS_prlimit64,
            [0, libc::RLIMIT_CORE as usize, limit.as_ptr().addr(), 0, 0],
        )
    }),
    attempt("lock memory", &[libc::EPERM, libc::ENOMEM], |_| {
        let value = 0_u64;
        call(libc::SYS_mlock, [ptr::from_ref(&value).addr(), 8, 0, 0, 0])
    }),
    attempt(
        "enter a mount namespace",
        &[libc::EPERM, libc::ENOENT, libc::EACCES],
        |_| {
            let own = File::open("/proc/self/ns/mnt")?;
            call(
                libc::SYS_setns,
                [register(own.as_raw_fd()), register(libc::CLONE_NEWNS), 0, 0, 0],
            )
        },
    ),
    attempt("unmount the root", PERM, |_| {
        // Outside of the jail, this flag is invalid for the root.
        call(
            libc::SYS_umount2,
            [c"/".as_ptr().addr(), register(libc::MNT_EXPIRE), 0, 0, 0],
        )
    }),
    attempt("gain capabilities", PERM, |_| {
        let more = CapabilitySet::SYS_ADMIN | CapabilitySet::KILL;
        let sets = CapabilitySets {
            effective: more,
            permitted: more,
            inheritable: CapabilitySet::empty(),
        };
        Ok(rustix::thread::set_capabilities(None, sets)?)
    }),
    // The last attempt, because it changes the credentials outside of the jail.
    attempt("make a user namespace", PERM, |_| {
        call(libc::SYS_unshare, [register(libc::CLONE_NEWUSER), 0, 0, 0, 0])
    }),
];

/// Answers `attempt PID NAME PORT ATTEMPT` with the error number, or 0.
pub(super) fn answer(words: &str) -> String {
    let words: Vec<_> = words.splitn(4, ' ').collect();
    let (name, target) = words.split_last().unwrap();
    let attempt = ATTEMPTS.iter().find(|attempt| attempt.name == *name).unwrap();
    let error = (attempt.run)(&Target::parse(target)).err();
    error.map_or(0, |error| error.raw_os_error().unwrap()).to_string()
}

/// The attempts that are refused if `are_refused`, otherwise all others, each with its error number.
fn attempts(jailed: &mut JailedChild, are_refused: bool) -> Vec<String> {
    let outside = Outside::open();
    let Target { pid, name, port } = outside.target();
    let mut found = Vec::new();
    for attempt in ATTEMPTS {
        let answer = jailed.ask(&format!("attempt {pid} {name} {port} {}", attempt.name));
        if attempt.refused.contains(&answer.parse().unwrap()) == are_refused {
            found.push(format!("{}: error {answer}", attempt.name));
        }
    }
    found
}

#[test]
fn compromised_process_without_its_list_gets_nothing() {
    for role in ["jail-empty", "jail-capable"] {
        let mut jailed = JailedChild::jailed(role);
        assert_eq!(attempts(&mut jailed, false), [""; 0], "{role}");
    }
}

/// The file server could take this user id, as it has `CAP_SETUID`.
#[test]
fn compromised_file_server_gets_nothing_as_uid_0() {
    let mut jailed = JailedChild::jailed("jail-capable");
    assert!(jailed.ask("uid 0").starts_with("true"));
    assert_eq!(attempts(&mut jailed, false), [""; 0]);
}

/// Otherwise the tests above would pass whatever the jail does.
#[test]
fn attempts_are_not_refused_outside_of_the_jail() {
    let mut command = Command::new("/proc/self/exe");
    command.arg("jail-none").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut free = JailedChild::new(command.spawn().unwrap());
    assert_eq!(free.answer(), "free");
    assert_eq!(attempts(&mut free, true), [""; 0]);
}
