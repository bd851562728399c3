//! The order of events in special situations. Every test of this program also checks all rules for the events that it
//! causes.

use std::time::Duration;

use nutshell_conformance::{
    bundle::{idle, shell, spec},
    container::{SIGKILL, SIGTERM},
    with_fake_containerd,
};

#[test]
fn immediate_exit_is_reported_after_the_start() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&spec(&["true"]));
        assert_eq!(container.wait(), 0);
        for _ in 0..20 {
            assert_eq!(container.status(""), containerd_shim_protos::api::Status::STOPPED);
        }
        let id = container.id.clone();
        container.end();
        assert_eq!(
            containerd.events.of_container(&id),
            ["create", "start", "exit 0", "delete 0"]
        );
        let container = containerd.run(&idle());
        for _ in 0..20 {
            let exec = container.exec(&["true"]);
            exec.start();
            assert_eq!(exec.wait(), 0);
            exec.delete();
        }
        container.end();
    });
}

#[test]
fn exits_of_running_execs_precede_the_exit_of_the_container() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        let execs: Vec<_> = (0..5).map(|_| container.exec(&["sleep", "1000"])).collect();
        for exec in &execs {
            exec.start();
        }
        container.kill(SIGKILL);
        let events = containerd.events.wait_for(&container.id, "exit 137");
        for exec in &execs {
            let exits = events.iter().filter(|event| **event == format!("exit {} 137", exec.id));
            assert_eq!(exits.count(), 1, "{events:?}");
        }
        assert_eq!(events.last().map(String::as_str), Some("exit 137"));
        drop(execs);
        container.end();
    });
}

#[test]
fn concurrent_kills_cause_one_exit_event() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let _ = container.task().kill(&container.id, "", SIGKILL);
                });
            }
        });
        assert_eq!(container.wait(), 137);
        let id = container.id.clone();
        container.end();
        assert_eq!(
            containerd.events.of_container(&id),
            ["create", "start", "exit 137", "delete 137"]
        );
    });
}

#[test]
fn events_are_kept_while_containerd_is_down() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&shell("trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done"));
        container.stdout.wait_for("ready");
        containerd.events.wait_for(&container.id, "start");
        for _ in 0..2 {
            containerd.events.stop();
            for _ in 0..3 {
                assert_eq!(container.output_of("true"), "");
            }
            containerd.events.start();
        }
        containerd.events.stop();
        container.kill(SIGTERM);
        assert_eq!(container.wait(), 5);
        let before = containerd.events.all();
        assert!(!before.iter().any(|event| event.kind.to_string() == "exit 5"));
        containerd.events.start();
        let events = containerd.events.wait_for(&container.id, "exit 5");
        // Create and start, three events for each of six execs, the exit: each once, in order.
        assert_eq!(events.len(), 2 + 6 * 3 + 1, "{events:?}");
        assert_eq!(events[..2], ["create", "start"]);
        for (number, exec) in events[2..20].chunks(3).enumerate() {
            let id = exec[0]
                .strip_prefix("added ")
                .unwrap_or_else(|| panic!("{number}: {events:?}"));
            assert_eq!(exec[1], format!("started {id}"));
            assert_eq!(exec[2], format!("exit {id} 0"));
        }
        container.end();
    });
}

#[test]
fn pending_events_are_sent_before_the_shim_ends() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        let id = container.id.clone();
        containerd.events.wait_for(&id, "start");
        containerd.events.stop();
        container.kill(SIGKILL);
        container.wait();
        container.delete();
        container.task().shutdown(&id, false).unwrap();
        containerd.events.start();
        assert!(nutshell_conformance::host::ends_within(
            container.shim.pid,
            Duration::from_secs(10)
        ));
        assert_eq!(
            containerd.events.of_container(&id),
            ["create", "start", "exit 137", "delete 137"]
        );
        containerd.delete_bundle(&container.bundle);
        container.bundle.remove();
    });
}
