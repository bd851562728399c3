//! Pods and containers as a kubelet creates them: each pod has a control group and a log folder, each container a name
//! and an attempt, and everything is removed at the end.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use serde_json::Value;

use crate::{
    client::{CallError, call},
    host,
    messages::*,
    wait::wait_until,
};

/// An image with a shell.
pub(crate) const BUSYBOX: &str = "localhost/busybox:latest";
/// An image with Python.
pub(crate) const DEBIAN: &str = "localhost/debian:latest";

/// A runtime handler of containerd's configuration (tests/lab/pods.bash).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Handler {
    /// runc, as the reference: a case that fails with runc is wrong.
    Runc,
    /// nutshell; containerd creates the sandbox as a task (`sandboxer = "podsandbox"`, the default).
    Nutshell,
    /// nutshell; containerd creates the sandbox through the Sandbox service (`sandboxer = "shim"`).
    NutshellSandboxService,
    /// nutshell, with a disk for each container.
    NutshellDisk,
    /// nutshell, with a network without a subnet.
    NutshellRouted,
}

impl Handler {
    /// The handler with this name in the configuration.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        [
            Self::Runc,
            Self::Nutshell,
            Self::NutshellSandboxService,
            Self::NutshellDisk,
            Self::NutshellRouted,
        ]
        .into_iter()
        .find(|handler| handler.name() == name)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Nutshell => "nutshell",
            Self::NutshellSandboxService => "nutshell-sandbox-service",
            Self::NutshellDisk => "nutshell-disk",
            Self::NutshellRouted => "nutshell-routed",
        }
    }

    /// Whether its pods are virtual machines.
    pub(crate) fn is_nutshell(self) -> bool {
        self != Self::Runc
    }
}

