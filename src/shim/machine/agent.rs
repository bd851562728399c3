//! The client of the guest's agent: sends requests, and receives replies and events on the same stream.
//!
//! Received bytes are untrusted: the sizes of frames, lists and texts are bounded, a reply to no request is ignored,
//! and a violation of the protocol ends the stream, and with it the machine if its guest cannot go on without an agent.

use std::{
    collections::HashMap,
    io,
    os::unix::net::UnixStream as StdUnixStream,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::console::printable_line;
use nutshell_protocol::{
    Event, Failure, FrameBuffer, FromAgent, MAX_FROM_AGENT, MAX_TO_AGENT, Ready, Reply, Request, Response, ToAgent,
    encode,
};
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, oneshot, watch},
};

/// How many frames may be queued for writing. Further callers wait.
const MAX_QUEUED_FRAMES: usize = 16;

/// The size of the read buffer, in bytes. Most messages are far smaller.
const READ_SIZE: usize = 4 << 10;

/// The maximum number of characters of a failure's text that are kept.
const MAX_FAILURE_TEXT: usize = 4096;

/// The maximum number of characters of the guest's versions that are kept.
const MAX_VERSION: usize = 128;

/// Why a request has no response.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AgentError {
    /// The agent reports a failure.
    #[error("{}", .0.message)]
    Failed(Failure),
    /// The stream to the agent has ended.
    #[error("the agent of the virtual machine is gone")]
    Gone,
    /// The request is larger than the protocol allows.
    #[error("the request to {request} is too large: {reason}")]
    TooLarge { request: String, reason: String },
    /// The response is of another kind than the request.
    #[error("the agent of the virtual machine answered the request to {request} with a response of another kind")]
    Unexpected { request: String },
}

/// The client. Clones share one stream.
#[derive(Debug, Clone)]
pub(crate) struct Agent {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Whether the machine was started with an agent.
    is_present: bool,
    last_id: AtomicU64,
    frames: mpsc::Sender<Vec<u8>>,
    pending: Mutex<Pending>,
    ready: watch::Sender<Option<Ready>>,
    ended: watch::Sender<bool>,
}

/// The callers that wait for replies, by request id; `None` once the stream has ended.
type Pending = Option<HashMap<u64, oneshot::Sender<Result<Response, Failure>>>>;

impl Agent {
    /// The client of a machine without an agent. All of its requests fail with [`AgentError::Gone`], and it never
    /// becomes ready.
    pub(crate) fn absent() -> Self {
        let (frames, _) = mpsc::channel(1);
        Self {
            shared: Arc::new(Shared {
                is_present: false,
                last_id: AtomicU64::new(0),
                frames,
                pending: Mutex::new(None),
                ready: watch::Sender::new(None),
                ended: watch::Sender::new(true),
            }),
        }
    }

    /// Starts a client on `stream`. `on_event` gets each event in order, and must not block. The returned future
    /// completes with a reason when the stream has ended. Needs the Tokio runtime.
    pub(crate) fn start(
        stream: StdUnixStream,
        on_event: impl FnMut(Event) + Send + 'static,
    ) -> io::Result<(Self, impl Future<Output = String> + Send + 'static)> {
        stream.set_nonblocking(true)?;
        let (reader, writer) = UnixStream::from_std(stream)?.into_split();
        let (frames, queue) = mpsc::channel(MAX_QUEUED_FRAMES);
        let shared = Arc::new(Shared {
            is_present: true,
            last_id: AtomicU64::new(0),
            frames,
            pending: Mutex::new(Some(HashMap::new())),
            ready: watch::Sender::new(None),
            ended: watch::Sender::new(false),
        });
        tokio::spawn(write(writer, queue));
        let (ended, end) = oneshot::channel();
        tokio::spawn({
            let shared = shared.clone();
            async move {
                let reason = shared.read(reader, on_event).await;
                // Dropping the senders fails the requests that still wait.
                shared.pending().take();
                shared.ended.send_replace(true);
                // The receiver is gone if the machine's start failed.
                let _ = ended.send(reason);
            }
        });
        let end = async move { end.await.unwrap_or_else(|_| "the shim stopped reading".to_owned()) };
        Ok((Self { shared }, end))
    }

    /// Whether the machine was started with an agent.
    pub(crate) fn is_present(&self) -> bool {
        self.shared.is_present
    }

    /// The agent's [`Ready`] message, if it has sent one and its stream has not ended.
    pub(crate) fn ready_message(&self) -> Option<Ready> {
        if *self.shared.ended.borrow() {
            return None;
        }
        self.shared.ready.borrow().clone()
    }

