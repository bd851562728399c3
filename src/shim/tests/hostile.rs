//! Agents under the control of their guest. nutshell's sends every kind of message, as large as the protocol allows,
//! without being asked, and with the ids of other requests. The QEMU guest agent sends lines without an end, or as long
//! as they may be.

use std::{
    env,
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    process::Command,
    sync::mpsc,
    thread::{self, JoinHandle},
    time::Instant,
};

use containerd_shim::protos::api::{PidsRequest, StatsRequest};
use nutshell_protocol::{
    BlockedThread, ClockReading, ContainerStats, DiskKernel, Event, Exited, Failure, FailureKind, FromAgent, IoStats,
    MAX_BLOCKED_THREADS, MAX_COMMAND_LINE, MAX_FROM_AGENT, MAX_KERNEL_SOURCE, MAX_PROCESSES, MAX_STATISTICS,
    MemoryStats, NETWORK_SLOTS, NetworkStats, ProcessEntry, Ready, Reply, Response, encode,
};
use serde_json::{Value, json};

use super::{
    guest_agent::{Streams, ls},
    *,
};

/// How much the memory of the shim may grow, in KiB.
const MAX_GROWTH: u64 = 8 << 10;

/// How long State may take while messages arrive. Without optimization it takes longer to decode a message.
const STATE_LIMIT: Duration = Duration::from_millis(if cfg!(debug_assertions) { 200 } else { 50 });

/// [`MAX_GROWTH`] while the QEMU guest agent sends its longest lines: a line, and a copy of it in an error, have 4 MiB
/// each.
const MAX_GROWTH_WITH_LINES: u64 = 9 << 10;

/// How long State may take while long lines of the QEMU guest agent are parsed.
const STATE_LIMIT_WHILE_PARSING: Duration = Duration::from_secs(1);

/// How many messages of each kind are sent: together far more than the shim may keep.
const FLOOD: u64 = 64;

/// The variable by which the test recognizes that it has the process to itself.
const ALONE: &str = "NUTSHELL_TEST_ALONE";

/// Runs the test `name` of this module in a new process, unless this is that process: other tests would change the
/// memory that it measures. Returns whether this is that process.
fn is_alone(name: &str) -> bool {
    if env::var_os(ALONE).is_some() {
        return true;
    }
    let (_, module) = module_path!().split_once("::").unwrap();
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", &format!("{module}::{name}"), "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    false
}

/// The memory of this process that is not backed by files, in KiB.
fn memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A text that fills the rest of the largest message, of which `used` bytes have another content.
fn long_text(used: usize) -> String {
    "x".repeat(MAX_FROM_AGENT - 64 - used)
}

/// Makes a message for the request with this id.
type MakeMessage = fn(u64) -> FromAgent;

/// Each kind of message, as large as it can be.
const MESSAGES: [MakeMessage; 15] = [
    |_| {
        FromAgent::Ready(Ready {
            version: long_text(MAX_FROM_AGENT / 2),
            kernel: long_text(MAX_FROM_AGENT / 2),
        })
    },
    |id| reply(id, Ok(Response::Done)),
    |id| reply(id, Ok(Response::Created { pid: u32::MAX })),
    |id| {
        let process = ProcessEntry {
            pid: u32::MAX,
            exec: Some("e".repeat(MAX_FROM_AGENT / MAX_PROCESSES - 16)),
        };
        reply(id, Ok(Response::Processes(vec![process; MAX_PROCESSES])))
    },
    |id| {
        let thread = BlockedThread {
            pid: u32::MAX,
            thread: u32::MAX,
            name: "n".repeat(MAX_FROM_AGENT / MAX_BLOCKED_THREADS - 64),
            switches: u64::MAX,
        };
        reply(id, Ok(Response::BlockedThreads(vec![thread; MAX_BLOCKED_THREADS])))
    },
    |id| {
        reply(
            id,
            Ok(Response::InterfaceIndexes(vec![u32::MAX; NETWORK_SLOTS as usize])),
        )
    },
    |id| {
        let name = "n".repeat(MAX_FROM_AGENT / MAX_STATISTICS / 2 - 64);
        let network = NetworkStats {
            name: name.clone(),
            ..NetworkStats::default()
        };
        let stats = ContainerStats {
            io: vec![IoStats::default(); MAX_STATISTICS],
            network: vec![network; MAX_STATISTICS],
            memory: MemoryStats {
                stat: vec![(name, u64::MAX); MAX_STATISTICS],
                ..MemoryStats::default()
            },
            ..ContainerStats::default()
        };
        reply(id, Ok(Response::Stats(Box::new(stats))))
    },
    |id| {
        let reading = ClockReading {
            nanoseconds: i64::MIN,
            lead: Some((i64::MIN, i64::MAX)),
        };
        reply(id, Ok(Response::Clock(reading)))
    },
    |id| {
        let kernel = DiskKernel {
            kernel_size: u64::MAX,
            initrd_size: u64::MAX,
            command_line: "c".repeat(MAX_COMMAND_LINE),
            source: "s".repeat(MAX_KERNEL_SOURCE),
        };
        reply(id, Ok(Response::DiskKernel(kernel)))
    },
    |id| {
        let failure = Failure {
            kind: FailureKind::NotFound,
            message: long_text(0),
        };
        reply(id, Err(failure))
    },
    |_| exit(long_text(0), None),
    |_| exit("c1".to_owned(), Some(long_text(0))),
    |_| out_of_memory(long_text(0)),
    |_| out_of_memory("c1".to_owned()),
    // The last one, because it ends the container.
    |_| exit("c1".to_owned(), None),
];

