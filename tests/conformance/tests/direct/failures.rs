//! Kills of the shim, the vmm, and the fs process. Volumes whose file system never answers, as with a dead NFS or FUSE
//! server: Create fails in time, and everything else in the shim continues.

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api::{CreateTaskRequest, Status},
    ttrpc::Code,
    types::mount::Mount,
};
use nutshell_conformance::{
    FakeContainerd, TIMEOUT,
    bundle::idle,
    container::{Container, SIGKILL},
    host,
    pod::{Pod, SandboxClient, start_sandbox_shim},
    with_fake_containerd,
};
use nutshell_fixtures::HungVolume;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open};
use serde_json::{Value, json};

use super::pods::{self, with_both_apis};

/// The time limit for State, which needs no file system.
const STATE_LIMIT: Duration = Duration::from_secs(1);

/// The time limit from SIGKILL to the exit event, in the emulated machine.
const KILL_LIMIT: Duration = Duration::from_secs(4);

/// The time limit for a call that needs a file system.
const DEADLINE: Duration = Duration::from_secs(12);

#[test]
fn killed_vmm_or_fs_ends_all_processes_and_the_shim_keeps_serving() {
    with_fake_containerd(|containerd| {
        for name in ["nutshell-vmm", "nutshell-fs"] {
            let container = containerd.run(&idle());
            let exec = container.exec(&["sleep", "1000"]);
            exec.start();
            let [pid] = containerd.pids_of(name)[..] else {
                panic!("not exactly one {name}: {:?}", containerd.processes());
            };
            host::signal(pid, Signal::KILL);

            assert_eq!(container.wait(), 137, "{name}");
            assert_eq!(exec.wait(), 137, "{name}");
            containerd.events.wait_for(&container.id, "exit 137");

            let task = container.task().with_timeout(Duration::from_secs(5));
            assert_eq!(container.status(""), Status::STOPPED);
            assert_eq!(task.connect_to(&container.id).unwrap().task_pid, container.pid);
            assert_eq!(task.pids(&container.id).unwrap().processes.len(), 1);
            let stats = task.stats(&container.id).unwrap_err();
            assert_eq!(stats.code, Some(Code::UNAVAILABLE), "{stats}");
            let again = task.kill(&container.id, "", 9).unwrap_err();
            assert_eq!(again.code, Some(Code::NOT_FOUND), "{again}");
            let id = container.id.clone();
            let started = format!("started {}", exec.id);
            let exit = format!("exit {} 137", exec.id);
            container.end();
            assert_eq!(
                containerd.events.of_container(&id)[3..],
                [started, exit, "exit 137".to_owned(), "delete 137".to_owned()],
                "{name}"
            );
        }
    });
}

#[test]
fn killed_vmm_ends_a_created_container() {
    with_fake_containerd(|containerd| {
        let container = containerd.create(&idle());
        for vmm in containerd.pids_of("nutshell-vmm") {
            host::signal(vmm, Signal::KILL);
        }
        assert_eq!(container.wait(), 137);
        let start = container.task().start(&container.id, "").unwrap_err();
        assert_eq!(start.code, Some(Code::FAILED_PRECONDITION), "{start}");
        container.end();
    });
}

#[test]
fn killed_shim_ends_its_processes_and_a_new_shim_can_be_started() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        host::signal(container.shim.pid, Signal::KILL);
        assert!(host::ends_within(container.shim.pid, TIMEOUT));
        host::eventually(TIMEOUT, || match containerd.processes() {
            left if left.is_empty() => Ok(()),
            left => Err(format!("{left:?}")),
        })
        .unwrap();
        assert_eq!(containerd.delete_bundle(&container.bundle).exit_status, 137);
        container.bundle.remove();

        let bundle = containerd.bundle_with_id(&container.id, &idle());
        let shim = containerd.start_shim(&bundle);
        shim.task.shutdown(&bundle.id, false).unwrap();
        assert!(host::ends_within(shim.pid, TIMEOUT));
        containerd.delete_bundle(&bundle);
        bundle.remove();
    });
}

