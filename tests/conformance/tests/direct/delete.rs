//! `delete`, which containerd runs when it has lost the connection to a shim, or does not need the shim any more.

use std::time::{Duration, Instant};

use nutshell_conformance::{
    TIMEOUT,
    bundle::{idle, shell},
    container::SIGKILL,
    host, with_fake_containerd,
};
use rustix::process::Signal;

/// The timeout of containerd for this action.
const LIMIT: Duration = Duration::from_secs(5);

#[test]
fn delete_of_an_unknown_container_reports_137() {
    with_fake_containerd(|containerd| {
        let bundle = containerd.bundle(&idle());
        for removed in [false, true] {
            if removed {
                bundle.remove();
            }
            let answer = containerd.delete_bundle(&bundle);
            assert_eq!((answer.pid, answer.exit_status), (0, 137));
            assert!(answer.exited_at.seconds > 0);
        }
    });
}

#[test]
fn delete_ends_a_running_container_and_its_shim_in_time_and_is_repeatable() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        for _ in 0..2 {
            let start = Instant::now();
            let answer = containerd.delete_bundle(&container.bundle);
            assert!(start.elapsed() < LIMIT, "took {:?}", start.elapsed());
            assert_eq!(answer.exit_status, 137);
            assert!(host::ends_within(container.shim.pid, Duration::ZERO));
            assert!(!container.shim.answer.socket().exists());
        }
        container.bundle.remove();
    });
}

#[test]
fn concurrent_deletes_all_succeed() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| assert_eq!(containerd.delete_bundle(&container.bundle).exit_status, 137));
            }
        });
        container.bundle.remove();
    });
}

#[test]
fn delete_after_a_kill_of_the_shim_leaves_no_process_and_reports_137() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        host::signal(container.shim.pid, Signal::KILL);
        assert!(host::ends_within(container.shim.pid, TIMEOUT));
        let start = Instant::now();
        assert_eq!(containerd.delete_bundle(&container.bundle).exit_status, 137);
        assert!(start.elapsed() < LIMIT, "took {:?}", start.elapsed());
        container.bundle.remove();
    });
}

#[test]
fn delete_after_a_kill_of_the_shim_reports_the_recorded_exit() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&shell("exit 42"));
        let exit = container.task().wait(&container.id, "").unwrap();
        assert_eq!(exit.exit_status, 42);
        host::signal(container.shim.pid, Signal::KILL);
        assert!(host::ends_within(container.shim.pid, TIMEOUT));
        for _ in 0..2 {
            let answer = containerd.delete_bundle(&container.bundle);
            assert_eq!((answer.pid, answer.exit_status), (container.pid, 42));
            assert_eq!(answer.exited_at, exit.exited_at);
        }
        container.bundle.remove();
    });
}

#[test]
fn delete_ends_the_container_of_a_hung_guest_in_time() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        for vmm in containerd.pids_of("nutshell-vmm") {
            host::signal(vmm, Signal::STOP);
        }
        let start = Instant::now();
        assert_eq!(containerd.delete_bundle(&container.bundle).exit_status, 137);
        assert!(start.elapsed() < LIMIT, "took {:?}", start.elapsed());
        container.bundle.remove();
    });
}

#[test]
fn delete_of_a_group_member_leaves_the_others_running() {
    with_fake_containerd(|containerd| {
        let mut spec = idle();
        spec["annotations"]["io.containerd.runc.v2.group"] = containerd.new_name("group").into();
        let (first, second) = (containerd.run(&spec), containerd.run(&spec));
        assert_eq!(first.shim.pid, second.shim.pid);

        // The shim was started for the first container.
        first.kill(SIGKILL);
        assert_eq!(first.wait(), 137);
        assert_eq!(first.delete().exit_status, 137);
        first.task().shutdown(&first.id, false).unwrap();
        assert_eq!(containerd.delete_bundle(&first.bundle).exit_status, 137);
        first.bundle.remove();

        assert_eq!(second.output_of("echo alive"), "alive\n");
        second.end();
    });
}