    /// Waits for the end of the stream. The events before it have been passed on then.
    pub(crate) async fn ended(&self) {
        let mut ended = self.shared.ended.subscribe();
        // Cannot fail: `self` keeps the sender alive.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// Waits for the agent's [`Ready`] message.
    pub(crate) async fn ready(&self) -> Ready {
        let mut receiver = self.shared.ready.subscribe();
        loop {
            if let Some(ready) = receiver.borrow_and_update().clone() {
                return ready;
            }
            if receiver.changed().await.is_err() {
                // Cannot happen: `self` keeps the sender alive.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Sends a request and waits for its response. If the caller drops the future, a request that is queued is still
    /// sent as a whole.
    pub(crate) async fn request(&self, request: Request) -> Result<Response, AgentError> {
        let id = self.shared.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let message = ToAgent { id, request };
        let frame = encode(&message, MAX_TO_AGENT).map_err(|error| AgentError::TooLarge {
            request: describe_request(&message.request),
            reason: match &message.request {
                Request::CreateContainer(_) | Request::StartExec(_) | Request::SetUpPod(_) => {
                    format!("{error}: make the container's spec smaller")
                }
                _ => error.to_string(),
            },
        })?;
        drop(message);
        let (sender, response) = oneshot::channel();
        self.shared
            .pending()
            .as_mut()
            .ok_or(AgentError::Gone)?
            .insert(id, sender);
        let _registration = Registration {
            shared: &self.shared,
            id,
        };
        self.shared.frames.send(frame).await.map_err(|_| AgentError::Gone)?;
        match response.await {
            Ok(result) => result.map_err(AgentError::Failed),
            Err(_) => Err(AgentError::Gone),
        }
    }

    /// Sends a request whose response has the value that `extract` returns.
    pub(crate) async fn ask<T>(
        &self,
        request: Request,
        extract: impl FnOnce(Response) -> Option<T>,
    ) -> Result<T, AgentError> {
        let description = describe_request(&request);
        extract(self.request(request).await?).ok_or(AgentError::Unexpected { request: description })
    }

    /// Sends a request whose response is [`Response::Done`].
    pub(crate) async fn run(&self, request: Request) -> Result<(), AgentError> {
        self.ask(request, |response| matches!(response, Response::Done).then_some(()))
            .await
    }

    /// Sends a request that creates a process. Returns the process's pid in the guest.
    pub(crate) async fn create(&self, request: Request) -> Result<u32, AgentError> {
        let created = |response| match response {
            Response::Created { pid } => Some(pid),
            _ => None,
        };
        self.ask(request, created).await
    }
}

/// Removes a request from the pending ones when its caller stops waiting.
struct Registration<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        if let Some(pending) = self.shared.pending().as_mut() {
            pending.remove(&self.id);
        }
    }
}

impl Shared {
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock()
    }

    async fn read(&self, mut reader: OwnedReadHalf, mut on_event: impl FnMut(Event)) -> String {
        let mut buffer = FrameBuffer::new(MAX_FROM_AGENT);
        let mut bytes = vec![0; READ_SIZE];
        loop {
            match reader.read(&mut bytes).await {
                Ok(0) => return "the agent closed its stream".to_owned(),
                Ok(length) => buffer.push(&bytes[..length]),
                Err(error) => return format!("cannot read from the agent: {error}"),
            }
            loop {
                match buffer.next() {
                    Ok(Some(message)) => self.dispatch(message, &mut on_event),
                    Ok(None) => break,
                    Err(error) => return format!("the agent violated the protocol: {error}"),
                }
            }
        }
    }

    fn dispatch(&self, message: FromAgent, on_event: &mut impl FnMut(Event)) {
        match message {
            FromAgent::Ready(Ready { version, kernel }) => {
                self.ready.send_replace(Some(Ready {
                    version: printable_line(&version, MAX_VERSION),
                    kernel: printable_line(&kernel, MAX_VERSION),
                }));
            }
            FromAgent::Reply(Reply { id, result }) => {
                let waiting = self.pending().as_mut().and_then(|pending| pending.remove(&id));
                if let Some(waiting) = waiting {
                    let result = result.map_err(|Failure { kind, message }| Failure {
                        kind,
                        message: printable_line(&message, MAX_FAILURE_TEXT),
                    });
                    // The receiver may have timed out.
                    let _ = waiting.send(result);
                }
            }
            FromAgent::Event(event) => on_event(event),
        }
    }
}

async fn write(mut writer: OwnedWriteHalf, mut frames: mpsc::Receiver<Vec<u8>>) {
    while let Some(frame) = frames.recv().await {
        if writer.write_all(&frame).await.is_err() {
            // The reader sees the same failure and reports it.
            return;
        }
    }
}

/// What a request is for: a verb with its object, as in "the agent did not answer the request to …".
pub(crate) fn describe_request(request: &Request) -> String {
    let of_process = |verb: &str, container: &str, exec: Option<&str>| match exec {
        Some(exec) => format!("{verb} exec {exec} of container {container}"),
        None => format!("{verb} container {container}"),
    };
    match request {
        Request::SetUpPod(_) => "set up the pod".to_owned(),
        Request::CreateContainer(create) => of_process("create", &create.container, None),
        Request::StartContainer { container } => of_process("start", container, None),
        Request::StartExec(start) => of_process("start", &start.container, Some(&start.exec)),
        Request::Signal { container, exec, .. } => of_process("signal", container, exec.as_deref()),
        Request::Resize { container, exec, .. } => of_process("resize the terminal of", container, exec.as_deref()),
        Request::Processes { container } => of_process("list the processes of", container, None),
        Request::Stats { container } => of_process("read the resource usage of", container, None),
        Request::Update { container, .. } => of_process("update", container, None),
        Request::Pause { container } => of_process("pause", container, None),
        Request::Resume { container } => of_process("resume", container, None),
        Request::BlockedThreads { container, exec } => {
            of_process("list the blocked threads of", container, exec.as_deref())
        }
        Request::AbandonContainer { container } => of_process("abandon", container, None),
        Request::DeleteContainer { container } => of_process("delete", container, None),
        Request::ConfigureGuest(_) => "apply the settings of the node".to_owned(),
        Request::SetClock { .. } => "set the clock".to_owned(),
        Request::SteerClock(_) => "change the rate of the clock".to_owned(),
        Request::ReadClock => "read the clock".to_owned(),
        Request::ProbeNetworkDevices { .. } => "find its network devices".to_owned(),
        Request::ReleaseDisk { slot } => format!("release the disk in disk slot {slot}"),
        Request::FindDiskKernel { slot, .. } => format!("find the kernel on the disk in disk slot {slot}"),
        Request::ResizeMachine { vcpus, .. } => format!("use {vcpus} vCPUs"),
        Request::ConfigureNetwork { .. } => "configure its network".to_owned(),
        Request::ForwardConnection { .. } => "forward a connection".to_owned(),
        Request::OpenShell(_) => "open a shell".to_owned(),
        Request::RelayNames { .. } => "relay DNS queries".to_owned(),
        Request::Shutdown => "write back its file systems".to_owned(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::{Read, Write};

    use nutshell_protocol::{Exited, FailureKind, MAX_PROCESSES, ProcessEntry};

    use super::*;

    /// The agent's end of the stream, with blocking calls.
    pub(in crate::shim::machine) struct Peer {
        stream: StdUnixStream,
        buffer: FrameBuffer,
    }

    impl Peer {
        pub(in crate::shim::machine) fn send(&mut self, message: &FromAgent) {
            self.stream
                .write_all(&encode(message, MAX_FROM_AGENT).unwrap())
                .unwrap();
        }

        pub(in crate::shim::machine) fn receive(&mut self) -> ToAgent {
            loop {
                if let Some(message) = self.buffer.next().unwrap() {
                    return message;
                }
                let mut bytes = [0; 512];
                let length = self.stream.read(&mut bytes).unwrap();
                assert_ne!(length, 0);
                self.buffer.push(&bytes[..length]);
            }
        }
    }

    /// A stream for [`Agent::start`], and its other end.
    pub(in crate::shim::machine) fn connect() -> (StdUnixStream, Peer) {
        let (ours, stream) = StdUnixStream::pair().unwrap();
        let buffer = FrameBuffer::new(MAX_TO_AGENT);
        (ours, Peer { stream, buffer })
    }

    fn start(container: &str) -> Request {
        Request::StartContainer {
            container: container.to_owned(),
        }
    }

    fn exit_of(container: &str) -> FromAgent {
        FromAgent::Event(Event::Exited(Exited {
            container: container.to_owned(),
            exec: None,
            status: 0,
            exited_at: 0,
            stdout_bytes: 0,
            stderr_bytes: 0,
        }))
    }

    #[tokio::test]
    async fn replies_are_matched_to_requests_in_any_order() {
        let (stream, mut peer) = connect();
        let (agent, _end) = Agent::start(stream, |_| {}).unwrap();
        let answering = tokio::task::spawn_blocking(move || {
            let requests = [peer.receive(), peer.receive()];
            for ToAgent { id, request } in requests.into_iter().rev() {
                let result = match request {
                    Request::StartContainer { container } if container == "good" => Ok(Response::Done),
                    _ => Err(Failure {
                        kind: FailureKind::NotFound,
                        message: "no such container".to_owned(),
                    }),
                };
                // A reply to no request must not disturb the others.
                peer.send(&FromAgent::Reply(Reply {
                    id: id + 1000,
                    result: Ok(Response::Done),
                }));
                peer.send(&FromAgent::Reply(Reply { id, result }));
            }
            peer
        });

        let (good, bad) = tokio::join!(agent.run(start("good")), agent.run(start("bad")));

        assert_eq!(good, Ok(()));
        assert_eq!(bad.unwrap_err().to_string(), "no such container");
        answering.await.unwrap();
    }

    #[tokio::test]
    async fn text_of_a_failure_is_clipped_and_escaped() {
        let (stream, mut peer) = connect();
        let (agent, _end) = Agent::start(stream, |_| {}).unwrap();
        let answering = tokio::task::spawn_blocking(move || {
            let id = peer.receive().id;
            let failure = Failure {
                kind: FailureKind::Internal,
                message: format!("\x1b[31m\n{}", "x".repeat(100_000)),
            };
            peer.send(&FromAgent::Reply(Reply {
                id,
                result: Err(failure),
            }));
            peer
        });
        let text = agent.run(start("a")).await.unwrap_err().to_string();
        assert!(text.starts_with("\\u{1b}[31m\\nxxx"), "{}", &text[..20]);
        assert!(text.len() < MAX_FAILURE_TEXT + 32, "{}", text.len());
        answering.await.unwrap();
    }

    #[tokio::test]
    async fn list_beyond_its_limit_ends_the_stream() {
        let (stream, mut peer) = connect();
        let (_agent, end) = Agent::start(stream, |_| {}).unwrap();
        let processes = vec![ProcessEntry { pid: 1, exec: None }; MAX_PROCESSES + 1];
        let result = Ok(Response::Processes(processes));
        peer.send(&FromAgent::Reply(Reply { id: 1, result }));
        assert!(end.await.contains("violated the protocol"));
    }

    #[tokio::test]
    async fn ready_message_and_events_arrive_in_order() {
        let (stream, mut peer) = connect();
        let (seen, mut events) = mpsc::unbounded_channel();
        let (agent, _end) = Agent::start(stream, move |event| seen.send(event).unwrap()).unwrap();
        peer.send(&FromAgent::Ready(Ready {
            version: "1".to_owned(),
            kernel: "6.12".to_owned(),
        }));
        for container in ["a", "b", "c"] {
            peer.send(&exit_of(container));
        }

        assert_eq!(agent.ready().await.kernel, "6.12");
        for container in ["a", "b", "c"] {
            let event = events.recv().await.unwrap();
            assert!(
                matches!(&event, Event::Exited(exited) if exited.container == container),
                "{event:?}"
            );
        }
    }

    #[tokio::test]
    async fn end_of_stream_fails_pending_and_later_requests() {
        let (stream, mut peer) = connect();
        let (agent, end) = Agent::start(stream, |_| {}).unwrap();
        let closing = tokio::task::spawn_blocking(move || drop(peer.receive()));

        assert_eq!(agent.run(start("a")).await, Err(AgentError::Gone));

        closing.await.unwrap();
        end.await;
        assert_eq!(agent.run(start("b")).await, Err(AgentError::Gone));
    }

    #[tokio::test]
    async fn garbage_and_oversized_frames_end_the_stream() {
        for bytes in [&[2, 0, 0, 0, 0xff, 0xff][..], &[0xff, 0xff, 0xff, 0xff][..]] {
            let (stream, mut peer) = connect();
            let (_agent, end) = Agent::start(stream, |_| {}).unwrap();
            peer.stream.write_all(bytes).unwrap();
            assert!(end.await.contains("violated the protocol"));
        }
    }

    #[tokio::test]
    async fn cancelled_request_is_removed_from_pending() {
        let (stream, mut peer) = connect();
        let (agent, _end) = Agent::start(stream, |_| {}).unwrap();
        let request = tokio::spawn({
            let agent = agent.clone();
            async move { agent.run(start("a")).await }
        });
        let peer = tokio::task::spawn_blocking(move || {
            peer.receive();
            peer
        })
        .await
        .unwrap();

        request.abort();
        assert!(request.await.unwrap_err().is_cancelled());

        assert!(agent.shared.pending().as_ref().unwrap().is_empty());
        drop(peer);
    }

    #[tokio::test]
    async fn response_of_another_kind_is_an_error() {
        let (stream, mut peer) = connect();
        let (agent, _end) = Agent::start(stream, |_| {}).unwrap();
        let answering = tokio::task::spawn_blocking(move || {
            let id = peer.receive().id;
            let result = Ok(Response::Created { pid: 7 });
            peer.send(&FromAgent::Reply(Reply { id, result }));
            peer
        });
        let error = agent.run(start("a")).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "the agent of the virtual machine answered the request to start container a with a response of another kind"
        );
        answering.await.unwrap();
    }
}
