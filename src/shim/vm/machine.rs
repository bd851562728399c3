//! The state of a virtual machine from one boot to the next.

use std::{
    io,
    net::Ipv4Addr,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use nutshell_protocol::{AGENT_DISK, NETWORK_SLOTS};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    agent_service,
    command_line::complete_command_line,
    error::VmError,
    files::VmFiles,
    guest_agent::GuestAgent,
    kernel::{BootFiles, CacheEntry, KernelSource, read_disk_kernel},
    memory::{MachineMemory, MemoryError},
};
use crate::{
    control::MAX_DESCRIPTORS,
    oci::{ContainerId, MAX_VM_DISKS, OnReboot, PodSize, Size, VmExec},
    shim::{
        blocking,
        machine::{Agent, BootDisk, FINAL_NOTICE_TIMEOUT, Machine, UserBootRequest, VmmError},
        network::{DhcpLinks, FindTarget, ForwardTarget},
        pod::{Launcher, Pod, PodError},
        stdio::ConsoleStreams,
    },
};

/// How long the vmm may take to build the machine, which copies kernel and initramfs into its memory.
const BUILD_LIMIT: Duration = Duration::from_secs(30);

/// The maximum number of descriptors of a link in the boot command.
const MAX_QUEUES_PER_LINK: usize = 8;

/// The maximum number of descriptors of a [`UserBootRequest`].
const MAX_BOOT_DESCRIPTORS: usize = {
    let kvm_kernel_and_initramfs = 3;
    let console_and_guest_agent = 2 + 1;
    let links = NETWORK_SLOTS as usize * MAX_QUEUES_PER_LINK;
    let file_server = 1;
    // The image's disk and each other one may have a base image and a copy-on-write file.
    let disks = 2 * (1 + MAX_VM_DISKS);
    let seed_and_agent = 2;
    kvm_kernel_and_initramfs + console_and_guest_agent + links + file_server + disks + seed_and_agent
};
const _: () = assert!(MAX_BOOT_DESCRIPTORS <= MAX_DESCRIPTORS);

/// The kernel argument that makes the guest use hot-added memory (kernel documentation,
/// `admin-guide/kernel-parameters`).
const ONLINE_MEMORY: &str = "memhp_default_state=online_movable";

/// If a guest resets the machine sooner than this after its start, the next boot is delayed, so that a guest that
/// reboots in a loop costs the host little.
const SHORT_RUN: Duration = Duration::from_secs(10);

/// The delay after the first short run. Each further short run doubles it.
const FIRST_REBOOT_DELAY: Duration = Duration::from_millis(500);

const MAX_REBOOT_DELAY: Duration = Duration::from_secs(60);

/// The virtual machine of a task. It runs in the machine of the pod.
#[derive(Debug)]
pub(crate) struct VirtualMachine {
    size: PodSize,
    memory: MachineMemory,
    on_reboot: OnReboot,
    exec: VmExec,
    /// `None` after [`Self::release`].
    files: Mutex<Option<Arc<VmFiles>>>,
    /// The files for the next boot. `None` until they are read from the disk.
    boot_files: Mutex<Option<BootFiles>>,
    /// Where the files for the first boot are stored. `None` after that boot.
    cache_entry: Mutex<Option<CacheEntry>>,
    /// Unset until the task's streams are open.
    console: OnceLock<ConsoleStreams>,
    links: Mutex<Option<DhcpLinks>>,
    /// The machine while the guest runs in it.
    running: Mutex<Option<Arc<Machine>>>,
    /// The client of nutshell's agent in the guest in `running`, which may not be connected.
    agent: Mutex<Option<Agent>>,
    /// The client of the QEMU guest agent of the guest in `running`, which may not answer.
    guest_agent: Mutex<Option<Arc<GuestAgent>>>,
    /// Whether a client has requested a shutdown of the guest.
    power_off_requested: AtomicBool,
    /// The exit status of the task, once a client has killed it.
    killed: watch::Sender<Option<u32>>,
    pace: Mutex<RebootPace>,
}

