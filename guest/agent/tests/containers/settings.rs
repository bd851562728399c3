//! Tests of the settings in a container's spec.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::Path;

use nutshell_protocol::{CONTAINERS_PATH, Request, Stdio};
use serde_json::json;

use crate::harness::{Agent, assert_nothing_left, process, shell, spec, unique};

#[test]
fn process_has_exactly_the_users_privileges() {
    let mut agent = Agent::start();
    let mut spec = shell(
        "id; pwd; echo $HOME $A; umask; grep -e CapEff -e CapBnd -e NoNew /proc/self/status; ulimit -n; \
         echo out >/dev/stdout; ls /proc/self/fd | wc -l",
    );
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [7, 8], "umask": 0o27});
    spec["process"]["env"] = json!(["PATH=/bin", "A=1", "A=2"]);
    spec["process"]["cwd"] = json!("/made/for/it");
    let (exited, text) = agent.run(&spec);
    let expected = "uid=1000(web) gid=1000 groups=7,8\n/made/for/it\n/var 2\n0027\n\
        CapEff:\t0000000000000000\nCapBnd:\t000000000800202b\nNoNewPrivs:\t1\n1024\nout\n4\n";
    assert_eq!((exited.status, text.as_str()), (0, expected));
}

#[test]
fn program_starts_with_default_signal_settings() {
    let mut agent = Agent::start();
    let (_, text) = agent.run(&shell("grep -e SigBlk -e SigIgn /proc/self/status"));
    let mask = |line: usize| {
        let text = text.lines().nth(line).unwrap().split('\t').nth(1).unwrap();
        u64::from_str_radix(text, 16).unwrap()
    };
    let pipe_is_ignored = mask(1) & (1 << (libc::SIGPIPE - 1)) != 0;
    assert_eq!((mask(0), pipe_is_ignored), (0, false));
}

#[test]
fn container_has_its_namespaces_and_mounts() {
    let mut agent = Agent::start();
    let script = "hostname; echo $$; ls -d /dev/null /dev/pts/ptmx /dev/shm /dev/mqueue | wc -l; \
        cat /proc/kcore | wc -c; echo 1 2>/dev/null >/proc/sys/kernel/panic || echo read-only; \
        cat /proc/sys/net/ipv4/ip_forward; ls / | grep -c nutshell; wc -l </proc/self/mounts; ls /..";
    let mut spec = shell(script);
    spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"});
    let (exited, text) = agent.run(&spec);
    assert_eq!(exited.status, 0);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..7], ["guest", "1", "4", "0", "read-only", "1", "0"]);
    let mounts: u32 = lines[7].parse().unwrap();
    assert!(mounts < 20, "{mounts} mounts: the machine's mounts are visible");
    assert!(!text.contains("lost"), "{text}");
}

#[test]
fn read_only_root_refuses_writes() {
    let mut agent = Agent::start();
    let mut spec = shell("echo x >/file || echo refused; echo x >/run/file && echo written");
    spec["root"]["readonly"] = json!(true);
    let (_, text) = agent.run(&spec);
    assert_eq!(text, "refused\nwritten\n");
}

#[test]
fn chroot_cannot_leave_the_container() {
    let mut agent = Agent::start();
    // chroot(1) of busybox does not change the directory, so `..` goes up from outside of the new root.
    let script = "mkdir -p /tmp/jail/bin && cp /bin/busybox /tmp/jail/bin/sh && cd /tmp && \
        chroot /tmp/jail /bin/sh -c 'cd ..; cd ..; cd ..; cd ..; echo *' ; cd /../../..; ls -d run/nutshell || echo inside";
    let mut spec = shell(script);
    for set in ["bounding", "effective", "permitted"] {
        spec["process"]["capabilities"][set]
            .as_array_mut()
            .unwrap()
            .push(json!("CAP_SYS_CHROOT"));
    }
    let (_, text) = agent.run(&spec);
    assert!(text.ends_with("inside\n"), "{text}");
}

