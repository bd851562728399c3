//! An agent under the control of its guest: it sends every kind of message, as large as the protocol allows, without
//! being asked, and with the ids of other requests.

use std::{env, io::Write, process::Command, thread, time::Instant};

use containerd_shim::protos::api::{PidsRequest, StatsRequest};
use nutshell_protocol::{
    BlockedThread, ClockReading, ContainerStats, DiskKernel, Event, Exited, Failure, FailureKind, FromAgent, IoStats,
    MAX_BLOCKED_THREADS, MAX_COMMAND_LINE, MAX_FROM_AGENT, MAX_KERNEL_SOURCE, MAX_PROCESSES, MAX_STATISTICS,
    MemoryStats, NETWORK_SLOTS, NetworkStats, ProcessEntry, Ready, Reply, Response, encode,
};

use super::*;

/// How much the memory of the shim may grow, in KiB.
const MAX_GROWTH: u64 = 8 << 10;

/// How long State may take while messages arrive. Without optimization it takes longer to decode a message.
const STATE_LIMIT: Duration = Duration::from_millis(if cfg!(debug_assertions) { 200 } else { 50 });

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
    let before = memory();
    let mut largest = before;

    for make in MESSAGES {
        let kind = name(&make(0));
        let mut agent = shim.fake.agent_stream();
        let flood = thread::spawn(move || {
            for id in 0..FLOOD {
                agent.write_all(&encode(&make(id), MAX_FROM_AGENT).unwrap()).unwrap();
            }
        });
        let mut times = Vec::new();
        while !flood.is_finished() || times.len() < 8 {
            let start = Instant::now();
            shim.status("c1").await;
            times.push(start.elapsed());
        }
        times.sort();
        flood.join().unwrap();
        // Without the slowest two: the machine that runs the tests may be busy with something else.
        let slowest = times[times.len() - 3];
        largest = largest.max(memory());
        let growth = largest - before;
        println!("{kind}: State takes {slowest:?}, memory grew by {growth} KiB");
        assert!(slowest < STATE_LIMIT, "{kind}: State takes {slowest:?}");
        assert!(growth < MAX_GROWTH, "{kind}: memory grew by {growth} KiB");
    }

    assert!(!calls.is_finished());
    calls.abort();
    assert_eq!(shim.wait("c1", "").await.unwrap(), u32::from(u8::MAX));
}
