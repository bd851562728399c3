//! Tests of execs: additional processes in a running container.

use std::io::{Read, Write};

use nutshell_protocol::{FailureKind, PidNamespace, ProcessEntry, Request, Response, StartExec, Stdio};
use serde_json::{Value, json};

use crate::harness::{Agent, create_request, process, shell, unique};

/// Starts a container that sleeps until it is killed, and returns its id.
fn start_sleeper(agent: &mut Agent) -> String {
    start_container(agent, &shell("sleep 1000"))
}

fn start_container(agent: &mut Agent, spec: &Value) -> String {
    let id = format!("sleeper-{}", unique());
    agent.create(&id, spec, Stdio::default()).unwrap();
    agent.start_container(&id);
    id
}

fn stop(agent: &mut Agent, id: &str) {
    agent.kill(id, 9).unwrap();
    assert_eq!(agent.exit().status, 137);
    agent.delete(id);
}

/// Runs an exec until it ends. Returns its exit status and output.
fn run_exec(agent: &mut Agent, id: &str, process: &Value) -> (u8, String) {
    let exec = format!("exec-{}", unique());
    let output = agent.listen();
    let stdio = Stdio {
        stdout: Some(output.port),
        ..Stdio::default()
    };
    agent.exec(id, &exec, process, stdio).unwrap();
    let mut text = String::new();
    output.accept().read_to_string(&mut text).unwrap();
    let exited = agent.exit();
    assert_eq!(
        (exited.container.as_str(), exited.exec.as_deref()),
        (id, Some(exec.as_str()))
    );
    assert_eq!(exited.stdout_bytes, text.len() as u64);
    (exited.status, text)
}

#[test]
fn exec_runs_in_the_containers_namespaces_and_cgroup() {
    let mut agent = Agent::start();
    let id = &start_sleeper(&mut agent);
    let script =
        "hostname; cat /proc/1/cmdline | tr '\\0' ' '; cat /proc/self/cgroup; ls /proc/self/fd | wc -l; exit 5";
    let (status, text) = run_exec(&mut agent, id, &process(&["/bin/sh", "-c", script]));
    assert_eq!(status, 5);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "guest");
    // The container's shell may not have executed `sleep` yet, so only the end of its command line is fixed. The
    // cgroup is the root of the container's cgroup namespace.
    assert!(lines[1].ends_with("sleep 1000 0::/"), "{}", lines[1]);
    // Only the standard streams are open, and the directory that `ls` reads.
    assert_eq!(lines[2], "4");
    stop(&mut agent, id);
}

#[test]
fn failed_exec_has_runcs_error_and_its_id_can_be_reused() {
    let mut agent = Agent::start();
    let id = &start_sleeper(&mut agent);
    let mut missing_cwd = process(&["/bin/true"]);
    missing_cwd["cwd"] = json!("/x");
    let table = [
        (
            process(&["nosuch"]),
            r#"exec: "nosuch": executable file not found in $PATH"#,
        ),
        (
            process(&["/no/such"]),
            r#"exec: "/no/such": stat /no/such: no such file or directory"#,
        ),
        (process(&["/etc/passwd"]), r#"exec: "/etc/passwd": permission denied"#),
        (
            missing_cwd,
            r#"chdir to cwd ("/x") set in config.json failed: no such file or directory"#,
        ),
        (process(&["/bad-format"]), "exec /bad-format: exec format error"),
    ];
    run_exec(
        &mut agent,
        id,
        &process(&["/bin/sh", "-c", "echo junk >/bad-format; chmod +x /bad-format"]),
    );
    for (process, expected) in &table {
        let failure = agent.exec(id, "same", process, Stdio::default()).unwrap_err();
        assert_eq!(failure.message, *expected);
    }
    agent
        .exec(id, "same", &process(&["/bin/true"]), Stdio::default())
        .unwrap();
    assert_eq!(agent.exit().status, 0);
    stop(&mut agent, id);
}

#[test]
fn exec_has_exactly_the_users_privileges() {
    let mut agent = Agent::start();
    let id = &start_sleeper(&mut agent);
    let mut process = process(&[
        "/bin/sh",
        "-c",
        "id; pwd; echo $HOME; umask; grep -e Cap -e NoNew /proc/self/status; ulimit -n; echo ok >/dev/stdout",
    ]);
    process["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [7], "umask": 0o27});
    process["cwd"] = json!("/var");
    let (status, text) = run_exec(&mut agent, id, &process);
    let expected = "uid=1000(web) gid=1000 groups=7\n/var\n/var\n0027\n\
        CapInh:\t0000000000000000\nCapPrm:\t0000000000000000\nCapEff:\t0000000000000000\n\
        CapBnd:\t000000000800202b\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1\n1024\nok\n";
    assert_eq!((status, text.as_str()), (0, expected));
    stop(&mut agent, id);
}

#[test]
fn exec_has_the_containers_seccomp_filter() {
    let mut agent = Agent::start();
    for no_new_privileges in [true, false] {
        let mut spec = shell("sleep 1000");
        spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
        });
        let id = &start_container(&mut agent, &spec);
        for user in [0, 1000] {
            let mut process = process(&["/bin/sh", "-c", "mkdir /tmp/new 2>&1; grep Seccomp: /proc/self/status"]);
            process["noNewPrivileges"] = json!(no_new_privileges);
            process["user"] = json!({"uid": user, "gid": user});
            let (_, text) = run_exec(&mut agent, id, &process);
            assert!(
                text.contains("not supported") && text.contains("Seccomp:\t2"),
                "no_new_privs {no_new_privileges}, user {user}: {text}"
            );
        }
        stop(&mut agent, id);
    }
}