#[test]
fn device_rules_are_enforced_cve_2020_2023() {
    let mut agent = Agent::start();
    let script = "mknod /tmp/disk$$ b 7 0; mknod /tmp/null$$ c 1 3; mknod /tmp/control$$ c 10 237; \
        for device in disk null control; do (: </tmp/$device$$) 2>/dev/null && echo $device open; done; \
        head -c 1 /dev/urandom | wc -c; rm /tmp/*$$";
    let mut spec = shell(script);
    for (rules, expected) in [
        (json!([{"allow": false, "access": "rwm"}]), "null open\n1\n"),
        (
            json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "b", "major": 7, "access": "r"}]),
            "disk open\nnull open\n1\n",
        ),
        (
            json!([{"allow": true, "access": "rwm"}]),
            "disk open\nnull open\ncontrol open\n1\n",
        ),
        // As with runc, a spec without rules allows the default devices.
        (json!([]), "null open\n1\n"),
        (json!(null), "null open\n1\n"),
    ] {
        spec["linux"]["resources"] = json!({"devices": rules});
        assert_eq!(agent.run(&spec).1, expected, "{rules}");
    }
    spec["linux"].as_object_mut().unwrap().remove("resources");
    assert_eq!(agent.run(&spec).1, "null open\n1\n", "no resources");
}

#[test]
fn missing_capability_sets_are_empty() {
    let mut agent = Agent::start();
    let all_zero = "CapInh:0 CapPrm:0 CapEff:0 CapBnd:0 CapAmb:0\n";
    let script = "sed -n 's/^\\(Cap...\\):\\t0*\\(.\\)/\\1:\\2/p' /proc/self/status | tr '\\n' ' ' | sed 's/ $/\\n/'";
    let mut spec = shell(script);
    spec["process"].as_object_mut().unwrap().remove("capabilities");
    assert_eq!(agent.run(&spec).1, all_zero, "no capabilities");
    spec["process"]["capabilities"] = json!({"bounding": ["CAP_KILL"]});
    let expected = "CapInh:0 CapPrm:0 CapEff:0 CapBnd:20 CapAmb:0\n";
    assert_eq!(agent.run(&spec).1, expected, "only a bounding set");

    let id = &format!("capabilities-{}", unique());
    spec = shell("sleep 1000");
    spec["process"].as_object_mut().unwrap().remove("capabilities");
    agent.create(id, &spec, Stdio::default()).unwrap();
    agent.start_container(id);
    let output = agent.listen();
    let stdio = Stdio {
        stdout: Some(output.port),
        ..Stdio::default()
    };
    let mut process = process(&["/bin/sh", "-c", script]);
    process.as_object_mut().unwrap().remove("capabilities");
    agent.exec(id, "x", &process, stdio).unwrap();
    let mut text = String::new();
    output.accept().read_to_string(&mut text).unwrap();
    assert_eq!(text, all_zero, "exec");
    agent.exit();
    agent.delete(id);
    agent.exit();
}

#[test]
fn terminal_is_owned_by_the_user() {
    let mut agent = Agent::start();
    let id = &format!("tty-user-{}", unique());
    let output = agent.listen();
    let stdio = Stdio {
        stdout: Some(output.port),
        terminal: true,
        ..Stdio::default()
    };
    let mut spec = shell("echo mine >$(tty)");
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    spec["process"]["terminal"] = json!(true);
    agent.create(id, &spec, stdio).unwrap();
    let mut output = output.accept();
    agent.start_container(id);
    let mut text = String::new();
    std::io::Read::read_to_string(&mut output, &mut text).unwrap();
    assert_eq!(text, "mine\r\n");
    assert_eq!(agent.exit().status, 0);
    agent.delete(id);
}

#[test]
fn user_namespace_maps_ids() {
    let mut agent = Agent::start();
    let mut spec = shell("id -u; cat /proc/self/uid_map; echo x >/dev/stdout");
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    spec["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "user"}));
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    let (exited, text) = agent.run(&spec);
    let words: Vec<&str> = text.split_whitespace().collect();
    assert_eq!((exited.status, words), (0, vec!["0", "0", "100000", "65536", "x"]));
}

#[test]
fn user_namespace_without_others_sees_the_machines_network_and_queues() {
    let mut agent = Agent::start();
    let mut spec = shell(
        "ls -d /sys/class/net /dev/mqueue; echo x 2>/dev/null >/sys/kernel/uevent_helper || echo read-only; \
         mount -t tmpfs none /tmp && echo mounted; cat /proc/self/cgroup",
    );
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    spec["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "mount"}, {"type": "user"}, {"type": "cgroup"}]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    for set in ["bounding", "effective", "permitted"] {
        let set = spec["process"]["capabilities"][set].as_array_mut().unwrap();
        set.push(json!("CAP_SYS_ADMIN"));
    }
    spec["mounts"].as_array_mut().unwrap().push(
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "ro"]}),
    );
    let (exited, text) = agent.run(&spec);
    let expected = "/dev/mqueue\n/sys/class/net\nread-only\nmounted\n0::/\n";
    assert_eq!((exited.status, text.as_str()), (0, expected));
}

