//! Tests of the services through a ttrpc client, with fake machines (see [`fake`]).

mod behaviour;
mod exits;
mod fake;
mod guest_agent;
mod hostile;
mod killed;
mod lifecycle;
mod pods;
pub(super) mod script;
mod streams;
mod timeouts;
mod virtual_machines;
mod vm_agent;

use std::{
    fs::{self, File},
    os::unix::net::UnixListener,
    path::Path,
    sync::Arc,
    time::Duration,
};

use containerd_shim::protos::{
    api::{
        CreateTaskRequest, DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest, StartRequest, StateRequest,
        StateResponse, Status, WaitRequest,
    },
    events::task::{TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit},
    protobuf::{Message, well_known_types::any::Any},
    shim::event::Envelope,
    shim_async::{Client, TaskClient},
    ttrpc::{
        self, Code,
        asynchronous::{Server, transport::Socket},
        context,
    },
    types::mount::Mount,
};
use nix::{sys::stat::Mode, unistd::mkfifo};
use serde_json::json;
use tempfile::TempDir;
use tokio::{net::UnixStream, sync::mpsc};

use self::{
    behaviour::Behaviour,
    fake::{Fake, FakeLauncher},
};
use crate::{
    oci::{HostNamespaces, Sizing, VmPolicy},
    shim::{
        api::connection::{self, LastReply},
        api::services::services,
        configuration::Configuration,
        events::{EventQueue, ForwardError, Forwarder},
        stdio::{StdioContext, read_next},
        tasks::Tasks,
    },
};

/// A shim that serves, with a client, its events and its fake machines.
struct Shim {
    folder: TempDir,
    fake: Arc<Fake>,
    tasks: Arc<Tasks>,
    client: Client,
    task: TaskClient,
    events: mpsc::UnboundedReceiver<Envelope>,
    queue: EventQueue,
    _server: Server,
}

/// A forwarder that records events.
struct Recorder(mpsc::UnboundedSender<Envelope>);

impl Forwarder for Recorder {
    async fn forward(&mut self, envelope: Envelope) -> Result<(), ForwardError> {
        let sent = self.0.send(envelope);
        sent.map_err(|error| ForwardError::Unreachable(error.to_string()))
    }
}

impl Shim {
    async fn start() -> Self {
        Self::start_with(Behaviour::Cooperative).await
    }

