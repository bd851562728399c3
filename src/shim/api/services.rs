//! The table of all ttrpc services of a shim.

use std::{collections::HashMap, sync::Arc};

use containerd_shim::protos::ttrpc::asynchronous::Service;

use super::{connection::Written, sandbox_service, task_service};
use crate::shim::{stdio, tasks::Tasks};

/// All services, by name. `written` is that of the connections.
pub(crate) fn services(tasks: &Arc<Tasks>, written: &Written) -> HashMap<String, Service> {
    let mut services = task_service::services(tasks, written);
    services.extend(sandbox_service::services(tasks, written));
    services.insert(stdio::STREAMING_SERVICE.to_owned(), tasks.streaming().ttrpc_service());
    services
}
