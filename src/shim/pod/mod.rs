//! What the containers of a pod share on the host: a machine, a file server where directories are
//! shared with it, and a control group. A container that stands alone is a pod of one.

mod cgroup;
mod pid_holder;

use std::{
    collections::HashMap,
    fmt::Debug,
    future::Future,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};

use nutshell_protocol::{Event, Request, Rootfs, SetUpPod};
use tokio::sync::OnceCell;

use self::cgroup::ControlGroup;
pub(crate) use self::pid_holder::{NetworkNamespace, PidHolder, open_network_namespace};
use crate::shim::{
    child::{Child, WaitStatus},
    configuration::Configuration,
    error::TaskError,
    machine::{
        BootError, BootRequest, DiskFile, FINAL_NOTICE_TIMEOUT, GuestResources, Machine, VmmError, VmmProcess,
        open_disk, open_kvm,
    },
    network::{Network, NetworkError},
    share::{FileServer, ShareError},
};
use crate::{
    guest_image,
    oci::{ContainerId, Plan, PodPlan, PodSize, Root, Share, Size},
};

/// How many disks the members of a pod can have at a time.
const MEMBER_DISKS: u32 = 8;

/// How long guest and vmm may take to let go of a disk that nothing uses.
const RELEASE_LIMIT: Duration = Duration::from_secs(10);

/// Where machines come from; the tests have another.
pub(crate) trait Launcher: Debug + Send + Sync + 'static {
    /// KVM and the guest's files.
    fn open_guest_resources(&self) -> Result<GuestResources, BootError>;
    /// A vmm process that waits for its first command. Called on the shim's main thread.
    fn spawn_vmm(&self) -> io::Result<VmmProcess>;
    /// A file server, and the socket by which the vmm reaches it. Called on the shim's main thread.
    fn spawn_file_server(&self) -> Result<Option<(FileServer, OwnedFd)>, ShareError>;
}

/// This host.
#[derive(Debug)]
pub(crate) struct HostLauncher {
    configuration: Configuration,
    /// Started before anybody asked: the first machine need not wait for it.
    early: Mutex<Option<VmmProcess>>,
}

impl HostLauncher {
    /// Starts a first vmm process already. To be called on the shim's main thread; needs the runtime.
    pub(crate) fn new(configuration: Configuration) -> Self {
        let early = VmmProcess::spawn()
            .inspect_err(|error| log::warn!("start the process of a virtual machine early: {error}"))
            .ok();
        Self {
            configuration,
            early: Mutex::new(early),
        }
    }
}

impl Launcher for HostLauncher {
    fn open_guest_resources(&self) -> Result<GuestResources, BootError> {
        Ok(GuestResources {
            kvm: open_kvm()?,
            image: guest_image::open(
                self.configuration.kernel.as_deref(),
                self.configuration.initramfs.as_deref(),
            )?,
            kernel_arguments: self.configuration.kernel_arguments.clone(),
        })
    }

    fn spawn_vmm(&self) -> io::Result<VmmProcess> {
        match self.early.lock().take() {
            Some(vmm) => Ok(vmm),
            None => VmmProcess::spawn(),
        }
    }

    fn spawn_file_server(&self) -> Result<Option<(FileServer, OwnedFd)>, ShareError> {
        FileServer::spawn().map(Some)
    }
}

/// Why a pod cannot be started, or cannot take a container.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PodError {
    /// No machine.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The vmm cannot plug a disk.
    #[error("give a disk to the virtual machine: {0}")]
    Disk(#[from] VmmError),
    /// Every slot for a disk is taken.
    #[error("the pod's virtual machine has no slot left for another disk: at most {MEMBER_DISKS} at a time")]
    NoSlot,
    /// No shared directory.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// No network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The machine has no file server.
    #[error("the virtual machine shares no directories with its host")]
    NotShared,
    /// The shim itself failed.
    #[error("the shim failed: {0}")]
    Shim(String),
}

/// What a machine is made for.
#[derive(Debug)]
pub(crate) struct PodRequirements {
    size: PodSize,
    share: bool,
    disks: Vec<DiskFile>,
    /// Disk slots that are empty at first.
    free: u32,
    group: Option<ControlGroup>,
    shared: Option<SetUpPod>,
}

