//! Plans a virtual machine that boots the disk in its image, or a kernel from a mount.

use std::{
    collections::HashMap,
    path::{Component, Path, PathBuf},
};

use oci_spec::runtime::{Mount, Spec};
use uuid::Uuid;

use super::{
    hooks::take_host_hooks,
    namespaces,
    placement::{cgroup_path, parse_placement},
    rootfs,
};
use crate::oci::{
    HostMount, HostNamespaces, Limits, OnReboot, Placement, PlanError, Root, Sizing, VmImage, VmKernel, VmPlan,
};

/// The commands that request a virtual machine. Without a command, an image cannot be started. The second one is the
/// entrypoint of images for crun-vm.
const COMMAND: &str = "vm";
const ENTRYPOINT_OF_DISK_IMAGES: &str = "no-entrypoint";

/// The prefix of the annotations of virtual machines.
const PREFIX: &str = "io.containerd.nutshell.vm.";

/// The annotation with the UID of the pod (containerd `internal/cri/annotations`).
const POD_UID: &str = "io.kubernetes.cri.sandbox-uid";

/// Where the directory with a kernel is mounted.
const KERNEL_MOUNT: &str = "/kernel";

/// The maximum length of additional kernel arguments, in bytes.
const MAX_KERNEL_ARGUMENTS: usize = 1024;

/// Bind mounts that containerd and the kubelet add to every container. They are ignored, because a guest has no access
/// to files of the host.
const IGNORED_MOUNTS: [&str; 6] = [
    "/dev/shm",
    "/dev/termination-log",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/resolv.conf",
    "/var/run/secrets/kubernetes.io/serviceaccount",
];

/// Returns the image with the disk, if the command of `spec` requests a virtual machine.
pub(super) fn find_image(spec: &Spec, bundle: &Path, mounts: &[HostMount]) -> Result<Option<VmImage>, PlanError> {
    if !requests_virtual_machine(spec) {
        return Ok(None);
    }
    let root = spec.root().as_ref().ok_or(PlanError::Missing("root"))?;
    let directory = bundle.join(root.path());
    match rootfs::plan_root(mounts, directory.clone())? {
        Root::Share { mounts, .. } => Ok(Some(VmImage { mounts, directory })),
        Root::Disk { source, filesystem, .. } => Err(PlanError::unsupported(
            format!("rootfs mount of type {filesystem:?} from {}", source.display()),
            "the disk of a virtual machine cannot be in a snapshot that is a block device. Set snapshotter = \
             \"overlayfs\" (or native) for this runtime in containerd's configuration, or pass --snapshotter to ctr",
        )),
    }
}

/// Whether an annotation gives the path of a virtual machine's kernel.
pub(super) fn has_kernel_annotation(spec: &Spec) -> bool {
    let annotations = spec.annotations().as_ref();
    annotations.is_some_and(|annotations| annotations.contains_key(&format!("{PREFIX}kernel")))
}

fn requests_virtual_machine(spec: &Spec) -> bool {
    let arguments = spec.process().as_ref().and_then(|process| process.args().as_ref());
    match arguments.map(Vec::as_slice) {
        Some([command]) => command == COMMAND || command == ENTRYPOINT_OF_DISK_IMAGES,
        Some([command, ..]) => command == ENTRYPOINT_OF_DISK_IMAGES,
        _ => false,
    }
}

