//! A test double of the shim.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nutshell_protocol::{
    AGENT_PORT, CONTAINERS_PATH, CreateContainer, Event, Exited, Failure, FrameBuffer, FromAgent, MAX_FROM_AGENT,
    MAX_TO_AGENT, PidNamespace, Request, Response, Rootfs, SHARE_PATH, StartExec, Stdio, ToAgent, encode,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags};
use serde_json::{Value, json};
use vsock::{VMADDR_CID_ANY, VsockListener};

#[allow(unused_imports, reason = "the tests of machines do not use all of them")]
pub(crate) use nutshell_fixtures::{fill_root, process, shell, spec};

/// How long any step may take, even on a machine that is emulated in software.
const TIMEOUT: Duration = Duration::from_secs(60);

static LAST: AtomicU32 = AtomicU32::new(0);

/// Returns a number that is unique in this run.
pub(crate) fn unique() -> u32 {
    LAST.fetch_add(1, Ordering::Relaxed) + 1
}

/// The address at which the agent connects to its host.
enum HostAddress {
    Unix(PathBuf),
    Vsock,
}

impl HostAddress {
    fn listen(&self, port: u32) -> Port {
        let listener = match self {
            Self::Unix(directory) => Listener::Unix(UnixListener::bind(directory.join(port.to_string())).unwrap()),
            Self::Vsock => Listener::Vsock(VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port).unwrap()),
        };
        Port { port, listener }
    }
}

/// An agent under test: a process of this machine, or PID 1 of another.
pub(crate) struct Agent {
    child: Child,
    host: HostAddress,
    stream: File,
    incoming: FrameBuffer,
    queue: VecDeque<FromAgent>,
    last_request: u64,
}

impl Agent {
    /// Starts an agent as a process of this machine, and waits until it is ready.
    pub(crate) fn start() -> Self {
        prepare_share();
        Self::start_process(&[])
    }

    /// Starts an agent that is a service of this machine, and waits until it is ready.
    pub(crate) fn start_service() -> Self {
        Self::start_process(&["serve"])
    }

    fn start_process(arguments: &[&str]) -> Self {
        let directory = std::env::temp_dir().join(format!("agent-{}-{}", std::process::id(), unique()));
        fs::create_dir_all(&directory).unwrap();
        let program = std::env::var("NUTSHELL_AGENT").unwrap_or(env!("CARGO_BIN_EXE_nutshell-agent").to_owned());
        let mut command = Command::new(program);
        command.arg("--test-unix").arg(&directory).args(arguments);
        Self::connect(HostAddress::Unix(directory), command)
    }

    /// Boots a machine with `command`, and waits until its agent is ready.
    pub(crate) fn boot(command: Command) -> Self {
        Self::connect(HostAddress::Vsock, command)
    }

    fn connect(host: HostAddress, mut command: Command) -> Self {
        let port = host.listen(AGENT_PORT);
        let child = command.spawn().unwrap();
        let mut agent = Self {
            child,
            host,
            stream: port.accept(),
            incoming: FrameBuffer::new(MAX_FROM_AGENT),
            queue: VecDeque::new(),
            last_request: 0,
        };
        let FromAgent::Ready(ready) = agent.receive() else {
            panic!("the first message is not Ready");
        };
        assert!(!ready.kernel.is_empty() && !ready.version.is_empty());
        agent
    }

    /// Returns how many open descriptors and how many children the agent has.
    pub(crate) fn count_resources(&self) -> (usize, usize) {
        let pid = self.child.id();
        let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        (open, children.split_whitespace().count())
    }

    /// Returns the size of the agent's resident memory, in bytes.
    pub(crate) fn resident_memory(&self) -> u64 {
        let pages = fs::read_to_string(format!("/proc/{}/statm", self.child.id())).unwrap();
        let resident: u64 = pages.split(' ').nth(1).unwrap().parse().unwrap();
        resident * rustix::param::page_size() as u64
    }

    fn receive(&mut self) -> FromAgent {
        loop {
            if let Some(message) = self.incoming.next().unwrap() {
                return message;
            }
            let mut bytes = [0; 4096];
            let read = self.stream.read(&mut bytes).expect("the agent sent nothing in time");
            assert!(read > 0, "the agent closed its stream");
            self.incoming.push(&bytes[..read]);
        }
    }

