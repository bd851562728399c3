//! One queue of events, delivered in order.
//!
//! Publishing never blocks. One tokio task retries the oldest event until containerd has accepted it, then continues
//! with the next. While containerd cannot be reached, events stay in the queue and keep their order. The queue is
//! bounded: when it is full, the oldest event is dropped. An event that containerd refuses [`MAX_REFUSALS`] times is
//! dropped too, so that it does not block those after it.

use std::{
    collections::VecDeque,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use containerd_shim::{
    event::Event,
    protos::{protobuf::MessageField, shim::event::Envelope, topics},
    util::convert_to_any,
};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use super::forwarder::{ForwardError, Forwarder};

/// Maximum number of events in the queue. Beyond it the oldest is dropped.
const CAPACITY: usize = 2048;

/// Length of the queue at which optional events ([`is_optional`]) are no longer added.
const OPTIONAL_CAPACITY: usize = 256;

/// Delay before the first retry of an event. It doubles with each retry.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(20);

/// Maximum delay between two retries.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(2);

/// How often containerd may refuse an event before it is dropped. More than once, because a containerd that is starting
/// refuses events of services that it has not registered yet.
const MAX_REFUSALS: u32 = 8;

/// A handle to the queue. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct EventQueue {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    namespace: String,
    pending: Mutex<Pending>,
    /// Signalled when an event was added.
    added: Notify,
    /// Signalled when the queue has become empty.
    emptied: Notify,
}

/// Events that containerd does not have yet.
#[derive(Debug, Default)]
struct Pending {
    events: VecDeque<PendingEvent>,
    /// Number of events that were removed from the front so far.
    removed: u64,
}

#[derive(Debug, Clone)]
struct PendingEvent {
    envelope: Envelope,
    /// The id of the container, for messages.
    container: String,
}

impl fmt::Display for PendingEvent {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "an event with topic {} of container {}",
            self.envelope.topic, self.container
        )
    }
}

impl Pending {
    fn pop(&mut self) -> Option<PendingEvent> {
        self.removed += 1;
        self.events.pop_front()
    }
}

impl EventQueue {
    /// Creates a queue for events of containerd's namespace `namespace`, and spawns the task that delivers
    /// them.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub(crate) fn start(namespace: &str, forwarder: impl Forwarder) -> Self {
        let shared = Arc::new(Shared {
            namespace: namespace.to_owned(),
            pending: Mutex::default(),
            added: Notify::new(),
            emptied: Notify::new(),
        });
        tokio::spawn(deliver(shared.clone(), forwarder));
        Self { shared }
    }

    /// Appends an event of a container.
    pub(crate) fn publish(&self, container: &str, event: impl Event) {
        let topic = event.topic();
        let event = match convert_to_any(Box::new(event)) {
            Ok(event) => event,
            Err(error) => {
                return log::error!(
                    "containerd does not learn about an event with topic {topic} of container {container}, because it \
                     cannot be encoded: {error}"
                );
            }
        };
        let envelope = Envelope {
            timestamp: MessageField::some(SystemTime::now().into()),
            namespace: self.shared.namespace.clone(),
            topic,
            event: MessageField::some(event),
            ..Envelope::default()
        };
        {
            let mut pending = self.shared.pending();
            if is_optional(&envelope.topic) && pending.events.len() >= OPTIONAL_CAPACITY {
                return;
            }
            if pending.events.len() >= CAPACITY
                && let Some(oldest) = pending.pop()
            {
                log::warn!(
                    "containerd accepts no events and the queue is full: dropped {oldest}, so containerd does not learn \
                     about it"
                );
            }
            pending.events.push_back(PendingEvent {
                envelope,
                container: container.to_owned(),
            });
        }
        self.shared.added.notify_one();
    }

    /// Waits until containerd has every event, for at most `limit`.
    pub(crate) async fn flush(&self, limit: Duration) {
        let empty = async {
            loop {
                let emptied = self.shared.emptied.notified();
                if self.shared.pending().events.is_empty() {
                    return;
                }
                emptied.await;
            }
        };
        if tokio::time::timeout(limit, empty).await.is_err() {
            log::warn!(
                "containerd did not accept the last events within {} s",
                limit.as_secs_f64()
            );
        }
    }
}

impl Shared {
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock()
    }
}

/// Whether containerd's state stays correct without events of this topic. They are not added to a long queue.
fn is_optional(topic: &str) -> bool {
    topic == topics::TASK_OOM_EVENT_TOPIC
}

