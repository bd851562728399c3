//! `start`, `-info` and `-v` of the executable.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    process::{Command, Stdio},
    time::Duration,
};

use containerd_shim_protos::{
    api::Status,
    protobuf::{Message, well_known_types::any::Any},
    shim::oci::Options,
    types::introspection::RuntimeInfo,
};
use nutshell_conformance::{
    FakeContainerd, TIMEOUT,
    bootstrap::{Caller, StartAnswer, options},
    bundle::{Bundle, idle, spec},
    fake_containerd::{Outcome, executable},
    host,
    task::{TaskClient, V2, V3},
    with_fake_containerd,
};
use serde_json::Value;

/// Ends a shim that has no container, as containerd does after a failed Create, and removes the bundle.
fn shut_down(containerd: &FakeContainerd, bundle: &Bundle, answer: &StartAnswer) {
    let task = TaskClient::connect(&answer.address, V2);
    let pid = task.connect_to(&bundle.id).unwrap().shim_pid;
    task.shutdown(&bundle.id, false).unwrap();
    assert!(host::ends_within(pid, Duration::from_secs(10)));
    assert!(!answer.socket().exists());
    containerd.delete_bundle(bundle);
    bundle.remove();
}

/// Asserts that one shim runs. Retries, because a new child of the shim has the shim's name until it sets its own.
fn assert_one_shim(containerd: &FakeContainerd) {
    let one = host::eventually(TIMEOUT, || match containerd.pids_of("containerd-shim")[..] {
        [_] => Ok(()),
        _ => Err(format!("{:?}", containerd.processes())),
    });
    one.unwrap_or_else(|processes| panic!("not exactly one shim: {processes}"));
}

/// Runtime options of containerd's generic type, with the configuration `body` (field 3).
fn generic_options(body: &str) -> Any {
    let length = u8::try_from(body.len()).unwrap();
    options(
        "runtimeoptions.v1.Options",
        &[&[0x1a, length], body.as_bytes()].concat(),
    )
}

/// The configuration that the suite also writes to `/etc/nutshell/config.toml`.
const CONFIGURATION: &str = "debug = true\n[guest]\nready_timeout_seconds = 60\n";

/// Runtime options of runc's shim.
fn runc_options() -> Any {
    let options_of_runc = Options {
        binary_name: "crun".to_owned(),
        systemd_cgroup: true,
        ..Options::default()
    };
    options("containerd.runc.v1.Options", &options_of_runc.write_to_bytes().unwrap())
}

#[test]
fn start_answers_every_containerd_version_with_an_address_to_connect_to() {
    with_fake_containerd(|containerd| {
        let directory = containerd.folder().join("s");
        let newest = |options, socket_directory| Caller::V2_3 {
            options,
            socket_directory,
        };
        for (caller, version) in [
            (Caller::V1_7(None), 2),
            (Caller::V1_7(Some(runc_options())), 2),
            (Caller::V1_7(Some(generic_options("debug = true"))), 2),
            (Caller::V2_2(None), 2),
            (Caller::V2_2(Some(generic_options("debug = true"))), 2),
            (Caller::V2_2(Some(options("unknown.Options", b"\xff\xff"))), 2),
            (newest(None, None), 3),
            (newest(Some(generic_options("debug = true")), None), 3),
            (newest(Some(runc_options()), None), 3),
            (newest(None, Some(directory.clone())), 3),
        ] {
            let bundle = containerd.bundle(&idle());

            let answer = containerd.start(&bundle, &caller).unwrap();

            assert_eq!(answer.version, version, "{caller:?}");
            for service in [V2, V3] {
                let connected = TaskClient::connect(&answer.address, service)
                    .connect_to(&bundle.id)
                    .unwrap();
                assert!(host::is_alive(connected.shim_pid));
                assert_eq!(connected.task_pid, 0);
            }
            let socket = answer.socket();
            let expected = match &caller {
                Caller::V2_3 {
                    socket_directory: Some(directory),
                    ..
                } => directory.as_path(),
                _ => std::path::Path::new("/run/containerd/s"),
            };
            assert_eq!(socket.parent(), Some(expected));
            let metadata = fs::metadata(&socket).unwrap();
            assert!(metadata.file_type().is_socket());
            assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
            assert_eq!(fs::metadata(expected).unwrap().permissions().mode() & 0o077, 0);
            assert_eq!(fs::read_to_string(bundle.path.join("address")).unwrap(), answer.address);
            shut_down(containerd, &bundle, &answer);
        }
    });
}

