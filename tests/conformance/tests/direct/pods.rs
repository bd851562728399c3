//! Pods: sandboxes in both of containerd's ways, what the containers of a pod share, and what they do
//! not do to each other.

use std::{fs, path::PathBuf, time::Duration};

use containerd_shim_protos::{api::Status, cgroups_v2::metrics::Metrics, protobuf::Message, ttrpc::Code};
use nutshell_conformance::{
    Containerd, PATIENCE,
    bootstrap::Caller,
    container::Container,
    host,
    pod::{Config, NOT_READY, Pod, READY, Sandboxes, configured, create_sandbox_task, sandbox_shim, share_pids},
    with_containerd,
};
use rustix::{
    mount::{MountFlags, UnmountFlags},
    process::Signal,
};
use serde_json::{Value, json};

/// Config of a pod whose control group is one of the test's.
pub(super) fn config(containerd: &Containerd) -> Config {
    Config {
        hostname: "web-0".to_owned(),
        cgroup_parent: containerd.cgroups_path("").trim_end_matches('/').to_owned(),
        ..Config::default()
    }
}

/// Runs a test on a pod of each way, which it leaves without containers.
pub(super) fn on_both(test: impl Fn(&Pod<'_>)) {
    with_containerd(|containerd| {
        let pod = Pod::by_task(containerd);
        test(&pod);
        pod.end();
        let pod = Pod::by_service(containerd, &config(containerd));
        test(&pod);
        pod.end();
    });
}

pub(super) fn idle(pod: &Pod<'_>) -> Value {
    pod.spec(&["sleep", "100000"])
}

fn has_process(container: &Container<'_>, name: &str) -> bool {
    container.output_of("ps -o args").lines().any(|line| line == name)
}

/// A tmpfs on the host, as containerd's CRI makes it for a pod.
struct SharedMemory(PathBuf);

impl SharedMemory {
    fn mount(containerd: &Containerd) -> Self {
        let folder = containerd.folder().join("shm");
        fs::create_dir(&folder).unwrap();
        rustix::mount::mount("shm", &folder, "tmpfs", MountFlags::empty(), c"size=1m").unwrap();
        Self(folder)
    }

    /// Puts it into a spec in place of the default.
    fn put_into(&self, spec: &mut Value) {
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
    with_containerd(|containerd| {
        let pod = Pod::by_task_with(containerd, &Caller::newest(), |spec| {
            spec["hostname"] = json!("web-0");
            spec["domainname"] = json!("example");
            spec["linux"]["sysctl"] =
                json!({"net.ipv4.ip_unprivileged_port_start": "80", "kernel.shm_rmid_forced": "1"});
        });
        let script = "hostname; cat /proc/sys/kernel/domainname /proc/sys/net/ipv4/ip_unprivileged_port_start \
            /proc/sys/kernel/shm_rmid_forced";
        for hostname in [None, Some("of-my-own")] {
            let mut spec = idle(&pod);
            spec["hostname"] = json!(hostname);
            let container = pod.run(&spec);
            assert_eq!(container.output_of(script), "web-0\nexample\n80\n1\n");
            pod.forget(&container);
        }
        pod.end();

        let config = Config {
            sysctls: vec![("net.ipv4.ip_unprivileged_port_start".to_owned(), "81".to_owned())],
            ..config(containerd)
        };
        let pod = Pod::by_service(containerd, &config);
        let container = pod.run(&idle(&pod));
        let script = "hostname; cat /proc/sys/net/ipv4/ip_unprivileged_port_start";
        assert_eq!(container.output_of(script), "web-0\n81\n");
        pod.forget(&container);
        pod.end();
    });
}

#[test]
fn unknown_sysctl_is_named_and_the_pod_does_not_start() {
    with_containerd(|containerd| {
        let sandbox = create_sandbox_task(containerd, &Caller::newest(), |spec| {
            spec["linux"]["sysctl"] = json!({"net.ipv4.no_such_setting": "1"});
        });
        let sandbox = sandbox.unwrap();
        let failure = sandbox.task().start(&sandbox.id, "").unwrap_err();
        assert_eq!(failure.code, Some(Code::INVALID_ARGUMENT), "{failure}");
        assert!(failure.message.contains("net.ipv4.no_such_setting"), "{failure}");
        sandbox.end();

        let (bundle, shim) = sandbox_shim(containerd);
        let config = Config {
            sysctls: vec![("kernel.no_such_setting".to_owned(), "1".to_owned())],
            ..config(containerd)
        };
        let sandboxes = Sandboxes::of(&shim);
        sandboxes.create(&bundle, &config).unwrap();
        let failure = sandboxes.start(&bundle.id).unwrap_err();
        assert!(failure.message.contains("kernel.no_such_setting"), "{failure}");
        sandboxes.shut_down(&bundle.id).unwrap();
        assert!(host::ends_within(shim.pid, PATIENCE));
        containerd.delete_answer(&bundle);
        bundle.remove();
    });
}

#[test]
fn containers_of_a_pod_share_namespaces_except_pid_and_mount() {
    on_both(|pod| {
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
        containers.iter().for_each(|container| pod.forget(container));
    });
}

#[test]
fn containers_of_a_pod_reach_each_other_over_loopback() {
    on_both(|pod| {
        let server = pod.run(&pod.shell("while :; do echo served | nc -l -p 7000; done"));
        let client = pod.run(&idle(pod));
        let script = "until nc 127.0.0.1 7000 </dev/null; do :; done";
        assert_eq!(client.output_of(script), "served\n");
        // Nobody gave it a network.
        assert_eq!(client.output_of("ls /sys/class/net; ip route"), "lo\n");
        pod.forget(&client);
        pod.forget(&server);
    });
}

#[test]
fn containers_of_a_pod_share_dev_shm_with_the_size_of_the_hosts_tmpfs() {
    with_containerd(|containerd| {
        let memory = SharedMemory::mount(containerd);
        let pod = Pod::by_task_with(containerd, &Caller::newest(), |spec| memory.put_into(spec));
        let mut spec = idle(&pod);
        memory.put_into(&mut spec);
        let (one, other) = (pod.run(&spec), pod.run(&spec));
        one.output_of("echo here >/dev/shm/file");
        let script =
            "cat /dev/shm/file; df -k /dev/shm | tail -n 1 | while read name size rest; do echo $name $size; done";
        assert_eq!(other.output_of(script), "here\ntmpfs 1024\n");
        assert_eq!(
            fs::read_dir(&memory.0).unwrap().count(),
            0,
            "the host sees what only the pod is to see"
        );
        let (status, _) = one.script("dd if=/dev/zero of=/dev/shm/full bs=1k count=2048");
        assert_ne!(status, 0, "there is room for more than its size");
        let own = pod.run(&idle(&pod));
        assert_eq!(own.output_of("ls /dev/shm"), "");
        for container in [one, other, own] {
            pod.forget(&container);
        }
        pod.end();
    });
}

#[test]
fn sandbox_service_provides_etc_files_and_dev_shm() {
    with_containerd(|containerd| {
        let config = Config {
            dns: vec!["10.96.0.10".to_owned()],
            ..config(containerd)
        };
        let pod = Pod::by_service(containerd, &config);
        let mut spec = idle(&pod);
        // As containerd's default spec has it, which its CRI leaves in place for such pods.
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
        let (status, _) = mounted.script("echo x >>/etc/resolv.conf");
        assert_ne!(status, 0, "it is read-only like the root");

        with.output_of("echo options ndots:5 >>/etc/resolv.conf; echo here >/dev/shm/file");
        assert_eq!(
            without.output_of("grep -c ndots /etc/resolv.conf; cat /dev/shm/file"),
            "1\nhere\n"
        );
        assert_eq!(mounted.output_of("df -k /dev/shm | tail -n 1 | grep -c 65536"), "1\n");
        for container in [without, with, mounted] {
            pod.forget(&container);
        }
        pod.end();
    });
}

#[test]
fn containers_with_a_shared_pid_namespace_see_each_other_and_end_separately() {
    on_both(|pod| {
        let mut spec = pod.shell("setsid sleep 1001 & sleep 1002 & exec sleep 1003");
        share_pids(&mut spec, pod.pid);
        let (first, second) = (pod.run(&spec), pod.run(&pod.idle_sharing(pod.pid)));
        assert_eq!(second.output_of("cat /proc/1/comm"), "pod\n");
        for name in ["sleep 1001", "sleep 1002", "sleep 1003"] {
            host::eventually(PATIENCE, || {
                has_process(&second, name).then_some(()).ok_or_else(|| name.to_owned())
            })
            .unwrap();
        }
        // Nothing is to be seen of it, and nobody can end it.
        let (status, _) = second.script("ls /proc/1/root/ /proc/1/fd/ || kill -9 1; cat /proc/1/comm | grep -q pod");
        assert_eq!(status, 0);

        first.kill(9);
        assert_eq!(first.wait(), 137);
        host::eventually(PATIENCE, || {
            let left = second.output_of("ps -o args | grep 'sleep 100[123]' | grep -v grep || true");
            left.is_empty().then_some(()).ok_or(left)
        })
        .unwrap();
        pod.forget(&first);
        assert_eq!(second.status(""), Status::RUNNING);

        // Whoever loses its parent is not left as a zombie.
        second.output_of("sh -c 'sh -c \"exec true\" &'");
        host::eventually(PATIENCE, || {
            let zombies = second.output_of("grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null || true");
            zombies.is_empty().then_some(()).ok_or(zombies)
        })
        .unwrap();
        // A signal that ends what does nothing about it: it is no first process.
        second.kill(15);
        assert_eq!(second.wait(), 143);
        pod.forget(&second);
    });
}

#[test]
fn ephemeral_container_sees_the_processes_of_its_target_only() {
    on_both(|pod| {
        let (target, other) = (
            pod.run(&pod.spec(&["sleep", "2001"])),
            pod.run(&pod.spec(&["sleep", "2002"])),
        );
        let debugger = pod.run(&pod.idle_sharing(target.pid));
        assert!(has_process(&debugger, "sleep 2001") && !has_process(&debugger, "sleep 2002"));
        assert!(has_process(&target, "sleep 100000"));
        debugger.kill(9);
        assert_eq!(debugger.wait(), 137);
        pod.forget(&debugger);
        assert_eq!(target.status(""), Status::RUNNING);

        // Who shares its processes ends with it, as everywhere.
        let debugger = pod.run(&pod.idle_sharing(target.pid));
        target.kill(9);
        assert_eq!((target.wait(), debugger.wait()), (137, 137));
        let late = pod.create(&pod.idle_sharing(target.pid)).unwrap_err();
        assert_eq!(late.code, Some(Code::FAILED_PRECONDITION), "{late}");
        assert_eq!(other.status(""), Status::RUNNING);
        let stranger = pod.create(&pod.idle_sharing(1)).unwrap_err();
        assert_eq!(stranger.code, Some(Code::INVALID_ARGUMENT), "{stranger}");
        assert!(stranger.message.contains("has pid 1"), "{stranger}");
        for container in [debugger, target, other] {
            pod.forget(&container);
        }
    });
}

#[test]
fn host_namespaces_are_refused_by_name_and_leave_nothing() {
    with_containerd(|containerd| {
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
            let (bundle, shim) = sandbox_shim(containerd);
            let config = Config {
                namespaces,
                ..config(containerd)
            };
            let sandboxes = Sandboxes::of(&shim);
            let failure = sandboxes.create(&bundle, &config).unwrap_err();
            assert_eq!(failure.code, Some(Code::INVALID_ARGUMENT), "{failure}");
            assert!(failure.message.contains(field), "{failure}");
            // What containerd does then.
            sandboxes.shut_down(&bundle.id).unwrap();
            assert!(host::ends_within(shim.pid, PATIENCE));
            containerd.delete_answer(&bundle);
            bundle.remove();
        }
        assert_eq!(containerd.events.all(), []);
    });
}

#[test]
fn host_namespaces_are_the_pods_if_so_configured() {
    with_containerd(|containerd| {
        let caller = configured("[guest]\nready_timeout_seconds = 60\n[pod]\nhost_namespaces = \"pod\"\n");
        let pod = Pod::by_task_with(containerd, &caller, |spec| {
            let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| !["pid", "ipc"].contains(&namespace["type"].as_str().unwrap()));
        });
        let containers = [pod.run(&pod.idle_sharing(pod.pid)), pod.run(&pod.idle_sharing(pod.pid))];
        let own = containers
            .iter()
            .map(|container| container.output_of("readlink /proc/self/ns/pid"));
        let own: Vec<_> = own.collect();
        assert_eq!(own[0], own[1]);
        assert_eq!(containers[0].output_of("cat /proc/1/comm"), "pod\n");
        containers.iter().for_each(|container| pod.forget(container));
        pod.end();
    });
}

#[test]
fn out_of_memory_or_crash_of_a_container_does_not_affect_its_siblings() {
    on_both(|pod| {
        let sibling = pod.run(&idle(pod));
        let mut greedy = pod.shell("x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done");
        greedy["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
        let greedy = pod.run(&greedy);
        assert_eq!(greedy.wait(), 137);
        greedy.containerd().events.until(&greedy.id, "oom");
        let crashing = pod.run(&pod.shell("kill -SEGV $$; exec sleep 1"));
        crashing.wait();
        assert_eq!(sibling.output_of("echo alive"), "alive\n");
        for container in [greedy, crashing, sibling] {
            pod.forget(&container);
        }
    });
}

#[test]
fn pod_without_containers_stays_ready_for_the_next() {
    on_both(|pod| {
        for status in [0, 3, 0] {
            // As the kubelet restarts one: a new id each time.
            let container = pod.run(&pod.shell(&format!("exit {status}")));
            assert_eq!(container.wait(), status);
            pod.forget(&container);
            assert!(pod.is_ready());
        }
        let containers: Vec<_> = (0..3).map(|_| pod.run(&idle(pod))).collect();
        for index in [1, 0, 2] {
            pod.forget(&containers[index]);
        }
        assert!(pod.is_ready());
    });
}
