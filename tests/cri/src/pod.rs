//! Pods and containers with a kubelet's manners: a control group and a log folder for each pod, one name and
//! attempt for each container, and everything removed at the end.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use serde_json::Value;

use crate::{
    client::{Refused, call},
    host,
    messages::*,
    wait_until,
};

/// Between two questions for a state that nothing announces.
pub(crate) const PAUSE: Duration = Duration::from_millis(50);

/// The image with a shell.
pub(crate) const BUSYBOX: &str = "localhost/busybox:latest";
/// The image with Python.
pub(crate) const DEBIAN: &str = "localhost/debian:latest";

/// A runtime handler of containerd's configuration (tests/lab/pods.bash).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Handler {
    /// runc: shows that a case is right.
    Runc,
    /// The product, pods by a pause container.
    Nutshell,
    /// The product, pods by the Sandbox service.
    NutshellShim,
    /// The product, a disk for each container.
    NutshellDisk,
}

impl Handler {
    /// That of this name in the configuration.
    pub(crate) fn named(name: &str) -> Option<Self> {
        [Self::Runc, Self::Nutshell, Self::NutshellShim, Self::NutshellDisk]
            .into_iter()
            .find(|handler| handler.name() == name)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Nutshell => "nutshell",
            Self::NutshellShim => "nutshell-shim",
            Self::NutshellDisk => "nutshell-disk",
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

/// A command line as the interface wants it.
pub(crate) fn words(command: &[&str]) -> Vec<String> {
    command.iter().map(|&word| word.to_owned()).collect()
}

/// A pod. Dropped, it is stopped and removed, and may not leave anything.
#[derive(Debug)]
pub(crate) struct Pod {
    /// What it was made with; containers are created with the same.
    pub(crate) config: PodSandboxConfig,
    /// containerd's id of it.
    pub(crate) id: String,
    /// Its control group on the host, made as a kubelet does.
    pub(crate) cgroup: PathBuf,
    present: bool,
    /// Whether nothing but it has a network.
    alone: bool,
}

impl Pod {
    /// A pod as a kubelet asks for one when nothing special is asked of it.
    pub(crate) fn run(handler: Handler) -> Self {
        Self::run_with(handler, |_| ())
    }

    /// A pod with `change` made to the usual settings.
    pub(crate) fn run_with(handler: Handler, change: impl FnOnce(&mut PodSandboxConfig)) -> Self {
        Self::try_run(handler, change).unwrap()
    }

    /// The same, where it may be refused.
    pub(crate) fn try_run(handler: Handler, change: impl FnOnce(&mut PodSandboxConfig)) -> Result<Self, Refused> {
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
                    namespace_options: Some(own_processes()),
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
        // As the kubelet's: all that containers below may be limited by.
        fs::write(
            cgroup.join("cgroup.subtree_control"),
            "+cpu +cpuset +io +memory +pids +hugetlb",
        )
        .unwrap();
        // And what they may have together, where the test says what a machine costs beside them.
        let linux = config.linux.clone().unwrap_or_default();
        if let (Some(overhead), Some(sum)) = (linux.overhead, linux.resources) {
            let limit = sum.memory_limit_in_bytes + overhead.memory_limit_in_bytes;
            fs::write(cgroup.join("memory.max"), limit.to_string()).unwrap();
        }
        let mut pod = Self {
            config,
            id: String::new(),
            cgroup,
            present: false,
            alone: true,
        };
        let request = RunPodSandboxRequest {
            config: Some(pod.config.clone()),
            runtime_handler: handler.name().into(),
        };
        // An error drops the pod, which looks after its folders.
        pod.id = call(&request)?.pod_sandbox_id;
        pod.present = true;
        Ok(pod)
    }

    /// A container of the busybox image that runs `command`, started.
    pub(crate) fn start(&self, name: &str, command: &[&str]) -> Container {
        self.start_with(name, command, |_| ())
    }

    /// The same, of the Debian image.
    pub(crate) fn start_debian(&self, name: &str, command: &[&str]) -> Container {
        self.start_with(name, command, |config| config.image = image(DEBIAN))
    }

    /// A container with `change` made to the usual settings, started.
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

    /// A container that is created and no more.
    pub(crate) fn create(
        &self,
        name: &str,
        command: &[&str],
        change: impl FnOnce(&mut ContainerConfig),
    ) -> Result<Container, Refused> {
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
            command: words(command),
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
        let answer = call(&CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        })?;
        Ok(Container {
            id: answer.container_id,
            log,
        })
    }

    /// Its status.
    pub(crate) fn status(&self) -> PodSandboxStatus {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: false,
        };
        call(&request).unwrap().status.unwrap()
    }

