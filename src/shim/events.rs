//! The events of a shim: one queue, in order, to containerd's events service.
//!
//! Publishing never waits. One task forwards the oldest event until containerd has it, and only then
//! the next: while containerd is away nothing is lost, nothing overtakes, and the queue is bounded.

use std::{
    collections::VecDeque,
    future::Future,
    io::{self, Write},
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::{Mutex, MutexGuard};

use containerd_shim_protos::{
    api::ForwardRequest,
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
    },
    protobuf::{
        Message, MessageField, MessageFull,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    shim::event::Envelope,
    shim_async::{Client, EventsClient},
    topics,
    ttrpc::{self, asynchronous::transport::Socket},
};
use tokio::{net::UnixStream, sync::Notify};

use crate::shim::child::{Child, WaitStatus};

/// The most events that wait while containerd is away; the oldest goes first.
const CAPACITY: usize = 2048;

/// After that many waiting events, those that only inform (out of memory) are not added.
const CAPACITY_FOR_HINTS: usize = 256;

/// How long containerd may take to take one event.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);

/// The first and the longest pause before an event is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// A message that is an event, and the topic that it belongs to.
pub(crate) trait TaskEvent: MessageFull {
    /// The topic.
    const TOPIC: &'static str;
    /// Says something that containerd can do without.
    const HINT: bool = false;
}

macro_rules! topics {
    ($($event:ty => $topic:ident $(, hint = $hint:literal)?;)*) => {
        $(impl TaskEvent for $event {
            const TOPIC: &'static str = topics::$topic;
            $(const HINT: bool = $hint;)?
        })*
    };
}

topics! {
    TaskCreate => TASK_CREATE_EVENT_TOPIC;
    TaskStart => TASK_START_EVENT_TOPIC;
    TaskOOM => TASK_OOM_EVENT_TOPIC, hint = true;
    TaskExit => TASK_EXIT_EVENT_TOPIC;
    TaskDelete => TASK_DELETE_EVENT_TOPIC;
    TaskExecAdded => TASK_EXEC_ADDED_EVENT_TOPIC;
    TaskExecStarted => TASK_EXEC_STARTED_EVENT_TOPIC;
    TaskPaused => TASK_PAUSED_EVENT_TOPIC;
    TaskResumed => TASK_RESUMED_EVENT_TOPIC;
}

/// Where events go.
pub(crate) trait Forward: Send + 'static {
    /// Hands one event over. Nothing is known about an event whose hand-over failed; it is tried again.
    fn forward(&mut self, envelope: Envelope) -> impl Future<Output = Result<(), String>> + Send;
}

/// The queue. Clones are the same queue.
#[derive(Debug, Clone)]
pub(crate) struct EventQueue {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    namespace: String,
    waiting: Mutex<Waiting>,
    /// The queue has grown.
    grown: Notify,
    /// The queue has become empty.
    emptied: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    envelopes: VecDeque<Envelope>,
    /// How many have left at the front.
    gone: u64,
}

impl Waiting {
    fn pop(&mut self) -> Option<Envelope> {
        self.gone += 1;
        self.envelopes.pop_front()
    }
}

impl EventQueue {
    /// A queue for events of `namespace`, and the task that forwards them. Needs the runtime.
    pub(crate) fn start(namespace: &str, forward: impl Forward) -> Self {
        let shared = Arc::new(Shared {
            namespace: namespace.to_owned(),
            waiting: Mutex::default(),
            grown: Notify::new(),
            emptied: Notify::new(),
        });
        tokio::spawn(run(shared.clone(), forward));
        Self { shared }
    }