/// Delivers events one by one, each until it succeeds.
async fn deliver(shared: Arc<Shared>, mut forwarder: impl Forwarder) {
    loop {
        let (next, removed) = {
            let pending = shared.pending();
            (pending.events.front().cloned(), pending.removed)
        };
        let Some(event) = next else {
            shared.emptied.notify_waiters();
            shared.added.notified().await;
            continue;
        };
        let (mut delay, mut refusals) = (MIN_RETRY_DELAY, 0);
        while let Err(error) = forwarder.forward(event.envelope.clone()).await {
            if matches!(error, ForwardError::Refused(_)) {
                refusals += 1;
                if refusals == MAX_REFUSALS {
                    log::error!("dropped {event}, so containerd does not learn about it: {error}");
                    break;
                }
            }
            if delay == MIN_RETRY_DELAY {
                log::warn!("cannot forward {event} to containerd, trying again: {error}");
            }
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(MAX_RETRY_DELAY);
        }
        let mut pending = shared.pending();
        // A full queue may have dropped this event in the meantime. The front is then another event.
        if pending.removed == removed {
            pending.pop();
        }
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim::protos::{
        events::task::{TaskExit, TaskOOM, TaskStart},
        protobuf::Message,
    };
    use tokio::sync::mpsc;

    use super::*;

    /// Reports every attempt, and answers it with the next result that the test provides.
    struct ScriptedForwarder {
        results: mpsc::UnboundedReceiver<Result<(), ForwardError>>,
        attempts: mpsc::UnboundedSender<String>,
    }

    impl Forwarder for ScriptedForwarder {
        async fn forward(&mut self, envelope: Envelope) -> Result<(), ForwardError> {
            let event = TaskStart::parse_from_bytes(&envelope.event.value).unwrap();
            self.attempts.send(event.container_id).unwrap();
            match self.results.recv().await {
                Some(result) => result,
                None => std::future::pending().await,
            }
        }
    }

    type Results = mpsc::UnboundedSender<Result<(), ForwardError>>;

    fn queue() -> (EventQueue, Results, mpsc::UnboundedReceiver<String>) {
        let (result, results) = mpsc::unbounded_channel();
        let (attempts, attempted) = mpsc::unbounded_channel();
        let queue = EventQueue::start("default", ScriptedForwarder { results, attempts });
        (queue, result, attempted)
    }

    fn start_event(id: &str) -> TaskStart {
        TaskStart {
            container_id: id.to_owned(),
            ..TaskStart::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn failed_event_is_retried_before_the_next_one() {
        let (queue, results, mut attempted) = queue();
        for id in ["a", "b", "c"] {
            queue.publish(id, start_event(id));
        }
        let away = || Err(ForwardError::Unreachable("away".to_owned()));
        for result in [Ok(()), away(), away(), Ok(()), Ok(())] {
            results.send(result).unwrap();
        }

        let mut order = Vec::new();
        for _ in 0..5 {
            order.push(attempted.recv().await.unwrap());
        }

        assert_eq!(order, ["a", "b", "b", "b", "c"]);
        queue.flush(Duration::from_secs(1)).await;
        assert!(queue.shared.pending().events.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn refused_event_does_not_block_the_next_one() {
        let (queue, results, mut attempted) = queue();
        queue.publish("c1", start_event("refused"));
        queue.publish("c1", start_event("next"));
        for _ in 0..MAX_REFUSALS {
            results.send(Err(ForwardError::Refused("invalid".to_owned()))).unwrap();
        }
        results.send(Ok(())).unwrap();

        for _ in 0..MAX_REFUSALS {
            assert_eq!(attempted.recv().await.unwrap(), "refused");
        }
        assert_eq!(attempted.recv().await.unwrap(), "next");
        queue.flush(Duration::from_secs(1)).await;
        assert!(queue.shared.pending().events.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn full_queue_drops_the_oldest_event() {
        let (queue, results, mut attempted) = queue();
        for number in 0..CAPACITY + 10 {
            queue.publish("c1", start_event(&number.to_string()));
        }
        assert_eq!(queue.shared.pending().events.len(), CAPACITY);
        results.send(Ok(())).unwrap();
        assert_eq!(attempted.recv().await.unwrap(), "10");
    }

    #[tokio::test(start_paused = true)]
    async fn event_dropped_during_its_delivery_removes_no_other_event() {
        let (queue, results, mut attempted) = queue();
        queue.publish("c1", start_event("first"));
        assert_eq!(attempted.recv().await.unwrap(), "first");
        for number in 0..CAPACITY {
            queue.publish("c1", start_event(&number.to_string()));
        }
        results.send(Ok(())).unwrap();
        assert_eq!(attempted.recv().await.unwrap(), "0");
    }

    #[tokio::test(start_paused = true)]
    async fn flood_of_optional_events_leaves_room_for_exits() {
        let (queue, _results, _attempted) = queue();
        for _ in 0..CAPACITY * 2 {
            queue.publish("c1", TaskOOM::default());
        }
        assert_eq!(queue.shared.pending().events.len(), OPTIONAL_CAPACITY);
        queue.publish("c1", TaskExit::default());
        assert_eq!(queue.shared.pending().events.len(), OPTIONAL_CAPACITY + 1);
    }

    #[tokio::test(start_paused = true)]
    async fn flush_gives_up_at_its_limit() {
        let (queue, _results, _attempted) = queue();
        queue.publish("c1", start_event("a"));
        queue.flush(Duration::from_secs(2)).await;
        assert_eq!(queue.shared.pending().events.len(), 1);
    }
}
