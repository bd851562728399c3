//! Bundles: specs as `ctr run` writes them, root file systems, and the fifo for the shim's log.

use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Read},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use containerd_shim_protos::types::mount::Mount;
use serde_json::{Value, json};

use crate::stdio::make_fifo;

/// A container's folder, as containerd prepares it.
#[derive(Debug)]
pub struct Bundle {
    /// The container.
    pub id: String,
    /// Its folder.
    pub path: PathBuf,
    log: File,
}

impl Bundle {
    /// Makes the bundle of `id` below `parent`; without `config.json` if there is no spec.
    pub fn make(parent: &Path, id: &str, spec: Option<&Value>) -> Self {
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

    /// What the shim has logged since the last call.
    pub fn logged(&self) -> String {
        let mut bytes = Vec::new();
        match (&self.log).read_to_end(&mut bytes) {
            Err(error) if error.kind() != ErrorKind::WouldBlock => panic!("read the log: {error}"),
            _ => String::from_utf8_lossy(&bytes).into_owned(),
        }
    }

    /// What containerd does last: everything of the container is forgotten.
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

/// The spec of a container.
pub fn spec(args: &[&str]) -> Value {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    let namespaces = ["pid", "ipc", "uts", "mount", "network", "cgroup"].map(|kind| json!({"type": kind}));
    json!({
        "ociVersion": "1.2.0",
        "process": process(args),
        "root": {"path": "rootfs"},
        "hostname": "guest",
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
            mount("/run", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ],
        "linux": {"namespaces": namespaces, "resources": {}},
    })
}

/// A process of a spec, or of an exec.
pub fn process(args: &[&str]) -> Value {
    let capabilities = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_MKNOD"];
    json!({
        "args": args,
        "cwd": "/",
        "env": ["PATH=/bin", "TERM=xterm"],
        "user": {"uid": 0, "gid": 0},
        "noNewPrivileges": true,
        "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
    })
}

/// A mount of a snapshot.
pub fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        type_: kind.to_owned(),
        source: source.to_owned(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Mount::default()
    }
}

/// The snapshot of most containers: a bind mount of the one [`rootfs`].
pub fn bind() -> Vec<Mount> {
    vec![mount("bind", rootfs().to_str().unwrap(), &["rbind", "rw"])]
}

/// Busybox, unpacked once.
pub fn rootfs() -> &'static Path {
    static ROOTFS: OnceLock<PathBuf> = OnceLock::new();
    ROOTFS.get_or_init(|| {
        let root = crate::containerd::folder().join("rootfs");
        fill_root(&root);
        root
    })
}

/// Puts a busybox root file system into a folder.
pub fn fill_root(root: &Path) {
    for folder in "bin dev etc proc run sys tmp".split(' ') {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    fs::copy("/usr/bin/busybox", root.join("bin/busybox")).unwrap();
    let installed = Command::new("chroot")
        .arg(root)
        .args(["/bin/busybox", "--install", "-s", "/bin"])
        .status();
    assert!(installed.unwrap().success());
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
    fs::write(root.join("not-executable"), "#!/bin/sh\n").unwrap();
}