    /// Sends a request, and returns its id without waiting for the reply.
    pub(crate) fn send(&mut self, request: Request) -> u64 {
        self.last_request += 1;
        let id = self.last_request;
        self.stream
            .write_all(&encode(&ToAgent { id, request }, MAX_TO_AGENT).unwrap())
            .unwrap();
        id
    }

    /// Waits for the reply to a request. Keeps other messages for later.
    pub(crate) fn reply(&mut self, id: u64) -> Result<Response, Failure> {
        let is_match = |message: &FromAgent| matches!(message, FromAgent::Reply(reply) if reply.id == id);
        match self.receive_matching(is_match) {
            FromAgent::Reply(reply) => reply.result,
            other => unreachable!("{other:?} is not a reply"),
        }
    }

    /// Waits for the first message that matches. Keeps other messages for later.
    fn receive_matching(&mut self, is_match: impl Fn(&FromAgent) -> bool) -> FromAgent {
        if let Some(at) = self.queue.iter().position(&is_match) {
            return self.queue.remove(at).unwrap();
        }
        loop {
            let message = self.receive();
            if is_match(&message) {
                return message;
            }
            self.queue.push_back(message);
        }
    }

    /// Sends a request and waits for its reply.
    pub(crate) fn ask(&mut self, request: Request) -> Result<Response, Failure> {
        let id = self.send(request);
        self.reply(id)
    }

    /// Waits for the next event.
    pub(crate) fn event(&mut self) -> Event {
        match self.receive_matching(|message| matches!(message, FromAgent::Event(_))) {
            FromAgent::Event(event) => event,
            other => unreachable!("{other:?} is not an event"),
        }
    }

    /// Waits for the next event, which must be an exit.
    pub(crate) fn exit(&mut self) -> Exited {
        match self.event() {
            Event::Exited(exited) => exited,
            other => panic!("{other:?} instead of an exit"),
        }
    }

    /// Listens on a new port, to which the agent can connect a stream.
    pub(crate) fn listen(&self) -> Port {
        self.host.listen(1024 + unique())
    }

    /// Creates a container and returns the pid of its first process.
    pub(crate) fn create(&mut self, id: &str, spec: &Value, stdio: Stdio) -> Result<u32, Failure> {
        let request = create_request(id, spec, stdio);
        self.ask(request).map(|response| match response {
            Response::Created { pid } => pid,
            other => panic!("{other:?} instead of a pid"),
        })
    }

    /// Starts an exec and returns its pid.
    pub(crate) fn exec(&mut self, id: &str, exec: &str, process: &Value, stdio: Stdio) -> Result<u32, Failure> {
        let request = Request::StartExec(StartExec {
            container: id.to_owned(),
            exec: exec.to_owned(),
            process: process.to_string().into_bytes(),
            stdio,
        });
        self.ask(request).map(|response| match response {
            Response::Created { pid } => pid,
            other => panic!("{other:?} instead of a pid"),
        })
    }

    /// Starts a created container.
    pub(crate) fn start_container(&mut self, id: &str) {
        let container = id.to_owned();
        assert_eq!(self.ask(Request::StartContainer { container }), Ok(Response::Done));
    }

    /// Signals a container's first process.
    pub(crate) fn kill(&mut self, id: &str, signal: u32) -> Result<Response, Failure> {
        self.ask(Request::Signal {
            container: id.to_owned(),
            exec: None,
            signal,
            all: false,
        })
    }

    /// Deletes a container, and checks that nothing is left of it.
    pub(crate) fn delete(&mut self, id: &str) {
        let container = id.to_owned();
        assert_eq!(self.ask(Request::DeleteContainer { container }), Ok(Response::Done));
        assert_nothing_left(id);
    }

