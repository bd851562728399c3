//! The lifecycle of containers and execs, call by call.

use containerd_shim::protos::{
    api::{CheckpointTaskRequest, ConnectRequest, PidsRequest, ShutdownRequest, StatsRequest, UpdateTaskRequest},
    protobuf::{EnumOrUnknown, Message},
    shim::oci::ProcessDetails,
    ttrpc::Request as RawRequest,
};
use nutshell_protocol::Request;

use super::*;

#[tokio::test]
async fn lifecycle_of_a_container_is_reported_in_order() {
    let mut shim = Shim::start().await;

    let pid = shim.create("c1").await;
    assert!(process_exists(pid));
    assert_eq!(shim.status("c1").await, Status::CREATED);
    shim.start_task("c1", "").await.unwrap();
    assert_eq!(shim.status("c1").await, Status::RUNNING);
    shim.fake.report_exit("c1", None, 42, [0, 0]);
    assert_eq!(shim.wait("c1", "").await.unwrap(), 42);
    let state = shim.state("c1", "").await.unwrap();
    assert_eq!(
        (state.status.unwrap(), state.exit_status, state.pid),
        (Status::STOPPED, 42, pid)
    );
    assert!(process_exists(pid));
    let deleted = shim.delete("c1", "").await.unwrap();

    assert_eq!((deleted.exit_status, deleted.pid), (42, pid));
    assert!(!process_exists(pid));
    assert!(!process_exists(shim.fake.vmm_pid()));
    assert_eq!(
        shim.next_events(4).await,
        ["create", "start", "exit c1 42", "delete c1 42"]
    );
    assert_eq!(error_of(shim.state("c1", "").await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn version_2_of_the_api_is_the_same_service() {
    let shim = Shim::start().await;
    shim.create("c1").await;
    let call = async |service: &str| {
        let state = StateRequest {
            id: "c1".to_owned(),
            ..StateRequest::default()
        };
        let request = RawRequest {
            service: service.to_owned(),
            method: "State".to_owned(),
            payload: state.write_to_bytes().unwrap(),
            ..RawRequest::default()
        };
        let response = shim.client.request(request).await?;
        Ok(StateResponse::parse_from_bytes(&response.payload).unwrap())
    };

    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        assert_eq!(call(service).await.unwrap().status, EnumOrUnknown::new(Status::CREATED));
    }
    assert_eq!(
        error_of(call("containerd.runtime.sandbox.v1.Sandbox").await).0,
        Code::UNIMPLEMENTED
    );
}

#[tokio::test]
async fn calls_in_the_wrong_phase_fail_with_their_codes() {
    let shim = Shim::start().await;
    let context = context::Context::default;
    assert_eq!(error_of(shim.start_task("unknown", "").await).0, Code::NOT_FOUND);
    assert_eq!(error_of(shim.wait("unknown", "").await).0, Code::NOT_FOUND);
    assert_eq!(error_of(shim.delete("../etc", "").await).0, Code::NOT_FOUND);

    shim.run("c1").await;
    let again = shim.task.create(context(), &shim.request("c1")).await;
    assert_eq!(error_of(again).0, Code::ALREADY_EXISTS);
    assert_eq!(
        error_of(shim.start_task("c1", "").await),
        (Code::FAILED_PRECONDITION, "cannot start a running process".to_owned())
    );
    assert_eq!(
        error_of(shim.delete("c1", "").await),
        (Code::FAILED_PRECONDITION, "cannot delete a running process".to_owned())
    );
    assert_eq!(error_of(shim.kill("c1", "unknown", 9).await).0, Code::NOT_FOUND);
    let checkpoint = shim.task.checkpoint(context(), &CheckpointTaskRequest::default()).await;
    assert_eq!(error_of(checkpoint).0, Code::UNIMPLEMENTED);
    let connected = async |id: &str| {
        let request = ConnectRequest {
            id: id.to_owned(),
            ..ConnectRequest::default()
        };
        shim.task.connect(context(), &request).await.unwrap()
    };
    assert_eq!(connected("unknown").await.task_pid, 0);
    assert_eq!(connected("c1").await.shim_pid, std::process::id());

    shim.fake.report_exit("c1", None, 0, [0, 0]);
    shim.wait("c1", "").await.unwrap();
    assert_eq!(
        error_of(shim.kill("c1", "", 9).await),
        (Code::NOT_FOUND, "process already finished".to_owned())
    );
    assert_eq!(
        error_of(shim.exec("c1", "e1", "true").await).0,
        Code::FAILED_PRECONDITION
    );
    assert_eq!(error_of(shim.start_task("c1", "").await).0, Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn failed_create_has_runcs_text_and_leaves_nothing_behind() {
    let mut shim = Shim::start().await;
    let request = shim.request("c1");
    let bundle = shim.folder.path().join("c1");
    let good = fs::read_to_string(bundle.join("config.json")).unwrap();
    fs::write(bundle.join("config.json"), good.replace("true", "nosuch")).unwrap();

    let (code, text) = error_of(shim.task.create(context::Context::default(), &request).await);

    assert_eq!(code, Code::UNKNOWN);
    assert_eq!(
        text,
        "OCI runtime create failed: unable to start container process: exec: \"nosuch\": executable file not found in $PATH"
    );
    assert!(!process_exists(shim.fake.vmm_pid()));
    assert_eq!(error_of(shim.state("c1", "").await).0, Code::NOT_FOUND);
    shim.assert_no_more_events().await;
    // The id is free again.
    shim.create("c1").await;
}

#[tokio::test]
async fn failed_create_names_the_missing_file() {
    let shim = Shim::start().await;
    let create = async |request| error_of(shim.task.create(context::Context::default(), &request).await).1;

    let mut request = shim.request("c1");
    request.stdout = "/no/such/fifo".to_owned();
    assert!(create(request).await.contains("open stdout /no/such/fifo"));
    let mut request = shim.request("c1");
    request.rootfs[0].source = "/no/such/disk".to_owned();
    assert!(create(request).await.contains("open the disk /no/such/disk"));
    let mut request = shim.request("c1");
    request.bundle = "/no/such/bundle".to_owned();
    assert!(create(request).await.contains("/no/such/bundle"));
}

#[tokio::test]
async fn lifecycle_of_an_exec_is_reported_in_order() {
    let mut shim = Shim::start().await;
    let init = shim.run("c1").await;

    shim.exec("c1", "e1", "true").await.unwrap();
    assert_eq!(error_of(shim.exec("c1", "e1", "true").await).0, Code::ALREADY_EXISTS);
    assert_eq!(error_of(shim.kill("c1", "e1", 9).await).0, Code::FAILED_PRECONDITION);
    assert_eq!(shim.state("c1", "e1").await.unwrap().pid, 0);
    let pid = shim.start_task("c1", "e1").await.unwrap();
    assert!(process_exists(pid) && pid != init);
    shim.fake.report_exit("c1", Some("e1"), 3, [0, 0]);
    assert_eq!(shim.wait("c1", "e1").await.unwrap(), 3);
    assert_eq!(shim.delete("c1", "e1").await.unwrap().exit_status, 3);

    assert!(!process_exists(pid));
    assert_eq!(
        shim.next_events(5).await,
        ["create", "start", "exec-added e1", "exec-started e1", "exit e1 3"]
    );
    assert_eq!(error_of(shim.state("c1", "e1").await).0, Code::NOT_FOUND);
    shim.assert_no_more_events().await;
}

#[tokio::test]
async fn exec_of_a_missing_program_fails_to_start_and_can_be_deleted() {
    let mut shim = Shim::start().await;
    shim.run("c1").await;
    shim.exec("c1", "e1", "nosuch").await.unwrap();

    let (code, text) = error_of(shim.start_task("c1", "e1").await);

    assert_eq!(code, Code::UNKNOWN);
    assert_eq!(
        text,
        "OCI runtime exec failed: exec failed: unable to start container process: exec: \"nosuch\": executable file not found in $PATH"
    );
    assert_eq!(shim.state("c1", "e1").await.unwrap().status.unwrap(), Status::STOPPED);
    shim.delete("c1", "e1").await.unwrap();
    assert_eq!(shim.next_events(3).await, ["create", "start", "exec-added e1"]);
    shim.assert_no_more_events().await;
}

#[tokio::test]
async fn unstarted_exec_is_deleted_without_an_exit_event() {
    let mut shim = Shim::start().await;
    shim.run("c1").await;
    shim.exec("c1", "e1", "true").await.unwrap();
    shim.delete("c1", "e1").await.unwrap();
    assert_eq!(shim.next_events(3).await, ["create", "start", "exec-added e1"]);
    shim.assert_no_more_events().await;
}

#[tokio::test]
async fn pids_are_host_pids_for_started_processes_and_too_large_for_others() {
    let shim = Shim::start().await;
    let init = shim.run("c1").await;
    shim.exec("c1", "e1", "true").await.unwrap();
    let exec = shim.start_task("c1", "e1").await.unwrap();
    let request = PidsRequest {
        id: "c1".to_owned(),
        ..PidsRequest::default()
    };

    let response = shim.task.pids(context::Context::default(), &request).await.unwrap();

    let pids: Vec<_> = response.processes.iter().map(|process| process.pid).collect();
    // The third process has no pid on the host, where the largest is 4194303.
    assert_eq!(pids, [init, exec, 4_194_304 + 3000]);
    let details = &response.processes[1].info;
    assert_eq!(details.type_url, "containerd.runc.v1.ProcessDetails");
    assert_eq!(ProcessDetails::parse_from_bytes(&details.value).unwrap().exec_id, "e1");
}

#[tokio::test]
async fn stats_and_update_are_sent_to_the_guest() {
    let shim = Shim::start().await;
    shim.create("c1").await;
    let id = || "c1".to_owned();

    let request = StatsRequest {
        id: id(),
        ..StatsRequest::default()
    };
    let stats = shim.task.stats(context::Context::default(), &request).await.unwrap();
    assert_eq!(stats.stats.type_url, "io.containerd.cgroups.v2.Metrics");

    let request = UpdateTaskRequest {
        id: id(),
        resources: Some(Any {
            value: b"{}".to_vec(),
            ..Any::default()
        })
        .into(),
        ..UpdateTaskRequest::default()
    };
    shim.task.update(context::Context::default(), &request).await.unwrap();
    let sent = shim.fake.wait_for_request(|request| match request {
        Request::Update { resources, .. } => Some(resources.clone()),
        _ => None,
    });
    assert_eq!(sent, b"{}");
}

#[tokio::test]
async fn shutdown_takes_effect_when_no_container_is_left() {
    let shim = Shim::start().await;
    shim.run("c1").await;
    let shut_down = async || {
        let request = ShutdownRequest::default();
        shim.task.shutdown(context::Context::default(), &request).await.unwrap();
        shim.tasks.is_stopping()
    };
    assert!(!shut_down().await);
    shim.kill("c1", "", 9).await.unwrap();
    shim.wait("c1", "").await.unwrap();
    assert!(!shut_down().await);
    shim.delete("c1", "").await.unwrap();

    assert!(shut_down().await);
    shim.tasks.stopped().await;
    let late = shim.task.create(context::Context::default(), &shim.request("c2")).await;
    assert_eq!(error_of(late).0, Code::UNAVAILABLE);
}

#[tokio::test]
async fn call_completes_when_its_client_disconnects() {
    let mut shim = Shim::start().await;
    let request = shim.request("c1");
    let other = connect(&shim.folder.path().join("socket")).await;
    let call = tokio::spawn(async move {
        let task = TaskClient::new(other);
        task.create(context::with_duration(Duration::from_nanos(1)), &request)
            .await
    });
    assert!(call.await.unwrap().is_err());

    // Either the request was never sent, or the call was completed.
    if let Ok(state) = shim.state("c1", "").await {
        assert_eq!(state.status.unwrap(), Status::CREATED);
        assert_eq!(shim.next_events(1).await, ["create"]);
    }
}

#[tokio::test]
async fn administrator_gets_the_state_of_all_containers_and_the_guests_console() {
    use crate::shim::report::{ADMIN_SERVICE, CONSOLE, FULL_REPORT, REPORT, ShimReport};

    let shim = Shim::start().await;
    let pid = shim.run("c1").await;
    shim.create("c2").await;
    shim.exec("c1", "e1", "true").await.unwrap();
    let call = async |method: &str, payload: &[u8]| {
        let request = RawRequest {
            service: ADMIN_SERVICE.to_owned(),
            method: method.to_owned(),
            payload: payload.to_vec(),
            ..RawRequest::default()
        };
        shim.client.request(request).await.map(|response| response.payload)
    };

    let report: ShimReport = serde_json::from_slice(&call(REPORT, b"").await.unwrap()).unwrap();

    assert_eq!(report.pid, std::process::id());
    let [first, second] = &report.containers[..] else {
        panic!("{report:?}");
    };
    assert_eq!(
        (first.id.as_str(), first.state.as_str(), first.pid),
        ("c1", "running", pid)
    );
    assert_eq!(first.execs, ["e1"]);
    assert!(first.create_milliseconds.is_some() && first.start_milliseconds.is_some());
    assert!(first.machine.boot_milliseconds.is_some() && first.machine.memory_bytes > 0);
    assert_eq!((second.id.as_str(), second.state.as_str()), ("c2", "created"));
    assert_eq!(second.start_milliseconds, None);

    assert_eq!(
        (&first.machine.devices[..], &first.machine.devices_error),
        (&[][..], &None)
    );
    assert!(first.started_milliseconds >= first.create_milliseconds);

    let report: ShimReport = serde_json::from_slice(&call(FULL_REPORT, b"").await.unwrap()).unwrap();

    let machine = &report.containers[0].machine;
    let found: Vec<_> = machine
        .devices
        .iter()
        .map(|device| (device.name.as_str(), device.requests, device.path.is_some()))
        .collect();
    // The vmm may be hostile: its control characters are escaped.
    let expected = [
        ("vsock", 9, false),
        ("nutshell-0", 7, true),
        ("\\u{1b}[31mred", 0, false),
        ("serial", 0, false),
    ];
    assert_eq!(found, expected);
    assert_eq!(machine.sandbox, "c1");
    assert!(machine.phases.agent_ready_milliseconds.is_some() && machine.phases.vmm_ready_milliseconds.is_some());
    assert_eq!(
        (machine.phases.kernel_milliseconds, &machine.devices_error),
        (None, &None)
    );

    assert_eq!(call(CONSOLE, b"c1").await.unwrap(), b"Linux version\nno init");
    assert_eq!(error_of(call(CONSOLE, b"unknown").await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn vmm_that_does_not_answer_delays_the_full_report_by_a_second_only() {
    let shim = Shim::start_with(Behaviour::NoStatistics).await;
    shim.run("c1").await;
    shim.run("c2").await;
    let start = std::time::Instant::now();

    let report = shim.tasks.full_report().await;

    assert!(start.elapsed() < Duration::from_millis(1900), "{:?}", start.elapsed());
    for container in &report.containers {
        let error = container.machine.devices_error.as_deref();
        assert_eq!(error, Some("the vmm did not answer within 1 s"));
        assert_eq!(container.state, "running");
    }
    shim.kill("c2", "", 9).await.unwrap();
}
