//! containerd's events service, which records the events that it receives, and the rules for their order.

use std::{
    collections::HashMap,
    fmt,
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex},
    thread::JoinHandle,
};

use containerd_shim_protos::{
    api::{Empty, ForwardRequest},
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
    },
    protobuf::Message,
    shim::event::Envelope,
    ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_RESPONSE, MessageHeader, Request, Response},
};

use crate::TIMEOUT;

/// An event of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The container's id.
    pub container: String,
    /// What happened, with those values of the event that tests compare.
    pub kind: EventKind,
    /// The pid in the event; 0 if this kind of event has none.
    pub pid: u32,
}

/// The kind of an event. Its `Display` is what tests compare, such as `exit 137` or `started e1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventKind {
    /// The container was created.
    Create,
    /// The container was started.
    Start,
    /// An exec with this id was added.
    ExecAdded(String),
    /// The exec with this id was started.
    ExecStarted(String),
    /// The container's process exited with this status.
    Exit(u32),
    /// The exec with this id exited with this status.
    ExecExit(String, u32),
    /// The container was deleted; the value is its exit status.
    Delete(u32),
    /// The container ran out of memory.
    Oom,
    /// The container was paused.
    Paused,
    /// The container was resumed.
    Resumed,
}

impl fmt::Display for EventKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create => formatter.write_str("create"),
            Self::Start => formatter.write_str("start"),
            Self::ExecAdded(exec) => write!(formatter, "added {exec}"),
            Self::ExecStarted(exec) => write!(formatter, "started {exec}"),
            Self::Exit(status) => write!(formatter, "exit {status}"),
            Self::ExecExit(exec, status) => write!(formatter, "exit {exec} {status}"),
            Self::Delete(status) => write!(formatter, "delete {status}"),
            Self::Oom => formatter.write_str("oom"),
            Self::Paused => formatter.write_str("paused"),
            Self::Resumed => formatter.write_str("resumed"),
        }
    }
}

/// The events service on a socket. It can be stopped and started again.
#[derive(Debug)]
pub struct Events {
    path: PathBuf,
    namespace: String,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    events: Vec<Event>,
    malformed: Vec<String>,
    connections: Vec<UnixStream>,
    stopped: bool,
}

impl Events {
    /// Serves at `path`, for events of `namespace`.
    pub fn serve(path: &Path, namespace: &str) -> Self {
        let events = Self {
            path: path.to_owned(),
            namespace: namespace.to_owned(),
            shared: Arc::default(),
            thread: Mutex::default(),
        };
        events.start();
        events
    }

    /// Stops the service, as a restart of containerd does: closes all connections and removes the socket.
    pub fn stop(&self) {
        let Some(thread) = self.thread.lock().unwrap().take() else {
            return;
        };
        {
            let mut state = self.shared.state.lock().unwrap();
            state.stopped = true;
            for connection in state.connections.drain(..) {
                let _ = connection.shutdown(Shutdown::Both);
            }
        }
        // Wakes the thread from `accept`.
        let _ = UnixStream::connect(&self.path);
        thread.join().unwrap();
        std::fs::remove_file(&self.path).unwrap();
    }

    /// Starts the service again.
    pub fn start(&self) {
        let listener = UnixListener::bind(&self.path).unwrap();
        self.shared.state.lock().unwrap().stopped = false;
        let (shared, namespace) = (self.shared.clone(), self.namespace.clone());
        *self.thread.lock().unwrap() = Some(std::thread::spawn(move || {
            for connection in listener.incoming() {
                let connection = connection.unwrap();
                let mut state = shared.state.lock().unwrap();
                if state.stopped {
                    return;
                }
                state.connections.push(connection.try_clone().unwrap());
                drop(state);
                let (shared, namespace) = (shared.clone(), namespace.clone());
                std::thread::spawn(move || {
                    // This ends with an error when the connection is closed.
                    let _ = serve_connection(connection, &shared, &namespace);
                });
            }
        }));
    }

    /// All events so far.
    pub fn all(&self) -> Vec<Event> {
        self.shared.state.lock().unwrap().events.clone()
    }

    /// The events of a container so far, as text.
    pub fn of_container(&self, container: &str) -> Vec<String> {
        let all = self.all();
        let events = all.iter().filter(|event| event.container == container);
        events.map(|event| event.kind.to_string()).collect()
    }

