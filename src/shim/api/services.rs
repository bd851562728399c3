//! The table of all ttrpc services of a shim.

use std::{collections::HashMap, sync::Arc};

use containerd_shim::protos::ttrpc::asynchronous::Service;

use super::{connection::LastReply, sandbox_service, task_service};
use crate::shim::{stdio, tasks::Tasks};

/// All services by name. `last_reply` is the one that the connections track.
pub(crate) fn services(tasks: &Arc<Tasks>, last_reply: &LastReply) -> HashMap<String, Service> {
    let mut services = task_service::services(tasks, last_reply);
    services.extend(sandbox_service::services(tasks, last_reply));
    services.insert(stdio::STREAMING_SERVICE.to_owned(), tasks.streaming().ttrpc_service());
    services
}
