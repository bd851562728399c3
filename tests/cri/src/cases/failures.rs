//! Failures of one container, which do not affect the others of its pod.

use crate::{
    messages::{ContainerState, LinuxContainerResources},
    pod::{Handler, Pod, resources},
    wait::wait_until,
};

pub(crate) fn failures_affect_one_container_only(handler: Handler) {
    let pod = Pod::run_with(handler, |config| {
        let limits = config.linux.get_or_insert_default().resources.get_or_insert_default();
        limits.memory_limit_in_bytes = 512 << 20;
    });
    let sibling = pod.start("sibling", &["sh", "-c", "echo $$ >/mine; exec sleep 1000"]);
    let started = sibling.status().started_at;
    let assert_sibling_unharmed = || {
        let status = sibling.status();
        assert_eq!((status.state(), status.started_at), (ContainerState::Running, started));
        assert_eq!(sibling.sh("cat /mine"), "1");
    };

    let crashes = pod.start("crashes", &["sh", "-c", "sh -c 'kill -SEGV $$'; exit $?"]);
    assert_eq!(crashes.wait().exit_code, 139);
    assert_sibling_unharmed();
    let killed = pod.start("killed", &["sleep", "1000"]);
    killed.stop(0);
    let status = killed.wait();
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    assert_sibling_unharmed();
    let hungry = pod.start_with("hungry", &["tail", "/dev/zero"], |config| {
        resources(config).memory_limit_in_bytes = 32 << 20;
    });
    assert_eq!(hungry.wait().exit_code, 137);
    // The OOM event and the exit event may arrive in any order.
    wait_until("the reason OOMKilled", || {
        (hungry.status().reason == "OOMKilled").then_some(())
    });
    assert_sibling_unharmed();
    let missing = pod.create("missing", &["/no/such/program"], |_| ()).unwrap();
    let message = missing.start().unwrap_err().message;
    assert!(message.contains("no such file or directory"), "{message}");
    assert_sibling_unharmed();
    pod.remove();
}

/// If the RuntimeClass declares no pod overhead, the limit of the pod's control group has no room for the machine
/// itself beside its containers. When a container uses all the memory, one of its processes must be killed, not the
/// machine.
pub(crate) fn pod_without_overhead_runs_out_of_memory(handler: Handler) {
    let pod = Pod::run_with(handler, |config| {
        let limits = config.linux.get_or_insert_default();
        limits.overhead = Some(LinuxContainerResources::default());
        limits.resources = Some(LinuxContainerResources {
            memory_limit_in_bytes: 320 << 20,
            ..Default::default()
        });
    });
    let sibling = pod.start("sibling", &["sleep", "1000"]);
    let started = sibling.status().started_at;
    for name in ["hungry", "hungry-again"] {
        let hungry = pod.start_with(name, &["tail", "/dev/zero"], |config| {
            resources(config).memory_limit_in_bytes = 320 << 20;
        });
        assert_eq!(hungry.wait().exit_code, 137);
        wait_until("the reason OOMKilled", || {
            (hungry.status().reason == "OOMKilled").then_some(())
        });
        let status = sibling.status();
        assert_eq!((status.state(), status.started_at), (ContainerState::Running, started));
        assert_eq!(sibling.sh("echo alive"), "alive");
    }
    pod.remove();
}

pub(crate) fn stop_sends_sigterm_first(handler: Handler) {
    let pod = Pod::run(handler);
    let script = "trap 'echo got TERM; exit 7' TERM; echo ready; while :; do sleep 0.1; done";
    let polite = pod.start("polite", &["sh", "-c", script]);
    let script = "trap 'echo got TERM' TERM; echo ready; while :; do sleep 0.1; done";
    let stubborn = pod.start("stubborn", &["sh", "-c", script]);
    polite.wait_for_line("ready");
    stubborn.wait_for_line("ready");
    polite.stop(30);
    assert_eq!(polite.wait().exit_code, 7);
    stubborn.stop(1);
    assert_eq!(stubborn.wait().exit_code, 137);
    for container in [polite, stubborn] {
        assert_eq!(container.output("stdout"), "ready\ngot TERM\n");
    }
    pod.remove();
}
