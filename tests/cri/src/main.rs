//! Drives containerd's CRI service as a kubelet does: `cri CASE HANDLER` runs one case with one runtime
//! handler of containerd's configuration and fails by panic, `cri node` waits until the node is ready, and
//! `cri measure ROUNDS` prints what pods cost.
//!
//! Lives here: the interface's messages ([`messages`]) and calls ([`client`]), pods and containers made of
//! those ([`pod`]), streams ([`streaming`]), what the host shows of it ([`host`]), a name server ([`dns`]), what
//! pods cost ([`measure`]), and the cases ([`cases`]). May not live here: anything of the product; no test may depend on its code. Called by
//! tests/lab/pods.bash in the lab, which also looks whether anything is left after each case.

#![allow(clippy::unwrap_used, reason = "all of this is for tests: they fail by panic")]

mod cases;
mod client;
mod dns;
mod host;
mod measure;
mod messages;
mod pod;
mod streaming;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use pod::{Handler, PAUSE};

/// Longer than anything takes in the lab, which is emulated: reaching it is a failure.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["node"] => pod::wait_for_node(),
        ["measure", rounds] => {
            let Ok(rounds @ 1..) = rounds.parse() else {
                eprintln!("{rounds} is no number of rounds");
                return ExitCode::from(2);
            };
            measure::table(rounds);
        }
        ["list"] => cases::CASES.iter().for_each(|(name, _)| println!("{name}")),
        [case, handler] => {
            let Some((_, case)) = cases::CASES.iter().find(|(name, _)| *name == case) else {
                eprintln!("no case {case}");
                return ExitCode::from(2);
            };
            let Some(handler) = Handler::named(handler) else {
                eprintln!("no runtime handler {handler}");
                return ExitCode::from(2);
            };
            case(handler);
        }
        _ => {
            eprintln!("usage: cri CASE HANDLER | node | list | measure ROUNDS");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

/// Asks again and again until there is an answer; `what` says what was waited for if none comes.
fn wait_until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(start.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(PAUSE);
    }
}
