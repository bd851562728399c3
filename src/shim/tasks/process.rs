//! A process of a container, as containerd knows it: the first one, or an exec.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, AtomicU32, Ordering},
};

use parking_lot::{Mutex, MutexGuard};

use crate::shim::{
    machine::Machine,
    pod::PidHolder,
    stdio::{StandardStreams, StdioSpec},
    tasks::lifecycle::Lifecycle,
};

/// A process.
#[derive(Debug)]
pub(crate) struct Process {
    /// containerd's id of an exec; `None` for a container's first process.
    pub(crate) exec: Option<String>,
    /// Its standard streams as containerd named them.
    pub(crate) request: StdioSpec,
    /// Where it is.
    pub(crate) lifecycle: Lifecycle,
    state: Mutex<State>,
    streams: OnceLock<StandardStreams>,
    pid: AtomicU32,
    guest_pid: AtomicU32,
    ended: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    holder: Option<Arc<PidHolder>>,
    /// OCI `Process` as JSON, of an exec that was not started yet.
    spec: Vec<u8>,
    size: Option<(u16, u16)>,
    stdin_closed: bool,
}

impl Process {
    /// The first process of a container that is being made.
    pub(crate) fn init(request: StdioSpec) -> Self {
        Self::new(None, request, Lifecycle::creating(), State::default())
    }

    /// An exec that was added.
    pub(crate) fn exec(id: String, request: StdioSpec, spec: Vec<u8>) -> Self {
        let state = State {
            spec,
            ..State::default()
        };
        Self::new(Some(id), request, Lifecycle::added(), state)
    }

    fn new(exec: Option<String>, request: StdioSpec, lifecycle: Lifecycle, state: State) -> Self {
        Self {
            exec,
            request,
            lifecycle,
            state: Mutex::new(state),
            streams: OnceLock::new(),
            pid: AtomicU32::new(0),
            guest_pid: AtomicU32::new(0),
            ended: AtomicBool::new(false),
        }
    }

    /// Its pid on the host, 0 before it has one.
    pub(crate) fn pid(&self) -> u32 {
        self.pid.load(Ordering::Relaxed)
    }

    /// Gives it its pid on the host.
    pub(crate) fn hold(&self, holder: Arc<PidHolder>) {
        self.pid.store(holder.pid(), Ordering::Relaxed);
        self.state().holder = Some(holder);
    }

    /// What holds its pid on the host.
    pub(crate) fn holder(&self) -> Option<Arc<PidHolder>> {
        self.state().holder.clone()
    }

    /// Gives its pid on the host back.
    pub(crate) fn release(&self) {
        let holder = self.state().holder.take();
        if let Some(holder) = holder {
            holder.release();
        }
    }

    /// Its pid in the guest, 0 before it has one.
    pub(crate) fn guest_pid(&self) -> u32 {
        self.guest_pid.load(Ordering::Relaxed)
    }

    /// Sets its pid in the guest.
    pub(crate) fn set_guest_pid(&self, pid: u32) {
        self.guest_pid.store(pid, Ordering::Relaxed);
    }

    /// Its streams, once the machine has them.
    pub(crate) fn streams(&self) -> Option<&StandardStreams> {
        self.streams.get()
    }

    /// Its streams are the machine's now.
    pub(crate) fn set_streams(&self, streams: StandardStreams) {
        if self.state().stdin_closed {
            streams.close_stdin();
        }
        // Once in a life: a start is begun once.
        let _ = self.streams.set(streams);
    }

    /// Closes the shim's end of standard input, now or as soon as there is one.
    pub(crate) fn close_stdin(&self) {
        self.state().stdin_closed = true;
        if let Some(streams) = self.streams() {
            streams.close_stdin();
        }
    }

    /// The terminal's size, for a process that has none yet.
    pub(crate) fn set_size(&self, size: (u16, u16)) {
        self.state().size = Some(size);
    }

    /// What [`Self::set_size`] was told last.
    pub(crate) fn size(&self) -> Option<(u16, u16)> {
        self.state().size
    }

    /// The spec of an exec, for its start.
    pub(crate) fn take_spec(&self) -> Vec<u8> {
        std::mem::take(&mut self.state().spec)
    }

    /// True for the first who reports the end of the process: what follows is done once.
    pub(crate) fn report_end(&self) -> bool {
        !self.ended.swap(true, Ordering::Relaxed)
    }

    /// Closes what is open of its streams.
    pub(crate) async fn close_streams(&self, machine: &Machine) {
        if let Some(streams) = self.streams() {
            streams.close(machine, crate::shim::tasks::CLOSE_LIMIT).await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}
