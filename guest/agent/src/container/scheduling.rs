//! Applies the scheduling settings of an exec's process (OCI config.md, "scheduler" and "ioPriority"). libcontainer
//! does the same for the first process of a container.

use std::io;

use oci_spec::runtime::{IOPriorityClass, LinuxIOPriority, LinuxSchedulerFlag, LinuxSchedulerPolicy, Scheduler};

use crate::sys::{self, SchedulingAttributes};

/// Sets the I/O priority of the calling process (ioprio_set(2)).
pub(super) fn set_io_priority(priority: &LinuxIOPriority) -> io::Result<()> {
    const CLASS_SHIFT: u32 = 13;
    let class = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let level = u32::try_from(priority.priority())
        .ok()
        .filter(|level| *level < 8)
        .ok_or(io::ErrorKind::InvalidInput)?;
    sys::set_io_priority(class << CLASS_SHIFT | level)
}

/// Sets the scheduling policy of the calling process (sched_setattr(2)).
pub(super) fn set_scheduler(scheduler: &Scheduler) -> io::Result<()> {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let flags = scheduler.flags().iter().flatten().map(|flag| match flag {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    });
    let priority = u32::try_from(scheduler.priority().unwrap_or(0)).map_err(|_| io::ErrorKind::InvalidInput)?;
    sys::set_scheduling(&SchedulingAttributes {
        policy,
        flags: flags.fold(0, |all, flag| all | flag),
        nice: scheduler.nice().unwrap_or(0),
        priority,
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
    })
}
