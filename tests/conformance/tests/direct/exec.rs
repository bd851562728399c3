//! Execs, standard streams and terminals.

use std::env;

use containerd_shim_protos::{api::Status, ttrpc::Code};
use nutshell_conformance::{
    bundle::{idle, process, shell, spec_of_program},
    container::{SIGKILL, SIGTERM},
    fake_containerd::program,
    stdio::{Input, make_fifo},
    task::json_any,
    with_fake_containerd,
};

/// Streams of processes are vsock connections to ports of the host, to which any container could connect too.
#[test]
fn container_that_scans_for_the_streams_of_others_gets_none() {
    let execs = env::var("NUTSHELL_TEST_EXECS").map_or(100, |count| count.parse().unwrap());
    with_fake_containerd(|containerd| {
        let container = containerd.run(&spec_of_program(&program("vsock-scanner"), &[]));
        container.stdout.wait_for("scanning\n");
        let expected: String = (1..=2000).map(|line| format!("{line}\n")).collect();

        for _ in 0..execs {
            assert_eq!(container.output_of("seq 2000"), expected);
        }

        let scan = container.stdout.so_far();
        // A guest without vsock sockets for containers is safe too.
        assert!(scan.contains("attempts") || scan.contains("no sockets"), "{scan}");
        assert!(!scan.contains("stream"), "{scan}");
        container.end();
    });
}

#[test]
fn exec_goes_through_all_states_and_events() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        let exec = container.exec(&[
            "sh",
            "-c",
            "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done",
        ]);
        assert_eq!(exec.status(), Status::CREATED);
        let pid = exec.start();
        assert_ne!(pid, container.pid);
        exec.stdout.wait_for("ready");
        let state = container.task().state(&container.id, &exec.id).unwrap();
        assert_eq!(state.status.enum_value(), Ok(Status::RUNNING));
        assert_eq!((state.pid, state.exec_id.as_str()), (pid, exec.id.as_str()));
        assert_eq!(state.stdout, exec.stdout.path().display().to_string());
        let again = container.task().start(&container.id, &exec.id).unwrap_err();
        assert_eq!(again.code, Some(Code::FAILED_PRECONDITION), "{again}");
        let early = container.task().delete(&container.id, &exec.id).unwrap_err();
        assert_eq!(early.code, Some(Code::FAILED_PRECONDITION), "{early}");
        exec.kill(SIGTERM);
        assert_eq!(exec.wait(), 7);
        let state = container.task().state(&container.id, &exec.id).unwrap();
        assert_eq!(state.status.enum_value(), Ok(Status::STOPPED));
        assert_eq!((state.pid, state.exit_status), (pid, 7));
        assert!(state.exited_at.is_some());
        let deleted = exec.delete();
        assert_eq!((deleted.pid, deleted.exit_status), (pid, 7));
        for answer in [
            container.task().state(&container.id, &exec.id).map(drop),
            container.task().delete(&container.id, &exec.id).map(drop),
            container.task().wait(&container.id, &exec.id).map(drop),
        ] {
            assert_eq!(answer.unwrap_err().code, Some(Code::NOT_FOUND));
        }
        assert_eq!(container.status(""), Status::RUNNING);
        let id = container.id.clone();
        let name = exec.id.clone();
        container.end();
        assert_eq!(
            containerd.events.of_container(&id),
            [
                "create",
                "start",
                &format!("added {name}"),
                &format!("started {name}"),
                &format!("exit {name} 7"),
                "exit 137",
                "delete 137",
            ]
        );
    });
}

/// Each stream without a name is `/dev/null`, as with `nerdctl run -d` and Docker.
#[test]
fn process_without_streams_reads_nothing_writes_anything_and_has_its_status() {
    const SCRIPT: &str = "input=$(cat) || exit 2; test -z \"$input\" || exit 3
        seq 100000 || exit 4; seq 100000 >&2 || exit 5; exit 7";
    with_fake_containerd(|containerd| {
        let mut prepared = containerd.prepare(&shell(SCRIPT));
        (prepared.request.stdout, prepared.request.stderr) = (String::new(), String::new());
        let container = prepared.create().unwrap();
        container.start();
        assert_eq!(container.wait(), 7);
        container.end();

        let container = containerd.run(&idle());
        let (mut request, _stdout) = container.exec_request(&["sh", "-c", SCRIPT]);
        request.exec_id = "e".to_owned();
        request.stdout = String::new();
        container.task().exec(&request).unwrap();
        container.task().start(&container.id, "e").unwrap();
        assert_eq!(container.task().wait(&container.id, "e").unwrap().exit_status, 7);
        container.task().delete(&container.id, "e").unwrap();
        container.end();
    });
}

#[test]
fn exec_id_is_unique_in_its_container_until_it_is_deleted() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        let (mut request, _stdout) = container.exec_request(&["true"]);
        request.exec_id = "e".to_owned();
        request.stdout = String::new();
        for _ in 0..2 {
            container.task().exec(&request).unwrap();
            let failure = container.task().exec(&request).unwrap_err();
            assert_eq!(failure.code, Some(Code::ALREADY_EXISTS), "{failure}");
            container.task().delete(&container.id, "e").unwrap();
        }
        request.exec_id = "../e".to_owned();
        let failure = container.task().exec(&request).unwrap_err();
        assert_eq!(failure.code, Some(Code::INVALID_ARGUMENT), "{failure}");
        container.end();
    });
}