    async fn start_with(behaviour: Behaviour) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("disk"), [0; 512]).unwrap();
        let configuration = Configuration {
            kernel: None,
            initramfs: None,
            kernel_arguments: String::new(),
            board: crate::control::BoardKind::Container,
            ready_timeout: Duration::from_millis(300),
            shell: true,
            sizing: Sizing {
                default_memory: 64 << 20,
                default_vcpus: 1,
                max_memory: 1 << 30,
                max_vcpus: 4,
            },
            host_namespaces: HostNamespaces::Refuse,
            virtual_machines: VmPolicy::default(),
            mount_layers: true,
            kernel_cache_bytes: 0,
            debug: false,
        };
        let (sender, events) = mpsc::unbounded_channel();
        let launcher = FakeLauncher::new(behaviour);
        let fake = launcher.fake.clone();
        let queue = EventQueue::start("default", Recorder(sender));
        let tasks = Tasks::new(configuration, launcher, queue.clone(), StdioContext::default());
        let socket = folder.path().join("socket");
        let last_reply = LastReply::new();
        let listener = connection::accept_own_user(UnixListener::bind(&socket).unwrap(), last_reply.clone()).unwrap();
        let mut server = Server::new()
            .add_listener(listener)
            .register_service(services(&tasks, &last_reply));
        server.start().await.unwrap();
        let client = connect(&socket).await;
        Self {
            folder,
            fake,
            tasks,
            task: TaskClient::new(client.clone()),
            client,
            events,
            queue,
            _server: server,
        }
    }

    /// A request to create `id`. Creates its bundle and fifos.
    fn request(&self, id: &str) -> CreateTaskRequest {
        let bundle = self.folder.path().join(id);
        if !bundle.exists() {
            fs::create_dir(&bundle).unwrap();
            for name in ["in", "out", "err"] {
                mkfifo(&bundle.join(name), Mode::S_IRWXU).unwrap();
            }
        }
        let spec = json!({
            "ociVersion": "1.0.2",
            "process": { "args": ["true"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
            "root": { "path": "rootfs" },
            "linux": { "namespaces": [{ "type": "mount" }, { "type": "pid" }, { "type": "network" }, { "type": "ipc" }] },
        });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        let path = |name| bundle.join(name).display().to_string();
        CreateTaskRequest {
            id: id.to_owned(),
            bundle: bundle.display().to_string(),
            rootfs: vec![Mount {
                type_: "ext4".to_owned(),
                source: self.folder.path().join("disk").display().to_string(),
                options: vec!["ro".to_owned()],
                ..Mount::default()
            }],
            stdin: path("in"),
            stdout: path("out"),
            stderr: path("err"),
            ..CreateTaskRequest::default()
        }
    }

    async fn create(&self, id: &str) -> u32 {
        let request = self.request(id);
        self.task
            .create(context::Context::default(), &request)
            .await
            .unwrap()
            .pid
    }

    async fn start_task(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = StartRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..StartRequest::default()
        };
        let response = self.task.start(context::Context::default(), &request).await?;
        Ok(response.pid)
    }

    async fn run(&self, id: &str) -> u32 {
        let pid = self.create(id).await;
        assert_eq!(self.start_task(id, "").await.unwrap(), pid);
        pid
    }

    async fn exec(&self, id: &str, exec_id: &str, program: &str) -> ttrpc::Result<()> {
        self.exec_with_output(id, exec_id, program, "").await
    }

    async fn exec_with_output(&self, id: &str, exec_id: &str, program: &str, stdout: &str) -> ttrpc::Result<()> {
        let request = ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            stdout: stdout.to_owned(),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
                value: json!({ "args": [program], "cwd": "/" }).to_string().into_bytes(),
                ..Any::default()
            })
            .into(),
            ..ExecProcessRequest::default()
        };
        self.task.exec(context::Context::default(), &request).await?;
        Ok(())
    }

    async fn state(&self, id: &str, exec_id: &str) -> ttrpc::Result<StateResponse> {
        let request = StateRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..StateRequest::default()
        };
        self.task.state(context::Context::default(), &request).await
    }

    async fn status(&self, id: &str) -> Status {
        self.state(id, "").await.unwrap().status.unwrap()
    }

    async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = WaitRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..WaitRequest::default()
        };
        let response = self.task.wait(context::Context::default(), &request).await?;
        Ok(response.exit_status)
    }

    async fn kill(&self, id: &str, exec_id: &str, signal: u32) -> ttrpc::Result<()> {
        let request = KillRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            ..KillRequest::default()
        };
        self.task.kill(context::Context::default(), &request).await?;
        Ok(())
    }

    async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..DeleteRequest::default()
        };
        self.task.delete(context::Context::default(), &request).await
    }

    /// Waits for the next `count` events. Returns each in short form, see [`summarize`].
    async fn next_events(&mut self, count: usize) -> Vec<String> {
        let mut events = Vec::new();
        for _ in 0..count {
            let next = tokio::time::timeout(Duration::from_secs(20), self.events.recv());
            events.push(summarize(&next.await.expect("an event").unwrap()));
        }
        events
    }

    /// Asserts that no other event was published.
    async fn assert_no_more_events(&mut self) {
        self.queue.flush(Duration::from_secs(20)).await;
        let left: Vec<_> = std::iter::from_fn(|| self.events.try_recv().ok())
            .map(|event| summarize(&event))
            .collect();
        assert_eq!(left, Vec::<String>::new());
    }
}

async fn connect(socket: &Path) -> Client {
    Client::new(Socket::from(UnixStream::connect(socket).await.unwrap()))
}

/// The topic of an event, followed by ids and exit status.
fn summarize(envelope: &Envelope) -> String {
    let value = &envelope.event.value;
    let detail = match envelope.topic.as_str() {
        "/tasks/exit" => {
            let exit = TaskExit::parse_from_bytes(value).unwrap();
            assert!(exit.pid > 0 && exit.exited_at.is_some());
            format!(" {} {}", exit.id, exit.exit_status)
        }
        "/tasks/delete" => {
            let delete = TaskDelete::parse_from_bytes(value).unwrap();
            format!(" {} {}", delete.container_id, delete.exit_status)
        }
        "/tasks/exec-added" => format!(" {}", TaskExecAdded::parse_from_bytes(value).unwrap().exec_id),
        "/tasks/exec-started" => {
            let started = TaskExecStarted::parse_from_bytes(value).unwrap();
            assert!(started.pid > 0);
            format!(" {}", started.exec_id)
        }
        _ => String::new(),
    };
    format!("{}{detail}", envelope.topic.trim_start_matches("/tasks/"))
}

/// The code and text of a failed call.
fn error_of<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("{other}"),
    }
}

fn process_exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Opens the fifo of a task's standard output for reading, as containerd does before Create.
fn open_reader(shim: &Shim, id: &str) -> File {
    use std::os::unix::fs::OpenOptionsExt;
    let path = shim.folder.path().join(id).join("out");
    File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .unwrap()
}
