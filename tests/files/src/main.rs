//! Checks that a directory behaves as a local file system of Linux: permissions, names, contents, times, extended
//! attributes and locks, each with the errors that the manual pages of section 2 demand.
//!
//!     files DIRECTORY [TEXT]
//!
//! Run it as root. With TEXT, only cases whose names contain the text are run. It prints a line for each case that
//! fails, with the reason, and the number of those that passed. Exits with 1 if a case fails. It needs no container and no virtual machine, so the cases can be checked on any file
//! system.

mod cases;
mod place;

use std::{path::PathBuf, process::ExitCode};

use rustix::fs::Mode;

use self::place::Place;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let Some(directory) = arguments.next() else {
        eprintln!("usage: files DIRECTORY [TEXT]");
        return ExitCode::from(2);
    };
    let text = arguments.next().unwrap_or_default();
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let (mut passed, mut failed) = (0, 0);
    let all = [
        cases::permissions::CASES,
        cases::names::CASES,
        cases::content::CASES,
        cases::extras::CASES,
    ];
    let selected = all.into_iter().flatten().filter(|(name, _)| name.contains(&text));
    for (number, (name, run)) in selected.enumerate() {
        let place = Place::create(PathBuf::from(&directory).join(format!("case-{number}")));
        match place.and_then(|place| run(&place).and_then(|()| place.remove())) {
            Ok(()) => passed += 1,
            Err(reason) => {
                failed += 1;
                println!("{name}: {reason}");
            }
        }
    }
    if passed + failed == 0 {
        eprintln!("files: no case has {text:?} in its name");
        return ExitCode::from(2);
    }
    println!("{passed} passed, {failed} failed");
    ExitCode::from(u8::from(failed > 0))
}