    /// Adds an event behind all others.
    pub(crate) fn publish<E: TaskEvent>(&self, event: &E) {
        let Ok(value) = event.write_to_bytes() else {
            return log::error!("{}: the event cannot be encoded", E::TOPIC);
        };
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(SystemTime::now())),
            namespace: self.shared.namespace.clone(),
            topic: E::TOPIC.to_owned(),
            event: MessageField::some(pack_any::<E>(value)),
            ..Envelope::default()
        };
        {
            let mut waiting = self.shared.waiting();
            if E::HINT && waiting.envelopes.len() >= CAPACITY_FOR_HINTS {
                return;
            }
            if waiting.envelopes.len() >= CAPACITY
                && let Some(oldest) = waiting.pop()
            {
                log::warn!("containerd takes no events: dropped one of {}", oldest.topic);
            }
            waiting.envelopes.push_back(envelope);
        }
        self.shared.grown.notify_one();
    }

    /// Waits until containerd has every event, at most `limit`.
    pub(crate) async fn flush(&self, limit: Duration) {
        let empty = async {
            loop {
                let emptied = self.shared.emptied.notified();
                if self.shared.waiting().envelopes.is_empty() {
                    return;
                }
                emptied.await;
            }
        };
        if tokio::time::timeout(limit, empty).await.is_err() {
            log::warn!("containerd did not take the last events in time");
        }
    }
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock()
    }
}

async fn run(shared: Arc<Shared>, mut forward: impl Forward) {
    loop {
        let (next, position) = {
            let waiting = shared.waiting();
            (waiting.envelopes.front().cloned(), waiting.gone)
        };
        let Some(envelope) = next else {
            shared.emptied.notify_waiters();
            shared.grown.notified().await;
            continue;
        };
        let mut pause = RETRY.0;
        while let Err(error) = forward.forward(envelope.clone()).await {
            if pause == RETRY.0 {
                log::warn!(
                    "forward an event of {} to containerd: {error}; trying again",
                    envelope.topic
                );
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY.1);
        }
        let mut waiting = shared.waiting();
        // It may have been dropped for want of room meanwhile.
        if waiting.gone == position {
            waiting.pop();
        }
    }
}

/// containerd's events service, behind its ttrpc socket. Connects when it has something to say, and
/// again after any failure.
#[derive(Debug)]
pub(crate) struct Containerd {
    address: String,
    connection: Connection,
}

enum Connection {
    Closed,
    Open(EventsClient),
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Closed => "Closed",
            Self::Open(_) => "Open",
        })
    }
}

impl Containerd {
    /// The service at the socket `address`, a path with or without `unix://`.
    pub(crate) fn at(address: &str) -> Self {
        Self {
            address: address.strip_prefix("unix://").unwrap_or(address).to_owned(),
            connection: Connection::Closed,
        }
    }

    async fn connect(&mut self) -> Result<EventsClient, String> {
        if let Connection::Open(client) = &self.connection {
            return Ok(client.clone());
        }
        let stream = UnixStream::connect(&self.address)
            .await
            .map_err(|error| format!("{}: {error}", self.address))?;
        let client = EventsClient::new(Client::new(Socket::from(stream)));
        self.connection = Connection::Open(client.clone());
        Ok(client)
    }
}

impl Forward for Containerd {
    async fn forward(&mut self, envelope: Envelope) -> Result<(), String> {
        let client = self.connect().await?;
        let request = ForwardRequest {
            envelope: MessageField::some(envelope),
            ..ForwardRequest::default()
        };
        let sent = client
            .forward(ttrpc::context::with_duration(FORWARD_TIMEOUT), &request)
            .await;
        match sent {
            Ok(_) => Ok(()),
            Err(error) => {
                self.connection = Connection::Closed;
                Err(error.to_string())
            }
        }
    }
}

/// containerd's own program, which publishes one event each time it is run: for a containerd that
/// named no socket.
#[derive(Debug)]
pub(crate) struct Publisher {
    /// The program.
    pub(crate) program: PathBuf,
    /// containerd's gRPC socket.
    pub(crate) address: String,
}

