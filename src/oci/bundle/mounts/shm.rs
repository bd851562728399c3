//! `/dev/shm`: shared memory of a container or of its pod is memory of the guest. Processes cannot share memory through
//! a file server, and no process of the host uses the shared memory that containerd makes for a container or a pod.

use std::path::Path;

use oci_spec::runtime::Mount;

use super::spec_mount::{normalize, options, read_only, set_bind, set_filesystem, set_options};
use crate::oci::{
    Inspect, SourceKind,
    plan::{DEFAULT_SHM_SIZE, ReadOnly},
};

/// Where containers expect shared memory, and where the agent mounts the tmpfs that the containers of a pod share.
pub(super) const SHM_PATH: &str = "/dev/shm";

/// Options of a container's private `/dev/shm`, without its size: those of containerd's default spec (`pkg/oci`).
const SHM_OPTIONS: [&str; 4] = ["nosuid", "noexec", "nodev", "mode=1777"];

/// The size in bytes of a pod's shared memory, from the mounts of its sandbox: containerd's CRI makes a tmpfs on the
/// host for it.
pub(in crate::oci::bundle) fn pod_shm_size(mounts: &[Mount], inspect: &dyn Inspect) -> u64 {
    let source = mounts
        .iter()
        .filter(|mount| normalize(mount.destination()) == Path::new(SHM_PATH))
        .find_map(|mount| mount.source().as_deref());
    match source.map(|source| inspect.kind(source)) {
        Some(Ok(SourceKind::SharedMemory { size })) => size,
        _ => DEFAULT_SHM_SIZE,
    }
}

/// Whether this is the `/dev/shm` of containerd's default spec (`pkg/oci`). If containerd's CRI leaves a pod's shared
/// memory to the runtime, it leaves this mount in the specs of the pod's containers.
pub(super) fn is_default(mount: &Mount) -> bool {
    normalize(mount.destination()) == Path::new(SHM_PATH)
        && mount.typ().as_deref() == Some("tmpfs")
        && mount.source().as_deref() == Some(Path::new("shm"))
        && options(mount).any(|option| option == "size=65536k")
}

/// Turns `mount` into a bind mount of the pod's shared memory.
pub(super) fn bind_pod_shm(mount: &mut Mount) {
    set_options(mount, &["bind", "rw"]);
    set_bind(mount, SHM_PATH.into());
}

/// Turns `mount` into a tmpfs of `size` bytes that only this container uses.
pub(super) fn mount_private_shm(mount: &mut Mount, size: u64) {
    let size = format!("size={size}");
    let ro = (read_only(mount) != ReadOnly::None).then_some("ro");
    let options: Vec<&str> = SHM_OPTIONS.into_iter().chain([size.as_str()]).chain(ro).collect();
    set_filesystem(mount, "tmpfs", &options);
}
