//! Tests of the guest: boots machines with the agent as PID 1 and drives it over vsock, as the shim does. QEMU replaces
//! nutshell's VMM and has the same devices.
//!
//! Needs /dev/kvm, /dev/vhost-vsock, and the guest's kernels and initramfs. `run-in-lab` runs it, one test at a time,
//! because all machines connect to the same port.

#![allow(clippy::tests_outside_test_module, reason = "this crate contains only tests")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod disk_kernel;
#[allow(dead_code, reason = "shared with the tests of containers, which use the rest")]
#[path = "../containers/harness.rs"]
mod harness;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use nutshell_protocol::{Request, Response, Rootfs, SHARE_PATH, SHARE_TAG, Stdio, disk_serial};
use serde_json::{Value, json};

use harness::{Agent, create_request_on, fill_root, process, shell, unique};

/// A running machine.
struct Machine {
    agent: Agent,
}

impl Machine {
    /// Boots a machine with `disks`, in the order of their slots.
    fn boot(disks: &[&Path]) -> Self {
        Self::boot_with(disks, &[])
    }

    /// Boots a machine with `disks` and additional options for QEMU.
    fn boot_with(disks: &[&Path], options: &[String]) -> Self {
        Self::boot_kernel("NUTSHELL_GUEST_KERNEL", disks, options, |_| "off")
    }

    /// Boots a machine with the kernel that reads disks of virtual machines. `readonly` returns "on" for the slots of
    /// disks that cannot be written, and "off" for others.
    fn boot_disk_reader(disks: &[&Path], readonly: fn(u32) -> &'static str) -> Self {
        Self::boot_kernel("NUTSHELL_GUEST_DISK_READER_KERNEL", disks, &[], readonly)
    }

    /// Boots a machine with the kernel that the environment variable `kernel` names.
    fn boot_kernel(kernel: &str, disks: &[&Path], options: &[String], readonly: fn(u32) -> &'static str) -> Self {
        let setting = |name| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
        let mut command = Command::new("qemu-system-x86_64");
        let machine = "-accel kvm -cpu host -m 256 -nodefaults -no-user-config -no-reboot -display none \
            -M microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off -device vhost-vsock-device,guest-cid=3 \
            -global virtio-mmio.force-legacy=false \
            -device virtio-serial-device -chardev stdio,id=console -device virtconsole,chardev=console";
        command
            .args(machine.split_whitespace())
            .args(["-append", "console=hvc0 reboot=t panic=-1 quiet"])
            .args(["-kernel", &setting(kernel)])
            .args(["-initrd", &setting("NUTSHELL_GUEST_INITRAMFS")])
            .args(options);
        for (slot, disk) in (0..).zip(disks) {
            let serial = disk_serial(slot);
            command
                .args([
                    "-drive",
                    &format!(
                        "if=none,id=disk{slot},format=raw,readonly={},file={}",
                        readonly(slot),
                        disk.display()
                    ),
                ])
                .args([
                    "-device",
                    &format!("virtio-blk-device,drive=disk{slot},serial={serial}"),
                ]);
        }
        Self {
            agent: Agent::boot(command),
        }
    }

    /// Creates a container whose root file system is the disk in `slot`.
    fn create(&mut self, slot: u32, id: &str, spec: &Value, stdio: Stdio) {
        let request = create_request_on(disk(slot, &[]), id, spec, stdio);
        let response = self.agent.ask(request).unwrap();
        assert!(matches!(response, Response::Created { pid } if pid > 1), "{response:?}");
    }

    /// Runs a container on the disk in slot 0 until it ends. Returns its exit status and output.
    fn run(&mut self, spec: &Value) -> (u8, String) {
        let id = &format!("run-{}", unique());
        let output = self.agent.listen();
        let stdio = Stdio {
            stdout: Some(output.port),
            ..Stdio::default()
        };
        self.create(0, id, spec, stdio);
        let mut output = output.accept();
        self.agent.start_container(id);
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        let exited = self.agent.exit();
        assert_eq!(exited.stdout_bytes, text.len() as u64);
        self.delete(id);
        (exited.status, text)
    }

    fn delete(&mut self, id: &str) {
        let container = id.to_owned();
        assert_eq!(
            self.agent.ask(Request::DeleteContainer { container }),
            Ok(Response::Done)
        );
    }
}

