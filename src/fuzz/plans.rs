//! OCI bundles and CRI sandboxes.

use std::{
    collections::HashMap,
    io,
    path::{Component, Path, PathBuf},
};

use arbitrary::{Result, Unstructured};
use oci_spec::runtime::Spec;

use crate::oci::{
    BundlePlan, BundleSpec, CgroupPath, ContainerId, DEFAULT_MEMORY, DEFAULT_VCPUS, GuestProcess, Hooks, HostMount,
    HostNamespaces, Inspect, MAX_VM_DISKS, MIN_MEMORY, MountRestrictions, Network, Plan, PodPlan, Size, Sizing,
    SourceKind, VmPlan, VmPolicy, plan_pod,
};

const SIZING: Sizing = Sizing {
    default_memory: DEFAULT_MEMORY,
    default_vcpus: DEFAULT_VCPUS,
    max_memory: 4 << 30,
    max_vcpus: 8,
};

const ID: &str = "c7";

/// The maximum length of the name of a virtual machine's disk, in bytes.
const MAX_DISK_NAME: usize = 20;

/// A host where the end of a path tells what is there.
#[derive(Debug)]
struct Host {
    nosuid: bool,
}

impl Inspect for Host {
    fn kind(&self, path: &Path) -> io::Result<SourceKind> {
        let name = path.file_name().unwrap_or_default();
        Ok(match name.as_encoded_bytes().last() {
            Some(b'f') => SourceKind::File,
            Some(b'm') => SourceKind::SharedMemory { size: 64 << 20 },
            Some(b'k') => SourceKind::Kernel,
            Some(b'h') => SourceKind::HugePages,
            Some(b'c') => SourceKind::Character { major: 1, minor: 3 },
            Some(b'b') => SourceKind::Block,
            Some(b's') => SourceKind::Socket,
            Some(b'p') => SourceKind::Fifo,
            Some(b'n') => return Err(io::ErrorKind::NotFound.into()),
            _ => SourceKind::Directory,
        })
    }

    fn has_mounts_below(&self, path: &Path) -> io::Result<bool> {
        Ok(path.as_os_str().len().is_multiple_of(2))
    }

    fn restrictions(&self, _: &Path) -> io::Result<MountRestrictions> {
        Ok(MountRestrictions {
            nosuid: self.nosuid,
            noexec: false,
        })
    }
}

/// Plans a container, sandbox or virtual machine from the `config.json` in `data`, whose first byte selects the
/// settings of the host and the snapshot.
///
/// # Panics
///
/// If a plan has a path that leads out of its place, or a size beyond the maximum.
pub fn plan_bundle(data: &[u8]) {
    let Some((selection, text)) = data.split_first() else {
        return;
    };
    let host = Host {
        nosuid: selection & 1 != 0,
    };
    let namespaces = host_namespaces(selection >> 1);
    let mounts = snapshot(selection >> 3 & 3);
    let id: ContainerId = ID.parse().unwrap();
    // An exec has a process of the same form.
    let _ = GuestProcess::parse(text);
    let Ok(bundle) = BundleSpec::parse(Path::new("/run/bundle"), text) else {
        return;
    };
    let _ = (bundle.virtual_machine_image(&mounts), bundle.has_boot_annotation());
    let again = BundleSpec::parse(Path::new("/run/bundle"), text).unwrap();
    match bundle.plan(&id, &mounts, &SIZING, namespaces, &host) {
        Ok(BundlePlan::Container(plan)) => check_plan(&plan),
        Ok(BundlePlan::Sandbox(pod)) => check_pod(&pod),
        Err(_) => {}
    }
    if let Ok(plan) = again.plan_virtual_machine(VmPolicy::default(), &SIZING, &host) {
        check_machine(&plan);
    }
}

/// Plans a pod from the options of CreateSandbox in `data`, an input with the settings of the host before the message.
///
/// # Panics
///
/// If a plan has a path that leads out of its place, or a size beyond the maximum.
pub fn plan_sandbox(data: &[u8]) {
    // The input may end anywhere.
    let _ = plan_sandbox_of(&mut Unstructured::new(data));
}