pub(super) fn plan(mut spec: Spec, sizing: &Sizing) -> Result<VmPlan, PlanError> {
    let annotations = spec.annotations().clone().unwrap_or_default();
    let placement = parse_placement(&annotations)?.unwrap_or(Placement::Single);
    let settings = Settings::parse(&annotations)?;
    let linux = spec.linux_mut().take().ok_or(PlanError::Missing("linux"))?;
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    let network = namespaces::translate(namespaces, &placement, HostNamespaces::Refuse)?.network;
    let kernel_directory = find_kernel_mount(spec.mounts().as_deref().unwrap_or_default())?;
    let process = spec.process().as_ref().ok_or(PlanError::Missing("process"))?;
    let limits = Limits::from_resources(linux.resources().as_ref());
    Ok(VmPlan {
        placement,
        kernel: settings.kernel(kernel_directory)?,
        kernel_arguments: settings.kernel_arguments,
        on_reboot: settings.on_reboot,
        uuid: annotations.get(POD_UID).and_then(|uid| Uuid::try_parse(uid).ok()),
        network,
        hostname: find_hostname(&spec),
        resolv_conf: find_resolv_conf(spec.mounts().as_deref().unwrap_or_default()),
        limits,
        size: sizing.size_for_virtual_machine(&annotations, limits)?,
        cgroup: cgroup_path(&linux)?,
        oom_score_adj: process.oom_score_adj().unwrap_or(0),
        hooks: take_host_hooks(&mut spec)?,
    })
}

/// The host name of a spec. The specs of a pod's containers have it in their environment only (containerd
/// `internal/cri/server`).
fn find_hostname(spec: &Spec) -> Option<String> {
    let environment = spec.process().as_ref().and_then(|process| process.env().as_deref());
    let from_environment = || environment?.iter().find_map(|entry| entry.strip_prefix("HOSTNAME="));
    let name = spec.hostname().as_deref().filter(|name| !name.is_empty());
    name.or_else(from_environment).map(str::to_owned)
}

/// The source of the mount at `/etc/resolv.conf`.
fn find_resolv_conf(mounts: &[Mount]) -> Option<PathBuf> {
    let mount = mounts
        .iter()
        .find(|mount| mount.destination() == Path::new("/etc/resolv.conf"));
    mount?.source().clone()
}

/// The source of the mount at [`KERNEL_MOUNT`].
///
/// # Errors
///
/// There is a mount that a virtual machine cannot have.
fn find_kernel_mount(mounts: &[Mount]) -> Result<Option<PathBuf>, PlanError> {
    let mut directory = None;
    for mount in mounts {
        let options = mount.options().as_deref().unwrap_or_default();
        let is_bind =
            mount.typ().as_deref() == Some("bind") || options.iter().any(|name| name == "bind" || name == "rbind");
        let destination = mount.destination();
        if !is_bind || IGNORED_MOUNTS.iter().any(|ignored| destination == Path::new(ignored)) {
            continue;
        }
        if destination != Path::new(KERNEL_MOUNT) {
            return Err(PlanError::unsupported(
                format!("mounts: {}", destination.display()),
                format!("a virtual machine has no mounts except {KERNEL_MOUNT}"),
            ));
        }
        directory = mount.source().clone();
    }
    Ok(directory)
}

/// The annotations of a virtual machine.
#[derive(Debug, Default)]
struct Settings {
    kernel: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    kernel_arguments: String,
    on_reboot: OnReboot,
}

impl Settings {
    fn parse(annotations: &HashMap<String, String>) -> Result<Self, PlanError> {
        let mut settings = Self::default();
        for (name, value) in annotations {
            let Some(key) = name.strip_prefix(PREFIX) else { continue };
            let invalid = |reason: String| PlanError::invalid(format!("annotation {name}"), reason);
            match key {
                "kernel" => settings.kernel = Some(parse_relative_path(value).map_err(invalid)?),
                "initrd" => settings.initramfs = Some(parse_relative_path(value).map_err(invalid)?),
                "kernel-arguments" => settings.kernel_arguments = parse_kernel_arguments(value).map_err(invalid)?,
                "on-reboot" => {
                    settings.on_reboot = match value.as_str() {
                        "restart" => OnReboot::Restart,
                        "exit" => OnReboot::Exit,
                        other => return Err(invalid(format!("{other:?} is neither \"restart\" nor \"exit\""))),
                    }
                }
                _ => {
                    return Err(invalid(
                        "unknown: a virtual machine has the annotations kernel, initrd, kernel-arguments and on-reboot"
                            .to_owned(),
                    ));
                }
            }
        }
        Ok(settings)
    }

