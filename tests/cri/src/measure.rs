//! What pods cost. In a machine with its work counted (tests/lab/lab -i) a nanosecond is an instruction.

use std::time::{Duration, Instant};

use crate::pod::{Handler, Pod};

/// What is measured of each pod, in order.
const WHAT: [&str; 4] = [
    "RunPodSandbox to ready",
    "first container of a pod, created and started",
    "second container of a pod, created and started",
    "pod with two containers, stopped and removed",
];

const HANDLERS: [(Handler, &str); 3] = [
    (Handler::Runc, "runc"),
    (Handler::Nutshell, "nutshell"),
    (Handler::NutshellShim, "nutshell, Sandbox service"),
];

/// Prints a table of medians, in thousands of nanoseconds, of so many pods of each runtime handler.
pub(crate) fn table(rounds: usize) {
    let mut figures = HANDLERS.map(|_| WHAT.map(|_| Vec::new()));
    // The first is a warm-up.
    for round in 0..=rounds {
        for ((handler, _), figures) in HANDLERS.iter().zip(&mut figures) {
            for (measured, figures) in life(*handler).into_iter().zip(figures) {
                if round > 0 {
                    figures.push(measured);
                }
            }
        }
    }
    println!("| what | median | rounds |\n|---|---|---|");
    for (index, what) in WHAT.iter().enumerate() {
        for ((_, name), figures) in HANDLERS.iter().zip(&figures) {
            let figures = &figures[index];
            let mut sorted = figures.clone();
            sorted.sort_unstable();
            let median = sorted[sorted.len() / 2];
            let all: Vec<_> = figures.iter().map(u128::to_string).collect();
            println!("| {what}: {name} | {median} | {} |", all.join(" "));
        }
    }
}

/// What each part of a pod's life took.
fn life(handler: Handler) -> [u128; WHAT.len()] {
    // The kernel and containerd still clean up after the pod before, and nothing tells when they have done.
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
