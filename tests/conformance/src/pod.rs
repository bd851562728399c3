//! Pods: sandboxes with both sandbox APIs of containerd, and containers with specs as its CRI service writes them.

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
    TIMEOUT,
    bootstrap::Caller,
    bundle::{self, Bundle, idle},
    container::Container,
    fake_containerd::{FakeContainerd, Shim},
    host,
    task::{CallResult, TaskClient},
};

/// The name of the Sandbox service.
pub const SANDBOX: &str = "containerd.runtime.sandbox.v1.Sandbox";

/// The state of a sandbox that runs.
pub const READY: &str = "SANDBOX_READY";
/// The state of a sandbox that does not run.
pub const NOT_READY: &str = "SANDBOX_NOTREADY";

/// A pod with a started sandbox.
#[derive(Debug)]
pub struct Pod<'c> {
    containerd: &'c FakeContainerd,
    /// The sandbox's id.
    pub id: String,
    /// The sandbox's bundle.
    pub bundle: Arc<Bundle>,
    /// The shim of the sandbox and of all containers.
    pub shim: Shim,
    /// The sandbox's pid.
    pub pid: u32,
    /// The sandbox's container; `None` if the sandbox is of the Sandbox service.
    sandbox: Option<Container<'c>>,
}

impl<'c> Pod<'c> {
    /// Starts a pod as containerd's CRI service does by default: the sandbox is a task.
    pub fn by_task(containerd: &'c FakeContainerd) -> Self {
        Self::by_task_with(containerd, &Caller::newest(), |_| {})
    }

    /// Like [`Self::by_task`], but with a change of the sandbox's spec.
    pub fn by_task_with(containerd: &'c FakeContainerd, caller: &Caller, change: impl FnOnce(&mut Value)) -> Self {
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

    /// Starts a pod whose sandbox is of the Sandbox service.
    pub fn by_service(containerd: &'c FakeContainerd, config: &SandboxConfig) -> Self {
        let (bundle, shim) = start_sandbox_shim(containerd);
        let sandboxes = SandboxClient::new(&shim);
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

    /// A client for calls of the Sandbox service.
    pub fn sandboxes(&self) -> SandboxClient {
        SandboxClient::new(&self.shim)
    }

    /// Whether the sandbox runs.
    pub fn is_ready(&self) -> bool {
        match &self.sandbox {
            Some(sandbox) => sandbox.status("") == Status::RUNNING,
            None => self.sandboxes().status(&self.id).unwrap().state == READY,
        }
    }

    /// The spec of a container of the pod that runs `args`: with the sandbox's network, IPC and UTS namespaces.
    pub fn spec(&self, args: &[&str]) -> Value {
        let mut spec = with_pod_annotations(&bundle::spec(args), &self.id, "container");
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

    /// Like [`Self::spec`], but for a container that runs a shell script.
    pub fn shell(&self, script: &str) -> Value {
        self.spec(&["/bin/sh", "-c", script])
    }

    /// The spec of a container that sleeps, in the pid namespace of the task with this pid. With the sandbox's pid it
    /// is the pid namespace of the pod.
    pub fn idle_in_pid_namespace_of(&self, pid: u32) -> Value {
        let mut spec = self.spec(&["sleep", "100000"]);
        share_pid_namespace(&mut spec, pid);
        spec
    }

    /// Creates a container in the sandbox's shim, as containerd does for a shim of version 3: without a call of
    /// `start`.
    ///
    /// # Errors
    ///
    /// The error of Create. The bundle is removed then.
    pub fn create(&self, spec: &Value) -> CallResult<Container<'c>> {
        let bundle = self.containerd.bundle(spec);
        let prepared = self.containerd.prepare_in(bundle.clone(), self.shim.clone());
        prepared.create().inspect_err(|_| {
            self.containerd.delete_bundle(&bundle);
            bundle.remove();
        })
    }

    /// Creates and starts a container.
    pub fn run(&self, spec: &Value) -> Container<'c> {
        let container = self.create(spec).unwrap();
        container.start();
        container
    }

    /// Removes a container of the pod as containerd does: kills it if it has not ended, deletes it, calls `delete`, and
    /// removes the bundle.
    pub fn remove_container(&self, container: &Container<'_>) {
        container.remove();
        self.delete_bundle_of(container);
    }

    /// Calls `delete` for a container and removes its bundle, as containerd does after Delete.
    pub fn delete_bundle_of(&self, container: &Container<'_>) {
        self.containerd.delete_bundle(&container.bundle);
        container.bundle.remove();
    }

    /// Removes the pod, which has no container any more, as containerd does, and asserts that the shim ends.
    pub fn end(self) {
        match self.sandbox {
            Some(sandbox) => sandbox.end(),
            None => {
                let sandboxes = SandboxClient::new(&self.shim);
                sandboxes.stop(&self.id).unwrap();
                sandboxes.shut_down(&self.id).unwrap();
                assert!(
                    host::ends_within(self.shim.pid, TIMEOUT),
                    "the shim still runs after Shutdown"
                );
                self.containerd.delete_bundle(&self.bundle);
                self.bundle.remove();
            }
        }
    }
}

/// Changes a spec: the container joins the pid namespace of the task with this pid.
pub fn share_pid_namespace(spec: &mut Value, pid: u32) {
    for namespace in spec["linux"]["namespaces"].as_array_mut().unwrap() {
        if namespace["type"] == "pid" {
            namespace["path"] = json!(format!("/proc/{pid}/ns/pid"));
        }
    }
}

/// Creates a sandbox as a task, which is not started yet.
///
/// # Errors
///
/// The error of Create. The shim is ended and the bundle removed then.
pub fn create_sandbox_task<'c>(
    containerd: &'c FakeContainerd,
    caller: &Caller,
    change: impl FnOnce(&mut Value),
) -> CallResult<Container<'c>> {
    let id = containerd.new_name("sandbox");
    let mut spec = with_pod_annotations(&idle(), &id, "sandbox");
    change(&mut spec);
    let bundle = containerd.bundle_with_id(&id, &spec);
    let answer = containerd.start(&bundle, caller).unwrap();
    let shim = containerd.connect_shim(answer);
    let mut prepared = containerd.prepare_in(bundle.clone(), shim.clone());
    prepared.request.stdout = String::new();
    prepared.request.stderr = String::new();
    prepared
        .create()
        .inspect_err(|_| containerd.prepare_in(bundle, shim).abandon())
}

