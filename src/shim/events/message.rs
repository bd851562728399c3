//! Events as protobuf messages.

use std::time::SystemTime;

use containerd_shim_protos::{
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
    },
    protobuf::{
        MessageFull,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    topics,
};

/// A message that is an event.
pub(crate) trait TaskEvent: MessageFull {
    /// The topic under which it is published.
    const TOPIC: &'static str;
    /// containerd's state stays correct without it, so it is not added to a long queue.
    const OPTIONAL: bool = false;
}

macro_rules! topics {
    ($($event:ty => $topic:ident $(, optional = $optional:literal)?;)*) => {
        $(impl TaskEvent for $event {
            const TOPIC: &'static str = topics::$topic;
            $(const OPTIONAL: bool = $optional;)?
        })*
    };
}

topics! {
    TaskCreate => TASK_CREATE_EVENT_TOPIC;
    TaskStart => TASK_START_EVENT_TOPIC;
    TaskOOM => TASK_OOM_EVENT_TOPIC, optional = true;
    TaskExit => TASK_EXIT_EVENT_TOPIC;
    TaskDelete => TASK_DELETE_EVENT_TOPIC;
    TaskExecAdded => TASK_EXEC_ADDED_EVENT_TOPIC;
    TaskExecStarted => TASK_EXEC_STARTED_EVENT_TOPIC;
    TaskPaused => TASK_PAUSED_EVENT_TOPIC;
    TaskResumed => TASK_RESUMED_EVENT_TOPIC;
}

/// Wraps the encoded message `value` of type `M`. Unlike protobuf's own `Any`, containerd's type URLs are
/// full type names without a prefix (github.com/containerd/typeurl).
pub(crate) fn pack_any<M: MessageFull>(value: Vec<u8>) -> Any {
    Any {
        type_url: M::descriptor().full_name().to_owned(),
        value,
        ..Any::default()
    }
}

/// Converts a time to protobuf's type.
pub(crate) fn to_timestamp(at: SystemTime) -> Timestamp {
    at.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn type_urls_have_no_prefix() {
        assert_eq!(pack_any::<TaskExit>(Vec::new()).type_url, "containerd.events.TaskExit");
    }
}