    /// Its state where containerd lists all pods.
    pub(crate) fn listed(&self) -> Option<PodState> {
        let pods = call(&ListPodSandboxRequest {}).unwrap().items;
        pods.iter().find(|pod| pod.id == self.id).map(PodSandbox::state)
    }

    /// Its addresses, the IPv4 one first.
    pub(crate) fn addresses(&self) -> [String; 2] {
        let network = self.status().network.unwrap();
        let [second] = &network.additional_ips[..] else {
            panic!("the pod has not two addresses: {network:?}");
        };
        assert!(network.ip.starts_with("10.88."), "{}", network.ip);
        assert!(second.ip.starts_with("fd00:88::"), "{}", second.ip);
        [network.ip.clone(), second.ip.clone()]
    }

    /// Its containers' names and states as containerd lists them, sorted.
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

    /// Stops it: its containers first, then what held them. May be repeated.
    pub(crate) fn stop(&self) {
        let pod_sandbox_id = self.id.clone();
        call(&StopPodSandboxRequest { pod_sandbox_id }).unwrap();
    }

    /// Stops and removes it. When that has returned, nothing may be left of it.
    pub(crate) fn remove(mut self) {
        self.end().unwrap();
    }

    /// The same, while another pod is there.
    pub(crate) fn remove_beside(mut self, _other: &Self) {
        self.alone = false;
        self.end().unwrap();
    }

    fn end(&mut self) -> Result<(), String> {
        let mut wrong = Vec::new();
        if std::mem::take(&mut self.present) {
            let pod_sandbox_id = self.id.clone();
            if let Err(refused) = call(&StopPodSandboxRequest { pod_sandbox_id }) {
                wrong.push(format!("stop: {refused}"));
            }
            let pod_sandbox_id = self.id.clone();
            if let Err(refused) = call(&RemovePodSandboxRequest { pod_sandbox_id }) {
                wrong.push(format!("remove: {refused}"));
            }
            if self.alone {
                wrong.extend(host::left_of_networks());
            }
        }
        if let Err(error) = fs::remove_dir_all(&self.config.log_directory) {
            wrong.push(format!("{}: {error}", self.config.log_directory));
        }
        if let Err(error) = host::remove_cgroup(&self.cgroup) {
            wrong.push(format!("{}: {error}", self.cgroup.display()));
        }
        if wrong.is_empty() {
            Ok(())
        } else {
            Err(wrong.join("\n"))
        }
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // Already removed.
        if !self.present && !self.cgroup.exists() {
            return;
        }
        let end = self.end();
        if std::thread::panicking() {
            if let Err(wrong) = end {
                eprintln!("afterwards: {wrong}");
            }
        } else {
            end.unwrap();
        }
    }
}

/// Namespaces as a pod has them that does not share processes among its containers.
pub(crate) fn own_processes() -> NamespaceOption {
    NamespaceOption {
        pid: NamespaceMode::Container.into(),
        ..Default::default()
    }
}

/// The same, where it does.
pub(crate) fn share_processes(config: &mut PodSandboxConfig) {
    namespaces(config).pid = NamespaceMode::Pod.into();
}

/// A pod's namespaces, to be changed.
pub(crate) fn namespaces(config: &mut PodSandboxConfig) -> &mut NamespaceOption {
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    context.namespace_options.get_or_insert_default()
}