fn disk(slot: u32, options: &[&str]) -> Rootfs {
    Rootfs::Disk {
        slot,
        filesystem: "ext4".to_owned(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    }
}

/// Creates a disk image with a busybox root file system.
fn create_image() -> PathBuf {
    let root = std::env::temp_dir().join(format!("root-{}", unique()));
    fill_root(&root);
    let image = root.with_extension("ext4");
    File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let formatted = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .arg(&root)
        .arg(&image)
        .status();
    assert!(formatted.unwrap().success());
    image
}

#[test]
fn container_runs_on_a_disk() {
    let mut machine = Machine::boot(&[&create_image()]);
    let (status, text) = machine.run(&shell("echo hello; df / | tail -n 1; exit 3"));
    assert_eq!(status, 3);
    assert!(
        text.starts_with("hello\n/dev/root") || text.contains("/dev/vda"),
        "{text}"
    );
    // The disk can be mounted again.
    assert_eq!(machine.run(&shell("exit 4")).0, 4);
}

#[test]
fn agent_sets_up_the_machine() {
    let mut machine = Machine::boot(&[&create_image()]);
    let script = "cat /machine/1/oom_score_adj; cat /sys/fs/cgroup/cgroup.controllers; ip link show lo | head -n 1; \
        ulimit -n";
    let mut spec = shell(script);
    // The container shares the machine's network and cgroup namespaces and sees its processes, so that it can look at
    // the agent and its cgroups.
    spec["linux"]["namespaces"] = json!(["pid", "ipc", "uts", "mount"].map(|kind| json!({"type": kind})));
    spec["process"]["rlimits"] = json!([]);
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]}));
    mounts.push(json!({"destination": "/machine", "type": "bind", "source": "/proc", "options": ["rbind", "ro"]}));
    let (_, text) = machine.run(&spec);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "-1000");
    for controller in ["cpu", "cpuset", "io", "memory", "pids"] {
        assert!(
            lines[1].split(' ').any(|found| found == controller),
            "{controller} is not in {:?}",
            lines[1]
        );
    }
    assert!(lines[2].contains("LOOPBACK,UP"), "{}", lines[2]);
    assert_eq!(lines[3], "1048576");
}

#[test]
fn container_cannot_reach_the_initramfs() {
    let mut machine = Machine::boot(&[&create_image()]);
    // Even with the capabilities of a privileged container it finds only its own root: in a chroot, upwards by `..`,
    // and after it has unmounted its root.
    let script = "ls -d /init /new 2>&1; mkdir /jail; cp -a /bin /jail; \
        chroot /jail /bin/sh -c 'cd ..; cd ..; cd ..; ls -d init new 2>&1'; \
        umount -l /; ls -d /../init /../new 2>&1";
    let mut spec = shell(script);
    for set in ["bounding", "effective", "permitted"] {
        let all = spec["process"]["capabilities"][set].as_array_mut().unwrap();
        all.extend([json!("CAP_SYS_CHROOT"), json!("CAP_SYS_ADMIN")]);
    }
    let (_, text) = machine.run(&spec);
    assert_eq!(
        text.lines().filter(|line| line.contains("No such file")).count(),
        6,
        "{text}"
    );
}

#[test]
fn container_cannot_reach_its_siblings() {
    let mut machine = Machine::boot(&[&create_image(), &create_image()]);
    machine.create(1, "sibling", &shell("sleep 1000"), Stdio::default());
    machine.agent.start_container("sibling");
    // As root with CAP_KILL and CAP_MKNOD. The disk of the sibling is /dev/vdb.
    let script = "cat /proc/[0-9]*/comm | grep -c sleep; kill -9 -1; kill -9 1; \
        IFS=: read major minor </sys/block/vdb/dev; mknod /tmp/disk b $major $minor && ls /tmp; \
        (: </tmp/disk) 2>&1 | grep -o 'Operation not permitted'; echo end";
    let (status, text) = machine.run(&shell(script));
    assert_eq!((status, text.as_str()), (0, "0\ndisk\nOperation not permitted\nend\n"));
    // The sibling still runs.
    assert_eq!(machine.agent.kill("sibling", 15), Ok(Response::Done));
    machine.agent.kill("sibling", 9).unwrap();
    assert_eq!(machine.agent.exit().status, 137);
    machine.delete("sibling");
}

