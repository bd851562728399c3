//! The life cycle of a container: State, Start, Wait, Delete, Pids, Connect, Shutdown.

use std::{fs, time::Duration};

use containerd_shim_protos::{
    api::{CheckpointTaskRequest, Empty, Status},
    protobuf::Message,
    shim::oci::ProcessDetails,
    ttrpc::Code,
};
use nutshell_conformance::{
    bundle::{idle, shell, spec},
    container::{SIGKILL, SIGTERM},
    host,
    task::{CallError, CallResult, TaskClient, V2, V3},
    with_fake_containerd,
};

/// The code of a call that fails.
fn code<T: std::fmt::Debug>(answer: CallResult<T>) -> Code {
    answer.unwrap_err().code.expect("no answer")
}

#[test]
fn state_reports_every_field_in_every_phase() {
    with_fake_containerd(|containerd| {
        let container = containerd.create(&shell("trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done"));
        let assert_state = |task: &TaskClient, status: Status| {
            let state = task.state(&container.id, "").unwrap();
            assert_eq!(state.status.enum_value(), Ok(status));
            assert_eq!((state.id.as_str(), state.exec_id.as_str()), (container.id.as_str(), ""));
            assert_eq!(state.bundle, container.bundle.path.display().to_string());
            assert_eq!(state.pid, container.pid);
            assert_eq!(state.stdin, "");
            assert_eq!(state.stdout, container.stdout.path().display().to_string());
            assert_eq!(state.stderr, container.stderr.path().display().to_string());
            assert!(!state.terminal);
            let exited = status == Status::STOPPED;
            assert_eq!(state.exit_status, if exited { 3 } else { 0 });
            assert_eq!(state.exited_at.is_some(), exited);
        };
        for (task, start_after) in [
            (container.task().with_service(V2), false),
            (container.task().with_service(V3), true),
        ] {
            assert_state(&task, Status::CREATED);
            if start_after {
                container.start();
            }
        }
        assert_state(container.task(), Status::RUNNING);
        container.stdout.wait_for("ready");
        container.task().pause(&container.id).unwrap();
        assert_state(container.task(), Status::PAUSED);
        container.task().resume(&container.id).unwrap();
        assert_state(container.task(), Status::RUNNING);
        container.kill(SIGTERM);
        assert_eq!(container.wait(), 3);
        assert_state(container.task(), Status::STOPPED);
        assert!(
            host::is_alive(container.pid),
            "the process of the pid ended before Delete"
        );
        let deleted = container.delete();
        assert_eq!((deleted.pid, deleted.exit_status), (container.pid, 3));
        assert!(deleted.exited_at.is_some());
        assert_eq!(code(container.task().state(&container.id, "")), Code::NOT_FOUND);
        assert_eq!(code(container.task().delete(&container.id, "")), Code::NOT_FOUND);
        container.task().shutdown(&container.id, false).unwrap();
        assert!(host::ends_within(container.shim.pid, Duration::from_secs(10)));
        containerd.delete_bundle(&container.bundle);
        container.bundle.remove();
    });
}

type Call = fn(&TaskClient, &str, &str) -> Result<(), CallError>;

/// Every method with a container id: its name, whether it also takes an exec id, and the call.
const METHODS: [(&str, bool, Call); 14] = [
    ("Start", true, |task, id, exec| task.start(id, exec).map(drop)),
    ("State", true, |task, id, exec| task.state(id, exec).map(drop)),
    ("Delete", true, |task, id, exec| task.delete(id, exec).map(drop)),
    ("Kill", true, |task, id, exec| task.kill(id, exec, SIGKILL).map(drop)),
    ("Kill all", true, |task, id, exec| {
        task.kill_all(id, exec, SIGKILL, true).map(drop)
    }),
    ("ResizePty", true, |task, id, exec| {
        task.resize(id, exec, 80, 24).map(drop)
    }),
    ("CloseIO", true, |task, id, exec| task.close_stdin(id, exec).map(drop)),
    ("Wait", true, |task, id, exec| task.wait(id, exec).map(drop)),
    ("Pids", false, |task, id, _| task.pids(id).map(drop)),
    ("Pause", false, |task, id, _| task.pause(id).map(drop)),
    ("Resume", false, |task, id, _| task.resume(id).map(drop)),
    ("Update", false, |task, id, _| {
        task.update(id, &serde_json::json!({})).map(drop)
    }),
    ("Stats", false, |task, id, _| task.stats(id).map(drop)),
    ("Exec", false, |task, id, _| {
        let request = containerd_shim_protos::api::ExecProcessRequest {
            id: id.to_owned(),
            exec_id: "e".to_owned(),
            ..Default::default()
        };
        task.exec(&request).map(drop)
    }),
];

