//! Tests of standard streams and terminals.

use std::fs::File;
use std::io::{Read, Write};

use nutshell_protocol::{Request, Response, Stdio};
use serde_json::Value;

use crate::harness::{Agent, assert_nothing_left, process, shell, unique};

/// Starts a container that runs `script`, and returns its standard output.
fn start_script(agent: &mut Agent, id: &str, script: &str) -> File {
    let output = agent.listen();
    let stdio = Stdio {
        stdout: Some(output.port),
        ..Stdio::default()
    };
    agent.create(id, &shell(script), stdio).unwrap();
    let output = output.accept();
    agent.start_container(id);
    output
}

/// Starts `script` as exec. Returns its output and, if it has a terminal, its input.
fn exec(agent: &mut Agent, id: &str, exec: &str, script: &str, terminal: bool) -> (Option<File>, File) {
    let output = agent.listen();
    let input = terminal.then(|| agent.listen());
    let stdio = Stdio {
        stdin: input.as_ref().map(|input| input.port),
        stdout: Some(output.port),
        terminal,
        size: terminal.then_some((80, 24)),
        ..Stdio::default()
    };
    let mut process: Value = process(&["/bin/sh", "-c", script]);
    process["terminal"] = terminal.into();
    agent.exec(id, exec, &process, stdio).unwrap();
    (input.map(crate::harness::Port::accept), output.accept())
}

/// Reads up to and including `text`, and returns everything that was read.
fn read_until(output: &mut File, text: &str) -> String {
    let mut seen = Vec::new();
    let mut byte = [0];
    while !seen.ends_with(text.as_bytes()) {
        let count = output.read(&mut byte).expect("more output");
        assert_eq!(count, 1, "ended after {:?}", String::from_utf8_lossy(&seen));
        seen.push(byte[0]);
    }
    String::from_utf8(seen).unwrap()
}

fn read_all(output: &mut File) -> String {
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn input_arrives_whole_and_ends() {
    let mut agent = Agent::start();
    let id = &format!("input-{}", unique());
    let (input, output) = (agent.listen(), agent.listen());
    let stdio = Stdio {
        stdin: Some(input.port),
        stdout: Some(output.port),
        ..Stdio::default()
    };
    agent.create(id, &shell("wc -c"), stdio).unwrap();
    let (mut input, mut output) = (input.accept(), output.accept());
    agent.start_container(id);
    let writer = std::thread::spawn(move || input.write_all(&vec![b'x'; 1 << 20]));
    let text = read_all(&mut output);
    writer.join().unwrap().unwrap();
    assert_eq!(text.trim(), (1 << 20).to_string());
    assert_eq!(agent.exit().status, 0);
    agent.delete(id);
}

#[test]
fn large_output_at_the_end_of_a_process_arrives_whole_on_both_streams() {
    const SIZE: usize = 8 << 20;
    let mut agent = Agent::start();
    let id = &format!("burst-{}", unique());
    let (output, errors) = (agent.listen(), agent.listen());
    let stdio = Stdio {
        stdout: Some(output.port),
        stderr: Some(errors.port),
        ..Stdio::default()
    };
    let script = format!("head -c {SIZE} /dev/zero & head -c {SIZE} /dev/zero >&2; wait");
    agent.create(id, &shell(&script), stdio).unwrap();
    let streams = [output.accept(), errors.accept()];
    agent.start_container(id);
    let readers = streams.map(|mut stream| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            bytes.len()
        })
    });
    let exited = agent.exit();
    assert_eq!(
        (exited.status, exited.stdout_bytes, exited.stderr_bytes),
        (0, SIZE as u64, SIZE as u64)
    );
    assert_eq!(readers.map(|reader| reader.join().unwrap()), [SIZE, SIZE]);
    agent.delete(id);
}

#[test]
fn unread_output_blocks_the_process_and_not_its_exit() {
    let mut agent = Agent::start();
    let id = &format!("unread-{}", unique());
    let mut started = start_script(&mut agent, id, "echo started; sleep 1000");
    read_until(&mut started, "started\n");
    let before = agent.resident_memory();
    let (_, unread) = exec(&mut agent, id, "unread", "yes & echo $! >/tmp/pid; wait", false);
    // `yes` sleeps in a write when the pipe and the stream are full.
    let (_, mut watcher) = exec(
        &mut agent,
        id,
        "watcher",
        "while ! grep -q -s pipe_write /proc/$(cat /tmp/pid)/wchan; do :; done; echo stuck",
        false,
    );
    assert_eq!(read_all(&mut watcher), "stuck\n");
    assert_eq!(agent.exit().exec.as_deref(), Some("watcher"));
    assert!(agent.resident_memory() < before + (1 << 20), "the agent grew");

    assert_eq!(agent.kill(id, 9), Ok(Response::Done));
    let exited = agent.exit();
    assert_eq!((exited.exec.as_deref(), exited.status), (Some("unread"), 137));
    assert!(
        exited.stdout_bytes < 1 << 20,
        "{} bytes were taken",
        exited.stdout_bytes
    );
    assert_eq!(agent.exit().status, 137);
    agent.delete(id);
    drop(unread);
}

