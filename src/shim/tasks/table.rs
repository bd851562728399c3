//! All containers of this shim.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;

use super::container::{Container, lifecycle::Phase, process::Process};
use crate::{
    oci::ContainerId,
    shim::{
        configuration::Configuration,
        error::{ErrorCode, TaskError},
        events::EventQueue,
        pod::Launcher,
        stdio::{StdioContext, StreamRegistry},
    },
};

/// All containers of this shim, and the resources that calls use.
#[derive(Debug)]
pub(crate) struct Tasks {
    pub(super) configuration: Configuration,
    pub(super) launcher: Box<dyn Launcher>,
    pub(super) events: EventQueue,
    pub(super) stdio: StdioContext,
    table: Mutex<Table>,
    stopping: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Table {
    containers: HashMap<ContainerId, Arc<Container>>,
    /// The ids of `containers`, and of containers that are being created.
    reserved: HashSet<ContainerId>,
}

impl Tasks {
    /// Creates an empty table.
    pub(crate) fn new(
        configuration: Configuration,
        launcher: impl Launcher,
        events: EventQueue,
        stdio: StdioContext,
    ) -> Arc<Self> {
        Arc::new(Self {
            configuration,
            launcher: Box::new(launcher),
            events,
            stdio,
            table: Mutex::default(),
            stopping: watch::Sender::new(false),
        })
    }

    /// The streams that clients open at the shim's own socket.
    pub(crate) fn streaming(&self) -> &StreamRegistry {
        &self.stdio.streaming
    }

    /// Finds a task, from the response to Create until the end of Delete.
    ///
    /// # Errors
    ///
    /// `NOT_FOUND`, also for a sandbox that is no task.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        self.created_container(id)
            .filter(|container| container.is_task())
            .ok_or_else(|| TaskError::new(ErrorCode::NotFound, format!("task {id} not found")))
    }

    /// Like [`Self::container`], but includes sandboxes that are no tasks.
    pub(super) fn created_container(&self, id: &str) -> Option<Arc<Container>> {
        let id = id.parse::<ContainerId>().ok()?;
        let container = self.table().containers.get(&id).cloned();
        container.filter(|container| container.init.lifecycle.phase() != Phase::Creating)
    }

    /// Finds the process `exec` of container `id`, its first process if `exec` is empty.
    ///
    /// # Errors
    ///
    /// `NOT_FOUND`.
    pub(crate) fn process(&self, id: &str, exec: &str) -> Result<(Arc<Container>, Arc<Process>), TaskError> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        Ok((container, process))
    }

    /// Finds the container `id` if it belongs to `pod`, also while it is being created. The check keeps an agent from
    /// affecting containers of other pods.
    pub(super) fn container_in_pod(&self, pod: u64, id: &str) -> Option<Arc<Container>> {
        let id = id.parse().ok()?;
        let container = self.table().containers.get(&id).cloned()?;
        (container.pod.number() == pod).then_some(container)
    }

    /// All containers and sandboxes, also those that are being created.
    pub(super) fn all(&self) -> Vec<Arc<Container>> {
        self.table().containers.values().cloned().collect()
    }

    /// All containers of a pod and its sandbox.
    pub(super) fn tasks_of_pod(&self, pod: u64) -> Vec<Arc<Container>> {
        let table = self.table();
        let tasks = table
            .containers
            .values()
            .filter(|container| container.pod.number() == pod);
        tasks.cloned().collect()
    }

    /// Reserves an id for a container that is about to be created.
    ///
    /// # Errors
    ///
    /// `ALREADY_EXISTS`, or `UNAVAILABLE` if the shim is shutting down.
    pub(super) fn reserve<'a>(self: &'a Arc<Self>, id: &'a ContainerId) -> Result<Reservation<'a>, TaskError> {
        if *self.stopping.borrow() {
            return Err(TaskError::new(ErrorCode::Unavailable, "the shim is shutting down"));
        }
        if !self.table().reserved.insert(id.clone()) {
            let text = format!("task {id} already exists");
            return Err(TaskError::new(ErrorCode::AlreadyExists, text));
        }
        Ok(Reservation {
            tasks: self,
            id,
            kept: false,
        })
    }

    /// Adds a container whose id is reserved. Events of the agent find it from now on.
    pub(super) fn insert(&self, container: Container) -> Arc<Container> {
        let container = Arc::new(container);
        self.table().containers.insert(container.id.clone(), container.clone());
        container
    }

    /// Removes a container and frees its id.
    pub(super) fn remove(&self, id: &ContainerId) -> Option<Arc<Container>> {
        let mut table = self.table();
        table.reserved.remove(id);
        table.containers.remove(id)
    }

    /// Whether no container or sandbox exists or is being created.
    pub(super) fn is_empty(&self) -> bool {
        self.table().reserved.is_empty()
    }

    /// Requests the shutdown of the shim if [`Self::is_empty`], or anyway if `now`.
    pub(crate) fn shut_down(&self, now: bool) {
        if now || self.is_empty() {
            self.stopping.send_replace(true);
        }
    }

    #[cfg(test)]
    pub(crate) fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Waits until the shutdown of the shim is requested.
    pub(crate) async fn stopped(&self) {
        let mut stopping = self.stopping.subscribe();
        if stopping.wait_for(|stopping| *stopping).await.is_err() {
            // The sender is a field of `self`, which is borrowed.
            std::future::pending::<()>().await;
        }
    }

    /// Ends all pods, and waits until the exits of their containers are recorded.
    pub(crate) async fn end_all(&self) {
        let containers: Vec<_> = self.table().containers.values().cloned().collect();
        for container in &containers {
            container.pod.end().await;
        }
        for container in &containers {
            container.init.lifecycle.wait_exit().await;
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock()
    }
}

/// An id that no other container can take. Dropping it frees the id and discards its container, unless
/// [`Self::keep`] was called.
pub(super) struct Reservation<'a> {
    tasks: &'a Arc<Tasks>,
    id: &'a ContainerId,
    kept: bool,
}

impl Reservation<'_> {
    /// Leaves the id to the container, which now exists.
    pub(super) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if !self.kept
            && let Some(container) = self.tasks.remove(self.id)
        {
            container.init.lifecycle.abandon();
            container.init.release_pid();
            self.tasks.resize_without(&container);
        }
    }
}