    /// The kernel. `directory` is the source of the mount at [`KERNEL_MOUNT`].
    fn kernel(&self, directory: Option<PathBuf>) -> Result<VmKernel, PlanError> {
        match (&self.kernel, directory) {
            (None, None) if self.initramfs.is_none() => Ok(VmKernel::Disk),
            (Some(kernel), Some(directory)) => Ok(VmKernel::Files {
                directory,
                kernel: kernel.clone(),
                initramfs: self.initramfs.clone(),
            }),
            (None, _) => Err(PlanError::invalid(
                format!("annotation {PREFIX}kernel"),
                format!(
                    "it is missing, but there is a mount at {KERNEL_MOUNT} or an initrd: set it to the path of the \
                     kernel in that mount"
                ),
            )),
            (Some(_), None) => Err(PlanError::invalid(
                format!("annotation {PREFIX}kernel"),
                format!("there is no mount at {KERNEL_MOUNT} with the kernel"),
            )),
        }
    }
}

/// A path below a mount. A leading slash means the root of the mount.
fn parse_relative_path(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text.trim_start_matches('/'));
    let is_plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    if is_plain && path != Path::new("") {
        Ok(path.to_owned())
    } else {
        Err(format!("{text:?} is not the path of a file below {KERNEL_MOUNT}"))
    }
}