#[test]
fn unknown_container_or_exec_is_not_found_by_any_method() {
    with_fake_containerd(|containerd| {
        let container = containerd.create(&idle());
        for service in [V2, V3] {
            let task = container.task().with_service(service);
            for (name, takes_exec, call) in METHODS {
                for id in ["unknown", "", "../c1"] {
                    assert_eq!(code(call(&task, id, "")), Code::NOT_FOUND, "{name} of {id:?}");
                }
                if takes_exec {
                    assert_eq!(code(call(&task, &container.id, "unknown")), Code::NOT_FOUND, "{name}");
                }
            }
            let connected = task.connect_to("unknown").unwrap();
            assert_eq!((connected.shim_pid, connected.task_pid), (container.shim.pid, 0));
            let connected = task.connect_to(&container.id).unwrap();
            assert_eq!(
                (connected.shim_pid, connected.task_pid),
                (container.shim.pid, container.pid)
            );
            assert!(!connected.version.is_empty());
            assert!(host::is_alive(connected.shim_pid));
        }
        container.end();
    });
}

#[test]
fn unsupported_methods_fail_with_unimplemented() {
    with_fake_containerd(|containerd| {
        let container = containerd.create(&idle());
        for (service, method) in [
            (V2, "Levitate"),
            (V3, "Levitate"),
            // Methods that containerd never calls.
            ("containerd.runtime.sandbox.v1.Sandbox", "PortForward"),
            ("containerd.runtime.sandbox.v1.Sandbox", "UpdateSandbox"),
            // A service that this shim does not have.
            ("containerd.services.transfer.v1.Transfer", "Transfer"),
        ] {
            let answer = container
                .task()
                .with_service(service)
                .call::<Empty>(method, &Empty::default());
            assert_eq!(code(answer), Code::UNIMPLEMENTED, "{service}/{method}");
        }
        // The ttrpc crate returns this code for a service that containerd does not have either.
        let answer = container
            .task()
            .with_service("no.such.Service")
            .call::<Empty>("Method", &Empty::default());
        assert_eq!(code(answer), Code::INVALID_ARGUMENT);
        for (service, id) in [(V2, container.id.as_str()), (V3, "unknown")] {
            let request = CheckpointTaskRequest {
                id: id.to_owned(),
                path: "/checkpoint".to_owned(),
                ..CheckpointTaskRequest::default()
            };
            let failure = container
                .task()
                .with_service(service)
                .call::<Empty>("Checkpoint", &request);
            let failure = failure.unwrap_err();
            assert_eq!(failure.code, Some(Code::UNIMPLEMENTED));
            assert!(failure.message.contains("checkpoint"), "{failure}");
        }
        container.end();
    });
}

#[test]
fn call_in_the_wrong_phase_fails_and_changes_nothing() {
    with_fake_containerd(|containerd| {
        let container = containerd.create(&shell("trap 'exit 0' TERM; echo ready; while :; do sleep 0.1; done"));
        let task = container.task();
        let refused = |name: &str, answer: Result<(), CallError>| {
            let failure = answer.unwrap_err();
            assert_eq!(failure.code, Some(Code::FAILED_PRECONDITION), "{name}: {failure}");
        };
        let id = container.id.as_str();

        refused("Pause of created", task.pause(id).map(drop));
        refused("Resume of created", task.resume(id).map(drop));
        container.start();
        container.stdout.wait_for("ready");
        refused("Start of running", task.start(id, "").map(drop));
        refused("Resume of running", task.resume(id).map(drop));
        refused("Delete of running", task.delete(id, "").map(drop));
        task.pause(id).unwrap();
        refused("Pause of paused", task.pause(id).map(drop));
        refused("Start of paused", task.start(id, "").map(drop));
        refused("Delete of paused", task.delete(id, "").map(drop));
        let (request, _stdout) = container.exec_request(&["true"]);
        let request = containerd_shim_protos::api::ExecProcessRequest {
            exec_id: "e".to_owned(),
            ..request
        };
        refused("Exec in paused", task.exec(&request).map(drop));
        task.resume(id).unwrap();
        assert_eq!(container.output_of("echo alive"), "alive\n");
        container.kill(SIGTERM);
        assert_eq!(container.wait(), 0);
        refused("Start of stopped", task.start(id, "").map(drop));
        refused("Pause of stopped", task.pause(id).map(drop));
        refused("Resume of stopped", task.resume(id).map(drop));
        refused("Exec in stopped", task.exec(&request).map(drop));
        container.end();
    });
}

