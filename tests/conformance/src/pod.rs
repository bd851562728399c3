//! Pods: a sandbox in either of containerd's ways, and containers in it with specs as its CRI writes
//! them.

use std::sync::Arc;

use containerd_shim_protos::{
    api::Status,
    protobuf::{Message, MessageField, well_known_types::any::Any},
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest, PlatformResponse,
        SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse,
        ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse, StopSandboxRequest,
        StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
    },
};
use serde_json::{Value, json};

use crate::{
    PATIENCE,
    bootstrap::Caller,
    bundle::{self, Bundle, idle},
    container::Container,
    containerd::{Containerd, Shim},
    host,
    task::{Answer, Task},
};

/// The name of the Sandbox service.
pub const SANDBOX: &str = "containerd.runtime.sandbox.v1.Sandbox";

/// The states that containerd knows.
pub const READY: &str = "SANDBOX_READY";
/// The other one.
pub const NOT_READY: &str = "SANDBOX_NOTREADY";

/// A pod whose containers can be created.
#[derive(Debug)]
pub struct Pod<'c> {
    containerd: &'c Containerd,
    /// The sandbox's id.
    pub id: String,
    /// The sandbox's folder.
    pub bundle: Arc<Bundle>,
    /// The shim of all.
    pub shim: Shim,
    /// The sandbox's pid.
    pub pid: u32,
    /// The sandbox as a container, in that way.
    sandbox: Option<Container<'c>>,
}

impl<'c> Pod<'c> {
    /// A pod as containerd's CRI makes it by default: its sandbox is a task.
    pub fn by_task(containerd: &'c Containerd) -> Self {
        Self::by_task_with(containerd, &Caller::newest(), |_| {})
    }

    /// As [`Self::by_task`], the sandbox's spec changed.
    pub fn by_task_with(containerd: &'c Containerd, caller: &Caller, change: impl FnOnce(&mut Value)) -> Self {
        let sandbox = create_sandbox_task(containerd, caller, change).unwrap();
        sandbox.start();
        Self {
            containerd,
            id: sandbox.id.clone(),
            bundle: sandbox.bundle.clone(),
            shim: sandbox.shim.clone(),
            pid: sandbox.pid,
            sandbox: Some(sandbox),
        }
    }

    /// A pod whose sandbox the shim manages itself, with a `PodSandboxConfig`.
    pub fn by_service(containerd: &'c Containerd, config: &Config) -> Self {
        let (bundle, shim) = sandbox_shim(containerd);
        let sandboxes = Sandboxes::of(&shim);
        sandboxes.create(&bundle, config).unwrap();
        let pid = sandboxes.start(&bundle.id).unwrap().pid;
        Self {
            containerd,
            id: bundle.id.clone(),
            bundle,
            shim,
            pid,
            sandbox: None,
        }
    }

    /// Calls of the Sandbox service.
    pub fn sandboxes(&self) -> Sandboxes {
        Sandboxes::of(&self.shim)
    }

    /// It takes containers.
    pub fn is_ready(&self) -> bool {
        match &self.sandbox {
            Some(sandbox) => sandbox.status("") == Status::RUNNING,
            None => self.sandboxes().status(&self.id).unwrap().state == READY,
        }
    }

    /// The spec of a container of the pod.
    pub fn spec(&self, args: &[&str]) -> Value {
        let mut spec = in_pod(&bundle::spec(args), &self.id, "container");
        for namespace in spec["linux"]["namespaces"].as_array_mut().unwrap() {
            let (kind, file) = match namespace["type"].as_str().unwrap() {
                "network" => ("network", "net"),
                "ipc" => ("ipc", "ipc"),
                "uts" => ("uts", "uts"),
                _ => continue,
            };
            *namespace = json!({"type": kind, "path": format!("/proc/{}/ns/{file}", self.pid)});
        }
        spec.as_object_mut().unwrap().remove("hostname");
        spec
    }

    /// As [`Self::spec`], for a shell script.
    pub fn shell(&self, script: &str) -> Value {
        self.spec(&["/bin/sh", "-c", script])
    }

    /// The spec of a container that does nothing, and shares the processes of the task with a pid: the
    /// sandbox's are the pod's.
    pub fn idle_sharing(&self, pid: u32) -> Value {
        let mut spec = self.spec(&["sleep", "100000"]);
        share_pids(&mut spec, pid);
        spec
    }

