//! Scripts that the shim executes in tests.

use std::{path::Path, process::Command};

/// Creates the executable shell script `path`.
///
/// Another process writes it, because a file that is open for writing cannot be executed (execve(2), `ETXTBSY`): a
/// process that another test forks would have a copy of this process's descriptor until its exec.
///
/// # Panics
///
/// If the file cannot be written.
pub(crate) fn write_script(path: &Path, script: &str) {
    let mut writer = Command::new("/bin/sh");
    writer.args(["-c", r#"printf '#!/bin/sh\n%s' "$1" >"$0" && chmod 700 "$0""#]);
    assert!(
        writer.arg(path).arg(script).status().unwrap().success(),
        "write {}",
        path.display()
    );
}
