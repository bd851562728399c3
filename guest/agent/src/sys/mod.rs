//! The system calls that rustix has no safe form of, and all of the agent's `unsafe` code.
//!
//! A function here makes one system call, or the few that belong together. What to call when is up to the
//! callers, which are all over the agent.

mod device_program;
mod network;
mod process;
mod scheduling;
mod signals;

pub(crate) use device_program::{attach_device_program, load_device_program};
pub(crate) use network::{VsockAddress, loopback_up};
pub(crate) use process::{
    become_subreaper, close_all_but, execve, exit_now, fork, fork_brother_into, fork_first_brother,
    inherited_descriptor, number, pid, set_controlling_terminal, set_undumpable,
};
pub(crate) use scheduling::{SchedulingAttributes, set_io_priority, set_scheduling};
pub(crate) use signals::{child_signals, kill, reap_by_itself, restore_sigpipe, sleep_forever, unblock_signals};

use std::io;

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
