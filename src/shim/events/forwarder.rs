//! The interface between the event queue and containerd.

use std::{future::Future, time::Duration};

use containerd_shim::protos::shim::event::Envelope;

/// Limit for the delivery of one event. containerd answers at once unless it hangs.
pub(super) const FORWARD_LIMIT: Duration = Duration::from_secs(5);

/// A way to deliver events to containerd.
pub(crate) trait Forwarder: Send + 'static {
    /// Delivers one event. After an error, the queue sends it again: containerd may or may not have received it.
    fn forward(&mut self, envelope: Envelope) -> impl Future<Output = Result<(), String>> + Send;
}

/// Drops every event: containerd passed neither a ttrpc address nor a publish binary.
#[derive(Debug)]
pub(crate) struct NoForwarder;

impl Forwarder for NoForwarder {
    async fn forward(&mut self, envelope: Envelope) -> Result<(), String> {
        log::warn!(
            "containerd passed neither TTRPC_ADDRESS nor -publish-binary: dropped an event with topic {}",
            envelope.topic
        );
        Ok(())
    }
}
