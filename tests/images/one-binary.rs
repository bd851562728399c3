//! The program of an image that contains only one static program: no shell, no library, no folder.
//!
//! `one-binary STATUS [ARG...]` prints each argument on a separate line and exits with STATUS.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let Some(status) = arguments.next().and_then(|status| status.parse::<u8>().ok()) else {
        eprintln!("usage: one-binary STATUS [ARG...]");
        return ExitCode::from(2);
    };
    for argument in arguments {
        println!("{argument}");
    }
    ExitCode::from(status)
}
