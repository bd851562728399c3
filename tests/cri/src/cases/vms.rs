//! Pods that are virtual machines: their containers boot the disk in their image.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::TcpStream,
    process::Command,
    time::{Duration, Instant},
};

use crate::{
    client::{CallError, call},
    messages::{LinuxContainerResources, PodState, RemoveContainerRequest, UpdateContainerResourcesRequest},
    pod::{Container, Handler, Pod, image, resources},
    streaming::{ForwardedPort, Streams},
    vm::{Console, DISK, mount, run, start_vm, wait_for_output},
    wait::{TIMEOUT, wait_until},
};

const MIB: i64 = 1 << 20;

/// Sends bytes to a server that returns them.
fn check_echo(port: &mut ForwardedPort, bytes: &[u8]) {
    port.send(bytes);
    assert_eq!(port.receive(bytes.len()), bytes);
}

/// Starts nutshell's agent in the guest, as docs/VM.md describes it.
fn start_agent(console: &mut Console) {
    let script = include_str!("../../../../src/shim/vm/start-agent.sh").replace('\n', " ");
    console.run(&format!("(setsid sh -c '{script}' >/agent.log 2>&1 </dev/null &)"));
}

/// An exec fails in less than a second, and its error names the agents. The best of some attempts counts: the lab may
/// be busy.
fn check_refused_exec(container: &Container) {
    let mut fastest = Duration::MAX;
    for _ in 0..3 {
        let start = Instant::now();
        let error = container.try_exec(&["true"], 10).unwrap_err().to_string();
        fastest = fastest.min(start.elapsed());
        let expected = "neither nutshell's agent nor the QEMU guest agent answers";
        assert!(error.contains(expected), "{error}");
        if fastest < Duration::from_secs(1) {
            return;
        }
    }
    panic!("{fastest:?}");
}

/// The guest has the pod's address by DHCP, is reachable there, shares a volume, and shuts down when the pod stops.
pub(crate) fn machine_has_the_pods_network_and_volumes(handler: Handler) {
    let pod = Pod::run(handler);
    let volume = format!("{}/volume", pod.config.log_directory);
    fs::create_dir(&volume).unwrap();
    fs::write(format!("{volume}/file"), "of the host").unwrap();
    let container = start_vm(&pod, "vm", &[mount("/srv/data", &volume)]);
    let [address, _] = pod.addresses();
    let mut console = Streams::attach(&container, true);
    console.send("udhcpc -i eth0 -n -q -s /udhcpc\n");
    console.wait_for(&format!(
        "lease: {address}/16 router 10.88.0.1 host {}",
        pod.config.hostname
    ));
    console.send("mount -t virtiofs nutshell /mnt && echo \"shared: $(cat /mnt/srv/data/file)\"\n");
    console.wait_for("shared: of the host");
    console.send("echo written >/mnt/srv/data/written; (nc -l -p 7 -e cat &); sleep 1; echo listening\n");
    console.wait_for("listening");
    assert_eq!(fs::read_to_string(format!("{volume}/written")).unwrap(), "written\n");

    let mut connection = TcpStream::connect((address.as_str(), 7)).unwrap();
    connection.set_read_timeout(Some(TIMEOUT)).unwrap();
    connection.write_all(b"hello").unwrap();
    let mut answer = [0; 5];
    connection.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello");
    drop(connection);
    // Without an agent, an exec fails at once, also if a program of the guest has the port of the QEMU guest agent
    // open.
    check_refused_exec(&container);
    console.send("(exec sleep 1000 <>$(ls /dev/vport*) &); sleep 1; echo open\n");
    console.wait_for("open");
    check_refused_exec(&container);
    // A forwarded port is one of the pod's address then.
    console.send("(nc -l -p 8 -e cat &); sleep 1; echo also\n");
    console.wait_for("also");
    check_echo(&mut ForwardedPort::open(&pod, 8), b"forwarded");

    let sidecar = pod.create("side", &["sleep", "1000"], |_| ()).unwrap();
    let refused = sidecar.start().unwrap_err().to_string();
    assert!(refused.contains("this pod is a virtual machine"), "{refused}");
    container.stop(60);
    assert_eq!(container.status().exit_code, 0);
    assert_eq!(pod.status().state(), PodState::Ready);
    pod.remove();
}

