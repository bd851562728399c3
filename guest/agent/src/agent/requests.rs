//! Handles the requests of the host. Work that may take long becomes a job, and `reports` handles its result.

use std::collections::btree_map::Entry;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use nutshell_protocol::{
    CreateContainer, Failure, MAX_PROCESSES, PidNamespace, ProcessEntry, Request, Response, SetUpPod, StartExec,
    ToAgent,
};
use rustix::fs::{Mode, OFlags};

use super::signals::{KILL, LAST_SIGNAL, signal_all, terminates_by_default};
use super::{Agent, AgentError, PendingJob, Purpose, Role, blocked};
use crate::cgroup::{freeze, limits, stats};
use crate::container::create::PodContext;
use crate::container::exec::{self, TargetContainer};
use crate::container::{Container, Process, Stage, create, delete, guest_process, start};
use crate::failure::{Context, FailureExt};
use crate::job::{Job, JobWork, Outcome};
use crate::machine::{clock, disk, disk_kernel, forward, names, network, settings, shell, size};
use crate::pod;
use crate::poller::Token;
use crate::stdio::{self, AgentEnds};
use crate::sys;

/// How a request is answered.
pub(super) enum Answer {
    /// Immediately, with this response.
    Now(Response),
    /// When the report of a job arrives.
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
        if self.role == Role::Service && !is_served_by_service(&request) {
            return Err(Failure::unsupported(
                "the agent in the guest of a virtual machine does not support this request",
            ));
        }
        match request {
            Request::SetUpPod(request) => self.set_up_pod(id, request),
            Request::CreateContainer(request) => self.create(id, &request),
            Request::StartContainer { container } => self.start(id, &container),
            Request::StartExec(request) => match self.role {
                Role::Init => self.exec(id, &request),
                Role::Service => self.start_guest_process(id, &request),
            },
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
            Request::Processes { container } => self.processes(&container),
            Request::Stats { container } => self.stats(&container),
            Request::Update { container, resources } => self.update(id, &container, &resources),
            Request::Pause { container } => self.freeze(id, container, true),
            Request::Resume { container } => self.freeze(id, container, false),
            Request::BlockedThreads { container, exec } => {
                let threads = blocked::find(self.container(&container)?, exec.as_deref());
                Ok(Answer::Now(Response::BlockedThreads(threads)))
            }
            Request::DeleteContainer { container } => self.delete(id, &container, Purpose::Delete, delete::remove_all),
            Request::AbandonContainer { container } => self.delete(id, &container, Purpose::Abandon, delete::abandon),
            Request::ConfigureGuest(guest_settings) => {
                settings::apply(&guest_settings)?;
                Ok(Answer::Now(Response::Done))
            }
            Request::SetClock { nanoseconds, rate } => {
                let reading = self.clock.set(nanoseconds, rate);
                Ok(Answer::Now(Response::Clock(
                    reading.context(|| "set the clock".to_owned())?,
                )))
            }
            Request::SteerClock(steering) => {
                let reading = self.clock.steer(&self.poller, &steering);
                Ok(Answer::Now(Response::Clock(
                    reading.context(|| "change the rate of the clock".to_owned())?,
                )))
            }
            Request::ReadClock => Ok(Answer::Now(Response::Clock(clock::read()))),
            Request::ProbeNetworkDevices { slots } => {
                let indexes = slots
                    .iter()
                    .map(|slot| network::probe(*slot).context(|| format!("probe the network device in slot {slot}")))
                    .collect::<Result<_, _>>()?;
                Ok(Answer::Now(Response::InterfaceIndexes(indexes)))
            }
            Request::ReleaseDisk { slot } => {
                self.start_job(id, Purpose::Other, None, &[], &mut || {
                    disk::release(slot).context(|| format!("release the disk in disk slot {slot}"))?;
                    Ok((Outcome::Done, None))
                })?;
                Ok(Answer::Later)
            }
            Request::FindDiskKernel {
                slot,
                kernel_stream_port,
                initrd_stream_port,
            } => {
                let dial = |port| {
                    let stream = self.host.dial(port);
                    stream.context(|| format!("connect to the host's port {port}"))
                };
                let (kernel, initrd) = (dial(kernel_stream_port)?, dial(initrd_stream_port)?);
                self.start_job(id, Purpose::Other, None, &[kernel.as_fd(), initrd.as_fd()], &mut || {
                    let sent = disk_kernel::send(slot, &kernel, &initrd)?;
                    Ok((Outcome::DiskKernel(sent), None))
                })?;
                Ok(Answer::Later)
            }
            Request::ResizeMachine {
                vcpus,
                has_memory_device,
            } => {
                self.start_job(id, Purpose::Other, None, &[], &mut || {
                    size::resize(vcpus, has_memory_device)?;
                    Ok((Outcome::Done, None))
                })?;
                Ok(Answer::Later)
            }
            Request::ConfigureNetwork {
                links,
                parameters,
                messages,
            } => {
                network::configure(&links)?;
                settings::set_network_parameters(&parameters)?;
                network::configure(&messages)?;
                Ok(Answer::Now(Response::Done))
            }
            Request::ForwardConnection { stream_port, targets } => {
                let stream = self
                    .host
                    .dial(stream_port)
                    .context(|| format!("connect to the host's port {stream_port}"))?;
                self.start_job(id, Purpose::Other, None, &[stream.as_fd()], &mut || {
                    forward::start(&stream, &targets)?;
                    Ok((Outcome::Done, None))
                })?;
                Ok(Answer::Later)
            }
            Request::OpenShell(request) => {
                let port = request.stream_port;
                let stream = self
                    .host
                    .dial(port)
                    .context(|| format!("connect to the host's port {port}"))?;
                self.start_job(id, Purpose::Other, None, &[stream.as_fd()], &mut || {
                    shell::start(&stream, &request)?;
                    Ok((Outcome::Done, None))
                })?;
                Ok(Answer::Later)
            }
            Request::RelayNames { stream_port } => {
                let stream = self
                    .host
                    .dial(stream_port)
                    .context(|| format!("connect to the host's port {stream_port}"))?;
                self.start_job(id, Purpose::Other, None, &[stream.as_fd()], &mut || {
                    names::start(&stream)?;
                    Ok((Outcome::Done, None))
                })?;
                Ok(Answer::Later)
            }
            Request::Shutdown => self.shut_down(id),
        }
    }

    fn set_up_pod(&mut self, id: u64, request: SetUpPod) -> Result<Answer, Failure> {
        let is_running = |pending: &PendingJob| matches!(pending.purpose, Purpose::SetUpPod(_));
        if self.pod.is_some() || self.pending_jobs.values().any(is_running) {
            return Err(Failure::exists("the pod is set up already"));
        }
        let purpose = Purpose::SetUpPod(Box::new(request.clone()));
        self.start_job(id, purpose, None, &[], &mut || {
            pod::set_up(&request).map(|outcome| (outcome, None))
        })?;
        Ok(Answer::Later)
    }

    fn create(&mut self, id: u64, request: &CreateContainer) -> Result<Answer, Failure> {
        let name = &request.container;
        if self.containers.contains_key(name.as_str()) {
            return Err(Failure::exists(format!("container {name} exists")));
        }
        let (agent_ends, process_ends) = AgentEnds::open(&self.host, &request.stdio)
            .context(|| format!("open the standard streams of container {name}"))?;
        let pid_namespace = self.open_pid_namespace(&request.pid_namespace)?;
        let pod = self.pod.clone();
        let pod_context = PodContext {
            pod: pod.as_ref(),
            pid_namespace: pid_namespace.as_ref().map(OwnedFd::as_fd),
        };
        let container: Rc<str> = name.as_str().into();
        let purpose = Purpose::Create(Rc::clone(&container));
        let work: JobWork<'_> = &mut || create::create(request, &pod_context, &process_ends);
        let keep: Vec<_> = process_ends
            .descriptors()
            .into_iter()
            .chain(pod_context.pid_namespace)
            .collect();
        self.start_job(id, purpose, Some(agent_ends), &keep, work)?;
        self.containers
            .insert(container, Container::new(name, request.spec.as_slice().into()));
        Ok(Answer::Later)
    }

    /// Opens the pid namespace that a container shares. Returns `None` if the spec selects the namespace.
    fn open_pid_namespace(&mut self, namespace: &PidNamespace) -> Result<Option<OwnedFd>, Failure> {
        let (pid, whose) = match namespace {
            PidNamespace::Specified => return Ok(None),
            PidNamespace::Pod => (self.pod.as_ref().map(|pod| pod.init), "the pod".to_owned()),
            PidNamespace::Container(name) => {
                let init = &self.container(name)?.init;
                let pid = init.pid.filter(|_| init.exit.is_none());
                (pid, format!("container {name}"))
            }
        };
        let pid = pid.ok_or_else(|| Failure::precondition(format!("{whose} has no pid namespace to share")))?;
        let path = format!("/proc/{}/ns/pid", pid.as_raw_nonzero());
        let namespace = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        namespace
            .map(Some)
            .context(|| format!("open the pid namespace of {whose}"))
    }

    fn start(&mut self, id: u64, name: &str) -> Result<Answer, Failure> {
        let container = self.container(name)?;
        if container.stage != Stage::Created {
            return Err(wrong_stage(name, container.stage));
        }
        if start::has_start_hooks(name) {
            let purpose = Purpose::Start(name.into(), container.init.pid);
            let answer = self.run_job(id, purpose, &mut || start::start_with_hooks(name))?;
            self.container(name)?.stage = Stage::Running;
            return Ok(answer);
        }
        start::start(name).context(|| format!("start container {name}"))?;
        container.stage = Stage::Running;
        Ok(Answer::Now(Response::Done))
    }

    fn exec(&mut self, id: u64, request: &StartExec) -> Result<Answer, Failure> {
        let name = &request.container;
        let container = self.container(name)?;
        if !matches!(container.stage, Stage::Created | Stage::Running) {
            return Err(wrong_stage(name, container.stage));
        }
        if container.paused {
            return Err(Failure::precondition(format!("container {name} is paused")));
        }
        let Entry::Vacant(slot) = container.execs.entry(request.exec.clone()) else {
            return Err(Failure::exists(format!(
                "exec {} of container {name} exists",
                request.exec
            )));
        };
        let (Some(init), Some(pidfd)) = (container.init.pid, &container.pidfd) else {
            return Err(Failure::internal(format!("container {name} has no first process")));
        };
        let pidfd = pidfd
            .try_clone()
            .context(|| format!("duplicate the pidfd of container {name}"))?;
        let (spec, cgroup) = (Rc::clone(&container.spec), container.cgroup.clone());
        slot.insert(Process::default());

        let started = AgentEnds::open(&self.host, &request.stdio)
            .context(|| format!("open the standard streams of exec {} in container {name}", request.exec))
            .and_then(|(agent_ends, process_ends)| {
                let target = TargetContainer {
                    spec: &spec,
                    init,
                    pidfd: pidfd.as_fd(),
                    cgroup: &cgroup,
                };
                let [stdin, stdout, stderr] = process_ends.descriptors();
                let purpose = Purpose::Exec(name.as_str().into(), request.exec.clone());
                let work: JobWork<'_> = &mut || exec::exec(request, &target, &process_ends);
                self.start_job(
                    id,
                    purpose,
                    Some(agent_ends),
                    &[stdin, stdout, stderr, pidfd.as_fd()],
                    work,
                )
            });
        if started.is_err() {
            self.container(name)?.execs.remove(&request.exec);
        }
        started.map(|()| Answer::Later)
    }

    /// Starts a process in the guest itself.
    fn start_guest_process(&mut self, id: u64, request: &StartExec) -> Result<Answer, Failure> {
        let name: Rc<str> = request.container.as_str().into();
        let guest = self
            .containers
            .entry(Rc::clone(&name))
            .or_insert_with(|| Container::of_guest(&request.container));
        let Entry::Vacant(slot) = guest.execs.entry(request.exec.clone()) else {
            return Err(Failure::exists(format!("exec {} exists", request.exec)));
        };
        slot.insert(Process::default());
        let started = AgentEnds::open(&self.host, &request.stdio)
            .context(|| format!("open the standard streams of exec {}", request.exec))
            .and_then(|(agent_ends, process_ends)| {
                let purpose = Purpose::Exec(Rc::clone(&name), request.exec.clone());
                let work: JobWork<'_> = &mut || guest_process::start(request, &process_ends);
                self.start_job(id, purpose, Some(agent_ends), &process_ends.descriptors(), work)
            });
        if started.is_err() {
            self.container(&name)?.execs.remove(&request.exec);
        }
        started.map(|()| Answer::Later)
    }

    fn signal(&mut self, name: &str, exec: Option<&str>, signal: u32, all: bool) -> Result<Answer, Failure> {
        let finished = || Failure::not_found("process already finished");
        if signal > LAST_SIGNAL {
            return Err(Failure::invalid(format!("there is no signal {signal}")));
        }
        let container = self.container(name)?;
        let not_started = exec.is_none() && container.stage == Stage::Created;
        if all && !not_started {
            let sent = signal_all(&container.cgroup, signal).context(|| format!("signal container {name}"))?;
            return if sent {
                Ok(Answer::Now(Response::Done))
            } else {
                Err(finished())
            };
        }
        if let Some(exec) = exec.and_then(|exec| container.execs.get_mut(exec))
            && exec.pid.is_none()
            && signal == KILL
        {
            // The job of the exec is still running. Either the shim no longer waits for the start, or a client kills
            // the exec while it is starting.
            exec.kill_when_started = true;
            return Ok(Answer::Now(Response::Done));
        }
        let process = container.process(exec).ok_or_else(finished)?;
        let pid = process.pid.filter(|_| process.exit.is_none()).ok_or_else(finished)?;
        let mut sent = signal;
        if not_started && terminates_by_default(signal) {
            // The process still runs the agent's code as pid 1 of its namespace, so the kernel would ignore the signal.
            process.reported_signal = Some(signal);
            sent = KILL;
        }
        sys::kill(pid, sent).context(|| format!("signal container {name}"))?;
        Ok(Answer::Now(Response::Done))
    }

    fn resize(&mut self, name: &str, exec: Option<&str>, width: u16, height: u16) -> Result<Answer, Failure> {
        let container = self.container(name)?;
        let process = container.process(exec).ok_or_else(|| {
            Failure::not_found(format!(
                "exec {} of container {name} does not exist",
                exec.unwrap_or_default()
            ))
        })?;
        if let Some(terminal) = &process.terminal {
            stdio::resize_terminal(terminal, width, height)
                .context(|| format!("resize a terminal in container {name} to {width} x {height}"))?;
        }
        Ok(Answer::Now(Response::Done))
    }

    fn processes(&mut self, name: &str) -> Result<Answer, Failure> {
        let container = self.container(name)?;
        let pids = container.cgroup.processes().pids;
        let entry = |pid| ProcessEntry {
            pid: sys::raw_pid(pid),
            exec: container
                .execs
                .iter()
                .find(|(_, exec)| exec.pid == Some(pid))
                .map(|(id, _)| id.clone()),
        };
        Ok(Answer::Now(Response::Processes(
            pids.into_iter().take(MAX_PROCESSES).map(entry).collect(),
        )))
    }

    fn stats(&mut self, name: &str) -> Result<Answer, Failure> {
        let container = self.created_container(name)?;
        let stats = stats::read(&container.cgroup, container.init.pid);
        Ok(Answer::Now(Response::Stats(Box::new(stats))))
    }

    fn update(&mut self, id: u64, name: &str, resources: &[u8]) -> Result<Answer, Failure> {
        let cgroup = self.created_container(name)?.cgroup.clone();
        self.run_job(id, Purpose::Other, &mut || limits::update(&cgroup, resources))
    }

    fn freeze(&mut self, id: u64, name: String, frozen: bool) -> Result<Answer, Failure> {
        let container = self.container(&name)?;
        let stage = container.stage;
        if !matches!(stage, Stage::Created | Stage::Running) || container.paused == frozen {
            let state = if container.paused {
                "paused".to_owned()
            } else {
                format!("{stage:?}").to_lowercase()
            };
            return Err(Failure::precondition(format!("container {name} is {state}")));
        }
        let cgroup = container.cgroup.clone();
        self.run_job(id, Purpose::Freeze(name.as_str().into(), frozen), &mut || {
            freeze::set_frozen(&cgroup, frozen)
                .context(|| format!("{} container {name}", if frozen { "pause" } else { "resume" }))
        })
    }

    fn delete(
        &mut self,
        id: u64,
        name: &str,
        purpose: fn(Rc<str>) -> Purpose,
        remove: fn(&str) -> Result<(), Failure>,
    ) -> Result<Answer, Failure> {
        let container = self.container(name)?;
        if container.stage == Stage::Deleting {
            return Err(wrong_stage(name, container.stage));
        }
        container.stage = Stage::Deleting;
        self.kill_jobs(name);
        let started = self.run_job(id, purpose(name.into()), &mut || remove(name));
        if started.is_err() {
            self.container(name)?.stage = Stage::Stopped;
        }
        started
    }

    fn shut_down(&mut self, id: u64) -> Result<Answer, Failure> {
        let names: Vec<_> = self.containers.keys().cloned().collect();
        for name in &names {
            self.kill_jobs(name);
        }
        self.run_job(id, Purpose::Other, &mut || {
            for name in &names {
                // Continue after an error: the remaining containers must release their file systems, too.
                let _ = delete::remove_all(name);
            }
            rustix::fs::sync();
            Ok(())
        })
    }

    pub(super) fn container(&mut self, name: &str) -> Result<&mut Container, Failure> {
        self.containers
            .get_mut(name)
            .ok_or_else(|| Failure::not_found(format!("container {name} does not exist")))
    }

    /// Returns a container that has been created.
    fn created_container(&mut self, name: &str) -> Result<&mut Container, Failure> {
        let container = self.container(name)?;
        match container.stage {
            Stage::Creating => Err(wrong_stage(name, container.stage)),
            _ => Ok(container),
        }
    }

    pub(super) fn run_job(
        &mut self,
        id: u64,
        purpose: Purpose,
        work: &mut dyn FnMut() -> Result<(), Failure>,
    ) -> Result<Answer, Failure> {
        self.start_job(id, purpose, None, &[], &mut || {
            work()?;
            Ok((Outcome::Done, None))
        })?;
        Ok(Answer::Later)
    }

    /// Starts a job, which first waits until the streams of `agent_ends` are connected. It keeps the descriptors in
    /// `keep` for `work`.
    fn start_job(
        &mut self,
        request: u64,
        purpose: Purpose,
        agent_ends: Option<AgentEnds>,
        keep: &[BorrowedFd<'_>],
        work: JobWork<'_>,
    ) -> Result<(), Failure> {
        let number = self.next_source_number();
        let watch = |reports: BorrowedFd<'_>| self.poller.watch_input(reports, Token::Job(number));
        let streams: Vec<_> = agent_ends.iter().flat_map(AgentEnds::streams).collect();
        let kept = [keep, &streams].concat();
        let job = Job::start(&kept, watch, &mut || {
            // In the job, because the event loop may not wait for the host.
            if let Some(agent_ends) = &agent_ends {
                agent_ends
                    .await_connections()
                    .context(|| "connect the standard streams".to_owned())?;
                // A process that the job creates must not keep them open.
                sys::close_in_child(&streams);
            }
            work()
        })
        .context(|| format!("start the job of request {request}"))?;
        let pending = PendingJob {
            job,
            request,
            purpose,
            agent_ends,
        };
        self.pending_jobs.insert(number, pending);
        Ok(())
    }
}

/// Whether the agent handles a request in [`Role::Service`].
fn is_served_by_service(request: &Request) -> bool {
    match request {
        Request::StartExec(_) | Request::ForwardConnection { .. } => true,
        // Only an exec can be signalled: the guest itself has no first process that the agent started.
        Request::Signal { exec, all, .. } => exec.is_some() && !all,
        Request::Resize { exec, .. } => exec.is_some(),
        _ => false,
    }
}

fn wrong_stage(name: &str, stage: Stage) -> Failure {
    Failure::precondition(format!("container {name} is {}", format!("{stage:?}").to_lowercase()))
}
