//! Tests of processes that SIGKILL does not end, because they wait for a file system that does not answer.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nutshell_fixtures::HungVolume;
use nutshell_protocol::{BlockedThread, DELETION_KILL_TIMEOUT, FailureKind, Request, Response, SHARE_PATH, Stdio};
use serde_json::json;

use crate::harness::{Agent, create_request, shell, unique};

/// How long the kernel may take for a step.
const TIMEOUT: Duration = Duration::from_secs(60);

fn blocked_threads(agent: &mut Agent, id: &str, exec: Option<&str>) -> Vec<BlockedThread> {
    let request = Request::BlockedThreads {
        container: id.to_owned(),
        exec: exec.map(str::to_owned),
    };
    match agent.ask(request).unwrap() {
        Response::BlockedThreads(threads) => threads,
        other => panic!("{other:?} instead of threads"),
    }
}

#[test]
fn killed_container_that_waits_for_a_hung_file_system_is_blocked_and_can_be_abandoned() {
    let mut agent = Agent::start();
    agent.run(&shell("true"));
    let id = &format!("blocked-{}", unique());
    let volume = HungVolume::mount(Path::new(SHARE_PATH).join("busybox").join(id));
    // The first process ends only after the one that is blocked.
    let script = format!("cat /{id}/x; true");
    agent.create(id, &shell(&script), Stdio::default()).unwrap();
    agent.start_container(id);
    volume.wait_for_request();
    // A signal still interrupts the wait.
    assert_eq!(blocked_threads(&mut agent, id, None), []);

    agent.kill(id, 9).unwrap();
    let deadline = Instant::now() + TIMEOUT;
    let mut before = Vec::new();
    let threads = loop {
        let threads = blocked_threads(&mut agent, id, None);
        if !threads.is_empty() && threads == before {
            break threads;
        }
        assert!(Instant::now() < deadline, "the threads are not blocked: {threads:?}");
        before = threads;
    };
    let names: Vec<_> = threads.iter().map(|thread| thread.name.as_str()).collect();
    assert!(names.contains(&"cat"), "{threads:?}");
    assert_eq!(blocked_threads(&mut agent, id, Some("none")), []);

    let container = id.clone();
    assert_eq!(agent.ask(Request::AbandonContainer { container }), Ok(Response::Done));
    let container = id.clone();
    let failure = agent.ask(Request::DeleteContainer { container }).unwrap_err();
    assert_eq!(failure.kind, FailureKind::NotFound);
    assert!(!Path::new("/run/nutshell/state").join(id).exists());
    let cgroup = Path::new("/sys/fs/cgroup").join(format!("container-{id}"));
    assert!(cgroup.exists(), "the cgroup of a blocked process was removed");

    drop(volume);
    let deadline = Instant::now() + TIMEOUT;
    while fs::remove_dir(&cgroup).is_err() {
        assert!(Instant::now() < deadline, "the process did not end");
    }
    // The next exit is that of another container.
    agent.run(&shell("true"));
    crate::harness::assert_nothing_left(id);
}

/// Whether SIGKILL is pending for a process (proc(5)).
fn is_killed(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let pending = |line: &str| u64::from_str_radix(line.split_once("Pnd:")?.1.trim(), 16).ok();
    status
        .lines()
        .filter_map(pending)
        .any(|signals| signals & (1 << 8) != 0)
}

#[test]
fn agent_serves_requests_while_it_deletes_a_container_that_it_could_not_create() {
    let mut agent = Agent::start();
    agent.run(&shell("true"));
    let id = &format!("discarded-{}", unique());
    let root = Path::new(SHARE_PATH).join("busybox");
    let volume = HungVolume::mount(root.join(id));
    let gate = root.join(format!("{id}-gate"));
    assert!(Command::new("mkfifo").arg(&gate).status().unwrap().success());
    let mut spec = shell("true");
    let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", format!("read line </{id}-gate")]});
    spec["hooks"] = json!({"createContainer": [hook]});
    let creation = agent.send(create_request(id, &spec, Stdio::default()));
    // Returns when the hook opens it: the container has its cgroup.
    let mut opened_gate = File::options().write(true).open(&gate).unwrap();
    let cgroup = Path::new("/sys/fs/cgroup").join(format!("container-{id}"));
    let mut blocked = Command::new("cat").arg(root.join(id).join("x")).spawn().unwrap();
    volume.wait_for_request();
    fs::write(cgroup.join("cgroup.procs"), blocked.id().to_string()).unwrap();
    // The agent cannot open a socket like a file.
    let socket = root.join(format!("{id}-socket"));
    let _listener = UnixListener::bind(&socket).unwrap();
    let events = cgroup.join("memory.events");
    let mount = |program: &str, arguments: &[&Path]| {
        assert!(Command::new(program).args(arguments).status().unwrap().success());
    };
    mount("mount", &[Path::new("--bind"), &socket, &events]);

    opened_gate.write_all(b"go\n").unwrap();
    let deadline = Instant::now() + TIMEOUT;
    while !is_killed(blocked.id()) {
        assert!(Instant::now() < deadline, "the agent does not kill the container");
    }
    let asked = Instant::now();
    agent.ask(Request::ReadClock).unwrap();
    let answered = asked.elapsed();

    mount("umount", &[&events]);
    drop(volume);
    blocked.wait().unwrap();
    let failure = agent.reply(creation).unwrap_err();
    assert!(failure.message.contains("open memory.events"), "{failure:?}");
    assert!(!failure.message.contains("deletion failed"), "{failure:?}");
    assert!(answered < DELETION_KILL_TIMEOUT / 2, "{answered:?}");
    crate::harness::assert_nothing_left(id);
    for path in [gate, socket] {
        fs::remove_file(path).unwrap();
    }
}

#[test]
fn abandoned_container_whose_processes_end_is_deleted() {
    let mut agent = Agent::start();
    let id = &format!("abandoned-{}", unique());
    agent.create(id, &shell("sleep 1000"), Stdio::default()).unwrap();
    agent.start_container(id);
    let container = id.clone();
    assert_eq!(agent.ask(Request::AbandonContainer { container }), Ok(Response::Done));
    crate::harness::assert_nothing_left(id);
}
