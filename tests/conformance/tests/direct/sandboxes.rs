//! The life cycle of a sandbox, with both sandbox APIs of containerd.

use std::{fs, time::Duration};

use containerd_shim_protos::{cgroups_v2::metrics::Metrics, protobuf::Message, ttrpc::Code};
use nutshell_conformance::{
    TIMEOUT,
    bootstrap::Caller,
    host,
    pod::{NOT_READY, Pod, READY, SandboxClient, start_sandbox_shim},
    task::CallError,
    with_fake_containerd,
};
use rustix::process::Signal;

use super::pods::{config, idle, with_both_apis};

#[test]
fn sandbox_service_answers_in_every_state() {
    with_fake_containerd(|containerd| {
        let (bundle, shim) = start_sandbox_shim(containerd);
        let (id, sandboxes) = (bundle.id.as_str(), SandboxClient::new(&shim));
        let code = |failure: CallError| failure.code.unwrap();
        assert_eq!(code(sandboxes.start(id).unwrap_err()), Code::FAILED_PRECONDITION);
        for answer in [
            sandboxes.stop(id).map(drop),
            sandboxes.wait(id).map(drop),
            sandboxes.status(id).map(drop),
            sandboxes.ping(id).map(drop),
            sandboxes.metrics(id).map(drop),
        ] {
            assert_eq!(code(answer.unwrap_err()), Code::NOT_FOUND);
        }
        let platform = sandboxes.platform(id).unwrap().platform;
        assert_eq!(
            (platform.os.as_str(), platform.architecture.as_str()),
            ("linux", "amd64")
        );

        sandboxes.create(&bundle, &config(containerd)).unwrap();
        let again = sandboxes.create(&bundle, &config(containerd)).unwrap_err();
        assert_eq!(code(again), Code::ALREADY_EXISTS);
        assert_eq!(sandboxes.status(id).unwrap().state, NOT_READY);
        sandboxes.ping(id).unwrap();
        sandboxes.metrics(id).unwrap();

        let started = sandboxes.start(id).unwrap();
        assert!(host::is_alive(started.pid) && started.created_at.seconds > 0);
        assert_eq!(code(sandboxes.start(id).unwrap_err()), Code::FAILED_PRECONDITION);
        let status = sandboxes.status(id).unwrap();
        assert_eq!((status.state.as_str(), status.pid), (READY, started.pid));
        assert!(
            status.exited_at.is_none() && status.info.contains_key("vmmPid"),
            "{status:?}"
        );
        sandboxes.ping(id).unwrap();
        let own = fs::metadata(format!("/proc/{}/ns/net", started.pid)).unwrap();
        let hosts = fs::metadata("/proc/self/ns/net").unwrap();
        use std::os::unix::fs::MetadataExt;
        assert_ne!(own.ino(), hosts.ino(), "the sandbox is in the host's network namespace");
        // The sandbox is not a task.
        assert_eq!(code(shim.task.state(id, "").unwrap_err()), Code::NOT_FOUND);
        assert_eq!(code(shim.task.kill(id, "", 9).unwrap_err()), Code::NOT_FOUND);

        let waiting = std::thread::spawn({
            let (sandboxes, id) = (SandboxClient::new(&shim), id.to_owned());
            move || sandboxes.wait(&id).unwrap()
        });
        sandboxes.stop(id).unwrap();
        sandboxes.stop(id).unwrap();
        let exit = waiting.join().unwrap();
        assert_eq!(exit, sandboxes.wait(id).unwrap());
        let status = sandboxes.status(id).unwrap();
        assert_eq!((status.state.as_str(), &status.exited_at), (NOT_READY, &exit.exited_at));
        assert_eq!(containerd.pids_of("nutshell-vmm"), [0_u32; 0]);
        assert_eq!(code(sandboxes.ping(id).unwrap_err()), Code::FAILED_PRECONDITION);
        assert_eq!(code(sandboxes.start(id).unwrap_err()), Code::FAILED_PRECONDITION);
        sandboxes.metrics(id).unwrap();

        sandboxes.shut_down(id).unwrap();
        assert!(host::ends_within(shim.pid, TIMEOUT));
        containerd.delete_bundle(&bundle);
        bundle.remove();
        assert_eq!(containerd.events.all(), []);
    });
}

