//! Checks that a directory behaves as a local file system of Linux: permissions, names, contents, times, extended
//! attributes and locks, each with the errors that the manual pages of section 2 demand.
//!
//!     files DIRECTORY
//!
//! Run it as root. It prints a line for each case that fails, with the reason, and the number of those that passed.
//! Exits with 1 if a case fails. It needs no container and no virtual machine, so the cases can be checked on any file
//! system.

mod cases;
mod place;

use std::{path::PathBuf, process::ExitCode};

use rustix::fs::Mode;

use self::place::Place;

fn main() -> ExitCode {
    let Some(directory) = std::env::args_os().nth(1) else {
        eprintln!("usage: files DIRECTORY");
        return ExitCode::from(2);
    };
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let (mut passed, mut failed) = (0, 0);
    let all = [
        cases::permissions::CASES,
        cases::names::CASES,
        cases::content::CASES,
        cases::extras::CASES,
    ];
    for (number, (name, run)) in all.into_iter().flatten().enumerate() {
        let place = Place::create(PathBuf::from(&directory).join(format!("case-{number}")));
        match place.and_then(|place| run(&place).and_then(|()| place.remove())) {
            Ok(()) => passed += 1,
            Err(reason) => {
                failed += 1;
                println!("{name}: {reason}");
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    ExitCode::from(u8::from(failed > 0))
}