/// Execs, terminals, copies and ports that are forwarded to the guest's loopback interface.
pub(crate) fn machine_runs_execs_by_its_agent(handler: Handler) {
    let pod = Pod::run(handler);
    let container = start_vm(&pod, "vm", &[]);
    let mut console = Console::attach(&container);
    console.run("ip link set lo up; mkdir -p /dev/pts; mount -t devpts devpts /dev/pts");
    start_agent(&mut console);
    wait_until("an exec by the agent", || container.try_exec(&["true"], 10).ok());

    assert_eq!(container.sh("cat /proc/1/comm; id -u; pwd"), "init\n0\n/");
    assert_eq!(container.exec(&["sh", "-c", "exit 7"]).exit_code, 7);
    let error = container.try_exec(&["nosuch"], 10).unwrap_err().to_string();
    assert!(error.contains("executable file not found in $PATH"), "{error}");
    // A command that does not end within its limit is killed.
    let error = container.try_exec(&["sleep", "1000"], 1).unwrap_err().to_string();
    assert!(error.contains("timeout") || error.contains("deadline"), "{error}");
    assert_eq!(container.sh("pidof sleep || echo none"), "none");

    let mut shell = Streams::exec(&container, &["sh"], true);
    shell.resize(91, 17);
    // The size may arrive after the input.
    shell.send("until stty size | grep -q 91; do sleep 0.1; done; echo $(stty size | tr ' ' x); tty; exit 3\n");
    shell.read_to_end();
    assert!(
        shell.stdout.contains("17x91") && shell.stdout.contains("/dev/pts/"),
        "{}",
        shell.stdout
    );
    assert_eq!(shell.exit, Some(3));
    // More than the buffers hold, as with `kubectl cp`.
    let mut copy = Streams::exec(&container, &["sh", "-c", "head -c 3000000 | wc -c"], false);
    for _ in 0..30 {
        copy.send(&"x".repeat(100_000));
    }
    copy.read_to_end();
    assert_eq!((copy.stdout.trim(), copy.exit), ("3000000", Some(0)));

    // The guest has no address but that of the loopback interface.
    console.run("(nc -l -p 9 -e cat &); sleep 1");
    check_echo(&mut ForwardedPort::open(&pod, 9), b"to the loopback interface");

    // The agent ends, and its commands with it; another one connects.
    let mut lost = Streams::exec(&container, &["sh", "-c", "echo started; exec sleep 1000"], false);
    lost.wait_for("started");
    console.run("killall agent");
    lost.read_to_end();
    assert_eq!(lost.exit, Some(137));
    start_agent(&mut console);
    wait_until("an exec by the next agent", || container.try_exec(&["true"], 10).ok());
    container.stop(60);
    assert_eq!(container.status().exit_code, 0);
    pod.remove();
}

/// What `kubectl cp` does: tar in the guest writes to, or reads from, the streams of an exec.
pub(crate) fn files_are_copied_in_both_directions(handler: Handler) {
    const SIZE: usize = 12 << 20;
    let pod = Pod::run(handler);
    let folder = format!("{}/files", pod.config.log_directory);
    fs::create_dir(&folder).unwrap();
    let container = start_vm(&pod, "vm", &[]);
    let mut console = Console::attach(&container);
    start_agent(&mut console);
    wait_until("an exec by the agent", || container.try_exec(&["true"], 10).ok());

    let mut content = vec![0; SIZE];
    File::open("/dev/urandom").unwrap().read_exact(&mut content).unwrap();
    fs::write(format!("{folder}/file"), &content).unwrap();
    let archive = Command::new("tar")
        .args(["-cf", "-", "-C", &folder, "file"])
        .output()
        .unwrap()
        .stdout;
    assert!(archive.len() > SIZE);
    // The protocol of these streams cannot end an input alone, and BusyBox's tar reads to the end.
    let extract = format!("head -c {} | tar -xmf - -C /run", archive.len());
    let mut upload = Streams::exec(&container, &["sh", "-c", &extract], false);
    upload.send_bytes(&archive);
    upload.read_to_end();
    assert_eq!(upload.exit, Some(0), "{}", upload.stderr);
    let sum = run(Command::new("sha256sum").arg(format!("{folder}/file")));
    let (sum, _) = sum.split_once(' ').unwrap();
    assert_eq!(container.sh("sha256sum </run/file | cut -d ' ' -f 1"), sum);

    let mut download = Streams::exec(&container, &["tar", "-cf", "-", "-C", "/run", "file"], false);
    download.read_to_end();
    assert_eq!(download.exit, Some(0), "{}", download.stderr);
    fs::write(format!("{folder}/archive"), &download.bytes).unwrap();
    fs::remove_file(format!("{folder}/file")).unwrap();
    run(Command::new("tar").args(["-xf", &format!("{folder}/archive"), "-C", &folder]));
    assert!(fs::read(format!("{folder}/file")).unwrap() == content);

    let mut missing = Streams::exec(&container, &["tar", "-cf", "-", "/nosuch"], false);
    missing.read_to_end();
    assert_eq!(missing.exit, Some(1));
    assert!(missing.stderr.contains("/nosuch"), "{}", missing.stderr);
    container.stop(60);
    assert_eq!(container.status().exit_code, 0);
    pod.remove();
}

/// Runs a pod whose virtual machine can have this much memory.
fn run_pod_with_max_memory(handler: Handler, maximum: &str) -> Pod {
    Pod::run_with(handler, |config| {
        let maximum = ("io.containerd.nutshell.vm.max-memory".into(), maximum.into());
        config.annotations.extend([maximum]);
    })
}

