//! The machine of a pod, as the shim sees it: a vmm process behind a control channel, and the agent
//! in its guest.
//!
//! Lives here: starting the process, its streams, its end. May not live here: what a container is;
//! whoever uses a machine asks the [`Agent`] for that. Used by [`super::pod`].

mod agent;
mod boot;
mod clock;
mod control;
mod deadline;
mod streams;

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    io,
    os::fd::{BorrowedFd, OwnedFd},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};

use nutshell_protocol::{Event, FIRST_DISK_SLOT, Ready};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe::Receiver,
    sync::{oneshot, watch},
};

pub(crate) use self::{
    agent::{Agent, AgentError},
    boot::{Boot, BootError, DiskFile, GuestResources, open_disk, open_kvm},
    streams::Stream,
};
use self::{clock::Jumps, control::Control, deadline::RunTimeDeadline, streams::Streams};
use super::{
    child::{Child, WaitStatus},
    logging,
};
use crate::{
    control::{Channel, Command, ControlError, EndReason, Notice},
    jail, vmm,
};

/// How long the vmm may take to say why, once something that it serves has ended.
pub(crate) const LAST_WORDS: Duration = Duration::from_secs(1);

/// How long the vmm may take to send the guest's console.
const CONSOLE_TIMEOUT: Duration = Duration::from_secs(1);

/// How much of what a vmm writes to its standard error is logged, in bytes: it may be a guest's.
const STDERR_LIMIT: usize = 16 << 10;

/// A vmm process that was started and waits for its first command.
#[derive(Debug)]
pub(crate) struct VmmProcess {
    /// The process.
    pub(crate) child: Child,
    /// The shim's end.
    pub(crate) control: Channel,
    /// What the process writes to its standard error.
    pub(crate) stderr: OwnedFd,
}

impl VmmProcess {
    /// Starts the process. To be called on the shim's main thread, with whose end the kernel kills
    /// it. Needs the runtime.
    pub(crate) fn spawn() -> io::Result<Self> {
        let (control, theirs) = Channel::pair().map_err(io::Error::other)?;
        let (stderr, writer) = io::pipe()?;
        let child = jail::build_command(vmm::ROLE)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(writer)
            .spawn()?;
        Ok(Self {
            child: Child::from_std(&child)?,
            control,
            stderr: stderr.into(),
        })
    }

    /// Ends the process of a machine that is not to be.
    pub(crate) async fn discard(self) {
        self.child.kill();
        if let Err(error) = self.child.reap().await {
            log::warn!("wait for the process of a virtual machine: {error}");
        }
    }
}

/// Why and with what last words a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ending {
    reason: String,
    /// Somebody wanted that.
    asked: bool,
    console: String,
}

impl fmt::Display for Ending {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.reason)?;
        if !self.console.is_empty() {
            write!(formatter, "; the end of the guest's console:\n{}", self.console)?;
        }
        Ok(())
    }
}

/// Why the shim ended a machine.
#[derive(Debug)]
struct Verdict {
    reason: String,
    asked: bool,
}

/// A running machine. It ends when [`Self::kill`] is called, when the last reference is dropped, or
/// by itself; [`Self::ended`] tells.
#[derive(Debug)]
pub(crate) struct Machine {
    agent: Agent,
    child: Arc<Child>,
    control: Arc<Control>,
    shared: Arc<Shared>,
}

/// What the task that listens to the vmm keeps up to date.
#[derive(Debug)]
struct Shared {
    streams: Streams,
    console: Mutex<Vec<oneshot::Sender<Vec<u8>>>>,
    /// Who waits for the answer about a slot.
    slots: Mutex<HashMap<u32, oneshot::Sender<Result<(), String>>>>,
    /// Who waits for the answer about the machine's size.
    resize: Mutex<Option<oneshot::Sender<Result<(), String>>>>,
    /// How much memory the guest had beyond what it booted with, in bytes, when it last had what it should.
    plugged: watch::Sender<Option<u64>>,
    /// Why it is being ended, where the shim decided so.
    verdict: Mutex<Option<Verdict>>,
    ended: watch::Sender<Option<Arc<Ending>>>,
}

impl Machine {
    /// Tells `vmm` to build the machine and to boot it. Returns before it has; [`Self::ready`]
    /// follows. `on_event` gets the agent's events in order, and does not block.
    pub(crate) async fn start(
        vmm: VmmProcess,
        boot: Boot,
        on_event: impl FnMut(Event) + Send + 'static,
    ) -> Result<Self, BootError> {
        let VmmProcess { child, control, stderr } = vmm;
        match Self::speak(control, boot, on_event) {
            Ok((control, agent, agent_end)) => Ok(Self::watch(child, stderr, control, agent, agent_end)),
            Err(error) => {
                child.kill();
                // Its parent's error is the one that counts.
                let _ = child.reap().await;
                Err(BootError::Descriptors(error))
            }
        }
    }