/// The delay before reboots.
#[derive(Debug)]
struct RebootPace {
    started: Instant,
    /// `None` if the last run was not short.
    last_delay: Option<Duration>,
}

impl RebootPace {
    /// Returns the delay of the next boot after a reset at `now`.
    fn next_delay(&mut self, now: Instant) -> Duration {
        self.last_delay = if now.duration_since(self.started) < SHORT_RUN {
            Some(
                self.last_delay
                    .map_or(FIRST_REBOOT_DELAY, |delay| (delay * 2).min(MAX_REBOOT_DELAY)),
            )
        } else {
            None
        };
        self.last_delay.unwrap_or_default()
    }
}

impl VirtualMachine {
    pub(crate) fn new(size: PodSize, on_reboot: OnReboot, exec: VmExec, mut files: VmFiles) -> Self {
        let (boot_files, cache_entry) = (files.cached_kernel.take(), files.cache_entry.take());
        Self {
            size,
            memory: MachineMemory::new(size.boot.memory),
            on_reboot,
            exec,
            files: Mutex::new(Some(Arc::new(files))),
            boot_files: Mutex::new(boot_files),
            cache_entry: Mutex::new(cache_entry),
            console: OnceLock::new(),
            links: Mutex::default(),
            running: Mutex::default(),
            agent: Mutex::default(),
            guest_agent: Mutex::default(),
            power_off_requested: AtomicBool::new(false),
            killed: watch::Sender::new(None),
            pace: Mutex::new(RebootPace {
                started: Instant::now(),
                last_delay: None,
            }),
        }
    }

    /// The size with which it boots first, and the largest that it can have.
    pub(crate) fn size(&self) -> PodSize {
        self.size
    }

    /// The vCPUs of its guest, and the memory after the last change.
    pub(crate) fn current_size(&self) -> Size {
        Size {
            memory: self.memory.current(),
            ..self.size.boot
        }
    }

    /// Changes the memory of the guest to `memory` bytes, a result of [`PodSize::memory_of_virtual_machine`]. Returns
    /// when the guest's kernel has added or removed the memory. If it does not do so in time, the guest keeps its size.
    pub(crate) async fn set_memory(&self, id: &ContainerId, memory: u64) -> Result<(), MemoryError> {
        let running = || self.running.lock().clone();
        self.memory.set(id, running, self.size.boot.vcpus, memory).await
    }

    pub(crate) fn on_reboot(&self) -> OnReboot {
        self.on_reboot
    }

    /// The disk for the disk reader. `None` if the kernel need not be read from a disk.
    ///
    /// # Errors
    ///
    /// The errors of dup(2).
    pub(crate) fn disk_to_read(&self) -> Result<Option<BootDisk>, VmError> {
        let files = self.files()?;
        match (&files.kernel, files.disks.first()) {
            (KernelSource::Disk, Some((serial, disk))) if self.boot_files.lock().is_none() => {
                disk.for_machine(true).map(Some).map_err(disk_descriptor_error(serial))
            }
            _ => Ok(None),
        }
    }

    fn files(&self) -> Result<Arc<VmFiles>, VmError> {
        self.files.lock().clone().ok_or(VmError::Ended)
    }

    /// Finds the kernel for the next boot. If it is on the disk, this waits for `reader`, the machine of the disk
    /// reader.
    pub(crate) async fn find_kernel(
        &self,
        id: &ContainerId,
        reader: &Machine,
        ready_timeout: Duration,
    ) -> Result<(), VmError> {
        let files = self.files()?;
        let (KernelSource::Disk, Some((_, disk))) = (&files.kernel, files.disks.first()) else {
            return Ok(());
        };
        let cache_entry = self.cache_entry.lock().take();
        if let Some(cached) = self.boot_files.lock().as_ref() {
            log::info!(
                "task {id}: the disk's kernel, found in {}, is in the cache",
                cached.source()
            );
            return Ok(());
        }
        let found = read_disk_kernel(reader, disk.path(), ready_timeout).await?;
        log::info!("task {id}: the disk's kernel was found in {}", found.source());
        if let Some(entry) = cache_entry {
            store_in_background(id, entry, found.try_clone().map_err(VmError::KernelDescriptors)?);
        }
        *self.boot_files.lock() = Some(found);
        Ok(())
    }