    /// Waits for an event of a container, given as text (the `Display` of [`EventKind`]), and returns all events of the
    /// container.
    ///
    /// # Panics
    ///
    /// If the event does not arrive in time.
    pub fn wait_for(&self, container: &str, text: &str) -> Vec<String> {
        let is_meant = |event: &Event| event.container == container && event.kind.to_string() == text;
        let state = self.shared.state.lock().unwrap();
        let waited = self
            .shared
            .changed
            .wait_timeout_while(state, TIMEOUT, |state| !state.events.iter().any(is_meant));
        let timed_out = waited.unwrap().1.timed_out();
        let events = self.of_container(container);
        assert!(!timed_out, "no event {text:?} of {container}, only {events:?}");
        events
    }

    /// Violations of the rules for events so far, one text each.
    pub fn violations(&self) -> Vec<String> {
        let state = self.shared.state.lock().unwrap();
        let mut violations = state.malformed.clone();
        let mut containers: HashMap<&str, History> = HashMap::new();
        for event in &state.events {
            if let Err(reason) = containers.entry(&event.container).or_default().add(event) {
                violations.push(format!("{} of {}: {reason}", event.kind, event.container));
            }
        }
        violations
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The state of a container according to its events.
#[derive(Debug, Default)]
struct History {
    init: Phase,
    pid: u32,
    status: u32,
    /// Phase and pid of each exec.
    execs: HashMap<String, (Phase, u32)>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Phase {
    #[default]
    Nothing,
    Created,
    Started,
    Exited,
}

impl History {
    /// Adds the next event. The error is the rule that it breaks.
    fn add(&mut self, event: &Event) -> Result<(), String> {
        let rule = |is_kept: bool, reason: &str| is_kept.then_some(()).ok_or(reason.to_owned());
        match &event.kind {
            EventKind::Create => {
                rule(self.init == Phase::Nothing, "the container exists already")?;
                rule(event.pid > 0, "no pid")?;
                (self.init, self.pid) = (Phase::Created, event.pid);
            }
            EventKind::Start => {
                rule(self.init == Phase::Created, "not directly after the create event")?;
                rule(event.pid == self.pid, "not the pid of the create event")?;
                self.init = Phase::Started;
            }
            EventKind::Exit(status) => {
                let is_alive = matches!(self.init, Phase::Created | Phase::Started);
                rule(is_alive, "not exactly one exit after create or start")?;
                rule(event.pid == self.pid, "not the pid of the create event")?;
                let execs_have_exited = self.execs.values().all(|(phase, _)| *phase != Phase::Started);
                rule(execs_have_exited, "before the exit of an exec")?;
                (self.init, self.status) = (Phase::Exited, *status);
            }
            EventKind::Delete(status) => {
                rule(self.init == Phase::Exited, "not directly after the exit event")?;
                rule(
                    event.pid == self.pid && *status == self.status,
                    "not pid and status of the exit event",
                )?;
                *self = Self::default();
            }
            EventKind::ExecAdded(exec) => {
                let is_alive = matches!(self.init, Phase::Created | Phase::Started);
                rule(is_alive, "the container does not run")?;
                self.execs.insert(exec.clone(), (Phase::Created, 0));
            }
            EventKind::ExecStarted(exec) => {
                let known = self.execs.insert(exec.clone(), (Phase::Started, event.pid));
                rule(matches!(known, Some((Phase::Created, _))), "the exec was not added")?;
                rule(event.pid > 0, "no pid")?;
            }
            EventKind::ExecExit(exec, _) => {
                let known = self.execs.insert(exec.clone(), (Phase::Exited, event.pid));
                rule(
                    known == Some((Phase::Started, event.pid)),
                    "not exactly one exit after the start of the exec",
                )?;
            }
            EventKind::Oom | EventKind::Paused | EventKind::Resumed => {
                rule(self.init == Phase::Started, "the container does not run")?
            }
        }
        Ok(())
    }
}

/// Answers the calls of one connection until it is closed.
fn serve_connection(mut connection: UnixStream, shared: &Shared, namespace: &str) -> std::io::Result<()> {
    loop {
        let mut header = [0; MESSAGE_HEADER_LENGTH];
        connection.read_exact(&mut header)?;
        let header = MessageHeader::from(header);
        let mut payload = vec![0; usize::try_from(header.length).unwrap()];
        connection.read_exact(&mut payload)?;
        let request = Request::parse_from_bytes(&payload).unwrap();
        let event = decode_request(&request, namespace);

        // The lock is held until the answer is written: an event is recorded only if its sender gets the answer.
        let mut state = shared.state.lock().unwrap();
        if state.stopped {
            return Ok(());
        }
        let response = Response {
            payload: Empty::default().write_to_bytes().unwrap(),
            ..Response::default()
        };
        let response = response.write_to_bytes().unwrap();
        let header = MessageHeader {
            length: u32::try_from(response.len()).unwrap(),
            stream_id: header.stream_id,
            type_: MESSAGE_TYPE_RESPONSE,
            flags: 0,
        };
        connection.write_all(&[Vec::from(header), response].concat())?;
        match event {
            Ok(event) => state.events.push(event),
            Err(reason) => state.malformed.push(reason),
        }
        drop(state);
        shared.changed.notify_all();
    }
}

fn decode_request(request: &Request, namespace: &str) -> Result<Event, String> {
    let method = (request.service.as_str(), request.method.as_str());
    if method != ("containerd.services.events.ttrpc.v1.Events", "Forward") {
        return Err(format!("an unexpected call of {method:?}"));
    }
    let forward = ForwardRequest::parse_from_bytes(&request.payload).map_err(|error| error.to_string())?;
    let envelope = forward.envelope.into_option().ok_or("no envelope")?;
    if envelope.namespace != namespace {
        return Err(format!("an event of namespace {:?}", envelope.namespace));
    }
    if envelope.timestamp.seconds == 0 {
        return Err("an event without a time".to_owned());
    }
    decode_event(&envelope)
}

fn decode_event(envelope: &Envelope) -> Result<Event, String> {
    fn message<M: Message>(envelope: &Envelope, name: &str) -> Result<M, String> {
        let any = &envelope.event;
        if any.type_url != format!("containerd.events.{name}") {
            return Err(format!("{} with a {}", envelope.topic, any.type_url));
        }
        M::parse_from_bytes(&any.value).map_err(|error| error.to_string())
    }
    let (container, kind, pid) = match envelope.topic.as_str() {
        "/tasks/create" => {
            let event: TaskCreate = message(envelope, "TaskCreate")?;
            if event.bundle.is_empty() || event.io.is_none() {
                return Err(format!("an incomplete {event}"));
            }
            (event.container_id, EventKind::Create, event.pid)
        }
        "/tasks/start" => {
            let event: TaskStart = message(envelope, "TaskStart")?;
            (event.container_id, EventKind::Start, event.pid)
        }
        "/tasks/exit" => {
            let event: TaskExit = message(envelope, "TaskExit")?;
            if event.exited_at.seconds == 0 {
                return Err(format!("an exit without a time: {event}"));
            }
            let kind = if event.id == event.container_id {
                EventKind::Exit(event.exit_status)
            } else {
                EventKind::ExecExit(event.id, event.exit_status)
            };
            (event.container_id, kind, event.pid)
        }
        "/tasks/delete" => {
            let event: TaskDelete = message(envelope, "TaskDelete")?;
            (event.container_id, EventKind::Delete(event.exit_status), event.pid)
        }
        "/tasks/exec-added" => {
            let event: TaskExecAdded = message(envelope, "TaskExecAdded")?;
            (event.container_id, EventKind::ExecAdded(event.exec_id), 0)
        }
        "/tasks/exec-started" => {
            let event: TaskExecStarted = message(envelope, "TaskExecStarted")?;
            (event.container_id, EventKind::ExecStarted(event.exec_id), event.pid)
        }
        "/tasks/oom" => (message::<TaskOOM>(envelope, "TaskOOM")?.container_id, EventKind::Oom, 0),
        "/tasks/paused" => {
            let event: TaskPaused = message(envelope, "TaskPaused")?;
            (event.container_id, EventKind::Paused, 0)
        }
        "/tasks/resumed" => {
            let event: TaskResumed = message(envelope, "TaskResumed")?;
            (event.container_id, EventKind::Resumed, 0)
        }
        topic => return Err(format!("an event with the unexpected topic {topic}")),
    };
    Ok(Event { container, kind, pid })
}