#[test]
fn container_cannot_access_the_agents_process() {
    let mut machine = Machine::boot(&[&create_image()]);
    // The container sees the agent in the machine's /proc, and has the capabilities to trace any process.
    let script = "cd /machine/1; cat comm; \
        for file in mem environ maps auxv; do (: <$file) 2>/dev/null && echo $file; done; \
        for link in exe root cwd ns/mnt ns/pid fd/*; do readlink $link; done; ls map_files 2>/dev/null; \
        (: >>exe) 2>/dev/null && echo exe; ls root/run 2>/dev/null; cat /proc/self/comm";
    let mut spec = shell(script);
    for set in ["bounding", "effective", "permitted"] {
        let all = spec["process"]["capabilities"][set].as_array_mut().unwrap();
        all.extend(["CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_DAC_READ_SEARCH"].map(|name| json!(name)));
    }
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/machine", "type": "bind", "source": "/proc", "options": ["rbind", "rw"]}));
    let (_, text) = machine.run(&spec);
    assert_eq!(text, "init\ncat\n");
}

#[test]
fn error_names_the_missing_disk() {
    let mut machine = Machine::boot(&[&create_image()]);
    let request = create_request_on(disk(1, &[]), "lost", &shell("exit 6"), Stdio::default());
    let failure = machine.agent.ask(request).unwrap_err();
    assert!(failure.message.contains("disk slot 1"), "{}", failure.message);
    // The agent still works.
    let (status, _) = machine.run(&shell("exit 6"));
    assert_eq!(status, 6);
}

#[test]
fn rootfs_and_volumes_come_from_the_share() {
    let shared = std::env::temp_dir().join(format!("shared-{}", unique()));
    fill_root(&shared.join("roots/one"));
    fs::create_dir_all(shared.join("volume")).unwrap();
    let socket = shared.with_extension("socket");
    let mut daemon = Command::new("/usr/lib/qemu/virtiofsd")
        .arg(format!("--socket-path={}", socket.display()))
        .args(["-o", &format!("source={}", shared.display())])
        .spawn()
        .unwrap();
    while !socket.exists() {
        assert!(daemon.try_wait().unwrap().is_none(), "virtiofsd ended");
    }
    let options = format!(
        "-object memory-backend-memfd,id=memory,size=256M,share=on -machine memory-backend=memory \
         -chardev socket,id=share,path={} -device vhost-user-fs-device,chardev=share,tag={SHARE_TAG}",
        socket.display()
    );
    let options: Vec<String> = options.split_whitespace().map(str::to_owned).collect();
    let mut machine = Machine::boot_with(&[], &options);
    let output = machine.agent.listen();
    let stdio = Stdio {
        stdout: Some(output.port),
        ..Stdio::default()
    };
    let mut spec = shell("echo inside >/volume/file; cat /etc/passwd | wc -l; touch /new");
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/volume", "type": "bind", "source": format!("{SHARE_PATH}/volume"), "options": ["rbind"]
    }));
    let rootfs = |path: &str| Rootfs::Share { path: path.to_owned() };
    let failure = machine
        .agent
        .ask(create_request_on(rootfs("roots/two"), "c", &spec, Stdio::default()));
    assert!(failure.unwrap_err().message.contains("roots/two"));
    machine
        .agent
        .ask(create_request_on(rootfs("roots/one"), "c", &spec, stdio))
        .unwrap();
    let mut output = output.accept();
    machine.agent.start_container("c");
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert_eq!((machine.agent.exit().status, text.as_str()), (0, "2\n"));
    machine.delete("c");
    assert_eq!(fs::read_to_string(shared.join("volume/file")).unwrap(), "inside\n");
    assert!(shared.join("roots/one/new").exists());
    drop(machine);
    daemon.wait().unwrap();
}

