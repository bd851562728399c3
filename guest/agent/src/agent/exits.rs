//! What ends, and in which order the host hears of it.

use std::rc::Rc;

use nutshell_protocol::{Event, Exited, Response};
use rustix::process::Pid;

use super::{Agent, AgentError, PendingJob, Purpose};
use crate::container::{Process, Stage};
use crate::reaper::ProcessExit;

/// How many bytes the host may leave unread before repeated news of the same kind is left out.
const MAX_BACKLOG: usize = 1 << 20;

impl Agent {
    pub(super) fn handle_exits(&mut self) -> Result<(), AgentError> {
        for (pid, exit) in self.reaper.reap()? {
            if !self.record_exit(pid, exit)? && !self.pending_jobs.is_empty() {
                self.reaper.keep_unclaimed(pid, exit);
            }
        }
        Ok(())
    }

    /// Records the end of one of the containers' processes. `false` if it is none of them.
    pub(super) fn record_exit(&mut self, pid: Pid, exit: ProcessExit) -> Result<bool, AgentError> {
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
        let mut exit = exit;
        if let (Some(reported_signal), Some(_)) = (process.reported_signal, exit.signal) {
            exit.status = u8::try_from(128 + reported_signal).unwrap_or(u8::MAX);
        }
        process.exit = Some((
            exit,
            [self.streams.bytes_written(stdout), self.streams.bytes_written(stderr)],
        ));
        if exit.status != 0 {
            self.report_oom_kills(&name)?;
        }
        self.report_exits(&name)?;
        Ok(true)
    }

    /// Whose process has this pid.
    fn find_process(&self, pid: Pid) -> Option<(Rc<str>, Option<String>)> {
        self.containers.iter().find_map(|(name, container)| {
            let is_meant = |process: &Process| process.pid == Some(pid) && process.exit.is_none();
            if is_meant(&container.init) {
                return Some((Rc::clone(name), None));
            }
            let exec = container.execs.iter().find(|(_, process)| is_meant(process));
            exec.map(|(exec, _)| (Rc::clone(name), Some(exec.clone())))
        })
    }

    /// A container ends with its first process. Those in its pid namespace are dead already, others
    /// must not outlive it, and none may be added.
    fn end_container(&mut self, name: &str) {
        self.kill_jobs(name);
        if let Some(container) = self.containers.get_mut(name) {
            if container.stage != Stage::Deleting {
                container.stage = Stage::Stopped;
            }
            container.paused = false;
            // It may be gone, if the container is being removed.
            let _ = container.cgroup.kill();
        }
    }

    /// Tells of every end that may be told: those of execs, then that of the first process.
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
        self.finish_deletion(name)
    }

    /// Answers the deletion of a container when the last of its processes was told of.
    fn finish_deletion(&mut self, name: &Rc<str>) -> Result<(), AgentError> {
        let Some(container) = self.containers.get(name) else {
            return Ok(());
        };
        let is_made = |pending: &PendingJob| matches!(&pending.purpose, Purpose::Create(made) if made == name);
        let lives =
            container.init.pid.is_some() || !container.execs.is_empty() || self.pending_jobs.values().any(is_made);
        match container.deletion.filter(|_| !lives) {
            Some(request) => {
                self.streams.remove_container(name);
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
            self.streams.transfer(pump);
            self.streams.detach(pump);
        }
        self.event(Event::Exited(Exited {
            container: name.to_string(),
            exec,
            status: exit.status,
            exited_at: exit.exited_at,
            stdout_bytes,
            stderr_bytes,
        }))
    }

    pub(super) fn handle_memory_event(&mut self, number: u32) -> Result<(), AgentError> {
        let meant = self.containers.iter().find_map(|(name, container)| {
            let watch = container.memory_watch.as_ref()?;
            (watch.source_number == number).then(|| Rc::clone(name))
        });
        match meant {
            Some(name) => self.report_oom_kills(&name),
            None => Ok(()),
        }
    }

    fn report_oom_kills(&mut self, name: &Rc<str>) -> Result<(), AgentError> {
        let watch = self
            .containers
            .get_mut(name)
            .and_then(|container| container.memory_watch.as_mut());
        if watch.is_some_and(|watch| watch.has_new_kills()) && self.control.backlog() < MAX_BACKLOG {
            self.event(Event::OutOfMemory {
                container: name.to_string(),
            })?;
        }
        Ok(())
    }
}
