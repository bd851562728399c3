//! Pause, Resume, Update and Stats.

use std::time::Duration;

use containerd_shim_protos::{api::Status, cgroups_v2::metrics::Metrics};
use nutshell_conformance::{
    TIMEOUT,
    bundle::{idle, shell, spec_of_program},
    container::SIGKILL,
    fake_containerd::program,
    host::eventually,
    with_fake_containerd,
};
use serde_json::json;

#[test]
fn paused_container_makes_no_progress_until_it_is_resumed() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&shell("while :; do echo tick; sleep 0.02; done"));
        container.stdout.wait_for("tick");
        container.task().pause(&container.id).unwrap();
        assert_eq!(container.status(""), Status::PAUSED);
        // Output from before the freeze may still be in transit.
        let settled = eventually(TIMEOUT, || {
            let before = container.stdout.so_far().len();
            std::thread::sleep(Duration::from_millis(500));
            let after = container.stdout.so_far().len();
            (before == after)
                .then_some(after)
                .ok_or_else(|| "output continues".to_owned())
        });
        let settled = settled.unwrap();
        // The guest still answers.
        assert!(container.task().stats(&container.id).unwrap().pids.current > 0);
        assert!(!container.task().pids(&container.id).unwrap().processes.is_empty());
        assert_eq!(container.stdout.so_far().len(), settled);
        container.task().resume(&container.id).unwrap();
        assert_eq!(container.status(""), Status::RUNNING);
        eventually(TIMEOUT, || {
            (container.stdout.so_far().len() > settled)
                .then_some(())
                .ok_or_else(|| "no output after Resume".to_owned())
        })
        .unwrap();
        let id = container.id.clone();
        container.end();
        assert_eq!(
            containerd.events.of_container(&id),
            ["create", "start", "paused", "resumed", "exit 137", "delete 137"]
        );
    });
}

/// Kernels derive the limit of open files from their memory: with 256 MiB it is about 25,000.
#[test]
fn small_container_can_open_sixty_thousand_files() {
    with_fake_containerd(|containerd| {
        let mut spec = spec_of_program(&program("eventfds"), &["60000"]);
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "hard": 65_536, "soft": 65_536}]);
        spec["linux"]["resources"] = json!({"memory": {"limit": 256 << 20}});
        let container = containerd.run(&spec);
        let status = container.wait();
        assert_eq!(status, 0, "{}", container.stderr.read_to_end());
        assert_eq!(container.stdout.read_to_end(), "60000\n");
        container.end();
    });
}

#[test]
fn update_changes_the_limits_of_a_running_container() {
    with_fake_containerd(|containerd| {
        let mut spec = idle();
        spec["linux"]["resources"] = json!({
            "memory": {"limit": 64 << 20},
            "pids": {"limit": 50},
            "cpu": {"quota": 50_000, "period": 100_000},
        });
        let container = containerd.run(&spec);
        let read = |file: &str| {
            let text = container.output_of(&format!("cat /sys/fs/cgroup/{file}"));
            text.trim().to_owned()
        };
        assert_eq!(read("memory.max"), (64 << 20).to_string());
        assert_eq!(read("pids.max"), "50");
        assert_eq!(read("cpu.max"), "50000 100000");
        let stats = container.task().stats(&container.id).unwrap();
        assert_eq!((stats.memory.usage_limit, stats.pids.limit), (64 << 20, 50));

        let resources = json!({
            "memory": {"limit": 48 << 20},
            "pids": {"limit": 40},
            "cpu": {"quota": 20_000, "period": 100_000, "shares": 512},
            "hugepageLimits": [],
        });
        container.task().update(&container.id, &resources).unwrap();

        assert_eq!(read("memory.max"), (48 << 20).to_string());
        assert_eq!(read("pids.max"), "40");
        assert_eq!(read("cpu.max"), "20000 100000");
        let stats = container.task().stats(&container.id).unwrap();
        assert_eq!((stats.memory.usage_limit, stats.pids.limit), (48 << 20, 40));
        container.end();
    });
}

/// Asserts that all parts are present: clients read them without a check.
fn assert_complete(stats: &Metrics, phase: &str) {
    for (name, is_present) in [
        ("pids", stats.pids.is_some()),
        ("cpu", stats.cpu.is_some()),
        ("memory", stats.memory.is_some()),
        ("io", stats.io.is_some()),
        ("rdma", stats.rdma.is_some()),
        ("memory_events", stats.memory_events.is_some()),
    ] {
        assert!(is_present, "{phase}: no {name} in {stats}");
    }
}

#[test]
fn stats_are_complete_and_plausible_from_create_to_delete() {
    with_fake_containerd(|containerd| {
        let mut spec =
            shell("read line </dev/null; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; exec sleep 1000");
        spec["linux"]["resources"] = json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 50}});
        let container = containerd.create(&spec);
        let stats = || container.task().stats(&container.id).unwrap();
        let created = stats();
        assert_complete(&created, "created");
        assert_eq!((created.memory.usage_limit, created.pids.limit), (64 << 20, 50));
        container.start();
        container.stdout.wait_for("done");
        let running = stats();
        assert_complete(&running, "running");
        assert_eq!(running.pids.current, 1);
        assert!(running.cpu.usage_usec > created.cpu.usage_usec, "{running}");
        assert!(
            running.cpu.user_usec + running.cpu.system_usec <= running.cpu.usage_usec + 1000,
            "{running}"
        );
        assert!((1..64 << 20).contains(&running.memory.usage), "{running}");
        assert!(running.memory.anon <= running.memory.usage, "{running}");
        assert!(running.memory.pgfault > 0, "{running}");
        assert_eq!(running.memory_events.oom_kill, 0);
        container.kill(SIGKILL);
        container.wait();
        let stopped = stats();
        assert_complete(&stopped, "stopped");
        assert!(stopped.cpu.usage_usec >= running.cpu.usage_usec, "{stopped}");
        assert_eq!(stopped.pids.current, 0);
        container.end();
    });
}

#[test]
fn oom_event_precedes_the_exit_and_is_counted_until_delete() {
    with_fake_containerd(|containerd| {
        let mut spec = shell("exec tail /dev/zero");
        spec["linux"]["resources"] = json!({"memory": {"limit": 16 << 20}});
        let container = containerd.run(&spec);
        assert_eq!(container.wait(), 137);
        let stats = container.task().stats(&container.id).unwrap();
        assert!(stats.memory_events.oom_kill >= 1, "{stats}");
        let id = container.id.clone();
        container.end();
        assert_eq!(
            containerd.events.of_container(&id),
            ["create", "start", "oom", "exit 137", "delete 137"]
        );
    });
}

#[test]
fn out_of_memory_in_an_exec_does_not_end_its_container() {
    with_fake_containerd(|containerd| {
        let mut spec = idle();
        spec["linux"]["resources"] = json!({"memory": {"limit": 16 << 20}});
        let container = containerd.run(&spec);
        assert_eq!(container.run_script("exec tail /dev/zero").0, 137);
        assert_eq!(container.output_of("echo alive"), "alive\n");
        let events = containerd.events.of_container(&container.id);
        let oom = events.iter().position(|event| event == "oom").expect("an oom event");
        let exit = events.iter().position(|event| event.starts_with("exit e")).unwrap();
        assert!(oom < exit, "{events:?}");
        container.end();
    });
}
