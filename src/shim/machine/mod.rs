//! The virtual machine of a pod as the shim sees it: a vmm process behind a control channel, and the agent in its
//! guest.
//!
//! Belongs here: the start of the process; the machine's streams, disks, links and size; its end. Does not belong here:
//! anything about one container. For that, callers send requests to the [`Agent`]. [`super::pod`] owns the machine;
//! `network`, `stdio` and `tasks` use it.

mod agent;
mod async_channel;
mod boot;
mod clock;
mod console;
mod deadline;
mod exit;
mod guest_agents;
mod memory;
mod monitor;
mod node_settings;
mod stderr;
mod streams;
mod vmm;

use std::{
    future::Future,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    sync::{Arc, OnceLock, atomic::Ordering},
    time::Duration,
};

use nutshell_protocol::{Event, FIRST_DISK_SLOT, Ready, Request, disk_serial};
use tokio::{sync::oneshot, time::Instant};

#[cfg(any(test, fuzzing))]
pub(crate) use self::monitor::fuzz::receive_notices;
pub(crate) use self::{
    agent::{Agent, AgentError, describe_request},
    boot::{
        BootDisk, BootError, BootRequest, DiskFile, DiskImage, GuestResources, JoinedDiskFile, PlainDisk,
        UserBootRequest, open_agent_disk, open_disk, open_kvm,
    },
    console::printable_line,
    exit::MachineExit,
    monitor::FINAL_NOTICE_TIMEOUT,
    stderr::{STDERR_TIMEOUT, StderrLog},
    streams::GuestStream,
    vmm::{VmmError, VmmProcess},
};
use self::{
    async_channel::AsyncChannel,
    clock::ClockJumps,
    console::printable_tail,
    deadline::BootProgress,
    exit::EndRequest,
    monitor::{MachineState, add_request},
};
use super::{blocking, child::Child, logging};
use crate::control::{Channel, Command, ControlError, MachineStatistics, monotonic_now};

/// How long the vmm may take to send the guest's console.
const CONSOLE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the vmm may take to plug or unplug a device, or to change the size of the machine.
const VMM_TIMEOUT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// How long the vmm may take to send the progress of the boot.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the vmm may take to report what the machine's devices have done.
const STATISTICS_TIMEOUT: Duration = Duration::from_secs(1);

/// A running machine. It ends by itself, on [`Self::kill`] or [`Self::stop`], and when the last reference is dropped;
/// [`Self::ended`] reports the end.
#[derive(Debug)]
pub(crate) struct Machine {
    agent: Agent,
    child: Arc<Child>,
    control: Arc<AsyncChannel>,
    state: Arc<MachineState>,
    times: StartTimes,
    /// The agent's first message, and when it came on the clock of [`monotonic_now`].
    boot: OnceLock<(Ready, Duration)>,
}

/// When a machine was started, on the clock of [`monotonic_now`].
#[derive(Debug, Clone, Copy)]
struct StartTimes {
    requested_at: Duration,
    spawned_at: Duration,
    /// When its boot command was sent.
    booted_at: Duration,
}

/// How long after its request a machine passed the phases of its start. `None` if it has not passed a phase yet, or if
/// the time is not known.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StartPhases {
    /// The vmm process was started. Zero if that was before the request.
    pub(crate) spawned: Duration,
    /// The vmm had built the machine.
    pub(crate) vmm_ready: Option<Duration>,
    /// The guest's kernel did its first I/O.
    pub(crate) kernel: Option<Duration>,
    /// The guest's agent accepted requests.
    pub(crate) agent_ready: Option<Duration>,
    /// The time from the boot command until the agent accepted requests.
    pub(crate) boot: Option<Duration>,
}

