//! The order of events. Every test of this program also checks all rules of the
//! order on all events that it caused; these are about what needs a special situation.

use std::time::Duration;

use nutshell_conformance::{
    bundle::{idle, shell, spec},
    container::{SIGKILL, SIGTERM},
    with_containerd,
};

#[test]
fn immediate_exit_is_reported_after_the_start() {
    with_containerd(|containerd| {
        let container = containerd.run(&spec(&["true"]));
        assert_eq!(container.wait(), 0);
        for _ in 0..20 {
            assert_eq!(container.status(""), containerd_shim_protos::api::Status::STOPPED);
        }
        let id = container.id.clone();
        container.end();
        assert_eq!(containerd.events.of(&id), ["create", "start", "exit 0", "delete 0"]);
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
    with_containerd(|containerd| {
        let container = containerd.run(&idle());
        let execs: Vec<_> = (0..5).map(|_| container.exec(&["sleep", "1000"])).collect();
        for exec in &execs {
            exec.start();
        }
        container.kill(SIGKILL);
        let told = containerd.events.until(&container.id, "exit 137");
        for exec in &execs {
            let exits = told.iter().filter(|event| **event == format!("exit {} 137", exec.id));
            assert_eq!(exits.count(), 1, "{told:?}");
        }
        assert_eq!(told.last().map(String::as_str), Some("exit 137"));
        drop(execs);
        container.end();
    });
}

#[test]
fn concurrent_kills_cause_one_exit_event() {
    with_containerd(|containerd| {
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
        assert_eq!(containerd.events.of(&id), ["create", "start", "exit 137", "delete 137"]);
    });
}

#[test]
fn events_are_kept_while_containerd_is_down() {
    with_containerd(|containerd| {
        let container = containerd.run(&shell("trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done"));
        container.stdout.with("ready");
        containerd.events.until(&container.id, "start");
        for _ in 0..2 {
            containerd.events.leave();
            for _ in 0..3 {
                assert_eq!(container.output_of("true"), "");
            }
            containerd.events.come_back();
        }
        containerd.events.leave();
        container.kill(SIGTERM);
        assert_eq!(container.wait(), 5);
        let before = containerd.events.all();
        assert!(!before.iter().any(|event| event.what.to_string() == "exit 5"));
        containerd.events.come_back();
        let told = containerd.events.until(&container.id, "exit 5");
        // Create and start, six execs of three events each, the exit: all, once, in order.
        assert_eq!(told.len(), 2 + 6 * 3 + 1, "{told:?}");
        assert_eq!(told[..2], ["create", "start"]);
        for (number, exec) in told[2..20].chunks(3).enumerate() {
            let id = exec[0]
                .strip_prefix("added ")
                .unwrap_or_else(|| panic!("{number}: {told:?}"));
            assert_eq!(exec[1], format!("started {id}"));
            assert_eq!(exec[2], format!("exit {id} 0"));
        }
        container.end();
    });
}

#[test]
fn pending_events_are_sent_before_the_shim_ends() {
    with_containerd(|containerd| {
        let container = containerd.run(&idle());
        let id = container.id.clone();
        containerd.events.until(&id, "start");
        containerd.events.leave();
        container.kill(SIGKILL);
        container.wait();
        container.delete();
        container.task().shutdown(&id, false).unwrap();
        containerd.events.come_back();
        assert!(nutshell_conformance::host::ends_within(
            container.shim.pid,
            Duration::from_secs(10)
        ));
        assert_eq!(containerd.events.of(&id), ["create", "start", "exit 137", "delete 137"]);
        containerd.delete_answer(&container.bundle);
        container.bundle.remove();
    });
}
