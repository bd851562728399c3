//! Pods that boot a whole Debian (tests/images/distribution), as docs/VM.md describes it: cloud-init configures it, and
//! it is used by SSH and by execs.

use std::{
    fs,
    os::unix::fs::symlink,
    path::PathBuf,
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use crate::{
    messages::{ContainerState, Mount, PodSandboxMetadata},
    pod::{BUSYBOX, Container, Handler, Pod, image, resources},
    streaming::Streams,
    vm::{mount, run},
    wait::{POLL_INTERVAL, wait_until_within},
};

const DISK: &str = "localhost/vm-debian:latest";
/// What getty prints above its prompt. The prompt itself is in no log, because its line does not end.
const PROMPT: &str = "Debian GNU/Linux 13 ";
/// A boot of systemd takes minutes in the lab, an emulated machine.
const BOOT_TIMEOUT: Duration = Duration::from_secs(450);
/// The grace period of the pod, in seconds.
const GRACE_PERIOD: i64 = 110;

/// A seed for cloud-init in a volume with the links of a Secret, and the SSH key of its user.
#[derive(Debug)]
struct Seed {
    folder: PathBuf,
}

impl Seed {
    fn create(folder: &str) -> Self {
        let folder = PathBuf::from(folder);
        let version = folder.join("secret/..2026_01_01");
        fs::create_dir_all(&version).unwrap();
        let key = folder.join("key");
        run(Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(&key));
        let public_key = fs::read_to_string(folder.join("key.pub")).unwrap();
        let user_data = format!(
            "#cloud-config
hostname: configured
users:
- name: visitor
  shell: /bin/bash
  sudo: ALL=(ALL) NOPASSWD:ALL
  ssh_authorized_keys: [\"{}\"]
ssh_genkeytypes: [ed25519]
runcmd:
- echo configured >>/var/lib/configured
",
            public_key.trim()
        );
        fs::write(version.join("user-data"), user_data).unwrap();
        symlink("..2026_01_01", folder.join("secret/..data")).unwrap();
        symlink("..data/user-data", folder.join("secret/user-data")).unwrap();
        Self { folder }
    }

    fn mount(&self) -> Mount {
        Mount {
            readonly: true,
            ..mount("/cloud-init", self.folder.join("secret").to_str().unwrap())
        }
    }

    /// Runs a command in the guest by SSH, and returns its output.
    fn ssh(&self, pod: &Pod, command: &str) -> String {
        let [address, _] = pod.addresses();
        run(Command::new("ssh")
            .args([
                "-F",
                "none",
                "-o",
                "BatchMode=yes",
                "-o",
                "ConnectTimeout=60",
                "-o",
                "LogLevel=ERROR",
            ])
            .args([
                "-o",
                "StrictHostKeyChecking=no",
                "-o",
                "UserKnownHostsFile=/dev/null",
                "-i",
            ])
            .arg(self.folder.join("key"))
            .arg(format!("visitor@{address}"))
            .arg(command))
    }
}

/// Starts the virtual machine of a pod with the settings of docs/VM.md.
fn start_vm(pod: &Pod, disk: &str, mounts: Vec<Mount>) -> Container {
    pod.start_with("vm", &["vm"], |config| {
        config.image = image(disk);
        config.stdin = true;
        config.tty = true;
        config.mounts = mounts;
        let limits = resources(config);
        limits.memory_limit_in_bytes = 2 << 30;
        limits.cpu_period = 100_000;
        limits.cpu_quota = 200_000;
    })
}

/// Waits until systemd has started everything, and asserts that nothing has failed.
fn wait_for_system(container: &Container) {
    let start = Instant::now();
    while !container.output("stdout").contains(PROMPT) {
        let state = container.status().state();
        assert!(
            state == ContainerState::Running && start.elapsed() < BOOT_TIMEOUT,
            "{state:?} after {:?} without a login prompt:\n{}",
            start.elapsed(),
            container.output("stdout")
        );
        sleep(POLL_INTERVAL);
    }
    let state = wait_until_within("the end of the boot", BOOT_TIMEOUT, || {
        // The guest agent may not run yet.
        let answer = container.try_exec(&["systemctl", "is-system-running"], 60).ok()?;
        let state = String::from_utf8_lossy(&answer.stdout).trim_end().to_owned();
        (!matches!(&state[..], "" | "initializing" | "starting")).then_some(state)
    });
    let failed = container.exec(&["systemctl", "list-units", "--failed", "--plain", "--no-legend"]);
    assert_eq!(state, "running", "{}", String::from_utf8_lossy(&failed.stdout));
}

/// Presses the power button, and asserts that the guest switches off in the grace period.
fn shut_down(container: &Container) {
    container.stop(GRACE_PERIOD);
    assert_eq!(container.status().exit_code, 0, "{}", container.output("stdout"));
}

/// The image of docs/VM.md's example with a seed: user, host name, SSH, execs, shutdown.
pub(crate) fn image_boots_with_a_seed(handler: Handler) {
    let pod = Pod::run(handler);
    let seed = Seed::create(&format!("{}/seed", pod.config.log_directory));
    let container = start_vm(&pod, DISK, vec![seed.mount()]);
    wait_for_system(&container);

    assert_eq!(seed.ssh(&pod, "id -un; hostname"), "visitor\nconfigured");
    assert_eq!(seed.ssh(&pod, "sudo cloud-init status"), "status: done");
    assert_eq!(seed.ssh(&pod, "nproc"), "2");
    let [address, _] = pod.addresses();
    assert!(
        seed.ssh(&pod, "ip -4 -o address show scope global")
            .contains(&format!(" {address}/16 "))
    );

    // Only nutshell's agent has terminals. systemd has started it by the credentials of the machine.
    let mut shell = Streams::exec(&container, &["sh", "-c", "tty; exit 3"], true);
    shell.read_to_end();
    assert!(shell.stdout.contains("/dev/pts/"), "{}", shell.stdout);
    assert_eq!(shell.exit, Some(3));
    assert_eq!(container.sh("id -un"), "root");
    assert_eq!(container.exec(&["sh", "-c", "echo wrong >&2; exit 7"]).exit_code, 7);
    assert_eq!(container.sh("cat /var/lib/configured"), "configured");
    shut_down(&container);
    pod.remove();
}

/// Execs are by the QEMU guest agent. The root is a volume, and a second pod of the same name has it later, with
/// another address: cloud-init does not configure it again.
pub(crate) fn persistent_root_moves_to_another_pod(handler: Handler) {
    let folder = PathBuf::from("/run/tmp/persistent");
    let volume = folder.join("volume");
    fs::create_dir_all(&volume).unwrap();
    let seed = Seed::create(folder.join("seed").to_str().unwrap());
    let disk = std::env::var("NUTSHELL_TEST_DISTRIBUTION").unwrap();
    run(Command::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw", &format!("{disk}/debian.qcow2")])
        .arg(volume.join("disk.img")));

    let mut identities = Vec::new();
    for uid in ["first", "second"] {
        let pod = Pod::run_with(handler, |config| {
            config.metadata = Some(PodSandboxMetadata {
                name: "db-0".into(),
                uid: uid.into(),
                namespace: "tests".into(),
                attempt: 0,
            });
            let annotations = [("disk.system", "boot"), ("exec", "qga")];
            config.annotations = annotations
                .map(|(name, value)| (format!("io.containerd.nutshell.vm.{name}"), value.into()))
                .into();
        });
        let container = start_vm(
            &pod,
            BUSYBOX,
            vec![mount("/disks/system", volume.to_str().unwrap()), seed.mount()],
        );
        wait_for_system(&container);
        let [address, _] = pod.addresses();
        assert!(
            seed.ssh(&pod, "ip -4 -o address show scope global")
                .contains(&format!(" {address}/16 "))
        );
        assert_eq!(container.sh("cat /var/lib/configured"), "configured");
        assert_eq!(container.sh("hostname"), "configured");
        let kept = container.sh("cat /etc/machine-id /etc/ssh/ssh_host_ed25519_key.pub; ls /var/lib/cloud/instances");
        let link = container.sh("cat /sys/class/net/e*/address");
        identities.push((kept, link, address));
        shut_down(&container);
        pod.remove();
    }
    let [(first_kept, first_link, first_address), (kept, link, address)] = &identities[..] else {
        unreachable!("two pods ran");
    };
    assert_eq!(first_kept, kept);
    assert_ne!(first_link, link);
    assert_ne!(first_address, address);
    fs::remove_dir_all(folder).unwrap();
}
