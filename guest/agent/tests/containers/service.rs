//! Tests of the agent as a service: processes in the machine itself, outside of containers.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};

use nutshell_protocol::{FailureKind, Request, Response, Stdio};
use serde_json::{Value, json};

use crate::harness::{Agent, process, unique};

const ID: &str = "vm";

/// The id and the output of a started process.
struct Started {
    exec: String,
    output: std::fs::File,
    input: std::fs::File,
}

fn start(agent: &mut Agent, process: &Value, terminal: bool) -> Started {
    let exec = format!("exec-{}", unique());
    let (input, output) = (agent.listen(), agent.listen());
    let stdio = Stdio {
        stdin: Some(input.port),
        stdout: Some(output.port),
        stderr: None,
        terminal,
        size: terminal.then_some((91, 17)),
    };
    agent.exec(ID, &exec, process, stdio).unwrap();
    Started {
        exec,
        output: output.accept(),
        input: input.accept(),
    }
}

/// Runs a process to its end. Returns its exit status and output.
fn run(agent: &mut Agent, process: &Value) -> (u8, String) {
    let mut started = start(agent, process, false);
    drop(started.input);
    let mut text = String::new();
    started.output.read_to_string(&mut text).unwrap();
    let exited = agent.exit();
    assert_eq!((exited.container.as_str(), exited.exec), (ID, Some(started.exec)));
    (exited.status, text)
}

fn signal(
    agent: &mut Agent,
    exec: Option<&str>,
    signal: u32,
    all: bool,
) -> Result<Response, nutshell_protocol::Failure> {
    agent.ask(Request::Signal {
        container: ID.to_owned(),
        exec: exec.map(str::to_owned),
        signal,
        all,
    })
}

#[test]
fn process_runs_in_the_namespaces_of_the_agent_as_its_user() {
    let mut agent = Agent::start_service();
    let own = std::fs::read_link("/proc/self/ns/mnt").unwrap();
    let mut settings = process(&[
        "sh",
        "-c",
        "readlink /proc/self/ns/mnt; pwd; echo $HOME $A; grep CapEff /proc/self/status; exit 7",
    ]);
    settings["cwd"] = json!("/tmp");
    settings["env"] = json!(["A=b"]);
    // The capabilities of a container are not those of a login.
    settings["capabilities"] = json!({"effective": [], "bounding": [], "permitted": []});
    let full = std::fs::read_to_string("/proc/self/status").unwrap();
    let full = full.lines().find(|line| line.starts_with("CapEff")).unwrap();
    let expected = format!("{}\n/tmp\n/root b\n{full}\n", own.display());
    assert_eq!(run(&mut agent, &settings), (7, expected));

    settings["args"] = json!(["sh", "-c", "id -u; id -g; id -G; grep CapEff /proc/self/status"]);
    settings["user"] = json!({"uid": 1234, "gid": 2345, "additionalGids": [3456]});
    let expected = "1234\n2345\n2345 3456\nCapEff:\t0000000000000000\n";
    assert_eq!(run(&mut agent, &settings), (0, expected.to_owned()));
}

#[test]
fn process_on_a_terminal_has_its_size_and_follows_changes() {
    let mut agent = Agent::start_service();
    let mut started = start(
        &mut agent,
        &process(&["sh", "-c", "stty size; read line; stty size; tty"]),
        true,
    );
    let mut first = [0; 5];
    started.output.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"17 91");
    let resize = Request::Resize {
        container: ID.to_owned(),
        exec: Some(started.exec.clone()),
        width: 60,
        height: 30,
    };
    assert_eq!(agent.ask(resize), Ok(Response::Done));
    started.input.write_all(b"\n").unwrap();
    let mut text = String::new();
    started.output.read_to_string(&mut text).unwrap();
    for part in ["30 60", "/dev/pts/"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert_eq!(agent.exit().status, 0);
}

#[test]
fn signal_ends_one_process_and_never_the_guest() {
    let mut agent = Agent::start_service();
    let started = start(&mut agent, &process(&["sleep", "1000"]), false);
    for (exec, all) in [(None, false), (None, true), (Some(started.exec.as_str()), true)] {
        let failure = signal(&mut agent, exec, 9, all).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Unimplemented);
    }
    assert_eq!(signal(&mut agent, Some(&started.exec), 15, false), Ok(Response::Done));
    assert_eq!(agent.exit().status, 143);
    let failure = signal(&mut agent, Some(&started.exec), 9, false).unwrap_err();
    assert_eq!(failure.kind, FailureKind::NotFound);
}

#[test]
fn program_that_cannot_be_started_is_an_error_with_its_name() {
    let mut agent = Agent::start_service();
    for (program, cwd, expected) in [
        ("nosuch", "/", "exec: \"nosuch\": executable file not found in $PATH"),
        ("true", "/no/such", "chdir to /no/such"),
    ] {
        let mut settings = process(&[program]);
        settings["cwd"] = json!(cwd);
        let failure = agent.exec(ID, "same", &settings, Stdio::default()).unwrap_err();
        assert!(failure.message.contains(expected), "{failure:?}");
    }
    agent.exec(ID, "same", &process(&["true"]), Stdio::default()).unwrap();
    assert_eq!(agent.exit().status, 0);
}

#[test]
fn connection_is_forwarded_to_a_port_of_the_guest() {
    let mut agent = Agent::start_service();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let stream = agent.listen();
    let id = agent.send(Request::ForwardConnection {
        stream_port: stream.port,
        targets: vec![listener.local_addr().unwrap()],
    });
    let mut host = stream.accept();
    assert_eq!(agent.reply(id), Ok(Response::Done));
    let (mut guest, _) = listener.accept().unwrap();
    host.write_all(b"ping").unwrap();
    let mut bytes = [0; 4];
    guest.read_exact(&mut bytes).unwrap();
    guest.write_all(b"pong").unwrap();
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"pong");
}

#[test]
fn requests_that_concern_containers_or_the_machine_are_refused() {
    let mut agent = Agent::start_service();
    let container = || ID.to_owned();
    for request in [
        Request::StartContainer { container: container() },
        Request::DeleteContainer { container: container() },
        Request::Stats { container: container() },
        Request::SetClock {
            nanoseconds: 0,
            rate: 0,
        },
        Request::Shutdown,
        Request::ReleaseDisk { slot: 0 },
    ] {
        assert_eq!(agent.ask(request).unwrap_err().kind, FailureKind::Unimplemented);
    }
}
