//! A fake vmm and agent that tests control. One thread serves the control protocol, another the agent's protocol. A
//! real child process stands for the vmm, so that it can be killed.

mod answer;
mod guest_agent;

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::{Command as Program, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
    time::Duration,
};

use async_trait::async_trait;
use nutshell_fixtures::HungVolume;
use nutshell_protocol::{
    Event, Exited, Failure, FailureKind, FrameBuffer, FromAgent, MAX_FROM_AGENT, MAX_TO_AGENT, Ready, Reply, Request,
    Stdio as Ports, ToAgent, encode,
};

use self::answer::statistics;
use super::behaviour::Behaviour;
use crate::{
    control::{Channel, Command, ControlError, EndReason, Extent, MemoryState, Notice, Software, monotonic_now},
    guest_image::GuestImage,
    shim::{
        child::Child,
        machine::{BootDisk, BootError, GuestResources, VmmProcess},
        pod::{Launcher, PodError},
        share::{FileServer, ShareError},
    },
};

/// A launcher of fake machines.
#[derive(Debug, Clone)]
pub(super) struct FakeLauncher {
    pub(super) fake: Arc<Fake>,
}

/// The shared state of all fake machines of a test.
#[derive(Debug)]
pub(super) struct Fake {
    behaviour: Behaviour,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    agent: Option<UnixStream>,
    /// The control channel of the machine with that agent.
    agents_control: Option<Arc<Channel>>,
    /// The control channel of the newest machine.
    control: Option<Arc<Channel>>,
    /// The addresses of the channels of machines that have booted.
    booted: HashSet<usize>,
    pid: u32,
    /// Neither the vmm nor the guest reacts to anything, as after SIGSTOP.
    is_stopped: bool,
    /// The file system with the disk that the vmm waits for.
    volume: Option<HungVolume>,
    /// The writing end of the vmm's standard error, which a fork of the vmm keeps open.
    forks_stderr: Option<io::PipeWriter>,
    /// The files of open streams, by port.
    inputs: HashMap<u32, File>,
    outputs: HashMap<u32, File>,
    /// Ports whose drain was requested and is not reported yet.
    undrained: Vec<u32>,
    /// The ports of each process, by container and exec.
    ports: HashMap<(String, Option<String>), Ports>,
    requests: Vec<Request>,
    /// The command lines of users' kernels that were booted.
    user_boots: Vec<String>,
    /// The socket behind the port of the guest agent of the newest machine with a user's kernel.
    guest_agent: Option<UnixStream>,
    /// Whether a program in the guest has that port open.
    is_guest_agent_open: bool,
    /// The requested sizes: MiB beyond the boot size, and vCPUs.
    resizes: Vec<(u64, u8)>,
}

impl FakeLauncher {
    pub(super) fn new(behaviour: Behaviour) -> Self {
        Self {
            fake: Arc::new(Fake {
                behaviour,
                state: Mutex::default(),
                changed: Condvar::new(),
            }),
        }
    }
}

/// Resources that no machine uses.
fn null_resources() -> GuestResources {
    let null = || File::open("/dev/null").unwrap();
    let extent = Extent { offset: 0, length: 0 };
    GuestResources {
        kvm: null().into(),
        image: GuestImage {
            kernel: null(),
            kernel_extent: extent,
            initramfs: null(),
            initramfs_extent: extent,
        },
        kernel_arguments: String::new(),
        board: crate::control::BoardKind::Container,
    }
}

#[async_trait]
impl Launcher for FakeLauncher {
    async fn open_guest_resources(&self) -> Result<GuestResources, PodError> {
        Ok(null_resources())
    }

    fn open_disk_reader_resources(&self) -> Result<GuestResources, BootError> {
        Ok(null_resources())
    }

    fn open_kvm(&self) -> Result<OwnedFd, BootError> {
        Ok(File::open("/dev/null").unwrap().into())
    }

    fn open_agent_disk(&self) -> Result<BootDisk, BootError> {
        Ok(BootDisk::Agent {
            file: File::open("/dev/null").unwrap(),
            extent: Extent { offset: 0, length: 0 },
        })
    }

    fn spawn_file_server(&self, _vmm: Option<OwnedFd>) -> Result<Option<(FileServer, OwnedFd)>, ShareError> {
        Ok(None)
    }