impl Machine {
    /// Sends `boot` to `vmm` and returns before the machine has booted; [`Self::ready`] waits for that. `requested_at`
    /// is when the machine was requested, on the clock of [`monotonic_now`](crate::control::monotonic_now). `on_event`
    /// gets the agent's events in order, and must not block.
    ///
    /// # Errors
    ///
    /// [`BootError::Descriptors`]; the process is reaped then. If the vmm cannot build the machine, [`Self::ended`]
    /// reports it.
    pub(crate) async fn start(
        vmm: VmmProcess,
        requested_at: Duration,
        boot: BootRequest,
        on_event: impl FnMut(Event) + Send + 'static,
    ) -> Result<Self, BootError> {
        let VmmProcess {
            child,
            control,
            stderr,
            spawned_at,
        } = vmm;
        let state = Arc::new(MachineState::new());
        state.record_disks((0..).map(disk_serial).zip(&boot.disks));
        match Self::open_channels(control, boot, on_event) {
            Ok((control, agent, agent_end)) => {
                let times = StartTimes {
                    requested_at,
                    spawned_at,
                    booted_at: monotonic_now(),
                };
                let machine = Self::spawn_monitor(child, stderr, control, state, agent, agent_end, times);
                machine.serve_agent();
                Ok(machine)
            }
            Err(error) => Err(discard(child, error).await),
        }
    }

    /// A machine for a user's kernel, whose process waits for [`Self::boot_user`]. It has no agent.
    ///
    /// # Errors
    ///
    /// [`BootError::Descriptors`]; the process is reaped then.
    pub(crate) async fn prepare(vmm: VmmProcess) -> Result<Self, BootError> {
        let VmmProcess {
            child,
            control,
            stderr,
            spawned_at,
        } = vmm;
        match AsyncChannel::new(control) {
            Ok(control) => {
                let times = StartTimes {
                    requested_at: spawned_at,
                    spawned_at,
                    booted_at: spawned_at,
                };
                let (state, agent) = (Arc::new(MachineState::new()), Agent::absent());
                state.awaits_boot.store(true, Ordering::SeqCst);
                let agent_end = std::future::pending();
                Ok(Self::spawn_monitor(
                    child,
                    stderr,
                    Arc::new(control),
                    state,
                    agent,
                    agent_end,
                    times,
                ))
            }
            Err(error) => Err(discard(child, channel_error(error)).await),
        }
    }

    /// Boots a user's kernel, and returns when its vCPUs run. Called once, after [`Self::prepare`]. A machine that is
    /// not built within `limit` is killed.
    ///
    /// # Errors
    ///
    /// The reason why the machine could not be built, or ended before that.
    pub(crate) async fn boot_user(&self, boot: UserBootRequest, limit: Duration) -> Result<(), Arc<MachineExit>> {
        let (sender, built) = oneshot::channel();
        self.state
            .record_disks(boot.disks.iter().map(|(serial, disk)| (serial.clone(), disk)));
        *self.state.boot_request.lock() = Some(sender);
        let sent = async {
            let command = blocking::run("read the sizes of the kernel's files", || boot.into_command()).await;
            let (command, descriptors) = command
                .map_err(|error| error.to_string())?
                .map_err(|error| error.to_string())?;
            let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            let sent = self.control.send(&command, &borrowed).await;
            sent.map_err(|error| error.to_string())
        };
        let sent = sent.await;
        self.state.awaits_boot.store(false, Ordering::SeqCst);
        match sent {
            Ok(()) => tokio::select! {
                biased;
                exit = self.ended() => return Err(exit),
                built = tokio::time::timeout(limit, built) => match built {
                    Ok(Ok(())) => return Ok(()),
                    // The machine is ending, and its own reason follows.
                    Ok(Err(_)) => {}
                    Err(_) => self.kill(&format!("it was not built within {} s", limit.as_secs())),
                },
            },
            Err(error) => self.kill(&format!("cannot send the boot command to the vmm: {error}")),
        }
        Err(self.ended().await)
    }

    /// Presses the machine's power button. The guest may ignore it.
    pub(crate) async fn press_power_button(&self) -> Result<(), VmmError> {
        Ok(self.control.send(&Command::PressPowerButton, &[]).await?)
    }

    fn open_channels(
        control: Channel,
        boot: BootRequest,
        on_event: impl FnMut(Event) + Send + 'static,
    ) -> Result<(Arc<AsyncChannel>, Agent, impl Future<Output = String> + Send + 'static), BootError> {
        let (shim_end, guest_end) = UnixStream::pair().map_err(channel_error)?;
        let control = Arc::new(AsyncChannel::new(control).map_err(channel_error)?);
        let (agent, agent_end) = Agent::start(shim_end, on_event).map_err(channel_error)?;
        let command = boot.into_command(guest_end.into());
        let (command, descriptors) = command.map_err(|source| BootError::Descriptors {
            step: "duplicate the descriptors of the disks",
            source,
        })?;
        // The socket is empty, so there is room for this packet. If the process is gone already, its exit status and
        // standard error explain more than this failure.
        if let Err(error) = control.try_send(&command, &descriptors) {
            log::warn!("cannot send the boot command to the vmm: {error}");
        }
        Ok((control, agent, agent_end))
    }

