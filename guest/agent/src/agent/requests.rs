//! What the host asks for.

use std::os::fd::AsFd;
use std::rc::Rc;

use nutshell_protocol::{CreateContainer, Failure, FailureKind, Request, Response, ToAgent};
use rustix::process::Pid;

use super::{Agent, AgentError, Errand, Purpose};
use crate::container::cgroup::{Cgroup, MemoryWatch};
use crate::container::{Container, Stage, create, delete};
use crate::job::{Context, FailureExt, Job, Outcome};
use crate::poller::Token;
use crate::stdio::{self, Channels};
use crate::sys;

/// What became of a request for now.
enum Answer {
    /// The reply.
    Now(Response),
    /// A job will tell.
    Later,
}

impl Agent {
    pub(super) fn handle(&mut self, message: ToAgent) -> Result<(), AgentError> {
        let id = message.id;
        match self.answer(id, message.request) {
            Ok(Answer::Now(response)) => self.reply(id, Ok(response)),
            Ok(Answer::Later) => Ok(()),
            Err(failure) => self.reply(id, Err(failure)),
        }
    }

    fn answer(&mut self, id: u64, request: Request) -> Result<Answer, Failure> {
        match request {
            Request::CreateContainer(request) => self.create(id, &request),
            Request::StartContainer { container } => self.start(&container),
            Request::Signal {
                container,
                exec,
                signal,
                all,
            } => self.signal(&container, exec.as_deref(), signal, all),
            Request::Resize {
                container,
                exec,
                width,
                height,
            } => self.resize(&container, exec.as_deref(), width, height),
            Request::DeleteContainer { container } => self.delete(id, &container),
            Request::Shutdown => self.run_job(id, Purpose::Other, &mut || {
                rustix::fs::sync();
                Ok((Outcome::Done, None))
            }),
            _ => Err(Failure {
                kind: FailureKind::Unimplemented,
                message: "the agent does not know this request yet".to_owned(),
            }),
        }
    }

    fn create(&mut self, id: u64, request: &CreateContainer) -> Result<Answer, Failure> {
        if self.containers.contains_key(request.container.as_str()) {
            return Err(Failure {
                kind: FailureKind::AlreadyExists,
                message: format!("container {} exists", request.container),
            });
        }
        let (channels, ends) =
            Channels::open(&self.host, &request.stdio).context(|| "open the standard streams".to_owned())?;
        let job = Job::start(&ends.descriptors(), &mut || create::create(request, &ends))
            .context(|| "start a job".to_owned())?;
        let container: Rc<str> = request.container.as_str().into();
        let purpose = Purpose::Create {
            container: Rc::clone(&container),
        };
        self.containers
            .insert(container, Container::new(request.spec.as_slice().into()));
        self.add_errand(id, job, purpose, Some(channels))
    }

    fn start(&mut self, name: &str) -> Result<Answer, Failure> {
        let container = self.container(name)?;
        if container.stage != Stage::Created {
            return Err(Failure::precondition(format!(
                "container {name} is not in state created but {:?}",
                container.stage
            )));
        }
        create::start(name).context(|| format!("start container {name}"))?;
        container.stage = Stage::Running;
        Ok(Answer::Now(Response::Done))
    }

    fn signal(&mut self, name: &str, exec: Option<&str>, signal: u32, all: bool) -> Result<Answer, Failure> {
        let finished = || Failure::not_found("process already finished");
        let container = self.container(name)?;
        if all {
            let cgroup = container.cgroup.clone().ok_or_else(finished)?;
            send_to_all(&cgroup, signal).context(|| format!("signal container {name}"))?;
            return Ok(Answer::Now(Response::Done));
        }
        let waits = exec.is_none() && container.stage == Stage::Created;
        let process = container.process(exec).ok_or_else(finished)?;
        let pid = process.pid.filter(|_| process.ended.is_none()).ok_or_else(finished)?;
        if waits && ends_a_process(signal) {
            // It is still the agent's code, and first of its pid namespace: it would ignore the signal.
            process.blamed = Some(signal);
            sys::kill(pid, KILL).context(|| format!("signal container {name}"))?;
        } else {
            sys::kill(pid, signal).context(|| format!("signal container {name}"))?;
        }
        Ok(Answer::Now(Response::Done))
    }

    fn resize(&mut self, name: &str, exec: Option<&str>, width: u16, height: u16) -> Result<Answer, Failure> {
        let container = self.container(name)?;
        let process = container.process(exec).ok_or_else(|| {
            Failure::not_found(format!(
                "exec {} of container {name} is not there",
                exec.unwrap_or_default()
            ))
        })?;
        if let Some(terminal) = &process.terminal {
            stdio::resize(terminal, width, height).context(|| "resize the terminal".to_owned())?;
        }
        Ok(Answer::Now(Response::Done))
    }

    fn delete(&mut self, id: u64, name: &str) -> Result<Answer, Failure> {
        let container = self.container(name)?;
        let cgroup = match container.stage {
            Stage::Creating | Stage::Deleting => {
                return Err(Failure::precondition(format!(
                    "container {name} is {:?}",
                    container.stage
                )));
            }
            _ => container.cgroup.clone(),
        };
        container.stage = Stage::Deleting;
        let purpose = Purpose::Delete { container: name.into() };
        self.run_job(id, purpose, &mut || {
            delete::remove_all(name, cgroup.as_ref())?;
            Ok((Outcome::Done, None))
        })
    }

