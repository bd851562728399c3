//! A shim that has served a hundred lives holds what it held after ten.

use std::time::Duration;

use nutshell_conformance::{
    bundle::idle,
    host::{self, Usage},
    pod::Pod,
    with_containerd,
};

/// What may differ by chance: buffers that the allocator keeps, in KiB.
const TOLERANCE: u64 = 128;

/// How long a thread without work stays, and more.
const IDLE: Duration = Duration::from_secs(30);

/// Asserts that the process `pid` holds no more than it did.
fn assert_no_growth(before: Usage, pid: u32, course: &[Usage]) {
    let settled = host::eventually(IDLE, || {
        let now = host::usage(pid);
        let same = now.descriptors <= before.descriptors
            && now.threads <= before.threads
            && now.private <= before.private + TOLERANCE;
        same.then_some(())
            .ok_or_else(|| format!("{before:?} grew to {now:?} by {course:#?}"))
    });
    settled.unwrap_or_else(|growth| panic!("{growth}"));
}

/// What the process `pid` holds when its idle threads have gone.
fn settled(pid: u32) -> Usage {
    let one_thread = host::eventually(IDLE, || match host::usage(pid) {
        usage @ Usage { threads: 1, .. } => Ok(usage),
        usage => Err(format!("{usage:?}")),
    });
    one_thread.unwrap_or_else(|usage| panic!("threads stay without work: {usage}"))
}

/// Lives a hundred lives, and compares what the process `pid` holds after the last and after the tenth.
fn assert_hundred_leave_nothing(pid: u32, live: impl Fn()) {
    let mut course = Vec::new();
    for _ in 0..10 {
        for _ in 0..10 {
            live();
        }
        course.push(host::usage(pid));
    }
    assert_no_growth(course[0], pid, &course);
}

fn live(pod: &Pod<'_>) {
    let container = pod.run(&pod.spec(&["sh", "-c", "echo out; exit 7"]));
    assert_eq!(container.wait(), 7);
    assert_eq!(container.stdout.all(), "out\n");
    pod.forget(&container);
}

#[test]
fn hundred_containers_in_sequence_do_not_grow_the_shim() {
    with_containerd(|containerd| {
        let pod = Pod::by_task(containerd);
        assert_hundred_leave_nothing(pod.shim.pid, || live(&pod));
        pod.end();
    });
}

#[test]
fn thirty_concurrent_containers_do_not_grow_the_shim() {
    with_containerd(|containerd| {
        let pod = Pod::by_task(containerd);
        let all_at_once = || {
            std::thread::scope(|scope| {
                for _ in 0..30 {
                    scope.spawn(|| live(&pod));
                }
            });
        };
        // How many threads worked at once, whose stacks are kept, is chance: the most is reached soon.
        let mut course = vec![settled(pod.shim.pid)];
        loop {
            all_at_once();
            let (before, now) = (course[course.len() - 1], settled(pod.shim.pid));
            course.push(now);
            if now.descriptors == before.descriptors && now.private <= before.private + TOLERANCE {
                break;
            }
            assert!(course.len() < 6, "it grows with every thirty: {course:#?}");
        }
        assert!(pod.is_ready());
        pod.end();
    });
}

#[test]
fn hundred_execs_do_not_grow_the_shim() {
    with_containerd(|containerd| {
        let container = containerd.run(&idle());
        assert_hundred_leave_nothing(container.shim.pid, || {
            assert_eq!(container.output_of("echo out"), "out\n");
        });
        container.end();
    });
}

/// khugepaged comes when it likes, so that its work cannot be waited for; that it may not come can be seen.
#[test]
fn shim_does_not_use_transparent_huge_pages() {
    with_containerd(|containerd| {
        let container = containerd.run(&idle());
        let status = std::fs::read_to_string(format!("/proc/{}/status", container.shim.pid)).unwrap();
        assert!(status.contains("THP_enabled:\t0\n"), "{status}");
        container.end();
    });
}