#[test]
fn relative_bundle_path_is_resolved_from_the_shims_working_directory_and_an_existing_sandbox_is_not_created_again() {
    with_fake_containerd(|containerd| {
        // The shim's working directory is the bundle.
        for path in [".", "rootfs/.."] {
            let (bundle, shim) = start_sandbox_shim(containerd);
            let (id, sandboxes) = (bundle.id.as_str(), SandboxClient::new(&shim));
            let create = |path: &str| sandboxes.create_in(id, path, &config(containerd));
            let code = |path: &str| create(path).unwrap_err().code.unwrap();
            assert_eq!(code(""), Code::INVALID_ARGUMENT);

            create(path).unwrap();
            assert!(bundle.path.join("nutshell.json").exists(), "{path}");

            let absolute = bundle.path.to_str().unwrap();
            for again in [".", absolute, "no-such-folder"] {
                assert_eq!(code(again), Code::ALREADY_EXISTS, "{again}");
            }
            sandboxes.start(id).unwrap();
            assert_eq!(code("."), Code::ALREADY_EXISTS);
            assert_eq!(sandboxes.status(id).unwrap().state, READY);
            sandboxes.stop(id).unwrap();
            assert_eq!(code("."), Code::ALREADY_EXISTS);
            assert_eq!(sandboxes.status(id).unwrap().state, NOT_READY);

            sandboxes.shut_down(id).unwrap();
            assert!(host::ends_within(shim.pid, TIMEOUT));
            containerd.delete_bundle(&bundle);
            bundle.remove();
        }
    });
}

#[test]
fn unstarted_sandbox_can_be_stopped_and_shut_down_concurrently() {
    with_fake_containerd(|containerd| {
        let (bundle, shim) = start_sandbox_shim(containerd);
        let (id, sandboxes) = (bundle.id.as_str(), SandboxClient::new(&shim));
        sandboxes.create(&bundle, &config(containerd)).unwrap();
        sandboxes.stop(id).unwrap();
        let status = sandboxes.status(id).unwrap();
        assert!(status.state == NOT_READY && status.exited_at.is_some(), "{status:?}");
        assert_eq!(sandboxes.wait(id).unwrap().exited_at, status.exited_at);
        let started = sandboxes.start(id).unwrap_err();
        assert_eq!(started.code.unwrap(), Code::FAILED_PRECONDITION);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    // The shim may have ended before it answers the second call.
                    let answer = SandboxClient::new(&shim).shut_down(id);
                    assert!(answer.is_ok() || host::ends_within(shim.pid, TIMEOUT), "{answer:?}");
                });
            }
        });
        assert!(host::ends_within(shim.pid, TIMEOUT));
        containerd.delete_bundle(&bundle);
        bundle.remove();
    });
}

#[test]
fn shim_stays_while_its_sandbox_lives_and_ends_with_it() {
    with_fake_containerd(|containerd| {
        let pod = Pod::by_service(containerd, &config(containerd));
        let container = pod.run(&idle(&pod));
        let metrics = pod.sandboxes().metrics(&pod.id).unwrap().metrics;
        assert_eq!(metrics.id, pod.id);
        let metrics = Metrics::parse_from_bytes(&metrics.data.value).unwrap();
        assert_eq!(metrics.pids.current, 1);
        assert!(metrics.memory.usage > 0);
        pod.remove_container(&container);
        pod.shim.task.shutdown(&container.id, false).unwrap();
        assert!(!host::ends_within(pod.shim.pid, Duration::from_millis(500)) && pod.is_ready());

        // ShutdownSandbox also ends running containers.
        let container = pod.run(&idle(&pod));
        pod.sandboxes().shut_down(&pod.id).unwrap();
        assert!(host::ends_within(pod.shim.pid, TIMEOUT));
        containerd.events.wait_for(&container.id, "exit 137");
        pod.delete_bundle_of(&container);
        containerd.delete_bundle(&pod.bundle);
        pod.bundle.remove();
    });
}

