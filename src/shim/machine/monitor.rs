//! The task that receives the vmm's notices and follows a machine to its end, and the state that it shares with
//! [`Machine`](super::Machine).

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;

use std::{
    collections::HashMap,
    future::Future,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot, watch};

use super::{
    async_channel::AsyncChannel,
    boot::BootDisk,
    console::{printable_line, printable_tail},
    exit::{EndRequest, MAX_REASON, MachineExit, describe_death, describe_end, find_panic},
    stderr::{STDERR_TIMEOUT, StderrLog},
    streams::StreamTable,
};
use crate::{
    control::{ControlError, EndReason, MAX_WARNING, MachineStatistics, MemoryState, Notice, RateLimit},
    shim::child::Child,
};

/// How long the vmm may take to report why it ends, once the agent or the file server that it serves has ended.
pub(crate) const FINAL_NOTICE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long to receive the notices of a vmm that has ended. All of them are in the socket's buffer by then. A process
/// that a compromised vmm has forked can keep the channel open, and can go on sending.
const DEAD_NOTICES_TIMEOUT: Duration = Duration::from_millis(100);

/// How long a killed vmm may take to end. A disk whose file system hangs can keep it in an uninterruptible call.
const REAP_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 5 });

/// How many warnings of a vmm are logged at once, and how often one is logged after that.
const WARNING_BURST: u32 = 50;
const WARNING_INTERVAL: Duration = Duration::from_secs(1);

/// The maximum number of devices in the statistics of a machine.
const MAX_DEVICES: usize = 64;

/// The maximum length of the name of a device, in characters.
const MAX_DEVICE_NAME: usize = 64;

/// What ended a machine, unless the shim did.
enum Ending {
    Reported(EndReason),
    AgentGone(String),
}

impl Ending {
    fn describe(self) -> String {
        match self {
            Self::Reported(reason) => describe_end(&reason),
            Self::AgentGone(reason) => reason,
        }
    }
}

/// Receives the vmm's answer to one request: `Err` is its reason for refusing.
type AnswerSender = oneshot::Sender<Result<(), String>>;

/// The state that [`run`] updates. A dropped sender means that the machine has ended. Those for the console and for the
/// progress of the boot are not dropped then: their callers wait with a deadline.
#[derive(Debug)]
pub(super) struct MachineState {
    pub(super) streams: StreamTable,
    /// Callers that wait for the console.
    pub(super) console_requests: Mutex<Vec<oneshot::Sender<Vec<u8>>>>,
    /// Callers that wait for the progress of the boot.
    pub(super) progress_requests: Mutex<Vec<oneshot::Sender<u64>>>,
    /// Callers that wait for the statistics of the machine.
    pub(super) statistics_requests: Mutex<Vec<oneshot::Sender<MachineStatistics>>>,
    /// Callers that wait for the state of the guest agent's port.
    pub(super) port_requests: Mutex<Vec<oneshot::Sender<bool>>>,
    /// Callers that wait for the state of the guest's memory.
    pub(super) memory_requests: Mutex<Vec<oneshot::Sender<MemoryState>>>,
    /// Callers that plug or unplug a device, by slot on the bus.
    pub(super) slot_requests: Mutex<HashMap<u32, AnswerSender>>,
    /// The caller that boots a user's kernel.
    pub(super) boot_request: Mutex<Option<oneshot::Sender<()>>>,
    /// The vmm waits for its boot command, which must be the first one.
    pub(super) awaits_boot: AtomicBool,
    /// The caller that changes the machine's size.
    pub(super) resize_request: Mutex<Option<AnswerSender>>,
    /// How much memory the guest has beyond its boot memory, in bytes, as the vmm reported it when the guest had
    /// reached the requested size. `None` while the guest has not reached it.
    pub(super) plugged_memory: watch::Sender<Option<u64>>,
    /// The files behind the disks, by serial.
    pub(super) disk_paths: Mutex<HashMap<String, PathBuf>>,
    warnings: Mutex<RateLimit<()>>,
    /// The first decision of the shim to end the machine.
    pub(super) end_request: Mutex<Option<EndRequest>>,
    /// Wakes [`run`] after the first decision.
    pub(super) end_requested: Notify,
    /// Set once, when the process is gone.
    pub(super) exit: watch::Sender<Option<Arc<MachineExit>>>,
}

