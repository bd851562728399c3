//! Measures pods. In a lab machine that counts instructions (tests/lab/lab -i) a nanosecond is one instruction.

use std::time::{Duration, Instant};

use crate::pod::{Handler, Pod};

/// The steps of a pod's life that are measured, in order.
const STEPS: [&str; 4] = [
    "RunPodSandbox",
    "first container of a pod, created and started",
    "second container of a pod, created and started",
    "pod with two containers, stopped and removed",
];

/// The runtime handlers that are compared, and their names in the table.
const HANDLERS: [(Handler, &str); 3] = [
    (Handler::Runc, "runc"),
    (Handler::Nutshell, "nutshell"),
    (Handler::NutshellSandboxService, "nutshell, Sandbox service"),
];

/// Measures `rounds` pods of each runtime handler, alternately, and prints a table of medians in microseconds, which
/// are thousands of instructions in a lab machine that counts them.
pub(crate) fn print_table(rounds: usize) {
    let mut results = HANDLERS.map(|_| STEPS.map(|_| Vec::new()));
    // Round 0 is a warm-up.
    for round in 0..=rounds {
        for ((handler, _), results) in HANDLERS.iter().zip(&mut results) {
            for (measured, results) in measure_pod(*handler).into_iter().zip(results) {
                if round > 0 {
                    results.push(measured);
                }
            }
        }
    }
    println!("| measurement | median | rounds |\n|---|---|---|");
    for (index, step) in STEPS.iter().enumerate() {
        for ((_, name), results) in HANDLERS.iter().zip(&results) {
            let results = &results[index];
            let mut sorted = results.clone();
            sorted.sort_unstable();
            let median = sorted[sorted.len() / 2];
            let all: Vec<_> = results.iter().map(u128::to_string).collect();
            println!("| {step}: {name} | {median} | {} |", all.join(" "));
        }
    }
}

/// Runs one pod and returns the microseconds of each step.
fn measure_pod(handler: Handler) -> [u128; STEPS.len()] {
    // The kernel and containerd may still clean up after the previous pod, and send no notification of the end.
    std::thread::sleep(Duration::from_secs(1));
    let mut last = Instant::now();
    let mut lap = || {
        let now = Instant::now();
        let took = now.duration_since(last).as_micros();
        last = now;
        took
    };
    let pod = Pod::run(handler);
    let sandbox = lap();
    pod.start("first", &["sleep", "100000"]);
    let first = lap();
    pod.start("second", &["sleep", "100000"]);
    let second = lap();
    pod.remove();
    [sandbox, first, second, lap()]
}