    /// Runs a container until it ends. Returns its exit and its standard output.
    pub(crate) fn run(&mut self, spec: &Value) -> (Exited, String) {
        let id = &format!("run-{}", unique());
        let output = self.listen();
        let stdio = Stdio {
            stdout: Some(output.port),
            stderr: None,
            ..Stdio::default()
        };
        self.create(id, spec, stdio).unwrap();
        let mut output = output.accept();
        self.start_container(id);
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        let exited = self.exit();
        assert_eq!(exited.container, *id);
        self.delete(id);
        (exited, text)
    }
}

impl Drop for Agent {
    /// Closes the agent stream, and checks that the agent ends by itself and with success.
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both);
        let pid = Pid::from_child(&self.child);
        let ended = is_ready(&rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap());
        if !ended {
            self.child.kill().unwrap();
        }
        let status = self.child.wait().unwrap();
        assert!(
            std::thread::panicking() || ended,
            "the agent did not end after the host closed the stream"
        );
        assert!(
            std::thread::panicking() || status.success(),
            "the agent ended with {status}"
        );
    }
}

/// Whether a descriptor becomes readable within [`TIMEOUT`].
fn is_ready(fd: &impl AsFd) -> bool {
    let timeout = Timespec::try_from(TIMEOUT).unwrap();
    poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout)).unwrap() == 1
}

enum Listener {
    Unix(UnixListener),
    Vsock(VsockListener),
}

/// A port of the host, to which the agent connects.
pub(crate) struct Port {
    pub(crate) port: u32,
    listener: Listener,
}

impl Port {
    /// Accepts the connection of the agent.
    pub(crate) fn accept(self) -> File {
        let stream = match self.listener {
            Listener::Unix(listener) => {
                assert!(is_ready(&listener), "the agent does not connect to port {}", self.port);
                let (stream, _) = listener.accept().unwrap();
                stream.set_read_timeout(Some(TIMEOUT)).unwrap();
                OwnedFd::from(stream)
            }
            Listener::Vsock(listener) => {
                assert!(is_ready(&listener), "the agent does not connect to port {}", self.port);
                let (stream, _) = listener.accept().unwrap();
                stream.set_read_timeout(Some(TIMEOUT)).unwrap();
                OwnedFd::from(stream)
            }
        };
        File::from(stream)
    }
}

/// Returns the request that creates a container with the shared busybox root file system.
pub(crate) fn create_request(id: &str, spec: &Value, stdio: Stdio) -> Request {
    create_request_on(Rootfs::Share { path: "busybox".into() }, id, spec, stdio)
}

/// Returns the request that creates a container on `rootfs`.
pub(crate) fn create_request_on(rootfs: Rootfs, id: &str, spec: &Value, stdio: Stdio) -> Request {
    let mut spec = spec.clone();
    spec["root"]["path"] = json!(format!("{CONTAINERS_PATH}/{id}/rootfs"));
    spec["linux"]["cgroupsPath"] = json!("/somewhere/on/the/host");
    Request::CreateContainer(CreateContainer {
        container: id.to_owned(),
        spec: spec.to_string().into_bytes(),
        rootfs,
        pid_namespace: PidNamespace::Specified,
        stdio,
    })
}

/// Asserts that no file, mount or cgroup of a container is left.
pub(crate) fn assert_nothing_left(id: &str) {
    assert!(!Path::new(CONTAINERS_PATH).join(id).exists(), "{id} left files");
    assert!(!Path::new("/run/nutshell/state").join(id).exists(), "{id} left state");
    assert!(
        !Path::new(&format!("/sys/fs/cgroup/container-{id}")).exists(),
        "{id} left a cgroup"
    );
    assert!(
        !fs::read_to_string("/proc/self/mounts")
            .unwrap()
            .contains(&format!("/{id}/")),
        "{id} left a mount"
    );
}

/// Mounts a tmpfs as the share, with a busybox root file system in it.
fn prepare_share() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        fs::create_dir_all(SHARE_PATH).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "share", SHARE_PATH])
            .status()
            .unwrap();
        assert!(mounted.success());
        // The agent's setup does this in a real guest.
        fs::create_dir_all("/dev/mqueue").unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "mqueue", "mqueue", "/dev/mqueue"])
            .status()
            .unwrap();
        assert!(mounted.success());
        fill_root(&Path::new(SHARE_PATH).join("busybox"));
    });
}