    fn container(&mut self, name: &str) -> Result<&mut Container, Failure> {
        self.containers
            .get_mut(name)
            .ok_or_else(|| Failure::not_found(format!("container {name} is not there")))
    }

    fn run_job(&mut self, id: u64, purpose: Purpose, work: crate::job::Work<'_>) -> Result<Answer, Failure> {
        let job = Job::start(&[], work).context(|| "start a job".to_owned())?;
        self.add_errand(id, job, purpose, None)
    }

    fn add_errand(
        &mut self,
        request: u64,
        job: Job,
        purpose: Purpose,
        channels: Option<Channels>,
    ) -> Result<Answer, Failure> {
        let number = self.next_number();
        self.poller
            .watch_input(&job, Token::Job(number))
            .context(|| "watch a job".to_owned())?;
        self.errands.insert(
            number,
            Errand {
                job,
                request,
                purpose,
                channels,
            },
        );
        Ok(Answer::Later)
    }

    /// Hears what became of a job and tells the host.
    pub(super) fn take_report(&mut self, number: u32) -> Result<(), AgentError> {
        let Some(report) = self.errands.get(&number).and_then(|errand| errand.job.report()) else {
            return Ok(());
        };
        let Some(errand) = self.errands.remove(&number) else {
            return Ok(());
        };
        let (result, terminal) = report;
        let result = match (errand.purpose, result) {
            (Purpose::Create { container }, Ok(Outcome::Process { pid, cgroup })) => {
                return self.created(errand.request, &container, pid, &cgroup, errand.channels, terminal);
            }
            (Purpose::Create { container }, result) => {
                self.containers.remove(&container);
                result
            }
            (Purpose::Delete { container }, result) => {
                self.streams.end_all(&container);
                self.containers.remove(&container);
                result
            }
            (Purpose::Other, result) => result,
        };
        self.reply(errand.request, result.map(|_| Response::Done))?;
        self.forget_if_idle();
        Ok(())
    }

    fn created(
        &mut self,
        request: u64,
        name: &Rc<str>,
        pid: u32,
        cgroup: &str,
        channels: Option<Channels>,
        terminal: Option<std::os::fd::OwnedFd>,
    ) -> Result<(), AgentError> {
        let number = self.next_number();
        let cgroup = Cgroup::at(cgroup);
        let memory = MemoryWatch::open(&cgroup, number).ok();
        if let Some(memory) = &memory {
            self.poller.watch_cgroup_file(memory.as_fd(), Token::Memory(number))?;
        }
        let pumps = self.start_pumps(name, channels, terminal.as_ref())?;
        let pid = pid.try_into().ok().and_then(Pid::from_raw);
        if let Some(container) = self.containers.get_mut(name) {
            container.stage = Stage::Created;
            container.cgroup = Some(cgroup);
            container.memory = memory;
            container.init.pid = pid;
            container.init.pumps = pumps;
            container.init.terminal = terminal;
        }
        self.reply(
            request,
            Ok(Response::Created {
                pid: pid.map_or(0, |pid| pid.as_raw_nonzero().get().unsigned_abs()),
            }),
        )?;
        if let Some(ending) = pid.and_then(|pid| self.reaper.claim(pid)) {
            self.ended(pid, ending)?;
        }
        self.forget_if_idle();
        Ok(())
    }

    fn start_pumps(
        &mut self,
        container: &Rc<str>,
        channels: Option<Channels>,
        terminal: Option<&std::os::fd::OwnedFd>,
    ) -> Result<[Option<u32>; 3], AgentError> {
        let mut numbers = [None; 3];
        let Some(channels) = channels else { return Ok(numbers) };
        for (number, pump) in numbers.iter_mut().zip(channels.into_pumps(terminal)?) {
            if let Some(pump) = pump {
                let given = self.next_number();
                self.streams.add(&self.poller, given, pump, container)?;
                *number = Some(given);
            }
        }
        Ok(numbers)
    }

    fn forget_if_idle(&mut self) {
        if self.errands.is_empty() {
            self.reaper.forget_unclaimed();
        }
    }
}

/// SIGKILL.
const KILL: u32 = libc::SIGKILL.unsigned_abs();

/// Whether a signal ends a process that does nothing about it (signal(7)).
fn ends_a_process(signal: u32) -> bool {
    const OTHERS: [i32; 8] = [
        libc::SIGCHLD,
        libc::SIGCONT,
        libc::SIGSTOP,
        libc::SIGTSTP,
        libc::SIGTTIN,
        libc::SIGTTOU,
        libc::SIGURG,
        libc::SIGWINCH,
    ];
    signal != 0 && !OTHERS.iter().any(|other| other.unsigned_abs() == signal)
}

fn send_to_all(cgroup: &Cgroup, signal: u32) -> std::io::Result<()> {
    if signal == KILL {
        return cgroup.kill();
    }
    for pid in cgroup.processes()? {
        match sys::kill(pid, signal) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}
