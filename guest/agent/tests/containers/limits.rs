//! Tests of cgroups: limits, statistics, out-of-memory events and the freezer.

use std::fs;
use std::io::Read;

use nutshell_protocol::{ContainerStats, Event, FailureKind, Request, Response, Stdio};
use serde_json::json;

use crate::harness::{Agent, process, shell, unique};

fn stats(agent: &mut Agent, id: &str) -> ContainerStats {
    match agent.ask(Request::Stats {
        container: id.to_owned(),
    }) {
        Ok(Response::Stats(stats)) => *stats,
        other => panic!("{other:?} instead of stats"),
    }
}

fn cgroup_file(id: &str, name: &str) -> String {
    fs::read_to_string(format!("/sys/fs/cgroup/container-{id}/{name}"))
        .unwrap()
        .trim()
        .to_owned()
}

#[test]
fn out_of_memory_event_precedes_the_exit_of_the_container() {
    let mut agent = Agent::start();
    let id = &format!("oom-{}", unique());
    let mut spec = shell("x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done");
    spec["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
    agent.create(id, &spec, Stdio::default()).unwrap();
    agent.start_container(id);
    assert_eq!(agent.event(), Event::OutOfMemory { container: id.clone() });
    assert_eq!(agent.exit().status, 137);
    assert_eq!(stats(&mut agent, id).memory_events.oom_kill, 1);
    agent.delete(id);
}

#[test]
fn out_of_memory_event_of_a_child_is_sent_while_the_container_runs() {
    let mut agent = Agent::start();
    let id = &format!("oom-child-{}", unique());
    let mut spec = shell("sh -c 'x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done'; sleep 1000");
    spec["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
    agent.create(id, &spec, Stdio::default()).unwrap();
    agent.start_container(id);
    assert_eq!(agent.event(), Event::OutOfMemory { container: id.clone() });
    agent.kill(id, 9).unwrap();
    assert_eq!(agent.exit().status, 137);
    agent.delete(id);
}

#[test]
fn containers_do_not_inherit_the_agents_oom_score() {
    let mut agent = Agent::start();
    let (_, text) = agent.run(&shell("cat /proc/self/oom_score_adj"));
    assert_eq!(text, "0\n");
    let mut spec = shell("cat /proc/self/oom_score_adj");
    spec["process"]["oomScoreAdj"] = json!(300);
    assert_eq!(agent.run(&spec).1, "300\n");
}

#[test]
fn limits_are_applied_by_create_and_update() {
    let mut agent = Agent::start();
    let id = &format!("limits-{}", unique());
    let mut spec = shell("sleep 1000");
    spec["linux"]["resources"] = json!({
        "memory": {"limit": 64 << 20},
        "cpu": {"shares": 512, "quota": 20000, "period": 100_000, "cpus": "99", "mems": "7"},
        "pids": {"limit": 50},
        "hugepageLimits": [{"pageSize": "512GB", "limit": 0}],
        "blockIO": {"throttleReadBpsDevice": [{"major": 250, "minor": 77, "rate": 1}]},
        "unified": {"memory.high": "50000000"},
    });
    agent.create(id, &spec, Stdio::default()).unwrap();
    let files = |id: &str| ["memory.max", "cpu.max", "pids.max"].map(|name| cgroup_file(id, name));
    assert_eq!(files(id), ["67108864", "20000 100000", "50"]);
    assert_eq!(cgroup_file(id, "memory.high"), "49999872");
    let resources =
        json!({"memory": {"limit": 128 << 20}, "cpu": {"quota": 50000, "period": 100_000}, "pids": {"limit": 70}});
    let update = |resources: Vec<u8>| Request::Update {
        container: id.clone(),
        resources,
    };
    assert_eq!(agent.ask(update(resources.to_string().into())), Ok(Response::Done));
    assert_eq!(files(id), ["134217728", "50000 100000", "70"]);
    assert_eq!(
        agent.ask(update(b"junk".into())).unwrap_err().kind,
        FailureKind::InvalidArgument
    );
    agent.delete(id);
    agent.exit();
}

#[test]
fn stats_contain_the_containers_usage() {
    let mut agent = Agent::start();
    let id = &format!("stats-{}", unique());
    let output = agent.listen();
    let stdio = Stdio {
        stdout: Some(output.port),
        ..Stdio::default()
    };
    let mut spec = shell("dd if=/dev/zero of=/run/file bs=1M count=4 2>/dev/null; echo done; sleep 1000");
    spec["linux"]["resources"] = json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 50}});
    agent.create(id, &spec, stdio).unwrap();
    assert_eq!(stats(&mut agent, id).pids.current, 1);
    agent.start_container(id);
    output.accept().read_exact(&mut [0; 5]).unwrap();
    let stats = stats(&mut agent, id);
    assert!(stats.cpu.usage_usec > 0);
    assert!(stats.memory.usage > 4 << 20, "{}", stats.memory.usage);
    assert_eq!(stats.memory.usage_limit, 64 << 20);
    assert!(
        stats
            .memory
            .stat
            .iter()
            .any(|(key, value)| key == "shmem" && *value >= 4 << 20)
    );
    assert_eq!((stats.pids.limit, stats.network.len()), (50, 0));
    agent.kill(id, 9).unwrap();
    agent.exit();
    agent.delete(id);
}

#[test]
fn paused_container_uses_no_cpu_and_accepts_no_exec_until_resumed() {
    let mut agent = Agent::start();
    let id = &format!("paused-{}", unique());
    agent
        .create(id, &shell("while :; do :; done"), Stdio::default())
        .unwrap();
    agent.start_container(id);
    let container = || id.clone();
    assert_eq!(
        agent.ask(Request::Resume { container: container() }).unwrap_err().kind,
        FailureKind::FailedPrecondition
    );
    assert_eq!(agent.ask(Request::Pause { container: container() }), Ok(Response::Done));
    assert!(cgroup_file(id, "cgroup.events").contains("frozen 1"));
    let used = stats(&mut agent, id).cpu.usage_usec;
    assert_eq!(stats(&mut agent, id).cpu.usage_usec, used);
    let failure = agent
        .exec(id, "x", &process(&["/bin/true"]), Stdio::default())
        .unwrap_err();
    assert_eq!(failure.kind, FailureKind::FailedPrecondition);
    assert_eq!(
        agent.ask(Request::Resume { container: container() }),
        Ok(Response::Done)
    );
    assert!(cgroup_file(id, "cgroup.events").contains("frozen 0"));
    assert_eq!(agent.ask(Request::Pause { container: container() }), Ok(Response::Done));
    agent.kill(id, 9).unwrap();
    assert_eq!(agent.exit().status, 137);
    agent.delete(id);
}