#[test]
fn exec_has_its_scheduling_settings_and_umask() {
    let mut agent = Agent::start();
    let id = &format!("priorities-{}", unique());
    agent.create(id, &shell("sleep 1000"), Stdio::default()).unwrap();
    agent.start_container(id);
    let output = agent.listen();
    let stdio = Stdio {
        stdout: Some(output.port),
        ..Stdio::default()
    };
    let mut process = process(&[
        "/bin/sh",
        "-c",
        "ionice -p $$; cut -d' ' -f19,41 /proc/self/stat; umask",
    ]);
    process["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
    process["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 7});
    process["user"]["umask"] = json!(0o77);
    agent.exec(id, "x", &process, stdio).unwrap();
    let mut text = String::new();
    output.accept().read_to_string(&mut text).unwrap();
    // The fields of stat are the nice value and the scheduling policy.
    assert_eq!(text, "idle\n7 3\n0077\n");
    assert_eq!(agent.exit().status, 0);
    agent.delete(id);
    agent.exit();
}

#[test]
fn container_without_its_own_pid_namespace_is_refused() {
    let mut agent = Agent::start();
    let id = &format!("host-{}", unique());
    let mut spec = shell("true");
    spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "cgroup"}]);
    let failure = agent.create(id, &spec, Stdio::default()).unwrap_err();
    assert_eq!(failure.message, "the OCI spec has no pid namespace");
    assert_nothing_left(id);
}

/// Returns hooks that each run one shell script.
fn hooks(scripts: &[&str]) -> serde_json::Value {
    let hook =
        |script: &&str| json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"], "timeout": 30});
    scripts.iter().map(hook).collect()
}

#[test]
fn guest_runs_the_containers_hooks_and_not_the_hosts() {
    let mut agent = Agent::start();
    let mut spec = shell("cat /tmp/hooks");
    let tmp = json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]});
    spec["mounts"].as_array_mut().unwrap().push(tmp);
    spec["annotations"] = json!({"a": "b"});
    spec["hooks"] = json!({"prestart": [{"path": "/no/such"}], "createRuntime": [{"path": "/no/such"}],
        "poststart": [{"path": "/no/such"}], "poststop": [{"path": "/no/such"}],
        "createContainer": hooks(&["(pwd; cat; echo) >>/tmp/hooks", "hostname >>/tmp/hooks"]),
        "startContainer": hooks(&["cat >>/tmp/hooks"])});
    let (exited, text) = agent.run(&spec);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!((exited.status, lines.len()), (0, 4), "{text}");
    let state = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap();
    assert_eq!((lines[0], lines[2]), ("/", "guest"));
    let (create, start) = (state(lines[1]), state(lines[3]));
    assert_eq!(
        (&create["status"], &start["status"]),
        (&json!("creating"), &json!("created"))
    );
    assert_eq!(
        (&create["annotations"]["a"], &start["annotations"]["a"]),
        (&json!("b"), &json!("b"))
    );
    assert_eq!(start["pid"], 1);
    assert_eq!((&create["id"], &create["bundle"]), (&start["id"], &start["bundle"]));
}

#[test]
fn hooks_have_at_most_the_containers_capabilities() {
    let mut agent = Agent::start();
    let mut spec = shell("cat /tmp/hooks");
    let tmp = json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]});
    spec["mounts"].as_array_mut().unwrap().push(tmp);
    let script = "grep -h -e CapEff -e CapBnd /proc/self/status | cut -f2 | uniq >>/tmp/hooks";
    spec["hooks"] = json!({"createContainer": hooks(&[script]), "startContainer": hooks(&[script])});
    // The image's program runs before the device rules apply, and may not leave its root directory.
    for set in ["bounding", "effective", "permitted"] {
        let set = spec["process"]["capabilities"][set].as_array_mut().unwrap();
        set.push(json!("CAP_SYS_CHROOT"));
    }
    assert_eq!(agent.run(&spec).1, "000000000000202b\n000000000804202b\n");
    for set in ["bounding", "effective", "permitted"] {
        let set = spec["process"]["capabilities"][set].as_array_mut().unwrap();
        set.push(json!("CAP_SYS_ADMIN"));
    }
    assert_eq!(agent.run(&spec).1, "000000000824202b\n000000000824202b\n");
}