/// Adds a caller to those that wait for a notice. Removes callers that have given up, because a vmm may never answer.
pub(super) fn add_request<T>(requests: &Mutex<Vec<oneshot::Sender<T>>>) -> oneshot::Receiver<T> {
    let (sender, receiver) = oneshot::channel();
    let mut requests = requests.lock();
    requests.retain(|request| !request.is_closed());
    requests.push(sender);
    receiver
}

impl MachineState {
    pub(super) fn new() -> Self {
        Self {
            streams: StreamTable::default(),
            console_requests: Mutex::default(),
            progress_requests: Mutex::default(),
            statistics_requests: Mutex::default(),
            port_requests: Mutex::default(),
            memory_requests: Mutex::default(),
            slot_requests: Mutex::default(),
            boot_request: Mutex::default(),
            awaits_boot: AtomicBool::new(false),
            resize_request: Mutex::default(),
            plugged_memory: watch::Sender::new(None),
            disk_paths: Mutex::default(),
            warnings: Mutex::new(RateLimit::new(WARNING_BURST, WARNING_INTERVAL)),
            end_request: Mutex::default(),
            end_requested: Notify::new(),
            exit: watch::Sender::new(None),
        }
    }
}

impl MachineState {
    /// Records the files behind the disks that a machine boots with.
    pub(super) fn record_disks<'a>(&self, disks: impl Iterator<Item = (String, &'a BootDisk)>) {
        let paths = disks.map(|(serial, disk)| (serial, disk.path().to_owned()));
        self.disk_paths.lock().extend(paths);
    }

    /// Logs a warning of the vmm. The vmm limits their number too, but a guest may control it.
    fn warn(&self, device: &str, text: &str) {
        let Some(suppressed) = self.warnings.lock().admit((), Instant::now()) else {
            return;
        };
        let text = printable_line(text, MAX_WARNING);
        match self.disk_paths.lock().get(device) {
            Some(path) => log::warn!("disk {}: {text}", path.display()),
            None => log::warn!("{}: {text}", printable_line(device, MAX_DEVICE_NAME)),
        }
        if suppressed > 0 {
            log::warn!("{suppressed} warnings of the virtual machine were dropped");
        }
    }
}

/// Follows the machine to its end: kills and reaps its process, and publishes the reason. If the process does not end
/// in time, the reason is published first. `agent_end` completes with a reason when the stream to the agent has ended.
pub(super) async fn run(
    state: &MachineState,
    control: &AsyncChannel,
    child: &Child,
    stderr: OwnedFd,
    agent_end: impl Future<Output = String>,
) {
    let stderr = StderrLog::start(stderr, "vmm", child.pid());
    let agent_gone = async {
        let reason = agent_end.await;
        tokio::time::sleep(FINAL_NOTICE_TIMEOUT).await;
        reason
    };
    let vmm_gone = async {
        // `Child::reap` below reports a failure.
        let _ = child.wait().await;
        tokio::time::sleep(DEAD_NOTICES_TIMEOUT).await;
    };
    let vmm_stays = async {
        state.end_requested.notified().await;
        tokio::time::sleep(REAP_LIMIT).await;
    };
    // All branches but the first are exempt from Tokio's budget: a flood of notices uses it up whenever this task runs,
    // and the others would never complete.
    let (ending, console) = tokio::select! {
        biased;
        ended = receive_notices(state, control) => match ended {
            Some((reason, console)) => (Some(Ending::Reported(reason)), console),
            None => (None, Vec::new()),
        },
        reason = tokio::task::unconstrained(agent_gone) => (Some(Ending::AgentGone(reason)), Vec::new()),
        () = tokio::task::unconstrained(vmm_gone) => (None, Vec::new()),
        () = tokio::task::unconstrained(vmm_stays) => (None, Vec::new()),
    };
    child.kill();
    let status = tokio::time::timeout(REAP_LIMIT, child.reap()).await;
    let stderr = stderr.finish(STDERR_TIMEOUT).await;
    let end_request = state.end_request.lock().take();
    let requested = end_request.as_ref().is_some_and(|request| request.requested);
    let reported = match &ending {
        Some(Ending::Reported(reason)) if end_request.is_none() => Some(reason.clone()),
        _ => None,
    };
    let reason = end_request
        .map(|request| request.reason)
        .or_else(|| ending.map(Ending::describe))
        .unwrap_or_else(|| match &status {
            Ok(Ok(status)) => describe_death(*status, &stderr),
            Ok(Err(error)) => format!("cannot reap the vmm process: {error}"),
            Err(_) => "the virtual machine's process does not end: a disk of this host hangs".to_owned(),
        });
    state.streams.close_all();
    state.slot_requests.lock().clear();
    state.statistics_requests.lock().clear();
    state.port_requests.lock().clear();
    state.memory_requests.lock().clear();
    state.boot_request.lock().take();
    state.resize_request.lock().take();
    state.exit.send_replace(Some(Arc::new(MachineExit {
        reason,
        requested,
        reported,
        console: printable_tail(&console),
        panic: find_panic(&console),
    })));
    if status.is_err() {
        log::warn!(
            "vmm process {} does not end after SIGKILL: a disk of this host hangs",
            child.pid()
        );
        if let Err(error) = child.reap().await {
            log::warn!("cannot reap the vmm process {}: {error}", child.pid());
        }
    }
}