fn reply(id: u64, result: Result<Response, Failure>) -> FromAgent {
    FromAgent::Reply(Reply { id, result })
}

fn out_of_memory(container: String) -> FromAgent {
    FromAgent::Event(Event::OutOfMemory { container })
}

fn exit(container: String, exec: Option<String>) -> FromAgent {
    FromAgent::Event(Event::Exited(Exited {
        container,
        exec,
        status: u8::MAX,
        exited_at: u64::MAX,
        stdout_bytes: u64::MAX,
        stderr_bytes: u64::MAX,
    }))
}

/// The name of a kind. A kind that is added to the protocol needs a name here and a row in [`MESSAGES`].
fn name(message: &FromAgent) -> &'static str {
    match message {
        FromAgent::Ready(_) => "ready",
        FromAgent::Reply(Reply { result: Err(_), .. }) => "failure",
        FromAgent::Reply(Reply {
            result: Ok(response), ..
        }) => match response {
            Response::Done => "done",
            Response::Created { .. } => "created",
            Response::Processes(_) => "processes",
            Response::BlockedThreads(_) => "blocked threads",
            Response::InterfaceIndexes(_) => "interface indexes",
            Response::Stats(_) => "stats",
            Response::Clock(_) => "clock",
            Response::DiskKernel(_) => "disk kernel",
        },
        FromAgent::Event(Event::Exited(_)) => "exit",
        FromAgent::Event(Event::OutOfMemory { .. }) => "out of memory",
    }
}

/// The memory of the shim before a flood, and the largest since then, in KiB.
struct Growth {
    before: u64,
    largest: u64,
    max: u64,
}

impl Growth {
    /// The memory may grow by `max` KiB.
    fn start(max: u64) -> Self {
        let before = memory();
        Self {
            before,
            largest: before,
            max,
        }
    }

    /// Calls State until `flood` has ended, and checks how long it takes, and how much the memory grows.
    async fn check(&mut self, shim: &Shim, id: &str, kind: &str, limit: Duration, flood: JoinHandle<()>) {
        let mut times = Vec::new();
        while !flood.is_finished() || times.len() < 8 {
            let start = Instant::now();
            shim.status(id).await;
            times.push(start.elapsed());
            self.largest = self.largest.max(memory());
        }
        times.sort();
        flood.join().unwrap();
        // Without the slowest two: the machine that runs the tests may be busy with something else.
        let slowest = times[times.len() - 3];
        let growth = self.largest - self.before;
        println!("{kind}: State takes {slowest:?}, memory grew by {growth} KiB");
        assert!(slowest < limit, "{kind}: State takes {slowest:?}");
        assert!(growth < self.max, "{kind}: memory grew by {growth} KiB");
    }
}

#[tokio::test]
async fn flood_of_any_message_neither_delays_state_nor_grows_the_shim() {
    if !is_alone("flood_of_any_message_neither_delays_state_nor_grows_the_shim") {
        return;
    }
    let shim = Shim::start_with(Behaviour::Unresponsive).await;
    shim.create("c1").await;
    // Requests with the ids that are answered. What they return is up to the guest, but they do return.
    let task = shim.task.clone();
    let calls = tokio::spawn(async move {
        let (mut stats, mut pids) = (StatsRequest::default(), PidsRequest::default());
        (stats.id, pids.id) = ("c1".to_owned(), "c1".to_owned());
        loop {
            let context = context::Context::default();
            let both = async { tokio::join!(task.stats(context.clone(), &stats), task.pids(context.clone(), &pids)) };
            let answers = tokio::time::timeout(Duration::from_secs(10), both).await;
            let (_stats, _pids) = answers.expect("Stats and Pids return");
        }
    });
    let mut growth = Growth::start(MAX_GROWTH);

    for make in MESSAGES {
        let flood = start_flood(&shim, make);
        growth.check(&shim, "c1", name(&make(0)), STATE_LIMIT, flood).await;
    }

    assert!(!calls.is_finished());
    calls.abort();
    assert_eq!(shim.wait("c1", "").await.unwrap(), u32::from(u8::MAX));
}

/// Sends many messages of one kind by nutshell's agent.
fn start_flood(shim: &Shim, make: MakeMessage) -> JoinHandle<()> {
    let mut agent = shim.fake.agent_stream();
    thread::spawn(move || {
        for id in 0..FLOOD {
            agent.write_all(&encode(&make(id), MAX_FROM_AGENT).unwrap()).unwrap();
        }
    })
}

