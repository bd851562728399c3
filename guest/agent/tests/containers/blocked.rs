//! Tests of processes that SIGKILL does not end, because they wait for a file system that does not answer.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nutshell_fixtures::HungVolume;
use nutshell_protocol::{BlockedThread, FailureKind, Request, Response, SHARE_PATH, Stdio};

use crate::harness::{Agent, shell, unique};

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
