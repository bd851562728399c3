//! Exits of processes and out-of-memory kills, and the order in which the host receives them.

use std::rc::Rc;

use nutshell_protocol::{Event, Exited, Response};
use rustix::process::Pid;

use super::{Agent, AgentError, PendingJob, Purpose};
use crate::container::{Process, Stage};
use crate::reaper::ProcessExit;

/// The agent drops out-of-memory events while more than this many bytes are queued for the host.
const MAX_BACKLOG_FOR_OOM_EVENTS: usize = 1 << 20;

impl Agent {
    pub(super) fn handle_exits(&mut self) -> Result<(), AgentError> {
        for (pid, exit) in self.reaper.reap().map_err(AgentError::system("reap children"))? {
            if !self.record_exit(pid, exit)? && !self.pending_jobs.is_empty() {
                self.reaper.keep_unclaimed(pid, exit);
            }
        }
        Ok(())
    }

    /// Records the exit of a container's process. Returns `false` if the process belongs to no container.
    pub(super) fn record_exit(&mut self, pid: Pid, mut exit: ProcessExit) -> Result<bool, AgentError> {
        let Some((name, exec)) = self.find_process(pid) else {
            return Ok(false);
        };
        if exec.is_none() {
            self.end_container(&name);
        }
        let Some(process) = self
            .containers
            .get_mut(&name)
            .and_then(|container| container.process(exec.as_deref()))
        else {
            return Ok(false);
        };
        let [_, stdout, stderr] = process.pumps;
        if let (Some(reported_signal), Some(_)) = (process.reported_signal, exit.signal) {
            exit.status = u8::try_from(128 + reported_signal).unwrap_or(u8::MAX);
        }
        process.exit = Some((
            exit,
            [self.pumps.bytes_written(stdout), self.pumps.bytes_written(stderr)],
        ));
        if exit.status != 0 {
            self.report_oom_kills(&name)?;
        }
        self.report_exits(&name)?;
        Ok(true)
    }

    /// Finds the running process with this pid. Returns its container, and its exec unless it is the first process.
    fn find_process(&self, pid: Pid) -> Option<(Rc<str>, Option<String>)> {
        self.containers.iter().find_map(|(name, container)| {
            let is_match = |process: &Process| process.pid == Some(pid) && process.exit.is_none();
            if is_match(&container.init) {
                return Some((Rc::clone(name), None));
            }
            let exec = container.execs.iter().find(|(_, process)| is_match(process));
            exec.map(|(exec, _)| (Rc::clone(name), Some(exec.clone())))
        })
    }

    /// Stops a container, whose first process has ended. The kernel has killed the processes in the container's pid
    /// namespace; this kills those outside of it, and the jobs that could add processes.
    fn end_container(&mut self, name: &str) {
        self.kill_jobs(name);
        if let Some(container) = self.containers.get_mut(name) {
            if container.stage != Stage::Deleting {
                container.stage = Stage::Stopped;
            }
            container.paused = false;
            // Fails if the job that deletes the container has removed the cgroup.
            let _ = container.cgroup.kill();
        }
    }

    /// Reports recorded exits: those of execs first, and that of the first process after all execs have ended.
    pub(super) fn report_exits(&mut self, name: &Rc<str>) -> Result<(), AgentError> {
        loop {
            let Some(container) = self.containers.get_mut(name) else {
                return Ok(());
            };
            let ended = container.execs.iter().find(|(_, process)| process.exit.is_some());
            if let Some(exec) = ended.map(|(exec, _)| exec.clone()) {
                if let Some(mut process) = container.execs.remove(&exec) {
                    self.report_exit(name, Some(exec), &mut process)?;
                }
            } else if container.execs.is_empty() && container.init.exit.is_some() {
                let mut process = std::mem::take(&mut container.init);
                self.report_exit(name, None, &mut process)?;
            } else {
                break;
            }
        }
        self.forget_if_deleted(name)
    }

    /// Removes a container that a job has deleted, and replies to the request, once the exits of all its processes
    /// have been reported.
    fn forget_if_deleted(&mut self, name: &Rc<str>) -> Result<(), AgentError> {
        let Some(container) = self.containers.get(name) else {
            return Ok(());
        };
        let is_creation =
            |pending: &PendingJob| matches!(&pending.purpose, Purpose::Create(container) if container == name);
        let has_processes =
            container.init.pid.is_some() || !container.execs.is_empty() || self.pending_jobs.values().any(is_creation);
        match container.deletion.filter(|_| !has_processes) {
            Some(request) => {
                self.pumps.remove_container(name);
                self.containers.remove(name);
                self.reply(request, Ok(Response::Done))
            }
            None => Ok(()),
        }
    }

    fn report_exit(&mut self, name: &Rc<str>, exec: Option<String>, process: &mut Process) -> Result<(), AgentError> {
        let Some((exit, [stdout_bytes, stderr_bytes])) = process.exit.take() else {
            return Ok(());
        };
        for pump in process.pumps.into_iter().flatten() {
            self.pumps.transfer(pump);
            self.pumps.detach(pump);
        }
        self.send_event(Event::Exited(Exited {
            container: name.to_string(),
            exec,
            status: exit.status,
            exited_at: exit.exited_at,
            stdout_bytes,
            stderr_bytes,
        }))
    }

    pub(super) fn handle_memory_event(&mut self, number: u32) -> Result<(), AgentError> {
        let name = self.containers.iter().find_map(|(name, container)| {
            let watch = container.memory_watch.as_ref()?;
            (watch.source_number == number).then(|| Rc::clone(name))
        });
        match name {
            Some(name) => self.report_oom_kills(&name),
            None => Ok(()),
        }
    }

    fn report_oom_kills(&mut self, name: &Rc<str>) -> Result<(), AgentError> {
        let watch = self
            .containers
            .get_mut(name)
            .and_then(|container| container.memory_watch.as_mut());
        if watch.is_some_and(|watch| watch.has_new_kills()) && self.stream.backlog() < MAX_BACKLOG_FOR_OOM_EVENTS {
            self.send_event(Event::OutOfMemory {
                container: name.to_string(),
            })?;
        }
        Ok(())
    }
}
