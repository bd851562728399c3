//! containerd's events service, which records what it is told, and the rules of the order of events.

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

use crate::PATIENCE;

/// An event about a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The container.
    pub container: String,
    /// What happened.
    pub what: What,
    /// The host's pid, where the event has one.
    pub pid: u32,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// The container was created.
    Create,
    /// It was started.
    Start,
    /// An exec was added.
    ExecAdded(String),
    /// An exec was started.
    ExecStarted(String),
    /// The container's first process ended.
    Exit(u32),
    /// An exec ended.
    ExecExit(String, u32),
    /// The container was deleted, with the status of its exit.
    Delete(u32),
    /// It was out of memory.
    Oom,
    /// It was paused.
    Paused,
    /// It was resumed.
    Resumed,
}

impl fmt::Display for What {
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

/// The service at a socket. Away or there.
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
    away: bool,
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
        events.come_back();
        events
    }

    /// Goes away, as a containerd that is restarted: no socket, no connection.
    pub fn leave(&self) {
        let Some(thread) = self.thread.lock().unwrap().take() else {
            return;
        };
        {
            let mut state = self.shared.state.lock().unwrap();
            state.away = true;
            for connection in state.connections.drain(..) {
                let _ = connection.shutdown(Shutdown::Both);
            }
        }
        // Wakes the thread that accepts.
        let _ = UnixStream::connect(&self.path);
        thread.join().unwrap();
        std::fs::remove_file(&self.path).unwrap();
    }

    /// Is there (again).
    pub fn come_back(&self) {
        let listener = UnixListener::bind(&self.path).unwrap();
        self.shared.state.lock().unwrap().away = false;
        let (shared, namespace) = (self.shared.clone(), self.namespace.clone());
        *self.thread.lock().unwrap() = Some(std::thread::spawn(move || {
            for connection in listener.incoming() {
                let connection = connection.unwrap();
                let mut state = shared.state.lock().unwrap();
                if state.away {
                    return;
                }
                state.connections.push(connection.try_clone().unwrap());
                drop(state);
                let (shared, namespace) = (shared.clone(), namespace.clone());
                std::thread::spawn(move || {
                    let _ = take(connection, &shared, &namespace);
                });
            }
        }));
    }

    /// What was told so far.
    pub fn all(&self) -> Vec<Event> {
        self.shared.state.lock().unwrap().events.clone()
    }

    /// What was told about a container so far, in words.
    pub fn of(&self, container: &str) -> Vec<String> {
        let all = self.all();
        let about = all.iter().filter(|event| event.container == container);
        about.map(|event| event.what.to_string()).collect()
    }

    /// Waits for an event in words (of [`What`]'s `Display`) about a container, and returns all
    /// about it.
    pub fn until(&self, container: &str, words: &str) -> Vec<String> {
        let is_meant = |event: &Event| event.container == container && event.what.to_string() == words;
        let state = self.shared.state.lock().unwrap();
        let waited = self
            .shared
            .changed
            .wait_timeout_while(state, PATIENCE, |state| !state.events.iter().any(is_meant));
        let timed_out = waited.unwrap().1.timed_out();
        let told = self.of(container);
        assert!(!timed_out, "no event {words:?} about {container}, but {told:?}");
        told
    }

    /// What is against the rules in all that was told.
    pub fn violations(&self) -> Vec<String> {
        let state = self.shared.state.lock().unwrap();
        let mut violations = state.malformed.clone();
        let mut containers: HashMap<&str, Life> = HashMap::new();
        for event in &state.events {
            if let Err(reason) = containers.entry(&event.container).or_default().follow(event) {
                violations.push(format!("{} of {}: {reason}", event.what, event.container));
            }
        }
        violations
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.leave();
    }
}