fn with_pod_annotations(spec: &Value, sandbox: &str, kind: &str) -> Value {
    let mut spec = spec.clone();
    spec["annotations"]["io.kubernetes.cri.container-type"] = kind.into();
    spec["annotations"]["io.kubernetes.cri.sandbox-id"] = sandbox.into();
    spec
}

/// Starts a shim for a sandbox of the Sandbox service, whose bundle has no spec.
pub fn start_sandbox_shim(containerd: &FakeContainerd) -> (Arc<Bundle>, Shim) {
    let bundle = containerd.bundle_without_spec(&containerd.new_name("sandbox"));
    let shim = containerd.start_shim(&bundle);
    (bundle, shim)
}

/// The fields of `PodSandboxConfig` (`k8s.io/cri-api`) that tests use.
#[derive(Debug, Clone, Default)]
pub struct SandboxConfig {
    /// `hostname` (field 2).
    pub hostname: String,
    /// `dns_config.servers` (field 4, 1).
    pub dns: Vec<String>,
    /// `linux.cgroup_parent` (field 8, 1).
    pub cgroup_parent: String,
    /// `linux.sysctls` (field 8, 3).
    pub sysctls: Vec<(String, String)>,
    /// `linux.security_context.namespace_options` (field 8, 2, 1): the modes of network, pid and ipc.
    pub namespaces: [u8; 3],
}

impl SandboxConfig {
    fn encode(&self) -> Vec<u8> {
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

/// Encodes a length-delimited field of protobuf.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let length = u8::try_from(content.len()).unwrap();
    assert!(length < 0x80, "fields of 128 bytes and more are not supported");
    [&[number << 3 | 2, length], content].concat()
}

/// A client of the Sandbox service. Each method is a call of this service.
#[derive(Debug, Clone)]
pub struct SandboxClient(TaskClient);

#[expect(missing_docs, reason = "each method is the call of its name")]
impl SandboxClient {
    /// Uses the connection to this shim.
    pub fn new(shim: &Shim) -> Self {
        Self(shim.task.with_service(SANDBOX))
    }

