//! The table of all ttrpc services of a shim.

use std::{collections::HashMap, sync::Arc};

use containerd_shim::protos::ttrpc::asynchronous::Service;

use super::{admin_service, connection::LastReply, sandbox_service, task_service};
use crate::shim::{stdio, tasks::Tasks};

/// Services of containerd's API that a shim may have and this one does not. Clients find out by a call, and expect
/// `UNIMPLEMENTED`, as Go's ttrpc server answers. The server of the crate `ttrpc` answers so only for a service that it
/// knows.
const ABSENT_SERVICES: [&str; 2] = [
    "containerd.services.transfer.v1.Transfer",
    "containerd.services.events.ttrpc.v1.Events",
];

/// All services by name. `last_reply` is the tracker that the connections use, too.
pub(crate) fn services(tasks: &Arc<Tasks>, last_reply: &LastReply) -> HashMap<String, Service> {
    let mut services = task_service::services(tasks, last_reply);
    services.extend(sandbox_service::services(tasks, last_reply));
    services.extend(admin_service::services(tasks));
    for name in ABSENT_SERVICES {
        let absent = Service {
            methods: HashMap::new(),
            streams: HashMap::new(),
        };
        services.insert(name.to_owned(), absent);
    }
    services.insert(stdio::STREAMING_SERVICE.to_owned(), tasks.streaming().ttrpc_service());
    services
}
