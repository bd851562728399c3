//! Pods: sandboxes of both APIs, and the resources that containers share.

use containerd_shim::protos::{
    api::{ShutdownRequest, UpdateTaskRequest},
    protobuf::MessageField,
    sandbox_api::{
        CreateSandboxRequest, PingRequest, SandboxMetricsRequest, SandboxStatusRequest, SandboxStatusResponse,
        ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
    },
    sandbox_async::SandboxClient,
};
use nutshell_protocol::{PidNamespace, Request, SetUpPod};
use serde_json::Value;

use super::*;

impl Shim {
    fn sandboxes(&self) -> SandboxClient {
        SandboxClient::new(self.client.clone())
    }

    pub(super) async fn create_sandbox(&self, id: &str) -> ttrpc::Result<()> {
        let bundle = self.folder.path().join(id);
        fs::create_dir_all(&bundle).unwrap();
        let request = CreateSandboxRequest {
            sandbox_id: id.to_owned(),
            bundle_path: bundle.display().to_string(),
            options: MessageField::some(Any {
                type_url: "runtime.v1.PodSandboxConfig".to_owned(),
                // Field 2: `hostname`.
                value: b"\x12\x05web-0".to_vec(),
                ..Any::default()
            }),
            ..CreateSandboxRequest::default()
        };
        let context = context::Context::default();
        self.sandboxes().create_sandbox(context, &request).await.map(drop)
    }

    pub(super) async fn start_sandbox(&self, id: &str) -> ttrpc::Result<u32> {
        let request = StartSandboxRequest {
            sandbox_id: id.to_owned(),
            ..StartSandboxRequest::default()
        };
        let context = context::Context::default();
        let response = self.sandboxes().start_sandbox(context, &request).await?;
        assert!(response.created_at.seconds > 1_700_000_000);
        Ok(response.pid)
    }

    pub(super) async fn stop_sandbox(&self, id: &str) -> ttrpc::Result<()> {
        let request = StopSandboxRequest {
            sandbox_id: id.to_owned(),
            ..StopSandboxRequest::default()
        };
        let context = context::Context::default();
        self.sandboxes().stop_sandbox(context, &request).await.map(drop)
    }

    async fn wait_sandbox(&self, id: &str) -> ttrpc::Result<u32> {
        let request = WaitSandboxRequest {
            sandbox_id: id.to_owned(),
            ..WaitSandboxRequest::default()
        };
        let context = context::Context::default();
        Ok(self.sandboxes().wait_sandbox(context, &request).await?.exit_status)
    }

    async fn sandbox_status(&self, id: &str) -> ttrpc::Result<SandboxStatusResponse> {
        let request = SandboxStatusRequest {
            sandbox_id: id.to_owned(),
            verbose: true,
            ..SandboxStatusRequest::default()
        };
        let context = context::Context::default();
        self.sandboxes().sandbox_status(context, &request).await
    }

    async fn ping_sandbox(&self, id: &str) -> ttrpc::Result<()> {
        let request = PingRequest {
            sandbox_id: id.to_owned(),
            ..PingRequest::default()
        };
        let context = context::Context::default();
        self.sandboxes().ping_sandbox(context, &request).await.map(drop)
    }

    async fn shut_down_sandbox(&self, id: &str) -> ttrpc::Result<()> {
        let request = ShutdownSandboxRequest {
            sandbox_id: id.to_owned(),
            ..ShutdownSandboxRequest::default()
        };
        let context = context::Context::default();
        self.sandboxes().shutdown_sandbox(context, &request).await.map(drop)
    }

    /// A request for a container of the pod `pod`, with a spec changed by `change`. `kind` is `sandbox` or `container`.
    pub(super) fn request_in_pod(&self, id: &str, kind: &str, change: impl FnOnce(&mut Value)) -> CreateTaskRequest {
        let request = self.request(id);
        let path = self.folder.path().join(id).join("config.json");
        let mut spec: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        spec["annotations"] = json!({
            "io.kubernetes.cri.container-type": kind,
            "io.kubernetes.cri.sandbox-id": "pod",
        });
        change(&mut spec);
        fs::write(path, spec.to_string()).unwrap();
        request
    }

