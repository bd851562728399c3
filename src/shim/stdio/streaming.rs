//! containerd's streaming scheme: what CRI uses for standard streams where a runtime has
//! `io_type = "streaming"`.
//!
//! CRI asks for `ttrpc+unix://SOCKET?streaming_id=ID`, where SOCKET is the shim's own, and opens a
//! stream there, usually long before it creates the task (containerd `internal/cri/io/streaming.go`,
//! `core/streaming/proxy`). It begins with a `StreamInit` that has the id and an empty answer; then there
//! are `Data` from the side that the bytes come from and `WindowUpdate` from the other
//! (`core/transfer/streaming`). A client that went away comes back by the same id: containerd does after
//! a restart.
//!
//! A relay moves the bytes between a stream and a pipe, whose other end the machine has. It holds one
//! message at most; while a client is slow or away, the pipe fills, and the process waits.

use std::{collections::HashMap, future::Future, io, os::fd::OwnedFd, sync::Arc, time::Duration};

use parking_lot::{Mutex, MutexGuard};

use async_trait::async_trait;
use containerd_shim::{
    protos::{
        protobuf::{
            Message,
            well_known_types::{
                any::Any,
                empty::Empty,
                wrappers::{BytesValue, Int32Value, StringValue},
            },
        },
        ttrpc::{
            self,
            asynchronous::{SSReceiver, SSSender, ServerStream, Service, StreamHandler, StreamInner, TtrpcContext},
        },
    },
    util::convert_to_any,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    sync::{oneshot, watch},
    task::JoinHandle,
};

/// The name of the service (containerd `api/services/streaming/v1`).
pub(crate) const STREAMING_SERVICE: &str = "containerd.services.streaming.v1.Streaming";

/// How long a client may take to open a stream that a task is created with: it does before.
const OPEN_LIMIT: Duration = Duration::from_secs(10);

/// How long input may still come after it was told to end: what its client sent before goes another way.
const LATE_INPUT_LIMIT: Duration = Duration::from_secs(1);

/// As containerd's own messages (`core/transfer/streaming/stream.go`, `maxRead` and `windowSize`).
const MOST_DATA: usize = 32 << 10;
const WINDOW: i32 = 64 << 10;

const DATA: &str = "containerd.types.transfer.Data";
const WINDOW_UPDATE: &str = "containerd.types.transfer.WindowUpdate";

/// Why a stream cannot be relayed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamingError {
    /// Nobody opened it.
    #[error("no client opened it at this shim's socket within {} s", OPEN_LIMIT.as_secs())]
    NotOpened,
    /// The relay's pipe cannot be made.
    #[error("make a pipe: {0}")]
    Pipe(#[from] io::Error),
}

/// The streams that clients have opened and no relay has taken. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct StreamRegistry(Arc<Mutex<HashMap<String, watch::Sender<Option<Client>>>>>);

impl StreamRegistry {
    /// The service under [`STREAMING_SERVICE`].
    pub(crate) fn ttrpc_service(&self) -> Service {
        let handler: Arc<dyn StreamHandler + Send + Sync> = Arc::new(self.clone());
        Service {
            methods: HashMap::new(),
            streams: HashMap::from([("Stream".to_owned(), handler)]),
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, watch::Sender<Option<Client>>>> {
        self.0.lock()
    }

    /// Takes a client in; one that waits by the same id is let go.
    fn offer(&self, id: String, client: Client) {
        self.table().entry(id).or_default().send_replace(Some(client));
    }

    /// The clients that open the stream `id`, one after the other.
    fn clients(&self, id: &str) -> Clients {
        let offers = self.table().entry(id.to_owned()).or_default().subscribe();
        Clients {
            streaming: self.clone(),
            id: id.to_owned(),
            offers,
        }
    }
}

#[async_trait]
impl StreamHandler for StreamRegistry {
    /// Takes a client in, and returns when nobody needs it any more: that closes the stream.
    async fn handler(&self, _: TtrpcContext, stream: StreamInner) -> ttrpc::Result<Option<ttrpc::Response>> {
        let mut stream = ServerStream::<Any, Any>::new(stream);
        let Some(first) = stream.recv().await? else {
            return Ok(None);
        };
        let init: StringValue = message(&first).map_err(|error| {
            let text = format!("the first message is no StreamInit: {error}");
            ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INVALID_ARGUMENT, text))
        })?;
        let (done, finished) = oneshot::channel();
        let (sender, receiver) = stream.split();
        // The answer comes first: nothing else may overtake it.
        let answer = convert_to_any(Box::new(Empty::default()))
            .map_err(|error| ttrpc::Error::Others(format!("encode the answer to StreamInit: {error}")))?;
        sender.send(&answer).await?;
        self.offer(
            init.value,
            Client {
                sender,
                receiver,
                _done: done,
            },
        );
        // It is dropped, not sent.
        let _ = finished.await;
        Ok(None)
    }
}

