//! What ends, and in which order the host hears of it.

use std::rc::Rc;

use nutshell_protocol::{Event, Exited, Response};
use rustix::process::Pid;

use super::{Agent, AgentError, Errand, Purpose};
use crate::container::{Process, Stage};
use crate::reaper::Ending;

/// How many bytes the host may leave unread before repeated news of the same kind is left out.
const BACKLOG: usize = 1 << 20;

impl Agent {
    pub(super) fn take_exits(&mut self) -> Result<(), AgentError> {
        for (pid, ending) in self.reaper.reap()? {
            if !self.ended(pid, ending)? && !self.errands.is_empty() {
                self.reaper.keep(pid, ending);
            }
        }
        Ok(())
    }

    /// Records the end of one of the containers' processes. `false` if it is none of them.
    pub(super) fn ended(&mut self, pid: Pid, ending: Ending) -> Result<bool, AgentError> {
        let Some((name, exec)) = self.find(pid) else {
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
        let mut ending = ending;
        if let (Some(blamed), Some(_)) = (process.blamed, ending.signal) {
            ending.status = u8::try_from(128 + blamed).unwrap_or(u8::MAX);
        }
        process.ended = Some((ending, [self.streams.written(stdout), self.streams.written(stderr)]));
        if ending.status != 0 {
            self.report_kills(&name)?;
        }
        self.report_exits(&name)?;
        Ok(true)
    }

    /// Whose process has this pid.
    fn find(&self, pid: Pid) -> Option<(Rc<str>, Option<String>)> {
        self.containers.iter().find_map(|(name, container)| {
            let is_meant = |process: &Process| process.pid == Some(pid) && process.ended.is_none();
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
        self.break_off(name);
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
            let ended = container.execs.iter().find(|(_, process)| process.ended.is_some());
            if let Some(exec) = ended.map(|(exec, _)| exec.clone()) {
                if let Some(mut process) = container.execs.remove(&exec) {
                    self.report(name, Some(exec), &mut process)?;
                }
            } else if container.execs.is_empty() && container.init.ended.is_some() {
                let mut process = std::mem::take(&mut container.init);
                self.report(name, None, &mut process)?;
            } else {
                break;
            }
        }
        self.forget_removed(name)
    }

    /// Answers the deletion of a container when the last of its processes was told of.
    fn forget_removed(&mut self, name: &Rc<str>) -> Result<(), AgentError> {
        let Some(container) = self.containers.get(name) else {
            return Ok(());
        };
        let is_made = |errand: &Errand| matches!(&errand.purpose, Purpose::Create(made) if made == name);
        let lives = container.init.pid.is_some() || !container.execs.is_empty() || self.errands.values().any(is_made);
        match container.removed.filter(|_| !lives) {
            Some(request) => {
                self.streams.end_all(name);
                self.containers.remove(name);
                self.reply(request, Ok(Response::Done))
            }
            None => Ok(()),
        }
    }

    fn report(&mut self, name: &Rc<str>, exec: Option<String>, process: &mut Process) -> Result<(), AgentError> {
        let Some((ending, [stdout_bytes, stderr_bytes])) = process.ended.take() else {
            return Ok(());
        };
        for pump in process.pumps.into_iter().flatten() {
            self.streams.turn(pump);
            self.streams.release(pump);
        }
        self.event(Event::Exited(Exited {
            container: name.to_string(),
            exec,
            status: ending.status,
            exited_at: ending.at,
            stdout_bytes,
            stderr_bytes,
        }))
    }

    pub(super) fn take_memory_event(&mut self, number: u32) -> Result<(), AgentError> {
        let meant = self.containers.iter().find_map(|(name, container)| {
            let watch = container.memory.as_ref()?;
            (watch.number == number).then(|| Rc::clone(name))
        });
        match meant {
            Some(name) => self.report_kills(&name),
            None => Ok(()),
        }
    }

    fn report_kills(&mut self, name: &Rc<str>) -> Result<(), AgentError> {
        let watch = self
            .containers
            .get_mut(name)
            .and_then(|container| container.memory.as_mut());
        if watch.is_some_and(|watch| watch.killed_again()) && self.control.backlog() < BACKLOG {
            self.event(Event::OutOfMemory {
                container: name.to_string(),
            })?;
        }
        Ok(())
    }
}