/// Starts processes in the control group `group` that hold the pipes and sockets of the process `pid`, as its forks
/// would.
fn fork_with_descriptors(pid: u32, group: &str) -> Vec<Child> {
    let process = pidfd_open(Pid::from_raw(pid.cast_signed()).unwrap(), PidfdFlags::empty()).unwrap();
    let mut held: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(Result::unwrap)
        .filter(|entry| {
            let target = fs::read_link(entry.path()).unwrap();
            let target = target.to_str().unwrap();
            target.starts_with("pipe:") || target.starts_with("socket:")
        })
        .map(|entry| entry.file_name().to_str().unwrap().parse().unwrap())
        .map(|fd| pidfd_getfd(&process, fd, PidfdGetfdFlags::empty()).unwrap())
        .collect();
    // Standard error, the control channel and the stream to the agent.
    assert!(held.len() >= 3, "the vmm has only {} pipes and sockets", held.len());
    let mut forks = Vec::new();
    while !held.is_empty() {
        let mut take = || held.pop().map_or(Stdio::null(), Stdio::from);
        let script = r#"echo 0 >"/sys/fs/cgroup$0/cgroup.procs" && exec sleep 1000"#;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script, group]);
        let fork = command.stdin(take()).stdout(take()).stderr(take()).spawn().unwrap();
        host::eventually(TIMEOUT, || {
            let name = fs::read_to_string(format!("/proc/{}/comm", fork.id())).unwrap();
            (name == "sleep\n").then_some(()).ok_or(name)
        })
        .unwrap();
        forks.push(fork);
    }
    forks
}

/// A guest that controls its vmm can make it fork.
#[test]
fn forks_of_a_vmm_that_keep_its_descriptors_end_with_the_pod_in_time() {
    with_fake_containerd(|containerd| {
        for vmm_dies in [true, false] {
            let container = containerd.run(&idle());
            let [vmm] = containerd.pids_of("nutshell-vmm")[..] else {
                panic!("not exactly one vmm: {:?}", containerd.processes());
            };
            let forks = fork_with_descriptors(vmm, &containerd.cgroups_path(&container.id));

            let killed = Instant::now();
            if vmm_dies {
                host::signal(vmm, Signal::KILL);
            } else {
                container.kill(SIGKILL);
            }
            assert_eq!(container.wait(), 137);
            container.delete();
            let took = killed.elapsed();

            for mut fork in forks {
                let status = fork.try_wait().unwrap().expect("the forks end before Delete returns");
                assert_eq!(status.signal(), Some(9));
            }
            assert!(took < KILL_LIMIT, "{took:?}");
            container.task().shutdown(&container.id, false).unwrap();
            assert_eq!(containerd.delete_bundle(&container.bundle).exit_status, 137);
            container.bundle.remove();
        }
    });
}