    /// CreateSandbox.
    ///
    /// # Errors
    ///
    /// The errors of [`TaskClient::call`]. All methods below have the same errors.
    pub fn create(&self, bundle: &Bundle, config: &SandboxConfig) -> CallResult<CreateSandboxResponse> {
        self.create_in(&bundle.id, bundle.path.to_str().unwrap(), config)
    }

    /// CreateSandbox with this path of the bundle.
    pub fn create_in(&self, id: &str, bundle_path: &str, config: &SandboxConfig) -> CallResult<CreateSandboxResponse> {
        let options = Any {
            type_url: "runtime.v1.PodSandboxConfig".to_owned(),
            value: config.encode(),
            ..Any::default()
        };
        let request = CreateSandboxRequest {
            sandbox_id: id.to_owned(),
            bundle_path: bundle_path.to_owned(),
            options: MessageField::some(options),
            ..CreateSandboxRequest::default()
        };
        self.0.call("CreateSandbox", &request)
    }

    pub fn start(&self, id: &str) -> CallResult<StartSandboxResponse> {
        let request = StartSandboxRequest {
            sandbox_id: id.to_owned(),
            ..StartSandboxRequest::default()
        };
        self.0.call("StartSandbox", &request)
    }

    pub fn platform(&self, id: &str) -> CallResult<PlatformResponse> {
        let request = PlatformRequest {
            sandbox_id: id.to_owned(),
            ..PlatformRequest::default()
        };
        self.0.call("Platform", &request)
    }

    pub fn stop(&self, id: &str) -> CallResult<StopSandboxResponse> {
        let request = StopSandboxRequest {
            sandbox_id: id.to_owned(),
            timeout_secs: 10,
            ..StopSandboxRequest::default()
        };
        self.0.call("StopSandbox", &request)
    }

    pub fn wait(&self, id: &str) -> CallResult<WaitSandboxResponse> {
        let request = WaitSandboxRequest {
            sandbox_id: id.to_owned(),
            ..WaitSandboxRequest::default()
        };
        self.0.call("WaitSandbox", &request)
    }

    pub fn status(&self, id: &str) -> CallResult<SandboxStatusResponse> {
        let request = SandboxStatusRequest {
            sandbox_id: id.to_owned(),
            verbose: true,
            ..SandboxStatusRequest::default()
        };
        self.0.call("SandboxStatus", &request)
    }

    pub fn ping(&self, id: &str) -> CallResult<PingResponse> {
        let request = PingRequest {
            sandbox_id: id.to_owned(),
            ..PingRequest::default()
        };
        self.0.call("PingSandbox", &request)
    }

    pub fn shut_down(&self, id: &str) -> CallResult<ShutdownSandboxResponse> {
        let request = ShutdownSandboxRequest {
            sandbox_id: id.to_owned(),
            ..ShutdownSandboxRequest::default()
        };
        self.0.call("ShutdownSandbox", &request)
    }

    pub fn metrics(&self, id: &str) -> CallResult<SandboxMetricsResponse> {
        let request = SandboxMetricsRequest {
            sandbox_id: id.to_owned(),
            ..SandboxMetricsRequest::default()
        };
        self.0.call("SandboxMetrics", &request)
    }
}

/// A containerd whose runtime options contain the configuration `body` (`runtimeoptions.v1.Options`, field 3).
pub fn caller_with_config(body: &str) -> Caller {
    let options = Any {
        type_url: "runtimeoptions.v1.Options".to_owned(),
        value: field(3, body.as_bytes()),
        ..Any::default()
    };
    // containerd's decoder must accept it.
    assert!(Any::parse_from_bytes(&options.write_to_bytes().unwrap()).is_ok());
    Caller::V2_3 {
        options: Some(options),
        socket_directory: None,
    }
}