    /// Sets the streams of the console, once.
    pub(crate) fn set_console(&self, console: ConsoleStreams) {
        // Called once, by the creation of the task.
        let _ = self.console.set(console);
    }

    /// Ends the output of the console, after the last machine has ended. containerd waits for the end of the output
    /// before it deletes the task.
    pub(crate) fn end_console(&self) {
        if let Some(console) = self.console.get() {
            console.close_machine_ends();
        }
    }

    /// Closes the disk and the streams of the console after the end of the machine. A client has `limit` to read the
    /// last output.
    pub(crate) async fn release(&self, id: &ContainerId, limit: Duration) {
        let files = self.files.lock().take();
        // The close of a file can block on a network file system.
        if let Err(error) = blocking::run("close the disks of a virtual machine", move || drop(files)).await {
            log::warn!("task {id}: {error}");
        }
        if let Some(console) = self.console.get() {
            console.close(limit).await;
        }
    }

    /// Connects the links of a network namespace to the machine that boots next. No-op if they are connected. With
    /// `forwarding`, connections to the namespace's loopback interface go to the guest too.
    pub(crate) async fn connect_network(self: &Arc<Self>, namespace: OwnedFd, forwarding: bool) -> Result<(), VmError> {
        if self.links.lock().is_none() {
            let queues = usize::from(self.size.boot.vcpus).min(MAX_QUEUES_PER_LINK);
            let mut links = DhcpLinks::connect(namespace, queues, &self.files()?.names, forwarding).await?;
            let (weak, address) = (Arc::downgrade(self), links.address());
            let find_target: FindTarget = Arc::new(move || weak.upgrade()?.forward_target(address));
            links.forward(&find_target);
            *self.links.lock() = Some(links);
        }
        Ok(())
    }

    /// The target of a connection to the loopback interface of the network namespace. `address` is the guest's.
    fn forward_target(&self, address: Option<Ipv4Addr>) -> Option<ForwardTarget> {
        let machine = self.running.lock().clone()?;
        match self.connected_agent() {
            Some((agent, _)) => Some(ForwardTarget::Loopback(machine, agent)),
            None => address.map(|address| ForwardTarget::Address(address.into())),
        }
    }

    /// Undoes [`Self::connect_network`].
    pub(crate) async fn disconnect_network(&self) {
        let links = self.links.lock().take();
        if let Some(links) = links {
            links.disconnect().await;
        }
    }

