//! Tests of the lifecycle of containers, from create to delete.

use std::io::Read;
use std::path::Path;

use nutshell_protocol::{FailureKind, Request, Response, SHARE_PATH, Stdio};
use serde_json::json;

use crate::harness::{Agent, assert_nothing_left, create_request, shell, spec, unique};

const SIGKILL: u32 = 9;
const SIGUSR1: u32 = 10;
const SIGUSR2: u32 = 12;

#[test]
fn container_runs_and_its_exit_status_is_reported() {
    let mut agent = Agent::start();
    for (script, status) in [("true", 0), ("exit 7", 7)] {
        let (exited, _) = agent.run(&shell(script));
        assert_eq!((exited.status, exited.exec), (status, None), "{script}");
        assert!(exited.exited_at > 0);
    }
}

#[test]
fn all_output_arrives_and_the_exit_reports_its_byte_count() {
    let mut agent = Agent::start();
    let (exited, text) = agent.run(&shell("i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done"));
    assert_eq!(text.lines().count(), 2000);
    assert!(text.ends_with("line 1999\n"));
    assert_eq!(exited.stdout_bytes, text.len() as u64);
    assert_eq!(exited.stderr_bytes, 0);
}

#[test]
fn created_container_does_not_run_before_its_start() {
    let mut agent = Agent::start();
    let id = &format!("created-{}", unique());
    let output = agent.listen();
    let stdio = Stdio {
        stdout: Some(output.port),
        ..Stdio::default()
    };
    let pid = agent.create(id, &shell("echo ran"), stdio).unwrap();
    let mut output = output.accept();
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
    // Until the start, libcontainer (of the youki project) waits in the process, under its own name.
    assert!(comm.starts_with("youki"), "{comm}");
    agent.start_container(id);
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert_eq!(text, "ran\n");
    assert_eq!(agent.exit().status, 0);
    agent.delete(id);
}

#[test]
fn kill_of_created_container_reports_the_signal() {
    let mut agent = Agent::start();
    for (signal, all, status) in [(15, false, 143), (9, false, 137), (15, true, 143), (9, true, 137)] {
        let id = &format!("killed-{}", unique());
        agent.create(id, &shell("echo never"), Stdio::default()).unwrap();
        let request = Request::Signal {
            container: id.clone(),
            exec: None,
            signal,
            all,
        };
        assert_eq!(agent.ask(request), Ok(Response::Done));
        assert_eq!(agent.exit().status, status);
        let failure = agent.kill(id, 9).unwrap_err();
        assert_eq!(
            (failure.kind, failure.message.as_str()),
            (FailureKind::NotFound, "process already finished")
        );
        agent.delete(id);
    }
}

#[test]
fn signal_is_delivered_to_the_first_process() {
    let mut agent = Agent::start();
    let id = &format!("signalled-{}", unique());
    let output = agent.listen();
    let stdio = Stdio {
        stdout: Some(output.port),
        ..Stdio::default()
    };
    let script = "trap 'exit 3' USR1; echo ready; while :; do sleep 0.1; done";
    agent.create(id, &shell(script), stdio).unwrap();
    let mut output = output.accept();
    agent.start_container(id);
    let mut line = [0; 6];
    output.read_exact(&mut line).unwrap();
    agent.kill(id, SIGUSR1).unwrap();
    assert_eq!(agent.exit().status, 3);
    agent.delete(id);
}

