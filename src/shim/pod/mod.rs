//! The resources that the containers of a pod share on the host: a machine, a file server if directories are shared
//! with the guest, a control group, and the pod's network. A single container is handled as a pod with one container.
//!
//! Belongs here: the start and the end of these resources, and what containers attach to them. Does not belong here:
//! the state of containers and processes. [`super::tasks`] calls it.

mod admission;
mod cgroup;
mod disk_slots;
mod error;
mod file_server;
mod launcher;
mod oom_score;
mod pid_holder;
mod requirements;
mod root_disk;
pub(crate) mod system_calls;

use std::{
    future::Future,
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use nutshell_protocol::{Event, Rootfs, SetUpPod};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{OnceCell, watch};

use self::{
    admission::Admissions,
    cgroup::ControlGroup,
    disk_slots::DiskSlots,
    file_server::RunningFileServer,
    oom_score::OomScore,
    requirements::{DISK_READER_SIZE, FirstGuest},
};
pub(crate) use self::{
    admission::{Admission, Creation},
    cgroup::{is_left_behind, leave_behind},
    error::PodError,
    launcher::{HostLauncher, Launcher},
    pid_holder::{NetworkNamespace, PidHolder, open_network_namespace},
    requirements::PodRequirements,
    root_disk::DiskContents,
};
use crate::{
    control::monotonic_now,
    oci::{ContainerId, PodSize, Root, Share, Size},
    shim::{
        error::TaskError,
        machine::{BootDisk, BootError, BootRequest, Machine, VmmProcess},
        network::{Network, NetworkError},
    },
};

/// The disk slot of a container whose machine booted with its disk.
const BOOT_DISK_SLOT: u32 = 0;

/// Where the guest finds the files of a container.
#[derive(Debug)]
pub(crate) struct AttachedFiles {
    pub(crate) rootfs: Rootfs,
    /// For each share, its [`Share::path`] and its path in the file server's tree.
    pub(crate) share_paths: Vec<(String, String)>,
}

/// A running pod.
#[derive(Debug)]
pub(crate) struct Pod {
    number: u64,
    /// A virtual machine has several, one after the other: one for each boot.
    machine: Mutex<Arc<Machine>>,
    /// Whether the pod gets no other machine. Changed while `machine` is locked.
    closed: watch::Sender<bool>,
    /// `None` without shared directories, and after the end.
    file_server: Mutex<Option<RunningFileServer>>,
    cgroup: Option<ControlGroup>,
    /// `None` if the machine has no slots for hot-plugged disks.
    disk_slots: Option<DiskSlots>,
    /// `None` for a single container, which has no sandbox.
    set_up: Option<SetUp>,
    size: PodSize,
    current_size: Mutex<Size>,
    admissions: Admissions,
    /// Serializes changes of the size.
    resizing: tokio::sync::Mutex<()>,
    /// `None` before the first [`Self::connect_network`], and after the end.
    network: Mutex<Option<Arc<Network>>>,
    oom_score: OomScore,
    end: OnceCell<()>,
}

/// The settings that several containers share, and the result of applying them.
#[derive(Debug)]
struct SetUp {
    request: SetUpPod,
    result: OnceCell<Result<(), TaskError>>,
}

impl Pod {
    /// Starts a machine, which was requested at `requested_at`, and returns before it has booted. `on_event` gets the
    /// pod's number with each event of the agent, and must not block. Call it on the shim's main thread.
    pub(crate) async fn start(
        launcher: &dyn Launcher,
        requested_at: Duration,
        requirements: PodRequirements,
        mut on_event: impl FnMut(u64, Event) + Send + 'static,
    ) -> Result<Arc<Self>, PodError> {
        static NEXT_NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NEXT_NUMBER.fetch_add(1, Ordering::Relaxed);
        let guest = match requirements.first_guest {
            FirstGuest::Containers => Some(launcher.open_guest_resources().await?),
            FirstGuest::DiskReader => Some(launcher.open_disk_reader_resources()?),
            FirstGuest::User => None,
        };
        let vmm = launcher.spawn_vmm().map_err(BootError::Spawn)?;
        let cgroup = requirements.cgroup;
        let started = requirements
            .file_server
            .then(|| RunningFileServer::start(launcher, &vmm.child));
        let (file_server, socket) = match started.transpose() {
            Ok(started) => started.flatten().unzip(),
            Err(error) => {
                vmm.discard().await;
                return Err(error.into());
            }
        };
        if let Some(cgroup) = &cgroup {
            // Before the machine boots, so that all of its memory is counted. Outside of the group nothing would limit
            // it.
            let pids = [Some(vmm.child.pid()), file_server.as_ref().map(RunningFileServer::pid)];
            let added = cgroup.create().and_then(|()| {
                let mut pids = pids.into_iter().flatten();
                pids.try_for_each(|pid| cgroup.add_process(pid))
            });
            if let Err(error) = added {
                vmm.discard().await;
                release(file_server, Some(cgroup.clone())).await;
                return Err(error.into());
            }
        }
        let oom_score = OomScore::new(vmm.child.pid(), file_server.as_ref().map(RunningFileServer::pid));
        oom_score.set(requirements.oom_score_adj);
        let started = match guest {
            Some(guest) => {
                let boot = BootRequest {
                    guest,
                    size: requirements.size,
                    file_server: socket,
                    disks: requirements.disks,
                    hotplug_disks: requirements.hotplug_disks,
                };
                Machine::start(vmm, requested_at, boot, move |event| on_event(number, event)).await
            }
            None => Machine::prepare(vmm).await,
        };
        let machine = match started {
            Ok(machine) => Arc::new(machine),
            Err(error) => {
                release(file_server, cgroup).await;
                return Err(error.into());
            }
        };
        if let Some(server) = &file_server {
            server.kill_machine_at_exit(Arc::downgrade(&machine));
        }
        Ok(Arc::new(Self {
            number,
            machine: Mutex::new(machine),
            closed: watch::Sender::new(false),
            file_server: Mutex::new(file_server),
            cgroup,
            disk_slots: (requirements.hotplug_disks > 0).then(|| DiskSlots::new(requirements.hotplug_disks)),
            set_up: requirements.set_up_request.map(|request| SetUp {
                request,
                result: OnceCell::new(),
            }),
            size: requirements.size,
            current_size: Mutex::new(requirements.size.boot),
            admissions: Admissions::default(),
            resizing: tokio::sync::Mutex::default(),
            network: Mutex::default(),
            oom_score,
            end: OnceCell::new(),
        }))
    }

    /// Identifies the pod within this shim.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Permits a creation in this pod ([`Admissions::admit`]).
    pub(crate) fn admit(&self, creation: Creation) -> Result<Admission, Creation> {
        self.admissions.admit(creation)
    }

    /// The current machine.
    pub(crate) fn machine(&self) -> Arc<Machine> {
        self.machine.lock().clone()
    }

    /// Replaces the machine by one of `size` for a user's kernel, which is to be booted, and ends the old one. Call it
    /// on the shim's main thread.
    ///
    /// # Errors
    ///
    /// The process cannot be started, or the pod has ended. The pod keeps its machine.
    pub(crate) async fn prepare_user_machine(
        &self,
        launcher: &dyn Launcher,
        size: Size,
    ) -> Result<Arc<Machine>, PodError> {
        let vmm = self.spawn_vmm(launcher).await?;
        let machine = Arc::new(Machine::prepare(vmm).await?);
        self.install(machine, size).await
    }

    /// Replaces the machine by one that reads `disk`, and ends the old one. Call it on the shim's main thread.
    ///
    /// # Errors
    ///
    /// The errors of [`Self::prepare_user_machine`].
    pub(crate) async fn start_disk_reader(
        &self,
        launcher: &dyn Launcher,
        disk: BootDisk,
    ) -> Result<Arc<Machine>, PodError> {
        let guest = launcher.open_disk_reader_resources()?;
        let vmm = self.spawn_vmm(launcher).await?;
        let boot = BootRequest {
            guest,
            size: PodSize::fixed(DISK_READER_SIZE),
            file_server: None,
            disks: vec![disk],
            hotplug_disks: 0,
        };
        // No event of this guest concerns a container.
        let machine = Machine::start(vmm, monotonic_now(), boot, |_| {}).await?;
        self.install(Arc::new(machine), DISK_READER_SIZE).await
    }

    /// Starts a vmm process in the pod's control group.
    async fn spawn_vmm(&self, launcher: &dyn Launcher) -> Result<VmmProcess, PodError> {
        let vmm = launcher.spawn_vmm().map_err(BootError::Spawn)?;
        if let Err(error) = self.add_process(vmm.child.pid()) {
            vmm.discard().await;
            return Err(error);
        }
        self.oom_score.replace_vmm(vmm.child.pid());
        Ok(vmm)
    }

    /// Starts a file server for `machine`, which is to be booted, and shares directories through it. Ends the one
    /// before it. Returns the socket for the vmm. Call it on the shim's main thread.
    ///
    /// # Errors
    ///
    /// The process cannot be started, or a directory cannot be shared.
    pub(crate) async fn start_file_server(
        &self,
        launcher: &dyn Launcher,
        machine: &Arc<Machine>,
        id: &ContainerId,
        shares: Vec<Share>,
    ) -> Result<OwnedFd, PodError> {
        let old = self.file_server().take();
        if let Some(old) = old {
            release(Some(old), None).await;
        }
        let (server, socket) = RunningFileServer::start(launcher, machine.vmm())?.ok_or(PodError::NotShared)?;
        // `end` closes the pod before it takes the file server: it finds this one, or the pod is closed here.
        let is_recorded = {
            let mut current = self.file_server();
            let is_open = !self.is_closed();
            if is_open {
                *current = Some(server.clone());
            }
            is_open
        };
        if !is_recorded {
            release(Some(server), None).await;
            return Err(PodError::Ended);
        }
        self.add_process(server.pid())?;
        self.oom_score.replace_file_server(server.pid());
        server.kill_machine_at_failure(Arc::downgrade(machine));
        server.attach(id, move |server| server.attach_all(&shares)).await?;
        match self.is_closed() {
            true => Err(PodError::Ended),
            false => Ok(socket),
        }
    }

    /// Ends the file server of a virtual machine that has ended, which releases the directories that it shared.
    pub(crate) async fn end_file_server(&self) {
        let server = self.file_server().take();
        release(server, None).await;
    }

    /// Makes `machine` the pod's machine, and ends the one before it.
    async fn install(&self, machine: Arc<Machine>, size: Size) -> Result<Arc<Machine>, PodError> {
        let replaced = {
            let mut current = self.machine.lock();
            if self.is_closed() {
                None
            } else {
                *self.current_size.lock() = size;
                Some(std::mem::replace(&mut *current, machine.clone()))
            }
        };
        let (unused, outcome) = match replaced {
            Some(old) => (old, Ok(machine)),
            None => (machine, Err(PodError::Ended)),
        };
        unused.stop("it is not used any more");
        unused.ended().await;
        outcome
    }

    /// Ends the machine for good, because a client or the shim is done with the pod. Returns it.
    pub(crate) fn stop_machine(&self, reason: &str) -> Arc<Machine> {
        let machine = {
            let current = self.machine.lock();
            self.closed.send_replace(true);
            current.clone()
        };
        machine.stop(reason);
        machine
    }

    /// Whether its machine has an agent, and runs containers.
    pub(crate) fn has_agent(&self) -> bool {
        self.machine().has_agent()
    }

    /// Whether the pod gets no other machine.
    pub(crate) fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }

    /// Waits until the pod gets no other machine.
    pub(crate) async fn closed(&self) {
        let mut closed = self.closed.subscribe();
        // An error means that `self` is dropped, which cannot be.
        let _ = closed.wait_for(|closed| *closed).await;
    }

    /// The size at boot and the largest possible one.
    pub(crate) fn size(&self) -> PodSize {
        self.size
    }

    /// How much memory the pod's control group allows the machine and its processes, in bytes. `None` means unlimited.
    pub(crate) fn memory_limit(&self) -> Option<u64> {
        self.cgroup.as_ref().and_then(ControlGroup::memory_limit)
    }

    /// The current size of the machine.
    pub(crate) fn current_size(&self) -> Size {
        *self.current_size.lock()
    }

    /// Calls `change` with the current size and that of `wanted` unless they are equal, and records the new size if it
    /// succeeds. Concurrent calls run one after the other.
    pub(crate) async fn resize<F>(
        &self,
        wanted: impl FnOnce() -> Size,
        change: impl FnOnce(Size, Size) -> F,
    ) -> Result<(), TaskError>
    where
        F: Future<Output = Result<(), TaskError>>,
    {
        let _guard = self.resizing.lock().await;
        let (current, wanted) = (self.current_size(), wanted());
        if wanted != current {
            change(current, wanted).await?;
            *self.current_size.lock() = wanted;
        }
        Ok(())
    }

    /// Calls `send` with the settings that the pod's containers share, once: later calls return the first result. A
    /// single container has no such settings: this is a no-op.
    pub(crate) async fn set_up<F>(&self, send: impl FnOnce(SetUpPod) -> F) -> Result<(), TaskError>
    where
        F: Future<Output = Result<(), TaskError>>,
    {
        match &self.set_up {
            None => Ok(()),
            Some(SetUp { request, result }) => result.get_or_init(|| send(request.clone())).await.clone(),
        }
    }

    /// Takes the `oom_score_adj` of one of the pod's containers into account: the machine's processes get the lowest of
    /// all, so that the host's out-of-memory killer spares them like the best protected container.
    pub(crate) fn protect_from_oom(&self, oom_score_adj: i32) {
        self.oom_score.lower_to(oom_score_adj);
    }

    /// On the host. `None` if the pod shares no files, or has ended.
    pub(crate) fn file_server_pid(&self) -> Option<u32> {
        self.file_server().as_ref().map(RunningFileServer::pid)
    }

    /// Moves a process of the host into the pod's control group.
    pub(crate) fn add_process(&self, pid: u32) -> Result<(), PodError> {
        match &self.cgroup {
            Some(cgroup) => Ok(cgroup.add_process(pid)?),
            None => Ok(()),
        }
    }

    /// Makes the files of the container `id` available to the guest: its root file system and its shared directories.
    /// `boot_disk` has the contents of the root's disk if the machine boots with that disk. Returns where the guest
    /// finds the files. After a failure call [`Self::detach`].
    pub(crate) async fn attach(
        &self,
        id: &ContainerId,
        bundle: &Path,
        root: Root,
        boot_disk: Option<DiskContents>,
        shares: Vec<Share>,
    ) -> Result<AttachedFiles, PodError> {
        let path = format!("{id}/rootfs");
        let (rootfs, shared_root) = match root {
            Root::Share { files, read_only } => (Rootfs::Share { path: path.clone() }, Some((files, read_only))),
            Root::Disk(root) => {
                let (slot, contents) = match (boot_disk, &self.disk_slots) {
                    (Some(contents), _) => (BOOT_DISK_SLOT, contents),
                    (None, Some(slots)) => slots.plug(&self.machine(), id, root).await?,
                    (None, None) => return Err(PodError::NoSlot { max: 0 }),
                };
                (contents.into_rootfs(slot), None)
            }
        };
        if shared_root.is_none() && shares.is_empty() {
            return Ok(AttachedFiles {
                rootfs,
                share_paths: vec![],
            });
        }
        let file_server = self.file_server().clone().ok_or(PodError::NotShared)?;
        let bundle_rootfs = bundle.join("rootfs");
        let attach = file_server.attach(id, move |server| {
            if let Some((files, read_only)) = shared_root {
                server.attach_rootfs(&files, &bundle_rootfs, &path, read_only)?;
            }
            let attach = |share: Share| Ok((share.path.clone(), server.attach_in_pod(&share)?));
            shares.into_iter().map(attach).collect()
        });
        let share_paths = attach.await?;
        Ok(AttachedFiles { rootfs, share_paths })
    }

    /// Undoes [`Self::attach`] for a container that the guest has deleted.
    pub(crate) async fn detach(&self, id: &ContainerId) {
        if let Some(slots) = &self.disk_slots {
            slots.unplug(&self.machine(), id).await;
        }
        let Some(file_server) = self.file_server().clone() else {
            return;
        };
        if let Err(error) = file_server.detach(id).await {
            log::warn!("cannot detach the files of container {id}: {error}");
        }
    }

    /// Connects the guest to the network namespace of the process `pid`; later changes in the namespace are passed on
    /// to the guest. With `forwarding`, connections to the namespace's loopback interface go to the guest too. May be
    /// called again after a failure, for the same namespace.
    pub(crate) async fn connect_network(&self, pid: u32, forwarding: bool) -> Result<(), PodError> {
        let path = format!("/proc/{pid}/ns/net");
        let namespace = open_network_namespace(Path::new(&path)).map_err(NetworkError::namespace("open"))?;
        let network = {
            let mut network = self.network.lock();
            let new = || Arc::new(Network::new(namespace, self.size.boot.vcpus.into()));
            network.get_or_insert_with(new).clone()
        };
        Ok(network.connect(&self.machine(), forwarding).await?)
    }

    /// Removes what [`Self::connect_network`] made in the network namespace, and releases the namespace.
    pub(crate) async fn disconnect_network(&self) {
        let network = self.network.lock().take();
        if let Some(network) = network {
            network.disconnect().await;
        }
    }

    /// Ends the machine and releases all resources of the pod. Call it after the end of all processes of
    /// [`Self::add_process`]: those left in the control group are killed.
    pub(crate) async fn end(&self) {
        self.end
            .get_or_init(|| async {
                self.machine().log_console().await;
                // Kill both before waiting: the kernel needs a while for each.
                let machine = self.stop_machine("the shim ended it");
                let file_server = self.file_server().take();
                if let Some(server) = &file_server {
                    server.kill();
                }
                // Kill forks of a compromised process too: while one holds a pipe or socket open, its readers see no
                // end of file.
                if let Some(cgroup) = &self.cgroup {
                    cgroup.kill();
                }
                machine.ended().await;
                let network = self.disconnect_network();
                let ((), ()) = tokio::join!(release(file_server, self.cgroup.clone()), network);
            })
            .await;
    }

    fn file_server(&self) -> MutexGuard<'_, Option<RunningFileServer>> {
        self.file_server.lock()
    }
}

/// Ends the file server and removes the control group. If a file system of the host keeps the file server from ending,
/// both are freed when it answers, provided that this shim still runs.
async fn release(file_server: Option<RunningFileServer>, cgroup: Option<ControlGroup>) {
    let hung = match file_server {
        Some(server) => server.end().await,
        None => None,
    };
    let hung_group = cgroup.as_ref().map(|cgroup| cgroup.path().to_owned());
    let remove_cgroup = async {
        if let Some(cgroup) = cgroup {
            cgroup.remove().await;
        }
    };
    match hung {
        None => remove_cgroup.await,
        Some(server) => {
            // containerd's `delete` does not wait for the process then, and a later shim removes the group if this one
            // has ended before the process does.
            if let Some(path) = &hung_group {
                leave_behind(path);
            }
            drop(tokio::spawn(async move {
                server.reap().await;
                remove_cgroup.await;
            }));
        }
    }
}