impl PodRequirements {
    /// What a container alone requirements.
    pub(crate) fn for_container(plan: &Plan) -> Result<Self, BootError> {
        let (share, disks) = match &plan.root {
            Root::Share { .. } => (true, Vec::new()),
            Root::Disk { source, read_only, .. } => {
                let file = open_disk(source, *read_only)?;
                let disk = DiskFile {
                    file,
                    read_only: *read_only,
                };
                (!plan.shares.is_empty(), vec![disk])
            }
        };
        Ok(Self {
            size: PodSize::fixed(plan.size),
            share,
            disks,
            free: 0,
            group: plan.cgroups_path.as_deref().and_then(ControlGroup::at),
            shared: None,
        })
    }

    /// What a pod requirements, with room for any members, which share what `shared` says.
    pub(crate) fn for_pod(plan: &PodPlan, shared: SetUpPod) -> Self {
        let group = plan.cgroups_path.as_deref().and_then(ControlGroup::at);
        let limit = group.as_ref().and_then(ControlGroup::memory_limit);
        let size = plan.size.bound_boot_memory(limit);
        if size != plan.size {
            log::warn!(
                "the pod's control group may hold {} MiB: its virtual machine gets {} MiB, and not {}: \
                 give its RuntimeClass more overhead",
                limit.unwrap_or_default() >> 20,
                size.boot.memory >> 20,
                plan.size.boot.memory >> 20
            );
        }
        Self {
            size,
            share: true,
            disks: Vec::new(),
            free: MEMBER_DISKS,
            group,
            shared: Some(shared),
        }
    }
}

impl PodRequirements {
    /// The control groups that will be made.
    pub(crate) fn groups(&self) -> Vec<PathBuf> {
        self.group.iter().map(|group| group.folder().to_owned()).collect()
    }
}

/// A pod.
#[derive(Debug)]
pub(crate) struct Pod {
    number: u64,
    machine: Arc<Machine>,
    files: Mutex<Option<Files>>,
    group: Option<ControlGroup>,
    /// Of a machine that takes disks while it runs.
    disk_slots: Option<Mutex<DiskSlots>>,
    /// What its containers share, if there may be several, and whether the guest has it.
    shared: Option<(SetUpPod, OnceCell<Result<(), TaskError>>)>,
    size: PodSize,
    /// What the machine has now.
    current: Mutex<Size>,
    /// Held while that changes.
    resizing: tokio::sync::Mutex<()>,
    network: Mutex<Option<Network>>,
    end: OnceCell<()>,
}

/// The slots for disks of a pod's containers.
#[derive(Debug)]
struct DiskSlots {
    free: Vec<u32>,
    taken: HashMap<ContainerId, u32>,
}

/// The file server, and what is mounted for it.
#[derive(Debug, Clone)]
struct Files {
    server: Arc<FileServer>,
    child: Arc<Child>,
}

impl Pod {
    /// Starts a machine and returns before it has booted. `on_event` gets the pod's number with each
    /// event of the agent, and does not block. To be called on the shim's main thread.
    pub(crate) async fn start(
        launcher: &dyn Launcher,
        requirements: PodRequirements,
        mut on_event: impl FnMut(u64, Event) + Send + 'static,
    ) -> Result<Arc<Self>, PodError> {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let guest = launcher.open_guest_resources()?;
        let vmm = launcher.spawn_vmm().map_err(BootError::Spawn)?;
        let group = requirements.group.inspect(ControlGroup::make);
        let files = match requirements.share.then(|| Files::start(launcher)).transpose() {
            Ok(files) => files.flatten(),
            Err(error) => {
                vmm.discard().await;
                group.inspect(ControlGroup::remove);
                return Err(error.into());
            }
        };
        let (files, share) = files.unzip();
        if let Some(group) = &group {
            // Before there is any guest memory to count.
            group.add(vmm.child.pid());
            files.iter().for_each(|files| group.add(files.child.pid()));
        }
        let boot = BootRequest {
            guest,
            size: requirements.size,
            file_server: share,
            disks: requirements.disks,
            hotplug_disks: requirements.free,
        };
        let machine = match Machine::start(vmm, boot, move |event| on_event(number, event)).await {
            Ok(machine) => machine,
            Err(error) => {
                if let Some(files) = files {
                    files.end().await;
                }
                group.inspect(ControlGroup::remove);
                return Err(error.into());
            }
        };
        let pod = Arc::new(Self {
            number,
            machine: Arc::new(machine),
            files: Mutex::new(files.clone()),
            group,
            disk_slots: (requirements.free > 0).then(|| {
                Mutex::new(DiskSlots {
                    free: (0..requirements.free).rev().collect(),
                    taken: HashMap::new(),
                })
            }),
            shared: requirements.shared.map(|shared| (shared, OnceCell::new())),
            size: requirements.size,
            current: Mutex::new(requirements.size.boot),
            resizing: tokio::sync::Mutex::default(),
            network: Mutex::default(),
            end: OnceCell::new(),
        });
        if let Some(Files { child, .. }) = files {
            tokio::spawn(follow_files(child, Arc::downgrade(&pod)));
        }
        Ok(pod)
    }