/// What a container's events have told so far.
#[derive(Debug, Default)]
struct Life {
    init: Step,
    pid: u32,
    status: u32,
    execs: HashMap<String, (Step, u32)>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Step {
    #[default]
    Nothing,
    Created,
    Started,
    Exited,
}

impl Life {
    fn follow(&mut self, event: &Event) -> Result<(), String> {
        let rule = |kept: bool, reason: &str| kept.then_some(()).ok_or(reason.to_owned());
        match &event.what {
            What::Create => {
                rule(self.init == Step::Nothing, "it exists")?;
                rule(event.pid > 0, "no pid")?;
                (self.init, self.pid) = (Step::Created, event.pid);
            }
            What::Start => {
                rule(self.init == Step::Created, "not after its creation")?;
                rule(event.pid == self.pid, "another pid")?;
                self.init = Step::Started;
            }
            What::Exit(status) => {
                let lives = matches!(self.init, Step::Created | Step::Started);
                rule(lives, "not once, after creation or start")?;
                rule(event.pid == self.pid, "another pid")?;
                let over = self.execs.values().all(|(step, _)| *step != Step::Started);
                rule(over, "before an exec's exit")?;
                (self.init, self.status) = (Step::Exited, *status);
            }
            What::Delete(status) => {
                rule(self.init == Step::Exited, "not after the exit")?;
                rule(event.pid == self.pid && *status == self.status, "not as in the exit")?;
                *self = Self::default();
            }
            What::ExecAdded(exec) => {
                let lives = matches!(self.init, Step::Created | Step::Started);
                rule(lives, "the container does not run")?;
                self.execs.insert(exec.clone(), (Step::Created, 0));
            }
            What::ExecStarted(exec) => {
                let known = self.execs.insert(exec.clone(), (Step::Started, event.pid));
                rule(matches!(known, Some((Step::Created, _))), "not added")?;
                rule(event.pid > 0, "no pid")?;
            }
            What::ExecExit(exec, _) => {
                let known = self.execs.insert(exec.clone(), (Step::Exited, event.pid));
                rule(known == Some((Step::Started, event.pid)), "not once after its start")?;
            }
            What::Oom | What::Paused | What::Resumed => rule(self.init == Step::Started, "it does not run")?,
        }
        Ok(())
    }
}

/// Takes calls of one connection until it is closed.
fn take(mut connection: UnixStream, shared: &Shared, namespace: &str) -> std::io::Result<()> {
    loop {
        let mut header = [0; MESSAGE_HEADER_LENGTH];
        connection.read_exact(&mut header)?;
        let header = MessageHeader::from(header);
        let mut payload = vec![0; usize::try_from(header.length).unwrap()];
        connection.read_exact(&mut payload)?;
        let request = Request::parse_from_bytes(&payload).unwrap();
        let event = decode(&request, namespace);

        // An event counts as told if its sender can learn so.
        let mut state = shared.state.lock().unwrap();
        if state.away {
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

fn decode(request: &Request, namespace: &str) -> Result<Event, String> {
    let method = (request.service.as_str(), request.method.as_str());
    if method != ("containerd.services.events.ttrpc.v1.Events", "Forward") {
        return Err(format!("a call of {method:?}"));
    }
    let forward = ForwardRequest::parse_from_bytes(&request.payload).map_err(|error| error.to_string())?;
    let envelope = forward.envelope.into_option().ok_or("no envelope")?;
    if envelope.namespace != namespace {
        return Err(format!("an event of namespace {:?}", envelope.namespace));
    }
    if envelope.timestamp.seconds == 0 {
        return Err("an event without a time".to_owned());
    }
    event(&envelope)
}

fn event(envelope: &Envelope) -> Result<Event, String> {
    fn message<M: Message>(envelope: &Envelope, name: &str) -> Result<M, String> {
        let any = &envelope.event;
        if any.type_url != format!("containerd.events.{name}") {
            return Err(format!("{} with a {}", envelope.topic, any.type_url));
        }
        M::parse_from_bytes(&any.value).map_err(|error| error.to_string())
    }
    let (container, what, pid) = match envelope.topic.as_str() {
        "/tasks/create" => {
            let event: TaskCreate = message(envelope, "TaskCreate")?;
            if event.bundle.is_empty() || event.io.is_none() {
                return Err(format!("an incomplete {event}"));
            }
            (event.container_id, What::Create, event.pid)
        }
        "/tasks/start" => {
            let event: TaskStart = message(envelope, "TaskStart")?;
            (event.container_id, What::Start, event.pid)
        }
        "/tasks/exit" => {
            let event: TaskExit = message(envelope, "TaskExit")?;
            if event.exited_at.seconds == 0 {
                return Err(format!("an exit without a time: {event}"));
            }
            let what = if event.id == event.container_id {
                What::Exit(event.exit_status)
            } else {
                What::ExecExit(event.id, event.exit_status)
            };
            (event.container_id, what, event.pid)
        }
        "/tasks/delete" => {
            let event: TaskDelete = message(envelope, "TaskDelete")?;
            (event.container_id, What::Delete(event.exit_status), event.pid)
        }
        "/tasks/exec-added" => {
            let event: TaskExecAdded = message(envelope, "TaskExecAdded")?;
            (event.container_id, What::ExecAdded(event.exec_id), 0)
        }
        "/tasks/exec-started" => {
            let event: TaskExecStarted = message(envelope, "TaskExecStarted")?;
            (event.container_id, What::ExecStarted(event.exec_id), event.pid)
        }
        "/tasks/oom" => (message::<TaskOOM>(envelope, "TaskOOM")?.container_id, What::Oom, 0),
        "/tasks/paused" => {
            let event: TaskPaused = message(envelope, "TaskPaused")?;
            (event.container_id, What::Paused, 0)
        }
        "/tasks/resumed" => {
            let event: TaskResumed = message(envelope, "TaskResumed")?;
            (event.container_id, What::Resumed, 0)
        }
        topic => return Err(format!("an event of topic {topic}")),
    };
    Ok(Event { container, what, pid })
}
