//! A shim leaks nothing: after a hundred containers or execs it uses no more than after ten.

use std::time::Duration;

use nutshell_conformance::{
    bundle::idle,
    host::{self, Usage},
    pod::Pod,
    with_fake_containerd,
};

/// Memory in KiB by which two measurements may differ: buffers that the allocator keeps.
const TOLERANCE: u64 = 128;

/// Longer than an idle thread of the shim lives.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Asserts that the process `pid` uses no more than `before`. `history` is printed on failure.
fn assert_no_growth(before: Usage, pid: u32, history: &[Usage]) {
    let settled = host::eventually(IDLE_TIMEOUT, || {
        let now = host::read_usage(pid);
        let has_not_grown = now.descriptors <= before.descriptors
            && now.threads <= before.threads
            && now.private <= before.private + TOLERANCE;
        has_not_grown
            .then_some(())
            .ok_or_else(|| format!("{before:?} grew to {now:?}: {history:#?}"))
    });
    settled.unwrap_or_else(|growth| panic!("{growth}"));
}

/// Waits until the idle threads of the process `pid` have ended, and returns what it uses.
fn settled_usage(pid: u32) -> Usage {
    let one_thread = host::eventually(IDLE_TIMEOUT, || match host::read_usage(pid) {
        usage @ Usage { threads: 1, .. } => Ok(usage),
        usage => Err(format!("{usage:?}")),
    });
    one_thread.unwrap_or_else(|usage| panic!("idle threads do not end: {usage}"))
}

/// Calls `round` a hundred times, and asserts that the process `pid` then uses no more than after the tenth call.
fn assert_hundred_rounds_do_not_grow(pid: u32, round: impl Fn()) {
    let mut history = Vec::new();
    for _ in 0..10 {
        for _ in 0..10 {
            round();
        }
        history.push(host::read_usage(pid));
    }
    assert_no_growth(history[0], pid, &history);
}

/// Runs a container to completion and removes it.
fn run_one(pod: &Pod<'_>) {
    let container = pod.run(&pod.spec(&["sh", "-c", "echo out; exit 7"]));
    assert_eq!(container.wait(), 7);
    assert_eq!(container.stdout.read_to_end(), "out\n");
    pod.remove_container(&container);
}

#[test]
fn hundred_containers_in_sequence_do_not_grow_the_shim() {
    with_fake_containerd(|containerd| {
        let pod = Pod::by_task(containerd);
        assert_hundred_rounds_do_not_grow(pod.shim.pid, || run_one(&pod));
        pod.end();
    });
}

#[test]
fn thirty_concurrent_containers_do_not_grow_the_shim() {
    with_fake_containerd(|containerd| {
        let pod = Pod::by_task(containerd);
        let run_thirty = || {
            std::thread::scope(|scope| {
                for _ in 0..30 {
                    scope.spawn(|| run_one(&pod));
                }
            });
        };
        // How many threads run at once is random, and the stacks of threads stay allocated. The maximum is reached
        // after a few rounds.
        let mut history = vec![settled_usage(pod.shim.pid)];
        loop {
            run_thirty();
            let (before, now) = (history[history.len() - 1], settled_usage(pod.shim.pid));
            history.push(now);
            if now.descriptors == before.descriptors && now.private <= before.private + TOLERANCE {
                break;
            }
            assert!(history.len() < 6, "it grows with every round: {history:#?}");
        }
        assert!(pod.is_ready());
        pod.end();
    });
}

#[test]
fn hundred_execs_do_not_grow_the_shim() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        assert_hundred_rounds_do_not_grow(container.shim.pid, || {
            assert_eq!(container.output_of("echo out"), "out\n");
        });
        container.end();
    });
}

/// khugepaged runs at an unknown time, so its effect cannot be tested. The flag that disables it can.
#[test]
fn shim_does_not_use_transparent_huge_pages() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        let status = std::fs::read_to_string(format!("/proc/{}/status", container.shim.pid)).unwrap();
        assert!(status.contains("THP_enabled:\t0\n"), "{status}");
        container.end();
    });
}
