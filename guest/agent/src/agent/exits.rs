//! What ends, and in which order the host hears of it.

use std::rc::Rc;

use nutshell_protocol::{Event, Exited};
use rustix::process::Pid;

use super::{Agent, AgentError};
use crate::container::Stage;
use crate::reap::Ending;

/// How many bytes the host may leave unread before repeated news of the same kind is left out.
const BACKLOG: usize = 1 << 20;

impl Agent {
    pub(super) fn take_exits(&mut self) -> Result<(), AgentError> {
        for (pid, ending) in self.reaper.reap()? {
            if !self.ended(Some(pid), ending)? && !self.errands.is_empty() {
                self.reaper.keep(pid, ending);
            }
        }
        Ok(())
    }

    /// Records the end of one of the containers' processes. `false` if it is none of them.
    pub(super) fn ended(&mut self, pid: Option<Pid>, ending: Ending) -> Result<bool, AgentError> {
        let found = self.containers.iter_mut().find_map(|(name, container)| {
            let first = (container.init.pid == pid && container.init.ended.is_none()).then_some(None);
            let exec = || {
                let found = container
                    .execs
                    .iter()
                    .find(|(_, process)| process.pid == pid && process.ended.is_none());
                found.map(|(exec, _)| Some(exec.clone()))
            };
            Some((Rc::clone(name), first.or_else(exec)?))
        });
        let Some((name, exec)) = found.filter(|_| pid.is_some()) else {
            return Ok(false);
        };
        let Some(container) = self.containers.get_mut(&name) else {
            return Ok(false);
        };
        if exec.is_none() {
            container.stage = match container.stage {
                Stage::Deleting => Stage::Deleting,
                _ => Stage::Stopped,
            };
            // Those in the pid namespace are dead already. Others must not outlive the container.
            if let Some(cgroup) = &container.cgroup {
                let _ = cgroup.kill();
            }
        }
        if let Some(process) = container.process(exec.as_deref()) {
            let [_, stdout, stderr] = process.pumps;
            let written = [self.streams.written(stdout), self.streams.written(stderr)];
            let mut ending = ending;
            if let (Some(blamed), Some(_)) = (process.blamed, ending.signal) {
                ending.status = u8::try_from(128 + blamed).unwrap_or(u8::MAX);
            }
            process.ended = Some((ending, written));
        }
        if ending.status != 0 {
            self.report_kills(&name)?;
        }
        self.report_exits(&name)?;
        Ok(true)
    }

    /// Tells of every end that may be told: those of execs, then that of the first process.
    fn report_exits(&mut self, name: &Rc<str>) -> Result<(), AgentError> {
        loop {
            let Some(container) = self.containers.get_mut(name) else {
                return Ok(());
            };
            let done = container
                .execs
                .iter()
                .find(|(_, process)| process.ended.is_some())
                .map(|(exec, _)| exec.clone());
            if let Some(exec) = done {
                if let Some(mut process) = container.execs.remove(&exec) {
                    self.report(name, Some(exec), &mut process)?;
                }
                continue;
            }
            if container.execs.is_empty() && container.init.ended.is_some() {
                let mut process = std::mem::take(&mut container.init);
                self.report(name, None, &mut process)?;
            }
            return Ok(());
        }
    }

    fn report(
        &mut self,
        name: &Rc<str>,
        exec: Option<String>,
        process: &mut crate::container::Process,
    ) -> Result<(), AgentError> {
        let Some((ending, [stdout, stderr])) = process.ended.take() else {
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
            stdout,
            stderr,
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
