//! The first process of the pid namespace that a pod's containers may share, as long as the machine
//! lives: the end of any container must not end the others.
//!
//! Containers see it as their pid 1, so it has nothing to see: no file system, no descriptor, no
//! privilege, no memory that could be read. The kernel reaps what it inherits.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::pipe::PipeFlags;
use rustix::process::{Gid, Pid, Uid};

use crate::sys;

/// Whoever has no other user (as images for "pause" have it).
const NOBODY_ID: u32 = 65535;

/// What the process says when it is hidden.
const READY_MESSAGE: &str = "hidden";

/// Starts the process as a brother of the caller.
pub(super) fn start() -> io::Result<Pid> {
    let (words, saying) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let Some(pid) = sys::fork_pid_namespace_init()? else {
        let hidden = isolate();
        let said = match &hidden {
            Ok(()) => READY_MESSAGE.to_owned(),
            Err(error) => error.to_string(),
        };
        // Nobody is there to be told of a failure.
        let _ = rustix::io::write(&saying, said.as_bytes());
        sys::close_all_but(&[]);
        match hidden {
            Ok(()) => sys::sleep_forever(),
            Err(_) => sys::exit_now(1),
        }
    };
    drop(saying);
    let mut said = String::new();
    File::from(words).read_to_string(&mut said)?;
    match said.as_str() {
        READY_MESSAGE => Ok(pid),
        "" => Err(io::Error::other("it ended without a word")),
        reason => Err(io::Error::other(reason.to_owned())),
    }
}

fn isolate() -> io::Result<()> {
    sys::auto_reap_children();
    sys::set_undumpable()?;
    rustix::thread::set_name(c"pod")?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    enter_empty_root(Path::new("/tmp"))?;
    rustix::thread::set_no_new_privs(true)?;
    let (user, group) = (Uid::from_raw(NOBODY_ID), Gid::from_raw(NOBODY_ID));
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(group, group, group)?;
    rustix::thread::set_thread_res_uid(user, user, user)?;
    // A change of the user makes it readable again (PR_SET_DUMPABLE in prctl(2)).
    sys::set_undumpable()
}

/// Moves to an empty root that nothing can be written to. The mount namespace is this process's own.
fn enter_empty_root(folder: &Path) -> io::Result<()> {
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    rustix::mount::mount("tmpfs", folder, "tmpfs", MountFlags::RDONLY, c"size=0,mode=755")?;
    rustix::process::chdir(folder)?;
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir("/")?)
}
