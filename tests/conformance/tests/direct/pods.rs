//! Pods, with both sandbox APIs of containerd: the namespaces and files that the containers of a pod share, and their
//! isolation from each other.

use std::{fs, path::PathBuf};

use containerd_shim_protos::{api::Status, ttrpc::Code};
use nutshell_conformance::{
    FakeContainerd, TIMEOUT,
    bootstrap::Caller,
    container::Container,
    host,
    pod::{
        Pod, SandboxClient, SandboxConfig, caller_with_config, create_sandbox_task, share_pid_namespace,
        start_sandbox_shim,
    },
    with_fake_containerd,
};
use rustix::mount::{MountFlags, UnmountFlags};
use serde_json::{Value, json};

/// The config of a pod named `web-0`, whose control group belongs to the test.
pub(super) fn config(containerd: &FakeContainerd) -> SandboxConfig {
    SandboxConfig {
        hostname: "web-0".to_owned(),
        cgroup_parent: containerd.cgroups_path("").trim_end_matches('/').to_owned(),
        ..SandboxConfig::default()
    }
}

/// Runs a test with a pod of each sandbox API. The test removes the containers that it creates.
pub(super) fn with_both_apis(test: impl Fn(&FakeContainerd, &Pod<'_>)) {
    with_fake_containerd(|containerd| {
        let pod = Pod::by_task(containerd);
        test(containerd, &pod);
        pod.end();
        let pod = Pod::by_service(containerd, &config(containerd));
        test(containerd, &pod);
        pod.end();
    });
}

/// The spec of a container that sleeps.
pub(super) fn idle(pod: &Pod<'_>) -> Value {
    pod.spec(&["sleep", "100000"])
}

/// Adds the capabilities to inspect and to enter other processes.
fn privileged(mut spec: Value) -> Value {
    for set in ["bounding", "effective", "permitted"] {
        let capabilities = spec["process"]["capabilities"][set].as_array_mut().unwrap();
        capabilities.extend(
            [
                "CAP_SYS_ADMIN",
                "CAP_SYS_PTRACE",
                "CAP_SYS_CHROOT",
                "CAP_DAC_READ_SEARCH",
            ]
            .map(Value::from),
        );
    }
    spec
}

/// Whether a container sees a process with this command line.
fn has_process(container: &Container<'_>, name: &str) -> bool {
    container.output_of("ps -o args").lines().any(|line| line == name)
}

/// A tmpfs of 1 MiB on the host, as containerd's CRI service mounts it for the /dev/shm of a pod.
struct SharedMemory(PathBuf);

impl SharedMemory {
    fn mount(containerd: &FakeContainerd) -> Self {
        let folder = containerd.folder().join("shm");
        fs::create_dir(&folder).unwrap();
        rustix::mount::mount("shm", &folder, "tmpfs", MountFlags::empty(), c"size=1m").unwrap();
        Self(folder)
    }

    /// Replaces the /dev/shm of a spec by this tmpfs.
    fn set_in(&self, spec: &mut Value) {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.retain(|mount| mount["destination"] != "/dev/shm");
        mounts.push(
            json!({"destination": "/dev/shm", "type": "bind", "source": self.0, "options": ["rbind", "rprivate", "rw"]}),
        );
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn containers_have_the_host_name_and_sysctls_of_their_sandbox() {
    with_fake_containerd(|containerd| {
        let pod = Pod::by_task_with(containerd, &Caller::newest(), |spec| {
            spec["hostname"] = json!("web-0");
            spec["domainname"] = json!("example");
            spec["linux"]["sysctl"] =
                json!({"net.ipv4.ip_unprivileged_port_start": "80", "kernel.shm_rmid_forced": "1"});
        });
        let script = "hostname; cat /proc/sys/kernel/domainname /proc/sys/net/ipv4/ip_unprivileged_port_start \
            /proc/sys/kernel/shm_rmid_forced";
        for hostname in [None, Some("another")] {
            let mut spec = idle(&pod);
            spec["hostname"] = json!(hostname);
            let container = pod.run(&spec);
            assert_eq!(container.output_of(script), "web-0\nexample\n80\n1\n");
            pod.remove_container(&container);
        }
        pod.end();

        let config = SandboxConfig {
            sysctls: vec![("net.ipv4.ip_unprivileged_port_start".to_owned(), "81".to_owned())],
            ..config(containerd)
        };
        let pod = Pod::by_service(containerd, &config);
        let container = pod.run(&idle(&pod));
        let script = "hostname; cat /proc/sys/net/ipv4/ip_unprivileged_port_start";
        assert_eq!(container.output_of(script), "web-0\n81\n");
        pod.remove_container(&container);
        pod.end();
    });
}

#[test]
fn unknown_sysctl_is_named_and_the_pod_does_not_start() {
    with_fake_containerd(|containerd| {
        let sandbox = create_sandbox_task(containerd, &Caller::newest(), |spec| {
            spec["linux"]["sysctl"] = json!({"net.ipv4.no_such_setting": "1"});
        });
        let sandbox = sandbox.unwrap();
        let failure = sandbox.task().start(&sandbox.id, "").unwrap_err();
        assert_eq!(failure.code, Some(Code::INVALID_ARGUMENT), "{failure}");
        assert!(failure.message.contains("net.ipv4.no_such_setting"), "{failure}");
        sandbox.end();

        let (bundle, shim) = start_sandbox_shim(containerd);
        let config = SandboxConfig {
            sysctls: vec![("kernel.no_such_setting".to_owned(), "1".to_owned())],
            ..config(containerd)
        };
        let sandboxes = SandboxClient::new(&shim);
        sandboxes.create(&bundle, &config).unwrap();
        let failure = sandboxes.start(&bundle.id).unwrap_err();
        assert!(failure.message.contains("kernel.no_such_setting"), "{failure}");
        sandboxes.shut_down(&bundle.id).unwrap();
        assert!(host::ends_within(shim.pid, TIMEOUT));
        containerd.delete_bundle(&bundle);
        bundle.remove();
    });
}

#[test]
fn containers_of_a_pod_share_namespaces_except_pid_and_mount() {
    with_both_apis(|_, pod| {
        let containers = [pod.run(&idle(pod)), pod.run(&idle(pod))];
        let [one, other] = [&containers[0], &containers[1]].map(|container| {
            let script =
                "for kind in net ipc uts pid mnt; do readlink /proc/self/ns/$kind; done; ps -o args | grep -c ^sleep";
            let output = container.output_of(script);
            output.lines().map(str::to_owned).collect::<Vec<_>>()
        });
        assert_eq!(one[..3], other[..3]);
        assert!(one[3] != other[3] && one[4] != other[4], "{one:?} {other:?}");
        assert_eq!((one[5].as_str(), other[5].as_str()), ("1", "1"));
        containers.iter().for_each(|container| pod.remove_container(container));
    });
}

#[test]
fn containers_of_a_pod_reach_each_other_over_loopback() {
    with_both_apis(|_, pod| {
        let server = pod.run(&pod.shell("while :; do echo served | nc -l -p 7000; done"));
        let client = pod.run(&idle(pod));
        let script = "until nc 127.0.0.1 7000 </dev/null; do :; done";
        assert_eq!(client.output_of(script), "served\n");
        // The pod has no network namespace on the host.
        assert_eq!(
            client.output_of("ls -d /sys/class/net/*/; ip route"),
            "/sys/class/net/lo/\n"
        );
        pod.remove_container(&client);
        pod.remove_container(&server);
    });
}

#[test]
fn containers_of_a_pod_share_dev_shm_with_the_size_of_the_hosts_tmpfs() {
    with_fake_containerd(|containerd| {
        let memory = SharedMemory::mount(containerd);
        let pod = Pod::by_task_with(containerd, &Caller::newest(), |spec| memory.set_in(spec));
        let mut spec = idle(&pod);
        memory.set_in(&mut spec);
        let (one, other) = (pod.run(&spec), pod.run(&spec));
        one.output_of("echo here >/dev/shm/file");
        let script =
            "cat /dev/shm/file; df -k /dev/shm | tail -n 1 | while read name size rest; do echo $name $size; done";
        assert_eq!(other.output_of(script), "here\ntmpfs 1024\n");
        assert_eq!(
            fs::read_dir(&memory.0).unwrap().count(),
            0,
            "files of the pod's /dev/shm are on the host"
        );
        let (status, _) = one.run_script("dd if=/dev/zero of=/dev/shm/full bs=1k count=2048");
        assert_ne!(status, 0, "more than its size fits into /dev/shm");
        let own = pod.run(&idle(&pod));
        assert_eq!(own.output_of("ls /dev/shm"), "");
        for container in [one, other, own] {
            pod.remove_container(&container);
        }
        pod.end();
    });
}

/// A named pipe connects processes only if it is one inode for them.
#[test]
fn containers_of_a_pod_have_the_same_files_in_a_volume() {
    with_both_apis(|containerd, pod| {
        let volume = containerd.folder().join("volume");
        fs::create_dir(&volume).unwrap();
        let with_volume = |mut spec: Value, option: &str| {
            let options = json!(["rbind", "rprivate", option]);
            let mount = json!({"destination": "/data", "type": "bind", "source": volume, "options": options});
            spec["mounts"].as_array_mut().unwrap().push(mount);
            spec
        };
        // The first to be created can only read, and the mount in the tree has to become writable for the second.
        let reader = pod.run(&with_volume(
            pod.shell("until cat /data/pipe; do usleep 1000; done 2>/dev/null"),
            "ro",
        ));
        let writer = pod.run(&with_volume(idle(pod), "rw"));
        writer.output_of("mkfifo /data/pipe && echo text >/data/pipe");
        assert_eq!(reader.stdout.read_to_end(), "text\n");
        reader.wait();
        pod.remove_container(&reader);

        let reader = pod.run(&with_volume(idle(pod), "ro"));
        let inode = "stat -c %i /data/pipe";
        assert_eq!(reader.output_of(inode), writer.output_of(inode));
        assert_eq!(
            reader.run_script("touch /data/file").0,
            1,
            "it is read-only in this container"
        );
        pod.remove_container(&writer);
        assert_eq!(reader.output_of("ls /data"), "pipe\n");
        pod.remove_container(&reader);
        fs::remove_dir_all(&volume).unwrap();
    });
}

#[test]
fn sandbox_service_provides_etc_files_and_dev_shm() {
    with_fake_containerd(|containerd| {
        let config = SandboxConfig {
            dns: vec!["10.96.0.10".to_owned()],
            ..config(containerd)
        };
        let pod = Pod::by_service(containerd, &config);
        let mut spec = idle(&pod);
        // The default of containerd, which its CRI service keeps for pods of the Sandbox service.
        let default = json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
            "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]});
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.retain(|mount| mount["destination"] != "/dev/shm");
        let without = pod.run(&spec);
        spec["mounts"].as_array_mut().unwrap().push(default);
        let with = pod.run(&spec);
        let own = containerd.folder().join("hosts");
        fs::write(&own, "1.2.3.4 mine\n").unwrap();
        spec["mounts"]
            .as_array_mut()
            .unwrap()
            .push(json!({"destination": "/etc/hosts", "type": "bind", "source": own, "options": ["rbind", "ro"]}));
        spec["root"]["readonly"] = json!(true);
        let mounted = pod.run(&spec);
        let files = "cat /etc/resolv.conf /etc/hostname";
        for container in [&without, &with, &mounted] {
            assert_eq!(container.output_of(files), "nameserver 10.96.0.10\nweb-0\n");
        }
        assert!(
            without
                .output_of("cat /etc/hosts")
                .starts_with("127.0.0.1\tlocalhost\n")
        );
        assert_eq!(mounted.output_of("cat /etc/hosts"), "1.2.3.4 mine\n");
        let (status, _) = mounted.run_script("echo x >>/etc/resolv.conf");
        assert_ne!(status, 0, "/etc/resolv.conf is writable although the root is read-only");

        with.output_of("echo options ndots:5 >>/etc/resolv.conf; echo here >/dev/shm/file");
        assert_eq!(
            without.output_of("grep -c ndots /etc/resolv.conf; cat /dev/shm/file"),
            "1\nhere\n"
        );
        assert_eq!(mounted.output_of("df -k /dev/shm | tail -n 1 | grep -c 65536"), "1\n");
        for container in [without, with, mounted] {
            pod.remove_container(&container);
        }
        pod.end();
    });
}

#[test]
fn containers_with_a_shared_pid_namespace_see_each_other_and_end_separately() {
    with_both_apis(|_, pod| {
        let mut spec = pod.shell("setsid sleep 1001 & sleep 1002 & exec sleep 1003");
        share_pid_namespace(&mut spec, pod.pid);
        let (first, second) = (pod.run(&spec), pod.run(&pod.idle_in_pid_namespace_of(pod.pid)));
        assert_eq!(second.output_of("cat /proc/1/comm"), "pod\n");
        for name in ["sleep 1001", "sleep 1002", "sleep 1003"] {
            host::eventually(TIMEOUT, || {
                has_process(&second, name).then_some(()).ok_or_else(|| name.to_owned())
            })
            .unwrap();
        }
        // A container can neither inspect nor enter nor end the first process.
        for script in [
            "ls /proc/1/root/",
            "ls -L /proc/1/fd/0",
            "readlink /proc/1/exe",
            "readlink /proc/1/ns/mnt",
        ] {
            let (status, output) = second.run_script(script);
            assert_ne!(status, 0, "{script}: {output}");
        }
        second.output_of("kill -9 1; test \"$(cat /proc/1/comm)\" = pod");

        first.kill(9);
        assert_eq!(first.wait(), 137);
        host::eventually(TIMEOUT, || {
            let left = second.output_of("ps -o args | grep 'sleep 100[123]' | grep -v grep || true");
            left.is_empty().then_some(()).ok_or(left)
        })
        .unwrap();
        pod.remove_container(&first);
        assert_eq!(second.status(""), Status::RUNNING);

        // Orphans are reaped.
        second.output_of("sh -c 'sh -c \"exec true\" &'");
        host::eventually(TIMEOUT, || {
            let zombies = second.output_of("grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null || true");
            zombies.is_empty().then_some(()).ok_or(zombies)
        })
        .unwrap();
        // SIGTERM ends a process without a handler, because it is not the first process of the namespace.
        second.kill(15);
        assert_eq!(second.wait(), 143);
        pod.remove_container(&second);
    });
}

/// All privileges of the guest do not help against processes of the agent.
#[test]
fn privileged_container_cannot_enter_the_first_process_of_a_shared_pid_namespace() {
    with_fake_containerd(|containerd| {
        let pod = Pod::by_task(containerd);
        let script = "busybox --list | grep -qx nsenter || echo no nsenter
            nsenter -t $$ -u true && echo allowed
            for option in m u i n; do nsenter -t 1 -$option true && echo entered $option; done
            for file in ns/mnt root cwd fd exe; do ls -L /proc/1/$file/ && echo read $file; done
            echo end";
        let mut spec = privileged(pod.shell(script));
        share_pid_namespace(&mut spec, pod.pid);
        let container = pod.run(&spec);
        assert_eq!(container.stdout.read_to_end(), "allowed\nend\n");
        let errors = container.stderr.read_to_end();
        // Four namespaces, four files, and three descriptors.
        assert_eq!(errors.matches("Permission denied").count(), 11, "{errors}");
        container.wait();
        pod.remove_container(&container);
        pod.end();
    });
}

#[test]
fn ephemeral_container_sees_the_processes_of_its_target_only() {
    with_both_apis(|_, pod| {
        let (target, other) = (
            pod.run(&pod.spec(&["sleep", "2001"])),
            pod.run(&pod.spec(&["sleep", "2002"])),
        );
        let debugger = pod.run(&pod.idle_in_pid_namespace_of(target.pid));
        assert!(has_process(&debugger, "sleep 2001") && !has_process(&debugger, "sleep 2002"));
        assert!(has_process(&target, "sleep 100000"));
        debugger.kill(9);
        assert_eq!(debugger.wait(), 137);
        pod.remove_container(&debugger);
        assert_eq!(target.status(""), Status::RUNNING);

        // A container in the target's pid namespace ends with the target.
        let debugger = pod.run(&pod.idle_in_pid_namespace_of(target.pid));
        target.kill(9);
        assert_eq!((target.wait(), debugger.wait()), (137, 137));
        let late = pod.create(&pod.idle_in_pid_namespace_of(target.pid)).unwrap_err();
        assert_eq!(late.code, Some(Code::FAILED_PRECONDITION), "{late}");
        assert_eq!(other.status(""), Status::RUNNING);
        // A pid that is not of the pod means the pod's own namespace: nothing of the host is shared.
        let stranger = pod.run(&pod.idle_in_pid_namespace_of(1));
        assert!(has_process(&stranger, "sleep 100000") && !has_process(&stranger, "sleep 2002"));
        for container in [stranger, debugger, target, other] {
            pod.remove_container(&container);
        }
    });
}

#[test]
fn host_namespaces_are_refused_with_the_field_name_and_leave_nothing() {
    with_fake_containerd(|containerd| {
        for (kind, field) in [("network", "hostNetwork"), ("pid", "hostPID"), ("ipc", "hostIPC")] {
            let failure = create_sandbox_task(containerd, &Caller::newest(), |spec| {
                let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
                namespaces.retain(|namespace| namespace["type"] != kind);
            });
            let failure = failure.unwrap_err();
            assert_eq!(failure.code, Some(Code::INVALID_ARGUMENT), "{failure}");
            assert!(failure.message.contains(field), "{failure}");
        }
        for (namespaces, field) in [
            ([2, 1, 0], "hostNetwork"),
            ([0, 2, 0], "hostPID"),
            ([0, 1, 2], "hostIPC"),
        ] {
            let (bundle, shim) = start_sandbox_shim(containerd);
            let config = SandboxConfig {
                namespaces,
                ..config(containerd)
            };
            let sandboxes = SandboxClient::new(&shim);
            let failure = sandboxes.create(&bundle, &config).unwrap_err();
            assert_eq!(failure.code, Some(Code::INVALID_ARGUMENT), "{failure}");
            assert!(failure.message.contains(field), "{failure}");
            // As containerd does after a failed CreateSandbox.
            sandboxes.shut_down(&bundle.id).unwrap();
            assert!(host::ends_within(shim.pid, TIMEOUT));
            containerd.delete_bundle(&bundle);
            bundle.remove();
        }
        assert_eq!(containerd.events.all(), []);
    });
}

#[test]
fn configuration_replaces_host_namespaces_with_the_pods() {
    with_fake_containerd(|containerd| {
        let caller = caller_with_config("[pod]\nhost_namespaces = \"pod\"\n");
        let pod = Pod::by_task_with(containerd, &caller, |spec| {
            let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| !["pid", "ipc"].contains(&namespace["type"].as_str().unwrap()));
        });
        let containers = [
            pod.run(&pod.idle_in_pid_namespace_of(pod.pid)),
            pod.run(&pod.idle_in_pid_namespace_of(pod.pid)),
        ];
        let own = containers
            .iter()
            .map(|container| container.output_of("readlink /proc/self/ns/pid"));
        let own: Vec<_> = own.collect();
        assert_eq!(own[0], own[1]);
        assert_eq!(containers[0].output_of("cat /proc/1/comm"), "pod\n");
        containers.iter().for_each(|container| pod.remove_container(container));
        pod.end();
    });
}

#[test]
fn configuration_replaces_the_hosts_network_with_the_machines() {
    with_fake_containerd(|containerd| {
        let caller = caller_with_config("[pod]\nhost_namespaces = \"pod-and-network\"\n");
        let without_network = |spec: &mut serde_json::Value| {
            let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| namespace["type"] != "network");
        };
        let pod = Pod::by_task_with(containerd, &caller, without_network);
        let run = |mut spec| {
            without_network(&mut spec);
            pod.run(&spec)
        };
        let server = run(pod.shell("while :; do echo served | nc -l -p 7000; done"));
        let client = run(idle(&pod));
        assert_eq!(
            client.output_of("until nc 127.0.0.1 7000 </dev/null; do :; done"),
            "served\n"
        );
        assert_eq!(client.output_of("ls -d /sys/class/net/*/"), "/sys/class/net/lo/\n");
        pod.remove_container(&server);
        pod.remove_container(&client);
        pod.end();
    });
}

#[test]
fn out_of_memory_or_crash_of_a_container_does_not_affect_its_siblings() {
    with_both_apis(|_, pod| {
        let sibling = pod.run(&idle(pod));
        let mut greedy = pod.shell("x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done");
        greedy["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
        let greedy = pod.run(&greedy);
        assert_eq!(greedy.wait(), 137);
        greedy.containerd().events.wait_for(&greedy.id, "oom");
        let crashing = pod.run(&pod.shell("kill -SEGV $$; exec sleep 1"));
        crashing.wait();
        assert_eq!(sibling.output_of("echo alive"), "alive\n");
        for container in [greedy, crashing, sibling] {
            pod.remove_container(&container);
        }
    });
}

#[test]
fn pod_without_containers_stays_ready_for_the_next() {
    with_both_apis(|_, pod| {
        for status in [0, 3, 0] {
            // The kubelet restarts a container under a new id.
            let container = pod.run(&pod.shell(&format!("exit {status}")));
            assert_eq!(container.wait(), status);
            pod.remove_container(&container);
            assert!(pod.is_ready());
        }
        let containers: Vec<_> = (0..3).map(|_| pod.run(&idle(pod))).collect();
        for index in [1, 0, 2] {
            pod.remove_container(&containers[index]);
        }
        assert!(pod.is_ready());
    });
}
