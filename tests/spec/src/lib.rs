//! OCI specs and root file systems that tests start from and change.
//!
//! Belongs here: the default spec, the default process, a busybox root file system. Does not belong here: nutshell's
//! own code, and anything that only one of the callers needs. Used by the tests of the shim (`tests/conformance`) and
//! of the agent (`guest/agent/tests`).

#![allow(clippy::unwrap_used, reason = "a test fails by panic")]

use std::{fs, path::Path, process::Command};

use serde_json::{Value, json};

/// The spec of a container that runs `args`, close to what `ctr run` writes. The root is `rootfs` in the bundle.
pub fn spec(args: &[&str]) -> Value {
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
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/run", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ],
        "linux": {
            "namespaces": namespaces,
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware"],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

/// The spec of a container that runs a shell script.
pub fn shell(script: &str) -> Value {
    spec(&["/bin/sh", "-c", script])
}

/// The `process` of a spec, or the process of an exec, as containerd writes it.
pub fn process(args: &[&str]) -> Value {
    let capabilities = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_KILL",
        "CAP_MKNOD",
        "CAP_NET_RAW",
    ];
    json!({
        "args": args,
        "cwd": "/",
        "env": ["PATH=/bin", "TERM=xterm"],
        "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
        "noNewPrivileges": true,
        "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
    })
}

/// A mount for a spec. Its source has the name of its type, such as `proc`.
pub fn mount(destination: &str, kind: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": kind, "source": kind, "options": options})
}

/// Makes a busybox root file system in the folder `root`: `/bin` with all applets, and `/etc/passwd` with the users
/// `root` and `web` (1000).
///
/// # Panics
///
/// If the host has no static `/usr/bin/busybox`, or the folder cannot be written.
pub fn fill_root(root: &Path) {
    for folder in "bin etc proc sys dev root run tmp var".split(' ') {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    fs::copy("/usr/bin/busybox", root.join("bin/busybox")).unwrap();
    let installed = Command::new("chroot")
        .arg(root)
        .args(["/bin/busybox", "--install", "-s", "/bin"])
        .status();
    assert!(installed.unwrap().success());
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/var:/bin/sh\n",
    )
    .unwrap();
}
