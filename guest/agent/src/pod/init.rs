//! Pid 1 of the pid namespace that a pod's containers may share. It lives as long as the machine: when it ends, the
//! kernel kills all processes of the namespace, and the end of one container must not end the others.
//!
//! Containers can see this process, so it gives up its file systems, descriptors and privileges, and makes its memory
//! unreadable. The kernel reaps the orphans that this process inherits (SIGCHLD is ignored).

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::pipe::PipeFlags;
use rustix::process::{Gid, Pid, Uid};

use crate::failure::at_step;
use crate::sys;

/// The user and group without privileges that images for "pause" containers use.
const NOBODY_ID: u32 = 65535;

/// The message that the process writes to its pipe once it is isolated.
const READY_MESSAGE: &str = "ready";

/// Starts the process as a sibling of the caller, and waits until it is isolated.
pub(super) fn start() -> io::Result<Pid> {
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(at_step("create a pipe"))?;
    let Some(pid) = sys::fork_pid_namespace_init().map_err(at_step("clone the process"))? else {
        let isolated = isolate();
        let message = match &isolated {
            Ok(()) => READY_MESSAGE.to_owned(),
            Err(error) => error.to_string(),
        };
        // If the caller is gone, there is nothing to report to.
        let _ = rustix::io::write(&writer, message.as_bytes());
        sys::close_all_but(&[]);
        match isolated {
            Ok(()) => sys::sleep_forever(),
            Err(_) => sys::exit_now(1),
        }
    };
    drop(writer);
    let mut message = String::new();
    File::from(reader)
        .read_to_string(&mut message)
        .map_err(at_step("read the message of the process"))?;
    match message.as_str() {
        READY_MESSAGE => Ok(pid),
        "" => Err(io::Error::other("the process ended before it was isolated")),
        error => Err(io::Error::other(error.to_owned())),
    }
}

/// Gives up everything that containers could see or use.
fn isolate() -> io::Result<()> {
    sys::auto_reap_children();
    sys::set_undumpable().map_err(at_step("make the process undumpable"))?;
    rustix::thread::set_name(c"pod").map_err(at_step("set the name of the process"))?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(at_step("open /dev/null"))?;
    rustix::stdio::dup2_stdin(&null).map_err(at_step("redirect standard input"))?;
    rustix::stdio::dup2_stdout(&null).map_err(at_step("redirect standard output"))?;
    rustix::stdio::dup2_stderr(&null).map_err(at_step("redirect standard error"))?;
    enter_empty_root(Path::new("/tmp"))?;
    rustix::thread::set_no_new_privs(true).map_err(at_step("set no_new_privs"))?;
    let (user, group) = (Uid::from_raw(NOBODY_ID), Gid::from_raw(NOBODY_ID));
    rustix::thread::set_thread_groups(&[]).map_err(at_step("drop the groups"))?;
    rustix::thread::set_thread_res_gid(group, group, group).map_err(at_step("set the group"))?;
    rustix::thread::set_thread_res_uid(user, user, user).map_err(at_step("set the user"))?;
    // A change of the user resets this attribute (PR_SET_DUMPABLE of prctl(2)).
    sys::set_undumpable().map_err(at_step("make the process undumpable again"))
}

/// Changes to an empty, read-only root. The calling process must have its own mount namespace.
fn enter_empty_root(mount_point: &Path) -> io::Result<()> {
    let shown = mount_point.display();
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(at_step("make the mounts private"))?;
    rustix::mount::mount("tmpfs", mount_point, "tmpfs", MountFlags::RDONLY, c"size=0,mode=755")
        .map_err(at_step(format!("mount an empty tmpfs on {shown}")))?;
    rustix::process::chdir(mount_point).map_err(at_step(format!("change the directory to {shown}")))?;
    rustix::process::pivot_root(".", ".").map_err(at_step("pivot_root"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(at_step("unmount the old root"))?;
    rustix::process::chdir("/").map_err(at_step("change the directory to the new root"))
}
