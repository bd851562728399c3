//! Checks the structure of the source tree; `make lint` runs it:
//!
//! - no import cycle between the files of a crate, and none between the modules of a folder;
//! - no import from a lower layer of the executable into a higher one ([`layers::LAYERS`]);
//! - no source file over [`sizes::MAX_LINES`] lines, no folder over [`sizes::MAX_FILES`] source files;
//! - every `mod.rs` starts with the documentation of its module;
//! - no doc comment only repeats the name of its item.
//!
//! Prints each finding on a line and exits with 1 if there is one. Imports of unit tests and of entry points for fuzz
//! targets are not checked: they may use any module.

mod cycles;
mod imports;
mod layers;
mod modules;
mod repeats;
mod sizes;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::ExitCode,
};

use self::modules::{Crate, SourceError};

/// The crates whose imports are checked, by the file that is their root.
const ROOTS: [&str; 12] = [
    "src/lib.rs",
    "disk-image/src/lib.rs",
    "guest/agent/src/main.rs",
    "guest/disk-reader/src/lib.rs",
    "guest/protocol/src/lib.rs",
    "linux/src/lib.rs",
    "tests/conformance/src/lib.rs",
    "tests/conformance/tests/direct/main.rs",
    "tests/cri/src/main.rs",
    "tests/files/src/main.rs",
    "tests/fixtures/src/lib.rs",
    "tests/structure/src/main.rs",
];

fn main() -> ExitCode {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    match findings(&top) {
        Ok(findings) if findings.is_empty() => ExitCode::SUCCESS,
        Ok(findings) => {
            for finding in &findings {
                println!("{finding}");
            }
            eprintln!("structure: {} findings", findings.len());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("structure: {error}");
            ExitCode::FAILURE
        }
    }
}

fn findings(top: &Path) -> Result<Vec<String>, SourceError> {
    let mut findings = sizes::findings(top)?;
    for root in ROOTS.map(PathBuf::from) {
        if !top.join(&root).exists() {
            return Err(SourceError::missing(root));
        }
        let source = Crate::load(top, &root)?;
        let imports = imports::find_imports(&source);
        findings.extend(cycles::between_files(&source, &imports));
        findings.extend(cycles::between_modules(&source, &imports));
        findings.extend(repeats::findings(&source));
        if root == Path::new("src/lib.rs") {
            findings.extend(layers::findings(&source, &imports));
        }
    }
    Ok(findings.into_iter().collect::<BTreeSet<_>>().into_iter().collect())
}