#[test]
fn exec_and_terminal_work_over_vsock() {
    let mut machine = Machine::boot(&[&create_image()]);
    machine.create(0, "c", &shell("sleep 1000"), Stdio::default());
    machine.agent.start_container("c");
    let (input, output) = (machine.agent.listen(), machine.agent.listen());
    let stdio = Stdio {
        stdin: Some(input.port),
        stdout: Some(output.port),
        terminal: true,
        size: Some((80, 24)),
        ..Stdio::default()
    };
    machine.agent.exec("c", "shell", &process(&["/bin/sh"]), stdio).unwrap();
    let (mut input, mut output) = (input.accept(), output.accept());
    input.write_all(b"stty size\nexit 9\n").unwrap();
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert!(text.contains("24 80\r\n"), "{text:?}");
    let exited = machine.agent.exit();
    assert_eq!((exited.status, exited.stdout_bytes), (9, text.len() as u64));
    machine.agent.kill("c", 9).unwrap();
    assert_eq!(machine.agent.exit().status, 137);
    machine.delete("c");
}

#[test]
fn exec_runs_in_created_container() {
    let mut machine = Machine::boot(&[&create_image()]);
    machine.create(0, "c", &shell("exit 7"), Stdio::default());
    // Until the start, the first process executes the agent's program, and containers cannot access it.
    let output = machine.agent.listen();
    let stdio = Stdio {
        stdout: Some(output.port),
        ..Stdio::default()
    };
    let script = process(&["/bin/sh", "-c", "cat /proc/self/cgroup; exit 9"]);
    machine.agent.exec("c", "early", &script, stdio).unwrap();
    let mut text = String::new();
    output.accept().read_to_string(&mut text).unwrap();
    assert_eq!(machine.agent.exit().status, 9);
    assert_eq!(text, "0::/\n");
    machine.agent.start_container("c");
    assert_eq!(machine.agent.exit().status, 7);
    machine.delete("c");
}

#[test]
fn input_and_output_arrive_whole_over_vsock() {
    let mut machine = Machine::boot(&[&create_image()]);
    let (input, output) = (machine.agent.listen(), machine.agent.listen());
    let stdio = Stdio {
        stdin: Some(input.port),
        stdout: Some(output.port),
        ..Stdio::default()
    };
    machine.create(0, "cat", &shell("cat"), stdio);
    let (mut input, mut output) = (input.accept(), output.accept());
    machine.agent.start_container("cat");
    const SIZE: usize = 8 << 20;
    let writer = std::thread::spawn(move || {
        let bytes: Vec<u8> = (0..=250_u8).flat_map(|byte| [byte; 7]).cycle().take(SIZE).collect();
        input.write_all(&bytes).unwrap();
        rustix::net::shutdown(&input, rustix::net::Shutdown::Write).unwrap();
        bytes
    });
    let mut received = Vec::new();
    output.read_to_end(&mut received).unwrap();
    assert!(
        received == writer.join().unwrap(),
        "{} of {SIZE} bytes arrived, or they differ",
        received.len()
    );
    let exited = machine.agent.exit();
    assert_eq!((exited.status, exited.stdout_bytes), (0, SIZE as u64));
    machine.delete("cat");
}

#[test]
fn shutdown_leaves_a_clean_file_system() {
    let image = create_image();
    let mut machine = Machine::boot(&[&image]);
    machine.create(0, "writer", &shell("echo kept >/file; sleep 1000"), Stdio::default());
    machine.agent.start_container("writer");
    // When a second process sees the file, it has been written.
    machine
        .agent
        .exec(
            "writer",
            "look",
            &process(&["/bin/sh", "-c", "until [ -s /file ]; do :; done"]),
            Stdio::default(),
        )
        .unwrap();
    assert_eq!(machine.agent.exit().status, 0);
    assert_eq!(machine.agent.ask(Request::Shutdown), Ok(Response::Done));
    drop(machine);
    let listing = Command::new("debugfs")
        .args(["-R", "cat /file"])
        .arg(&image)
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&listing.stdout), "kept\n");
    let header = Command::new("dumpe2fs").arg("-h").arg(&image).output().unwrap();
    let header = String::from_utf8_lossy(&header.stdout);
    assert!(!header.contains("needs_recovery"), "{header}");
}

#[test]
fn machine_ends_when_the_host_closes_the_agent_stream() {
    let mut machine = Machine::boot(&[&create_image()]);
    machine.create(0, "c", &shell("sleep 1000"), Stdio::default());
    machine.agent.start_container("c");
    // Closes the stream, and waits until the machine has reset itself and QEMU has ended.
    drop(machine);
}