    fn spawn_monitor(
        child: Child,
        stderr: OwnedFd,
        control: Arc<AsyncChannel>,
        state: Arc<MachineState>,
        agent: Agent,
        agent_end: impl Future<Output = String> + Send + 'static,
        times: StartTimes,
    ) -> Self {
        let child = Arc::new(child);
        tokio::spawn({
            let (child, control, state) = (child.clone(), control.clone(), state.clone());
            async move { monitor::run(&state, &control, &child, stderr, agent_end).await }
        });
        Self {
            agent,
            child,
            control,
            state,
            times,
            boot: OnceLock::new(),
        }
    }

    /// Starts the tasks that keep the guest's settings and its clock like those of this node.
    fn serve_agent(&self) {
        // Queued before the guest has booted, and so before any other request.
        tokio::spawn({
            let agent = self.agent.clone();
            async move {
                match agent.run(Request::ConfigureGuest(node_settings::read())).await {
                    Ok(()) | Err(AgentError::Gone) => {}
                    Err(error) => log::warn!("the guest does not have all settings of this node: {error}"),
                }
            }
        });
        match ClockJumps::watch() {
            Ok(jumps) => {
                let (agent, mut exit) = (self.agent.clone(), self.state.exit.subscribe());
                let is_busy = clock::is_busy(self.child.pid());
                tokio::spawn(async move {
                    tokio::select! {
                        _ = exit.changed() => {}
                        result = clock::follow_host_clock(&agent, || jumps.next(), is_busy) => if let Err(error) = result {
                            log::warn!("cannot follow the host's clock; the guest's clock may be wrong: {error}");
                        }
                    }
                });
            }
            Err(error) => log::warn!("cannot follow the host's clock; the guest's clock may be wrong: {error}"),
        }
    }

    /// The agent's first message; `None` before that.
    pub(crate) fn ready_message(&self) -> Option<&Ready> {
        self.boot.get().map(|(ready, _)| ready)
    }

    /// The phases of the start. Those that only the vmm knows are in `statistics`.
    pub(crate) fn start_phases(&self, statistics: Option<&MachineStatistics>) -> StartPhases {
        let StartTimes {
            requested_at,
            spawned_at,
            booted_at,
        } = self.times;
        let since_request = |time: Duration| time.saturating_sub(requested_at);
        let ready_at = self.boot.get().map(|(_, ready_at)| *ready_at);
        StartPhases {
            spawned: since_request(spawned_at),
            vmm_ready: statistics.and_then(|statistics| statistics.built_at).map(since_request),
            kernel: statistics
                .and_then(|statistics| statistics.first_io_at)
                .map(since_request),
            agent_ready: ready_at.map(since_request),
            boot: ready_at.map(|ready_at| ready_at.saturating_sub(booted_at)),
        }
    }

    /// Requests the counters of the machine's devices from the vmm.
    ///
    /// # Errors
    ///
    /// The machine has ended, or the vmm does not answer within [`STATISTICS_TIMEOUT`].
    pub(crate) async fn statistics(&self) -> Result<MachineStatistics, VmmError> {
        let receiver = add_request(&self.state.statistics_requests);
        if self.has_ended() {
            return Err(ControlError::Closed.into());
        }
        let answer = async {
            self.query(&Command::ReadStatistics).await?;
            receiver.await.map_err(|_| VmmError::from(ControlError::Closed))
        };
        let answer = tokio::time::timeout(STATISTICS_TIMEOUT, answer).await;
        answer.map_err(|_| VmmError::Timeout(STATISTICS_TIMEOUT))?
    }

    /// The file of the host behind the disk with this serial.
    pub(crate) fn disk_path(&self, serial: &str) -> Option<PathBuf> {
        self.state.disk_paths.lock().get(serial).cloned()
    }