#[test]
fn exec_with_terminal_has_its_size_and_streams() {
    let mut agent = Agent::start();
    let id = &start_sleeper(&mut agent);
    let (input, output) = (agent.listen(), agent.listen());
    let stdio = Stdio {
        stdin: Some(input.port),
        stdout: Some(output.port),
        stderr: None,
        terminal: true,
        size: Some((120, 40)),
    };
    let process = process(&["/bin/sh", "-c", "stty size; read x; stty size; echo got $x"]);
    agent.exec(id, "tty", &process, stdio).unwrap();
    let (mut input, mut output) = (input.accept(), output.accept());
    let mut first = [0; "40 120\r\n".len()];
    output.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"40 120\r\n");
    let resize = Request::Resize {
        container: id.clone(),
        exec: Some("tty".to_owned()),
        width: 10,
        height: 20,
    };
    assert_eq!(agent.ask(resize), Ok(Response::Done));
    input.write_all(b"y\n").unwrap();
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert_eq!(text, "y\r\n20 10\r\ngot y\r\n");
    assert_eq!(agent.exit().status, 0);
    stop(&mut agent, id);
}

#[test]
fn list_of_processes_names_execs() {
    let mut agent = Agent::start();
    let id = &start_sleeper(&mut agent);
    let pid = agent
        .exec(id, "second", &process(&["/bin/sleep", "1000"]), Stdio::default())
        .unwrap();
    let Ok(Response::Processes(found)) = agent.ask(Request::Processes { container: id.clone() }) else {
        panic!("the response is not a list of processes");
    };
    let execs: Vec<_> = found.iter().filter(|entry| entry.exec.is_some()).collect();
    let expected = ProcessEntry {
        pid,
        exec: Some("second".to_owned()),
    };
    assert_eq!(execs, [&expected]);
    assert!(found.len() >= 2);
    let signal = Request::Signal {
        container: id.clone(),
        exec: Some("second".to_owned()),
        signal: 15,
        all: false,
    };
    assert_eq!(agent.ask(signal.clone()), Ok(Response::Done));
    let exited = agent.exit();
    assert_eq!((exited.exec.as_deref(), exited.status), (Some("second"), 143));
    let failure = agent.ask(signal).unwrap_err();
    assert_eq!(
        (failure.kind, failure.message.as_str()),
        (FailureKind::NotFound, "process already finished")
    );
    stop(&mut agent, id);
}

#[test]
fn exits_of_execs_are_reported_before_their_containers() {
    let mut agent = Agent::start();
    let other = start_container(&mut agent, &shell("sleep 1000"));
    for namespace in [PidNamespace::Specified, PidNamespace::Container(other.clone())] {
        let id = &format!("sleeper-{}", unique());
        let mut request = create_request(id, &shell("sleep 1000"), Stdio::default());
        let Request::CreateContainer(create) = &mut request else {
            unreachable!("{request:?} creates no container");
        };
        create.pid_namespace = namespace;
        agent.ask(request).unwrap();
        agent.start_container(id);
        for exec in ["a", "b", "c"] {
            agent
                .exec(id, exec, &process(&["/bin/sleep", "1000"]), Stdio::default())
                .unwrap();
        }
        agent.kill(id, 9).unwrap();
        let mut order: Vec<Option<String>> = (0..4).map(|_| agent.exit().exec).collect();
        assert_eq!(order.pop(), Some(None));
        order.sort();
        assert_eq!(order, ["a", "b", "c"].map(|exec| Some(exec.to_owned())));
        let failure = agent
            .exec(id, "late", &process(&["/bin/true"]), Stdio::default())
            .unwrap_err();
        assert_eq!(failure.kind, FailureKind::FailedPrecondition);
        agent.delete(id);
    }
    stop(&mut agent, &other);
}