    fn spawn_vmm(&self) -> io::Result<VmmProcess> {
        let (control, theirs) = Channel::pair().unwrap();
        let (stderr, writer) = io::pipe()?;
        if self.fake.behaviour == Behaviour::OutlivedByFork {
            self.fake.state().forks_stderr = Some(writer.try_clone()?);
        }
        // The process lives until it is killed, or until the fake vmm ends and closes its standard input.
        let mut program = Program::new("cat");
        if self.fake.behaviour == Behaviour::WaitsForDisk {
            let volume = HungVolume::mount_temporary();
            program.arg(volume.path().join("disk"));
            self.fake.state().volume = Some(volume);
        }
        let child = program.stdin(Stdio::piped()).stderr(writer).spawn()?;
        if let Some(volume) = &self.fake.state().volume {
            volume.wait_for_request();
        }
        let pid = child.id();
        let watched = Child::from_std(&child)?;
        self.fake.state().pid = pid;
        let fake = self.fake.clone();
        thread::spawn(move || {
            fake.serve_control(Arc::new(theirs), pid);
            // Closes the child's standard input.
            drop(child);
        });
        Ok(VmmProcess {
            child: watched,
            control,
            stderr: stderr.into(),
            spawned_at: monotonic_now(),
        })
    }
}

impl Fake {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Waits until `condition` returns a value.
    fn wait_until<T>(&self, mut condition: impl FnMut(&mut State) -> Option<T>) -> T {
        let mut state = self.state();
        loop {
            if let Some(value) = condition(&mut state) {
                return value;
            }
            let (next, timeout) = self.changed.wait_timeout(state, Duration::from_secs(20)).unwrap();
            assert!(
                !timeout.timed_out(),
                "timeout of a condition on the fake machine: {next:?}"
            );
            state = next;
        }
    }

