//! The calling process's shares of CPU and disk.

use std::io;

use super::check;

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
