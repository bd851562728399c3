//! The resources that a pod's containers share in addition to the machine's namespaces: a pid namespace, `/dev/shm`,
//! and a few files. `init` is pid 1 of that pid namespace.
//!
//! [`set_up`] runs in a job (see [`crate::job`]). The event loop keeps its result as a [`Pod`].

mod init;

use std::ffi::CString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nutshell_protocol::{Failure, SetUpPod};
use oci_spec::runtime::{Mount, Spec};
use rustix::mount::MountFlags;
use rustix::process::Pid;

use crate::failure::Context;
use crate::job::Outcome;
use crate::machine::settings;

/// The directory of the shared files.
const FILES_DIRECTORY: &str = "/run/nutshell/pod";

/// The pod's shared memory: the tmpfs that the machine's setup mounted.
const SHM_PATH: &str = "/dev/shm";

/// A pod that is set up.
#[derive(Debug, Clone)]
pub(crate) struct Pod {
    /// Pid 1 of the pid namespace that containers may share.
    pub(crate) init: Pid,
    /// Shared files and directories: destination in the containers, source in the guest.
    shared: Vec<(PathBuf, PathBuf)>,
}

impl Pod {
    /// Returns the pod that [`set_up`] has set up for `request`. `init` is the process that it created.
    pub(crate) fn new(init: Pid, request: &SetUpPod) -> Self {
        let mut shared: Vec<_> = request
            .files
            .iter()
            .enumerate()
            .map(|(index, file)| (PathBuf::from(&file.destination), file_path(index)))
            .collect();
        if !shared.is_empty() {
            // With its Sandbox service, containerd provides neither these files nor shared memory.
            shared.push((SHM_PATH.into(), SHM_PATH.into()));
        }
        Self { init, shared }
    }

    /// Adds bind mounts of the shared files to a container's spec, unless it has a mount at the same destination.
    pub(crate) fn add_shared_mounts(&self, spec: &mut Spec) {
        let read_only = spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly) == Some(true);
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for (destination, source) in &self.shared {
            if mounts
                .iter()
                .any(|mount| is_same_path(mount.destination(), destination))
            {
                continue;
            }
            let is_file = source != Path::new(SHM_PATH);
            let options = ["bind", if read_only && is_file { "ro" } else { "rw" }];
            let mut mount = Mount::default();
            mount
                .set_destination(destination.clone())
                .set_typ(Some("bind".to_owned()))
                .set_source(Some(source.clone()))
                .set_options(Some(options.map(str::to_owned).to_vec()));
            mounts.push(mount);
        }
        spec.set_mounts(Some(mounts));
    }
}

/// Whether two paths are the same apart from trailing `/` and `.` components.
fn is_same_path(one: &Path, other: &Path) -> bool {
    one.components().eq(other.components())
}

fn file_path(index: usize) -> PathBuf {
    Path::new(FILES_DIRECTORY).join(index.to_string())
}

/// Applies the settings of a pod, and creates the resources that its containers share. Returns the process that is pid
/// 1 of the shared pid namespace; it lives as long as the machine.
pub(crate) fn set_up(request: &SetUpPod) -> Result<Outcome, Failure> {
    if let Some(name) = &request.hostname {
        settings::set_hostname(name)?;
    }
    if let Some(name) = &request.domainname {
        settings::set_domainname(name)?;
    }
    for (name, value) in &request.sysctls {
        settings::set_sysctl(name, value)?;
    }
    resize_shm(request.shm_size).context(|| format!("resize {SHM_PATH} to {} bytes", request.shm_size))?;
    if !request.files.is_empty() {
        mount_files().context(|| format!("mount a tmpfs on {FILES_DIRECTORY}"))?;
    }
    for (index, file) in request.files.iter().enumerate() {
        fs::write(file_path(index), &file.content).context(|| format!("write the pod's {}", file.destination))?;
    }
    let init = init::start().context(|| "start the first process of the pod's pid namespace".to_owned())?;
    Ok(Outcome::Process {
        pid: crate::sys::raw_pid(init),
    })
}

/// Mounts the file system of the shared files. It has nothing else: a container with CAP_DAC_READ_SEARCH can open every
/// file of a file system of which it has a mount (open_by_handle_at(2)), and a container can fill it.
fn mount_files() -> io::Result<()> {
    fs::create_dir_all(FILES_DIRECTORY)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(rustix::mount::mount(
        "tmpfs",
        FILES_DIRECTORY,
        "tmpfs",
        flags,
        c"mode=755,size=16m",
    )?)
}

fn resize_shm(bytes: u64) -> io::Result<()> {
    let options = CString::new(format!("size={bytes},mode=1777"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(rustix::mount::mount_remount(SHM_PATH, flags, options.as_c_str())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nutshell_protocol::PodFile;
    use serde_json::{Value, json};

    fn pod(files: &[&str]) -> Pod {
        let file = |destination: &&str| PodFile {
            destination: (*destination).to_owned(),
            content: Vec::new(),
        };
        let request = SetUpPod {
            files: files.iter().map(file).collect(),
            ..SetUpPod::default()
        };
        Pod::new(Pid::INIT, &request)
    }

    fn completed(pod: &Pod, spec: Value) -> Value {
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        pod.add_shared_mounts(&mut spec);
        serde_json::to_value(spec.mounts()).unwrap()
    }

    #[test]
    fn shared_files_are_mounted_where_the_spec_mounts_nothing() {
        let own = json!({"destination": "/etc/hosts/", "type": "bind", "source": "/own"});
        let spec = json!({"ociVersion": "1.2.0", "root": {"path": "r", "readonly": true}, "mounts": [own]});
        let mounts = completed(&pod(&["/etc/hosts", "/etc/resolv.conf"]), spec);
        let expected = json!([
            own,
            {"destination": "/etc/resolv.conf", "type": "bind", "source": "/run/nutshell/pod/1", "options": ["bind", "ro"]},
            {"destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["bind", "rw"]},
        ]);
        assert_eq!(mounts, expected);
    }

    #[test]
    fn pod_without_files_adds_no_mounts() {
        let mounts = completed(&pod(&[]), json!({"ociVersion": "1.2.0", "mounts": []}));
        assert_eq!(mounts, json!([]));
    }
}
