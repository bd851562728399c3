//! Execs in a virtual machine whose guest runs the QEMU guest agent.

use std::{
    fs::File,
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    sync::mpsc,
    time::{Duration, Instant},
};

use containerd_shim::protos::{
    api::ExecProcessRequest,
    protobuf::well_known_types::any::Any,
    ttrpc::{self, Code, context},
};
use nix::{sys::stat::Mode, unistd::mkfifo};
use serde_json::{Value, json};

use super::{Shim, error_of, process_exists};

/// The pid of processes in the guest.
const PID: u32 = 42;

/// The streams of an exec, each a fifo with this name in the folder of the shim.
#[derive(Default)]
pub(super) struct Streams {
    pub(super) stdin: &'static str,
    pub(super) stdout: &'static str,
    pub(super) stderr: &'static str,
    pub(super) terminal: bool,
}

impl Shim {
    fn fifo(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Adds an exec of `process` (OCI `Process`) with these streams to the virtual machine `v1`. Creates the fifos.
    pub(super) async fn add_exec(&self, exec: &str, process: Value, streams: Streams) -> ttrpc::Result<()> {
        let path = |name: &str| match name {
            "" => String::new(),
            name => {
                mkfifo(&self.fifo(name), Mode::S_IRWXU).unwrap();
                self.fifo(name).display().to_string()
            }
        };
        let request = ExecProcessRequest {
            id: "v1".to_owned(),
            exec_id: exec.to_owned(),
            spec: Some(Any {
                value: process.to_string().into_bytes(),
                ..Any::default()
            })
            .into(),
            stdin: path(streams.stdin),
            stdout: path(streams.stdout),
            stderr: path(streams.stderr),
            terminal: streams.terminal,
            ..ExecProcessRequest::default()
        };
        self.task.exec(context::Context::default(), &request).await?;
        Ok(())
    }

    pub(super) fn open_output(&self, name: &str) -> File {
        File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(self.fifo(name))
            .unwrap()
    }
}

pub(super) fn ls() -> Value {
    json!({"args": ["ls", "-l"], "env": ["A=b"], "cwd": "/"})
}

/// The answer to `guest-exec`, with the pid of the started process. `None` for other commands.
fn started(name: &str) -> Option<Value> {
    (name == "guest-exec").then(|| json!({"return": {"pid": PID}}))
}

/// Starts an agent whose process runs until the agent starts a shell, which is expected to kill the process. Returns
/// the command lines of the shells.
fn run_until_killed(shim: &Shim) -> mpsc::Receiver<String> {
    let (sender, commands) = mpsc::channel();
    let mut is_killed = false;
    shim.fake.start_guest_agent(move |name, arguments| {
        if name == "guest-exec" && arguments["path"] == "/bin/sh" {
            is_killed = true;
            let _ = sender.send(arguments["arg"][1].as_str().unwrap().to_owned());
            return Some(json!({"return": {"pid": PID + 1}}));
        }
        started(name).or_else(|| {
            Some(match (arguments["pid"] == PID, is_killed) {
                (true, false) => json!({"return": {"exited": false}}),
                (true, true) => json!({"return": {"exited": true, "signal": 9}}),
                (false, _) => json!({"return": {"exited": true, "exitcode": 0}}),
            })
        })
    });
    commands
}

#[tokio::test]
async fn exec_has_output_exit_status_and_the_events_of_a_containers_exec() {
    let mut shim = Shim::start().await;
    shim.run_vm("v1").await;
    let (sender, commands) = mpsc::channel();
    let mut polls = 0;
    shim.fake.start_guest_agent(move |name, arguments| {
        sender.send((name.to_owned(), arguments.clone())).unwrap();
        started(name).or_else(|| {
            polls += 1;
            Some(match polls {
                1 => json!({"return": {"exited": false}}),
                _ => json!({"return": {"exited": true, "exitcode": 3, "out-data": "b3V0", "err-data": "ZXJy"}}),
            })
        })
    });
    let streams = Streams {
        stdout: "e-out",
        stderr: "e-err",
        ..Streams::default()
    };
    shim.add_exec("e1", ls(), streams).await.unwrap();
    let mut outputs = ["e-out", "e-err"].map(|name| shim.open_output(name));

    let pid = shim.start_task("v1", "e1").await.unwrap();

    assert!(process_exists(pid));
    assert_eq!(shim.wait("v1", "e1").await.unwrap(), 3);
    assert_eq!(shim.delete("v1", "e1").await.unwrap().exit_status, 3);
    assert!(!process_exists(pid));
    let texts = outputs.each_mut().map(|output| {
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        text
    });
    assert_eq!(texts, ["out", "err"]);
    let (name, arguments) = commands.recv().unwrap();
    let expected = json!({"path": "ls", "arg": ["-l"], "env": ["A=b"], "capture-output": true});
    assert_eq!((&name[..], arguments), ("guest-exec", expected));
    let expected = ["create", "start", "exec-added e1", "exec-started e1", "exit e1 3"];
    assert_eq!(shim.next_events(5).await, expected);
    shim.assert_no_more_events().await;
}

#[tokio::test]
async fn exec_without_an_agent_that_answers_fails_in_time() {
    let mut shim = Shim::start().await;
    shim.run_vm("v1").await;
    assert!(shim.fake.has_guest_agent_port());
    shim.fake.open_guest_agent_port();
    let begun = Instant::now();

    let (code, text) = error_of(shim.add_exec("e1", ls(), Streams::default()).await);

    assert_eq!(code, Code::UNIMPLEMENTED);
    assert!(text.contains("guest agent answers. Use its console"), "{text}");
    assert!(begun.elapsed() < Duration::from_secs(2));
    assert_eq!(shim.next_events(2).await, ["create", "start"]);
    shim.assert_no_more_events().await;
}

#[tokio::test]
async fn exec_annotation_none_removes_the_guest_agent_port() {
    let shim = Shim::start().await;
    shim.create_vm("v1", json!({"io.containerd.nutshell.vm.exec": "none"}))
        .await;
    shim.start_task("v1", "").await.unwrap();
    shim.fake.user_boots(1).await;
    assert!(!shim.fake.has_guest_agent_port());
    let (code, _) = error_of(shim.add_exec("e1", ls(), Streams::default()).await);
    assert_eq!(code, Code::UNIMPLEMENTED);
}

#[tokio::test]
async fn exec_that_the_agent_cannot_run_is_refused_with_the_reason() {
    let shim = Shim::start().await;
    shim.run_vm("v1").await;
    shim.fake.start_guest_agent(|name, _| {
        let reason = format!("The command {name} has been disabled");
        Some(json!({"error": {"class": "CommandNotFound", "desc": reason}}))
    });
    let terminal = Streams {
        terminal: true,
        ..Streams::default()
    };
    let (code, text) = error_of(shim.add_exec("e1", ls(), terminal).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("without a terminal only"), "{text}");

    let user = json!({"args": ["ls"], "user": {"uid": 7}});
    for (exec, process, expected) in [
        ("e1", user, "process.user: 7:0"),
        (
            "e2",
            ls(),
            "exec: \"ls\": the QEMU guest agent refuses guest-exec: The command guest-exec has been disabled",
        ),
    ] {
        shim.add_exec(exec, process, Streams::default()).await.unwrap();
        let (_, text) = error_of(shim.start_task("v1", exec).await);
        assert!(text.starts_with("OCI runtime exec failed: exec failed"), "{text}");
        assert!(text.contains(expected), "{text}");
        assert_eq!(shim.delete("v1", exec).await.unwrap().exit_status, 255);
    }
}

#[tokio::test]
async fn sigkill_is_sent_by_a_shell_in_the_guest() {
    let shim = Shim::start().await;
    shim.run_vm("v1").await;
    let commands = run_until_killed(&shim);
    shim.add_exec("e1", ls(), Streams::default()).await.unwrap();
    shim.start_task("v1", "e1").await.unwrap();

    shim.kill("v1", "e1", 9).await.unwrap();

    assert_eq!(shim.wait("v1", "e1").await.unwrap(), 137);
    assert_eq!(commands.recv().unwrap(), "kill -9 42");
}

#[tokio::test]
async fn sigkill_ends_an_exec_whose_agent_no_longer_answers() {
    let shim = Shim::start().await;
    shim.run_vm("v1").await;
    let mut is_started = false;
    shim.fake.start_guest_agent(move |name, _| {
        let answer = started(name).filter(|_| !is_started);
        is_started = true;
        answer
    });
    shim.add_exec("e1", ls(), Streams::default()).await.unwrap();
    shim.start_task("v1", "e1").await.unwrap();
    shim.kill("v1", "e1", 9).await.unwrap();
    let status = shim.wait("v1", "e1").await.unwrap();
    // 255 if the shim first noticed that the agent does not report the status of the process.
    assert!(status == 137 || status == 255, "{status}");
    assert_eq!(shim.status("v1").await, containerd_shim::protos::api::Status::RUNNING);
}

#[tokio::test]
async fn end_of_the_machine_ends_its_execs_before_the_task() {
    let mut shim = Shim::start().await;
    shim.run_vm("v1").await;
    let _commands = run_until_killed(&shim);
    shim.add_exec("e1", ls(), Streams::default()).await.unwrap();
    shim.start_task("v1", "e1").await.unwrap();

    shim.kill("v1", "", 15).await.unwrap();

    assert_eq!(shim.wait("v1", "").await.unwrap(), 0);
    let events = shim.next_events(6).await;
    assert_eq!(events[4..], ["exit e1 137", "exit v1 0"]);
}

#[tokio::test]
async fn process_starts_with_its_whole_standard_input() {
    let shim = Shim::start().await;
    shim.run_vm("v1").await;
    let (sender, inputs) = mpsc::channel();
    shim.fake.start_guest_agent(move |name, arguments| {
        if name == "guest-exec" {
            sender.send(arguments["input-data"].clone()).unwrap();
        }
        started(name).or_else(|| Some(json!({"return": {"exited": true, "exitcode": 0}})))
    });
    let streams = || Streams {
        stdin: "e-in",
        ..Streams::default()
    };
    let open_client = |shim: &Shim| File::options().read(true).write(true).open(shim.fifo("e-in")).unwrap();
    shim.add_exec("e1", ls(), streams()).await.unwrap();
    let mut client = open_client(&shim);
    shim.start_task("v1", "e1").await.unwrap();
    client.write_all(b"in").unwrap();
    assert!(inputs.try_recv().is_err());

    drop(client);

    assert_eq!(shim.wait("v1", "e1").await.unwrap(), 0);
    assert_eq!(inputs.recv().unwrap(), "aW4=");

    // An exec that waits for the end of its standard input can be killed.
    std::fs::remove_file(shim.fifo("e-in")).unwrap();
    shim.add_exec("e2", ls(), streams()).await.unwrap();
    let _client = open_client(&shim);
    shim.start_task("v1", "e2").await.unwrap();
    shim.kill("v1", "e2", 15).await.unwrap();
    assert_eq!(shim.wait("v1", "e2").await.unwrap(), 143);
    assert!(inputs.try_recv().is_err());
}