/// Without its group, nothing would limit the machine.
#[test]
fn pod_whose_control_group_cannot_be_created_or_entered_does_not_start() {
    with_fake_containerd(|containerd| {
        for (setting, value) in [
            // No group can be created below the parent.
            ("cgroup.max.descendants", "0"),
            // A group below a threaded one accepts no process before it is threaded too.
            ("cgroup.type", "threaded"),
        ] {
            // One level deeper, because a threaded group affects the others in its parent.
            let top = containerd.cgroups_path(&containerd.new_name("top"));
            let parent = format!("{top}/parent");
            let folder = PathBuf::from(format!("/sys/fs/cgroup{parent}"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join(setting), value).unwrap();
            let assert_refused = |message: &str| {
                let expected = format!("control group {}/", folder.display());
                assert!(message.contains(&expected), "{setting}: {message}");
                assert_eq!(containerd.pids_of("nutshell-"), [0_u32; 0], "{setting}");
            };

            let mut spec = idle();
            let prepared = containerd.prepare(&spec);
            spec["linux"]["cgroupsPath"] = format!("{parent}/{}", prepared.bundle.id).into();
            fs::write(prepared.bundle.path.join("config.json"), spec.to_string()).unwrap();
            assert_refused(&prepared.shim.task.create(&prepared.request).unwrap_err().message);
            prepared.abandon();

            let (bundle, shim) = start_sandbox_shim(containerd);
            let mut config = pods::config(containerd);
            config.cgroup_parent = parent;
            let sandboxes = SandboxClient::new(&shim);
            assert_refused(&sandboxes.create(&bundle, &config).unwrap_err().message);
            sandboxes.shut_down(&bundle.id).unwrap();
            assert!(host::ends_within(shim.pid, TIMEOUT));
            containerd.delete_bundle(&bundle);
            bundle.remove();
            fs::remove_dir(&folder).unwrap();
            fs::remove_dir(folder.parent().unwrap()).unwrap();
        }
        assert_eq!(containerd.events.all(), []);
    });
}

/// Runs ip(8) or tc(8) with `arguments` in the network namespace of a container, and returns its output.
fn run_in_network(container: &Container<'_>, program: &str, arguments: &str) -> String {
    let output = Command::new("nsenter")
        .arg(format!("--net=/proc/{}/ns/net", container.pid))
        .arg(program)
        .args(arguments.split(' '))
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn start_whose_network_fails_leaves_no_device_and_succeeds_once_the_cause_is_gone() {
    with_fake_containerd(|containerd| {
        let container = containerd.create(&idle());
        let ip = |arguments: &str| run_in_network(&container, "ip", arguments);
        let state = || [ip("-o link"), run_in_network(&container, "tc", "qdisc show")].concat();
        for (link, address) in [("eth0", "10.1.0.5/24"), ("eth1", "10.2.0.5/24")] {
            ip(&format!("link add {link} type veth peer name {link}-peer"));
            ip(&format!("link set {link}-peer up"));
            ip(&format!("link set {link} up"));
            ip(&format!("addr add {address} dev {link}"));
        }
        // The largest MTU of a veth link. That of a tap device is 14 bytes less, so the second link fails.
        ip("link set eth1 mtu 65535");
        let before = state();

        for _ in 0..2 {
            let failure = container.task().start(&container.id, "").unwrap_err();
            assert!(failure.message.contains("tap device for eth1"), "{failure}");
            assert_eq!(state(), before);
            assert_eq!(container.status(""), Status::CREATED);
        }
        ip("link set eth1 mtu 1500");
        container.start();

        let inside = container.output_of("ip -o addr");
        assert!(
            inside.contains("10.1.0.5/24") && inside.contains("10.2.0.5/24"),
            "{inside}"
        );
        // At each of the four links and at its tap device.
        assert_eq!(state().matches("ingress").count(), 8, "{}", state());
        container.end();
    });
}

#[test]
fn start_whose_network_fails_in_the_guest_succeeds_once_the_cause_is_gone() {
    with_fake_containerd(|containerd| {
        let container = containerd.create(&idle());
        let ip = |arguments: &str| run_in_network(&container, "ip", arguments);
        ip("link add eth0 type veth peer name peer");
        ip("link set peer up");
        ip("link set eth0 up");
        ip("addr add 10.1.0.5/24 dev eth0");
        // The guest's kernel has no tunnels.
        ip("route add 10.9.0.0/16 encap ip id 7 dst 10.1.0.9 dev eth0");

        for _ in 0..2 {
            let failure = container.task().start(&container.id, "").unwrap_err();
            assert!(failure.message.contains("add route 10.9.0.0/16"), "{failure}");
            assert_eq!(container.status(""), Status::CREATED);
        }
        ip("route del 10.9.0.0/16");
        container.start();

        let inside = container.output_of("ip -o addr; ip route");
        assert!(
            inside.contains("10.1.0.5/24") && inside.contains("10.1.0.0/24"),
            "{inside}"
        );
        let links = container.output_of("cd /sys/class/net; echo */");
        assert_eq!(links, "eth0/ lo/ peer/\n");
        container.end();
    });
}

/// Creates a container that needs a hung volume, in a pod in which another container runs. Asserts that the other one
/// can be listed and killed meanwhile, that Create fails in time, and that it leaves nothing in the shim.
fn assert_only_create_fails(
    containerd: &FakeContainerd,
    pod: &Pod<'_>,
    use_volume: impl Fn(&HungVolume, &mut Value, &mut CreateTaskRequest),
) {
    let other = pod.run(&pods::idle(pod));
    let volume = HungVolume::mount(containerd.folder().join("hung"));
    let (mut spec, mut changed) = (pods::idle(pod), CreateTaskRequest::default());
    use_volume(&volume, &mut spec, &mut changed);
    let bundle = containerd.bundle(&spec);
    let mut stuck = containerd.prepare_in(bundle.clone(), pod.shim.clone());
    use_volume(&volume, &mut spec, &mut stuck.request);

    let (sender, failed) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || sender.send(stuck.create().unwrap_err()).unwrap());
        volume.wait_for_request();

        let task = other.task().with_timeout(STATE_LIMIT);
        assert_eq!(task.state(&other.id, "").unwrap().status.unwrap(), Status::RUNNING);
        let killed = Instant::now();
        task.kill(&other.id, "", 9).unwrap();
        assert_eq!(other.wait(), 137);
        containerd.events.wait_for(&other.id, "exit 137");
        assert!(killed.elapsed() < KILL_LIMIT, "{:?}", killed.elapsed());

        let failure = failed.recv_timeout(DEADLINE).expect("Create fails in time");
        let expected = "a file system of this host does not answer";
        assert!(failure.message.contains(expected), "{failure}");
    });

    pod.remove_container(&other);
    drop(volume);
    containerd.delete_bundle(&bundle);
    bundle.remove();
    // The shim still creates containers, also one with the same id.
    let bundle = containerd.bundle_with_id(&bundle.id, &pods::idle(pod));
    let again = containerd.prepare_in(bundle, pod.shim.clone()).create().unwrap();
    again.start();
    pod.remove_container(&again);
}

