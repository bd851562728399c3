//! Handles the reports of jobs: updates the state, and replies to the request that started the job.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use nutshell_protocol::{Failure, Response};
use rustix::process::{Pid, PidfdFlags};

use super::{Agent, AgentError, Purpose};
use crate::cgroup::{Cgroup, MemoryWatch};
use crate::container::{Stage, delete};
use crate::failure::{Context, FailureExt};
use crate::job::Outcome;
use crate::pod::Pod;
use crate::poller::Token;
use crate::stdio::AgentEnds;
use crate::sys;

/// A process that a job has created.
struct NewProcess {
    pid: Pid,
    agent_ends: Option<AgentEnds>,
    terminal: Option<OwnedFd>,
}

impl Agent {
    /// Receives the report of job `number`, and replies to its request.
    pub(super) fn handle_report(&mut self, number: u32) -> Result<(), AgentError> {
        let Some((result, terminal)) = self
            .pending_jobs
            .get(&number)
            .and_then(|pending| pending.job.receive_report(&pending.purpose))
        else {
            return Ok(());
        };
        let Some(pending) = self.pending_jobs.remove(&number) else {
            return Ok(());
        };
        let request = pending.request;
        if let Purpose::SetUpPod(settings) = &pending.purpose
            && let Ok(Outcome::Process { pid }) = &result
        {
            self.pod = sys::to_pid(*pid).map(|init| Pod::new(init, settings));
        }
        let new_process = match &result {
            Ok(Outcome::Process { pid }) => sys::to_pid(*pid).map(|pid| NewProcess {
                pid,
                agent_ends: pending.agent_ends,
                terminal,
            }),
            _ => None,
        };
        let result = result.map(|outcome| match outcome {
            Outcome::DiskKernel(kernel) => Response::DiskKernel(kernel),
            Outcome::Done | Outcome::Process { .. } => Response::Done,
        });
        match (pending.purpose, new_process) {
            (Purpose::Create(name), new_process) => match self.containers.get(&name).map(|container| container.stage) {
                Some(Stage::Creating) => match new_process {
                    Some(new_process) => self.finish_create(request, &name, new_process)?,
                    None => {
                        self.containers.remove(&name);
                        self.reply(request, result)?;
                    }
                },
                // The container is being deleted, together with the process that the job may have created.
                _ => {
                    self.reply(request, Err(Failure::internal(format!("container {name} was deleted"))))?;
                    self.report_exits(&name)?;
                }
            },
            (Purpose::Exec(name, exec), Some(new_process)) => self.finish_exec(request, &name, &exec, new_process)?,
            (Purpose::Exec(name, exec), None) => {
                if let Ok(container) = self.container(&name) {
                    container.execs.remove(&exec);
                }
                self.reply(request, result)?;
                self.report_exits(&name)?;
            }
            (Purpose::Freeze(name, frozen), _) => {
                if let (Ok(container), true) = (self.container(&name), result.is_ok()) {
                    container.paused = frozen;
                }
                self.reply(request, result)?;
            }
            (Purpose::Start(name, init), _) => {
                if result.is_err() {
                    self.stop_unstarted(&name, init);
                }
                self.reply(request, result)?;
            }
            (Purpose::Delete(name), _) => self.finish_delete(request, &name, result)?,
            (Purpose::Abandon(name), _) => self.finish_abandon(request, &name, result)?,
            (Purpose::Discard(name, failure), _) => self.finish_discard(request, &name, failure, result)?,
            (Purpose::SetUpPod(_) | Purpose::Other, _) => self.reply(request, result)?,
        }
        if self.pending_jobs.is_empty() {
            self.reaper.forget_unclaimed();
        }
        Ok(())
    }

    fn finish_create(&mut self, request: u64, name: &Rc<str>, new_process: NewProcess) -> Result<(), AgentError> {
        let pid = new_process.pid;
        if let Err(failure) = self.adopt(name, new_process) {
            return self.discard(request, name, pid, failure);
        }
        self.reply(request, Ok(Response::Created { pid: sys::raw_pid(pid) }))?;
        self.record_early_exit(pid)
    }

    /// Adds the new process, its streams and its out-of-memory watch to a container's record. System calls may
    /// fail here: containers that run as root share the agent's per-user limits (such as that of epoll watches).
    fn adopt(&mut self, name: &Rc<str>, new_process: NewProcess) -> Result<(), Failure> {
        let number = self.next_source_number();
        let memory = MemoryWatch::open(&Cgroup::of_container(name), number)
            .context(|| format!("open memory.events of container {name}"))?;
        let pidfd = rustix::process::pidfd_open(new_process.pid, PidfdFlags::empty());
        self.poller
            .watch_cgroup_file(memory.as_fd(), Token::Memory(number))
            .context(|| format!("watch memory.events of container {name}"))?;
        if let Ok(container) = self.container(name) {
            container.memory_watch = Some(memory);
            // Fails if the process has ended already. Then the container cannot run execs.
            container.pidfd = pidfd.ok();
        }
        let pumps = self.start_pumps(name, new_process.agent_ends, new_process.terminal.as_ref())?;
        let container = self.container(name)?;
        container.stage = Stage::Created;
        container.init.pid = Some(new_process.pid);
        container.init.pumps = pumps;
        container.init.terminal = new_process.terminal;
        Ok(())
    }

