//! Execs, logs and streams.

use std::{
    fs,
    thread::sleep,
    time::{Duration, Instant},
};

use crate::{
    client::call,
    host::{self, RuntimeProcess, read_log},
    messages::ReopenContainerLogRequest,
    pod::{Handler, Pod},
    streaming::Streams,
    wait::wait_until,
};

pub(crate) fn executed_commands(handler: Handler) {
    let pod = Pod::run(handler);
    let container = pod.start("one", &["sleep", "1000"]);
    let response = container.exec(&["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(
        (
            response.stdout.as_slice(),
            response.stderr.as_slice(),
            response.exit_code
        ),
        (&b"out\n"[..], &b"err\n"[..], 7)
    );
    let response = container.exec(&["sh", "-c", "head -c 1048576 /dev/zero"]);
    assert_eq!((response.stdout.len(), response.exit_code), (1 << 20, 0));
    assert!(response.stdout.iter().all(|&byte| byte == 0));

    let refused = container.try_exec(&["no-such-program"], 0).unwrap_err();
    assert!(refused.message.contains("not found"), "{refused}");

    // DEADLINE_EXCEEDED (4): a kubelet takes it for a probe that timed out.
    let start = Instant::now();
    let refused = container.try_exec(&["sleep", "54321"], 1).unwrap_err();
    assert_eq!(refused.code, 4, "{refused}");
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    wait_until("the end of the command that timed out", || {
        (!container.sh("ps -o args").contains("sleep 54321")).then_some(())
    });
    pod.remove();
}

/// One probe a second for NUTSHELL_TEST_PROBES seconds, default 20.
pub(crate) fn probes(handler: Handler) {
    let pod = Pod::run(handler);
    let container = pod.start("one", &["sleep", "1000"]);
    let rounds = std::env::var("NUTSHELL_TEST_PROBES").map_or(20, |text| text.parse::<u32>().unwrap());
    let probe = || assert_eq!(container.exec(&["true"]).exit_code, 0);
    // The first probes allocate memory that stays.
    (0..5).for_each(|_| probe());
    let before = host::runtime_processes();
    assert!(!before.is_empty(), "no shim");
    for _ in 0..rounds {
        let start = Instant::now();
        probe();
        sleep(Duration::from_secs(1).saturating_sub(start.elapsed()));
    }
    // Tolerances. The Go runtime of runc's shim adds threads and heap at any time, so it gets larger ones.
    let (descriptors, threads, memory) = if handler.is_nutshell() {
        (0, 0, 512)
    } else {
        (4, 8, 8192)
    };
    let has_grown = |after: &[RuntimeProcess]| {
        assert_eq!(after.len(), before.len());
        after.iter().zip(&before).any(|(after, before)| {
            after.descriptors > before.descriptors + descriptors
                || after.threads > before.threads + threads
                || after.memory > before.memory + memory
        })
    };
    // Descriptors of the last probe may not be closed yet.
    let mut after = host::runtime_processes();
    for _ in 0..20 {
        if !has_grown(&after) {
            break;
        }
        sleep(Duration::from_millis(100));
        after = host::runtime_processes();
    }
    assert!(!has_grown(&after), "{before:?} became {after:?}");
    pod.remove();
}

pub(crate) fn logs(handler: Handler) {
    let pod = Pod::run(handler);
    let script = "echo out; echo err >&2; head -c 20000 /dev/zero | tr '\\0' x; echo; \
                  seq 1 100000; printf 'no end'";
    let burst = pod.start("burst", &["sh", "-c", script]);
    assert_eq!(burst.wait().exit_code, 0);
    let expected = format!("out\n{}\n", "x".repeat(20000))
        + &(1..=100_000).map(|number| format!("{number}\n")).collect::<String>()
        + "no end";
    let output = burst.output("stdout");
    assert_eq!(output.len(), expected.len());
    assert!(output == expected, "the log differs from the output");
    assert_eq!(burst.output("stderr"), "err\n");
    let lines = read_log(&burst.log);
    assert_eq!(
        lines.iter().filter(|line| !line.is_complete).count(),
        2,
        "partial lines: the first 16 KiB of a long line, and the last line"
    );

    // The log is rotated while it is written.
    let script = "number=0; while [ ! -e /stop ]; do number=$((number + 1)); echo $number; done; echo end";
    let writer = pod.start("writer", &["sh", "-c", script]);
    let mut rotated = Vec::new();
    for rotation in 0..3 {
        wait_until("lines in the log", || (read_log(&writer.log).len() > 20).then_some(()));
        let old = writer.log.with_extension(rotation.to_string());
        fs::rename(&writer.log, &old).unwrap();
        rotated.push(old);
        let container_id = writer.id.clone();
        call(&ReopenContainerLogRequest { container_id }).unwrap();
    }
    wait_until("lines in the log", || (read_log(&writer.log).len() > 20).then_some(()));
    // The writer, and with it the container, may end before the exec does: its status is not checked.
    writer.try_exec(&["touch", "/stop"], 0).unwrap();
    assert_eq!(writer.wait().exit_code, 0);
    rotated.push(writer.log);
    let mut lines: Vec<_> = rotated
        .iter()
        .flat_map(|log| read_log(log))
        .map(|line| line.text)
        .collect();
    assert_eq!(lines.pop().as_deref(), Some("end"));
    assert!(
        lines
            .iter()
            .enumerate()
            .all(|(index, line)| *line == (index + 1).to_string()),
        "lines are missing"
    );
    pod.remove();
}

pub(crate) fn terminals(handler: Handler) {
    let pod = Pod::run(handler);
    let script = "while read line; do [ \"$line\" != end ] || exit 5; echo \"got $line\"; echo \"no $line\" >&2; done";
    let reader = pod.start_with("reader", &["sh", "-c", script], |config| config.stdin = true);
    let mut first = Streams::attach(&reader, false);
    first.send("one\n");
    first.wait_for("got one\n");
    // A second client receives the same output from now on.
    let mut second = Streams::attach(&reader, false);
    second.send("two\n");
    second.wait_for("got two\n");
    first.wait_for("got two\n");
    drop(first);

    let mut terminal = Streams::exec(&reader, &["sh"], true);
    terminal.resize(123, 45);
    terminal.send("until [ \"$(stty size)\" = '45 123' ]; do sleep 0.1; done; tty; echo size $(stty size)\n");
    terminal.wait_for("size 45 123");
    assert!(terminal.stdout.contains("/dev/pts/"), "{}", terminal.stdout);
    terminal.send("exit 9\n");
    terminal.read_to_end();
    assert_eq!(terminal.exit, Some(9), "{}", terminal.stdout);

    let mut plain = Streams::exec(
        &reader,
        &["sh", "-c", "read word; echo \"out $word\"; echo \"err $word\" >&2"],
        false,
    );
    plain.send("hello\n");
    plain.read_to_end();
    assert_eq!(
        (plain.stdout.as_str(), plain.stderr.as_str(), plain.exit),
        ("out hello\n", "err hello\n", Some(0))
    );

    second.send("end\n");
    second.read_to_end();
    assert_eq!(reader.wait().exit_code, 5);
    assert_eq!(reader.output("stdout"), "got one\ngot two\n");
    assert_eq!(reader.output("stderr"), "no one\nno two\n");

    let tty = pod.start_with("tty", &["sh"], |config| {
        config.stdin = true;
        config.tty = true;
    });
    let mut terminal = Streams::attach(&tty, true);
    terminal.resize(77, 33);
    terminal.send("until [ \"$(stty size)\" = '33 77' ]; do sleep 0.1; done; echo size $(stty size)\n");
    terminal.wait_for("size 33 77");
    terminal.send("exit 3\n");
    terminal.read_to_end();
    assert_eq!(tty.wait().exit_code, 3);
    pod.remove();
}