    /// Boots the kernel that [`Self::find_kernel`] has found, in `machine`. Returns when its vCPUs run.
    /// Call it on the shim's main thread.
    pub(crate) async fn boot(
        &self,
        id: &ContainerId,
        pod: &Pod,
        launcher: &dyn Launcher,
        machine: &Arc<Machine>,
    ) -> Result<(), VmError> {
        let files = self.files()?;
        let boot_files = match &files.kernel {
            KernelSource::Disk => self.boot_files.lock().take(),
            KernelSource::Files(files) => Some(files.try_clone().map_err(VmError::KernelDescriptors)?),
        };
        let BootFiles {
            kernel,
            initramfs,
            command_line,
            ..
        } = boot_files.ok_or(VmError::NotRead)?;
        let (console_input, console_output) = match self.console.get() {
            Some(console) => console.for_machine().map_err(VmError::Console)?,
            None => (None, None),
        };
        let file_server = match files.shares.is_empty() {
            true => None,
            false => Some(
                pod.start_file_server(launcher, machine, id, files.shares.clone())
                    .await?,
            ),
        };
        let links = self.links.lock().as_ref().map(DhcpLinks::for_machine);
        let disks = files.disks.iter().map(|(serial, disk)| {
            let disk = disk.for_machine(false).map_err(disk_descriptor_error(serial))?;
            Ok((serial.clone(), disk))
        });
        let mut disks = disks.collect::<Result<Vec<_>, VmError>>()?;
        let mut oem_strings = Vec::new();
        if self.exec.has_agent() {
            // The last disk, so that it does not change the names of the others in the guest.
            let disk = launcher.open_agent_disk().map_err(PodError::from)?;
            disks.push((AGENT_DISK.to_owned(), disk));
            oem_strings = agent_service::oem_strings();
        }
        let (guest_agent, agent_end) = match self.exec.has_guest_agent_port() {
            true => connect_guest_agent().map_err(VmError::GuestAgent)?,
            false => (None, None),
        };
        let mut arguments = files.kernel_arguments.clone();
        // Until the machine runs, its memory does not change.
        let booting = self.memory.begin_boot().await;
        let memory = booting.memory();
        if self.size.max.memory > memory {
            // Some distributions leave new memory offline. Movable memory can be removed again.
            arguments = format!("{ONLINE_MEMORY} {arguments}").trim().to_owned();
        }
        let request = UserBootRequest {
            kvm: launcher.open_kvm().map_err(PodError::from)?,
            size: Size {
                memory,
                ..self.size.boot
            },
            max_memory: self.size.max.memory,
            kernel,
            initramfs,
            command_line: complete_command_line(&command_line, &arguments),
            uuid: files.uuid,
            console_input,
            console_output,
            oem_strings,
            guest_agent: agent_end.map(OwnedFd::from),
            links: links.transpose().map_err(VmError::Links)?.unwrap_or_default(),
            disks,
            file_server,
        };
        self.pace.lock().started = Instant::now();
        machine.boot_user(request, BUILD_LIMIT).await.map_err(VmError::Start)?;
        *self.running.lock() = Some(machine.clone());
        drop(booting);
        *self.guest_agent.lock() = guest_agent;
        if self.is_end_requested() {
            // The request came while there was no machine whose power button could be pressed.
            machine.stop("a client has requested its end");
            return Err(VmError::Ended);
        }
        Ok(())
    }

    /// Whether the guest has run for so short a time that it may not have reached its init process.
    pub(crate) fn is_short_run(&self) -> bool {
        self.pace.lock().started.elapsed() < SHORT_RUN
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.lock().is_some()
    }

    /// Whether the guest gets nutshell's agent.
    pub(crate) fn has_agent(&self) -> bool {
        self.exec.has_agent()
    }

    /// Sets the client of nutshell's agent. The agent need not be connected yet.
    pub(crate) fn set_agent(&self, agent: Option<Agent>) {
        *self.agent.lock() = agent;
    }

    /// The client of nutshell's agent in the guest, with the agent's version, if the agent is connected.
    pub(crate) fn connected_agent(&self) -> Option<(Agent, String)> {
        let agent = self.agent.lock().clone()?;
        let version = agent.ready_message()?.version;
        Some((agent, version))
    }

    /// The machine in which the guest runs, and the client of the QEMU guest agent, which may not answer.
    pub(crate) fn running_guest_agent(&self) -> Option<(Arc<Machine>, Arc<GuestAgent>)> {
        self.running.lock().clone().zip(self.guest_agent.lock().clone())
    }