/// A stream that a client has opened. It is closed when this is dropped.
#[derive(Debug)]
struct Client {
    sender: SSSender<Any>,
    receiver: SSReceiver<Any>,
    _done: oneshot::Sender<()>,
}

/// The clients of one stream. Its entry ends with it.
#[derive(Debug)]
struct Clients {
    streaming: StreamRegistry,
    id: String,
    offers: watch::Receiver<Option<Client>>,
}

impl Clients {
    /// Waits for the next client. Nothing is lost if this is dropped before.
    async fn next(&mut self) -> Client {
        loop {
            let taken = {
                let table = self.streaming.table();
                let mut taken = None;
                if let Some(slot) = table.get(&self.id) {
                    slot.send_if_modified(|offer| {
                        taken = offer.take();
                        false
                    });
                }
                taken
            };
            if let Some(client) = taken {
                return client;
            }
            if self.offers.changed().await.is_err() {
                // Another task has used the id, and its end took the entry: nobody comes any more.
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.streaming.table().remove(&self.id);
    }
}

/// Moves the bytes of one stream. Dropped, it ends at once.
#[derive(Debug)]
pub(super) struct Relay {
    task: JoinHandle<()>,
    /// How many bytes reached a client so far. Its sender is the task's.
    delivered: watch::Receiver<u64>,
    end_input: watch::Sender<bool>,
}

impl Relay {
    /// From what the machine writes into the pipe to the clients of the stream `id`.
    pub(super) async fn output(streaming: &StreamRegistry, id: &str) -> Result<(Self, OwnedFd), StreamingError> {
        let (writer, reader) = pipe::pipe()?;
        let machine = writer.into_blocking_fd()?;
        let relay = Self::start(streaming, id, |clients, first, delivered, _| {
            send_output(clients, first, reader, delivered)
        });
        Ok((relay.await?, machine))
    }

    /// From the clients of the stream `id` to the pipe that the machine reads.
    pub(super) async fn input(streaming: &StreamRegistry, id: &str) -> Result<(Self, OwnedFd), StreamingError> {
        let (writer, reader) = pipe::pipe()?;
        let machine = reader.into_blocking_fd()?;
        let relay = Self::start(streaming, id, |clients, first, delivered, ending| async move {
            take_input(clients, first, writer, ending).await;
            drop(delivered);
        });
        Ok((relay.await?, machine))
    }

    async fn start<F>(
        streaming: &StreamRegistry,
        id: &str,
        relay: impl FnOnce(Clients, Client, watch::Sender<u64>, watch::Receiver<bool>) -> F,
    ) -> Result<Self, StreamingError>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut clients = streaming.clients(id);
        let first = tokio::time::timeout(OPEN_LIMIT, clients.next()).await;
        let first = first.map_err(|_| StreamingError::NotOpened)?;
        let (delivering, delivered) = watch::channel(0);
        let (end_input, ending) = watch::channel(false);
        Ok(Self {
            task: tokio::spawn(relay(clients, first, delivering, ending)),
            delivered,
            end_input,
        })
    }

    /// Waits until `bytes` in all reached a client, or none will any more.
    pub(super) async fn delivered(&self, bytes: u64) {
        // An error means that the relay has ended.
        let _ = self.delivered.clone().wait_for(|count| *count >= bytes).await;
    }

    /// Waits until everything reached a client.
    pub(super) async fn ended(&self) {
        self.delivered(u64::MAX).await;
    }

    /// Ends the input after what was sent before.
    pub(super) fn end_input(&self) {
        self.end_input.send_replace(true);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn send_output(mut clients: Clients, first: Client, mut source: pipe::Receiver, delivered: watch::Sender<u64>) {
    let mut client = first;
    let mut bytes = Vec::with_capacity(MOST_DATA);
    loop {
        let next = tokio::select! {
            biased;
            newer = clients.next() => Some(newer),
            end = send_to(&mut client, &mut source, &mut bytes, &delivered) => match end {
                SourceEnd::All => return,
                SourceEnd::ClientGone => None,
            },
        };
        drop(client);
        client = match next {
            Some(newer) => newer,
            None => clients.next().await,
        };
    }
}

enum SourceEnd {
    /// Everything was sent.
    All,
    ClientGone,
}

/// What was read and not sent stays in `bytes`, also if this is dropped.
///
/// The windows that a client grants are not kept to: containerd counts less than it was sent where its
/// own reader's buffer is small (`reader.go`), and would in the end wait for bytes that must not be sent.
/// It has one connection a stream, and does not read from it what nobody takes.
async fn send_to(
    client: &mut Client,
    source: &mut pipe::Receiver,
    bytes: &mut Vec<u8>,
    delivered: &watch::Sender<u64>,
) -> SourceEnd {
    loop {
        while bytes.is_empty() {
            tokio::select! {
                count = source.read_buf(bytes) => match count {
                    Ok(1..) => {}
                    Ok(0) | Err(_) => return SourceEnd::All,
                },
                update = client.receiver.recv() => if !matches!(update, Ok(Some(_))) {
                    return SourceEnd::ClientGone;
                },
            }
        }
        let data = BytesValue {
            value: bytes.clone(),
            ..BytesValue::default()
        };
        if client.sender.send(&packed(DATA, &data)).await.is_err() {
            return SourceEnd::ClientGone;
        }
        delivered.send_modify(|count| *count += bytes.len() as u64);
        bytes.clear();
    }
}

async fn take_input(mut clients: Clients, first: Client, mut sink: pipe::Sender, mut ending: watch::Receiver<bool>) {
    let mut client = first;
    let mut bytes = Vec::new();
    loop {
        let next = tokio::select! {
            biased;
            newer = clients.next() => Some(newer),
            end = take_from(&mut client, &mut sink, &mut bytes, &mut ending) => match end {
                InputEnd::All => return,
                InputEnd::ClientGone => None,
            },
        };
        drop(client);
        client = match next {
            Some(newer) => newer,
            None => tokio::select! {
                newer = clients.next() => newer,
                () = ended(&mut ending) => return,
            },
        };
    }
}

enum InputEnd {
    /// Nothing is to come, or nobody takes it.
    All,
    /// As with a fifo that is no end of the input.
    ClientGone,
}

/// What was received and not written stays in `bytes`, also if this is dropped.
async fn take_from(
    client: &mut Client,
    sink: &mut pipe::Sender,
    bytes: &mut Vec<u8>,
    ending: &mut watch::Receiver<bool>,
) -> InputEnd {
    let mut granted: i32 = 0;
    loop {
        while !bytes.is_empty() {
            match sink.write(bytes).await {
                Ok(count) => drop(bytes.drain(..count)),
                Err(_) => return InputEnd::All,
            }
        }
        if granted <= WINDOW / 2 {
            let update = Int32Value {
                value: WINDOW,
                ..Int32Value::default()
            };
            if client.sender.send(&packed(WINDOW_UPDATE, &update)).await.is_err() {
                return InputEnd::ClientGone;
            }
            granted = granted.saturating_add(WINDOW);
        }
        let late = async {
            ended(ending).await;
            tokio::time::sleep(LATE_INPUT_LIMIT).await;
        };
        let received = tokio::select! {
            received = client.receiver.recv() => received,
            () = late => return InputEnd::All,
        };
        let Ok(Some(received)) = received else {
            return if *ending.borrow() {
                InputEnd::All
            } else {
                InputEnd::ClientGone
            };
        };
        let Ok(data) = message::<BytesValue>(&received) else {
            return InputEnd::ClientGone;
        };
        granted = granted.saturating_sub(i32::try_from(data.value.len()).unwrap_or(i32::MAX));
        *bytes = data.value;
    }
}

/// Waits until the input is told to end.
async fn ended(ending: &mut watch::Receiver<bool>) {
    // An error means that the relay is dropped.
    let _ = ending.wait_for(|ending| *ending).await;
}

/// Each of containerd's messages has one field, with the number 1: they are the same bytes as protobuf's
/// own wrappers.
fn packed(type_url: &str, message: &impl Message) -> Any {
    Any {
        type_url: type_url.to_owned(),
        // Writing to memory cannot fail.
        value: message.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    }
}

fn message<M: Message>(any: &Any) -> Result<M, containerd_shim::protos::protobuf::Error> {
    M::parse_from_bytes(&any.value)
}

#[cfg(test)]
mod tests {
    use super::*;

    // What a client sees of it is in the tests of [`crate::shim::tasks`].
    #[tokio::test(start_paused = true)]
    async fn stream_that_nobody_opens_is_an_error_and_leaves_nothing() {
        let streaming = StreamRegistry::default();
        let error = Relay::output(&streaming, "c1-stdout").await.map(drop).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no client opened it at this shim's socket within 10 s"
        );
        assert!(streaming.table().is_empty());
    }
}
