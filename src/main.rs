//! The executable. All of its code is in the library, which the fuzz targets call too.

use std::process::ExitCode;

fn main() -> ExitCode {
    nutshell::main()
}