    fn speak(
        control: Channel,
        boot: Boot,
        on_event: impl FnMut(Event) + Send + 'static,
    ) -> io::Result<(Arc<Control>, Agent, impl Future<Output = String> + Send + 'static)> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        let control = Arc::new(Control::new(control)?);
        let (agent, agent_end) = Agent::start(ours, on_event)?;
        let (command, descriptors) = boot.into_command(theirs.into());
        // The socket is empty: this packet need not wait. If the process is gone already, its end
        // tells more than this failure.
        if let Err(error) = control.try_send(&command, &descriptors) {
            log::warn!("boot a virtual machine: {error}");
        }
        Ok((control, agent, agent_end))
    }

    fn watch(
        child: Child,
        stderr: OwnedFd,
        control: Arc<Control>,
        agent: Agent,
        agent_end: impl Future<Output = String> + Send + 'static,
    ) -> Self {
        let child = Arc::new(child);
        let shared = Arc::new(Shared {
            streams: Streams::default(),
            console: Mutex::default(),
            slots: Mutex::default(),
            resize: Mutex::default(),
            plugged: watch::Sender::new(None),
            verdict: Mutex::default(),
            ended: watch::Sender::new(None),
        });
        tokio::spawn({
            let (child, control, shared) = (child.clone(), control.clone(), shared.clone());
            async move { listen(&shared, &control, &child, stderr, agent_end).await }
        });
        match Jumps::watch() {
            Ok(jumps) => drop(tokio::spawn(keep_time(jumps, agent.clone(), shared.ended.subscribe()))),
            Err(error) => log::warn!("watch the host's clock: {error}"),
        }
        Self {
            agent,
            child,
            control,
            shared,
        }
    }

    /// Speaks with the guest.
    pub(crate) fn agent(&self) -> &Agent {
        &self.agent
    }

    /// The vmm's pid.
    pub(crate) fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Waits until the agent takes requests. A guest that does not get there in `limit` of time in
    /// which it could run is killed.
    pub(crate) async fn ready(&self, limit: Duration) -> Result<Ready, Arc<Ending>> {
        let deadline = RunTimeDeadline::with(self.pid(), limit);
        let late = tokio::select! {
            biased;
            ready = self.agent.ready() => return Ok(ready),
            ending = self.ended() => return Err(ending),
            late = deadline.exhausted() => late,
        };
        let console = self.console().await;
        self.kill(&format!(
            "the guest did not become ready within {} s",
            limit.as_secs_f32()
        ));
        let ending = self.ended().await;
        log::debug!("machine {}: waited {late:?} for the agent", self.pid());
        Err(Arc::new(Ending {
            reason: ending.reason.clone(),
            asked: ending.asked,
            console,
        }))
    }

    /// Runs `future`, at most for `limit` of time in which the machine could have run: `None` then.
    pub(crate) async fn within<T>(&self, limit: Duration, future: impl Future<Output = T>) -> Option<T> {
        let deadline = RunTimeDeadline::with(self.pid(), limit);
        tokio::select! {
            biased;
            output = future => Some(output),
            _ = deadline.exhausted() => None,
        }
    }