impl Forward for Publisher {
    async fn forward(&mut self, envelope: Envelope) -> Result<(), String> {
        let failed = |error: io::Error| format!("{}: {error}", self.program.display());
        let event = envelope.event.write_to_bytes().map_err(|error| error.to_string())?;
        let (reader, mut writer) = io::pipe().map_err(failed)?;
        let child = Command::new(&self.program)
            .args(["--address", &self.address, "publish", "--topic", &envelope.topic])
            .args(["--namespace", &envelope.namespace])
            .stdin(reader)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .and_then(|child| Child::from_std(&child))
            .map_err(failed)?;
        // An event is far smaller than a pipe, so this does not wait.
        writer.write_all(&event).map_err(failed)?;
        drop(writer);
        match tokio::time::timeout(FORWARD_TIMEOUT, child.reap()).await {
            Ok(Ok(WaitStatus::Exited(0))) => Ok(()),
            Ok(Ok(how)) => Err(format!("{} {how}", self.program.display())),
            Ok(Err(error)) => Err(failed(error)),
            Err(_) => {
                child.kill_and_reap();
                Err(format!("{} did not end in time", self.program.display()))
            }
        }
    }
}

/// Nowhere: containerd named no way at all.
#[derive(Debug)]
pub(crate) struct Nowhere;

impl Forward for Nowhere {
    async fn forward(&mut self, envelope: Envelope) -> Result<(), String> {
        log::warn!(
            "containerd named no way to publish events: one of {} is lost",
            envelope.topic
        );
        Ok(())
    }
}

/// A message in containerd's envelope: its type's full name without a prefix.
pub(crate) fn pack_any<M: MessageFull>(value: Vec<u8>) -> Any {
    Any {
        type_url: M::descriptor().full_name().to_owned(),
        value,
        ..Any::default()
    }
}