fn plan_sandbox_of(input: &mut Unstructured<'_>) -> Result<()> {
    let namespaces = host_namespaces(input.arbitrary()?);
    let kind = *input.choose(&[
        "runtime.v1.PodSandboxConfig",
        "x/runtime.v1.PodSandboxConfig",
        "",
        "other",
    ])?;
    let network = *input.choose(&["", "/run/netns/a", "netns", "/"])?;
    let mut annotations = HashMap::new();
    for name in [
        "io.containerd.nutshell.vcpus",
        "io.containerd.nutshell.memory_mib",
        "io.kubernetes.cri.sandbox-memory",
    ] {
        if input.ratio(1_u8, 4)? {
            annotations.insert(name.to_owned(), input.arbitrary::<i32>()?.to_string());
        }
    }
    let id: ContainerId = ID.parse().unwrap();
    let message = input.bytes(input.len())?;
    if let Ok(pod) = plan_pod(&id, Some((kind, message)), network, &annotations, &SIZING, namespaces) {
        check_pod(&pod);
    }
    Ok(())
}

fn host_namespaces(selection: u8) -> HostNamespaces {
    match selection & 3 {
        0 | 1 => HostNamespaces::Refuse,
        2 => HostNamespaces::Pod,
        _ => HostNamespaces::PodAndNetwork,
    }
}

/// The mounts of a snapshotter.
fn snapshot(selection: u8) -> Vec<HostMount> {
    let mount = |kind: &str, source: &str, options: &[&str]| HostMount {
        kind: kind.to_owned(),
        source: source.to_owned(),
        target: String::new(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    };
    match selection {
        0 => Vec::new(),
        1 => vec![mount("overlay", "overlay", &["lowerdir=/s/1/fs"])],
        2 => vec![mount("ext4", "/dev/x", &["ro"])],
        _ => vec![mount("bind", "/s/1/fs", &["rbind", "ro"])],
    }
}

fn check_plan(plan: &Plan) {
    check_size(&plan.size);
    check_cgroup(plan.cgroup.as_ref());
    check_hooks(&plan.hooks);
    for share in &plan.shares {
        assert!(share.source.is_absolute(), "{share:?}");
        let parts = normal_components(Path::new(&share.path));
        assert_eq!((parts.len(), parts[0].as_path()), (2, Path::new(ID)), "{share:?}");
    }
    let guest: Spec = serde_json::from_slice(&plan.spec.clone().encode(&[]).unwrap()).unwrap();
    let root = guest.root().as_ref().unwrap().path();
    assert_eq!(
        root,
        &Path::new(nutshell_protocol::CONTAINERS_PATH).join(ID).join("rootfs")
    );
    let linux = guest.linux().as_ref().unwrap();
    for namespace in linux.namespaces().iter().flatten() {
        assert_eq!(namespace.path(), &None, "a path of the host");
    }
    assert!(
        plan.warnings.iter().all(|line| !line.contains('\n')),
        "{:?}",
        plan.warnings
    );
}

fn check_pod(pod: &PodPlan) {
    check_size(&pod.size.boot);
    check_cgroup(pod.cgroup.as_ref());
    check_hooks(&pod.hooks);
    assert_ne!(pod.network, Network::Host);
    if let Network::Namespace(path) = &pod.network {
        assert!(path.is_absolute());
    }
}

fn check_machine(plan: &VmPlan) {
    assert!(plan.disks.len() <= MAX_VM_DISKS);
    for disk in &plan.disks {
        assert!(
            (1..=MAX_DISK_NAME).contains(&disk.name.as_str().len()),
            "{:?}",
            disk.name
        );
    }
    check_cgroup(plan.cgroup.as_ref());
}

fn check_size(size: &Size) {
    assert!((MIN_MEMORY..=SIZING.max_memory).contains(&size.memory), "{size:?}");
    assert!(size.memory.is_multiple_of(2 << 20), "{size:?}");
    assert!((1..=SIZING.max_vcpus).contains(&size.vcpus), "{size:?}");
}

fn check_cgroup(cgroup: Option<&CgroupPath>) {
    if let Some(CgroupPath::Absolute(path) | CgroupPath::Relative(path)) = cgroup {
        assert!(!normal_components(path).is_empty());
    }
}

fn check_hooks(hooks: &Hooks) {
    let Hooks {
        prestart,
        create_runtime,
        poststart,
        poststop,
    } = hooks;
    for hook in [prestart, create_runtime, poststart, poststop].into_iter().flatten() {
        assert!(hook.path.is_absolute(), "{hook:?}");
    }
}

/// The components of a relative path. Each must be a name.
fn normal_components(path: &Path) -> Vec<PathBuf> {
    let names = path.components().map(|component| match component {
        Component::Normal(name) => name.into(),
        other => panic!("{other:?} in {path:?}"),
    });
    names.collect()
}