#[test]
fn failing_hook_is_the_error_of_create_or_start() {
    let mut agent = Agent::start();
    let id = &format!("hooks-{}", unique());
    let mut spec = shell("echo never");
    spec["hooks"] = json!({"createContainer": hooks(&["", "echo a; echo b >&2; exit 3"])});
    let failure = agent.create(id, &spec, Stdio::default()).unwrap_err();
    let expected = "error running createContainer hook #1: exit status 3, stdout: a, stderr: b";
    assert_eq!(failure.message, expected);
    crate::harness::assert_nothing_left(id);

    spec["hooks"] = json!({"startContainer": hooks(&["kill -9 $$"])});
    agent.create(id, &spec, Stdio::default()).unwrap();
    let container = id.clone();
    let failure = agent.ask(Request::StartContainer { container }).unwrap_err();
    let expected = "error running startContainer hook #0: signal: killed, stdout: , stderr: ";
    assert_eq!(failure.message, expected);
    assert_cannot_start(&mut agent, id);
    assert_eq!(agent.exit().status, 1);
    agent.delete(id);
}

#[test]
fn container_whose_start_fails_before_its_hooks_is_stopped() {
    let mut agent = Agent::start();
    let id = &format!("hooks-{}", unique());
    let mut spec = shell("echo never");
    spec["hooks"] = json!({"startContainer": hooks(&["true"])});
    agent.create(id, &spec, Stdio::default()).unwrap();
    // A socket cannot be opened like the FIFO.
    let fifo = Path::new(CONTAINERS_PATH).join(id).join("starting");
    fs::remove_file(&fifo).unwrap();
    let _socket = UnixListener::bind(&fifo).unwrap();

    let container = id.clone();
    let failure = agent.ask(Request::StartContainer { container }).unwrap_err();

    assert!(failure.message.contains("open the FIFO"), "{failure:?}");
    assert_cannot_start(&mut agent, id);
    assert_eq!(agent.exit().status, 137);
    agent.delete(id);
}

fn assert_cannot_start(agent: &mut Agent, id: &str) {
    let container = id.to_owned();
    let failure = agent.ask(Request::StartContainer { container }).unwrap_err();
    assert_eq!(failure.message, format!("container {id} is stopped"));
}

#[test]
fn error_names_the_mount_that_failed() {
    let mut agent = Agent::start();
    let mut spec = spec(&["/bin/true"]);
    spec["mounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"destination": "/data", "type": "bind", "source": "/no/such/volume", "options": ["rbind"]}));
    let failure = agent.create("mount-fails", &spec, Stdio::default()).unwrap_err();
    assert!(failure.message.contains("/no/such/volume"), "{failure:?}");
    assert!(failure.message.contains("No such file or directory"), "{failure:?}");
    crate::harness::assert_nothing_left("mount-fails");
}

#[test]
fn error_names_the_working_directory_that_cannot_be_entered() {
    let mut agent = Agent::start();
    let mut spec = spec(&["/bin/true"]);
    spec["process"]["cwd"] = json!("/etc/passwd");
    let failure = agent.create("cwd-fails", &spec, Stdio::default()).unwrap_err();
    assert_eq!(
        failure.message,
        r#"chdir to cwd ("/etc/passwd") set in config.json failed: not a directory"#
    );
}

#[test]
fn volume_is_bind_mounted_from_the_share() {
    let mut agent = Agent::start();
    let volume = format!("{}/volume-{}", nutshell_protocol::SHARE_PATH, unique());
    fs::create_dir_all(&volume).unwrap();
    fs::write(format!("{volume}/in"), "from outside\n").unwrap();
    let mut spec = shell("cat /data/in; echo x >/data/out; echo y 2>/dev/null >/ro/in || echo read-only");
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/data", "type": "bind", "source": volume, "options": ["rbind", "rw"]}));
    mounts.push(json!({"destination": "/ro", "type": "bind", "source": volume, "options": ["rbind", "ro"]}));
    let (_, text) = agent.run(&spec);
    assert_eq!(text, "from outside\nread-only\n");
    assert_eq!(fs::read_to_string(format!("{volume}/out")).unwrap(), "x\n");
}
