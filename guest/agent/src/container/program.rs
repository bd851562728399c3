//! The program of a container's process: its settings from the spec, and its executable in the container.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::io::Read;
use std::path::{Path, PathBuf};

use nutshell_linux::go_text::error_text;
use nutshell_protocol::Failure;
use oci_spec::runtime::Process;
use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::failure::FailureExt;
use crate::sys;

/// The program of a process, as the spec describes it.
#[derive(Debug, Clone)]
pub(super) struct Program {
    /// The arguments; the first names the executable.
    pub(super) args: Vec<String>,
    /// The environment as received.
    pub(super) env: Vec<String>,
    /// The working directory.
    pub(super) cwd: PathBuf,
    /// The user id inside the container.
    pub(super) uid: u32,
}

impl Program {
    /// Copies arguments, environment and user of `process`. Fails without arguments.
    pub(super) fn of(process: &Process) -> Result<Self, Failure> {
        let args = process.args().clone().unwrap_or_default();
        if args.is_empty() {
            return Err(Failure::invalid("process.args must not be empty"));
        }
        Ok(Self {
            args,
            env: process.env().clone().unwrap_or_default(),
            cwd: process.cwd().clone(),
            uid: process.user().uid(),
        })
    }
}

/// The search path for executables if the environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program whose executable has been found: the arguments of execve(2).
#[derive(Debug, Clone)]
pub(super) struct ResolvedProgram {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl ResolvedProgram {
    /// Finds the executable and the home directory. Call this as the container's user, in the container's root file
    /// system and in the working directory of the process. The error is the text for the user.
    pub(super) fn find(program: &Program) -> Result<Self, String> {
        let mut env = deduplicate_env(&program.env);
        if !env
            .iter()
            .any(|entry| entry.starts_with("HOME=") && entry.len() > "HOME=".len())
        {
            env.retain(|entry| !entry.starts_with("HOME="));
            env.push(format!("HOME={}", find_home(program.uid)));
        }
        let search = env
            .iter()
            .find_map(|entry| entry.strip_prefix("PATH="))
            .unwrap_or(DEFAULT_PATH);
        let name = program.args.first().map_or("", String::as_str);
        let path = look_up(name, search)?;
        Ok(Self {
            path: c_string(path.to_string_lossy().into_owned())?,
            args: program.args.iter().cloned().map(c_string).collect::<Result<_, _>>()?,
            env: env.into_iter().map(c_string).collect::<Result<_, _>>()?,
        })
    }

    /// Executes the program. Returns only on failure, with the error text.
    pub(super) fn execute(&self) -> String {
        sys::restore_sigpipe();
        let error = sys::execve(&self.path, &self.args, &self.env);
        let path = self.path.to_string_lossy();
        format!("exec {path}: {}", error_text(&error))
    }
}

/// Returns the entries of an environment in their order. If several entries have the same name, only the last one is
/// returned.
fn deduplicate_env(env: &[String]) -> Vec<String> {
    let mut names = BTreeSet::new();
    let mut kept: Vec<String> = env
        .iter()
        .rev()
        .filter(|entry| {
            entry
                .split_once('=')
                .is_some_and(|(name, _)| !name.is_empty() && names.insert(name))
        })
        .cloned()
        .collect();
    kept.reverse();
    kept
}

/// Finds an executable as Go's `exec.LookPath` does, with the same error texts.
fn look_up(name: &str, search: &str) -> Result<PathBuf, String> {
    if name.contains('/') {
        return match check_executable(Path::new(name)) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(Errno::NOENT) => Err(format!("exec: {name:?}: stat {name}: no such file or directory")),
            Err(Errno::NOTDIR) => Err(format!("exec: {name:?}: stat {name}: not a directory")),
            Err(error) => Err(format!("exec: {name:?}: {}", error_text(&error.into()))),
        };
    }
    search
        .split(':')
        .map(|directory| Path::new(if directory.is_empty() { "." } else { directory }).join(name))
        .find(|path| !name.is_empty() && check_executable(path).is_ok())
        .ok_or_else(|| format!("exec: {name:?}: executable file not found in $PATH"))
}

fn check_executable(path: &Path) -> Result<(), Errno> {
    let metadata = rustix::fs::stat(path)?;
    if FileType::from_raw_mode(metadata.st_mode) == FileType::Directory {
        return Err(Errno::ISDIR);
    }
    rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
}

fn c_string(text: String) -> Result<CString, String> {
    CString::new(text).map_err(|error| format!("{error} in the process's arguments or environment"))
}

/// The maximum number of bytes that are read of `/etc/passwd`.
const PASSWD_LIMIT: u64 = 4 << 20;

/// Returns a user's home directory from the container's `/etc/passwd`, or `/` if it has no entry there.
///
/// This does not use the C library, which would load name service modules from the container's file system.
fn find_home(uid: u32) -> String {
    // O_NONBLOCK: the file belongs to the container and may be a FIFO.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let mut text = Vec::new();
    if let Ok(file) = rustix::fs::open("/etc/passwd", flags, Mode::empty()) {
        let is_regular =
            rustix::fs::fstat(&file).is_ok_and(|file| FileType::from_raw_mode(file.st_mode) == FileType::RegularFile);
        if is_regular {
            let _ = std::fs::File::from(file).take(PASSWD_LIMIT).read_to_end(&mut text);
        }
    }
    home_in_passwd(&String::from_utf8_lossy(&text), uid)
        .unwrap_or("/")
        .to_owned()
}

fn home_in_passwd(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let found: u32 = fields.next()?.parse().ok()?;
        let home = fields.nth(2)?;
        (found == uid && !home.is_empty()).then_some(home)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_is_the_sixth_field() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\n#comment\nshort:x:7\nweb:x:33:33::/srv:/bin/false\nbad:x:9:9:::\n";
        assert_eq!(home_in_passwd(passwd, 0), Some("/root"));
        assert_eq!(home_in_passwd(passwd, 33), Some("/srv"));
        assert_eq!(home_in_passwd(passwd, 9), None);
        assert_eq!(home_in_passwd(passwd, 7), None);
        assert_eq!(home_in_passwd("", 0), None);
    }

    #[test]
    fn last_entry_of_a_name_is_kept_in_order() {
        let env = ["A=1", "B=2", "A=3", "junk", "=x", "C="].map(str::to_owned);
        assert_eq!(deduplicate_env(&env), ["B=2", "A=3", "C="]);
    }

    #[test]
    fn lookup_fails_with_gos_error_texts() {
        for (name, expected) in [
            ("nosuch", r#"exec: "nosuch": executable file not found in $PATH"#),
            ("", r#"exec: "": executable file not found in $PATH"#),
            (
                "/no/such",
                r#"exec: "/no/such": stat /no/such: no such file or directory"#,
            ),
            ("/etc/passwd", r#"exec: "/etc/passwd": permission denied"#),
            (
                "/etc/passwd/x",
                r#"exec: "/etc/passwd/x": stat /etc/passwd/x: not a directory"#,
            ),
            ("/etc", r#"exec: "/etc": is a directory"#),
        ] {
            assert_eq!(look_up(name, "/usr/bin:/bin").unwrap_err(), expected);
        }
    }

    #[test]
    fn lookup_searches_the_path_in_order() {
        assert_eq!(look_up("sh", "/nowhere:/bin").unwrap(), Path::new("/bin/sh"));
        assert_eq!(look_up("/bin/sh", "").unwrap(), Path::new("/bin/sh"));
    }
}