    /// Waits for the machine's end: the process is gone then.
    pub(crate) async fn ended(&self) -> Arc<Ending> {
        let mut receiver = self.shared.ended.subscribe();
        loop {
            if let Some(ending) = receiver.borrow_and_update().clone() {
                return ending;
            }
            if receiver.changed().await.is_err() {
                // The sender is borrowed with `self`.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Whether it has ended by [`Self::stop`].
    pub(crate) fn was_stopped(&self) -> bool {
        self.shared.ended.borrow().as_ref().is_some_and(|ending| ending.asked)
    }

    /// Ends the machine, whatever it is doing, because something is wrong, which errors will tell.
    pub(crate) fn kill(&self, reason: &str) {
        self.end(reason, false);
    }

    /// Ends the machine, whatever it is doing, because somebody asked for that.
    pub(crate) fn stop(&self, reason: &str) {
        self.end(reason, true);
    }

    fn end(&self, reason: &str, asked: bool) {
        let mut verdict = self.shared.verdict.lock();
        verdict.get_or_insert_with(|| Verdict {
            reason: reason.to_owned(),
            asked,
        });
        drop(verdict);
        self.child.kill();
    }

    /// Lets the guest open one stream: its bytes come from `input` and go to `output`.
    pub(crate) async fn open_stream(
        &self,
        input: Option<BorrowedFd<'_>>,
        output: Option<BorrowedFd<'_>>,
    ) -> Result<Stream, ControlError> {
        let stream = self.shared.streams.add();
        let command = Command::OpenStream {
            port: stream.port(),
            input: input.is_some(),
            output: output.is_some(),
        };
        let descriptors: Vec<_> = input.into_iter().chain(output).collect();
        self.control.send(&command, &descriptors).await?;
        Ok(stream)
    }

    /// Waits until `bytes` in all were delivered to the output of `stream`, or it is closed.
    pub(crate) async fn drained(&self, stream: &mut Stream, bytes: u64) {
        if bytes == 0 || stream.is_closed() {
            return;
        }
        let port = stream.port();
        // A vmm that is gone has closed all streams.
        if self.control.send(&Command::Drain { port, bytes }, &[]).await.is_ok() {
            stream.drained().await;
        }
    }

    /// Closes a stream at once, whatever is in flight.
    pub(crate) async fn close_stream(&self, stream: &Stream) {
        if !stream.is_closed() {
            // A vmm that is gone has closed all streams.
            let _ = self
                .control
                .send(&Command::CloseStream { port: stream.port() }, &[])
                .await;
        }
    }

    /// Puts a disk into a disk slot that was free. Inside, why the vmm could not.
    pub(crate) async fn plug_disk(
        &self,
        slot: u32,
        read_only: bool,
        file: BorrowedFd<'_>,
    ) -> Result<Result<(), String>, ControlError> {
        let command = Command::PlugDisk { slot, read_only };
        self.plug(FIRST_DISK_SLOT.saturating_add(slot), &command, &[file]).await
    }

    /// Takes a disk out of its slot, once the guest has let go of it.
    pub(crate) async fn unplug_disk(&self, slot: u32) -> Result<(), ControlError> {
        let command = Command::UnplugDisk { slot };
        let unplugged = self.plug(FIRST_DISK_SLOT.saturating_add(slot), &command, &[]).await?;
        unplugged.map_err(|_| ControlError::Malformed)
    }

    /// Puts a network device into an empty slot; `queues` are those of its tap device. Inside, why the
    /// vmm could not.
    pub(crate) async fn plug_link(
        &self,
        slot: u32,
        mac: [u8; 6],
        mtu: u16,
        queues: &[BorrowedFd<'_>],
    ) -> Result<Result<(), String>, ControlError> {
        self.plug(slot, &Command::PlugLink { slot, mac, mtu }, queues).await
    }

    async fn plug(
        &self,
        slot: u32,
        command: &Command,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Result<(), String>, ControlError> {
        let (sender, receiver) = oneshot::channel();
        self.shared.slots().insert(slot, sender);
        self.control.send(command, descriptors).await?;
        receiver.await.map_err(|_| ControlError::Closed)
    }

    /// Changes the size of the machine, as [`Command::Resize`] says; one call at a time. Inside, why the vmm
    /// could not. The guest has to be told.
    pub(crate) async fn resize(&self, memory: u64, vcpus: u8) -> Result<Result<(), String>, ControlError> {
        let (sender, receiver) = oneshot::channel();
        *self.shared.resize() = Some(sender);
        self.control.send(&Command::Resize { memory, vcpus }, &[]).await?;
        receiver.await.map_err(|_| ControlError::Closed)
    }

    /// Waits until the guest has `bytes` of memory beyond what it booted with.
    pub(crate) async fn memory_plugged(&self, bytes: u64) {
        let mut plugged = self.shared.plugged.subscribe();
        if plugged.wait_for(|plugged| *plugged == Some(bytes)).await.is_err() {
            // The sender is borrowed with `self`.
            std::future::pending::<()>().await;
        }
    }

    /// Puts the end of the guest's console into the log, where that is to say all.
    pub(crate) async fn log_console(&self) {
        if logging::debug_enabled() {
            for line in self.console().await.lines() {
                log::debug!("console of virtual machine {}: {line}", self.pid());
            }
        }
    }

    /// The end of the guest's console, empty if the vmm does not send it.
    async fn console(&self) -> String {
        let (sender, receiver) = oneshot::channel();
        self.shared.console.lock().push(sender);
        let asked = async {
            self.control.send(&Command::ReadConsole, &[]).await.ok()?;
            receiver.await.ok()
        };
        let console = tokio::time::timeout(CONSOLE_TIMEOUT, asked).await;
        console.ok().flatten().as_deref().map(readable).unwrap_or_default()
    }
}

impl Shared {
    fn resize(&self) -> MutexGuard<'_, Option<oneshot::Sender<Result<(), String>>>> {
        self.resize.lock()
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<u32, oneshot::Sender<Result<(), String>>>> {
        self.slots.lock()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.child.kill();
    }
}

/// Has the guest's clock follow the host's until the machine ends.
async fn keep_time(jumps: Jumps, agent: Agent, mut ended: watch::Receiver<Option<Arc<Ending>>>) {
    tokio::select! {
        _ = ended.changed() => {}
        result = jumps.follow(&agent) => {
            if let Err(error) = result {
                log::warn!("watch the host's clock: {error}");
            }
        }
    }
}

/// Follows the machine to its end.
async fn listen(
    shared: &Shared,
    control: &Control,
    child: &Child,
    stderr: OwnedFd,
    agent_end: impl Future<Output = String>,
) {
    let stderr = tokio::spawn(log_stderr(stderr, child.pid()));
    let agent_gone = async {
        let reason = agent_end.await;
        tokio::time::sleep(LAST_WORDS).await;
        reason
    };
    let (reason, console) = tokio::select! {
        biased;
        last = notices(shared, control) => last.map_or((None, Vec::new()), |(reason, console)| (Some(describe(&reason)), console)),
        reason = agent_gone => (Some(reason), Vec::new()),
    };
    child.kill();
    let how = child.reap().await;
    let said = stderr.await.unwrap_or_default();
    let verdict = shared.verdict.lock().take();
    let asked = verdict.as_ref().is_some_and(|verdict| verdict.asked);
    let verdict = verdict.map(|verdict| verdict.reason);
    let reason = verdict.or(reason).unwrap_or_else(|| match how {
        Ok(how) => died("the virtual machine's process", how, &said),
        Err(error) => format!("wait for the virtual machine's process: {error}"),
    });
    shared.streams.close_all();
    shared.slots().clear();
    shared.resize().take();
    shared.ended.send_replace(Some(Arc::new(Ending {
        reason,
        asked,
        console: readable(&console),
    })));
}

/// Hears the vmm out. `None` if it ends without a word.
async fn notices(shared: &Shared, control: &Control) -> Option<(EndReason, Vec<u8>)> {
    loop {
        match control.receive().await {
            Ok(Notice::Drained { port }) => shared.streams.drained(port),
            Ok(Notice::StreamClosed { port }) => shared.streams.closed(port),
            Ok(Notice::Console(console)) => {
                let waiting = std::mem::take(&mut *shared.console.lock());
                for sender in waiting {
                    // Whoever stopped waiting does not miss it.
                    let _ = sender.send(console.clone());
                }
            }
            Ok(Notice::Plugged { slot, result }) => {
                if let Some(sender) = shared.slots().remove(&slot) {
                    // Whoever stopped waiting does not miss it.
                    let _ = sender.send(result);
                }
            }
            Ok(Notice::Unplugged { slot }) => {
                if let Some(sender) = shared.slots().remove(&slot) {
                    // Whoever stopped waiting does not miss it.
                    let _ = sender.send(Ok(()));
                }
            }
            Ok(Notice::Resized { result }) => {
                // What was said before is of another size.
                shared.plugged.send_replace(None);
                if let Some(sender) = shared.resize().take() {
                    // Whoever stopped waiting does not miss it.
                    let _ = sender.send(result);
                }
            }
            Ok(Notice::MemoryPlugged { bytes }) => drop(shared.plugged.send_replace(Some(bytes))),
            Ok(Notice::Ended { reason, console }) => return Some((reason, console)),
            Err(ControlError::Closed) => return None,
            Err(error) => {
                log::warn!("virtual machine: {error}");
                return None;
            }
        }
    }
}

fn describe(reason: &EndReason) -> String {
    match reason {
        EndReason::BuildFailed(text) => format!("cannot build the virtual machine: {text}"),
        EndReason::GuestReset => "the guest reset itself: its kernel or its agent gave up".to_owned(),
        EndReason::KvmFailed(text) => format!("KVM cannot run the guest: {text}"),
        EndReason::DeviceFailed(text) => format!("a device of the virtual machine failed: {text}"),
    }
}

fn died(what: &str, how: WaitStatus, said: &str) -> String {
    match said.trim() {
        "" => format!("{what} {how}"),
        said => format!("{what} {how}: {said}"),
    }
}

/// Logs what the process says, and returns it, both cut at a limit.
async fn log_stderr(stderr: OwnedFd, pid: u32) -> String {
    let Ok(mut stderr) = Receiver::from_owned_fd(stderr) else {
        return String::new();
    };
    let mut said = Vec::new();
    let mut bytes = [0; 1024];
    while let Ok(length @ 1..) = stderr.read(&mut bytes).await {
        let room = STDERR_LIMIT - said.len();
        let new = &bytes[..length.min(room)];
        for line in readable(new).lines() {
            log::warn!("virtual machine {pid}: {line}");
        }
        said.extend_from_slice(new);
    }
    readable(&said)
}

/// The last lines of what a guest wrote, without what a terminal would obey.
fn readable(bytes: &[u8]) -> String {
    const LINES: usize = 24;
    let text: String = String::from_utf8_lossy(bytes)
        .chars()
        .filter(|character| !character.is_control() || *character == '\n')
        .collect();
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