/// nutshell's agent as a service in the guest of a user's disk. Its stream ends when it violates the protocol.
#[tokio::test]
async fn flood_by_the_agent_of_a_virtual_machine_neither_delays_state_nor_grows_the_shim() {
    if !is_alone("flood_by_the_agent_of_a_virtual_machine_neither_delays_state_nor_grows_the_shim") {
        return;
    }
    let shim = Shim::run_vm_with_agent().await;
    let mut growth = Growth::start(MAX_GROWTH);

    for make in MESSAGES {
        let flood = start_flood(&shim, make);
        growth.check(&shim, "v1", name(&make(0)), STATE_LIMIT, flood).await;
    }
    for (exec, kind, byte) in [("e1", "endless frame", 0x7f), ("e2", "empty frames", 0)] {
        let mut agent = shim.fake.agent_stream();
        let flood = thread::spawn(move || {
            // Fails when the shim has closed the stream.
            while agent.write_all(&[byte; 64 << 10]).is_ok() {}
        });
        growth.check(&shim, "v1", kind, STATE_LIMIT, flood).await;
        shim.connect_agent(exec).await;
    }

    assert_eq!(shim.status("v1").await, Status::RUNNING);
}

/// Each exec asks the QEMU guest agent, which synchronizes and then misbehaves.
#[tokio::test]
async fn flood_by_the_qemu_guest_agent_neither_delays_state_nor_grows_the_shim_cve_2026_13322() {
    if !is_alone("flood_by_the_qemu_guest_agent_neither_delays_state_nor_grows_the_shim_cve_2026_13322") {
        return;
    }
    static TEXT: [u8; 64 << 10] = [b'x'; 64 << 10];
    fn send_line(agent: &mut UnixStream, start: &str, end: &str) -> io::Result<()> {
        agent.write_all(start.as_bytes())?;
        for _ in 0..63 {
            agent.write_all(&TEXT)?;
        }
        agent.write_all(end.as_bytes())
    }
    type Send = fn(&mut UnixStream, &str) -> io::Result<()>;
    let rows: [(&str, Send); 5] = [
        ("never an answer", |_, _| Ok(())),
        ("endless line", |agent, _| {
            loop {
                agent.write_all(&TEXT)?;
            }
        }),
        ("longest lines of a wrong type", |agent, _| {
            (0..8).try_for_each(|_| send_line(agent, "{\"return\": \"", "\"}\n"))
        }),
        ("longest output", |agent, command| match command {
            "guest-exec" => agent.write_all(b"{\"return\": {\"pid\": 1}}\n"),
            _ => send_line(agent, "{\"return\": {\"exited\": true, \"out-data\": \"", "\"}}\n"),
        }),
        ("many short lines", |agent, _| {
            (0..1024).try_for_each(|_| agent.write_all(&[b'\n'; 16 << 10]))
        }),
    ];
    for (number, (kind, send)) in rows.into_iter().enumerate() {
        let shim = Shim::start().await;
        shim.run_vm("v1").await;
        let mut growth = Growth::start(MAX_GROWTH_WITH_LINES);
        let mut agent = shim.fake.guest_agent_stream();
        shim.fake.open_guest_agent_port();
        let reader = BufReader::new(agent.try_clone().unwrap());
        thread::spawn(move || {
            for line in reader.split(b'\n').map_while(Result::ok) {
                let text = line.strip_prefix(b"\xff").unwrap_or(&line);
                let command: Value = serde_json::from_slice(text).unwrap();
                let sent = match command["execute"].as_str().unwrap() {
                    "guest-sync-delimited" => {
                        let answer = format!("{}\n", json!({"return": command["arguments"]["id"]}));
                        agent.write_all(&[&[0xff][..], answer.as_bytes()].concat())
                    }
                    name => send(&mut agent, name),
                };
                // The client may have closed the connection.
                if sent.is_err() {
                    return;
                }
            }
        });
        let exec = format!("e{number}");
        let (sender, ended) = mpsc::channel::<()>();
        // Ends with the exec.
        let flood = thread::spawn(move || {
            // The sender is dropped.
            let _ = ended.recv();
        });
        let run = async {
            // Both may fail, depending on the agent.
            if shim.add_exec(&exec, ls(), Streams::default()).await.is_ok()
                && shim.start_task("v1", &exec).await.is_ok()
            {
                assert_eq!(shim.wait("v1", &exec).await.unwrap(), 255);
            }
            drop(sender);
        };

        tokio::join!(run, growth.check(&shim, "v1", kind, STATE_LIMIT_WHILE_PARSING, flood));

        assert_eq!(shim.status("v1").await, Status::RUNNING, "{kind}");
        shim.kill("v1", "", 9).await.unwrap();
        assert_eq!(shim.wait("v1", "").await.unwrap(), 137);
    }
}
