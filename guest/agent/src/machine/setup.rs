//! Prepares the guest once, before the agent connects to the host: mounts, limits, cgroup controllers, the
//! loopback interface.

use std::fs;
use std::io;

use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Resource, Rlimit};

use crate::cgroup;
use crate::sys;

/// A failed step of the setup.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up the guest: {step}: {source}")]
pub(crate) struct SetupError {
    step: String,
    source: io::Error,
}

trait Step<T> {
    fn step(self, step: impl Into<String>) -> Result<T, SetupError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: impl Into<String>) -> Result<T, SetupError> {
        self.map_err(|source| SetupError {
            step: step.into(),
            source: source.into(),
        })
    }
}

/// Prepares the guest, which is a bare initramfs, for containers.
pub(crate) fn set_up() -> Result<(), SetupError> {
    replace_root()?;
    open_standard_streams().step("open the standard streams")?;
    fs::write("/proc/self/oom_score_adj", "-1000").step("write oom_score_adj")?;
    raise_limits()?;
    cgroup::delegate_controllers().step("delegate cgroup controllers")?;
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None).step("open a socket")?;
    sys::bring_loopback_up(socket).step("bring lo up")
}

/// Replaces the initramfs by a tmpfs as root, and mounts the kernel's file systems in it.
///
/// Containers use pivot_root(2), which refuses the initramfs because that is the root of all mounts and cannot be
/// unmounted. So this moves a tmpfs over it, which a container can pivot away from and unmount. Neither chroot(2) nor
/// `..` leads to the initramfs, because the tmpfs covers the root of the mount tree.
fn replace_root() -> Result<(), SetupError> {
    const NEW_ROOT: &str = "/new";
    const RESTRICTED: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
    create_directory(NEW_ROOT)?;
    rustix::mount::mount(
        "tmpfs",
        NEW_ROOT,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        c"mode=755",
    )
    .step("mount the new root")?;
    // The initramfs has this program and the kernel's `/dev/console`. Nothing may write to the program through
    // `/proc/PID/exe`.
    let read_only = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID;
    rustix::mount::mount_remount("/", read_only, c"").step("make the initramfs read-only")?;
    rustix::process::chdir(NEW_ROOT).step("change to the new root")?;
    rustix::mount::mount_move(".", "/").step("move the new root")?;
    rustix::process::chroot(".").step("chroot to the new root")?;
    let mounts = [
        ("/proc", "proc", RESTRICTED, c""),
        ("/sys", "sysfs", RESTRICTED, c""),
        (
            "/sys/fs/cgroup",
            "cgroup2",
            RESTRICTED,
            c"nsdelegate,memory_recursiveprot",
        ),
        ("/dev", "devtmpfs", MountFlags::NOSUID | MountFlags::NOEXEC, c"mode=755"),
        (
            "/dev/pts",
            "devpts",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            c"gid=5,mode=620,ptmxmode=666",
        ),
        ("/dev/shm", "tmpfs", RESTRICTED, c"mode=1777"),
        ("/dev/mqueue", "mqueue", RESTRICTED, c""),
    ];
    for (target, kind, flags, data) in mounts {
        if target != "/sys/fs/cgroup" {
            create_directory(target)?;
        }
        rustix::mount::mount(kind, target, kind, flags, data).step(format!("mount {target}"))?;
    }
    create_directory("/run")?;
    create_directory("/run/nutshell")?;
    create_directory("/tmp")
}

fn create_directory(path: &str) -> Result<(), SetupError> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Err(rustix::io::Errno::EXIST) => Ok(()),
        result => result.step(format!("create {path}")),
    }
}

/// Opens `/dev/null` as those standard streams that are closed. The kernel opens none if it has no console.
fn open_standard_streams() -> io::Result<()> {
    loop {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty())?;
        let number = std::os::fd::AsRawFd::as_raw_fd(&null);
        if number > 2 {
            return Ok(());
        }
        // This descriptor is a standard stream and must stay open.
        let _ = std::os::fd::IntoRawFd::into_raw_fd(null);
    }
}

/// Raises the resource limits to those that a service manager usually sets for containerd. Containers inherit them
/// unless their spec sets others.
fn raise_limits() -> Result<(), SetupError> {
    const MAX_OPEN_FILES: u64 = 1 << 20;
    let both = |limit| Rlimit {
        current: limit,
        maximum: limit,
    };
    rustix::process::setrlimit(Resource::Nofile, both(Some(MAX_OPEN_FILES))).step("raise RLIMIT_NOFILE")?;
    rustix::process::setrlimit(Resource::Nproc, both(None)).step("raise RLIMIT_NPROC")?;
    // The kernel's default depends on the memory of the machine.
    rustix::process::setrlimit(Resource::Sigpending, both(None)).step("raise RLIMIT_SIGPENDING")
}