    /// Creates a container as containerd does where a shim has answered with version 3: nothing is
    /// started for it.
    ///
    /// # Errors
    ///
    /// The shim's; nothing is left then.
    pub fn create(&self, spec: &Value) -> Answer<Container<'c>> {
        let bundle = self.containerd.bundle(spec);
        let prepared = self.containerd.prepare_in(bundle.clone(), self.shim.clone());
        prepared.create().inspect_err(|_| {
            self.containerd.delete_answer(&bundle);
            bundle.remove();
        })
    }

    /// A container that runs.
    pub fn run(&self, spec: &Value) -> Container<'c> {
        let container = self.create(spec).unwrap();
        container.start();
        container
    }

    /// All that containerd does to remove a container of the pod.
    pub fn forget(&self, container: &Container<'_>) {
        container.remove();
        self.clean(container);
    }

    /// What containerd does after a container was deleted.
    pub fn clean(&self, container: &Container<'_>) {
        self.containerd.delete_answer(&container.bundle);
        container.bundle.remove();
    }

    /// All that containerd does to remove a pod without containers, and the end of its shim.
    pub fn end(self) {
        match self.sandbox {
            Some(sandbox) => sandbox.end(),
            None => {
                let sandboxes = Sandboxes::of(&self.shim);
                sandboxes.stop(&self.id).unwrap();
                sandboxes.shut_down(&self.id).unwrap();
                assert!(
                    host::ends_within(self.shim.pid, PATIENCE),
                    "the shim goes on after Shutdown"
                );
                self.containerd.delete_answer(&self.bundle);
                self.bundle.remove();
            }
        }
    }
}

/// Has the container of `spec` share the processes of the task with this pid.
pub fn share_pids(spec: &mut Value, pid: u32) {
    for namespace in spec["linux"]["namespaces"].as_array_mut().unwrap() {
        if namespace["type"] == "pid" {
            namespace["path"] = json!(format!("/proc/{pid}/ns/pid"));
        }
    }
}

/// A sandbox that is a task and was not started.
///
/// # Errors
///
/// The shim's; nothing is left then.
pub fn create_sandbox_task<'c>(
    containerd: &'c Containerd,
    caller: &Caller,
    change: impl FnOnce(&mut Value),
) -> Answer<Container<'c>> {
    let id = containerd.new_name("sandbox");
    let mut spec = in_pod(&idle(), &id, "sandbox");
    change(&mut spec);
    let bundle = containerd.bundle_of(&id, &spec);
    let answer = containerd.start(&bundle, caller).unwrap();
    let shim = containerd.shim_at(answer);
    let mut prepared = containerd.prepare_in(bundle.clone(), shim.clone());
    prepared.request.stdout = String::new();
    prepared.request.stderr = String::new();
    prepared
        .create()
        .inspect_err(|_| containerd.prepare_in(bundle, shim).abandon())
}

fn in_pod(spec: &Value, sandbox: &str, kind: &str) -> Value {
    let mut spec = spec.clone();
    spec["annotations"]["io.kubernetes.cri.container-type"] = kind.into();
    spec["annotations"]["io.kubernetes.cri.sandbox-id"] = sandbox.into();
    spec
}

/// A shim for a sandbox, whose bundle has no spec.
pub fn sandbox_shim(containerd: &Containerd) -> (Arc<Bundle>, Shim) {
    let bundle = containerd.bundle_without_spec(&containerd.new_name("sandbox"));
    let shim = containerd.shim(&bundle);
    (bundle, shim)
}

/// `PodSandboxConfig` (`k8s.io/cri-api`), as far as tests have it.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Field 2.
    pub hostname: String,
    /// Field 4: servers.
    pub dns: Vec<String>,
    /// Field 8, 1.
    pub cgroup_parent: String,
    /// Field 8, 3.
    pub sysctls: Vec<(String, String)>,
    /// Field 8, 2, 1: the modes of network, pid and ipc.
    pub namespaces: [u8; 3],
}

impl Config {
    fn message(&self) -> Vec<u8> {
        let [network, pid, ipc] = self.namespaces;
        let dns: Vec<_> = self.dns.iter().flat_map(|server| field(1, server.as_bytes())).collect();
        let mut linux = field(1, self.cgroup_parent.as_bytes());
        linux.extend(field(2, &field(1, &[1 << 3, network, 2 << 3, pid, 3 << 3, ipc])));
        for (name, value) in &self.sysctls {
            linux.extend(field(
                3,
                &[field(1, name.as_bytes()), field(2, value.as_bytes())].concat(),
            ));
        }
        [field(2, self.hostname.as_bytes()), field(4, &dns), field(8, &linux)].concat()
    }
}

fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let length = u8::try_from(content.len()).unwrap();
    assert!(length < 0x80, "longer than tests need");
    [&[number << 3 | 2, length], content].concat()
}

/// Calls of the Sandbox service.
#[derive(Debug, Clone)]
pub struct Sandboxes(Task);

impl Sandboxes {
    /// Of a shim.
    pub fn of(shim: &Shim) -> Self {
        Self(shim.task.of(SANDBOX))
    }

    /// CreateSandbox.
    ///
    /// # Errors
    ///
    /// As [`Task::call`]; so for all of the following.
    pub fn create(&self, bundle: &Bundle, config: &Config) -> Answer<CreateSandboxResponse> {
        let options = Any {
            type_url: "runtime.v1.PodSandboxConfig".to_owned(),
            value: config.message(),
            ..Any::default()
        };
        let request = CreateSandboxRequest {
            sandbox_id: bundle.id.clone(),
            bundle_path: bundle.path.display().to_string(),
            options: MessageField::some(options),
            ..CreateSandboxRequest::default()
        };
        self.0.call("CreateSandbox", &request)
    }

    /// StartSandbox.
    pub fn start(&self, id: &str) -> Answer<StartSandboxResponse> {
        let request = StartSandboxRequest {
            sandbox_id: id.to_owned(),
            ..StartSandboxRequest::default()
        };
        self.0.call("StartSandbox", &request)
    }

    /// Platform.
    pub fn platform(&self, id: &str) -> Answer<PlatformResponse> {
        let request = PlatformRequest {
            sandbox_id: id.to_owned(),
            ..PlatformRequest::default()
        };
        self.0.call("Platform", &request)
    }

    /// StopSandbox.
    pub fn stop(&self, id: &str) -> Answer<StopSandboxResponse> {
        let request = StopSandboxRequest {
            sandbox_id: id.to_owned(),
            timeout_secs: 10,
            ..StopSandboxRequest::default()
        };
        self.0.call("StopSandbox", &request)
    }

    /// WaitSandbox.
    pub fn wait(&self, id: &str) -> Answer<WaitSandboxResponse> {
        let request = WaitSandboxRequest {
            sandbox_id: id.to_owned(),
            ..WaitSandboxRequest::default()
        };
        self.0.call("WaitSandbox", &request)
    }

    /// SandboxStatus.
    pub fn status(&self, id: &str) -> Answer<SandboxStatusResponse> {
        let request = SandboxStatusRequest {
            sandbox_id: id.to_owned(),
            verbose: true,
            ..SandboxStatusRequest::default()
        };
        self.0.call("SandboxStatus", &request)
    }

    /// PingSandbox.
    pub fn ping(&self, id: &str) -> Answer<PingResponse> {
        let request = PingRequest {
            sandbox_id: id.to_owned(),
            ..PingRequest::default()
        };
        self.0.call("PingSandbox", &request)
    }

    /// ShutdownSandbox.
    pub fn shut_down(&self, id: &str) -> Answer<ShutdownSandboxResponse> {
        let request = ShutdownSandboxRequest {
            sandbox_id: id.to_owned(),
            ..ShutdownSandboxRequest::default()
        };
        self.0.call("ShutdownSandbox", &request)
    }

    /// SandboxMetrics.
    pub fn metrics(&self, id: &str) -> Answer<SandboxMetricsResponse> {
        let request = SandboxMetricsRequest {
            sandbox_id: id.to_owned(),
            ..SandboxMetricsRequest::default()
        };
        self.0.call("SandboxMetrics", &request)
    }
}

/// Runtime options whose configuration is `body` (`runtimeoptions.v1.Options`, field 3).
pub fn configured(body: &str) -> Caller {
    let options = Any {
        type_url: "runtimeoptions.v1.Options".to_owned(),
        value: field(3, body.as_bytes()),
        ..Any::default()
    };
    // What is encoded is what containerd would send.
    assert!(Any::parse_from_bytes(&options.write_to_bytes().unwrap()).is_ok());
    Caller::V2_3 {
        options: Some(options),
        socket_directory: None,
    }
}
