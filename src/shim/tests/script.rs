//! Scripts that the tests have the shim execute.

use std::{path::Path, process::Command};

/// Makes the executable script `path`. Another process writes it: whatever another test forks has a
/// copy of this process's descriptors until it executes, and a file that somebody has open for writing
/// does not execute (execve(2), `ETXTBSY`).
///
/// # Panics
///
/// Where it cannot be written.
pub(crate) fn write_script(path: &Path, script: &str) {
    let mut writer = Command::new("/bin/sh");
    writer.args(["-c", r#"printf '#!/bin/sh\n%s' "$1" >"$0" && chmod 700 "$0""#]);
    assert!(
        writer.arg(path).arg(script).status().unwrap().success(),
        "write {}",
        path.display()
    );
}
