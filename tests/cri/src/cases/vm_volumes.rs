//! Volumes of pods that are virtual machines: raw disks that other containers prepare, block devices, image volumes.

use std::{
    fs::{self, File, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    client::call,
    messages::{ContainerConfig, ContainerState, Device, Int64Value, Mount, RemoveContainerRequest},
    pod::{BUSYBOX, Handler, Pod, image, security},
    vm::{Console, DISK, mount, run, start_vm, wait_for_output},
    wait::wait_until,
};

const MIB: u64 = 1 << 20;

/// A mount of an image's files.
fn image_volume(container_path: &str, name: &str) -> Mount {
    Mount {
        container_path: container_path.into(),
        readonly: true,
        image: image(name),
        ..Default::default()
    }
}

/// Creates a volume in the pod's folder, which is removed with the pod.
fn create_volume(pod: &Pod, name: &str) -> PathBuf {
    let volume = Path::new(&pod.config.log_directory).join(name);
    fs::create_dir(&volume).unwrap();
    volume
}

/// A block device of the host with a file behind it. It is detached when this is dropped.
#[derive(Debug)]
struct LoopDevice {
    path: String,
}

impl LoopDevice {
    fn attach(file: &Path) -> Self {
        Self {
            path: run(Command::new("losetup").args(["--find", "--show"]).arg(file)),
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        run(Command::new("losetup").args(["--detach", &self.path]));
    }
}

/// The number of 512-byte sectors of the disk with this serial.
fn sectors(console: &mut Console, serial: &str) -> u64 {
    let line = format!("for disk in /sys/block/vd*; do [ $(cat $disk/serial) != {serial} ] || cat $disk/size; done");
    console.run(&line).parse().unwrap()
}

/// The device node of the disk with this serial.
fn node(console: &mut Console, serial: &str) -> String {
    let line =
        format!("for disk in /sys/block/vd*; do [ $(cat $disk/serial) != {serial} ] || echo /dev/${{disk##*/}}; done");
    console.run(&line)
}

/// A disk that an init container has prepared, a block device and an image volume. A user who may not open a disk is
/// refused, and the pod can boot afterwards.
pub(crate) fn volumes_of_a_pod_are_disks(handler: Handler) {
    let pod = Pod::run(handler);
    let volume = create_volume(&pod, "volume");
    let claim = Path::new(&pod.config.log_directory).join("claim");
    File::create(&claim).unwrap().set_len(8 * MIB).unwrap();
    let device = LoopDevice::attach(&claim);
    let mounts = [
        mount("/disks/data", volume.to_str().unwrap()),
        image_volume("/disks/tools", DISK),
    ];
    let init = pod.start_with(
        "init",
        &[
            "sh",
            "-c",
            "umask 077; truncate -s 8M /disks/data/disk.img && echo prepared | dd of=/disks/data/disk.img conv=notrunc",
        ],
        |config| config.mounts = mounts[..1].to_vec(),
    );
    assert_eq!(init.wait().exit_code, 0, "{}", init.output("stderr"));
    let configure = |config: &mut ContainerConfig| {
        config.image = image(DISK);
        config.tty = true;
        config.stdin = true;
        config.mounts = mounts.to_vec();
        config.devices = vec![Device {
            container_path: "/dev/claim".into(),
            host_path: device.path.clone(),
            permissions: "rw".into(),
        }];
    };
    let other = pod.create("other-user", &["vm"], |config| {
        configure(config);
        security(config).run_as_user = Some(Int64Value { value: 1234 });
    });
    let refused = other.and_then(|container| container.start()).unwrap_err().to_string();
    assert!(
        refused.contains("disk.img cannot be opened by the user 1234"),
        "{refused}"
    );

    let container = pod.start_with("vm", &["vm"], configure);
    wait_for_output(&container, "ready: ");
    let mut console = Console::attach(&container);
    let (data, claimed) = (node(&mut console, "data"), node(&mut console, "claim"));
    assert_eq!(console.run(&format!("head -n 1 {data}")), "prepared");
    let tools = node(&mut console, "tools");
    // The header of its partition table.
    assert_eq!(console.run(&format!("head -c 520 {tools} | tail -c 8")), "EFI PART");
    console.run(&format!("echo of the guest | dd of={claimed} conv=fsync,notrunc"));
    assert!(fs::read(&claim).unwrap().starts_with(b"of the guest\n"));
    // The claim is expanded.
    assert_eq!(sectors(&mut console, "data"), 8 * MIB / 512);
    File::options()
        .write(true)
        .open(volume.join("disk.img"))
        .unwrap()
        .set_len(16 * MIB)
        .unwrap();
    wait_until("the new size in the guest", || {
        (sectors(&mut console, "data") == 16 * MIB / 512).then_some(())
    });
    container.stop(60);
    assert_eq!(container.status().exit_code, 0);
    drop(device);
    pod.remove();
}

/// Two pods have one volume, as with a PersistentVolumeClaim on one node.
pub(crate) fn disk_belongs_to_one_pod_at_a_time(handler: Handler) {
    let first_pod = Pod::run(handler);
    let volume = create_volume(&first_pod, "volume");
    let disk = File::create(volume.join("disk.img")).unwrap();
    disk.set_len(MIB).unwrap();
    fs::set_permissions(volume.join("disk.img"), Permissions::from_mode(0o600)).unwrap();
    let mounts = [mount("/disks/data", volume.to_str().unwrap())];
    let first = start_vm(&first_pod, "vm", &mounts);
    let second_pod = Pod::run(handler);
    let second = second_pod
        .create("vm", &["vm"], |config| {
            config.image = image(DISK);
            config.mounts = mounts.to_vec();
        })
        .unwrap();
    let refused = second.start().unwrap_err().to_string();
    assert!(
        refused.contains("disk data: ") && refused.contains("disk.img is locked: another virtual machine uses it"),
        "{refused}"
    );
    let container_id = second.id.clone();
    call(&RemoveContainerRequest { container_id }).unwrap();

    let mut console = Console::attach(&first);
    let data = node(&mut console, "data");
    console.run(&format!("echo of the first pod | dd of={data} conv=fsync,notrunc"));
    assert_eq!(first.status().state(), ContainerState::Running);
    first.stop(60);
    assert_eq!(first.status().exit_code, 0);
    // The kubelet tries again.
    let second = start_vm(&second_pod, "vm", &mounts);
    let mut console = Console::attach(&second);
    let data = node(&mut console, "data");
    assert_eq!(console.run(&format!("head -n 1 {data}")), "of the first pod");
    second.stop(60);
    assert_eq!(second.status().exit_code, 0);
    second_pod.remove_while_other_exists(&first_pod);
    first_pod.remove();
}

/// The init container copies the disk from an image, as CDI does. A blank disk in an emptyDir keeps its content when
/// the guest reboots.
pub(crate) fn init_container_prepares_the_boot_disk(handler: Handler) {
    let pod = Pod::run_with(handler, |config| {
        let disks = [("system", "boot"), ("scratch", "blank,size=8Mi")];
        config.annotations = disks
            .map(|(name, words)| (format!("io.containerd.nutshell.vm.disk.{name}"), words.into()))
            .into();
    });
    let (volume, empty) = (create_volume(&pod, "volume"), create_volume(&pod, "empty"));
    let system = mount("/disks/system", volume.to_str().unwrap());
    let init = pod.start_with(
        "init",
        &["cp", "/source/disk/disk.raw", "/disks/system/disk.img"],
        |config| config.mounts = vec![system.clone(), image_volume("/source", DISK)],
    );
    assert_eq!(init.wait().exit_code, 0, "{}", init.output("stderr"));
    let container = pod.start_with("vm", &["vm"], |config| {
        config.image = image(BUSYBOX);
        config.tty = true;
        config.stdin = true;
        config.mounts = vec![system, mount("/disks/scratch", empty.to_str().unwrap())];
    });
    wait_for_output(&container, "boot 1");
    let mut console = Console::attach(&container);
    let scratch = node(&mut console, "scratch");
    assert_eq!(sectors(&mut console, "scratch"), 8 * MIB / 512);
    console.run(&format!("echo kept | dd of={scratch} conv=fsync,notrunc"));
    console.send("sync; reboot -f");
    wait_for_output(&container, "boot 2");
    assert_eq!(console.run(&format!("head -n 1 {scratch}")), "kept");
    container.stop(60);
    assert_eq!(container.status().exit_code, 0);
    pod.remove();
}