#[test]
fn exec_that_cannot_run_fails_with_runcs_error_text_and_can_be_deleted() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        for (command, reason) in [
            (
                "no-such-command",
                "exec: \"no-such-command\": executable file not found in $PATH",
            ),
            (
                "/no/such/command",
                "exec: \"/no/such/command\": stat /no/such/command: no such file or directory",
            ),
            ("/not-executable", "exec: \"/not-executable\": permission denied"),
        ] {
            let exec = container.exec(&[command]);
            let failure = container.task().start(&container.id, &exec.id).unwrap_err();
            assert_ne!(failure.code, Some(Code::NOT_FOUND), "{failure}");
            assert!(failure.message.contains(reason), "{reason} is not in {failure}");
            assert_eq!(exec.status(), Status::STOPPED);
            exec.delete();
        }
        assert_eq!(container.output_of("echo alive"), "alive\n");
        container.end();
    });
}

#[test]
fn exec_ends_with_its_container() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        let waiting = container.exec(&["true"]);
        let running = container.exec(&["sh", "-c", "echo ready; exec sleep 1000"]);
        running.start();
        running.stdout.wait_for("ready");
        container.kill(SIGKILL);
        assert_eq!(container.wait(), 137);
        assert_eq!(running.wait(), 137);
        let late = container.task().start(&container.id, &waiting.id).unwrap_err();
        assert_eq!(late.code, Some(Code::FAILED_PRECONDITION), "{late}");
        waiting.delete();
        running.delete();
        container.end();
    });
}

#[test]
fn close_io_ends_stdin_after_all_input_and_is_repeatable() {
    with_fake_containerd(|containerd| {
        let fifo = containerd.fifo_path("stdin");
        make_fifo(&fifo);
        let mut prepared = containerd.prepare(&shell("cat; echo end"));
        prepared.request.stdin = fifo.display().to_string();
        let container = prepared.create().unwrap();
        container.start();
        let mut input = Input::open(&fifo);
        input.write("one\n");
        container.stdout.wait_for("one\n");
        // A client that detaches does not end the input.
        drop(input);
        let mut input = Input::open(&fifo);
        input.write("two\n");
        container.stdout.wait_for("two\n");
        input.write("three\n");
        let close = || container.task().close_stdin(&container.id, "").unwrap();
        close();
        drop(input);
        close();
        assert_eq!(container.wait(), 0);
        close();
        assert_eq!(container.stdout.read_to_end(), "one\ntwo\nthree\nend\n");
        container.end();
    });
}

#[test]
fn close_io_before_the_start_of_an_exec_takes_effect() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        let fifo = containerd.fifo_path("stdin");
        make_fifo(&fifo);
        let (mut request, stdout) = container.exec_request(&["sh", "-c", "cat; echo end"]);
        request.exec_id = "e".to_owned();
        request.stdin = fifo.display().to_string();
        container.task().exec(&request).unwrap();
        container.task().close_stdin(&container.id, "e").unwrap();
        container.task().start(&container.id, "e").unwrap();
        assert_eq!(container.task().wait(&container.id, "e").unwrap().exit_status, 0);
        assert_eq!(stdout.read_to_end(), "end\n");
        container.task().close_stdin(&container.id, "e").unwrap();
        container.end();
    });
}

#[test]
fn terminal_has_the_size_of_the_last_resize_before_and_after_the_start() {
    with_fake_containerd(|containerd| {
        let mut spec = shell("stty size; trap 'stty size' WINCH; echo ready; while :; do sleep 0.1; done");
        spec["process"]["terminal"] = true.into();
        spec["process"]["consoleSize"] = serde_json::json!({"width": 101, "height": 41});
        let mut prepared = containerd.prepare(&spec);
        prepared.request.terminal = true;
        prepared.request.stderr = String::new();
        let container = prepared.create().unwrap();
        container.task().resize(&container.id, "", 102, 42).unwrap();
        container.start();
        container.stdout.wait_for("42 102");
        container.stdout.wait_for("ready");
        container.task().resize(&container.id, "", 103, 43).unwrap();
        container.stdout.wait_for("43 103");

        let (mut request, stdout) = container.exec_request(&["stty", "size"]);
        request.exec_id = "e".to_owned();
        request.terminal = true;
        let mut terminal = process(&["stty", "size"]);
        terminal["terminal"] = true.into();
        request.spec = Some(json_any("Process", &terminal)).into();
        container.task().exec(&request).unwrap();
        container.task().resize(&container.id, "e", 104, 44).unwrap();
        container.task().start(&container.id, "e").unwrap();
        assert_eq!(container.task().wait(&container.id, "e").unwrap().exit_status, 0);
        assert_eq!(stdout.read_to_end().trim(), "44 104");
        container.task().resize(&container.id, "e", 105, 45).unwrap();

        container.kill(SIGKILL);
        container.wait();
        container.task().resize(&container.id, "", 106, 46).unwrap();
        container.end();
    });
}

#[test]
fn resize_without_a_terminal_is_a_no_op() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        container.task().resize(&container.id, "", 80, 24).unwrap();
        container.end();
    });
}