    /// Tells the pods of this shim apart.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// The machine.
    pub(crate) fn machine(&self) -> &Machine {
        &self.machine
    }

    /// What the machine booted with and may come to have.
    pub(crate) fn size(&self) -> PodSize {
        self.size
    }

    /// How much memory the host allows the machine and all that it costs, in bytes.
    pub(crate) fn memory_limit(&self) -> Option<u64> {
        self.group.as_ref().and_then(ControlGroup::memory_limit)
    }

    /// What the machine has now.
    pub(crate) fn current_size(&self) -> Size {
        *self.current.lock()
    }

    /// Has `change` bring the machine to the size that `wanted` says, unless it has that; one at a time.
    pub(crate) async fn resize<F>(
        &self,
        wanted: impl FnOnce() -> Size,
        change: impl FnOnce(Size, Size) -> F,
    ) -> Result<(), TaskError>
    where
        F: Future<Output = Result<(), TaskError>>,
    {
        let _one = self.resizing.lock().await;
        let (now, wanted) = (self.current_size(), wanted());
        if wanted != now {
            change(now, wanted).await?;
            *self.current.lock() = wanted;
        }
        Ok(())
    }

    /// Has `ask` give the guest what the pod's containers share, unless that was done: the result is
    /// that of the first time. A container alone shares nothing.
    pub(crate) async fn set_up<F>(&self, ask: impl FnOnce(SetUpPod) -> F) -> Result<(), TaskError>
    where
        F: Future<Output = Result<(), TaskError>>,
    {
        match &self.shared {
            None => Ok(()),
            Some((shared, done)) => done.get_or_init(|| ask(shared.clone())).await.clone(),
        }
    }

    /// Counts a process of the host to the pod.
    pub(crate) fn add_process(&self, pid: u32) {
        if let Some(group) = &self.group {
            group.add(pid);
        }
    }

    /// Gives the machine what the container `id` needs of the host's files; says where the guest
    /// finds its root.
    pub(crate) async fn attach(
        &self,
        id: &ContainerId,
        bundle: &Path,
        root: Root,
        shares: Vec<Share>,
    ) -> Result<Rootfs, PodError> {
        let path = format!("{id}/rootfs");
        let (rootfs, mounts) = match root {
            Root::Share {
                mounts,
                directory,
                read_only,
            } => (
                Rootfs::Share { path: path.clone() },
                Some((mounts, directory, read_only)),
            ),
            Root::Disk {
                source,
                filesystem,
                options,
                read_only,
            } => {
                let slot = self.plug_disk(id, &source, read_only).await?;
                let rootfs = Rootfs::Disk {
                    slot,
                    filesystem,
                    options,
                };
                (rootfs, None)
            }
        };
        if mounts.is_none() && shares.is_empty() {
            return Ok(rootfs);
        }
        let server = self.files().as_ref().ok_or(PodError::NotShared)?.server.clone();
        let place = bundle.join("rootfs");
        // A file system that hangs must not hang the shim.
        let attached = tokio::task::spawn_blocking(move || {
            if let Some((mounts, directory, read_only)) = mounts {
                server.attach_rootfs(&mounts, directory.as_deref(), &place, &path, read_only)?;
            }
            shares.iter().try_for_each(|share| server.attach(share))
        });
        attached.await.map_err(|error| PodError::Shim(error.to_string()))??;
        Ok(rootfs)
    }

    /// The slot of a container's disk: the one that a machine for one container booted with, or a free one.
    async fn plug_disk(&self, id: &ContainerId, source: &Path, read_only: bool) -> Result<u32, PodError> {
        let Some(slots) = &self.disk_slots else { return Ok(0) };
        let file = open_disk(source, read_only)?;
        let slot = {
            let mut slots = lock(slots);
            let slot = slots.free.pop().ok_or(PodError::NoSlot)?;
            slots.taken.insert(id.clone(), slot);
            slot
        };
        // Where the machine does not take it, [`Self::detach`] follows.
        self.machine.plug_disk(slot, read_only, file.as_fd()).await?;
        Ok(slot)
    }

