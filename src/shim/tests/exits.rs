//! Exits of processes and ends of machines, requested or unsolicited.

use containerd_shim::protos::api::{PidsRequest, StatsRequest};
use nutshell_protocol::Request;

use super::*;
use crate::shim::record;

#[tokio::test]
async fn kill_of_created_task_reports_137() {
    let mut shim = Shim::start().await;
    shim.create("c1").await;

    shim.kill("c1", "", 9).await.unwrap();

    assert_eq!(shim.wait("c1", "").await.unwrap(), 137);
    assert_eq!(error_of(shim.start_task("c1", "").await).0, Code::FAILED_PRECONDITION);
    shim.delete("c1", "").await.unwrap();
    assert_eq!(shim.next_events(3).await, ["create", "exit c1 137", "delete c1 137"]);
}

#[tokio::test]
async fn delete_of_created_task_kills_it_first() {
    let mut shim = Shim::start().await;
    shim.create("c1").await;
    assert_eq!(shim.delete("c1", "").await.unwrap().exit_status, 137);
    assert_eq!(shim.next_events(3).await, ["create", "exit c1 137", "delete c1 137"]);
}

#[tokio::test]
async fn exit_is_reported_after_the_output_is_drained() {
    let mut shim = Shim::start_with(Behaviour::NeverDrains).await;
    shim.run("c1").await;
    shim.fake.report_exit("c1", None, 0, [5, 0]);
    // The response shows that the shim has read the event.
    let request = StatsRequest {
        id: "c1".to_owned(),
        ..StatsRequest::default()
    };
    shim.task.stats(context::Context::default(), &request).await.unwrap();
    assert_eq!(shim.status("c1").await, Status::RUNNING);

    shim.fake.report_drained();

    assert_eq!(shim.wait("c1", "").await.unwrap(), 0);
    assert_eq!(shim.next_events(3).await, ["create", "start", "exit c1 0"]);
}

#[tokio::test]
async fn exits_of_execs_precede_that_of_their_container() {
    let mut shim = Shim::start_with(Behaviour::NeverDrains).await;
    shim.run("c1").await;
    shim.exec("c1", "e1", "true").await.unwrap();
    shim.start_task("c1", "e1").await.unwrap();
    shim.exec("c1", "e2", "true").await.unwrap();

    shim.fake.report_exit("c1", Some("e1"), 137, [0, 0]);
    shim.fake.report_exit("c1", None, 1, [0, 0]);

    assert_eq!(shim.wait("c1", "").await.unwrap(), 1);
    assert_eq!(
        shim.next_events(7).await[2..],
        [
            "exec-added e1",
            "exec-started e1",
            "exec-added e2",
            "exit e1 137",
            "exit c1 1"
        ]
    );
    assert_eq!(shim.state("c1", "e2").await.unwrap().status.unwrap(), Status::CREATED);
}

#[tokio::test]
async fn exit_is_announced_once_and_false_reports_are_ignored() {
    let mut shim = Shim::start().await;
    shim.run("c1").await;
    shim.exec("c1", "waiting", "true").await.unwrap();
    for (id, exec) in [
        ("c2", None),
        ("c1", Some("unknown")),
        ("c1", Some("waiting")),
        ("../c1", None),
    ] {
        shim.fake.report_exit(id, exec, 7, [0, 0]);
    }
    shim.fake.report_exit("c1", None, 1, [0, 0]);
    shim.fake.report_exit("c1", None, 2, [0, 0]);

    assert_eq!(shim.wait("c1", "").await.unwrap(), 1);
    assert_eq!(shim.delete("c1", "").await.unwrap().exit_status, 1);
    assert_eq!(
        shim.next_events(5).await,
        ["create", "start", "exec-added waiting", "exit c1 1", "delete c1 1"]
    );
    shim.assert_no_more_events().await;
}

#[tokio::test]
async fn exit_is_recorded_in_the_bundle() {
    let shim = Shim::start().await;
    let pid = shim.run("c1").await;
    shim.fake.report_exit("c1", None, 42, [0, 0]);
    shim.wait("c1", "").await.unwrap();
    let exit = record::ExitRecord::load(&shim.folder.path().join("c1"))
        .unwrap()
        .unwrap();
    assert_eq!((exit.pid, exit.status), (pid, 42));
}

#[tokio::test]
async fn out_of_memory_is_announced_before_the_exit() {
    let mut shim = Shim::start().await;
    shim.run("c1").await;
    shim.fake.report_out_of_memory("c1");
    shim.fake.report_out_of_memory("unknown");
    shim.fake.report_exit("c1", None, 137, [0, 0]);
    assert_eq!(shim.next_events(4).await, ["create", "start", "oom", "exit c1 137"]);
}

