//! Guests and vmms that do not answer: each call ends in time and is undone.

use std::time::Instant;

use nutshell_protocol::Request;
use serde_json::Value;

use super::{behaviour::Ignored, *};

fn assert_no_answer<T: std::fmt::Debug>(result: ttrpc::Result<T>) {
    let (_, text) = error_of(result);
    assert!(text.contains("the guest agent did not answer the request to"), "{text}");
}

#[tokio::test]
async fn container_whose_creation_is_not_answered_is_deleted_from_the_guest() {
    let mut shim = Shim::start_with(Behaviour::Ignores(Ignored::CreateContainer)).await;
    shim.create_sandbox("pod").await.unwrap();
    shim.start_sandbox("pod").await.unwrap();
    let request = shim.request_in_pod("c1", "container", |_| {});

    assert_no_answer(shim.task.create(context::Context::default(), &request).await);

    let requests: Vec<_> = shim.fake.requests();
    let position = |wanted: fn(&Request) -> bool| requests.iter().position(wanted);
    let created = position(|request| matches!(request, Request::CreateContainer(create) if create.container == "c1"));
    let deleted = position(|request| matches!(request, Request::DeleteContainer { container } if container == "c1"));
    assert!(created.is_some() && deleted > created, "{requests:?}");
    assert_eq!(error_of(shim.state("c1", "").await).0, Code::NOT_FOUND);
    assert_eq!(shim.events.try_recv().ok().map(|event| summarize(&event)), None);
}

#[tokio::test]
async fn container_whose_start_is_not_answered_is_killed() {
    let mut shim = Shim::start_with(Behaviour::Ignores(Ignored::StartContainer)).await;
    shim.create("c1").await;

    assert_no_answer(shim.start_task("c1", "").await);

    // The guest had started it. Its exit is announced without a start, because Start has failed.
    assert_eq!(shim.wait("c1", "").await.unwrap(), 137);
    assert_eq!(shim.next_events(2).await, ["create", "exit c1 137"]);
    shim.delete("c1", "").await.unwrap();
}

#[tokio::test]
async fn exec_whose_start_is_not_answered_is_killed_and_its_container_is_not() {
    let shim = Shim::start_with(Behaviour::Ignores(Ignored::StartExec)).await;
    shim.run("c1").await;
    shim.exec("c1", "e1", "true").await.unwrap();

    assert_no_answer(shim.start_task("c1", "e1").await);

    let killed = shim.fake.wait_for_request(|request| match request {
        Request::Signal {
            exec,
            signal: 9,
            all: false,
            ..
        } => Some(exec.clone()),
        _ => None,
    });
    assert_eq!(killed.as_deref(), Some("e1"));
    assert_eq!(shim.state("c1", "e1").await.unwrap().status.unwrap(), Status::STOPPED);
    assert_eq!(shim.status("c1").await, Status::RUNNING);
}

#[tokio::test]
async fn stopped_vmm_fails_calls_in_time_and_its_pod_can_be_killed_and_deleted() {
    let shim = Shim::start().await;
    shim.create_sandbox("pod").await.unwrap();
    shim.start_sandbox("pod").await.unwrap();
    shim.run_member("c1").await;
    shim.fake.stop_vmm();
    let grow = |spec: &mut Value| spec["linux"]["resources"] = json!({ "memory": { "limit": 128 << 20 } });

    let start = Instant::now();
    let (_, disk) = error_of(shim.create_in_pod("c2", "container", |_| {}).await);
    let (_, size) = error_of(shim.create_in_pod("c3", "container", grow).await);
    let calls = start.elapsed();
    let start = Instant::now();
    shim.kill("c1", "", 9).await.unwrap();
    assert_eq!(shim.wait("c1", "").await.unwrap(), 137);
    shim.delete("c1", "").await.unwrap();
    shim.stop_sandbox("pod").await.unwrap();
    let end = start.elapsed();

    for error in [disk, size] {
        assert!(error.contains("the vmm did not answer within"), "{error}");
    }
    assert!(calls < Duration::from_secs(10), "{calls:?}");
    assert!(end < Duration::from_secs(6), "{end:?}");
    assert!(!process_exists(shim.fake.vmm_pid()));
}

/// A flush of a disk whose file system hangs, for example.
#[tokio::test]
async fn vmm_that_waits_for_a_disk_does_not_delay_the_end_of_its_pod() {
    let shim = Shim::start_with(Behaviour::WaitsForDisk).await;
    shim.run("c1").await;
    let pid = shim.fake.vmm_pid();

    let start = Instant::now();
    shim.kill("c1", "", 9).await.unwrap();
    assert_eq!(shim.wait("c1", "").await.unwrap(), 137);
    shim.delete("c1", "").await.unwrap();

    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    assert!(process_exists(pid), "the vmm could be killed");
    shim.fake.release_disk();
    // The shim still reaps it.
    while process_exists(pid) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A compromised vmm may fork, and the fork keeps everything open that the vmm had.
#[tokio::test]
async fn fork_of_a_vmm_does_not_delay_the_end_of_its_pod() {
    for vmm_dies in [true, false] {
        let shim = Shim::start_with(Behaviour::OutlivedByFork).await;
        shim.run("c1").await;

        let start = Instant::now();
        if vmm_dies {
            shim.fake.kill_vmm();
        } else {
            shim.kill("c1", "", 9).await.unwrap();
        }
        assert_eq!(shim.wait("c1", "").await.unwrap(), 137);
        shim.delete("c1", "").await.unwrap();

        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        assert!(!process_exists(shim.fake.vmm_pid()));
    }
}