/// Handles notices until the last one. `None` if the channel ends without [`Notice::Ended`].
async fn receive_notices(state: &MachineState, control: &AsyncChannel) -> Option<(EndReason, Vec<u8>)> {
    loop {
        // Failures to forward an answer are ignored: the receiver may have timed out.
        match control.receive().await {
            Ok(Notice::Drained { port }) => state.streams.mark_drained(port),
            Ok(Notice::StreamClosed { port }) => state.streams.mark_closed(port),
            Ok(Notice::Console(console)) => {
                let waiting = std::mem::take(&mut *state.console_requests.lock());
                for sender in waiting {
                    let _ = sender.send(console.clone());
                }
            }
            Ok(Notice::Progress { count }) => {
                for sender in state.progress_requests.lock().drain(..) {
                    let _ = sender.send(count);
                }
            }
            Ok(Notice::Statistics(statistics)) => {
                let statistics = checked(statistics);
                for sender in state.statistics_requests.lock().drain(..) {
                    let _ = sender.send(statistics.clone());
                }
            }
            Ok(Notice::GuestAgentPort { open }) => {
                for sender in state.port_requests.lock().drain(..) {
                    let _ = sender.send(open);
                }
            }
            Ok(Notice::GuestMemory(memory)) => {
                for sender in state.memory_requests.lock().drain(..) {
                    let _ = sender.send(memory);
                }
            }
            Ok(Notice::Built) => {
                if let Some(sender) = state.boot_request.lock().take() {
                    let _ = sender.send(());
                }
            }
            Ok(Notice::Plugged { slot, result }) => answer(state.slot_requests.lock().remove(&slot), result),
            Ok(Notice::Unplugged { slot }) => answer(state.slot_requests.lock().remove(&slot), Ok(())),
            Ok(Notice::Resized { result }) => {
                // An earlier value belongs to another size.
                state.plugged_memory.send_replace(None);
                answer(state.resize_request.lock().take(), result);
            }
            Ok(Notice::MemoryPlugged { bytes }) => drop(state.plugged_memory.send_replace(Some(bytes))),
            Ok(Notice::Warning { device, text }) => state.warn(&device, &text),
            Ok(Notice::Ended { reason, console }) => return Some((reason, console)),
            Err(ControlError::Closed) => return None,
            Err(error) => {
                log::warn!("cannot receive from the vmm: {error}");
                return None;
            }
        }
    }
}

/// Limits what a vmm that a guest controls can report: the number of devices, and their names.
fn checked(mut statistics: MachineStatistics) -> MachineStatistics {
    statistics.devices.truncate(MAX_DEVICES);
    for device in &mut statistics.devices {
        device.name = printable_line(&device.name, MAX_DEVICE_NAME);
    }
    statistics
}

fn answer(request: Option<AnswerSender>, result: Result<(), String>) {
    if let Some(sender) = request {
        let result = result.map_err(|reason| printable_line(&reason, MAX_REASON));
        // The receiver may have timed out.
        let _ = sender.send(result);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_that_gave_up_are_not_kept() {
        let requests = Mutex::default();
        let waiting = add_request::<u64>(&requests);
        for _ in 0..10 {
            drop(add_request(&requests));
        }
        assert_eq!(requests.lock().len(), 2, "the one that waits, and the last one");
        drop(waiting);
    }
}
