//! The interface between the event queue and containerd.

use std::{future::Future, time::Duration};

use containerd_shim::protos::shim::event::Envelope;

/// Limit for the delivery of one event. containerd answers at once unless it hangs.
pub(super) const FORWARD_LIMIT: Duration = Duration::from_secs(5);

/// Why an event was not delivered. containerd may have received it all the same.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ForwardError {
    /// containerd does not run, or does not answer.
    #[error("containerd cannot be reached: {0}")]
    Unreachable(String),
    /// containerd answers and refuses the event.
    #[error("containerd refuses it: {0}")]
    Refused(String),
}

/// A way to deliver events to containerd.
pub(crate) trait Forwarder: Send + 'static {
    /// Delivers one event. After an error, the queue sends it again.
    fn forward(&mut self, envelope: Envelope) -> impl Future<Output = Result<(), ForwardError>> + Send;
}

/// Drops every event: containerd passed neither a ttrpc address nor a publish binary.
#[derive(Debug)]
pub(crate) struct NoForwarder;

impl Forwarder for NoForwarder {
    async fn forward(&mut self, envelope: Envelope) -> Result<(), ForwardError> {
        log::warn!(
            "containerd passed neither TTRPC_ADDRESS nor -publish-binary: dropped an event with topic {}, so containerd \
             does not learn about it",
            envelope.topic
        );
        Ok(())
    }
}