/// Waits until containerd's CRI service is ready to run pods, network and images included.
pub(crate) fn wait_for_node() {
    for image in [BUSYBOX, "localhost/pause:latest"] {
        wait_until(image, || {
            let image = ImageSpec { image: image.into() };
            call(&ImageStatusRequest { image: Some(image) }).unwrap().image
        });
    }
    wait_until("a ready node", || {
        let status = call(&StatusRequest {}).unwrap().status?;
        status
            .conditions
            .iter()
            .filter(|condition| ["RuntimeReady", "NetworkReady"].contains(&condition.r#type.as_str()))
            .all(|condition| condition.status)
            .then_some(())
    });
}

/// Converts a command line to the interface's type.
pub(crate) fn to_strings(command: &[&str]) -> Vec<String> {
    command.iter().map(|&word| word.to_owned()).collect()
}

/// A pod. When dropped, it is stopped and removed, and must leave nothing behind.
#[derive(Debug)]
pub(crate) struct Pod {
    /// The config of the pod. CreateContainer gets the same config.
    pub(crate) config: PodSandboxConfig,
    /// The pod's id in containerd.
    pub(crate) id: String,
    /// The pod's control group on the host, created as a kubelet does.
    pub(crate) cgroup: PathBuf,
    /// Whether containerd has the pod.
    exists: bool,
    /// Whether no other pod exists.
    is_only_pod: bool,
}

impl Pod {
    /// Runs a pod with the default settings of a kubelet.
    pub(crate) fn run(handler: Handler) -> Self {
        Self::run_with(handler, |_| ())
    }

    /// Runs a pod with `change` applied to the default settings.
    pub(crate) fn run_with(handler: Handler, change: impl FnOnce(&mut PodSandboxConfig)) -> Self {
        Self::try_run(handler, change).unwrap()
    }

    /// Like [`Self::run_with`], but for a pod that may be refused.
    pub(crate) fn try_run(handler: Handler, change: impl FnOnce(&mut PodSandboxConfig)) -> Result<Self, CallError> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("pod-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.clone(),
                uid: name.clone(),
                namespace: "tests".into(),
                attempt: 0,
            }),
            hostname: name.clone(),
            log_directory: format!("/run/pods/{name}"),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: format!("/kubepods/{name}"),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(container_pid_namespace()),
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        change(&mut config);
        let parent = &config.linux.as_ref().unwrap().cgroup_parent;
        let cgroup = Path::new("/sys/fs/cgroup").join(parent.trim_start_matches('/'));
        fs::create_dir(&config.log_directory).unwrap();
        fs::create_dir(&cgroup).unwrap();
        // As a kubelet does: enables the controllers for the containers' groups.
        fs::write(
            cgroup.join("cgroup.subtree_control"),
            "+cpu +cpuset +io +memory +pids +hugetlb",
        )
        .unwrap();
        // The pod's memory limit, if the test sets an overhead.
        let linux = config.linux.clone().unwrap_or_default();
        if let (Some(overhead), Some(sum)) = (linux.overhead, linux.resources) {
            let limit = sum.memory_limit_in_bytes + overhead.memory_limit_in_bytes;
            fs::write(cgroup.join("memory.max"), limit.to_string()).unwrap();
        }
        let mut pod = Self {
            config,
            id: String::new(),
            cgroup,
            exists: false,
            is_only_pod: true,
        };
        let request = RunPodSandboxRequest {
            config: Some(pod.config.clone()),
            runtime_handler: handler.name().into(),
        };
        // On an error, `drop` removes the pod's folders.
        pod.id = call(&request)?.pod_sandbox_id;
        pod.exists = true;
        Ok(pod)
    }

    /// Starts a container of the busybox image.
    pub(crate) fn start(&self, name: &str, command: &[&str]) -> Container {
        self.start_with(name, command, |_| ())
    }

    /// Starts a container of the Debian image.
    pub(crate) fn start_debian(&self, name: &str, command: &[&str]) -> Container {
        self.start_with(name, command, |config| config.image = image(DEBIAN))
    }

    /// Starts a container with `change` applied to the default settings.
    pub(crate) fn start_with(
        &self,
        name: &str,
        command: &[&str],
        change: impl FnOnce(&mut ContainerConfig),
    ) -> Container {
        let container = self.create(name, command, change).unwrap();
        container.start().unwrap();
        container
    }

    /// Creates a container with `change` applied to the default settings.
    pub(crate) fn create(
        &self,
        name: &str,
        command: &[&str],
        change: impl FnOnce(&mut ContainerConfig),
    ) -> Result<Container, CallError> {
        let namespaces = self
            .config
            .linux
            .as_ref()
            .and_then(|linux| linux.security_context.clone());
        let mut config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.into(),
                attempt: 0,
            }),
            image: image(BUSYBOX),
            command: to_strings(command),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                resources: Some(LinuxContainerResources::default()),
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: namespaces.and_then(|context| context.namespace_options),
                    ..Default::default()
                }),
            }),
            ..Default::default()
        };
        change(&mut config);
        let log = Path::new(&self.config.log_directory).join(&config.log_path);
        let response = call(&CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        })?;
        Ok(Container {
            id: response.container_id,
            log,
        })
    }

    pub(crate) fn status(&self) -> PodSandboxStatus {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: false,
        };
        call(&request).unwrap().status.unwrap()
    }

    /// The state in containerd's list of pods; `None` if the list does not contain the pod.
    pub(crate) fn listed_state(&self) -> Option<PodState> {
        let pods = call(&ListPodSandboxRequest {}).unwrap().items;
        pods.iter().find(|pod| pod.id == self.id).map(PodSandbox::state)
    }

    /// The IPv4 and the IPv6 address of the pod.
    pub(crate) fn addresses(&self) -> [String; 2] {
        let network = self.status().network.unwrap();
        let [second] = &network.additional_ips[..] else {
            panic!("not two addresses: {network:?}");
        };
        assert!(network.ip.starts_with("10.88."), "{}", network.ip);
        assert!(second.ip.starts_with("fd00:88::"), "{}", second.ip);
        [network.ip.clone(), second.ip.clone()]
    }

    /// Names and states of the pod's containers in containerd's list, sorted.
    pub(crate) fn containers(&self) -> Vec<(String, ContainerState)> {
        let filter = ContainerFilter {
            pod_sandbox_id: self.id.clone(),
        };
        let mut listed: Vec<_> = call(&ListContainersRequest { filter: Some(filter) })
            .unwrap()
            .containers
            .into_iter()
            .map(|listed| (listed.metadata.clone().unwrap().name, listed.state()))
            .collect();
        listed.sort();
        listed
    }

    /// Stops the pod and its containers. May be repeated.
    pub(crate) fn stop(&self) {
        let pod_sandbox_id = self.id.clone();
        call(&StopPodSandboxRequest { pod_sandbox_id }).unwrap();
    }

    /// Stops and removes the pod, and asserts that nothing is left of it on the host.
    pub(crate) fn remove(mut self) {
        self.end().unwrap();
    }

    /// Like [`Self::remove`], but does not check for leftovers in the host's network, because `_other` still uses it.
    pub(crate) fn remove_while_other_exists(mut self, _other: &Self) {
        self.is_only_pod = false;
        self.end().unwrap();
    }

    fn end(&mut self) -> Result<(), String> {
        let mut errors = Vec::new();
        if std::mem::take(&mut self.exists) {
            let pod_sandbox_id = self.id.clone();
            if let Err(error) = call(&StopPodSandboxRequest { pod_sandbox_id }) {
                errors.push(format!("stop pod {}: {error}", self.id));
            }
            let pod_sandbox_id = self.id.clone();
            if let Err(error) = call(&RemovePodSandboxRequest { pod_sandbox_id }) {
                errors.push(format!("remove pod {}: {error}", self.id));
            }
            if self.is_only_pod {
                errors.extend(host::network_leftovers());
            }
        }
        if let Err(error) = fs::remove_dir_all(&self.config.log_directory) {
            errors.push(format!("remove {}: {error}", self.config.log_directory));
        }
        if let Err(error) = host::remove_cgroup(&self.cgroup) {
            errors.push(format!("{}: {error}", self.cgroup.display()));
        }
        if errors.is_empty() {
            Ok(())
        } else {
            Err(errors.join("\n"))
        }
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // `remove` was called.
        if !self.exists && !self.cgroup.exists() {
            return;
        }
        let end = self.end();
        if std::thread::panicking() {
            if let Err(errors) = end {
                eprintln!(
                    "the test failed, and then its pod {} could not be removed completely: {errors}",
                    self.cgroup.display()
                );
            }
        } else {
            end.unwrap();
        }
    }
}

