//! Processes that do not end although the guest has sent them SIGKILL. Usually they wait in the guest's kernel, for
//! example for a volume whose file system on the host hangs, and nothing but its answer or the end of the machine ends
//! them. A guest that is slow, or whose agent lies, is waited for no longer than [`SURVIVAL_LIMIT`].

use std::{collections::BTreeMap, fmt, sync::Arc};

use nutshell_protocol::{BlockedThread, Request, Response};

use super::{
    container::{
        Container, Role,
        lifecycle::{Exit, SIGKILL_STATUS},
        process::Process,
    },
    delete::delete_from_guest,
    limits::{BLOCKED_INTERVAL, KILL_LIMIT, SURVIVAL_LIMIT},
    table::Tasks,
};
use crate::shim::machine::printable_line;

/// The maximum length of the name of a thread (kernel, `TASK_COMM_LEN`), with room for escapes.
const MAX_NAME: usize = 32;

/// Why the shim no longer waits for the end of a process.
#[derive(Debug)]
enum GiveUpReason {
    /// These threads are blocked in the guest's kernel.
    Blocked(Vec<BlockedThread>),
    /// [`SURVIVAL_LIMIT`] has passed.
    TimedOut,
}

/// The end of a sentence that starts with "SIGKILL did not end the process".
impl fmt::Display for GiveUpReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blocked(threads) => write!(
                formatter,
                "because these processes are blocked in the guest's kernel ({}): look for a volume that does not answer",
                describe(threads)
            ),
            Self::TimedOut => write!(
                formatter,
                "within {} s, although the guest reports no blocked process: its kernel is very slow, or its agent does \
                 not work",
                SURVIVAL_LIMIT.as_secs()
            ),
        }
    }
}

impl Tasks {
    /// Follows a process that was sent SIGKILL. If it is blocked in the guest's kernel, or has not ended within
    /// [`SURVIVAL_LIMIT`], its exit is recorded nevertheless: the machine of a single container is ended, and a process
    /// of a pod's container stays in the guest, so that the other containers go on. Spawns at most one Tokio task
    /// per process.
    pub(super) fn follow_kill(self: &Arc<Self>, container: &Arc<Container>, process: &Arc<Process>) {
        if !process.try_claim_kill_follow_up() {
            return;
        }
        let (tasks, container, process) = (self.clone(), container.clone(), process.clone());
        tokio::spawn(async move {
            let machine = container.pod.machine();
            tokio::select! {
                _ = process.lifecycle.wait_exit() => {}
                _ = machine.ended() => {}
                reason = give_up_reason(&container, &process) => {
                    tasks.give_up(&container, &process, &reason).await;
                }
            }
        });
    }

    /// Records the exit of a process that has not ended.
    async fn give_up(&self, container: &Container, process: &Process, reason: &GiveUpReason) {
        if process.is_exit_claimed() {
            // The process has ended, and its output is being delivered.
            return;
        }
        let (id, exec) = (&container.id, process.exec.as_deref());
        if exec.is_none() && matches!(container.role, Role::Single { .. }) {
            let machine = container.pod.machine();
            machine.kill(&format!("SIGKILL did not end its container {reason}"));
            return;
        }
        let whose = exec.map_or_else(|| format!("task {id}"), |exec| format!("task {id}, exec {exec}"));
        log::warn!(
            "{whose}: SIGKILL did not end its process {reason}. Its exit is reported as {SIGKILL_STATUS}, and its \
             processes stay in the guest until they can end or the virtual machine ends"
        );
        container.abandon();
        if exec.is_none() {
            self.record_killed_exits(container).await;
            // Deleted now and not only at Delete: at its shutdown, the guest removes the containers that it still has,
            // and would wait for these processes before it writes its disks back.
            delete_from_guest(container).await;
        } else if process.try_claim_exit() {
            self.record_exit(container, process, Exit::now(SIGKILL_STATUS)).await;
        }
    }
}

/// Waits until the shim must no longer wait for the end of a process that was sent SIGKILL.
async fn give_up_reason(container: &Container, process: &Process) -> GiveUpReason {
    match tokio::time::timeout(SURVIVAL_LIMIT, blocked_threads(container, process)).await {
        Ok(threads) => GiveUpReason::Blocked(threads),
        Err(_) => GiveUpReason::TimedOut,
    }
}

/// Waits until a process that was sent SIGKILL is blocked, and returns the threads that keep it from ending. A thread
/// counts only if it stays in the same wait: one that a slow disk delays makes progress. Kills a guest that does not
/// answer.
async fn blocked_threads(container: &Container, process: &Process) -> Vec<BlockedThread> {
    loop {
        tokio::time::sleep(KILL_LIMIT).await;
        let before = ask_for_blocked_threads(container, process).await;
        if before.is_empty() {
            continue;
        }
        tokio::time::sleep(BLOCKED_INTERVAL).await;
        if ask_for_blocked_threads(container, process).await == before {
            return before;
        }
    }
}

/// Asks the agent which threads of a process are blocked. Empty if there are none, or if the process or the machine has
/// ended. Kills the machine if the agent does not answer.
async fn ask_for_blocked_threads(container: &Container, process: &Process) -> Vec<BlockedThread> {
    let machine = container.pod.machine();
    let request = Request::BlockedThreads {
        container: container.id.to_string(),
        exec: process.exec.clone(),
    };
    match tokio::time::timeout(KILL_LIMIT, machine.agent().request(request)).await {
        Ok(Ok(Response::BlockedThreads(threads))) => threads,
        // The process has ended, and its exit follows, or the machine has ended.
        Ok(_) => Vec::new(),
        Err(_) => {
            machine.kill(&format!(
                "a process did not end after SIGKILL, and the guest did not report its state within {} s",
                KILL_LIMIT.as_secs()
            ));
            Vec::new()
        }
    }
}

/// The names and pids of the processes of these threads.
fn describe(threads: &[BlockedThread]) -> String {
    let processes: BTreeMap<_, _> = threads.iter().map(|thread| (thread.pid, &thread.name)).collect();
    let processes: Vec<_> = processes
        .into_iter()
        .map(|(pid, name)| format!("{} with guest pid {pid}", printable_line(name, MAX_NAME)))
        .collect();
    processes.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_blocked_process_is_described_once_and_its_name_is_escaped() {
        let thread = |pid, thread, name: &str| BlockedThread {
            pid,
            thread,
            name: name.to_owned(),
            switches: 0,
        };
        let threads = [thread(7, 7, "dd"), thread(7, 8, "dd"), thread(9, 9, "\x1b[2J")];
        assert_eq!(describe(&threads), r"dd with guest pid 7, \u{1b}[2J with guest pid 9");
    }
}
