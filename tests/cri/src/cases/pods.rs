//! The life cycle of pods and of their containers.

use std::{fs, path::Path, process::Command};

use crate::{
    client::call,
    messages::{
        ContainerConfig, ContainerState, Mount, NamespaceMode, NamespaceOption, PodState, RemovePodSandboxRequest,
    },
    pod::{Handler, Pod, security},
    wait::wait_until,
};

pub(crate) fn run_to_completion(handler: Handler) {
    let pod = Pod::run(handler);
    assert_eq!(pod.status().state(), PodState::Ready);
    let container = pod.start("one", &["sh", "-c", "echo hello; exit 42"]);
    let status = container.wait();
    assert_eq!(status.exit_code, 42);
    assert_eq!(status.reason, "Error");
    assert_eq!(container.output("stdout"), "hello\n");
    assert_eq!(pod.containers(), [("one".to_owned(), ContainerState::Exited)]);
    assert_eq!(pod.listed_state(), Some(PodState::Ready));
    pod.remove();
}

/// Creates a folder on the host, and returns a change that mounts it at /volume of a container.
fn volume(pod: &Pod) -> impl Fn(&mut ContainerConfig) + use<> {
    let folder = format!("{}/volume", pod.config.log_directory);
    fs::create_dir_all(&folder).unwrap();
    move |config| {
        config.mounts = vec![Mount {
            container_path: "/volume".into(),
            host_path: folder.clone(),
            ..Default::default()
        }];
    }
}

pub(crate) fn init_containers(handler: Handler) {
    let pod = Pod::run(handler);
    let volume = volume(&pod);
    for turn in ["first", "second"] {
        let script = format!("echo {turn} >>/volume/turns; grep -c . /volume/turns");
        let init = pod.start_with(turn, &["sh", "-c", &script], &volume);
        let status = init.wait();
        assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
    }
    let web = pod.start_with("web", &["sh", "-c", "cat /volume/turns; exec sleep 1000"], &volume);
    let side = pod.start_with("side", &["sh", "-c", "cat /volume/turns; exec sleep 1000"], &volume);
    for container in [&web, &side] {
        container.wait_for_line("second");
        assert_eq!(container.output("stdout"), "first\nsecond\n");
    }
    use ContainerState::{Exited, Running};
    let expected = [
        ("first", Exited),
        ("second", Exited),
        ("side", Running),
        ("web", Running),
    ];
    assert_eq!(pod.containers(), expected.map(|(name, state)| (name.to_owned(), state)));
    pod.remove();
}

pub(crate) fn removal_in_any_order(handler: Handler) {
    let pod = Pod::run(handler);
    let mut containers: Vec<_> = ["a", "b", "c", "d", "e"]
        .iter()
        .map(|name| {
            (
                *name,
                pod.start(name, &["sh", "-c", &format!("echo {name} >/mine; exec sleep 1000")]),
            )
        })
        .collect();
    assert_eq!(pod.containers().len(), 5);
    // Neither in the order of the starts nor in reverse order.
    for index in [2, 0, 2, 0] {
        let (_, container) = containers.remove(index);
        // RemoveContainer kills it.
        container.remove();
        for (name, other) in &containers {
            assert_eq!(other.sh("cat /mine"), *name);
        }
    }
    assert_eq!(
        pod.containers(),
        [(containers[0].0.to_owned(), ContainerState::Running)]
    );
    pod.remove();
}

pub(crate) fn restart(handler: Handler) {
    let pod = Pod::run(handler);
    let sibling = pod.start("sibling", &["sleep", "1000"]);
    let started = sibling.status().started_at;
    let mut last = None;
    for attempt in 0..3 {
        let command = ["sh", "-c", "test ! -e /used; touch /used; echo fresh; exit 1"];
        let container = pod.start_with("again", &command, |config| {
            config.metadata.get_or_insert_default().attempt = attempt;
            config.log_path = format!("again/{attempt}.log");
        });
        assert_eq!(container.wait().exit_code, 1);
        assert_eq!(container.output("stdout"), "fresh\n");
        // A kubelet keeps the last container for its log.
        if let Some(last) = last.replace(container) {
            last.remove();
        }
    }
    assert_eq!(sibling.status().state(), ContainerState::Running);
    assert_eq!(sibling.status().started_at, started);
    pod.remove();
}

