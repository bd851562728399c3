//! Events as protobuf messages.

use std::time::SystemTime;

use containerd_shim::protos::{protobuf::well_known_types::timestamp::Timestamp, topics};

/// Whether containerd's state stays correct without an event of this topic, so that it is not added to a long
/// queue.
pub(super) fn is_optional(topic: &str) -> bool {
    topic == topics::TASK_OOM_EVENT_TOPIC
}

/// Converts a time to protobuf's type.
pub(crate) fn to_timestamp(at: SystemTime) -> Timestamp {
    at.into()
}
