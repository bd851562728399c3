//! Implements libcontainer's `Executor`: after libcontainer has prepared a container's first process, that process
//! runs the `startContainer` hooks and executes the program.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};

use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use oci_spec::runtime::Spec;
use rustix::fs::{FileType, Mode, OFlags};

use super::diagnosis::CauseWriter;
use super::program::{Program, ResolvedProgram};
use super::start::StartHooks;
use crate::sys;

/// Executes the program of a container's first process.
#[derive(Debug, Clone)]
pub(super) struct ProgramExecutor {
    program: Program,
    start_hooks: Option<StartHooks>,
    resolved: RefCell<Option<ResolvedProgram>>,
    causes: CauseWriter,
}

impl ProgramExecutor {
    /// Creates an executor that runs `start_hooks`, then `program`. An executable that cannot be found is reported to
    /// `causes`.
    pub(super) fn new(program: Program, start_hooks: Option<StartHooks>, causes: CauseWriter) -> Self {
        Self {
            program,
            start_hooks,
            resolved: RefCell::new(None),
            causes,
        }
    }
}

impl Executor for ProgramExecutor {
    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        make_null_streams_writable();
        match ResolvedProgram::find(&self.program) {
            Ok(resolved) => {
                *self.resolved.borrow_mut() = Some(resolved);
                Ok(())
            }
            Err(error) => {
                self.causes.write_verbatim(&error);
                Err(ExecutorValidationError::ArgValidationError(error))
            }
        }
    }

    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // Nothing to set: `ResolvedProgram::execute` passes the environment to execve(2) as a list, in the spec's
        // order, which this map does not keep.
        Ok(())
    }

    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        let Some(resolved) = self.resolved.borrow().clone() else {
            return Err(ExecutorError::InvalidArg);
        };
        if let Some(start_hooks) = &self.start_hooks {
            sys::close_all_but(&[start_hooks.fifo()]);
            let error = match start_hooks.run() {
                Ok(()) => resolved.execute(),
                Err(error) => error,
            };
            start_hooks.report(&error);
            sys::exit_now(1);
        }
        // The path of the program may not lead to a descriptor of the agent, such as `/proc/self/fd/…`.
        sys::close_all_but(&[]);
        let error = resolved.execute();
        // The start request has succeeded already, so the error can only go to the container's standard error.
        let _ = writeln!(std::io::stderr(), "{error}");
        sys::exit_now(255);
    }
}

/// Opens `/dev/null` for reading and writing in place of each standard stream that is `/dev/null` for reading only.
/// libcontainer has opened them like that, and a write to them would fail with EBADF. If the container's `/dev/null`
/// cannot be opened for writing, they stay as they are.
fn make_null_streams_writable() {
    let read_only = [0, 1, 2].map(|number| is_read_only_null(number).unwrap_or(false));
    if read_only == [false; 3] {
        return;
    }
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(null) = rustix::fs::open("/dev/null", flags, Mode::empty()) else {
        return;
    };
    if !is_null(null.as_fd()).unwrap_or(false) {
        return;
    }
    let replace: [fn(BorrowedFd<'_>) -> rustix::io::Result<()>; 3] = [
        |null| rustix::stdio::dup2_stdin(null),
        |null| rustix::stdio::dup2_stdout(null),
        |null| rustix::stdio::dup2_stderr(null),
    ];
    for (replace, is_read_only) in replace.into_iter().zip(read_only) {
        if is_read_only {
            // Fails only while another thread opens the descriptor, and this process has one thread (dup(2)).
            let _ = replace(null.as_fd());
        }
    }
}

fn is_read_only_null(number: usize) -> rustix::io::Result<bool> {
    let streams = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
    let access = rustix::fs::fcntl_getfl(streams[number])? & OFlags::ACCMODE;
    Ok(access == OFlags::RDONLY && is_null(streams[number])?)
}

/// Whether a descriptor is the device `/dev/null` (kernel, Documentation/admin-guide/devices.txt).
fn is_null(descriptor: BorrowedFd<'_>) -> rustix::io::Result<bool> {
    let status = rustix::fs::fstat(descriptor)?;
    let is_character = FileType::from_raw_mode(status.st_mode) == FileType::CharacterDevice;
    Ok(is_character && status.st_rdev == rustix::fs::makedev(1, 3))
}