#[tokio::test]
async fn flood_of_out_of_memory_reports_is_announced_once() {
    let mut shim = Shim::start().await;
    shim.run("c1").await;
    for _ in 0..50 {
        shim.fake.report_out_of_memory("c1");
    }
    shim.fake.report_exit("c1", None, 137, [0, 0]);
    assert_eq!(shim.next_events(4).await, ["create", "start", "oom", "exit c1 137"]);
    shim.assert_no_more_events().await;
}

#[tokio::test]
async fn all_waiters_get_the_exit_status() {
    let shim = Shim::start().await;
    shim.run("c1").await;
    let waiting = async {
        tokio::join!(shim.wait("c1", ""), shim.wait("c1", ""), async {
            shim.fake.report_exit("c1", None, 5, [0, 0]);
        })
    };
    let (first, second, ()) = waiting.await;
    assert_eq!((first.unwrap(), second.unwrap()), (5, 5));
}

#[tokio::test]
async fn signal_to_the_host_pid_reaches_the_process() {
    let shim = Shim::start().await;
    let pid = shim.run("c1").await;

    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();

    assert_eq!(shim.wait("c1", "").await.unwrap(), 143);
    let signal = shim.fake.wait_for_request(|request| match request {
        Request::Signal { signal, exec: None, .. } => Some(*signal),
        _ => None,
    });
    assert_eq!(signal, 15);
    shim.delete("c1", "").await.unwrap();
}

#[tokio::test]
async fn end_of_the_machine_ends_its_processes_and_not_the_shim() {
    let mut shim = Shim::start().await;
    shim.run("c1").await;
    shim.exec("c1", "e1", "true").await.unwrap();
    shim.start_task("c1", "e1").await.unwrap();

    shim.fake.kill_vmm();

    assert_eq!(shim.wait("c1", "e1").await.unwrap(), 137);
    assert_eq!(shim.wait("c1", "").await.unwrap(), 137);
    assert_eq!(shim.next_events(6).await[4..], ["exit e1 137", "exit c1 137"]);
    assert_eq!(shim.delete("c1", "").await.unwrap().exit_status, 137);
    assert_eq!(shim.next_events(1).await, ["delete c1 137"]);
    // The shim still works.
    shim.create("c2").await;
}

#[tokio::test]
async fn create_reports_why_the_machine_cannot_be_built() {
    let mut shim = Shim::start_with(Behaviour::BootFails).await;
    let (code, text) = error_of(shim.task.create(context::Context::default(), &shim.request("c1")).await);
    assert_eq!(code, Code::UNKNOWN);
    assert_eq!(
        text,
        "OCI runtime create failed: cannot build the virtual machine: KVM_CREATE_VM: no memory; \
         the end of the guest's console:\n[31mnothing yet"
    );
    assert!(!process_exists(shim.fake.vmm_pid()));
    shim.assert_no_more_events().await;
}

#[tokio::test]
async fn guest_that_is_never_ready_is_killed_and_its_console_reported() {
    let shim = Shim::start_with(Behaviour::NeverReady).await;
    let (_, text) = error_of(shim.task.create(context::Context::default(), &shim.request("c1")).await);
    assert_eq!(
        text,
        "OCI runtime create failed: the guest did not become ready: it made no progress for 0.3 s: if this host is slow, raise \
         ready_timeout_seconds in section [guest] of the configuration; \
         the end of the guest's console:\nLinux version\nno init"
    );
    assert!(!process_exists(shim.fake.vmm_pid()));
}

#[tokio::test]
async fn hung_guest_delays_no_response_and_does_not_survive_sigkill() {
    let shim = Shim::start_with(Behaviour::Unresponsive).await;
    let pid = shim.create("c1").await;
    let start = std::time::Instant::now();
    let request = PidsRequest {
        id: "c1".to_owned(),
        ..PidsRequest::default()
    };
    let pids = shim.task.pids(context::Context::default(), &request).await.unwrap();
    assert_eq!(pids.processes[0].pid, pid);
    assert_eq!(shim.status("c1").await, Status::CREATED);
    assert!(start.elapsed() < Duration::from_secs(3));

    shim.kill("c1", "", 9).await.unwrap();

    assert_eq!(shim.wait("c1", "").await.unwrap(), 137);
    assert!(!process_exists(shim.fake.vmm_pid()));
    shim.delete("c1", "").await.unwrap();
}
