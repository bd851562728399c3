//! Pods that are virtual machines: their containers boot the disk in their image.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
};

use crate::{
    client::call,
    messages::{
        ContainerState, LinuxContainerResources, Mount, PodState, RemoveContainerRequest,
        UpdateContainerResourcesRequest,
    },
    pod::{Container, Handler, Pod, image, resources},
    streaming::{ForwardedPort, Streams},
    wait::{TIMEOUT, wait_until},
};

/// A disk that executes the lines of its console (tests/images/disk).
const DISK: &str = "localhost/vm-raw:latest";

/// Starts the virtual machine of a pod, and waits for the guest.
fn start_vm(pod: &Pod, name: &str, mounts: &[Mount]) -> Container {
    let container = pod.start_with(name, &["vm"], |config| {
        config.image = image(DISK);
        config.tty = true;
        config.stdin = true;
        config.mounts = mounts.to_vec();
    });
    wait_for_output(&container, "ready: ");
    container
}

fn wait_for_output(container: &Container, text: &str) {
    wait_until(&format!("{text:?} on the console"), || {
        assert_eq!(container.status().state(), ContainerState::Running);
        container.output("stdout").contains(text).then_some(())
    });
}

fn mount(container_path: &str, host_path: &str) -> Mount {
    Mount {
        container_path: container_path.into(),
        host_path: host_path.into(),
        readonly: false,
    }
}

/// Sends bytes to a server that returns them.
fn check_echo(port: &mut ForwardedPort, bytes: &[u8]) {
    port.send(bytes);
    assert_eq!(port.receive(bytes.len()), bytes);
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
    // Without an agent, a forwarded port is one of the pod's address.
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
    let script = include_str!("../../../../src/shim/vm/start-agent.sh").replace('\n', " ");
    let pod = Pod::run(handler);
    let container = start_vm(&pod, "vm", &[]);
    let mut console = Streams::attach(&container, true);
    console.send(&format!(
        "(setsid sh -c '{script}' >/agent.log 2>&1 </dev/null &); ip link set lo up; mkdir -p /dev/pts; mount -t devpts devpts /dev/pts\n"
    ));
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
    console.send("(nc -l -p 9 -e cat &); sleep 1; echo listening\n");
    console.wait_for("listening");
    check_echo(&mut ForwardedPort::open(&pod, 9), b"to the loopback interface");

    // The agent ends, and its commands with it; another one connects.
    let mut lost = Streams::exec(&container, &["sh", "-c", "echo started; exec sleep 1000"], false);
    lost.wait_for("started");
    console.send("killall agent\n");
    lost.read_to_end();
    assert_eq!(lost.exit, Some(137));
    console.send(&format!("(setsid sh -c '{script}' >/agent.log 2>&1 </dev/null &)\n"));
    wait_until("an exec by the next agent", || container.try_exec(&["true"], 10).ok());
    container.stop(60);
    assert_eq!(container.status().exit_code, 0);
    pod.remove();
}

/// In-place resize: the memory limit of the pod is raised and lowered while the guest runs.
pub(crate) fn machine_follows_its_memory_limit(handler: Handler) {
    const MIB: i64 = 1 << 20;
    let pod = Pod::run_with(handler, |config| {
        let maximum = ("io.containerd.nutshell.vm.max-memory".into(), "512Mi".into());
        config.annotations.extend([maximum]);
    });
    let container = pod.start_with("vm", &["vm"], |config| {
        config.image = image(DISK);
        config.tty = true;
        config.stdin = true;
        resources(config).memory_limit_in_bytes = 256 * MIB;
    });
    wait_for_output(&container, "ready: ");
    let update = |mib: i64| {
        call(&UpdateContainerResourcesRequest {
            container_id: container.id.clone(),
            linux: Some(LinuxContainerResources {
                memory_limit_in_bytes: mib * MIB,
                ..Default::default()
            }),
        })
    };
    let mut console = Streams::attach(&container, true);
    let mut memory = |number: u32| {
        console.send(&format!(
            "echo \"memory {number}: $(($(sed -n 's/MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo) / 1024)) MiB\"\n"
        ));
        console.wait_for(" MiB");
        let text = std::mem::take(&mut console.stdout);
        let (_, rest) = text.split_once(&format!("memory {number}: ")).unwrap();
        rest.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    let before = memory(1);
    assert!((150..256).contains(&before), "{before}");
    update(512).unwrap();
    let grown = memory(2);
    assert!((before + 240..=before + 256).contains(&grown), "{before} {grown}");
    let refused = update(1024).unwrap_err().to_string();
    assert!(refused.contains("exceeds 512 MiB, the maximum"), "{refused}");
    update(256).unwrap();
    assert_eq!(memory(3), before);
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