fn parse_kernel_arguments(text: &str) -> Result<String, String> {
    if text.len() > MAX_KERNEL_ARGUMENTS {
        return Err(format!(
            "{} bytes are more than the maximum of {MAX_KERNEL_ARGUMENTS}",
            text.len()
        ));
    }
    match text.chars().find(|character| !matches!(character, ' '..='~')) {
        None => Ok(text.trim().to_owned()),
        Some(character) => Err(format!("{character:?} is not a printable ASCII character")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::oci::{BundleSpec, DEFAULT_MEMORY, DEFAULT_VCPUS, Network};

    const SIZING: Sizing = Sizing {
        default_memory: DEFAULT_MEMORY,
        default_vcpus: DEFAULT_VCPUS,
        max_memory: 8 << 30,
        max_vcpus: 8,
    };

    fn spec(arguments: &[&str]) -> Value {
        json!({
            "ociVersion": "1.2.0",
            "process": {"args": arguments, "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/etc/resolv.conf", "type": "bind", "source": "/h/resolv.conf", "options": ["rbind"]},
                {"destination": "/etc/hosts", "type": "bind", "source": "/h/hosts", "options": ["rbind", "rw"]},
            ],
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "network"}],
                "resources": {"memory": {"limit": 1u64 << 30}, "cpu": {"quota": 150_000, "period": 100_000}},
            },
            "annotations": {},
        })
    }

    fn read(spec: &Value) -> BundleSpec {
        let bundle = tempfile::tempdir().unwrap();
        std::fs::write(bundle.path().join("config.json"), spec.to_string()).unwrap();
        BundleSpec::read(bundle.path()).unwrap()
    }

    fn overlay() -> HostMount {
        HostMount {
            kind: "overlay".to_owned(),
            source: "overlay".to_owned(),
            target: String::new(),
            options: vec!["lowerdir=/s/1/fs".to_owned()],
        }
    }

    fn planned(spec: &Value) -> Result<VmPlan, String> {
        let planned = read(spec).plan_virtual_machine(&SIZING);
        planned.map_err(|error| error.to_string())
    }

    fn with_annotations(annotations: Value) -> Value {
        let mut spec = spec(&["vm"]);
        spec["annotations"] = annotations;
        spec
    }

    #[test]
    fn command_names_a_virtual_machine() {
        for (arguments, expected) in [
            (&["vm"][..], true),
            (&["no-entrypoint"], true),
            (&["no-entrypoint", "sh"], true),
            (&["vm", "-x"], false),
            (&["/bin/vm"], false),
            (&["sh"], false),
        ] {
            let image = read(&spec(arguments)).virtual_machine_image(&[overlay()]).unwrap();
            assert_eq!(image.is_some(), expected, "{arguments:?}");
            assert!(image.is_none_or(|image| image.mounts == [overlay()]));
        }
    }

    #[test]
    fn settings_come_from_limits_and_annotations() {
        let uid = "6f1c6f2b-6d5c-4a2b-9d0e-0123456789ab";
        let mut spec = with_annotations(json!({
            "io.containerd.nutshell.vm.on-reboot": "exit",
            "io.containerd.nutshell.vm.kernel-arguments": " systemd.unit=rescue.target ",
            "io.containerd.nutshell.vcpus": "3",
            "io.kubernetes.cri.sandbox-uid": uid,
        }));
        spec["process"]["oomScoreAdj"] = json!(7);
        spec["process"]["env"] = json!(["A=b", "HOSTNAME=web-0"]);

        let plan = planned(&spec).unwrap();

        assert_eq!((plan.size.memory, plan.size.vcpus), (1 << 30, 3));
        assert_eq!((plan.on_reboot, plan.oom_score_adj), (OnReboot::Exit, 7));
        assert_eq!(plan.kernel_arguments, "systemd.unit=rescue.target");
        assert_eq!((plan.kernel, plan.network), (VmKernel::Disk, Network::Loopback));
        assert_eq!(plan.hostname.as_deref(), Some("web-0"));
        assert_eq!(plan.resolv_conf.as_deref(), Some(Path::new("/h/resolv.conf")));
        assert_eq!(plan.uuid.unwrap().to_string(), uid);
    }

    #[test]
    fn kernel_comes_from_the_mount_for_it() {
        let mut spec = with_annotations(json!({
            "io.containerd.nutshell.vm.kernel": "/boot/vmlinuz",
            "io.containerd.nutshell.vm.initrd": "initrd.img",
        }));
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/kernel", "type": "bind", "source": "/v/kernel", "options": ["rbind"]}));
        let expected = VmKernel::Files {
            directory: "/v/kernel".into(),
            kernel: "boot/vmlinuz".into(),
            initramfs: Some("initrd.img".into()),
        };
        assert_eq!(planned(&spec).unwrap().kernel, expected);

        spec["annotations"] = json!({});
        let error = planned(&spec).unwrap_err();
        assert!(
            error.starts_with("annotation io.containerd.nutshell.vm.kernel: it is missing"),
            "{error}"
        );
    }

    #[test]
    fn wrong_annotation_is_refused_with_its_name_and_value() {
        for (key, value, expected) in [
            ("on-rebot", "exit", "unknown: a virtual machine has the annotations"),
            ("on-reboot", "never", "\"never\" is neither"),
            ("kernel-arguments", "a\nb", "'\\n' is not a printable ASCII character"),
            (
                "kernel-arguments",
                &"a".repeat(1025),
                "1025 bytes are more than the maximum of 1024",
            ),
            ("kernel", "../vmlinuz", "\"../vmlinuz\" is not the path of a file"),
            ("kernel", "/", "\"/\" is not the path of a file"),
            ("kernel", "vmlinuz", "there is no mount at /kernel"),
            ("initrd", "initrd", "it is missing"),
        ] {
            let error = planned(&with_annotations(json!({format!("{PREFIX}{key}"): value}))).unwrap_err();
            assert!(
                error.starts_with("annotation io.containerd.nutshell.vm.k") || error.contains(key),
                "{error}"
            );
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn root_on_a_block_device_and_other_mounts_are_refused() {
        let device = HostMount {
            kind: "ext4".to_owned(),
            source: "/dev/mapper/pool-snap-7".to_owned(),
            target: String::new(),
            options: Vec::new(),
        };
        let error = read(&spec(&["vm"])).virtual_machine_image(&[device]).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("/dev/mapper/pool-snap-7") && error.contains("snapshotter"),
            "{error}"
        );

        let mut spec = spec(&["vm"]);
        spec["mounts"] = json!([{"destination": "/data", "type": "bind", "source": "/d", "options": ["rbind"]}]);
        let error = planned(&spec).unwrap_err();
        assert_eq!(error, "mounts: /data: a virtual machine has no mounts except /kernel");
    }
}