/// A moment as protobuf has it.
pub(crate) fn timestamp(at: SystemTime) -> Timestamp {
    at.into()
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::shim_async::{Events, create_events};
    use tokio::sync::mpsc;

    use super::*;
    use crate::shim::tests::script::write_script;

    /// Takes what the test lets it take, and shows every try.
    struct Scripted {
        answers: mpsc::UnboundedReceiver<Result<(), String>>,
        tries: mpsc::UnboundedSender<String>,
    }

    impl Forward for Scripted {
        async fn forward(&mut self, envelope: Envelope) -> Result<(), String> {
            let event = TaskStart::parse_from_bytes(&envelope.event.value).unwrap();
            self.tries.send(event.container_id).unwrap();
            match self.answers.recv().await {
                Some(answer) => answer,
                None => std::future::pending().await,
            }
        }
    }

    type Answers = mpsc::UnboundedSender<Result<(), String>>;

    fn queue() -> (EventQueue, Answers, mpsc::UnboundedReceiver<String>) {
        let (answer, answers) = mpsc::unbounded_channel();
        let (tries, tried) = mpsc::unbounded_channel();
        (EventQueue::start("default", Scripted { answers, tries }), answer, tried)
    }

    fn start_of(id: &str) -> TaskStart {
        TaskStart {
            container_id: id.to_owned(),
            ..TaskStart::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn failed_event_is_tried_again_before_the_next() {
        let (queue, answers, mut tried) = queue();
        for id in ["a", "b", "c"] {
            queue.publish(&start_of(id));
        }
        for answer in [Ok(()), Err("away".to_owned()), Err("away".to_owned()), Ok(()), Ok(())] {
            answers.send(answer).unwrap();
        }

        let mut order = Vec::new();
        for _ in 0..5 {
            order.push(tried.recv().await.unwrap());
        }

        assert_eq!(order, ["a", "b", "b", "b", "c"]);
        queue.flush(Duration::from_secs(1)).await;
        assert!(queue.shared.waiting().envelopes.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn queue_is_bounded_and_loses_the_oldest_while_containerd_is_away() {
        let (queue, answers, mut tried) = queue();
        for number in 0..CAPACITY + 10 {
            queue.publish(&start_of(&number.to_string()));
        }
        assert_eq!(queue.shared.waiting().envelopes.len(), CAPACITY);
        answers.send(Ok(())).unwrap();
        assert_eq!(tried.recv().await.unwrap(), "10");
    }

    #[tokio::test(start_paused = true)]
    async fn event_dropped_while_it_is_under_way_takes_no_other_with_it() {
        let (queue, answers, mut tried) = queue();
        queue.publish(&start_of("first"));
        assert_eq!(tried.recv().await.unwrap(), "first");
        for number in 0..CAPACITY {
            queue.publish(&start_of(&number.to_string()));
        }
        answers.send(Ok(())).unwrap();
        assert_eq!(tried.recv().await.unwrap(), "0");
    }

    #[tokio::test(start_paused = true)]
    async fn flood_of_hints_leaves_room_for_exits() {
        let (queue, _answers, _tried) = queue();
        for _ in 0..CAPACITY * 2 {
            queue.publish(&TaskOOM::default());
        }
        assert_eq!(queue.shared.waiting().envelopes.len(), CAPACITY_FOR_HINTS);
        queue.publish(&TaskExit::default());
        assert_eq!(queue.shared.waiting().envelopes.len(), CAPACITY_FOR_HINTS + 1);
    }

    #[tokio::test(start_paused = true)]
    async fn flush_gives_up_at_its_limit() {
        let (queue, _answers, _tried) = queue();
        queue.publish(&start_of("a"));
        queue.flush(Duration::from_secs(2)).await;
        assert_eq!(queue.shared.waiting().envelopes.len(), 1);
    }

    #[test]
    fn type_names_have_no_prefix() {
        assert_eq!(pack_any::<TaskExit>(Vec::new()).type_url, "containerd.events.TaskExit");
    }

    #[tokio::test]
    async fn program_gets_the_event_on_its_standard_input() {
        let folder = tempfile::tempdir().unwrap();
        let (program, out) = (folder.path().join("publish"), folder.path().join("out"));
        write_script(&program, &format!("echo \"$@\" > {0}; cat >> {0}\n", out.display()));
        let address = "/run/containerd/containerd.sock".to_owned();
        let queue = EventQueue::start("default", Publisher { program, address });

        queue.publish(&start_of("a"));
        queue.flush(Duration::from_secs(20)).await;

        let text = std::fs::read(out).unwrap();
        let expected = b"--address /run/containerd/containerd.sock publish --topic /tasks/start --namespace default\n";
        let event = Any::parse_from_bytes(text.strip_prefix(expected).unwrap()).unwrap();
        assert_eq!(event.type_url, "containerd.events.TaskStart");
    }

    /// What a server saw, in order.
    struct Recorder(mpsc::UnboundedSender<Envelope>);

    #[async_trait::async_trait]
    impl Events for Recorder {
        async fn forward(
            &self,
            _: &ttrpc::asynchronous::TtrpcContext,
            request: ForwardRequest,
        ) -> ttrpc::Result<containerd_shim_protos::api::Empty> {
            self.0.send(request.envelope.unwrap()).unwrap();
            Ok(containerd_shim_protos::api::Empty::default())
        }
    }

    #[tokio::test]
    async fn containerd_that_comes_late_and_comes_again_gets_every_event() {
        let folder = tempfile::tempdir().unwrap();
        let address = format!("unix://{}", folder.path().join("ttrpc").display());
        let (sender, mut seen) = mpsc::unbounded_channel();
        let serve = || async {
            let _ = std::fs::remove_file(folder.path().join("ttrpc"));
            let mut server = ttrpc::asynchronous::Server::new()
                .bind(&address)
                .unwrap()
                .register_service(create_events(Arc::new(Recorder(sender.clone()))));
            server.start().await.unwrap();
            server
        };
        let queue = EventQueue::start("k8s.io", Containerd::at(&address));

        queue.publish(&start_of("before"));
        let mut server = serve().await;
        let envelope = seen.recv().await.unwrap();
        assert_eq!(envelope.topic, "/tasks/start");
        assert_eq!(envelope.namespace, "k8s.io");
        assert_eq!(envelope.event.type_url, "containerd.events.TaskStart");

        server.shutdown().await.unwrap();
        drop(server);
        queue.publish(&start_of("between"));
        let _server = serve().await;
        let event = TaskStart::parse_from_bytes(&seen.recv().await.unwrap().event.value).unwrap();
        assert_eq!(event.container_id, "between");
    }
}