#[test]
fn start_of_a_pod_member_returns_the_address_of_its_sandbox() {
    with_both_apis(|_, pod| {
        let container = pod.create(&idle(pod)).unwrap();
        for caller in [Caller::V1_7(None), Caller::V2_2(None)] {
            let answer = container.containerd().start(&container.bundle, &caller).unwrap();
            assert_eq!(
                (answer.address.as_str(), answer.version),
                (pod.shim.answer.address.as_str(), 2)
            );
        }
        pod.remove_container(&container);
    });
}

#[test]
fn killed_vmm_ends_the_pod_and_the_rest_can_be_removed_in_any_order() {
    with_fake_containerd(|containerd| {
        let pod = Pod::by_service(containerd, &config(containerd));
        let container = pod.run(&idle(&pod));
        for vmm in containerd.pids_of("nutshell-vmm") {
            host::signal(vmm, Signal::KILL);
        }
        assert_eq!(pod.sandboxes().wait(&pod.id).unwrap().exit_status, 137);
        assert_eq!(pod.sandboxes().status(&pod.id).unwrap().state, NOT_READY);
        assert_eq!(container.wait(), 137);
        pod.remove_container(&container);
        pod.end();

        let pod = Pod::by_task(containerd);
        let container = pod.run(&idle(&pod));
        for vmm in containerd.pids_of("nutshell-vmm") {
            host::signal(vmm, Signal::KILL);
        }
        containerd.events.wait_for(&pod.id, "exit 137");
        assert_eq!(container.wait(), 137);
        // The sandbox is deleted before its container.
        pod.shim.task.delete(&pod.id, "").unwrap();
        pod.remove_container(&container);
        pod.shim.task.shutdown(&pod.id, false).unwrap();
        assert!(host::ends_within(pod.shim.pid, TIMEOUT));
        containerd.delete_bundle(&pod.bundle);
        pod.bundle.remove();
    });
}

#[test]
fn kill_of_the_sandbox_pid_ends_the_pod() {
    with_fake_containerd(|containerd| {
        let pod = Pod::by_service(containerd, &config(containerd));
        let container = pod.run(&idle(&pod));
        host::signal(pod.pid, Signal::KILL);
        assert_eq!(pod.sandboxes().wait(&pod.id).unwrap().exit_status, 137);
        assert_eq!(container.wait(), 137);
        pod.remove_container(&container);
        pod.end();
    });
}

#[test]
fn delete_of_a_sandbox_with_or_without_a_shim_leaves_nothing() {
    with_fake_containerd(|containerd| {
        for killed in [true, false] {
            let pod = Pod::by_service(containerd, &config(containerd));
            let container = pod.run(&idle(&pod));
            if killed {
                host::signal(pod.shim.pid, Signal::KILL);
                assert!(host::ends_within(pod.shim.pid, TIMEOUT));
            }
            // containerd calls `delete` for the sandbox only; after a restart also for each container.
            containerd.delete_bundle(&pod.bundle);
            assert!(host::ends_within(pod.shim.pid, Duration::ZERO));
            pod.delete_bundle_of(&container);
            pod.bundle.remove();
        }
    });
}

#[test]
fn stopped_sandbox_ends_its_containers_and_refuses_new_ones() {
    with_fake_containerd(|containerd| {
        let pod = Pod::by_task(containerd);
        let container = pod.run(&idle(&pod));
        pod.shim.task.kill(&pod.id, "", 15).unwrap();
        assert_eq!(container.wait(), 137);
        assert_eq!(pod.shim.task.wait(&pod.id, "").unwrap().exit_status, 143);
        let late = pod.create(&idle(&pod)).unwrap_err();
        assert_eq!(late.code, Some(Code::FAILED_PRECONDITION), "{late}");
        pod.remove_container(&container);
        pod.end();
    });
}