#[test]
fn longest_namespace_and_id_get_a_socket() {
    with_fake_containerd(|containerd| {
        let bundle = containerd.bundle_with_id(&"i".repeat(76), &idle());
        let namespace = "n".repeat(76);
        let flags = ["-namespace", &namespace, "-id", &bundle.id];
        let (started, output) = containerd.start_with(&bundle, &Caller::V1_7(None), &flags);
        assert!(started, "{}", String::from_utf8_lossy(&output));
        let answer = Caller::V1_7(None).parse_answer(&output).unwrap();
        shut_down(containerd, &bundle, &answer);
    });
}

#[test]
fn shim_has_its_parents_oom_score_plus_one_and_its_own_session() {
    with_fake_containerd(|containerd| {
        let bundle = containerd.bundle(&idle());
        let shim = containerd.start_shim(&bundle);
        let score = |pid: &str| -> i32 {
            let text = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
            text.trim().parse().unwrap()
        };
        assert_eq!(score(&shim.pid.to_string()), score("self") + 1);
        let stat = fs::read_to_string(format!("/proc/{}/stat", shim.pid)).unwrap();
        // pid (name) state parent group session
        let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        assert_eq!(fields[3], shim.pid.to_string());
        shut_down(containerd, &bundle, &shim.answer);
    });
}

#[test]
fn shim_ignores_termination_signals() {
    with_fake_containerd(|containerd| {
        use rustix::process::Signal;
        let bundle = containerd.bundle(&idle());
        let shim = containerd.start_shim(&bundle);
        for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::USR1, Signal::PIPE] {
            host::signal(shim.pid, signal);
            assert_eq!(shim.task.connect_to("").unwrap().shim_pid, shim.pid);
        }
        shut_down(containerd, &bundle, &shim.answer);
    });
}

#[test]
fn repeated_and_concurrent_starts_return_the_same_shim() {
    with_fake_containerd(|containerd| {
        let bundle = containerd.bundle(&idle());
        let first = containerd.start(&bundle, &Caller::newest()).unwrap();
        let again = containerd.start(&bundle, &Caller::newest()).unwrap();
        assert_eq!(first, again);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| assert_eq!(containerd.start(&bundle, &Caller::newest()).unwrap(), first));
            }
        });
        assert_one_shim(containerd);
        shut_down(containerd, &bundle, &first);
    });
}

#[test]
fn containers_of_a_group_get_the_address_of_one_shim() {
    with_fake_containerd(|containerd| {
        for annotation in [
            "io.containerd.nutshell.v2.group",
            "io.containerd.runc.v2.group",
            "io.kubernetes.cri.sandbox-id",
        ] {
            for caller in [Caller::V1_7(None), Caller::newest()] {
                let group = containerd.new_name("group");
                let bundle = |id: &str| {
                    let mut spec = idle();
                    spec["annotations"][annotation] = group.clone().into();
                    containerd.bundle_with_id(id, &spec)
                };
                let (sandbox, member) = (bundle(&group), bundle(&containerd.new_name("member")));
                let first = containerd.start(&sandbox, &caller).unwrap();
                let second = containerd.start(&member, &caller).unwrap();
                assert_eq!(first, second, "{annotation}");
                assert_eq!(fs::read_to_string(member.path.join("address")).unwrap(), first.address);
                assert_one_shim(containerd);
                member.remove();
                shut_down(containerd, &sandbox, &first);
            }
        }
    });
}

#[test]
fn bundle_without_a_spec_gets_a_shim() {
    with_fake_containerd(|containerd| {
        let bundle = containerd.bundle_without_spec("sandbox");
        let answer = containerd.start(&bundle, &Caller::newest()).unwrap();
        shut_down(containerd, &bundle, &answer);
    });
}

