//! What a spec sets for the container's first process.

use std::fs;

use nutshell_protocol::Stdio;
use serde_json::json;

use crate::harness::{Agent, shell, spec, unique};

#[test]
fn process_has_the_users_rights_and_no_more() {
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
fn signals_that_the_agent_blocks_or_ignores_are_as_new_for_programs() {
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
fn namespaces_and_mounts_are_the_containers_own() {
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
    assert!(mounts < 20, "{mounts} mounts: those of the machine are still there");
    assert!(!text.contains("lost"), "{text}");
}

#[test]
fn root_may_be_read_only() {
    let mut agent = Agent::start();
    let mut spec = shell("echo x >/file || echo refused; echo x >/run/file && echo written");
    spec["root"]["readonly"] = json!(true);
    let (_, text) = agent.run(&spec);
    assert_eq!(text, "refused\nwritten\n");
}

#[test]
fn chroot_does_not_lead_out_of_the_container() {
    let mut agent = Agent::start();
    // Without a change of folder the shell's would stay outside of the new root, from where `..` goes up.
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
fn devices_that_the_rules_forbid_stay_closed() {
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
        (json!([]), "disk open\nnull open\ncontrol open\n1\n"),
    ] {
        spec["linux"]["resources"] = json!({"devices": rules});
        assert_eq!(agent.run(&spec).1, expected, "{rules}");
    }
}

#[test]
fn terminal_belongs_to_the_user() {
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
fn user_namespace_maps_the_user() {
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
fn hooks_of_the_host_are_left_to_it() {
    let mut agent = Agent::start();
    let mut spec = shell("cat /hooks");
    let start = json!([{"path": "/bin/sh", "args": ["sh", "-c", "echo start >/hooks"]}]);
    spec["hooks"] = json!({"prestart": [{"path": "/no/such"}], "createRuntime": [{"path": "/no/such"}],
        "poststart": [{"path": "/no/such"}], "poststop": [{"path": "/no/such"}], "startContainer": start});
    let (exited, text) = agent.run(&spec);
    assert_eq!((exited.status, text.as_str()), (0, "start\n"));
}

#[test]
fn mount_that_fails_is_named() {
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
fn working_folder_that_cannot_be_entered_is_named() {
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
fn volume_is_bound_from_the_share() {
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