    /// Whether its guest is to run an agent.
    pub(crate) fn has_agent(&self) -> bool {
        self.agent.is_present()
    }

    /// The client of the guest's agent.
    pub(crate) fn agent(&self) -> &Agent {
        &self.agent
    }

    /// The vmm's process.
    pub(crate) fn vmm(&self) -> &Child {
        &self.child
    }

    /// The vmm's pid on the host.
    pub(crate) fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Waits until the agent accepts requests. Kills a guest that makes no progress for `limit`, or that is not ready
    /// after a multiple of it (see [`deadline::stalled`]).
    pub(crate) async fn ready(&self, limit: Duration) -> Result<Ready, Arc<MachineExit>> {
        let start = Instant::now();
        let stalled = deadline::stalled(
            limit,
            || self.boot_progress(limit),
            || deadline::run_queue_waits(self.pid()),
        );
        let stall = tokio::select! {
            biased;
            ready = self.agent.ready() => {
                self.boot.get_or_init(|| (ready.clone(), monotonic_now()));
                return Ok(ready);
            }
            exit = self.ended() => return Err(exit),
            stall = stalled => stall,
        };
        let console = self.read_console().await;
        self.kill(&format!(
            "the guest did not become ready: {stall}: if this host is slow, raise ready_timeout_seconds in section \
             [guest] of the configuration"
        ));
        let exit = self.ended().await;
        log::debug!("vmm process {}: waited {:?} for the agent", self.pid(), start.elapsed());
        Err(Arc::new(MachineExit {
            reason: exit.reason.clone(),
            requested: exit.requested,
            reported: exit.reported.clone(),
            console,
            panic: None,
        }))
    }

    /// The progress of the boot. Waits for [`PROGRESS_TIMEOUT`] or `limit` at most, whichever is shorter: a vmm that
    /// does not answer has made no progress.
    async fn boot_progress(&self, limit: Duration) -> BootProgress {
        let receiver = add_request(&self.state.progress_requests);
        let answer = async {
            self.control.send(&Command::ReadProgress, &[]).await.ok()?;
            receiver.await.ok()
        };
        let io_addresses = tokio::time::timeout(limit.min(PROGRESS_TIMEOUT), answer).await;
        BootProgress {
            resident_pages: deadline::resident_pages(self.pid()),
            io_addresses: io_addresses.ok().flatten().unwrap_or_default(),
        }
    }

