//! A process of a container as containerd sees it: the first process, or an exec.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, AtomicU32, Ordering},
};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;

use super::lifecycle::{Lifecycle, Phase};
use crate::shim::{
    machine::{Agent, Machine},
    pod::PidHolder,
    stdio::{StandardStreams, StdioSpec},
    tasks::limits::CLOSE_STREAMS_LIMIT,
};

/// A process of a container.
#[derive(Debug)]
pub(crate) struct Process {
    /// containerd's id of an exec; `None` for a container's first process.
    pub(crate) exec: Option<String>,
    /// Its standard streams as containerd specified them.
    pub(crate) stdio_spec: StdioSpec,
    /// Its state.
    pub(crate) lifecycle: Lifecycle,
    state: Mutex<State>,
    streams: OnceLock<StandardStreams>,
    pid: AtomicU32,
    guest_pid: AtomicU32,
    /// Runs it in the guest of a virtual machine.
    agent: OnceLock<Agent>,
    exit_claimed: AtomicBool,
    kill_followed: AtomicBool,
    /// The status that [`Self::abandon`] was called with.
    abandoned: watch::Sender<Option<u32>>,
}

#[derive(Debug, Default)]
struct State {
    pid_holder: Option<Arc<PidHolder>>,
    /// OCI `Process` as JSON, for the start of an exec.
    spec: Vec<u8>,
    /// Columns and rows.
    terminal_size: Option<(u16, u16)>,
    stdin_closed: bool,
}

impl Process {
    /// The first process of a container whose creation has begun.
    pub(crate) fn new_init(stdio_spec: StdioSpec) -> Self {
        Self::new(None, stdio_spec, Lifecycle::creating(), State::default())
    }

    /// An exec that is not started yet. `spec` is an OCI `Process` as JSON.
    pub(crate) fn new_exec(id: String, stdio_spec: StdioSpec, spec: Vec<u8>) -> Self {
        let state = State {
            spec,
            ..State::default()
        };
        Self::new(Some(id), stdio_spec, Lifecycle::created(), state)
    }

    fn new(exec: Option<String>, stdio_spec: StdioSpec, lifecycle: Lifecycle, state: State) -> Self {
        Self {
            exec,
            stdio_spec,
            lifecycle,
            state: Mutex::new(state),
            streams: OnceLock::new(),
            pid: AtomicU32::new(0),
            guest_pid: AtomicU32::new(0),
            agent: OnceLock::new(),
            exit_claimed: AtomicBool::new(false),
            kill_followed: AtomicBool::new(false),
            abandoned: watch::Sender::new(None),
        }
    }

    /// Whether it is an exec that was added and not started: it cannot have exited.
    pub(crate) fn is_unstarted_exec(&self) -> bool {
        self.exec.is_some() && self.lifecycle.phase() == Phase::Created
    }

    /// The pid of the process on the host, 0 before [`Self::set_pid_holder`]. It stays the same after
    /// [`Self::release_pid`].
    pub(crate) fn pid(&self) -> u32 {
        self.pid.load(Ordering::Relaxed)
    }

    /// Sets the process that holds its pid on the host.
    pub(crate) fn set_pid_holder(&self, holder: Arc<PidHolder>) {
        self.pid.store(holder.pid(), Ordering::Relaxed);
        self.state().pid_holder = Some(holder);
    }

    /// The process that holds its pid on the host.
    pub(crate) fn pid_holder(&self) -> Option<Arc<PidHolder>> {
        self.state().pid_holder.clone()
    }

    /// Frees its pid on the host.
    pub(crate) fn release_pid(&self) {
        let holder = self.state().pid_holder.take();
        if let Some(holder) = holder {
            holder.release();
        }
    }

    /// The pid of the process in the guest, 0 before [`Self::set_guest_pid`].
    pub(crate) fn guest_pid(&self) -> u32 {
        self.guest_pid.load(Ordering::Relaxed)
    }

    pub(crate) fn set_guest_pid(&self, pid: u32) {
        self.guest_pid.store(pid, Ordering::Relaxed);
    }

    /// The agent that runs it in the guest of a virtual machine. `None` if the QEMU guest agent does, or before the
    /// start.
    pub(crate) fn agent(&self) -> Option<&Agent> {
        self.agent.get()
    }

    /// Sets the agent that runs it in the guest of a virtual machine, once.
    pub(crate) fn set_agent(&self, agent: Agent) {
        // Called once per process: a process is started at most once.
        let _ = self.agent.set(agent);
    }

    /// The standard streams of the process, once the machine has them.
    pub(crate) fn streams(&self) -> Option<&StandardStreams> {
        self.streams.get()
    }

    /// Sets its standard streams, which the machine has now.
    pub(crate) fn set_streams(&self, streams: StandardStreams) {
        if self.state().stdin_closed {
            streams.close_stdin();
        }
        // Called once per process: a process is started at most once.
        let _ = self.streams.set(streams);
    }

    /// Closes the shim's end of standard input, now or as soon as it exists.
    pub(crate) fn close_stdin(&self) {
        self.state().stdin_closed = true;
        if let Some(streams) = self.streams() {
            streams.close_stdin();
        }
    }

    /// Sets the size with which the terminal will be created: columns and rows.
    pub(crate) fn set_terminal_size(&self, size: (u16, u16)) {
        self.state().terminal_size = Some(size);
    }

    pub(crate) fn terminal_size(&self) -> Option<(u16, u16)> {
        self.state().terminal_size
    }

    /// Takes the spec of an exec, for its start.
    pub(crate) fn take_spec(&self) -> Vec<u8> {
        std::mem::take(&mut self.state().spec)
    }

    /// Claims the right to record the exit. True for the first caller only, because several events may report the
    /// same exit.
    pub(crate) fn try_claim_exit(&self) -> bool {
        !self.exit_claimed.swap(true, Ordering::Relaxed)
    }

    /// Whether [`Self::try_claim_exit`] was called: its exit is or will be recorded.
    pub(crate) fn is_exit_claimed(&self) -> bool {
        self.exit_claimed.load(Ordering::Relaxed)
    }

    /// Claims the task of following its end after SIGKILL. True for the first caller only.
    pub(crate) fn try_claim_kill_follow_up(&self) -> bool {
        !self.kill_followed.swap(true, Ordering::Relaxed)
    }

    /// Stops waiting for the end of an exec in a virtual machine: its exit is recorded with `status`, even if the
    /// process goes on in the guest.
    pub(crate) fn abandon(&self, status: u32) {
        // The first reason counts.
        self.abandoned.send_if_modified(|abandoned| {
            let is_first = abandoned.is_none();
            abandoned.get_or_insert(status);
            is_first
        });
    }

    /// Waits for [`Self::abandon`], and returns its status.
    pub(crate) async fn abandoned(&self) -> u32 {
        let mut receiver = self.abandoned.subscribe();
        loop {
            if let Some(status) = *receiver.borrow_and_update() {
                return status;
            }
            if receiver.changed().await.is_err() {
                // Cannot happen: the sender is a field of `self`, which is borrowed.
                std::future::pending::<()>().await;
            }
        }
    }

    /// At once: bytes in flight are lost. Waits for the vmm for at most [`CLOSE_STREAMS_LIMIT`].
    pub(crate) async fn close_streams(&self, machine: &Machine) {
        if let Some(streams) = self.streams() {
            streams.close(machine, CLOSE_STREAMS_LIMIT).await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}
