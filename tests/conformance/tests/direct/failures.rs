//! Kills of the shim, the vmm, and the fs process.

use std::time::Duration;

use containerd_shim_protos::{api::Status, ttrpc::Code};
use nutshell_conformance::{TIMEOUT, bundle::idle, host, with_fake_containerd};
use rustix::process::Signal;

#[test]
fn killed_vmm_or_fs_ends_all_processes_and_the_shim_keeps_serving() {
    with_fake_containerd(|containerd| {
        for name in ["nutshell-vmm", "nutshell-fs"] {
            let container = containerd.run(&idle());
            let exec = container.exec(&["sleep", "1000"]);
            exec.start();
            let [pid] = containerd.pids_of(name)[..] else {
                panic!("not exactly one {name}: {:?}", containerd.processes());
            };
            host::signal(pid, Signal::KILL);

            assert_eq!(container.wait(), 137, "{name}");
            assert_eq!(exec.wait(), 137, "{name}");
            containerd.events.wait_for(&container.id, "exit 137");

            let task = container.task().with_timeout(Duration::from_secs(5));
            assert_eq!(container.status(""), Status::STOPPED);
            assert_eq!(task.connect_to(&container.id).unwrap().task_pid, container.pid);
            assert_eq!(task.pids(&container.id).unwrap().processes.len(), 1);
            let stats = task.stats(&container.id).unwrap_err();
            assert_eq!(stats.code, Some(Code::UNAVAILABLE), "{stats}");
            let again = task.kill(&container.id, "", 9).unwrap_err();
            assert_eq!(again.code, Some(Code::NOT_FOUND), "{again}");
            let id = container.id.clone();
            let started = format!("started {}", exec.id);
            let exit = format!("exit {} 137", exec.id);
            container.end();
            assert_eq!(
                containerd.events.of_container(&id)[3..],
                [started, exit, "exit 137".to_owned(), "delete 137".to_owned()],
                "{name}"
            );
        }
    });
}

#[test]
fn killed_vmm_ends_a_created_container() {
    with_fake_containerd(|containerd| {
        let container = containerd.create(&idle());
        for vmm in containerd.pids_of("nutshell-vmm") {
            host::signal(vmm, Signal::KILL);
        }
        assert_eq!(container.wait(), 137);
        let start = container.task().start(&container.id, "").unwrap_err();
        assert_eq!(start.code, Some(Code::FAILED_PRECONDITION), "{start}");
        container.end();
    });
}

#[test]
fn killed_shim_ends_its_processes_and_a_new_shim_can_be_started() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        host::signal(container.shim.pid, Signal::KILL);
        assert!(host::ends_within(container.shim.pid, TIMEOUT));
        host::eventually(TIMEOUT, || match containerd.processes() {
            left if left.is_empty() => Ok(()),
            left => Err(format!("{left:?}")),
        })
        .unwrap();
        assert_eq!(containerd.delete_bundle(&container.bundle).exit_status, 137);
        container.bundle.remove();

        let bundle = containerd.bundle_with_id(&container.id, &idle());
        let shim = containerd.start_shim(&bundle);
        shim.task.shutdown(&bundle.id, false).unwrap();
        assert!(host::ends_within(shim.pid, TIMEOUT));
        containerd.delete_bundle(&bundle);
        bundle.remove();
    });
}
