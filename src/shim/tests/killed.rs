//! Processes that do not end although the guest has sent them SIGKILL.

use std::time::Instant;

use nutshell_protocol::Request;

use super::{behaviour::Survival, *};

fn count(shim: &Shim, wanted: fn(&Request) -> bool) -> usize {
    shim.fake.requests().iter().filter(|request| wanted(request)).count()
}

fn asks_for_blocked_threads(request: &Request) -> bool {
    matches!(request, Request::BlockedThreads { .. })
}

async fn start_blocked() -> Shim {
    Shim::start_with(Behaviour::SurvivesKill(Survival::Blocked)).await
}

async fn run_exec(shim: &Shim, id: &str) {
    shim.exec(id, "e1", "true").await.unwrap();
    shim.start_task(id, "e1").await.unwrap();
}

#[tokio::test]
async fn blocked_container_ends_with_its_machine() {
    let mut shim = start_blocked().await;
    shim.run("c1").await;

    let start = Instant::now();
    shim.kill("c1", "", 9).await.unwrap();
    assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
    assert_eq!(shim.wait("c1", "").await.unwrap(), 137);
    assert_eq!(shim.delete("c1", "").await.unwrap().exit_status, 137);

    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    assert!(!process_exists(shim.fake.vmm_pid()));
    assert_eq!(
        shim.next_events(4).await,
        ["create", "start", "exit c1 137", "delete c1 137"]
    );
}

#[tokio::test]
async fn blocked_container_that_was_not_started_is_deleted() {
    let shim = start_blocked().await;
    shim.create("c1").await;
    assert_eq!(shim.delete("c1", "").await.unwrap().exit_status, 137);
}

#[tokio::test]
async fn killed_process_that_makes_progress_is_waited_for() {
    // The number of requests in two rounds.
    for (survival, requests) in [(Survival::Running, 2), (Survival::Progressing, 4)] {
        let mut shim = Shim::start_with(Behaviour::SurvivesKill(survival)).await;
        shim.run("c1").await;

        shim.kill("c1", "", 9).await.unwrap();
        shim.kill("c1", "", 9).await.unwrap();
        while count(&shim, asks_for_blocked_threads) < requests {
            let ended = tokio::time::timeout(Duration::from_millis(100), shim.wait("c1", "")).await;
            assert!(ended.is_err(), "{survival:?}: {ended:?}");
        }
        assert_eq!(shim.status("c1").await, Status::RUNNING);
        shim.fake.report_exit("c1", None, 137, [0, 0]);

        assert_eq!(shim.wait("c1", "").await.unwrap(), 137);
        shim.delete("c1", "").await.unwrap();
        assert_eq!(
            shim.next_events(4).await,
            ["create", "start", "exit c1 137", "delete c1 137"]
        );
    }
}

#[tokio::test]
async fn guest_that_reports_progress_forever_does_not_keep_a_killed_process() {
    for survival in [Survival::Running, Survival::Progressing] {
        let shim = Shim::start_with(Behaviour::SurvivesKill(survival)).await;
        shim.create_sandbox("pod").await.unwrap();
        shim.start_sandbox("pod").await.unwrap();
        shim.run_member("c1").await;
        shim.run_member("c2").await;
        let single = Shim::start_with(Behaviour::SurvivesKill(survival)).await;
        single.run("c3").await;

        let start = Instant::now();
        shim.kill("c1", "", 9).await.unwrap();
        single.kill("c3", "", 9).await.unwrap();
        assert_eq!(shim.wait("c1", "").await.unwrap(), 137);
        assert_eq!(single.wait("c3", "").await.unwrap(), 137);
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());

        assert_eq!(shim.delete("c1", "").await.unwrap().exit_status, 137);
        assert_eq!(shim.status("c2").await, Status::RUNNING);
        assert!(!process_exists(single.fake.vmm_pid()));
        shim.stop_sandbox("pod").await.unwrap();
    }
}

#[tokio::test]
async fn blocked_container_of_a_pod_is_left_to_the_guest_and_its_siblings_go_on() {
    let mut shim = start_blocked().await;
    shim.create_sandbox("pod").await.unwrap();
    shim.start_sandbox("pod").await.unwrap();
    shim.run_member("c1").await;
    shim.run_member("c2").await;
    run_exec(&shim, "c1").await;

    shim.kill("c1", "", 9).await.unwrap();
    assert_eq!(shim.wait("c1", "").await.unwrap(), 137);
    // The blocked container ends after all.
    shim.fake.report_exit("c1", Some("e1"), 9, [0, 0]);
    shim.fake.report_exit("c1", None, 9, [0, 0]);
    assert_eq!(shim.delete("c1", "").await.unwrap().exit_status, 137);

    assert_eq!(shim.status("c2").await, Status::RUNNING);
    assert!(process_exists(shim.fake.vmm_pid()));
    assert_eq!(
        shim.next_events(8).await[4..],
        ["exec-added e1", "exec-started e1", "exit e1 137", "exit c1 137"]
    );
    assert_eq!(shim.next_events(1).await, ["delete c1 137"]);
    shim.assert_no_more_events().await;
    assert!(
        count(
            &shim,
            |request| matches!(request, Request::AbandonContainer { container } if container == "c1")
        ) > 0
    );
    assert_eq!(
        count(&shim, |request| matches!(request, Request::DeleteContainer { .. })),
        0
    );
    shim.stop_sandbox("pod").await.unwrap();
    assert!(!process_exists(shim.fake.vmm_pid()));
}

#[tokio::test]
async fn blocked_exec_ends_alone() {
    let mut shim = start_blocked().await;
    shim.run("c1").await;
    run_exec(&shim, "c1").await;

    shim.kill("c1", "e1", 9).await.unwrap();
    assert_eq!(shim.wait("c1", "e1").await.unwrap(), 137);
    shim.fake.report_exit("c1", Some("e1"), 9, [0, 0]);
    shim.delete("c1", "e1").await.unwrap();

    assert_eq!(shim.status("c1").await, Status::RUNNING);
    assert_eq!(
        shim.next_events(5).await[2..],
        ["exec-added e1", "exec-started e1", "exit e1 137"]
    );
    shim.assert_no_more_events().await;
}