    pub(super) async fn create_in_pod(
        &self,
        id: &str,
        kind: &str,
        change: impl FnOnce(&mut Value),
    ) -> ttrpc::Result<u32> {
        let request = self.request_in_pod(id, kind, change);
        let response = self.task.create(context::Context::default(), &request).await?;
        Ok(response.pid)
    }

    pub(super) async fn run_member(&self, id: &str) -> u32 {
        let pid = self.create_in_pod(id, "container", |_| {}).await.unwrap();
        self.start_task(id, "").await.unwrap();
        pid
    }

    async fn shut_down(&self) {
        let request = ShutdownRequest::default();
        self.task.shutdown(context::Context::default(), &request).await.unwrap();
    }

    fn is_stopping(&self) -> bool {
        self.tasks.is_stopping()
    }
}

fn share_pids_of(pid: u32) -> impl FnOnce(&mut Value) {
    move |spec| spec["linux"]["namespaces"][1]["path"] = json!(format!("/proc/{pid}/ns/pid"))
}

#[tokio::test]
async fn service_sandbox_passes_all_states_without_events() {
    let mut shim = Shim::start().await;
    assert_eq!(error_of(shim.sandbox_status("pod").await).0, Code::NOT_FOUND);
    shim.create_sandbox("pod").await.unwrap();
    let created = shim.sandbox_status("pod").await.unwrap();
    assert_eq!(
        (created.state.as_str(), created.exited_at.is_some()),
        ("SANDBOX_NOTREADY", false)
    );
    assert!(process_exists(created.pid));

    assert_eq!(shim.start_sandbox("pod").await.unwrap(), created.pid);

    let ready = shim.sandbox_status("pod").await.unwrap();
    assert_eq!((ready.state.as_str(), ready.pid), ("SANDBOX_READY", created.pid));
    assert_eq!(ready.info["vmmPid"], shim.fake.vmm_pid().to_string());
    shim.ping_sandbox("pod").await.unwrap();

    shim.stop_sandbox("pod").await.unwrap();
    shim.stop_sandbox("pod").await.unwrap();

    assert_eq!(shim.wait_sandbox("pod").await.unwrap(), 0);
    let stopped = shim.sandbox_status("pod").await.unwrap();
    assert_eq!(
        (stopped.state.as_str(), stopped.exited_at.is_some()),
        ("SANDBOX_NOTREADY", true)
    );
    assert_eq!(error_of(shim.ping_sandbox("pod").await).0, Code::FAILED_PRECONDITION);
    shim.shut_down_sandbox("pod").await.unwrap();
    assert!(shim.is_stopping() && !process_exists(created.pid));
    shim.assert_no_more_events().await;
}

