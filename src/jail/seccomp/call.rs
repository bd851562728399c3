//! A list of system calls.

use std::fmt;

/// The system calls of one kind of thread.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CallList {
    /// Names the thread in messages.
    pub(crate) thread: &'static str,
    /// The calls of the thread itself, in groups.
    pub(crate) own: &'static [&'static [Call]],
    /// The threads that it starts. They inherit its list, so it has their calls too.
    pub(crate) starts: &'static [&'static CallList],
    /// Calls that fail and do not end the process.
    pub(crate) refused: &'static [Refusal],
}

impl CallList {
    /// All allowed calls: first those of the thread itself, then those of the threads that it starts. A call is listed
    /// once for each different condition on its arguments.
    pub(crate) fn calls(&self) -> Vec<AllowedCall> {
        let mut calls = Vec::new();
        self.add_calls(None, &mut calls);
        calls
    }

    fn add_calls(&self, inherited_by: Option<&'static str>, calls: &mut Vec<AllowedCall>) {
        for call in self.own.iter().copied().flatten() {
            let is_new = calls.iter().all(|AllowedCall { call: other, .. }| {
                (other.number, other.arguments) != (call.number, call.arguments)
            });
            if is_new {
                calls.push(AllowedCall { call, inherited_by });
            }
        }
        for list in self.starts {
            list.add_calls(inherited_by.or(Some(list.thread)), calls);
        }
    }
}

/// A call that a thread may make, for itself or because threads that it starts inherit its list.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AllowedCall {
    pub(crate) call: &'static Call,
    /// The started thread that needs the call. `None` if the thread of the list needs it.
    pub(crate) inherited_by: Option<&'static str>,
}

/// A system call, and the arguments with which it is allowed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    /// `SYS_` and the name.
    pub(crate) name: &'static str,
    pub(crate) number: libc::c_long,
    pub(crate) arguments: Arguments,
    /// What needs it.
    pub(crate) reason: &'static str,
}

/// The arguments with which a call is allowed. The first argument has the index 0. Only the lower 32 bits are compared:
/// the kernel ignores the upper ones of these arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arguments {
    Any,
    /// The argument with this index has one of these values.
    OneOf(u8, &'static [u32]),
    /// The argument with this index has none of these bits.
    Without(u8, u32),
}

/// A call that fails with an error, because code that cannot be changed makes it and copes with that error.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Refusal {
    pub(crate) name: &'static str,
    pub(crate) number: libc::c_long,
    pub(crate) errno: i32,
    /// What makes the call.
    pub(crate) reason: &'static str,
}

/// A [`Call`]: `allowed!(SYS_read, "reason")`, `allowed!(SYS_ioctl[1] in [1, 2], "reason")`, or
/// `allowed!(SYS_mmap[2] without PROT_EXEC, "reason")`.
macro_rules! allowed {
    ($number:ident, $reason:literal) => {
        $crate::jail::seccomp::allowed!(@ $number, $crate::jail::seccomp::Arguments::Any, $reason)
    };
    ($number:ident[$index:literal] in $values:expr, $reason:literal) => {
        $crate::jail::seccomp::allowed!(@ $number, $crate::jail::seccomp::Arguments::OneOf($index, &$values), $reason)
    };
    ($number:ident[$index:literal] without $bits:expr, $reason:literal) => {
        $crate::jail::seccomp::allowed!(@ $number, $crate::jail::seccomp::Arguments::Without($index, $bits), $reason)
    };
    (@ $number:ident, $arguments:expr, $reason:literal) => {
        $crate::jail::seccomp::Call {
            name: stringify!($number),
            number: libc::$number,
            arguments: $arguments,
            reason: $reason,
        }
    };
}

/// A [`Refusal`]: `refused!(SYS_openat, ENOENT, "reason")`.
macro_rules! refused {
    ($number:ident, $errno:ident, $reason:literal) => {
        $crate::jail::seccomp::Refusal {
            name: stringify!($number),
            number: libc::$number,
            errno: libc::$errno,
            reason: $reason,
        }
    };
}

pub(crate) use allowed;
pub(crate) use refused;

impl fmt::Display for Call {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.trim_start_matches("SYS_");
        match self.arguments {
            Arguments::Any => write!(formatter, "{name}"),
            Arguments::OneOf(index, values) => {
                write!(formatter, "{name}, argument {} one of", index + 1)?;
                values.iter().try_for_each(|value| write!(formatter, " {value:#x}"))
            }
            Arguments::Without(index, bits) => write!(formatter, "{name}, argument {} without {bits:#x}", index + 1),
        }
    }
}