/// A container's limits, to be changed.
pub(crate) fn resources(config: &mut ContainerConfig) -> &mut LinuxContainerResources {
    config.linux.get_or_insert_default().resources.get_or_insert_default()
}

/// A container's security context, to be changed.
pub(crate) fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
}

/// The name of an image as the interface wants it.
pub(crate) fn image(name: &str) -> Option<ImageSpec> {
    Some(ImageSpec { image: name.into() })
}

/// A container of a pod.
#[derive(Debug, Clone)]
pub(crate) struct Container {
    /// containerd's id of it.
    pub(crate) id: String,
    /// Where containerd writes its log.
    pub(crate) log: PathBuf,
}

impl Container {
    /// Starts it, once it was created.
    pub(crate) fn start(&self) -> Result<(), Refused> {
        let container_id = self.id.clone();
        call(&StartContainerRequest { container_id }).map(drop)
    }

    /// Ends it: SIGTERM, and SIGKILL after `seconds`.
    pub(crate) fn stop(&self, seconds: i64) {
        let container_id = self.id.clone();
        call(&StopContainerRequest {
            container_id,
            timeout: seconds,
        })
        .unwrap();
    }

    /// Removes it, also where it runs.
    pub(crate) fn remove(&self) {
        let container_id = self.id.clone();
        call(&RemoveContainerRequest { container_id }).unwrap();
    }

    /// Its status.
    pub(crate) fn status(&self) -> ContainerStatus {
        let request = ContainerStatusRequest {
            container_id: self.id.clone(),
            verbose: false,
        };
        call(&request).unwrap().status.unwrap()
    }

    /// Its status, once it has ended.
    pub(crate) fn wait(&self) -> ContainerStatus {
        wait_until("the container's end", || {
            let status = self.status();
            (status.state() == ContainerState::Exited).then_some(status)
        })
    }

    /// Runs a command in it; `seconds` is its limit, 0 for none.
    pub(crate) fn try_exec(&self, command: &[&str], seconds: i64) -> Result<ExecSyncResponse, Refused> {
        call(&ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: words(command),
            timeout: seconds,
        })
    }

    /// Runs a command in it and waits for its end.
    pub(crate) fn exec(&self, command: &[&str]) -> ExecSyncResponse {
        self.try_exec(command, 0).unwrap()
    }

    /// What a command in its shell prints, which must succeed.
    pub(crate) fn sh(&self, script: &str) -> String {
        let answer = self.exec(&["sh", "-c", script]);
        let output = String::from_utf8_lossy(&answer.stdout).trim_end().to_owned();
        assert_eq!(
            answer.exit_code,
            0,
            "{script}\n{output}\n{}",
            String::from_utf8_lossy(&answer.stderr)
        );
        output
    }

    /// What it has written to `stream` (`stdout` or `stderr`) so far, without the log's dress.
    pub(crate) fn output(&self, stream: &str) -> String {
        host::read_log(&self.log)
            .into_iter()
            .filter(|line| line.stream == stream)
            .map(|line| if line.whole { line.text + "\n" } else { line.text })
            .collect()
    }

    /// Waits until its standard output has a line with this text.
    pub(crate) fn wait_for_line(&self, text: &str) {
        wait_until(&format!("the line {text:?} of a container"), || {
            if self.output("stdout").lines().any(|line| line == text) {
                return Some(());
            }
            let status = self.status();
            let ended = status.state() == ContainerState::Exited && self.output("stdout").is_empty();
            assert!(!ended, "ended with {}: {}", status.exit_code, self.output("stderr"));
            None
        });
    }

    /// Its process on the host.
    pub(crate) fn pid(&self) -> u32 {
        let request = ContainerStatusRequest {
            container_id: self.id.clone(),
            verbose: true,
        };
        let info: Value = serde_json::from_str(&call(&request).unwrap().info["info"]).unwrap();
        info["pid"].as_u64().unwrap().try_into().unwrap()
    }
}
