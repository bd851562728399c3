//! Time limits of calls and of the work between them. All are elapsed time, so that nothing a guest does extends them.

use std::time::Duration;

use nutshell_protocol::DELETION_KILL_TIMEOUT;

/// Delivery of a process's output to its readers, before the exit is reported, and again before its streams are
/// closed. A reader that does not read must not hide an exit.
pub(super) const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// The time from the kill of a process to the record of its exit, which waits for its output.
pub(super) const EXIT_LIMIT: Duration = DRAIN_LIMIT;

/// Closing of a process's streams by the vmm, which copies no more data then.
pub(super) const CLOSE_STREAMS_LIMIT: Duration = Duration::from_secs(2);

/// The time from a broken connection to the machine until the reason for its end is known.
pub(super) const END_REASON_LIMIT: Duration = Duration::from_secs(2);

/// A request that the agent answers without waiting for anything.
pub(super) const REQUEST_LIMIT: Duration = shorter_in_tests(Duration::from_secs(10));

/// The deletion of a container: the agent's own limit for processes to end, and time to remove the rest.
pub(super) const DELETE_LIMIT: Duration =
    shorter_in_tests(DELETION_KILL_TIMEOUT.saturating_add(Duration::from_secs(2)));

/// A request that makes the agent create a process or set up the pod, and the connection of the network. All of
/// them wait for the kernel of the guest or of the host.
pub(super) const CREATE_LIMIT: Duration = shorter_in_tests(Duration::from_secs(40));

/// A signal. If a guest does not deliver SIGKILL in this time, its machine is killed. If a process has not ended this
/// long after SIGKILL, the guest is asked whether it is blocked.
pub(super) const KILL_LIMIT: Duration = shorter_in_tests(Duration::from_secs(8));

/// The time from SIGKILL until a process counts as ended, whatever the guest reports about it.
pub(super) const SURVIVAL_LIMIT: Duration = shorter_in_tests(Duration::from_secs(60));

/// The time between the two reports that show whether a thread stays in the same wait.
pub(super) const BLOCKED_INTERVAL: Duration = shorter_in_tests(Duration::from_secs(1));

/// The list of processes. Without an answer the shim returns the container's first process only: containerd takes
/// a task without processes for leaked, so a guest that hangs must not delay it.
pub(super) const PIDS_LIMIT: Duration = Duration::from_secs(2);

/// The resource use of a container. containerd collects that of all containers one after the other, so a guest that
/// hangs must not delay it.
pub(super) const STATS_LIMIT: Duration = Duration::from_secs(2);

/// Write-back of the guest's disks before its machine is ended.
pub(super) const WRITE_BACK_LIMIT: Duration = Duration::from_secs(10);

/// The time from a resize until the guest's kernel has added the new memory.
pub(super) const PLUG_LIMIT: Duration = Duration::from_secs(20);

/// Unit tests have guests that never answer, and wait for these limits.
const fn shorter_in_tests(limit: Duration) -> Duration {
    if cfg!(test) {
        Duration::from_millis(limit.as_secs() * 100)
    } else {
        limit
    }
}