/// The namespace options of a pod whose containers have separate pid namespaces.
pub(crate) fn container_pid_namespace() -> NamespaceOption {
    NamespaceOption {
        pid: NamespaceMode::Container.into(),
        ..Default::default()
    }
}

/// Changes a config: the pod's containers share one pid namespace.
pub(crate) fn share_pid_namespace(config: &mut PodSandboxConfig) {
    namespaces(config).pid = NamespaceMode::Pod.into();
}

/// The namespace options of a pod's config.
pub(crate) fn namespaces(config: &mut PodSandboxConfig) -> &mut NamespaceOption {
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    context.namespace_options.get_or_insert_default()
}

/// The resources of a container's config.
pub(crate) fn resources(config: &mut ContainerConfig) -> &mut LinuxContainerResources {
    config.linux.get_or_insert_default().resources.get_or_insert_default()
}

/// The security context of a container's config.
pub(crate) fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
}

/// Converts the name of an image to the interface's type.
pub(crate) fn image(name: &str) -> Option<ImageSpec> {
    Some(ImageSpec { image: name.into() })
}

/// A container of a pod.
#[derive(Debug, Clone)]
pub(crate) struct Container {
    /// The container's id in containerd.
    pub(crate) id: String,
    /// The file of the container's log.
    pub(crate) log: PathBuf,
}

impl Container {
    pub(crate) fn start(&self) -> Result<(), CallError> {
        let container_id = self.id.clone();
        call(&StartContainerRequest { container_id }).map(drop)
    }

    /// Stops the container: SIGTERM, and SIGKILL after `seconds`.
    pub(crate) fn stop(&self, seconds: i64) {
        let container_id = self.id.clone();
        call(&StopContainerRequest {
            container_id,
            timeout: seconds,
        })
        .unwrap();
    }

    /// Removes the container, even if it runs.
    pub(crate) fn remove(&self) {
        let container_id = self.id.clone();
        call(&RemoveContainerRequest { container_id }).unwrap();
    }

    pub(crate) fn status(&self) -> ContainerStatus {
        let request = ContainerStatusRequest {
            container_id: self.id.clone(),
            verbose: false,
        };
        call(&request).unwrap().status.unwrap()
    }

    /// Waits until the container has ended, and returns its status.
    pub(crate) fn wait(&self) -> ContainerStatus {
        wait_until("the end of the container", || {
            let status = self.status();
            (status.state() == ContainerState::Exited).then_some(status)
        })
    }

    /// Runs a command in the container with a timeout in seconds; 0 means none.
    pub(crate) fn try_exec(&self, command: &[&str], seconds: i64) -> Result<ExecSyncResponse, CallError> {
        call(&ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: to_strings(command),
            timeout: seconds,
        })
    }

    /// Runs a command in the container to its end.
    pub(crate) fn exec(&self, command: &[&str]) -> ExecSyncResponse {
        self.try_exec(command, 0).unwrap()
    }

    /// Runs a shell script in the container, asserts that it succeeds, and returns its output.
    pub(crate) fn sh(&self, script: &str) -> String {
        let response = self.exec(&["sh", "-c", script]);
        let output = String::from_utf8_lossy(&response.stdout).trim_end().to_owned();
        assert_eq!(
            response.exit_code,
            0,
            "{script}\n{output}\n{}",
            String::from_utf8_lossy(&response.stderr)
        );
        output
    }

    /// The container's output on `stream` (`stdout` or `stderr`), from its log.
    pub(crate) fn output(&self, stream: &str) -> String {
        host::read_log(&self.log)
            .into_iter()
            .filter(|line| line.stream == stream)
            .map(|line| if line.is_complete { line.text + "\n" } else { line.text })
            .collect()
    }

    /// Waits until standard output has the line `text`.
    pub(crate) fn wait_for_line(&self, text: &str) {
        wait_until(&format!("the line {text:?} in a container's log"), || {
            if self.output("stdout").lines().any(|line| line == text) {
                return Some(());
            }
            let status = self.status();
            let ended_without_output = status.state() == ContainerState::Exited && self.output("stdout").is_empty();
            assert!(
                !ended_without_output,
                "the container exited with {} before it printed {text:?}: {}",
                status.exit_code,
                self.output("stderr")
            );
            None
        });
    }

    /// The pid of the container on the host.
    pub(crate) fn pid(&self) -> u32 {
        let request = ContainerStatusRequest {
            container_id: self.id.clone(),
            verbose: true,
        };
        let info: Value = serde_json::from_str(&call(&request).unwrap().info["info"]).unwrap();
        info["pid"].as_u64().unwrap().try_into().unwrap()
    }
}
