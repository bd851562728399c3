//! Bundles: specs as `ctr run` writes them, root file systems, and the fifo for the shim's log.

use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Read},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use containerd_shim_protos::types::mount::Mount;
pub use nutshell_fixtures::process;
use serde_json::{Value, json};

use crate::stdio::make_fifo;

/// The bundle of a container, as containerd prepares it.
#[derive(Debug)]
pub struct Bundle {
    /// The container's id.
    pub id: String,
    /// The bundle's folder.
    pub path: PathBuf,
    log: File,
}

impl Bundle {
    /// Creates the bundle of container `id` below `parent`. Without a spec it has no `config.json`.
    ///
    /// # Panics
    ///
    /// If a file cannot be created.
    pub fn create(parent: &Path, id: &str, spec: Option<&Value>) -> Self {
        let path = parent.join(id);
        fs::DirBuilder::new().mode(0o700).create(&path).unwrap();
        fs::create_dir(path.join("rootfs")).unwrap();
        let log = path.join("log");
        make_fifo(&log);
        if let Some(spec) = spec {
            fs::write(path.join("config.json"), spec.to_string()).unwrap();
        }
        Self {
            id: id.to_owned(),
            log: OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
                .open(&log)
                .unwrap(),
            path,
        }
    }

    /// Returns what the shim has logged since the last call.
    pub fn read_log(&self) -> String {
        let mut bytes = Vec::new();
        match (&self.log).read_to_end(&mut bytes) {
            Err(error) if error.kind() != ErrorKind::WouldBlock => panic!("read the log: {error}"),
            _ => String::from_utf8_lossy(&bytes).into_owned(),
        }
    }

    /// Removes the bundle, as containerd does last. It is not an error if the bundle does not exist.
    pub fn remove(&self) {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => panic!("remove {}: {error}", self.path.display()),
            _ => {}
        }
    }
}

/// The spec of a container that runs a shell script.
pub fn shell(script: &str) -> Value {
    spec(&["/bin/sh", "-c", script])
}

/// The spec of a container that does nothing until it is killed.
pub fn idle() -> Value {
    spec(&["sleep", "100000"])
}

/// The spec of a container that runs `args`, without limits. Its control group is mounted.
pub fn spec(args: &[&str]) -> Value {
    let mut spec = nutshell_fixtures::spec(args);
    let options = ["nosuid", "noexec", "nodev", "relatime", "ro"];
    let cgroup = nutshell_fixtures::mount("/sys/fs/cgroup", "cgroup", &options);
    spec["mounts"].as_array_mut().unwrap().push(cgroup);
    spec["linux"]["resources"] = json!({});
    spec
}

/// The spec of a container that runs a static program of the host with `args`.
pub fn spec_of_program(program: &Path, args: &[&str]) -> Value {
    let mut spec = spec(&[&["/program"], args].concat());
    let mount = json!({"destination": "/program", "type": "bind", "source": program, "options": ["bind", "ro"]});
    spec["mounts"].as_array_mut().unwrap().push(mount);
    spec
}

/// A mount in the rootfs of a Create request.
pub fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        type_: kind.to_owned(),
        source: source.to_owned(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Mount::default()
    }
}

/// The default rootfs of a Create request: a bind mount of [`rootfs`].
pub fn rootfs_mounts() -> Vec<Mount> {
    vec![mount("bind", rootfs().to_str().unwrap(), &["rbind", "rw"])]
}

/// The root file system that the containers of this run share: busybox, unpacked once.
pub fn rootfs() -> &'static Path {
    static ROOTFS: OnceLock<PathBuf> = OnceLock::new();
    ROOTFS.get_or_init(|| {
        let root = crate::host::work_folder().join("rootfs");
        fill_root(&root);
        root
    })
}

/// Makes a busybox root file system in a folder, with a file `/not-executable`.
pub fn fill_root(root: &Path) {
    nutshell_fixtures::fill_root(root);
    fs::write(root.join("not-executable"), "#!/bin/sh\n").unwrap();
}
