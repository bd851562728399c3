//! Standard streams and terminals.

use std::io::{Read, Write};

use nutshell_protocol::Stdio;

use crate::harness::{Agent, shell, unique};

#[test]
fn input_reaches_the_process_until_its_end() {
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
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    writer.join().unwrap().unwrap();
    assert_eq!(text.trim(), (1 << 20).to_string());
    assert_eq!(agent.exit().status, 0);
    agent.delete(id);
}

#[test]
fn terminal_has_its_size_and_echoes() {
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
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    for expected in ["/dev/pts/0\r\n", "17 91\r\n", "hello\r\n", "got hello\r\n"] {
        assert!(text.contains(expected), "{text:?} lacks {expected:?}");
    }
    let exited = agent.exit();
    assert_eq!((exited.status, exited.stdout), (0, text.len() as u64));
    agent.delete(id);
}
