//! Implements libcontainer's `Executor`: after libcontainer has prepared a container's first process, that process
//! runs the `startContainer` hooks and executes the program.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::Write;

use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use oci_spec::runtime::Spec;

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