fn start_vm_with_memory(pod: &Pod, mib: i64) -> Container {
    let container = pod.start_with("vm", &["vm"], |config| {
        config.image = image(DISK);
        config.tty = true;
        config.stdin = true;
        resources(config).memory_limit_in_bytes = mib * MIB;
    });
    wait_for_output(&container, "ready: ");
    container
}

fn update_memory(container: &Container, mib: i64) -> Result<(), CallError> {
    call(&UpdateContainerResourcesRequest {
        container_id: container.id.clone(),
        linux: Some(LinuxContainerResources {
            memory_limit_in_bytes: mib * MIB,
            ..Default::default()
        }),
    })
    .map(drop)
}

/// The total memory of the guest's kernel, in MiB.
fn total_memory(console: &mut Console) -> u64 {
    let text = console.run("sed -n 's/MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo");
    text.parse::<u64>().unwrap() / 1024
}

/// In-place resize: the memory limit of the pod is raised and lowered while the guest runs.
pub(crate) fn machine_follows_its_memory_limit(handler: Handler) {
    let pod = run_pod_with_max_memory(handler, "512Mi");
    let container = start_vm_with_memory(&pod, 256);
    let update = |mib| update_memory(&container, mib);
    let mut console = Console::attach(&container);
    let mut memory = || total_memory(&mut console);
    let before = memory();
    assert!((150..256).contains(&before), "{before}");
    update(512).unwrap();
    let grown = memory();
    assert!((before + 240..=before + 256).contains(&grown), "{before} {grown}");
    let refused = update(1024).unwrap_err().to_string();
    assert!(refused.contains("exceeds 512 MiB, the maximum"), "{refused}");
    update(256).unwrap();
    assert_eq!(memory(), before);
    container.stop(60);
    assert_eq!(container.status().exit_code, 0);
    pod.remove();
}

/// The guest's kernel does not use the memory that its driver has added, or has no driver: the update fails with
/// the reason, in bounded time, and the machine keeps its size.
pub(crate) fn memory_that_the_guest_leaves_offline_fails_the_update(handler: Handler) {
    let pod = run_pod_with_max_memory(handler, "512Mi");
    let container = start_vm_with_memory(&pod, 256);
    let mut console = Console::attach(&container);
    let check_refused = |reason: &str| {
        let start = Instant::now();
        let refused = update_memory(&container, 512).expect_err(reason).to_string();
        assert!(refused.contains(reason), "{refused}");
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        let resources = container.status().resources.unwrap().linux.unwrap();
        assert_eq!(resources.memory_limit_in_bytes, 256 * MIB);
    };
    let before = total_memory(&mut console);
    console.run("echo offline >/sys/devices/system/memory/auto_online_blocks");
    check_refused("offline");
    assert_eq!(total_memory(&mut console), before);
    console.run("echo online_movable >/sys/devices/system/memory/auto_online_blocks");
    update_memory(&container, 512).unwrap();
    assert!(total_memory(&mut console) >= before + 240);
    update_memory(&container, 256).unwrap();
    assert_eq!(total_memory(&mut console), before);

    console.run("for device in /sys/bus/virtio/drivers/virtio_mem/virtio*; do echo ${device##*/} >/sys/bus/virtio/drivers/virtio_mem/unbind; done");
    check_refused("driver virtio_mem");
    assert_eq!(total_memory(&mut console), before);
    container.stop(60);
    assert_eq!(container.status().exit_code, 0);
    pod.remove();
}

/// A container of the pod that has ended is replaced, as with the restart policy Always.
pub(crate) fn machine_restarts_in_its_pod(handler: Handler) {
    let pod = Pod::run(handler);
    let init = pod.start("init", &["true"]);
    assert_eq!(init.wait().exit_code, 0);
    let first = start_vm(&pod, "first", &[]);
    let mut console = Streams::attach(&first, true);
    console.send("poweroff -f\n");
    assert_eq!(first.wait().exit_code, 0);
    let container_id = first.id.clone();
    call(&RemoveContainerRequest { container_id }).unwrap();
    let second = start_vm(&pod, "second", &[]);
    // The disk of the image is new again.
    assert!(second.output("stdout").contains("boot 1"));
    pod.stop();
    assert_eq!(second.wait().exit_code, 137);
    pod.remove();
}

pub(crate) fn machine_beside_a_sidecar_is_refused(handler: Handler) {
    let pod = Pod::run(handler);
    let _sidecar = pod.start("side", &["sleep", "1000"]);
    let machine = pod.create("vm", &["vm"], |config| config.image = image(DISK)).unwrap();
    let refused = machine.start().unwrap_err().to_string();
    assert!(refused.contains("needs a pod for itself"), "{refused}");
    pod.remove();
}