#[test]
fn hung_bind_mount_fails_only_its_create() {
    with_both_apis(|containerd, pod| {
        assert_only_create_fails(containerd, pod, |volume, spec, _| {
            let mount = json!({"destination": "/data", "type": "bind", "source": volume.path(), "options": ["rbind"]});
            spec["mounts"].as_array_mut().unwrap().push(mount);
        });
    });
}

#[test]
fn hung_root_file_system_fails_only_its_create() {
    with_both_apis(|containerd, pod| {
        assert_only_create_fails(containerd, pod, |volume, _, request| {
            request.rootfs = vec![Mount {
                type_: "bind".to_owned(),
                source: volume.path().join("rootfs").display().to_string(),
                options: vec!["rbind".to_owned()],
                ..Mount::default()
            }];
        });
    });
}

#[test]
fn hung_log_file_fails_only_its_create() {
    with_both_apis(|containerd, pod| {
        assert_only_create_fails(containerd, pod, |volume, _, request| {
            request.stdout = format!("file://{}", volume.path().join("log").display());
        });
    });
}

#[test]
fn volume_that_hangs_later_does_not_delay_the_deletion_of_its_container() {
    with_both_apis(|containerd, pod| {
        let other = pod.run(&pods::idle(pod));
        let volume = HungVolume::mount_answering(containerd.folder().join("hung"));
        let mut spec = pods::idle(pod);
        let mount = json!({"destination": "/data", "type": "bind", "source": volume.path(), "options": ["rbind"]});
        spec["mounts"].as_array_mut().unwrap().push(mount);
        let container = pod.run(&spec);
        assert_eq!(container.output_of("ls /data; echo listed"), "listed\n");
        volume.hang();

        let task = container.task().with_timeout(DEADLINE);
        let killed = Instant::now();
        task.kill(&container.id, "", 9).unwrap();
        assert_eq!(container.wait(), 137);
        task.delete(&container.id, "").unwrap();
        assert!(killed.elapsed() < KILL_LIMIT, "{:?}", killed.elapsed());

        assert_eq!(other.output_of("echo still works"), "still works\n");
        drop(volume);
        pod.delete_bundle_of(&container);
        pod.remove_container(&other);
    });
}

#[test]
fn log_file_that_hangs_while_it_is_written_delays_only_its_own_output() {
    with_fake_containerd(|containerd| {
        let pod = Pod::by_task(containerd);
        let other = pod.run(&pods::idle(&pod));
        let volume = HungVolume::mount_with_file(containerd.folder().join("hung"), "log");
        let bundle = containerd.bundle(&pod.shell("while :; do echo a line of the log; done"));
        let mut prepared = containerd.prepare_in(bundle, pod.shim.clone());
        prepared.request.stdout = format!("file://{}", volume.path().join("log").display());
        prepared.request.stderr.clear();
        let writer = prepared.create().unwrap();
        writer.start();
        volume.wait_for_request();

        let task = other.task().with_timeout(STATE_LIMIT);
        assert_eq!(task.state(&other.id, "").unwrap().status.unwrap(), Status::RUNNING);
        // This needs the commands and the streams of the vmm.
        assert_eq!(other.output_of("echo still works"), "still works\n");
        let killed = Instant::now();
        task.kill(&writer.id, "", 9).unwrap();
        assert_eq!(writer.wait(), 137);
        // The shim waits 10 s for the delivery of the output.
        let limit = Duration::from_secs(10) + KILL_LIMIT;
        assert!(killed.elapsed() < limit, "{:?}", killed.elapsed());
        writer.delete();

        assert_eq!(other.output_of("echo still works"), "still works\n");
        drop(volume);
        pod.delete_bundle_of(&writer);
        pod.remove_container(&other);
        pod.end();
    });
}
