//! The CPU and I/O scheduling of the calling process.

use std::io;

use super::check;

/// The attributes that sched_setattr(2) sets. Fields that do not belong to the policy are 0.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct SchedulingAttributes {
    /// `SCHED_*`.
    pub(crate) policy: u32,
    /// `SCHED_FLAG_*`.
    pub(crate) flags: u64,
    /// For SCHED_OTHER and SCHED_BATCH.
    pub(crate) nice: i32,
    /// For SCHED_FIFO and SCHED_RR.
    pub(crate) priority: u32,
    /// For SCHED_DEADLINE, in nanoseconds.
    pub(crate) runtime: u64,
    /// For SCHED_DEADLINE, in nanoseconds.
    pub(crate) deadline: u64,
    /// For SCHED_DEADLINE, in nanoseconds.
    pub(crate) period: u64,
}

/// The first version of `struct sched_attr` (sched_setattr(2)).
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Sets the scheduling policy of this process.
pub(crate) fn set_scheduling(attributes: &SchedulingAttributes) -> io::Result<()> {
    let attr = SchedAttr {
        size: u32::try_from(size_of::<SchedAttr>()).map_err(io::Error::other)?,
        policy: attributes.policy,
        flags: attributes.flags,
        nice: attributes.nice,
        priority: attributes.priority,
        runtime: attributes.runtime,
        deadline: attributes.deadline,
        period: attributes.period,
    };
    // SAFETY: the kernel reads `attr.size` bytes, which is the size of `attr`; it outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
    check(i32::try_from(result).unwrap_or(-1)).map(drop)
}

/// Sets the I/O priority of this process: class and level, encoded as for ioprio_set(2).
pub(crate) fn set_io_priority(priority: u32) -> io::Result<()> {
    /// `IOPRIO_WHO_PROCESS` of `linux/ioprio.h`.
    const PROCESS: libc::c_int = 1;
    // SAFETY: ioprio_set takes only integers.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, PROCESS, 0, priority) };
    check(i32::try_from(result).unwrap_or(-1)).map(drop)
}
