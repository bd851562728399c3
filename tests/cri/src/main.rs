//! A client of containerd's CRI service that behaves as a kubelet does.
//!
//! ```text
//! cri CASE HANDLER      runs one case with one runtime handler of containerd's configuration; panics if it fails
//! cri node              waits until the node is ready
//! cri list              prints the names of all cases
//! cri measure ROUNDS    measures pods and prints a table
//! ```
//!
//! Belongs here: messages ([`messages`]) and calls ([`client`]) of the interface, pods and containers ([`pod`]),
//! streams ([`streaming`]), virtual machines ([`vm`]), inspection of the host ([`host`]), a name server ([`dns`]),
//! measurements ([`measure`]), and the cases ([`cases`]). Does not belong here: code of nutshell; no test may depend on
//! it. Run in the lab by tests/lab/pods.bash, which also checks after each case that nothing is left on the host.

#![allow(clippy::unwrap_used, reason = "all of this is for tests: they fail by panic")]

mod cases;
mod client;
mod dns;
mod host;
mod measure;
mod messages;
mod pod;
mod streaming;
mod vm;
mod wait;

use std::process::ExitCode;

use pod::Handler;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["node"] => pod::wait_for_node(),
        ["measure", rounds] => {
            let Ok(rounds @ 1..) = rounds.parse() else {
                eprintln!("cri: {rounds} is not a number of rounds");
                return ExitCode::from(2);
            };
            measure::print_table(rounds);
        }
        ["list"] => cases::CASES.iter().for_each(|(name, _)| println!("{name}")),
        [case, handler] => {
            let Some((_, case)) = cases::CASES.iter().find(|(name, _)| *name == case) else {
                eprintln!("cri: no case {case}");
                return ExitCode::from(2);
            };
            let Some(handler) = Handler::from_name(handler) else {
                eprintln!("cri: no runtime handler {handler}");
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
