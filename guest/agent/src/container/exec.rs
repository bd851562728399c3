//! The job that runs an additional process in a container.
//!
//! libcontainer could do that, but it does not apply the container's seccomp filter to such processes, and it parses
//! and validates the whole spec again.
//!
//! The job enters the container's namespaces and forks a sibling, which starts in these namespaces and in the
//! container's cgroup and executes the program. If it fails, it writes the error text to a pipe; if it succeeds, the
//! pipe is closed without data.

use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use libcontainer::capabilities;
use libcontainer::syscall::syscall::SyscallType;
use nutshell_linux::go_text::error_text;
use nutshell_protocol::{Failure, StartExec};
use oci_spec::runtime::{LinuxCapabilities, LinuxNamespaceType, LinuxSeccomp, Process, Spec};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Gid, Pid, Uid};
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType, move_into_link_name_space, move_into_thread_name_spaces};

use super::program::{Program, ResolvedProgram};
use super::{scheduling, spec};
use crate::cgroup::{self, Cgroup};
use crate::failure::{Context, FailureExt};
use crate::job::Outcome;
use crate::stdio::{self, ProcessEnds};
use crate::sys;

/// The container in which the process runs.
#[derive(Debug)]
pub(crate) struct TargetContainer<'a> {
    /// Its spec as received, in JSON.
    pub(crate) spec: &'a [u8],
    /// The pid of its first process.
    pub(crate) init: Pid,
    /// A pidfd of its first process.
    pub(crate) pidfd: BorrowedFd<'a>,
    pub(crate) cgroup: &'a Cgroup,
}