#[test]
fn exec_enters_the_user_namespace() {
    let mut agent = Agent::start();
    let mut spec = shell("sleep 1000");
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    spec["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "user"}));
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    let id = &start_container(&mut agent, &spec);
    let mut process = process(&["/bin/sh", "-c", "id -u; cat /proc/self/uid_map; echo x >/dev/stdout"]);
    process["user"] = json!({"uid": 1000, "gid": 1000});
    let (status, text) = run_exec(&mut agent, id, &process);
    let words: Vec<&str> = text.split_whitespace().collect();
    assert_eq!((status, words), (0, vec!["1000", "0", "100000", "65536", "x"]));
    stop(&mut agent, id);
}

#[test]
fn exec_joins_the_first_process_in_a_child_cgroup() {
    let mut agent = Agent::start();
    let script = "mkdir /sys/fs/cgroup/below; echo 1 >/sys/fs/cgroup/below/cgroup.procs; \
        echo +pids >/sys/fs/cgroup/cgroup.subtree_control; exec sleep 1000";
    let mut spec = shell(script);
    spec["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "cgroup"}));
    spec["mounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["rw"]}));
    let id = &start_container(&mut agent, &spec);
    let below = format!("/sys/fs/cgroup/container-{id}/cgroup.subtree_control");
    while std::fs::read_to_string(&below).unwrap().trim() != "pids" {}
    let (status, text) = run_exec(&mut agent, id, &process(&["/bin/cat", "/proc/self/cgroup"]));
    assert_eq!((status, text.as_str()), (0, "0::/below\n"));
    stop(&mut agent, id);
}

#[test]
fn every_exit_of_many_execs_is_reported() {
    let mut agent = Agent::start();
    let id = &start_sleeper(&mut agent);
    let request = |number: u32| {
        Request::StartExec(StartExec {
            container: id.clone(),
            exec: format!("e{number}"),
            process: process(&["/bin/sh", "-c", &format!("exit {number}")])
                .to_string()
                .into_bytes(),
            stdio: Stdio::default(),
        })
    };
    let requests: Vec<u64> = (1..=40).map(|number| agent.send(request(number))).collect();
    for request in requests {
        agent.reply(request).unwrap();
    }
    let mut ended: Vec<(String, u8)> = (1..=40)
        .map(|_| agent.exit())
        .map(|exited| (exited.exec.unwrap(), exited.status))
        .collect();
    ended.sort_by_key(|(_, status)| *status);
    let expected: Vec<(String, u8)> = (1..=40).map(|number| (format!("e{number}"), number)).collect();
    assert_eq!(ended, expected);
    stop(&mut agent, id);
}

#[test]
fn starting_execs_are_settled_before_the_exit_of_their_container() {
    let mut agent = Agent::start();
    for _ in 0..5 {
        let id = &start_sleeper(&mut agent);
        let request = |number: u32| {
            Request::StartExec(StartExec {
                container: id.clone(),
                exec: format!("e{number}"),
                process: process(&["/bin/sleep", "1000"]).to_string().into_bytes(),
                stdio: Stdio::default(),
            })
        };
        let requests: Vec<u64> = (0..6).map(|number| agent.send(request(number))).collect();
        agent.kill(id, 9).unwrap();
        let created = requests
            .into_iter()
            .filter(|request| agent.reply(*request).is_ok())
            .count();
        for _ in 0..created {
            let exited = agent.exit();
            assert!(exited.exec.is_some() && exited.status == 137, "{exited:?}");
        }
        assert_eq!(agent.exit().exec, None);
        agent.delete(id);
    }
}

#[test]
fn exec_id_in_use_is_refused() {
    let mut agent = Agent::start();
    let id = &start_sleeper(&mut agent);
    agent
        .exec(id, "x", &process(&["/bin/sleep", "1000"]), Stdio::default())
        .unwrap();
    let failure = agent
        .exec(id, "x", &process(&["/bin/true"]), Stdio::default())
        .unwrap_err();
    assert_eq!(failure.kind, FailureKind::AlreadyExists);
    agent.kill(id, 9).unwrap();
    assert_eq!(
        [agent.exit().exec.as_deref(), agent.exit().exec.as_deref()],
        [Some("x"), None]
    );
    agent.delete(id);
}