pub(crate) fn pod_without_a_running_container(handler: Handler) {
    let pod = Pod::run(handler);
    let first = pod.start("first", &["true"]);
    first.wait();
    assert_eq!(pod.status().state(), PodState::Ready);
    first.remove();
    assert_eq!(pod.containers(), []);
    assert_eq!(pod.status().state(), PodState::Ready);
    let second = pod.start("second", &["sleep", "1000"]);
    assert_eq!(second.sh("echo alive"), "alive");
    pod.stop();
    assert_eq!(pod.status().state(), PodState::NotReady);
    assert_eq!(second.status().exit_code, 137);
    // Kubelets call StopPodSandbox more than once.
    pod.stop();
    assert_eq!(pod.listed_state(), Some(PodState::NotReady));
    let third = pod.create("third", &["true"], |_| ());
    third.and_then(|third| third.start()).unwrap_err();
    let id = pod.id.clone();
    pod.remove();
    call(&RemovePodSandboxRequest { pod_sandbox_id: id }).unwrap();
}

pub(crate) fn ephemeral_container(handler: Handler) {
    let pod = Pod::run(handler);
    let target = pod.start("target", &["sh", "-c", "echo treasure >/hidden; exec sleep 12345"]);
    let other = pod.start("other", &["sleep", "54321"]);
    let debugger = pod.start_with("debugger", &["sleep", "1000"], |config| {
        security(config).namespace_options = Some(NamespaceOption {
            pid: NamespaceMode::Target.into(),
            target_id: target.id.clone(),
            ..Default::default()
        });
    });
    let processes = debugger.sh("ps -o pid,args");
    assert!(
        processes.contains("sleep 12345") && processes.contains("sleep 1000"),
        "{processes}"
    );
    assert!(!processes.contains("sleep 54321"), "{processes}");
    assert_eq!(debugger.sh("tr '\\0' ' ' </proc/1/cmdline").trim(), "sleep 12345");
    assert_eq!(debugger.sh("cat /proc/1/root/hidden"), "treasure");
    // The end of the debugger does not affect the others.
    debugger.stop(0);
    assert_eq!(debugger.wait().exit_code, 137);
    assert_eq!(target.sh("cat /hidden"), "treasure");
    assert_eq!(other.status().state(), ContainerState::Running);
    pod.remove();
}

/// Runs a bash script that can use the functions of tests/lab/containerd.bash.
fn run_lab_script(script: &str) {
    let lab = std::env::var("NUTSHELL_TEST_LAB").unwrap();
    let status = Command::new("bash")
        .args(["-c", &format!("source {lab}/containerd.bash; {script}")])
        .status()
        .unwrap();
    assert!(status.success(), "{script}: {status}");
}

pub(crate) fn restarted_containerd(handler: Handler) {
    let pod = Pod::run(handler);
    let volume = volume(&pod);
    let long = pod.start("long", &["sh", "-c", "echo mine >/mine; exec sleep 1000"]);
    let script = "while [ ! -e /volume/go ]; do sleep 0.1; done; echo last output; touch /volume/gone; exit 42";
    let short = pod.start_with("short", &["sh", "-c", script], &volume);
    let before = (pod.addresses(), long.pid(), long.status().started_at);
    run_lab_script("stop_containerd KILL");
    let folder = Path::new(&pod.config.log_directory).join("volume");
    fs::write(folder.join("go"), "").unwrap();
    wait_until("a file of a container", || folder.join("gone").exists().then_some(()));
    run_lab_script("start_containerd");
    assert_eq!(pod.status().state(), PodState::Ready);
    assert_eq!((pod.addresses(), long.pid(), long.status().started_at), before);
    assert_eq!(long.sh("cat /mine"), "mine");
    let exit_code = short.wait().exit_code;
    // With runc's shim, containerd loses the exit status of a container that ended while containerd was down: it is
    // 255.
    assert!(
        exit_code == 42 || (exit_code == 255 && !handler.is_nutshell()),
        "{exit_code}"
    );
    let added = pod.start("added", &["echo", "new"]);
    assert_eq!(added.wait().exit_code, 0);
    assert_eq!(added.output("stdout"), "new\n");
    pod.remove();
}
