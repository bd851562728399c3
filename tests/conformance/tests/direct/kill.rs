//! Kill in every phase and of every target, also if the guest hangs.

use std::time::{Duration, Instant};

use containerd_shim_protos::{api::Status, ttrpc::Code};
use nutshell_conformance::{
    bundle::{idle, shell},
    container::{SIGKILL, SIGTERM},
    host, with_fake_containerd,
};
use rustix::process::Signal;

#[test]
fn kill_works_in_every_phase_and_fails_with_not_found_after_the_exit() {
    with_fake_containerd(|containerd| {
        for (phase, signal, status) in [
            ("created", SIGKILL, 137),
            ("created", SIGTERM, 143),
            ("running", SIGKILL, 137),
            ("paused", SIGKILL, 137),
        ] {
            let container = containerd.create(&idle());
            if phase != "created" {
                container.start();
            }
            if phase == "paused" {
                container.task().pause(&container.id).unwrap();
            }
            container.kill(signal);
            assert_eq!(container.wait(), status, "{phase}");
            assert_eq!(container.status(""), Status::STOPPED);
            for all in [false, true] {
                let again = container.task().kill_all(&container.id, "", SIGKILL, all).unwrap_err();
                assert_eq!(again.code, Some(Code::NOT_FOUND), "{phase}: {again}");
                assert!(again.message.contains("process already finished"), "{again}");
            }
            container.end();
        }
    });
}

#[test]
fn signals_reach_the_process_unchanged() {
    with_fake_containerd(|containerd| {
        // The first process of a pid namespace only receives signals that it handles.
        // The shell of busybox only supports numbers for real-time signals.
        let script = "for signal in HUP USR1 USR2 34 64; do trap \"echo got $signal\" $signal; done
            echo ready; while :; do sleep 0.1; done";
        let container = containerd.run(&shell(script));
        container.stdout.wait_for("ready");
        for (signal, name) in [(1, "HUP"), (10, "USR1"), (12, "USR2"), (34, "34"), (64, "64")] {
            container.kill(signal);
            container.stdout.wait_for(&format!("got {name}\n"));
        }
        container.kill(SIGTERM);
        assert_eq!(container.output_of("echo alive"), "alive\n");
        assert_eq!(container.status(""), Status::RUNNING);
        // The highest signal is 64.
        for signal in [65, 4096] {
            let failure = container.task().kill(&container.id, "", signal).unwrap_err();
            assert_eq!(failure.code, Some(Code::INVALID_ARGUMENT), "{failure}");
        }
        container.end();
    });
}

#[test]
fn kill_of_an_exec_affects_only_the_exec() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&shell("trap 'echo init' USR1; echo ready; while :; do sleep 0.1; done"));
        container.stdout.wait_for("ready");
        let sleeper = || container.exec(&["sh", "-c", "echo ready; exec sleep 1000"]);
        let (first, second) = (sleeper(), sleeper());

        let early = container.task().kill(&container.id, &first.id, SIGKILL).unwrap_err();
        assert_eq!(early.code, Some(Code::FAILED_PRECONDITION), "{early}");

        for exec in [&first, &second] {
            exec.start();
            exec.stdout.wait_for("ready");
        }
        first.kill(10);
        assert_eq!(first.wait(), 128 + 10);
        assert_eq!(container.status(""), Status::RUNNING);
        assert_eq!(second.status(), Status::RUNNING);
        assert!(!container.stdout.so_far().contains("init"));
        let late = container.task().kill(&container.id, &first.id, SIGKILL).unwrap_err();
        assert_eq!(late.code, Some(Code::NOT_FOUND), "{late}");
        assert!(late.message.contains("process already finished"), "{late}");
        second.kill(SIGKILL);
        assert_eq!(second.wait(), 137);
        container.end();
    });
}

#[test]
fn kill_all_reaches_every_process() {
    with_fake_containerd(|containerd| {
        let trap =
            |name: &str| format!("trap 'echo {name} got it' USR1; echo {name} ready; while :; do sleep 0.1; done");
        let container = containerd.run(&shell(&format!("({}) & {}", trap("child"), trap("init"))));
        container.stdout.wait_for("child ready");
        container.stdout.wait_for("init ready");
        let exec = container.exec(&["sh", "-c", &trap("exec")]);
        exec.start();
        exec.stdout.wait_for("ready");
        container.task().kill_all(&container.id, "", 10, true).unwrap();
        container.stdout.wait_for("child got it");
        container.stdout.wait_for("init got it");
        exec.stdout.wait_for("exec got it");
        container.task().kill_all(&container.id, "", SIGKILL, true).unwrap();
        assert_eq!((container.wait(), exec.wait()), (137, 137));
        container.end();
    });
}

#[test]
fn signal_to_the_host_pid_reaches_the_process() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        let exec = container.exec(&["sleep", "1000"]);
        host::signal(exec.start(), Signal::TERM);
        assert_eq!(exec.wait(), 143);
        host::signal(container.pid, Signal::KILL);
        assert_eq!(container.wait(), 137);
        container.end();
    });
}

#[test]
fn hung_guest_does_not_delay_calls_and_can_be_killed() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        let exec = container.exec(&["sleep", "1000"]);
        let exec_pid = exec.start();
        for vmm in containerd.pids_of("nutshell-vmm") {
            host::signal(vmm, Signal::STOP);
        }
        // These calls need no answer from the guest.
        let task = container.task().with_timeout(Duration::from_secs(2));
        for _ in 0..3 {
            let state = task.state(&container.id, "").unwrap();
            assert_eq!(state.status.enum_value(), Ok(Status::RUNNING));
            assert_eq!(task.state(&container.id, &exec.id).unwrap().pid, exec_pid);
            assert_eq!(task.connect_to(&container.id).unwrap().task_pid, container.pid);
            task.shutdown(&container.id, false).unwrap();
        }
        let pids = container
            .task()
            .with_timeout(Duration::from_secs(4))
            .pids(&container.id)
            .unwrap();
        assert_eq!(pids.processes.len(), 1);

        let start = Instant::now();
        container.kill(SIGKILL);
        assert_eq!(container.wait(), 137);
        assert!(start.elapsed() < Duration::from_secs(10), "took {:?}", start.elapsed());
        assert_eq!(exec.wait(), 137);
        container.end();
    });
}
