//! containerd's streaming scheme, which CRI uses for standard streams if a runtime is configured with
//! `io_type = "streaming"`.
//!
//! CRI names a stream `ttrpc+unix://SOCKET?streaming_id=ID`, where SOCKET is the shim's own, and opens it there,
//! usually long before it creates the task (containerd `internal/cri/io/streaming.go`, `core/streaming/proxy`). The
//! client sends a `StreamInit` with the id and gets an empty message back. After that, the side where the bytes come
//! from sends `Data`, and the other side `WindowUpdate` (`core/transfer/streaming`). A client that has disconnected may
//! reconnect with the same id, as containerd does after a restart.
//!
//! A relay moves the bytes between a stream and a pipe, whose other end the machine has. It holds at most one message.
//! While a client is slow or absent, the pipe fills up and the process blocks.

use std::{collections::HashMap, future::Future, io, os::fd::OwnedFd, sync::Arc, time::Duration};

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
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    sync::{oneshot, watch},
    task::JoinHandle,
};

/// The name of the service (containerd `api/services/streaming/v1`).
pub(crate) const STREAMING_SERVICE: &str = "containerd.services.streaming.v1.Streaming";

/// How long to wait for a client to open a stream when a process is created. Usually it has done so before.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the relay waits for further input after CloseIO. The client sends data and CloseIO on different streams, so
/// data that was sent first may arrive later.
const LATE_INPUT_TIMEOUT: Duration = Duration::from_secs(1);

/// The largest payload of a `Data` message, in bytes (containerd `core/transfer/streaming/stream.go`, `maxRead`).
const MAX_DATA_SIZE: usize = 32 << 10;

/// How many bytes a `WindowUpdate` grants (containerd `core/transfer/streaming/stream.go`, `windowSize`).
const WINDOW_SIZE: i32 = 64 << 10;

const DATA_TYPE_URL: &str = "containerd.types.transfer.Data";
const WINDOW_UPDATE_TYPE_URL: &str = "containerd.types.transfer.WindowUpdate";

/// Why a stream cannot be relayed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamingError {
    #[error("no client opened it at this shim's socket within {} s", OPEN_TIMEOUT.as_secs())]
    NotOpened,
    #[error("cannot create a pipe: {0}")]
    Pipe(#[from] io::Error),
}

/// The clients that have opened streams, by stream id, until a relay takes them. Clones share one registry.
#[derive(Debug, Clone, Default)]
pub(crate) struct StreamRegistry(Arc<Mutex<HashMap<String, watch::Sender<Option<Client>>>>>);

impl StreamRegistry {
    /// The ttrpc service to register as [`STREAMING_SERVICE`].
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

    /// Adds a client. An earlier client of the same stream that no relay has taken is dropped.
    fn offer(&self, id: String, client: Client) {
        self.table().entry(id).or_default().send_replace(Some(client));
    }

    /// Closes the stream `id`, unless a relay has taken its client. For a process that will not be created.
    pub(super) fn close(&self, id: &str) {
        self.table().remove(id);
    }

    /// Subscribes to the clients that open the stream `id`.
    fn subscribe(&self, id: &str) -> ClientQueue {
        let offers = self.table().entry(id.to_owned()).or_default().subscribe();
        ClientQueue {
            registry: self.clone(),
            id: id.to_owned(),
            offers,
        }
    }
}

#[async_trait]
impl StreamHandler for StreamRegistry {
    /// Registers a client, and returns when it is dropped: that closes the stream.
    async fn handler(&self, _: TtrpcContext, stream: StreamInner) -> ttrpc::Result<Option<ttrpc::Response>> {
        let mut stream = ServerStream::<Any, Any>::new(stream);
        let Some(first) = stream.recv().await? else {
            return Ok(None);
        };
        let init: StringValue = unpack_message(&first).map_err(|error| {
            let text = format!("the first message is not a StreamInit: {error}");
            ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INVALID_ARGUMENT, text))
        })?;
        let (done, finished) = oneshot::channel();
        let (sender, receiver) = stream.split();
        // Before `offer`: a relay must not send data before this answer.
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
        // Completes with an error when the client is dropped.
        let _ = finished.await;
        Ok(None)
    }
}

/// A client's end of a stream. A drop closes the stream.
#[derive(Debug)]
struct Client {
    sender: SSSender<Any>,
    receiver: SSReceiver<Any>,
    _done: oneshot::Sender<()>,
}