#[test]
fn container_that_never_started_has_an_exit_event_and_no_start_event() {
    with_fake_containerd(|containerd| {
        for kill in [true, false] {
            let container = containerd.create(&idle());
            let id = container.id.clone();
            if kill {
                container.kill(SIGTERM);
                assert_eq!(container.wait(), 128 + SIGTERM);
                assert_eq!(container.status(""), Status::STOPPED);
                assert_eq!(code(container.task().start(&id, "")), Code::FAILED_PRECONDITION);
                container.end();
                let events = containerd.events.of_container(&id);
                assert_eq!(events, ["create", "exit 143", "delete 143"]);
            } else {
                let deleted = container.delete();
                assert_eq!((deleted.pid, deleted.exit_status), (container.pid, 137));
                container.task().shutdown(&id, false).unwrap();
                assert!(host::ends_within(container.shim.pid, Duration::from_secs(10)));
                containerd.delete_bundle(&container.bundle);
                container.bundle.remove();
                let events = containerd.events.of_container(&id);
                assert_eq!(events, ["create", "exit 137", "delete 137"]);
            }
        }
    });
}

#[test]
fn wait_before_or_after_the_exit_returns_the_exit_status() {
    with_fake_containerd(|containerd| {
        let container = containerd.create(&shell("sleep 1; exit 42"));
        let other = TaskClient::connect(&container.shim.answer.address, V2);
        std::thread::scope(|scope| {
            let wait = |task: TaskClient| {
                let id = &container.id;
                scope.spawn(move || task.wait(id, "").unwrap())
            };
            let mut waiters: Vec<_> = (0..10).map(|_| wait(container.task().clone())).collect();
            waiters.push(wait(other.clone()));
            // A client that disconnects does not affect the others.
            let gone = other.with_timeout(Duration::from_millis(50)).wait(&container.id, "");
            assert_eq!(gone.unwrap_err().code, None);
            container.start();
            waiters.push(wait(container.task().clone()));
            let exits: Vec<_> = waiters.into_iter().map(|waiter| waiter.join().unwrap()).collect();
            let later = container.task().wait(&container.id, "").unwrap();
            assert_eq!(later.exit_status, 42);
            assert!(later.exited_at.is_some());
            assert!(exits.iter().all(|exit| *exit == later), "{exits:?}");
        });
        container.end();
    });
}

#[test]
fn pids_lists_each_process_once_and_names_the_execs() {
    with_fake_containerd(|containerd| {
        let container = containerd.create(&shell("sleep 1000 & sleep 1000 & echo ready; wait"));
        let list = || -> Vec<(u32, Option<String>)> {
            let pids = container.task().pids(&container.id).unwrap().processes;
            let named = pids.into_iter().map(|process| {
                let exec = process.info.into_option().map(|info| {
                    assert_eq!(info.type_url, "containerd.runc.v1.ProcessDetails");
                    ProcessDetails::parse_from_bytes(&info.value).unwrap().exec_id
                });
                (process.pid, exec)
            });
            named.collect()
        };
        assert_eq!(list(), [(container.pid, None)], "created");
        container.start();
        container.stdout.wait_for("ready");
        let exec = container.exec(&["sh", "-c", "echo ready; exec sleep 1000"]);
        let pid = exec.start();
        exec.stdout.wait_for("ready");

        let listed = list();

        // The shell, its two children, and the exec.
        assert_eq!(listed.len(), 4, "{listed:?}");
        assert!(listed.contains(&(container.pid, None)), "{listed:?}");
        assert!(listed.contains(&(pid, Some(exec.id.clone()))), "{listed:?}");
        let mut distinct: Vec<_> = listed.iter().map(|(pid, _)| pid).collect();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), 4, "{listed:?}");
        container.kill(SIGKILL);
        container.wait();
        assert_eq!(list(), [(container.pid, None)], "stopped");
        container.end();
    });
}

#[test]
fn task_pid_is_in_the_network_namespace_and_cgroup_of_the_container() {
    with_fake_containerd(|containerd| {
        let container = containerd.create(&idle());
        let link = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        assert_ne!(link(&container.pid.to_string()), link("self"));
        let group = fs::read_to_string(format!("/proc/{}/cgroup", container.pid)).unwrap();
        assert_eq!(group.trim(), format!("0::{}", containerd.cgroups_path(&container.id)));
        container.end();
    });
}