#[tokio::test]
async fn sandbox_calls_in_the_wrong_phase_fail_with_their_codes() {
    let shim = Shim::start().await;
    assert_eq!(error_of(shim.start_sandbox("pod").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(error_of(shim.stop_sandbox("pod").await).0, Code::NOT_FOUND);
    assert_eq!(error_of(shim.wait_sandbox("pod").await).0, Code::NOT_FOUND);
    assert_eq!(error_of(shim.ping_sandbox("pod").await).0, Code::NOT_FOUND);
    assert_eq!(error_of(shim.create_sandbox("../pod").await).0, Code::INVALID_ARGUMENT);
    shim.create_sandbox("pod").await.unwrap();
    assert_eq!(error_of(shim.create_sandbox("pod").await).0, Code::ALREADY_EXISTS);
    shim.start_sandbox("pod").await.unwrap();
    assert_eq!(error_of(shim.start_sandbox("pod").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(error_of(shim.create_sandbox("pod").await).0, Code::ALREADY_EXISTS);
    assert_eq!(error_of(shim.shut_down_sandbox("other").await).0, Code::NOT_FOUND);
    shim.stop_sandbox("pod").await.unwrap();
    assert_eq!(error_of(shim.start_sandbox("pod").await).0, Code::FAILED_PRECONDITION);
    let late = error_of(shim.create_in_pod("c1", "container", |_| {}).await);
    assert!(
        late.0 == Code::FAILED_PRECONDITION && late.1.contains("stopped"),
        "{late:?}"
    );
    assert!(!shim.is_stopping());
}

#[tokio::test]
async fn service_sandbox_is_no_task_and_keeps_the_shim_until_its_shutdown() {
    let shim = Shim::start().await;
    shim.create_sandbox("pod").await.unwrap();
    let pid = shim.start_sandbox("pod").await.unwrap();
    assert_eq!(error_of(shim.state("pod", "").await).0, Code::NOT_FOUND);
    assert_eq!(error_of(shim.kill("pod", "", 9).await).0, Code::NOT_FOUND);
    assert_eq!(error_of(shim.delete("pod", "").await).0, Code::NOT_FOUND);
    assert_eq!(
        error_of(shim.create_in_pod("pod", "container", |_| {}).await).0,
        Code::ALREADY_EXISTS
    );

    shim.run_member("c1").await;
    shim.kill("c1", "", 9).await.unwrap();
    shim.wait("c1", "").await.unwrap();
    shim.delete("c1", "").await.unwrap();
    shim.shut_down().await;
    assert!(!shim.is_stopping());
    shim.stop_sandbox("pod").await.unwrap();
    shim.shut_down().await;
    assert!(!shim.is_stopping());

    shim.shut_down_sandbox("pod").await.unwrap();
    assert!(shim.is_stopping() && !process_exists(pid));
}

#[tokio::test]
async fn sandbox_shutdown_ends_all_containers_and_works_without_a_sandbox() {
    let mut shim = Shim::start().await;
    shim.create_sandbox("pod").await.unwrap();
    let pid = shim.start_sandbox("pod").await.unwrap();
    let member = shim.run_member("c1").await;
    shim.shut_down_sandbox("pod").await.unwrap();
    assert!(shim.is_stopping() && !process_exists(pid) && !process_exists(member));
    assert_eq!(shim.next_events(3).await, ["create", "start", "exit c1 137"]);

    let shim = Shim::start().await;
    shim.shut_down_sandbox("pod").await.unwrap();
    assert!(shim.is_stopping());
}

#[tokio::test]
async fn pod_is_set_up_once_before_its_first_container() {
    let shim = Shim::start().await;
    let sysctls = |spec: &mut Value| {
        spec["hostname"] = json!("web-0");
        spec["domainname"] = json!("example");
        spec["linux"]["sysctl"] = json!({"net.core.somaxconn": "7", "kernel.shmmax": "9"});
    };
    shim.create_in_pod("pod", "sandbox", sysctls).await.unwrap();
    // The sandbox is not started yet: a client may create containers at once.
    shim.create_in_pod("c1", "container", |_| {}).await.unwrap();
    let requests = shim.fake.requests();
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let expected = SetUpPod {
        hostname: Some("web-0".to_owned()),
        domainname: Some("example".to_owned()),
        sysctls: vec![pair("kernel.shmmax", "9"), pair("net.core.somaxconn", "7")],
        shm_size: 64 << 20,
        files: Vec::new(),
    };
    let kinds: Vec<_> = requests
        .iter()
        .filter(|request| matches!(request, Request::SetUpPod(_) | Request::CreateContainer(_)))
        .collect();
    assert!(matches!(kinds[..], [Request::SetUpPod(set_up), Request::CreateContainer(_)] if *set_up == expected));
    shim.start_task("pod", "").await.unwrap();
    assert_eq!(shim.fake.requests().len(), requests.len(), "the pod is set up twice");
}

#[tokio::test]
async fn service_sandbox_provides_etc_files() {
    let shim = Shim::start().await;
    shim.create_sandbox("pod").await.unwrap();
    shim.start_sandbox("pod").await.unwrap();
    let files = shim.fake.wait_for_request(|request| match request {
        Request::SetUpPod(set_up) => Some(set_up.files.clone()),
        _ => None,
    });
    let names: Vec<_> = files.iter().map(|file| file.destination.as_str()).collect();
    assert_eq!(names, ["/etc/resolv.conf", "/etc/hosts", "/etc/hostname"]);
    assert_eq!(files[2].content, b"web-0\n");
}

#[tokio::test]
async fn failed_sandbox_start_names_the_refused_sysctl() {
    let mut shim = Shim::start().await;
    let sysctl = |spec: &mut Value| spec["linux"]["sysctl"] = json!({"no.such": "1"});
    shim.create_in_pod("pod", "sandbox", sysctl).await.unwrap();
    let (code, text) = error_of(shim.start_task("pod", "").await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("no.such"), "{text}");
    let (_, text) = error_of(shim.create_in_pod("c1", "container", |_| {}).await);
    assert!(text.contains("no.such"), "{text}");
    assert_eq!(shim.status("pod").await, Status::CREATED);
    shim.delete("pod", "").await.unwrap();
    assert_eq!(shim.next_events(3).await, ["create", "exit pod 137", "delete pod 137"]);
}

#[tokio::test]
async fn sandbox_start_reports_why_its_machine_did_not_boot() {
    for behaviour in [Behaviour::BootFails, Behaviour::NeverReady] {
        let shim = Shim::start_with(behaviour).await;
        shim.create_in_pod("pod", "sandbox", |_| {}).await.unwrap();
        let (_, text) = error_of(shim.start_task("pod", "").await);
        let reason = match behaviour {
            Behaviour::BootFails => "no memory",
            _ => "did not become ready",
        };
        assert!(text.contains(reason), "{text}");
    }
}

#[tokio::test]
async fn sandbox_in_a_host_namespace_is_refused_before_a_machine_starts() {
    let mut shim = Shim::start().await;
    for (kind, field) in [("network", "hostNetwork"), ("pid", "hostPID"), ("ipc", "hostIPC")] {
        let without = |spec: &mut Value| {
            let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| namespace["type"] != kind);
        };
        let (code, text) = error_of(shim.create_in_pod("pod", "sandbox", without).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
        assert!(text.contains(field), "{text}");
    }
    assert_eq!(shim.fake.vmm_pid(), 0, "a machine was started");
    shim.assert_no_more_events().await;
}

/// The requests that resize the machine and create or update containers, in short form.
fn summarize_requests(requests: &[Request]) -> String {
    let kind = |request: &Request| match request {
        Request::ResizeMachine {
            vcpus,
            has_memory_device,
        } => Some(format!("resize {vcpus} {has_memory_device}")),
        Request::CreateContainer(_) => Some("create".to_owned()),
        Request::Update { .. } => Some("update".to_owned()),
        _ => None,
    };
    requests.iter().filter_map(kind).collect::<Vec<_>>().join(", ")
}

#[tokio::test]
async fn machine_size_follows_the_limits_of_the_containers() {
    let shim = Shim::start().await;
    shim.create_in_pod("pod", "sandbox", |_| {}).await.unwrap();
    let limits = |memory: u64, quota: u64| {
        move |spec: &mut Value| {
            spec["linux"]["resources"] = json!({
                "memory": {"limit": memory << 20},
                "cpu": {"quota": quota, "period": 100_000},
            });
        }
    };
    let update = async |resources: Value| {
        let request = UpdateTaskRequest {
            id: "c1".to_owned(),
            resources: MessageField::some(Any {
                value: serde_json::to_vec(&resources).unwrap(),
                ..Any::default()
            }),
            ..UpdateTaskRequest::default()
        };
        shim.task.update(context::Context::default(), &request).await.unwrap();
    };

    // The machine boots with 128 MiB. A container's limit needs additional memory for overhead.
    shim.create_in_pod("small", "container", limits(32, 50_000))
        .await
        .unwrap();
    assert_eq!(shim.fake.resizes(0), []);
    shim.create_in_pod("c1", "container", limits(224, 120_000))
        .await
        .unwrap();
    assert_eq!(shim.fake.resizes(1), [(256 + 4 + 64 - 128, 2)]);
    update(json!({"memory": {"limit": 480 << 20}, "cpu": {"quota": 300_000, "period": 100_000}})).await;
    assert_eq!(shim.fake.resizes(2)[1..], [(512 + 8 + 64 - 128, 4)]);
    update(json!({"memory": {"limit": 480 << 20}})).await;
    assert_eq!(shim.fake.resizes(2).len(), 2, "nothing changed");
    assert_eq!(
        summarize_requests(&shim.fake.requests()),
        "create, resize 2 true, create, resize 4 true, update, update"
    );

    update(json!({"memory": {"limit": 96 << 20}, "cpu": {"quota": 50_000}})).await;
    assert_eq!(shim.fake.resizes(3)[2..], [(128 + 2 + 64 - 128, 1)]);
    let requests = summarize_requests(&shim.fake.requests());
    assert!(
        requests.contains("update, update, update"),
        "the machine shrinks before the limits do: {requests}"
    );
}

#[tokio::test]
async fn machine_shrinks_back_after_delete_failed_create_and_failed_resize() {
    let limits =
        |memory: u64| move |spec: &mut Value| spec["linux"]["resources"]["memory"] = json!({"limit": memory << 20});
    let shim = Shim::start().await;
    shim.create_in_pod("pod", "sandbox", |_| {}).await.unwrap();
    shim.create_in_pod("big", "container", limits(224)).await.unwrap();
    assert_eq!(shim.fake.resizes(1), [(224 + 4 + 64 - 128, 1)]);
    shim.delete("big", "").await.unwrap();
    assert_eq!(shim.fake.resizes(2)[1..], [(0, 1)], "after delete");
    let failing = |spec: &mut Value| {
        limits(224)(spec);
        spec["process"]["args"] = json!(["nosuch"]);
    };
    shim.create_in_pod("failing", "container", failing).await.unwrap_err();
    assert_eq!(shim.fake.resizes(4)[3..], [(0, 1)], "after failed create");

    let shim = Shim::start_with(Behaviour::CannotGrow).await;
    shim.create_in_pod("pod", "sandbox", |_| {}).await.unwrap();
    shim.create_in_pod("big", "container", limits(224)).await.unwrap();
    assert_eq!(shim.fake.resizes(2)[1..], [(0, 1)], "after failed resize");
}

#[tokio::test]
async fn disk_slots_of_deleted_and_failed_containers_are_reused() {
    let shim = Shim::start().await;
    shim.create_in_pod("pod", "sandbox", |_| {}).await.unwrap();
    for _ in 0..5 {
        for number in 0..8 {
            shim.create_in_pod(&format!("c{number}"), "container", |_| {})
                .await
                .unwrap();
        }
        let (_, text) = error_of(shim.create_in_pod("ninth", "container", |_| {}).await);
        assert!(text.contains("at most 8"), "{text}");
        for number in 0..8 {
            shim.delete(&format!("c{number}"), "").await.unwrap();
        }
        for number in 0..8 {
            let missing = |spec: &mut Value| spec["process"]["args"] = json!(["nosuch"]);
            let failed = shim.create_in_pod(&format!("c{number}"), "container", missing).await;
            failed.unwrap_err();
        }
    }
}

#[tokio::test]
async fn pid_namespace_is_that_of_the_sandbox_or_of_a_target() {
    let shim = Shim::start().await;
    let sandbox = shim.create_in_pod("pod", "sandbox", |_| {}).await.unwrap();
    shim.start_task("pod", "").await.unwrap();
    let alone = shim.run_member("alone").await;
    shim.create_in_pod("shares", "container", share_pids_of(sandbox))
        .await
        .unwrap();
    shim.create_in_pod("joins", "container", share_pids_of(alone))
        .await
        .unwrap();
    shim.create_in_pod("elsewhere", "container", share_pids_of(1))
        .await
        .unwrap();
    for (id, expected) in [
        ("alone", PidNamespace::Specified),
        ("shares", PidNamespace::Pod),
        // The pid belongs to no task of this pod.
        ("elsewhere", PidNamespace::Pod),
        ("joins", PidNamespace::Container("alone".to_owned())),
    ] {
        let namespace = shim.fake.wait_for_request(|request| match request {
            Request::CreateContainer(create) if create.container == id => Some(create.pid_namespace.clone()),
            _ => None,
        });
        assert_eq!(namespace, expected, "{id}");
    }

    shim.kill("alone", "", 9).await.unwrap();
    shim.wait("alone", "").await.unwrap();
    let (code, text) = error_of(shim.create_in_pod("late", "container", share_pids_of(alone)).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(text.contains("alone"), "{text}");
}

#[tokio::test]
async fn exit_of_a_container_affects_neither_its_siblings_nor_the_pod() {
    let mut shim = Shim::start().await;
    shim.create_in_pod("pod", "sandbox", |_| {}).await.unwrap();
    shim.start_task("pod", "").await.unwrap();
    for id in ["a", "b"] {
        shim.run_member(id).await;
    }
    shim.fake.report_out_of_memory("a");
    shim.fake.report_exit("a", None, 137, [0, 0]);
    assert_eq!(shim.wait("a", "").await.unwrap(), 137);
    shim.delete("a", "").await.unwrap();
    assert_eq!(
        (shim.status("b").await, shim.status("pod").await),
        (Status::RUNNING, Status::RUNNING)
    );

    shim.kill("b", "", 15).await.unwrap();
    shim.wait("b", "").await.unwrap();
    shim.delete("b", "").await.unwrap();
    shim.shut_down().await;
    assert!(!shim.is_stopping(), "the pod ends without a container");
    shim.run_member("a").await;
    assert_eq!(shim.status("a").await, Status::RUNNING);
    let mut events = shim.next_events(13).await;
    events.retain(|event| event.starts_with("exit") || event == "oom");
    assert_eq!(events, ["oom", "exit a 137", "exit b 143"]);
}

#[tokio::test]
async fn killed_machine_ends_the_sandbox_and_its_containers() {
    let mut shim = Shim::start().await;
    shim.create_sandbox("pod").await.unwrap();
    shim.start_sandbox("pod").await.unwrap();
    shim.run_member("a").await;
    shim.fake.kill_vmm();
    assert_eq!(shim.wait_sandbox("pod").await.unwrap(), 137);
    assert_eq!(shim.sandbox_status("pod").await.unwrap().state, "SANDBOX_NOTREADY");
    assert_eq!(shim.wait("a", "").await.unwrap(), 137);
    assert_eq!(shim.next_events(3).await, ["create", "start", "exit a 137"]);
    shim.stop_sandbox("pod").await.unwrap();
    shim.shut_down_sandbox("pod").await.unwrap();
    shim.assert_no_more_events().await;
}

#[tokio::test]
async fn agent_cannot_end_the_sandbox_or_report_that_it_is_out_of_memory() {
    let mut shim = Shim::start().await;
    shim.create_sandbox("pod").await.unwrap();
    shim.start_sandbox("pod").await.unwrap();
    shim.run_member("a").await;
    shim.fake.report_out_of_memory("pod");
    shim.fake.report_exit("pod", None, 0, [0, 0]);
    shim.kill("a", "", 9).await.unwrap();
    // The shim handles the agent's events in order.
    assert_eq!(shim.next_events(3).await, ["create", "start", "exit a 137"]);
    assert_eq!(shim.sandbox_status("pod").await.unwrap().state, "SANDBOX_READY");
    shim.stop_sandbox("pod").await.unwrap();
    assert_eq!(shim.sandbox_status("pod").await.unwrap().state, "SANDBOX_NOTREADY");
    shim.shut_down_sandbox("pod").await.unwrap();
    shim.assert_no_more_events().await;
}

#[tokio::test]
async fn guest_writes_back_the_disks_of_containers_that_end_with_their_sandbox() {
    for (options, written) in [("ro", false), ("rw", true)] {
        let shim = Shim::start().await;
        shim.create_sandbox("pod").await.unwrap();
        shim.start_sandbox("pod").await.unwrap();
        let mut request = shim.request_in_pod("a", "container", |_| {});
        request.rootfs[0].options = vec![options.to_owned()];
        shim.task.create(context::Context::default(), &request).await.unwrap();
        shim.stop_sandbox("pod").await.unwrap();
        let requested = shim.fake.requests().contains(&Request::Shutdown);
        assert_eq!(requested, written, "{options}");
        assert_eq!(shim.wait("a", "").await.unwrap(), 137);
    }
}

#[tokio::test]
async fn sandbox_metrics_are_requested_from_its_live_containers() {
    let shim = Shim::start().await;
    shim.create_sandbox("pod").await.unwrap();
    shim.start_sandbox("pod").await.unwrap();
    shim.run_member("a").await;
    let request = SandboxMetricsRequest {
        sandbox_id: "pod".to_owned(),
        ..SandboxMetricsRequest::default()
    };
    let context = context::Context::default();
    let response = shim.sandboxes().sandbox_metrics(context, &request).await.unwrap();
    assert_eq!(response.metrics.id, "pod");
    assert_eq!(response.metrics.data.type_url, "io.containerd.cgroups.v2.Metrics");
    shim.fake
        .wait_for_request(|request| matches!(request, Request::Stats { container } if container == "a").then_some(()));
}