/// Starts the process. Returns it and the master of its terminal.
pub(crate) fn exec(
    request: &StartExec,
    target: &TargetContainer<'_>,
    process_ends: &ProcessEnds,
) -> Result<(Outcome, Option<OwnedFd>), Failure> {
    let spec = spec::parse(target.spec)?;
    let mut process: Process = serde_json::from_slice(&request.process)
        .map_err(|error| Failure::invalid(format!("cannot parse the exec's process: {error}")))?;
    spec::clean_process(&mut process, request.stdio.terminal);
    let settings = ProcessSettings::new(&spec, process)?;
    process_ends
        .set_owner(settings.outer_uid)
        .context(|| "set the owner of the standard streams".to_owned())?;
    fs::write("/proc/self/oom_score_adj", settings.oom_score.to_string())
        .context(|| format!("set oom_score_adj to {}", settings.oom_score))?;
    let cgroup = open_directory(target.cgroup.path())
        .context(|| format!("open the cgroup {}", target.cgroup.path().display()))?;
    // If the container has enabled controllers for cgroups below its own, its own may not contain processes (cgroup v2,
    // "No Internal Process Constraint"). Then the process joins the cgroup of the first process.
    let init_cgroup = cgroup::of_process(target.init).and_then(|cgroup| open_directory(cgroup.path()));

    let late_namespaces = LateNamespaces::open(target.init, settings.has_user_namespace)
        .context(|| format!("open the namespaces of container {}", request.container))?;

    let own_descriptors = open_directory(Path::new("/proc/self/fd")).context(|| "open /proc/self/fd".to_owned())?;
    sys::set_undumpable().context(|| "hide the agent's memory".to_owned())?;
    let mut kinds = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::PROCESS_ID
        | ThreadNameSpaceType::NETWORK
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME;
    if settings.has_time_namespace {
        kinds |= ThreadNameSpaceType::TIME;
    }
    move_into_thread_name_spaces(target.pidfd, kinds)
        .context(|| format!("enter the namespaces of container {}", request.container))?;

    let null = open_null(&own_descriptors);
    let terminal = request
        .stdio
        .terminal
        .then(|| open_terminal(request.stdio.size, settings.outer_uid))
        .transpose();
    let terminal = terminal.context(|| format!("open a terminal in container {}", request.container))?;
    let slave = terminal.as_ref().map(|(_, slave)| slave);
    let (error_reader, error_writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
        .context(|| "open the pipe for an error of the process".to_owned())?;
    let forked = match (sys::fork_sibling_into(cgroup.as_fd()), &init_cgroup) {
        (Err(error), Ok(init_cgroup)) if error.raw_os_error() == Some(libc::EBUSY) => {
            sys::fork_sibling_into(init_cgroup.as_fd())
        }
        (result, _) => result,
    };
    let Some(pid) = forked.context(|| format!("fork exec {} of container {}", request.exec, request.container))? else {
        let streams = Streams::of(process_ends, slave, null.as_ref());
        let Err(error) = become_program(&settings, &late_namespaces, &streams, &error_writer);
        let _ = rustix::io::write(&error_writer, error.as_bytes());
        sys::exit_now(255)
    };
    drop(error_writer);
    await_program(error_reader, request)?;
    let outcome = Outcome::Process { pid: sys::raw_pid(pid) };
    Ok((outcome, terminal.map(|(master, _)| master)))
}

/// Waits until the forked process executes its program. Returns its error if it does not. The caller has closed its
/// writer of the pipe.
pub(super) fn await_program(error_reader: OwnedFd, request: &StartExec) -> Result<(), Failure> {
    let mut error = String::new();
    File::from(error_reader).read_to_string(&mut error).context(|| {
        format!(
            "wait for exec {} of container {} to start",
            request.exec, request.container
        )
    })?;
    match error.is_empty() {
        true => Ok(()),
        false => Err(Failure::internal(error)),
    }
}

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// The settings of the process: those of the request, or those of the container if the request has none.
#[derive(Debug)]
struct ProcessSettings {
    process: Process,
    program: Program,
    capabilities: LinuxCapabilities,
    seccomp: Option<LinuxSeccomp>,
    umask: Option<u32>,
    oom_score: i32,
    outer_uid: u32,
    has_user_namespace: bool,
    has_time_namespace: bool,
}

impl ProcessSettings {
    fn new(spec: &Spec, process: Process) -> Result<Self, Failure> {
        let program = Program::of(&process)?;
        let init = spec.process().as_ref();
        let linux = spec
            .linux()
            .as_ref()
            .ok_or_else(|| Failure::invalid("the OCI spec has no linux section"))?;
        let has = |kind| {
            linux
                .namespaces()
                .iter()
                .flatten()
                .any(|namespace| namespace.typ() == kind)
        };
        Ok(Self {
            capabilities: spec::complete_capabilities(
                process
                    .capabilities()
                    .clone()
                    .or_else(|| init.and_then(|init| init.capabilities().clone())),
            ),
            seccomp: linux.seccomp().clone(),
            umask: process
                .user()
                .umask()
                .or_else(|| init.and_then(|init| init.user().umask())),
            oom_score: process
                .oom_score_adj()
                .or_else(|| init.and_then(Process::oom_score_adj))
                .unwrap_or(0),
            outer_uid: spec::outer_uid(linux, program.uid),
            has_user_namespace: has(LinuxNamespaceType::User),
            has_time_namespace: has(LinuxNamespaceType::Time),
            program,
            process,
        })
    }
}

/// Opens a new terminal of the devpts in `/dev/pts`. Returns its master and slave.
pub(super) fn open_terminal(size: Option<(u16, u16)>, uid: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    /// `DEVPTS_SUPER_MAGIC` of `linux/magic.h`.
    const DEVPTS: i64 = 0x1cd1;
    /// The inode number of `ptmx` in a devpts (kernel, `mknod_ptmx` in fs/devpts/inode.c).
    const PTMX_INODE: u64 = 2;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let master = rustix::fs::open("/dev/pts/ptmx", flags, Mode::empty())?;
    // The container may have replaced the file.
    if rustix::fs::fstatfs(&master)?.f_type != DEVPTS || rustix::fs::fstat(&master)?.st_ino != PTMX_INODE {
        return Err(io::Error::other("/dev/pts/ptmx is not a terminal device"));
    }
    rustix::pty::unlockpt(&master)?;
    let slave = stdio::set_up_terminal(&master, size, uid)?;
    Ok((master, slave))
}

/// Opens the container's `/dev/null`, in the container's mount namespace. `own_descriptors` is the agent's
/// `/proc/self/fd` of this process: the `/proc` of the container may show anything. Returns `None` if the container has
/// replaced the device.
///
/// The process must not have the agent's `/dev/null`: a file at a mount of the agent cannot be opened again as
/// `/dev/stdout` (guest/kernel/patches/required/agent-mounts.patch).
fn open_null(own_descriptors: &OwnedFd) -> Option<OwnedFd> {
    /// The numbers of the device (kernel, Documentation/admin-guide/devices.txt).
    const NULL: (u32, u32) = (1, 3);
    let found = rustix::fs::open(
        "/dev/null",
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .ok()?;
    let status = rustix::fs::fstat(&found).ok()?;
    let is_character = FileType::from_raw_mode(status.st_mode) == FileType::CharacterDevice;
    let numbers = (rustix::fs::major(status.st_rdev), rustix::fs::minor(status.st_rdev));
    if !is_character || numbers != NULL {
        return None;
    }
    let number = found.as_raw_fd().to_string();
    rustix::fs::openat(own_descriptors, number, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// The standard streams of a process.
pub(super) struct Streams<'a> {
    descriptors: [BorrowedFd<'a>; 3],
    terminal: Option<BorrowedFd<'a>>,
}

impl<'a> Streams<'a> {
    /// The streams are those of `terminal`, if there is one. Otherwise they are the pipes of `process_ends`, and `null`
    /// in place of its `/dev/null`, if there is one.
    pub(super) fn of(process_ends: &'a ProcessEnds, terminal: Option<&'a OwnedFd>, null: Option<&'a OwnedFd>) -> Self {
        let mut descriptors = process_ends.descriptors();
        for (descriptor, is_pipe) in descriptors.iter_mut().zip(process_ends.pipes) {
            if let (Some(null), false) = (null, is_pipe) {
                *descriptor = null.as_fd();
            }
        }
        if let Some(terminal) = terminal {
            descriptors = [terminal.as_fd(); 3];
        }
        Self {
            descriptors,
            terminal: terminal.map(OwnedFd::as_fd),
        }
    }
}

/// The namespaces that only the forked process enters: a caller inside the cgroup namespace could not fork it into the
/// cgroup, and one inside the user namespace could not take the next steps.
///
/// The process cannot enter them by the container's pidfd: it is in the container's pid namespace, from which no
/// process of the agent can be accessed, and the first process is one until it executes its program
/// (guest/kernel/patches/required/agent-processes.patch).
#[derive(Debug)]
struct LateNamespaces {
    cgroup: OwnedFd,
    user: Option<OwnedFd>,
}

impl LateNamespaces {
    /// Opens those of the container whose first process is `init`. Another process may have its number by now, so the
    /// caller must then enter the container's other namespaces by its pidfd, which fails if `init` has ended.
    fn open(init: Pid, has_user_namespace: bool) -> io::Result<Self> {
        let open = |name| {
            let path = format!("/proc/{}/ns/{name}", init.as_raw_nonzero());
            rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        };
        Ok(Self {
            cgroup: open("cgroup")?,
            user: has_user_namespace.then(|| open("user")).transpose()?,
        })
    }

    fn enter(&self) -> Result<(), String> {
        move_into_link_name_space(self.cgroup.as_fd(), Some(LinkNameSpaceType::ControlGroup))
            .describe(|| "enter the container's cgroup namespace".to_owned())?;
        if let Some(user) = &self.user {
            move_into_link_name_space(user.as_fd(), Some(LinkNameSpaceType::User))
                .describe(|| "enter the container's user namespace".to_owned())?;
            set_ids(0, 0)?;
        }
        Ok(())
    }
}

/// Turns the forked process into the program. Each step comes before those that drop the privilege that it needs.
fn become_program(
    settings: &ProcessSettings,
    late_namespaces: &LateNamespaces,
    streams: &Streams<'_>,
    error_writer: &OwnedFd,
) -> Result<Infallible, String> {
    let syscall = SyscallType::Linux.create_syscall();
    let user = settings.process.user();
    begin_session(streams)?;
    late_namespaces.enter()?;
    // Paths in the container, such as `/proc/self/fd/…`, must not lead to descriptors of the agent.
    sys::close_all_but(&[error_writer.as_fd()]);

    if let Some(priority) = settings.process.io_priority() {
        scheduling::set_io_priority(priority).describe(|| "set the io priority".to_owned())?;
    }
    if let Some(scheduler) = settings.process.scheduler() {
        scheduling::set_scheduler(scheduler).describe(|| "set the scheduler".to_owned())?;
    }
    for limit in settings.process.rlimits().iter().flatten() {
        syscall
            .set_rlimit(limit)
            .describe(|| format!("set rlimit {}", limit.typ()))?;
    }
    if settings.process.no_new_privileges() == Some(true) {
        rustix::thread::set_no_new_privs(true).describe(|| "set no_new_privs".to_owned())?;
    }
    if let Some(umask) = settings.umask {
        rustix::process::umask(Mode::from_raw_mode(umask));
    }
    // Enter the directory as root first. If that fails, try again as the user, below: the user may have access where
    // root has none (a FUSE mount).
    let chdir_result = enter_directory(&settings.program.cwd);
    let groups: Vec<_> = user
        .additional_gids()
        .iter()
        .flatten()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    rustix::thread::set_thread_groups(&groups).describe(|| "set the additional groups".to_owned())?;
    set_ids(user.uid(), user.gid())?;
    // The change to a user other than root has cleared the effective capabilities (capabilities(7)). Without
    // no_new_privs, seccomp(2) needs CAP_SYS_ADMIN.
    capabilities::reset_effective(&*syscall).describe(|| "set the capabilities".to_owned())?;
    let has_late_filter = settings.process.no_new_privileges() == Some(true);
    if !has_late_filter {
        load_seccomp(settings)?;
    }
    capabilities::drop_privileges(&settings.capabilities, &*syscall).describe(|| "set the capabilities".to_owned())?;
    chdir_result
        .or_else(|_| enter_directory(&settings.program.cwd))
        .map_err(|error| {
            let error = error_text(&error.into());
            format!(
                "chdir to cwd ({:?}) set in config.json failed: {error}",
                settings.program.cwd
            )
        })?;
    let resolved = ResolvedProgram::find(&settings.program)?;
    if has_late_filter {
        load_seccomp(settings)?;
    }
    Err(resolved.execute())
}

/// Starts a session of the calling process, with its controlling terminal if it has one, and sets its standard streams.
pub(super) fn begin_session(streams: &Streams<'_>) -> Result<(), String> {
    rustix::process::setsid().describe(|| "setsid".to_owned())?;
    if let Some(terminal) = streams.terminal {
        sys::set_controlling_terminal(terminal).describe(|| "set the controlling terminal".to_owned())?;
    }
    let [stdin, stdout, stderr] = streams.descriptors;
    rustix::stdio::dup2_stdin(stdin)
        .and_then(|()| rustix::stdio::dup2_stdout(stdout))
        .and_then(|()| rustix::stdio::dup2_stderr(stderr))
        .describe(|| "set the standard streams".to_owned())
}

/// Changes to `cwd`, which must be inside the container's root.
pub(super) fn enter_directory(cwd: &Path) -> Result<(), Errno> {
    rustix::process::chdir(cwd)?;
    // For a directory outside of the root, the kernel returns a path that does not begin with "/".
    let is_inside = rustix::process::getcwd(Vec::new())?.as_bytes().starts_with(b"/");
    if is_inside { Ok(()) } else { Err(Errno::NOENT) }
}

/// Changes the user and group, and keeps the permitted capabilities.
fn set_ids(uid: u32, gid: u32) -> Result<(), String> {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_keep_capabilities(true)
        .and_then(|()| rustix::thread::set_thread_res_gid(group, group, group))
        .and_then(|()| rustix::thread::set_thread_res_uid(user, user, user))
        .and_then(|()| rustix::thread::set_keep_capabilities(false))
        .describe(|| format!("become user {uid}:{gid}"))
}

fn load_seccomp(settings: &ProcessSettings) -> Result<(), String> {
    let Some(filter) = &settings.seccomp else { return Ok(()) };
    libcontainer::seccomp::initialize_seccomp(filter)
        .describe(|| "load the seccomp filter".to_owned())
        .map(drop)
}

/// Turns any error into a text that names the failed step.
pub(super) trait Describe<T> {
    fn describe(self, what: impl FnOnce() -> String) -> Result<T, String>;
}

impl<T, E: std::fmt::Display> Describe<T> for Result<T, E> {
    fn describe(self, what: impl FnOnce() -> String) -> Result<T, String> {
        self.map_err(|error| format!("{}: {error}", what()))
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::fd::AsRawFd, thread};

    use rustix::mount::{MountFlags, MountPropagationFlags};

    use super::*;

    /// In another agent, a link of `/proc` led the working directory out of the container.
    #[test]
    fn working_directory_outside_of_the_root_is_refused_kata_13587() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("proc")).unwrap();
        fs::create_dir(root.path().join("inside")).unwrap();
        let outside = fs::File::open("/").unwrap();
        let link = format!("/proc/thread-self/fd/{}", outside.as_raw_fd());

        let entered = thread::scope(|scope| {
            // The root, the working directory and the mount are those of this thread only.
            let entering = scope.spawn(|| {
                sys::unshare_file_systems().unwrap();
                let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
                rustix::mount::mount_change("/", private).unwrap();
                rustix::mount::mount("proc", root.path().join("proc"), "proc", MountFlags::empty(), None).unwrap();
                rustix::process::chroot(root.path()).unwrap();
                ["/inside", &link, &format!("{link}/etc"), "/"].map(|cwd| enter_directory(Path::new(cwd)))
            });
            entering.join().unwrap()
        });

        assert_eq!(entered, [Ok(()), Err(Errno::NOENT), Err(Errno::NOENT), Ok(())]);
    }
}