#[test]
fn failing_start_reports_the_cause_in_one_line() {
    with_fake_containerd(|containerd| {
        let generic = |path: &str| {
            let length = u8::try_from(path.len()).unwrap();
            let value = [&[0x12, length], path.as_bytes()].concat();
            Caller::V2_2(Some(options("runtimeoptions.v1.Options", &value)))
        };
        for (caller, flags, reason) in [
            (generic("nutshell.toml"), vec![], "the path must be absolute"),
            (generic("/no/such.toml"), vec![], "/no/such.toml: No such file"),
            (Caller::V2_2(Some(generic_options("speed = 11"))), vec![], "speed"),
            (
                Caller::V1_7(Some(options("runtimeoptions.v1.Options", b"\x1a\xff"))),
                vec![],
                "runtimeoptions.v1.Options",
            ),
            (Caller::V1_7(None), vec!["-id", "../c"], "../c"),
            (Caller::V1_7(None), vec!["-colour", "red"], "-colour"),
            (Caller::V1_7(None), vec!["-namespace", ""], "-namespace is required"),
        ] {
            let bundle = containerd.bundle(&idle());
            let mut all = vec!["-id", &bundle.id];
            all.extend(&flags);
            let (started, output) = containerd.start_with(&bundle, &caller, &all);
            let text = String::from_utf8(output).unwrap();
            assert!(!started && text.contains(reason), "{reason} is not in {text:?}");
            assert_eq!(text.trim_end().lines().count(), 1, "{text:?}");
            containerd.delete_bundle(&bundle);
            bundle.remove();
        }
        let bundle = containerd.bundle(&idle());
        fs::write(bundle.path.join("config.json"), "{\"annotations\": 3}").unwrap();
        let error = containerd.start(&bundle, &Caller::newest()).unwrap_err();
        assert!(error.contains("config.json"), "{error}");
        containerd.delete_bundle(&bundle);
        bundle.remove();
    });
}

#[test]
fn info_reports_the_features_with_an_empty_environment() {
    let run = |arguments: &[&str]| {
        let mut command = Command::new(executable());
        Outcome::run(
            command
                .args(arguments)
                .env_clear()
                .current_dir("/")
                .stdin(Stdio::null()),
        )
    };
    for flag in ["-info", "--info"] {
        let outcome = run(&[flag]);
        assert!(outcome.succeeded && outcome.stderr.is_empty(), "{}", outcome.stderr);
        let info = RuntimeInfo::parse_from_bytes(&outcome.stdout).unwrap();
        assert_eq!(info.name, "io.containerd.nutshell.v2");
        assert!(!info.version.version.is_empty());
        assert_eq!(
            info.features.type_url,
            "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
        );
        let features: Value = serde_json::from_slice(&info.features.value).unwrap();
        let namespaces = features["linux"]["namespaces"].as_array().unwrap();
        assert!(namespaces.contains(&"pid".into()));
    }
    for flag in ["-v", "-version"] {
        let outcome = run(&[flag]);
        assert!(outcome.succeeded && outcome.stderr.is_empty(), "{}", outcome.stderr);
        let text = String::from_utf8(outcome.stdout).unwrap();
        assert!(text.starts_with("containerd-shim-nutshell-v2 "), "{text}");
    }
}

#[test]
fn container_runs_to_completion_under_every_containerd_version() {
    with_fake_containerd(|containerd| {
        for (caller, service) in [
            (Caller::V1_7(None), V2),
            (Caller::V2_2(Some(generic_options(CONFIGURATION))), V2),
            (Caller::newest(), V3),
        ] {
            let bundle = containerd.bundle(&spec(&["sh", "-c", "echo out; echo err >&2; exit 42"]));
            let answer = containerd.start(&bundle, &caller).unwrap();
            let mut shim = containerd.connect_shim(answer);
            shim.task = shim.task.with_service(service);
            let container = containerd.prepare_in(bundle, shim).create().unwrap();
            assert_eq!(container.status(""), Status::CREATED);
            container.start();
            assert_eq!(container.wait(), 42);
            assert_eq!(container.stdout.read_to_end(), "out\n");
            assert_eq!(container.stderr.read_to_end(), "err\n");
            let id = container.id.clone();
            container.end();
            assert_eq!(
                containerd.events.of_container(&id),
                ["create", "start", "exit 42", "delete 42"]
            );
        }
    });
}