#[test]
fn output_of_a_grandchild_arrives_after_the_exit_of_its_parent() {
    let mut agent = Agent::start();
    let id = &format!("grandchild-{}", unique());
    let _output = start_script(&mut agent, id, "mkfifo /tmp/go; sleep 1000");
    let script = "while ! test -p /tmp/go; do :; done; (read line </tmp/go; echo later) & echo first";
    let (_, mut output) = exec(&mut agent, id, "parent", script, false);
    let exited = agent.exit();
    assert_eq!((exited.exec.as_deref(), exited.stdout_bytes), (Some("parent"), 6));
    assert_eq!(read_until(&mut output, "first\n"), "first\n");
    exec(&mut agent, id, "go", "echo >/tmp/go", false);
    assert_eq!(read_all(&mut output), "later\n");
    agent.kill(id, 9).unwrap();
    assert_eq!(agent.exit().exec.as_deref(), Some("go"));
    assert_eq!(agent.exit().exec, None);
    agent.delete(id);
}

#[test]
fn refused_stream_fails_the_request_and_leaves_nothing() {
    let mut agent = Agent::start();
    let id = &format!("refused-{}", unique());
    let refused = Stdio {
        stdout: Some(1),
        ..Stdio::default()
    };
    let failure = agent.create(id, &shell("true"), refused.clone()).unwrap_err();
    assert!(failure.message.contains("standard output"), "{failure:?}");
    assert_nothing_left(id);

    start_script(&mut agent, id, "sleep 1000");
    let failure = agent.exec(id, "e1", &process(&["/bin/true"]), refused).unwrap_err();
    assert!(failure.message.contains("standard output"), "{failure:?}");
    agent.kill(id, 9).unwrap();
    assert_eq!(agent.exit().exec, None);
    agent.delete(id);
}

#[test]
fn terminal_has_its_size_and_echoes_input() {
    let mut agent = Agent::start();
    let id = &format!("terminal-{}", unique());
    let (input, output) = (agent.listen(), agent.listen());
    let stdio = Stdio {
        stdin: Some(input.port),
        stdout: Some(output.port),
        stderr: None,
        terminal: true,
        size: Some((91, 17)),
    };
    let mut spec = shell("tty; stty size; read line; echo got $line");
    spec["process"]["terminal"] = true.into();
    agent.create(id, &spec, stdio).unwrap();
    let (mut input, mut output) = (input.accept(), output.accept());
    agent.start_container(id);
    input.write_all(b"hello\n").unwrap();
    let text = read_all(&mut output);
    for expected in ["/dev/pts/0\r\n", "17 91\r\n", "hello\r\n", "got hello\r\n"] {
        assert!(text.contains(expected), "{text:?} lacks {expected:?}");
    }
    let exited = agent.exit();
    assert_eq!((exited.status, exited.stdout_bytes), (0, text.len() as u64));
    agent.delete(id);
}

#[test]
fn terminal_signals_resize_interrupt_and_hangup() {
    let mut agent = Agent::start();
    let id = &format!("signals-{}", unique());
    let _output = start_script(&mut agent, id, "sleep 1000");
    // A sleep that starts between SIGHUP and the trap does not get the signal: it ends by itself, and releases the
    // terminal.
    let script = "trap 'stty size' WINCH; trap 'echo interrupted' INT
        (trap 'echo hung up; exit' HUP; echo ready; while :; do sleep 1 & wait; done) &
        while :; do read line; [ \"$line\" != quit ] || exit 7; done";
    let (input, mut output) = exec(&mut agent, id, "shell", script, true);
    let mut input = input.unwrap();
    read_until(&mut output, "ready\r\n");
    let resize = Request::Resize {
        container: id.clone(),
        exec: Some("shell".to_owned()),
        width: 100,
        height: 40,
    };
    assert_eq!(agent.ask(resize), Ok(Response::Done));
    read_until(&mut output, "40 100\r\n");
    input.write_all(b"\x03").unwrap();
    read_until(&mut output, "interrupted\r\n");

    // When the session leader ends, the kernel sends SIGHUP to the others. Their final output still arrives.
    input.write_all(b"quit\n").unwrap();
    read_until(&mut output, "hung up\r\n");
    let exited = agent.exit();
    assert_eq!((exited.exec.as_deref(), exited.status), (Some("shell"), 7));
    assert_eq!(read_all(&mut output), "");
    agent.kill(id, 9).unwrap();
    assert_eq!(agent.exit().exec, None);
    agent.delete(id);
}