/// The clients of one stream, one after the other. A drop removes the stream from the registry.
#[derive(Debug)]
struct ClientQueue {
    registry: StreamRegistry,
    id: String,
    offers: watch::Receiver<Option<Client>>,
}

impl ClientQueue {
    /// Waits for the next client. Cancel safe.
    async fn next(&mut self) -> Client {
        loop {
            let taken = {
                let table = self.registry.table();
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
                // Another process with this stream id has removed the entry, so no client can follow.
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Drop for ClientQueue {
    fn drop(&mut self) {
        self.registry.table().remove(&self.id);
    }
}

/// Moves the bytes of one stream. A drop stops it at once.
#[derive(Debug)]
pub(super) struct Relay {
    task: JoinHandle<()>,
    /// How many bytes were sent to clients. The task has the sender, and drops it at its end.
    delivered: watch::Receiver<u64>,
    /// Set on CloseIO.
    end_input: watch::Sender<bool>,
}

impl Relay {
    /// Waits for a client of the stream `id`, and relays what the machine writes into the returned pipe to it.
    pub(super) async fn start_output(registry: &StreamRegistry, id: &str) -> Result<(Self, OwnedFd), StreamingError> {
        let (writer, reader) = pipe::pipe()?;
        let machine = writer.into_blocking_fd()?;
        let relay = Self::start(registry, id, |clients, first, delivered, _| {
            send_output(clients, first, reader, delivered)
        });
        Ok((relay.await?, machine))
    }

    /// Waits for a client of the stream `id`, and relays what it sends to the returned pipe, which the machine reads.
    pub(super) async fn start_input(registry: &StreamRegistry, id: &str) -> Result<(Self, OwnedFd), StreamingError> {
        let (writer, reader) = pipe::pipe()?;
        let machine = reader.into_blocking_fd()?;
        let relay = Self::start(registry, id, |clients, first, delivered, ending| async move {
            receive_input(clients, first, writer, ending).await;
            drop(delivered);
        });
        Ok((relay.await?, machine))
    }

    async fn start<F>(
        registry: &StreamRegistry,
        id: &str,
        relay: impl FnOnce(ClientQueue, Client, watch::Sender<u64>, watch::Receiver<bool>) -> F,
    ) -> Result<Self, StreamingError>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut clients = registry.subscribe(id);
        let first = tokio::time::timeout(OPEN_TIMEOUT, clients.next()).await;
        let first = first.map_err(|_| StreamingError::NotOpened)?;
        let (delivering, delivered) = watch::channel(0);
        let (end_input, ending) = watch::channel(false);
        Ok(Self {
            task: tokio::spawn(relay(clients, first, delivering, ending)),
            delivered,
            end_input,
        })
    }

    /// Waits until `bytes`, counted from the start, were sent to clients, or the relay has ended.
    pub(super) async fn delivered(&self, bytes: u64) {
        // An error means that the relay has ended.
        let _ = self.delivered.clone().wait_for(|count| *count >= bytes).await;
    }

    /// Ends the input after the bytes that the client has sent before.
    pub(super) fn end_input(&self) {
        self.end_input.send_replace(true);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Why a relay stops serving a client.
enum ClientEnd {
    /// No more bytes follow, or the other side of the pipe is closed.
    StreamEnded,
    /// The stream continues with the next client, as with a fifo.
    ClientGone,
}

/// Serves the clients of an output until everything from `source` was sent.
async fn send_output(
    mut clients: ClientQueue,
    first: Client,
    mut source: pipe::Receiver,
    delivered: watch::Sender<u64>,
) {
    let mut client = first;
    let mut bytes = Vec::with_capacity(MAX_DATA_SIZE);
    loop {
        let next = tokio::select! {
            biased;
            newer = clients.next() => Some(newer),
            end = send_to_client(&mut client, &mut source, &mut bytes, &delivered) => match end {
                ClientEnd::StreamEnded => return,
                ClientEnd::ClientGone => None,
            },
        };
        drop(client);
        client = match next {
            Some(newer) => newer,
            None => clients.next().await,
        };
    }
}

/// Sends everything from `source` to one client. Cancel safe: bytes that were read and not sent stay in `bytes`.
///
/// The windows that the client grants are ignored. containerd counts fewer bytes than it received if the buffer of its
/// reader is small (`reader.go`), and would in the end wait for bytes that it has not granted. Flow control works
/// without them: each stream has a separate connection, and containerd reads from it only as fast as its reader does.
async fn send_to_client(
    client: &mut Client,
    source: &mut pipe::Receiver,
    bytes: &mut Vec<u8>,
    delivered: &watch::Sender<u64>,
) -> ClientEnd {
    loop {
        while bytes.is_empty() {
            tokio::select! {
                count = source.read_buf(bytes) => match count {
                    Ok(1..) => {}
                    Ok(0) | Err(_) => return ClientEnd::StreamEnded,
                },
                update = client.receiver.recv() => if !matches!(update, Ok(Some(_))) {
                    return ClientEnd::ClientGone;
                },
            }
        }
        let data = BytesValue {
            value: bytes.clone(),
            ..BytesValue::default()
        };
        if client.sender.send(&pack_message(DATA_TYPE_URL, &data)).await.is_err() {
            return ClientEnd::ClientGone;
        }
        delivered.send_modify(|count| *count += bytes.len() as u64);
        bytes.clear();
    }
}

/// Serves the clients of an input until its end.
async fn receive_input(
    mut clients: ClientQueue,
    first: Client,
    mut sink: pipe::Sender,
    mut ending: watch::Receiver<bool>,
) {
    let mut client = first;
    let mut bytes = Vec::new();
    loop {
        let next = tokio::select! {
            biased;
            newer = clients.next() => Some(newer),
            end = receive_from_client(&mut client, &mut sink, &mut bytes, &mut ending) => match end {
                ClientEnd::StreamEnded => return,
                ClientEnd::ClientGone => None,
            },
        };
        drop(client);
        client = match next {
            Some(newer) => newer,
            None => tokio::select! {
                newer = clients.next() => newer,
                () = input_ended(&mut ending) => return,
            },
        };
    }
}

/// Writes what one client sends to `sink`. Cancel safe: bytes that were received and not written stay in `bytes`.
async fn receive_from_client(
    client: &mut Client,
    sink: &mut pipe::Sender,
    bytes: &mut Vec<u8>,
    ending: &mut watch::Receiver<bool>,
) -> ClientEnd {
    let mut granted: i32 = 0;
    loop {
        while !bytes.is_empty() {
            match sink.write(bytes).await {
                Ok(count) => drop(bytes.drain(..count)),
                Err(_) => return ClientEnd::StreamEnded,
            }
        }
        if granted <= WINDOW_SIZE / 2 {
            let update = Int32Value {
                value: WINDOW_SIZE,
                ..Int32Value::default()
            };
            if client
                .sender
                .send(&pack_message(WINDOW_UPDATE_TYPE_URL, &update))
                .await
                .is_err()
            {
                return ClientEnd::ClientGone;
            }
            granted = granted.saturating_add(WINDOW_SIZE);
        }
        let late = async {
            input_ended(ending).await;
            tokio::time::sleep(LATE_INPUT_TIMEOUT).await;
        };
        let received = tokio::select! {
            received = client.receiver.recv() => received,
            () = late => return ClientEnd::StreamEnded,
        };
        let Ok(Some(received)) = received else {
            return if *ending.borrow() {
                ClientEnd::StreamEnded
            } else {
                ClientEnd::ClientGone
            };
        };
        let Ok(data) = unpack_message::<BytesValue>(&received) else {
            return ClientEnd::ClientGone;
        };
        granted = granted.saturating_sub(i32::try_from(data.value.len()).unwrap_or(i32::MAX));
        *bytes = data.value;
    }
}

/// Waits for [`Relay::end_input`].
async fn input_ended(ending: &mut watch::Receiver<bool>) {
    // An error means that the relay was dropped.
    let _ = ending.wait_for(|ending| *ending).await;
}

/// Packs `Data` and `WindowUpdate`. Each has one field, with the number 1, so that it is encoded as protobuf's wrapper
/// messages are.
fn pack_message(type_url: &str, message: &impl Message) -> Any {
    Any {
        type_url: type_url.to_owned(),
        // Writing to memory cannot fail.
        value: message.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    }
}

fn unpack_message<M: Message>(any: &Any) -> Result<M, containerd_shim::protos::protobuf::Error> {
    M::parse_from_bytes(&any.value)
}

#[cfg(test)]
mod tests {
    use super::*;

    // The client's view of a stream is tested in `crate::shim::tests::streams`.
    #[tokio::test(start_paused = true)]
    async fn stream_without_a_client_is_an_error_and_leaves_no_entry() {
        let registry = StreamRegistry::default();
        let error = Relay::start_output(&registry, "c1-stdout").await.map(drop).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no client opened it at this shim's socket within 10 s"
        );
        assert!(registry.table().is_empty());
    }
}
