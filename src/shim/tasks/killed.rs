//! Processes that do not end although the guest has sent them SIGKILL. They wait in the guest's kernel, for example for
//! a volume whose file system on the host hangs, and nothing but its answer or the end of the machine ends them.

use std::{collections::BTreeMap, sync::Arc};

use nutshell_protocol::{BlockedThread, Request, Response};

use super::{
    container::{
        Container, Role,
        lifecycle::{Exit, SIGKILL_STATUS},
        process::Process,
    },
    delete::delete_from_guest,
    limits::{BLOCKED_INTERVAL, KILL_LIMIT},
    table::Tasks,
};
use crate::shim::machine::printable_line;

/// The maximum length of the name of a thread (kernel, `TASK_COMM_LEN`), with room for escapes.
const MAX_NAME: usize = 32;

impl Tasks {
    /// Follows a process that was sent SIGKILL. If it is blocked in the guest's kernel, its exit is recorded although
    /// it has not ended: the machine of a single container is ended, and a process of a pod's container stays in the
    /// guest, so that the other containers go on. Spawns at most one task per process.
    pub(super) fn follow_kill(self: &Arc<Self>, container: &Arc<Container>, process: &Arc<Process>) {
        if !process.should_follow_kill() {
            return;
        }
        let (tasks, container, process) = (self.clone(), container.clone(), process.clone());
        tokio::spawn(async move {
            let machine = container.pod.machine();
            tokio::select! {
                _ = process.lifecycle.wait_exit() => {}
                _ = machine.ended() => {}
                blocked = blocked_threads(&container, &process) => {
                    tasks.give_up(&container, &process, &blocked).await;
                }
            }
        });
    }

    /// Records the exit of a process that cannot end because of `blocked`.
    async fn give_up(&self, container: &Container, process: &Process, blocked: &[BlockedThread]) {
        if process.is_exit_claimed() {
            // The process has ended, and its output is being delivered.
            return;
        }
        let blocked = describe(blocked);
        let (id, exec) = (&container.id, process.exec.as_deref());
        if exec.is_none() && matches!(container.role, Role::Single { .. }) {
            container.pod.machine().kill(&format!(
                "SIGKILL did not end its container, because of processes that are blocked in the guest's kernel \
                 ({blocked}): look for a volume that does not answer"
            ));
            return;
        }
        let whose = exec.map_or_else(|| format!("task {id}"), |exec| format!("task {id}, exec {exec}"));
        log::warn!(
            "{whose}: SIGKILL did not end it, because of processes that are blocked in the guest's kernel ({blocked}): \
             look for a volume that does not answer. Its exit is reported as {SIGKILL_STATUS}, and they stay in the guest \
             until they can end or the virtual machine ends"
        );
        container.abandon();
        if exec.is_none() {
            self.end_lost_container(container).await;
            // Now, because the guest would wait for the processes when it writes its disks back.
            delete_from_guest(container).await;
        } else if process.try_claim_exit() {
            self.record_exit(container, process, Exit::now(SIGKILL_STATUS)).await;
        }
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

/// The threads that are blocked now. Empty if the agent cannot find any.
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