#[test]
fn signal_to_all_is_delivered_to_every_process() {
    let mut agent = Agent::start();
    // 40 is a real-time signal, and 65 below is above the highest signal, 64.
    for signal in [SIGUSR2, SIGKILL, 40] {
        let id = &format!("all-{}", unique());
        let output = agent.listen();
        let stdio = Stdio {
            stdout: Some(output.port),
            ..Stdio::default()
        };
        // As pid 1 the first process ignores signals that it does not handle. Its children do not.
        let script = "sleep 1000 & sleep 1000 & echo ready; wait; wait; exit 5";
        agent.create(id, &shell(script), stdio).unwrap();
        let mut output = output.accept();
        agent.start_container(id);
        output.read_exact(&mut [0; 6]).unwrap();
        let request = |signal| Request::Signal {
            container: id.clone(),
            exec: None,
            signal,
            all: true,
        };
        assert_eq!(agent.ask(request(65)).unwrap_err().kind, FailureKind::InvalidArgument);
        assert_eq!(agent.ask(request(signal)), Ok(Response::Done));
        assert_eq!(agent.exit().status, if signal == SIGKILL { 137 } else { 5 });
        agent.delete(id);
    }
}

#[test]
fn failed_create_has_runcs_error_and_leaves_nothing() {
    let mut agent = Agent::start();
    let table = [
        (
            spec(&["nosuch"]),
            r#"exec: "nosuch": executable file not found in $PATH"#,
        ),
        (
            spec(&["/no/such"]),
            r#"exec: "/no/such": stat /no/such: no such file or directory"#,
        ),
        (spec(&["/etc/passwd"]), r#"exec: "/etc/passwd": permission denied"#),
    ];
    for (spec, expected) in table {
        let id = &format!("failed-{}", unique());
        let failure = agent.create(id, &spec, Stdio::default()).unwrap_err();
        assert_eq!(failure.message, expected);
        assert_nothing_left(id);
    }
}

#[test]
fn delete_aborts_a_creation_that_hangs() {
    let mut agent = Agent::start();
    let id = &format!("hanging-{}", unique());
    let marker = Path::new(SHARE_PATH).join("busybox").join(id);
    let mut spec = shell("true");
    let script = format!("touch /{id}; sleep 1000");
    let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"]});
    spec["hooks"] = json!({"createContainer": [hook]});
    let creation = agent.send(create_request(id, &spec, Stdio::default()));
    while !marker.exists() {
        // The agent serves other requests meanwhile.
        agent.ask(Request::Processes { container: id.clone() }).unwrap();
    }
    agent.delete(id);
    assert_eq!(agent.reply(creation).unwrap_err().kind, FailureKind::Internal);
}

#[test]
fn container_that_is_being_created_cannot_be_started_or_signalled() {
    let mut agent = Agent::start();
    let id = &format!("early-{}", unique());
    let creation = agent.send(create_request(id, &shell("true"), Stdio::default()));
    let start = agent.send(Request::StartContainer { container: id.clone() });
    let kill = agent.send(Request::Signal {
        container: id.clone(),
        exec: None,
        signal: 9,
        all: false,
    });
    assert_eq!(agent.reply(start).unwrap_err().kind, FailureKind::FailedPrecondition);
    assert_eq!(agent.reply(kill).unwrap_err().kind, FailureKind::NotFound);
    agent.reply(creation).unwrap();
    agent.delete(id);
    assert_eq!(agent.exit().status, 137);
}

#[test]
fn containers_are_created_in_parallel() {
    let mut agent = Agent::start();
    let ids: Vec<String> = (0..8).map(|_| format!("one-of-many-{}", unique())).collect();
    let creations: Vec<u64> = ids
        .iter()
        .map(|id| agent.send(create_request(id, &shell("exit 3"), Stdio::default())))
        .collect();
    for creation in creations {
        agent.reply(creation).unwrap();
    }
    for id in &ids {
        agent.start_container(id);
    }
    let mut ended: Vec<String> = ids
        .iter()
        .map(|_| agent.exit())
        .map(|exited| {
            assert_eq!(exited.status, 3);
            exited.container
        })
        .collect();
    ended.sort();
    let mut expected = ids.clone();
    expected.sort();
    assert_eq!(ended, expected);
    for id in &ids {
        agent.delete(id);
    }
}

#[test]
fn shutdown_removes_running_containers() {
    let mut agent = Agent::start();
    let id = &format!("left-{}", unique());
    agent.create(id, &shell("sleep 1000"), Stdio::default()).unwrap();
    agent.start_container(id);
    assert_eq!(agent.ask(Request::Shutdown), Ok(Response::Done));
    assert_nothing_left(id);
}

#[test]
fn background_process_that_holds_stdout_open_does_not_delay_the_exit() {
    let mut agent = Agent::start();
    let id = &format!("grandchild-{}", unique());
    let output = agent.listen();
    let stdio = Stdio {
        stdout: Some(output.port),
        ..Stdio::default()
    };
    let mut process = crate::harness::process(&["/bin/sh", "-c", "echo early; (sleep 1; echo late) & exit 4"]);
    process["terminal"] = json!(false);
    agent.create(id, &shell("sleep 1000"), Stdio::default()).unwrap();
    agent.start_container(id);
    agent.exec(id, "parent", &process, stdio).unwrap();
    let exited = agent.exit();
    assert_eq!((exited.status, exited.stdout_bytes), (4, 6));
    let mut text = String::new();
    output.accept().read_to_string(&mut text).unwrap();
    assert_eq!(text, "early\nlate\n");
    agent.delete(id);
    assert_eq!(agent.exit().status, 137);
}

#[test]
fn agent_leaks_no_descriptors_or_children() {
    let mut agent = Agent::start();
    agent.run(&shell("true"));
    // Ended jobs may not have been reaped yet.
    while agent.count_resources().1 > 0 {}
    let before = agent.count_resources();
    for round in 0..6 {
        let id = &format!("gone-{}", unique());
        let (input, output) = (agent.listen(), agent.listen());
        let stdio = |terminal| Stdio {
            stdin: Some(input.port),
            stdout: Some(output.port),
            stderr: None,
            terminal,
            size: None,
        };
        let mut spec = shell("read line");
        spec["process"]["terminal"] = json!(round % 2 == 0);
        agent.create(id, &spec, stdio(round % 2 == 0)).unwrap();
        agent.start_container(id);
        agent
            .exec(id, "x", &crate::harness::process(&["/bin/true"]), Stdio::default())
            .unwrap();
        agent
            .exec(id, "y", &crate::harness::process(&["nosuch"]), Stdio::default())
            .unwrap_err();
        assert_eq!(agent.exit().exec.as_deref(), Some("x"));
        if round < 4 {
            agent.kill(id, 9).unwrap();
            agent.exit();
            agent.delete(id);
        } else {
            agent.delete(id);
            agent.exit();
        }
        let failure = agent
            .create(id, &crate::harness::spec(&["nosuch"]), Stdio::default())
            .unwrap_err();
        assert!(failure.message.contains("nosuch"));
    }
    while agent.count_resources().1 > 0 {}
    assert_eq!(agent.count_resources(), before);
}

#[test]
fn unknown_container_is_not_found() {
    let mut agent = Agent::start();
    let container = || "unknown".to_owned();
    for request in [
        Request::StartContainer { container: container() },
        Request::DeleteContainer { container: container() },
        Request::Resize {
            container: container(),
            exec: None,
            width: 1,
            height: 1,
        },
        Request::Signal {
            container: container(),
            exec: None,
            signal: 9,
            all: false,
        },
    ] {
        assert_eq!(agent.ask(request).unwrap_err().kind, FailureKind::NotFound);
    }
}

#[test]
fn container_id_in_use_is_refused() {
    let mut agent = Agent::start();
    let id = &format!("twice-{}", unique());
    agent.create(id, &shell("true"), Stdio::default()).unwrap();
    let failure = agent.create(id, &shell("true"), Stdio::default()).unwrap_err();
    assert_eq!(failure.kind, FailureKind::AlreadyExists);
    agent.delete(id);
    assert_eq!(agent.exit().status, 137);
}
