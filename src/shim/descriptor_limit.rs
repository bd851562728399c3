//! The limit of open descriptors (`RLIMIT_NOFILE`). The soft limit is low on many hosts, because programs that use
//! select(2) cannot handle more than 1024 descriptors. The shim uses the hard limit. Programs of users that it starts
//! get the limit that it had before; vmm and fs set their own.

use std::{io, os::unix::process::CommandExt, process::Command, sync::OnceLock};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The limit before [`raise`].
static INHERITED: OnceLock<Rlimit> = OnceLock::new();

/// Raises the soft limit of this process to its hard limit.
///
/// # Errors
///
/// The errors of setrlimit(2).
pub(crate) fn raise() -> io::Result<()> {
    let inherited = INHERITED.get_or_init(|| getrlimit(Resource::Nofile));
    let raised = Rlimit {
        current: inherited.maximum,
        maximum: inherited.maximum,
    };
    Ok(setrlimit(Resource::Nofile, raised)?)
}

/// Makes `command` run with the limit that the shim was started with.
pub(crate) fn restore_for(command: &mut Command) {
    if let Some(limit) = INHERITED.get() {
        restore(command, limit);
    }
}

fn restore(command: &mut Command, limit: &Rlimit) {
    let limit = Rlimit { ..*limit };
    // SAFETY: the closure runs between fork and exec, and makes one system call: it allocates nothing and takes no
    // lock.
    unsafe {
        command.pre_exec(move || Ok(setrlimit(Resource::Nofile, Rlimit { ..limit })?));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn started_program_has_the_limit_that_the_shim_inherited() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "ulimit -S -n; ulimit -H -n"]);
        let limit = Rlimit {
            current: Some(77),
            maximum: Some(99),
        };

        restore(&mut command, &limit);

        assert_eq!(command.output().unwrap().stdout, b"77\n99\n");
    }
}