    /// The vmm: serves the control channel until the shim closes it or the child process is killed.
    fn serve_control(self: &Arc<Self>, control: Arc<Channel>, pid: u32) {
        // The kernel closes the channel of a killed vmm. Here a thread does it.
        let (fake, dying) = (self.clone(), control.clone());
        thread::spawn(move || {
            let process = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
            if let Ok(pidfd) = rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty()) {
                let mut poll = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
                rustix::event::poll(&mut poll, None).unwrap();
            }
            fake.state().is_stopped = false;
            fake.changed.notify_all();
            if fake.behaviour != Behaviour::OutlivedByFork {
                shut_down(&dying);
            }
        });
        loop {
            let received = control.receive::<Command>();
            self.wait_while_stopped();
            match received {
                Ok((command, descriptors)) => self.execute(&control, command, descriptors),
                Err(ControlError::Closed | ControlError::Socket { .. }) => break,
                Err(error) => panic!("{error}"),
            }
        }
        let mut state = self.state();
        // The next machine may run already.
        if state
            .agents_control
            .as_ref()
            .is_some_and(|newest| Arc::ptr_eq(newest, &control))
            && let Some(agent) = state.agent.take()
        {
            let _ = agent.shutdown(std::net::Shutdown::Both);
            state.inputs.clear();
            state.outputs.clear();
        }
    }

    fn execute(self: &Arc<Self>, control: &Arc<Channel>, command: Command, descriptors: Vec<OwnedFd>) {
        if matches!(command, Command::Boot(..)) {
            self.state().booted.insert(Arc::as_ptr(control).addr());
        }
        match command {
            Command::Boot(
                _,
                Software::User {
                    command_line,
                    initramfs,
                    console_input,
                    console_output,
                    guest_agent,
                    ..
                },
            ) => {
                {
                    // After KVM and kernel.
                    let earlier = [initramfs.is_some(), console_input, console_output];
                    let index = 2 + earlier.into_iter().filter(|present| *present).count();
                    let socket = descriptors.into_iter().nth(index).filter(|_| guest_agent);
                    let mut state = self.state();
                    state.control = Some(control.clone());
                    state.user_boots.push(command_line);
                    state.guest_agent = socket.map(UnixStream::from);
                    state.is_guest_agent_open = false;
                }
                match self.behaviour {
                    Behaviour::BootFails => self.end_guest(EndReason::BuildFailed("no memory".to_owned())),
                    Behaviour::NeverBuilt => {}
                    _ => notify(control, &Notice::Built),
                }
            }
            Command::Boot(..) => self.boot(control, descriptors),
            Command::OpenStream { port, input, output } => {
                let mut files = descriptors.into_iter().map(File::from);
                let mut state = self.state();
                if input {
                    state.inputs.insert(port, files.next().unwrap());
                }
                if output {
                    state.outputs.insert(port, files.next().unwrap());
                }
                assert!(files.next().is_none());
                self.changed.notify_all();
            }
            Command::Drain { port, .. } => {
                if self.behaviour == Behaviour::NeverDrains {
                    self.state().undrained.push(port);
                } else {
                    notify(control, &Notice::Drained { port });
                }
            }
            Command::CloseStream { port } => {
                {
                    let mut state = self.state();
                    state.inputs.remove(&port);
                    state.outputs.remove(&port);
                }
                notify(control, &Notice::StreamClosed { port });
            }
            Command::PressPowerButton if self.behaviour == Behaviour::IgnoresPowerButton => {}
            Command::PressPowerButton => self.end_guest(EndReason::GuestPowerOff),
            Command::ReadProgress => notify(control, &Notice::Progress { count: 7 }),
            Command::ReadStatistics if self.behaviour == Behaviour::NoStatistics => {}
            Command::ReadGuestAgentPort => {
                let open = self.state().is_guest_agent_open;
                notify(control, &Notice::GuestAgentPort { open });
            }
            Command::ReadGuestMemory => {
                let added = self.state().resizes.last().map_or(0, |(mib, _)| mib << 20);
                let is_online = self.behaviour != Behaviour::LeavesMemoryOffline;
                let state = MemoryState {
                    has_driver: self.behaviour != Behaviour::NeverPlugsMemory,
                    plugged: added,
                    total: Some((100 << 20) + if is_online { added } else { 0 }),
                };
                notify(control, &Notice::GuestMemory(state));
            }
            Command::ReadStatistics => {
                // Another first command than Boot ends a vmm.
                assert!(self.state().booted.contains(&Arc::as_ptr(control).addr()));
                notify(control, &Notice::Statistics(statistics()));
            }
            Command::ReadConsole => notify(control, &Notice::Console(b"Linux version\nno init\n".to_vec())),
            Command::PlugDisk { slot, .. } => {
                assert_eq!(descriptors.len(), 1);
                let slot = nutshell_protocol::FIRST_DISK_SLOT + slot;
                notify(control, &Notice::Plugged { slot, result: Ok(()) });
            }
            Command::UnplugDisk { slot } => {
                let slot = nutshell_protocol::FIRST_DISK_SLOT + slot;
                notify(control, &Notice::Unplugged { slot });
            }
            Command::Resize { memory, vcpus } => {
                self.state().resizes.push((memory >> 20, vcpus));
                if self.behaviour == Behaviour::CannotGrow {
                    let result = Err("no memory".to_owned());
                    notify(control, &Notice::Resized { result });
                    return self.changed.notify_all();
                }
                notify(control, &Notice::Resized { result: Ok(()) });
                if self.behaviour != Behaviour::NeverPlugsMemory {
                    notify(control, &Notice::MemoryPlugged { bytes: memory });
                }
            }
            Command::PlugNetworkDevice { .. } => panic!("unexpected {command:?}"),
        }
        self.changed.notify_all();
    }

    fn boot(self: &Arc<Self>, control: &Arc<Channel>, mut descriptors: Vec<OwnedFd>) {
        // KVM, kernel, initramfs, agent, and unless the machine is for a pod, one or two files of a disk.
        assert!((4..=6).contains(&descriptors.len()));
        let agent = UnixStream::from(descriptors.remove(3));
        {
            let mut state = self.state();
            state.control = Some(control.clone());
            state.agent = Some(agent.try_clone().unwrap());
            state.agents_control = Some(control.clone());
        }
        match self.behaviour {
            Behaviour::BootFails => notify(
                control,
                &Notice::Ended {
                    reason: EndReason::BuildFailed("KVM_CREATE_VM: no memory".to_owned()),
                    console: b"\x1b[31mnothing yet\r\n".to_vec(),
                },
            ),
            Behaviour::NeverReady => {}
            _ => {
                self.send(&FromAgent::Ready(Ready {
                    version: "0".to_owned(),
                    kernel: "0".to_owned(),
                }));
                let fake = self.clone();
                thread::spawn(move || fake.serve_agent(agent));
            }
        }
    }

    /// The agent: answers the requests of the shim.
    fn serve_agent(&self, mut stream: UnixStream) {
        let mut buffer = FrameBuffer::new(MAX_TO_AGENT);
        let mut bytes = [0; 4096];
        loop {
            while let Some(ToAgent { id, request }) = buffer.next().unwrap() {
                self.state().requests.push(request.clone());
                self.changed.notify_all();
                if self.behaviour.answers(&request) && !self.is_later_read(&request) {
                    let (result, event) = self.answer(request);
                    self.send(&FromAgent::Reply(Reply { id, result }));
                    if let Some(event) = event {
                        self.send(&FromAgent::Event(event));
                    }
                }
            }
            let read = stream.read(&mut bytes);
            self.wait_while_stopped();
            match read {
                Ok(length @ 1..) => buffer.push(&bytes[..length]),
                _ => return,
            }
        }
    }

    /// Whether the request reads the disk again, and the behaviour is to answer only the first such request.
    fn is_later_read(&self, request: &Request) -> bool {
        let is_read = |request: &Request| matches!(request, Request::FindDiskKernel { .. });
        self.behaviour == Behaviour::ReadsDiskOnce
            && is_read(request)
            && self.state().requests.iter().filter(|request| is_read(request)).count() > 1
    }

    fn wait_while_stopped(&self) {
        let state = self.state();
        drop(self.changed.wait_while(state, |state| state.is_stopped).unwrap());
    }

    /// Writes to the output of a stream, which the vmm may not have yet.
    pub(in crate::shim::tests) fn write_to_stream(&self, port: u32, bytes: &[u8]) {
        let mut output = self.wait_until(|state| state.outputs.get(&port).map(|file| file.try_clone().unwrap()));
        output.write_all(bytes).unwrap();
    }

    /// Ends the guest of the current machine.
    pub(super) fn end_guest(&self, reason: EndReason) {
        self.end_guest_after(reason, "the last line");
    }

    /// Resets the current machine after a panic of its guest, which writes `line`.
    pub(super) fn panic_guest(&self, line: &str) {
        self.end_guest_after(EndReason::GuestReset, line);
    }

    fn end_guest_after(&self, reason: EndReason, line: &str) {
        let control = self.state().control.clone().unwrap();
        let console = format!("{line}\n").into_bytes();
        notify(&control, &Notice::Ended { reason, console });
    }

    /// Waits until `count` users' kernels were booted, and returns the last command line.
    pub(super) async fn user_boots(self: &Arc<Self>, count: usize) -> String {
        let fake = self.clone();
        let wait = move || fake.wait_until(|state| state.user_boots.get(count - 1).cloned());
        tokio::task::spawn_blocking(wait).await.unwrap()
    }

    pub(in crate::shim::tests) fn send(&self, message: &FromAgent) {
        let frame = encode(message, MAX_FROM_AGENT).unwrap();
        // Fails if the shim has ended the machine.
        if let Some(agent) = &mut self.state().agent {
            let _ = agent.write_all(&frame);
        }
    }

    /// Closes the outputs of a container, as if its remaining processes were killed.
    fn close_outputs(&self, container: &str) {
        let (control, closed) = {
            let mut state = self.state();
            let ports = state
                .ports
                .get(&(container.to_owned(), None))
                .cloned()
                .unwrap_or_default();
            let ports: Vec<_> = ports.stdout.into_iter().chain(ports.stderr).collect();
            let closed: Vec<_> = ports
                .into_iter()
                .filter(|port| state.outputs.remove(port).is_some())
                .collect();
            (state.control.clone().unwrap(), closed)
        };
        for port in closed {
            notify(&control, &Notice::StreamClosed { port });
        }
    }

    /// Reports the exit of a process. `written` is the number of bytes that it wrote to standard output and error.
    pub(super) fn report_exit(&self, container: &str, exec: Option<&str>, status: u8, written: [u64; 2]) {
        self.send(&FromAgent::Event(exit_event(container, exec, status, written)));
    }

    /// Reports that a container ran out of memory.
    pub(super) fn report_out_of_memory(&self, container: &str) {
        self.send(&FromAgent::Event(Event::OutOfMemory {
            container: container.to_owned(),
        }));
    }

    /// The agent's end of the stream of the newest machine.
    pub(super) fn agent_stream(&self) -> UnixStream {
        self.state().agent.as_ref().unwrap().try_clone().unwrap()
    }

    /// Waits for a request to drain a stream, and reports the stream as drained.
    pub(super) fn report_drained(&self) {
        let port = self.wait_until(|state| state.undrained.pop());
        let control = self.state().control.clone().unwrap();
        notify(&control, &Notice::Drained { port });
    }

    /// Writes to the standard output of a container's first process, and closes it.
    pub(super) fn write_and_close(&self, container: &str, text: &str) {
        let mut output = self.take_output(container);
        output.write_all(text.as_bytes()).unwrap();
        drop(output);
        self.report_closed_output(container);
    }

    /// Takes the standard output of a container's first process. Call [`Self::report_closed_output`] after closing it.
    pub(super) fn take_output(&self, container: &str) -> File {
        let port = self.port(container, None, |ports| ports.stdout);
        self.wait_until(|state| state.outputs.remove(&port))
    }

    /// Reports that the standard output of a container's first process was closed.
    pub(super) fn report_closed_output(&self, container: &str) {
        let port = self.port(container, None, |ports| ports.stdout);
        let control = self.state().control.clone().unwrap();
        notify(&control, &Notice::StreamClosed { port });
    }

    /// Takes the standard input of a container's first process.
    pub(super) fn take_input(&self, container: &str) -> File {
        let port = self.port(container, None, |ports| ports.stdin);
        self.wait_until(|state| state.inputs.remove(&port))
    }

    /// Takes the standard input of an exec.
    pub(super) fn take_exec_input(&self, container: &str, exec: &str) -> File {
        let port = self.port(container, Some(exec), |ports| ports.stdin);
        self.wait_until(|state| state.inputs.remove(&port))
    }

    fn port(&self, container: &str, exec: Option<&str>, which: impl Fn(&Ports) -> Option<u32>) -> u32 {
        let key = (container.to_owned(), exec.map(str::to_owned));
        self.wait_until(|state| state.ports.get(&key).and_then(&which))
    }

    /// Waits until the shim has requested at least `count` sizes, and returns them: MiB beyond the boot size, and
    /// vCPUs.
    pub(super) fn resizes(&self, count: usize) -> Vec<(u64, u8)> {
        self.wait_until(|state| (state.resizes.len() >= count).then(|| state.resizes.clone()))
    }

    /// All requests so far.
    pub(super) fn requests(&self) -> Vec<Request> {
        self.state().requests.clone()
    }

    /// Waits for a request for which `wanted` returns a value.
    pub(super) fn wait_for_request<T>(&self, wanted: impl Fn(&Request) -> Option<T>) -> T {
        self.wait_until(|state| state.requests.iter().find_map(&wanted))
    }

    /// Stops the vmm of the newest machine, as SIGSTOP would. SIGKILL still ends it.
    pub(super) fn stop_vmm(&self) {
        self.state().is_stopped = true;
    }

    /// Fails the call of the vmm that waits for a disk.
    pub(super) fn release_disk(&self) {
        self.state().volume = None;
    }

    /// Kills the vmm of the newest machine.
    pub(super) fn kill_vmm(&self) {
        let pid = rustix::process::Pid::from_raw(self.vmm_pid().cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }

    /// The pid of the vmm of the newest machine.
    pub(super) fn vmm_pid(&self) -> u32 {
        self.state().pid
    }
}

fn exit_event(container: &str, exec: Option<&str>, status: u8, [stdout_bytes, stderr_bytes]: [u64; 2]) -> Event {
    Event::Exited(Exited {
        container: container.to_owned(),
        exec: exec.map(str::to_owned),
        status,
        exited_at: 0,
        stdout_bytes,
        stderr_bytes,
    })
}

/// The agent's failure if the spec's program is `nosuch`.
fn missing_program(spec: &[u8]) -> Option<Failure> {
    let missing = String::from_utf8_lossy(spec).contains("nosuch");
    missing.then(|| Failure {
        kind: FailureKind::NotFound,
        message: "exec: \"nosuch\": executable file not found in $PATH".to_owned(),
    })
}

fn notify(control: &Channel, notice: &Notice) {
    // Fails if the shim has ended the machine.
    let _ = control.send(notice, &[]);
}

fn shut_down(control: &Channel) {
    use std::os::fd::AsFd;
    let _ = rustix::net::shutdown(control.as_fd(), rustix::net::Shutdown::Both);
}
