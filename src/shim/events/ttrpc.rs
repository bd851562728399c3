//! Delivery to containerd's events service by ttrpc.

use containerd_shim::protos::{
    api::ForwardRequest,
    protobuf::MessageField,
    shim::event::Envelope,
    shim_async::{Client, EventsClient},
    ttrpc::{self, Code, asynchronous::transport::Socket},
};
use tokio::net::UnixStream;

use super::forwarder::{FORWARD_LIMIT, ForwardError, Forwarder};

/// A client of containerd's events service. It connects for the first event, and reconnects after an error.
#[derive(Debug)]
pub(crate) struct TtrpcForwarder {
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

impl TtrpcForwarder {
    /// Creates a client of the socket at `address`, a path with or without `unix://`. Does not connect yet.
    pub(crate) fn new(address: &str) -> Self {
        Self {
            address: address.strip_prefix("unix://").unwrap_or(address).to_owned(),
            connection: Connection::Closed,
        }
    }

    async fn connect(&mut self) -> Result<EventsClient, ForwardError> {
        if let Connection::Open(client) = &self.connection {
            return Ok(client.clone());
        }
        let stream = UnixStream::connect(&self.address)
            .await
            .map_err(|error| ForwardError::Unreachable(format!("connect to {}: {error}", self.address)))?;
        let client = EventsClient::new(Client::new(Socket::from(stream)));
        self.connection = Connection::Open(client.clone());
        Ok(client)
    }
}

impl Forwarder for TtrpcForwarder {
    async fn forward(&mut self, envelope: Envelope) -> Result<(), ForwardError> {
        let client = self.connect().await?;
        let request = ForwardRequest {
            envelope: MessageField::some(envelope),
            ..ForwardRequest::default()
        };
        let sent = client
            .forward(ttrpc::context::with_duration(FORWARD_LIMIT), &request)
            .await;
        match sent {
            Ok(_) => Ok(()),
            Err(error) => {
                self.connection = Connection::Closed;
                Err(classify(&error))
            }
        }
    }
}

/// Returns [`ForwardError::Refused`] if containerd has decided on the event. Not every status is such a decision: the
/// client library reports a timeout as a status, too.
fn classify(error: &ttrpc::Error) -> ForwardError {
    let text = error.to_string();
    match error {
        ttrpc::Error::RpcStatus(status)
            if !matches!(
                status.code(),
                Code::UNAVAILABLE | Code::DEADLINE_EXCEEDED | Code::CANCELLED | Code::RESOURCE_EXHAUSTED
            ) =>
        {
            ForwardError::Refused(text)
        }
        _ => ForwardError::Unreachable(text),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use containerd_shim::protos::{
        api::Empty,
        events::task::TaskStart,
        protobuf::Message,
        shim_async::{Events, create_events},
    };
    use tokio::sync::mpsc;

    use super::*;
    use crate::shim::events::EventQueue;

    /// An events service that records what it receives.
    struct RecordingService(mpsc::UnboundedSender<Envelope>);

    #[async_trait::async_trait]
    impl Events for RecordingService {
        async fn forward(
            &self,
            _: &ttrpc::asynchronous::TtrpcContext,
            request: ForwardRequest,
        ) -> ttrpc::Result<Empty> {
            self.0.send(request.envelope.unwrap()).unwrap();
            Ok(Empty::default())
        }
    }

    fn start_event(id: &str) -> TaskStart {
        TaskStart {
            container_id: id.to_owned(),
            ..TaskStart::default()
        }
    }

    #[test]
    fn only_a_decision_of_containerd_is_a_refusal() {
        for (code, refused) in [
            (Code::INVALID_ARGUMENT, true),
            (Code::UNIMPLEMENTED, true),
            (Code::UNKNOWN, true),
            (Code::UNAVAILABLE, false),
            (Code::DEADLINE_EXCEEDED, false),
        ] {
            let error = ttrpc::Error::RpcStatus(ttrpc::get_status(code, "text"));
            assert_eq!(
                matches!(classify(&error), ForwardError::Refused(_)),
                refused,
                "{code:?}"
            );
        }
        let gone = classify(&ttrpc::Error::Socket("gone".to_owned()));
        assert!(matches!(gone, ForwardError::Unreachable(_)), "{gone}");
    }

    #[tokio::test]
    async fn events_published_before_containerd_listens_or_while_it_restarts_are_delivered() {
        let folder = tempfile::tempdir().unwrap();
        let address = format!("unix://{}", folder.path().join("ttrpc").display());
        let (sender, mut received) = mpsc::unbounded_channel();
        let serve = || async {
            let _ = std::fs::remove_file(folder.path().join("ttrpc"));
            let mut server = ttrpc::asynchronous::Server::new()
                .bind(&address)
                .unwrap()
                .register_service(create_events(Arc::new(RecordingService(sender.clone()))));
            server.start().await.unwrap();
            server
        };
        let queue = EventQueue::start("k8s.io", TtrpcForwarder::new(&address));

        queue.publish("c1", start_event("before"));
        let mut server = serve().await;
        let envelope = received.recv().await.unwrap();
        assert_eq!(envelope.topic, "/tasks/start");
        assert_eq!(envelope.namespace, "k8s.io");
        assert_eq!(envelope.event.type_url, "containerd.events.TaskStart");

        server.shutdown().await.unwrap();
        drop(server);
        queue.publish("c1", start_event("between"));
        let _server = serve().await;
        let event = TaskStart::parse_from_bytes(&received.recv().await.unwrap().event.value).unwrap();
        assert_eq!(event.container_id, "between");
    }
}
