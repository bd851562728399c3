//! From a process that is ready to be the container's to its program.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::Write;

use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use oci_spec::runtime::Spec;

use super::diagnosis::CauseWriter;
use super::program::{Program, ResolvedProgram};
use super::start::StartHooks;
use crate::sys;

/// Runs a container's first process.
#[derive(Debug, Clone)]
pub(super) struct ProgramExecutor {
    program: Program,
    start: Option<StartHooks>,
    found: RefCell<Option<ResolvedProgram>>,
    causes: CauseWriter,
}

impl ProgramExecutor {
    /// For `program`, after the hooks `start`; why it cannot run goes to `causes`.
    pub(super) fn new(program: Program, start: Option<StartHooks>, causes: CauseWriter) -> Self {
        Self {
            program,
            start,
            found: RefCell::new(None),
            causes,
        }
    }
}

impl Executor for ProgramExecutor {
    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        match ResolvedProgram::find(&self.program) {
            Ok(found) => {
                *self.found.borrow_mut() = Some(found);
                Ok(())
            }
            Err(words) => {
                self.causes.write_verbatim(&words);
                Err(ExecutorValidationError::ArgValidationError(words))
            }
        }
    }

    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // The environment goes to execve(2), where its order is kept.
        Ok(())
    }

    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        let Some(found) = self.found.borrow().clone() else {
            return Err(ExecutorError::InvalidArg);
        };
        if let Some(start) = &self.start {
            let words = match start.run() {
                Ok(()) => found.execute(),
                Err(words) => words,
            };
            start.report(&words);
            sys::exit_now(1);
        }
        let words = found.execute();
        // The container was created and started: only its own output is left to say it.
        let _ = writeln!(std::io::stderr(), "{words}");
        sys::exit_now(255);
    }
}