    /// Waits for the machine's end. The process has been reaped then, unless a disk of the host keeps it from ending.
    pub(crate) async fn ended(&self) -> Arc<MachineExit> {
        let mut receiver = self.state.exit.subscribe();
        loop {
            if let Some(exit) = receiver.borrow_and_update().clone() {
                return exit;
            }
            if receiver.changed().await.is_err() {
                // Cannot happen: `self` keeps the sender alive.
                std::future::pending::<()>().await;
            }
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.state.exit.borrow().is_some()
    }

    /// Whether it has ended because of [`Self::stop`].
    pub(crate) fn was_stopped(&self) -> bool {
        self.state.exit.borrow().as_ref().is_some_and(|exit| exit.requested)
    }

    /// Ends the machine at once because of a failure. `reason` appears in the errors of the calls that fail with it.
    pub(crate) fn kill(&self, reason: &str) {
        self.end(reason, false);
    }

    /// Ends the machine at once because a client or the shim is done with it.
    pub(crate) fn stop(&self, reason: &str) {
        self.end(reason, true);
    }

    fn end(&self, reason: &str, requested: bool) {
        self.state.end_request.lock().get_or_insert_with(|| EndRequest {
            reason: reason.to_owned(),
            requested,
        });
        self.child.kill();
        self.state.end_requested.notify_one();
    }

    /// Lets the guest open one stream, whose bytes come from `input` and go to `output`.
    pub(crate) async fn open_stream(
        &self,
        input: Option<BorrowedFd<'_>>,
        output: Option<BorrowedFd<'_>>,
    ) -> Result<GuestStream, ControlError> {
        let stream = self.state.streams.open().map_err(ControlError::Stream)?;
        let command = Command::OpenStream {
            port: stream.port(),
            input: input.is_some(),
            output: output.is_some(),
        };
        let descriptors: Vec<_> = input.into_iter().chain(output).collect();
        self.control.send(&command, &descriptors).await?;
        Ok(stream)
    }

    /// Waits until `bytes`, counted from the opening of `stream`, were written to its output, or it is closed.
    pub(crate) async fn drain_stream(&self, stream: &mut GuestStream, bytes: u64) {
        if bytes == 0 || stream.is_closed() {
            return;
        }
        let port = stream.port();
        // If this fails the vmm is gone, and with it all streams.
        if self.control.send(&Command::Drain { port, bytes }, &[]).await.is_ok() {
            stream.drained().await;
        }
    }

    /// Closes a stream at once. Bytes in flight are lost.
    pub(crate) async fn close_stream(&self, stream: &GuestStream) {
        if !stream.is_closed() {
            let command = Command::CloseStream { port: stream.port() };
            // If this fails the vmm is gone, and with it all streams.
            let _ = self.control.send(&command, &[]).await;
        }
    }

    /// Puts a disk into the free disk slot `slot`.
    pub(crate) async fn plug_disk(&self, slot: u32, disk: &PlainDisk) -> Result<(), VmmError> {
        self.state
            .disk_paths
            .lock()
            .insert(disk_serial(slot), disk.path().to_owned());
        let access = disk.access();
        let command = Command::PlugDisk { slot, access };
        self.change_slot(FIRST_DISK_SLOT.saturating_add(slot), &command, &disk.descriptors())
            .await
    }

    /// Takes the disk out of disk slot `slot`. The guest must have released it.
    pub(crate) async fn unplug_disk(&self, slot: u32) -> Result<(), VmmError> {
        let command = Command::UnplugDisk { slot };
        self.change_slot(FIRST_DISK_SLOT.saturating_add(slot), &command, &[])
            .await
    }

    /// Puts a network device into the empty slot `slot`. `queues` are the descriptors of its tap device, one per queue.
    pub(crate) async fn plug_link(
        &self,
        slot: u32,
        mac: [u8; 6],
        mtu: u16,
        queues: &[BorrowedFd<'_>],
    ) -> Result<(), VmmError> {
        self.change_slot(slot, &Command::PlugNetworkDevice { slot, mac, mtu }, queues)
            .await
    }

    async fn change_slot(&self, slot: u32, command: &Command, descriptors: &[BorrowedFd<'_>]) -> Result<(), VmmError> {
        let (sender, receiver) = oneshot::channel();
        self.state.slot_requests.lock().insert(slot, sender);
        self.send_and_wait(command, descriptors, receiver).await
    }

    async fn send_and_wait(
        &self,
        command: &Command,
        descriptors: &[BorrowedFd<'_>],
        answer: oneshot::Receiver<Result<(), String>>,
    ) -> Result<(), VmmError> {
        let answer = async {
            self.control.send(command, descriptors).await?;
            answer.await.map_err(|_| ControlError::Closed)
        };
        let answer = tokio::time::timeout(VMM_TIMEOUT, answer).await;
        answer
            .map_err(|_| VmmError::Timeout(VMM_TIMEOUT))??
            .map_err(VmmError::Refused)
    }

    /// Logs the tail of the guest's console, at debug level.
    pub(crate) async fn log_console(&self) {
        if logging::debug_enabled() && !self.has_ended() {
            for line in self.read_console().await.lines() {
                log::debug!("console of the guest of vmm process {}: {line}", self.pid());
            }
        }
    }

    /// The tail of the guest's console, empty if the vmm does not send it within [`CONSOLE_TIMEOUT`].
    pub(crate) async fn read_console(&self) -> String {
        let receiver = add_request(&self.state.console_requests);
        let answer = async {
            self.query(&Command::ReadConsole).await.ok()?;
            receiver.await.ok()
        };
        let console = tokio::time::timeout(CONSOLE_TIMEOUT, answer).await;
        console
            .ok()
            .flatten()
            .as_deref()
            .map(printable_tail)
            .unwrap_or_default()
    }
}

/// Ends a process whose machine cannot be started because of `error`.
async fn discard(child: Child, error: BootError) -> BootError {
    child.kill();
    // The first error is the one to report.
    let _ = child.reap().await;
    error
}

fn channel_error(source: io::Error) -> BootError {
    BootError::Descriptors {
        step: "make the channels",
        source,
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.child.kill();
    }
}