    /// Takes a container's disk back, if it had one.
    async fn unplug_disk(&self, id: &ContainerId) {
        let Some(slots) = &self.disk_slots else { return };
        let Some(slot) = lock(slots).taken.remove(id) else {
            return;
        };
        let released = async {
            let release = self.machine.agent().run(Request::ReleaseDisk { slot });
            release.await.map_err(|error| error.to_string())?;
            let unplugged = self.machine.unplug_disk(slot).await;
            unplugged.map_err(|error| error.to_string())
        };
        let released = self.machine.within(RELEASE_LIMIT, released).await;
        let late = || Err(format!("not done within {} s", RELEASE_LIMIT.as_secs()));
        match released.unwrap_or_else(late) {
            Ok(()) => lock(slots).free.push(slot),
            // The slot stays taken: a driver that has not let go would not look again.
            Err(error) => log::warn!("take the disk of {id} out of the virtual machine: {error}"),
        }
    }

    /// Gives the guest the network of the namespace in which the process `pid` lives. To be called
    /// once; what appears there later is passed on by itself. `forwarding`: connections to the loopback
    /// interface of the namespace are the guest's too.
    pub(crate) async fn connect_network(&self, pid: u32, forwarding: bool) -> Result<(), PodError> {
        let namespace =
            open_network_namespace(Path::new(&format!("/proc/{pid}/ns/net"))).map_err(NetworkError::Namespace)?;
        let network = Network::connect(&self.machine, namespace, self.size.boot.vcpus.into(), forwarding).await?;
        *self.network() = Some(network);
        Ok(())
    }

    /// Lets the network namespace go.
    pub(crate) async fn disconnect_network(&self) {
        let network = self.network().take();
        if let Some(network) = network {
            network.disconnect().await;
        }
    }

    /// Takes back what [`Self::attach`] gave for a container that the guest has forgotten.
    pub(crate) async fn detach(&self, id: &ContainerId) {
        self.unplug_disk(id).await;
        let Some(Files { server, .. }) = self.files().clone() else {
            return;
        };
        let path = id.to_string();
        match tokio::task::spawn_blocking(move || server.detach(&path)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log::warn!("{error}"),
            Err(error) => log::warn!("stop sharing the files of {id}: {error}"),
        }
    }

    /// Ends the machine and all that belongs to it. Nothing of it is left afterwards, once every pid
    /// that was added has ended.
    pub(crate) async fn end(&self) {
        self.end
            .get_or_init(|| async {
                self.machine.log_console().await;
                // Both at once: each takes the kernel a while.
                self.machine.stop("the shim ended it");
                let files = self.files().take();
                if let Some(files) = &files {
                    files.child.kill();
                }
                self.machine.ended().await;
                if let Some(files) = files {
                    files.end().await;
                }
                self.disconnect_network().await;
                if let Some(group) = &self.group {
                    group.remove();
                }
            })
            .await;
    }

    fn network(&self) -> MutexGuard<'_, Option<Network>> {
        self.network.lock()
    }

    fn files(&self) -> MutexGuard<'_, Option<Files>> {
        self.files.lock()
    }
}

fn lock(slots: &Mutex<DiskSlots>) -> MutexGuard<'_, DiskSlots> {
    slots.lock()
}

/// Without its file server a machine is of no use.
async fn follow_files(child: Arc<Child>, pod: Weak<Pod>) {
    let (Ok(how), Some(pod)) = (child.wait().await, pod.upgrade()) else {
        return;
    };
    if how == WaitStatus::Exited(0) {
        // It ends so when the vmm hangs up: then the vmm has more to say about why.
        let ended = pod.machine.ended();
        if tokio::time::timeout(FINAL_NOTICE_TIMEOUT, ended).await.is_ok() {
            return;
        }
    }
    pod.machine
        .kill(&format!("the file server of the virtual machine {how}"));
}

impl Files {
    fn start(launcher: &dyn Launcher) -> Result<Option<(Self, OwnedFd)>, ShareError> {
        let Some((server, socket)) = launcher.spawn_file_server()? else {
            return Ok(None);
        };
        let child = Child::from_std(server.child()).map_err(|source| ShareError::Start {
            step: "watch the process",
            source,
        })?;
        let files = Self {
            server: Arc::new(server),
            child: Arc::new(child),
        };
        Ok(Some((files, socket)))
    }

    async fn end(self) {
        self.child.kill();
        if let Err(error) = self.child.reap().await {
            log::warn!("wait for the file server: {error}");
        }
    }
}