    /// Deletes a container whose process could not be adopted. The reply, with `failure`, follows when that is done.
    fn discard(&mut self, request: u64, name: &Rc<str>, init: Pid, failure: Failure) -> Result<(), AgentError> {
        self.pumps.remove_container(name);
        // Fails if it has ended already. Its exit is not reported, because the container was not created.
        let _ = sys::kill(init, libc::SIGKILL.unsigned_abs());
        if let Ok(container) = self.container(name) {
            container.stage = Stage::Deleting;
            container.memory_watch = None;
        }
        let purpose = Purpose::Discard(Rc::clone(name), failure.clone());
        match self.run_job(request, purpose, &mut || delete::remove_all(name)) {
            Ok(_) => Ok(()),
            Err(error) => self.finish_discard(request, name, failure, Err(error)),
        }
    }

    /// Replies with the `failure` of the creation. If the deletion failed, too, the container stays: a request may
    /// delete it.
    fn finish_discard(
        &mut self,
        request: u64,
        name: &Rc<str>,
        mut failure: Failure,
        deleted: Result<Response, Failure>,
    ) -> Result<(), AgentError> {
        match deleted {
            Ok(_) => {
                self.containers.remove(name);
            }
            Err(error) => {
                failure.message = format!("{}; then its deletion failed: {}", failure.message, error.message);
                if let Ok(container) = self.container(name) {
                    container.stage = Stage::Stopped;
                }
            }
        }
        self.reply(request, Err(failure))
    }

    /// Stops a container whose start has failed (OCI runtime spec, "startContainer Hooks"): it cannot be started again.
    /// Does nothing if `init` has ended already, or is the first process of an earlier container with this name.
    fn stop_unstarted(&mut self, name: &str, init: Option<Pid>) {
        if let Ok(container) = self.container(name)
            && container.stage == Stage::Running
            && container.init.pid == init
        {
            container.stage = Stage::Stopped;
            // Fails if a job has removed the cgroup.
            let _ = container.cgroup.kill();
        }
    }

    fn finish_exec(
        &mut self,
        request: u64,
        name: &Rc<str>,
        exec: &str,
        new_process: NewProcess,
    ) -> Result<(), AgentError> {
        let (pid, terminal) = (new_process.pid, new_process.terminal);
        let pumps = match self.start_pumps(name, new_process.agent_ends, terminal.as_ref()) {
            Ok(pumps) => pumps,
            Err(failure) => {
                // The exit of the process is not reported, because the exec was not created.
                let _ = sys::kill(pid, libc::SIGKILL.unsigned_abs());
                if let Ok(container) = self.container(name) {
                    container.execs.remove(exec);
                }
                self.reply(request, Err(failure))?;
                return self.report_exits(name);
            }
        };
        if let Some(process) = self
            .containers
            .get_mut(name)
            .and_then(|container| container.execs.get_mut(exec))
        {
            process.pid = Some(pid);
            process.pumps = pumps;
            process.terminal = terminal;
            if process.kill_when_started {
                // Fails if it has ended already.
                let _ = sys::kill(pid, libc::SIGKILL.unsigned_abs());
            }
        }
        self.reply(request, Ok(Response::Created { pid: sys::raw_pid(pid) }))?;
        self.record_early_exit(pid)
    }

    /// Records the exit of a process that ended before its job reported it.
    fn record_early_exit(&mut self, pid: Pid) -> Result<(), AgentError> {
        match self.reaper.claim(pid) {
            Some(exit) => self.record_exit(pid, exit).map(drop),
            None => Ok(()),
        }
    }

    fn finish_delete(
        &mut self,
        request: u64,
        name: &Rc<str>,
        result: Result<Response, Failure>,
    ) -> Result<(), AgentError> {
        if result.is_err() {
            if let Ok(container) = self.container(name) {
                // A later request may try again.
                container.stage = Stage::Stopped;
            }
            return self.reply(request, result);
        }
        match self.container(name) {
            Ok(container) => container.deletion = Some(request),
            Err(_) => return self.reply(request, result),
        }
        self.report_exits(name)
    }

    /// Forgets a container whose exits are not reported any more.
    fn finish_abandon(
        &mut self,
        request: u64,
        name: &Rc<str>,
        result: Result<Response, Failure>,
    ) -> Result<(), AgentError> {
        if result.is_ok() {
            self.pumps.remove_container(name);
            self.containers.remove(name);
        } else if let Ok(container) = self.container(name) {
            // A later request may try again.
            container.stage = Stage::Stopped;
        }
        self.reply(request, result)
    }

    fn start_pumps(
        &mut self,
        container: &Rc<str>,
        agent_ends: Option<AgentEnds>,
        terminal: Option<&OwnedFd>,
    ) -> Result<[Option<u32>; 3], Failure> {
        let mut numbers = [None; 3];
        let Some(agent_ends) = agent_ends else {
            return Ok(numbers);
        };
        let pumps = agent_ends
            .into_pumps(terminal)
            .context(|| format!("start the pumps of a process in container {container}"))?;
        for (number, pump) in numbers.iter_mut().zip(pumps) {
            if let Some(pump) = pump {
                let source_number = self.next_source_number();
                self.pumps
                    .add(&self.poller, source_number, pump, container)
                    .context(|| format!("watch the standard streams of a process in container {container}"))?;
                *number = Some(source_number);
            }
        }
        Ok(numbers)
    }

    /// Kills the jobs that create a container or an exec in it. Their requests fail.
    pub(super) fn kill_jobs(&mut self, name: &str) {
        for pending in self.pending_jobs.values() {
            if let Purpose::Create(container) | Purpose::Exec(container, _) = &pending.purpose
                && **container == *name
            {
                // The event loop treats the missing report as a failure.
                let _ = sys::kill(pending.job.pid, libc::SIGKILL.unsigned_abs());
            }
        }
    }
}