/// As with runc, which also drops a `..` that would leave the root.
#[test]
fn relative_cgroup_path_is_below_the_parent_of_the_shims_group() {
    with_fake_containerd(|containerd| {
        let mut spec = idle();
        let prepared = containerd.prepare(&spec);
        let own = fs::read_to_string(format!("/proc/{}/cgroup", prepared.shim.pid)).unwrap();
        let (parent, _) = own.trim().rsplit_once('/').unwrap();
        let name = prepared.bundle.id.clone();
        spec["linux"]["cgroupsPath"] = format!("../{name}").into();
        fs::write(prepared.bundle.path.join("config.json"), spec.to_string()).unwrap();
        let container = prepared.create().unwrap();
        for pid in [&[container.pid], &containerd.pids_of("nutshell-vmm")[..]].concat() {
            let group = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
            assert_eq!(group.trim(), format!("{parent}/{name}"), "{pid}");
        }
        container.end();
    });
}

/// Without its group, nothing would limit the machine.
#[test]
fn cgroup_path_that_names_no_group_is_refused() {
    with_fake_containerd(|containerd| {
        for path in ["/", "..", "a:b", "notaslice:b:c"] {
            let mut spec = idle();
            let prepared = containerd.prepare(&spec);
            spec["linux"]["cgroupsPath"] = path.into();
            fs::write(prepared.bundle.path.join("config.json"), spec.to_string()).unwrap();
            let failure = prepared.shim.task.create(&prepared.request).unwrap_err();
            assert_eq!(failure.code, Some(Code::INVALID_ARGUMENT), "{failure}");
            assert!(failure.message.contains("linux.cgroupsPath"), "{failure}");
            prepared.abandon();
        }
        assert_eq!(containerd.events.all(), []);
    });
}

#[test]
fn shutdown_ends_the_shim_only_after_the_last_delete() {
    with_fake_containerd(|containerd| {
        let container = containerd.create(&idle());
        for _ in 0..2 {
            container.task().shutdown(&container.id, false).unwrap();
        }
        container.start();
        container.task().shutdown(&container.id, false).unwrap();
        assert_eq!(container.output_of("echo alive"), "alive\n");
        container.kill(SIGKILL);
        assert_eq!(container.wait(), 137);
        container.task().shutdown(&container.id, false).unwrap();
        assert_eq!(container.status(""), Status::STOPPED);
        container.end();
    });
}

#[test]
fn forced_shutdown_ends_the_shim_with_its_containers() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        container.task().shutdown(&container.id, true).unwrap();
        assert!(host::ends_within(container.shim.pid, Duration::from_secs(10)));
        containerd.events.wait_for(&container.id, "exit 137");
        assert_eq!(containerd.delete_bundle(&container.bundle).exit_status, 137);
        container.bundle.remove();
    });
}

#[test]
fn concurrent_calls_do_not_interfere() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| container.wait());
            let mut callers = Vec::new();
            for number in 0..4 {
                let container = &container;
                callers.push(scope.spawn(move || {
                    for round in 0..4 {
                        let text = format!("{number}/{round}");
                        assert_eq!(container.output_of(&format!("echo {text}")), text + "\n");
                    }
                }));
                callers.push(scope.spawn(move || {
                    for _ in 0..10 {
                        assert_eq!(container.status(""), Status::RUNNING);
                        assert!(!container.task().pids(&container.id).unwrap().processes.is_empty());
                        assert!(container.task().stats(&container.id).unwrap().pids.current > 0);
                        container.task().connect_to(&container.id).unwrap();
                    }
                }));
            }
            for caller in callers {
                caller.join().unwrap();
            }
            // One Delete succeeds; the others get the same answer or NOT_FOUND.
            container.kill(SIGKILL);
            assert_eq!(waiter.join().unwrap(), 137);
            let deleters: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| container.task().delete(&container.id, "")))
                .collect();
            let answers: Vec<_> = deleters.into_iter().map(|deleter| deleter.join().unwrap()).collect();
            assert!(answers.iter().any(Result::is_ok), "{answers:?}");
            for answer in answers {
                match answer {
                    Ok(deleted) => assert_eq!((deleted.pid, deleted.exit_status), (container.pid, 137)),
                    Err(failure) => assert_eq!(failure.code, Some(Code::NOT_FOUND), "{failure}"),
                }
            }
        });
        container.task().shutdown(&container.id, false).unwrap();
        assert!(host::ends_within(container.shim.pid, Duration::from_secs(10)));
        containerd.delete_bundle(&container.bundle);
        container.bundle.remove();
    });
}

#[test]
fn exit_status_is_that_of_the_process() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        for status in [0, 1, 42, 127, 255] {
            assert_eq!(container.run_script(&format!("exit {status}")).0, status);
        }
        container.end();
        let container = containerd.run(&spec(&["sh", "-c", "exit 255"]));
        assert_eq!(container.wait(), 255);
        container.end();
    });
}
