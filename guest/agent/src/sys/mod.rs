//! Safe wrappers of system calls that rustix does not wrap. All of the agent's `unsafe` code is here.
//!
//! Each function makes one system call or a fixed sequence of them; policy belongs to the callers. Every module of
//! the agent may call this.

mod clock;
mod device_program;
mod disk;
mod name_lookup;
mod network;
mod process;
mod scheduling;
mod signals;

pub(crate) use clock::set_clock_rate;
pub(crate) use device_program::{attach_device_program, load_device_program};
pub(crate) use disk::add_partition;
pub(crate) use name_lookup::direct_name_queries;
#[cfg(test)]
pub(crate) use network::unshare_network;
pub(crate) use network::{VsockAddress, bring_loopback_up};
#[cfg(test)]
pub(crate) use process::unshare_file_systems;
pub(crate) use process::{
    become_subreaper, close_all_but, close_in_child, end_after, execve, exit_now, fork, fork_pid_namespace_init,
    fork_plain_sibling, fork_sibling_into, raw_pid, set_controlling_terminal, set_undumpable,
    take_inherited_descriptor, to_pid,
};
pub(crate) use scheduling::{SchedulingAttributes, set_io_priority, set_scheduling};
pub(crate) use signals::{
    auto_reap_children, kill, open_child_signals, restore_sigpipe, sleep_forever, unblock_signals,
};

use std::io;

/// Turns the result of a libc function into an error if it is negative.
fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