    /// Boots again after the guest has reset the machine of `pod`. Returns the new machine. Call it on the shim's main
    /// thread.
    ///
    /// # Errors
    ///
    /// [`VmError::Ended`] if a client has requested the end meanwhile.
    pub(crate) async fn reboot(
        &self,
        id: &ContainerId,
        pod: &Pod,
        launcher: &dyn Launcher,
        ready_timeout: Duration,
    ) -> Result<Arc<Machine>, VmError> {
        self.running.lock().take();
        self.guest_agent.lock().take();
        let delay = self.pace.lock().next_delay(Instant::now());
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = self.end_requested() => {}
            () = pod.closed() => {}
        }
        self.check_wanted()?;
        if let Some(disk) = self.disk_to_read()? {
            let reader = pod.start_disk_reader(launcher, disk).await?;
            self.check_wanted()?;
            tokio::select! {
                found = self.find_kernel(id, &reader, ready_timeout) => found?,
                () = self.end_requested() => return Err(VmError::Ended),
            }
        }
        let machine = pod.prepare_user_machine(launcher, self.size.boot).await?;
        self.check_wanted()?;
        self.boot(id, pod, launcher, &machine).await?;
        Ok(machine)
    }

    /// Requests a shutdown: presses the power button, if a guest runs. From then on, a reset of the machine ends the
    /// task instead of booting again.
    ///
    /// # Errors
    ///
    /// The vmm is gone, or does not read its commands.
    pub(crate) async fn press_power_button(&self) -> Result<(), VmmError> {
        self.power_off_requested.store(true, Ordering::Relaxed);
        let running = self.running.lock().clone();
        match running {
            Some(machine) => match machine.press_power_button().await {
                Ok(()) => Ok(()),
                // The machine is ending anyway.
                Err(_)
                    if tokio::time::timeout(FINAL_NOTICE_TIMEOUT, machine.ended())
                        .await
                        .is_ok() =>
                {
                    Ok(())
                }
                Err(error) => Err(error),
            },
            None => {
                // Wakes a reboot that waits.
                self.killed.send_modify(|_| {});
                Ok(())
            }
        }
    }

    /// Ends the machine of `pod` at once. The task exits with `status`.
    pub(crate) fn kill(&self, pod: &Pod, status: u32) {
        // The first reason counts.
        self.killed.send_if_modified(|killed| {
            let is_first = killed.is_none();
            killed.get_or_insert(status);
            is_first
        });
        pod.machine().stop("a client has killed it");
    }

    /// The exit status, if a client has killed the task.
    pub(crate) fn killed_status(&self) -> Option<u32> {
        *self.killed.borrow()
    }

    /// Whether a client has requested the end of the virtual machine.
    pub(crate) fn is_end_requested(&self) -> bool {
        self.power_off_requested.load(Ordering::Relaxed) || self.killed_status().is_some()
    }

    async fn end_requested(&self) {
        let mut killed = self.killed.subscribe();
        // Cannot fail: `self` owns the sender.
        let _ = killed.wait_for(|_| self.is_end_requested()).await;
    }

    fn check_wanted(&self) -> Result<(), VmError> {
        match self.is_end_requested() {
            true => Err(VmError::Ended),
            false => Ok(()),
        }
    }
}

fn disk_descriptor_error(serial: &str) -> impl FnOnce(io::Error) -> VmError {
    |source| VmError::DiskDescriptor {
        serial: serial.to_owned(),
        source,
    }
}

/// How long the cache may take to write a kernel to its disk, up to some 100 MB, before a message says that it hangs.
const STORE_LIMIT: Duration = Duration::from_secs(120);

/// Stores a kernel in the cache while the machine boots.
fn store_in_background(id: &ContainerId, entry: CacheEntry, files: BootFiles) {
    let id = id.clone();
    tokio::spawn(async move {
        let store = move || entry.store(&files);
        let stored = blocking::run_or_undo("store the kernel of a disk in the cache", STORE_LIMIT, store, drop).await;
        if let Err(error) = stored.unwrap_or_else(|error| Err(error.to_string())) {
            log::warn!(
                "task {id}: until its kernel is stored, each virtual machine of this image reads its disk: {error}"
            );
        }
    });
}

/// A client of the guest agent, and the end of its socket for the machine.
fn connect_guest_agent() -> io::Result<(Option<Arc<GuestAgent>>, Option<UnixStream>)> {
    let (client, machine) = UnixStream::pair()?;
    machine.set_nonblocking(true)?;
    Ok((Some(Arc::new(GuestAgent::new(client)?)), Some(machine)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delay_before_a_reboot_grows_while_runs_are_short() {
        let start = Instant::now();
        let mut pace = RebootPace {
            started: start,
            last_delay: None,
        };
        let soon = start + Duration::from_secs(1);
        let delays: Vec<_> = (0..10).map(|_| pace.next_delay(soon)).collect();
        assert_eq!(delays[..3], [500, 1000, 2000].map(Duration::from_millis));
        assert_eq!(delays[9], MAX_REBOOT_DELAY);

        assert_eq!(pace.next_delay(start + SHORT_RUN), Duration::ZERO);
        assert_eq!(pace.next_delay(soon), FIRST_REBOOT_DELAY);
    }
}
