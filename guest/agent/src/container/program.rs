//! The program of a process: what its spec asks for, and the executable that this is in the container.

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

/// What is executed.
#[derive(Debug, Clone)]
pub(super) struct Program {
    /// Arguments; the first names the executable.
    pub(super) args: Vec<String>,
    /// Environment as it came.
    pub(super) env: Vec<String>,
    /// Working folder.
    pub(super) cwd: PathBuf,
    /// User id inside of the container.
    pub(super) uid: u32,
}

impl Program {
    /// What `process` executes.
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

/// Where executables are looked for if the environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program that was found, ready for execve(2).
#[derive(Debug, Clone)]
pub(super) struct ResolvedProgram {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl ResolvedProgram {
    /// Finds the executable and the home folder. To be called as the user and in the file system of
    /// the container, with its working folder entered.
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

    /// Becomes the program. Returns only where that fails, with the reason.
    pub(super) fn execute(&self) -> String {
        sys::restore_sigpipe();
        let error = sys::execve(&self.path, &self.args, &self.env);
        let path = self.path.to_string_lossy();
        format!("exec {path}: {}", error_text(&error))
    }
}

/// The entries of an environment; of those with one name, the last.
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

/// Finds an executable as Go's `exec.LookPath` does, and says why not in its words.
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
        .map(|folder| Path::new(if folder.is_empty() { "." } else { folder }).join(name))
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

/// The most that is read of `/etc/passwd`.
const PASSWD_LIMIT: u64 = 4 << 20;

/// A user's home folder according to the container's `/etc/passwd`, else `/`.
///
/// Read by hand: the C library would load modules from the container's files for it.
fn find_home(uid: u32) -> String {
    // Not blocking: the file may be anything, such as a fifo.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let mut text = Vec::new();
    if let Ok(file) = rustix::fs::open("/etc/passwd", flags, Mode::empty()) {
        let regular =
            rustix::fs::fstat(&file).is_ok_and(|file| FileType::from_raw_mode(file.st_mode) == FileType::RegularFile);
        if regular {
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
    fn last_entry_of_a_name_counts_and_order_stays() {
        let env = ["A=1", "B=2", "A=3", "junk", "=x", "C="].map(str::to_owned);
        assert_eq!(deduplicate_env(&env), ["B=2", "A=3", "C="]);
    }

    #[test]
    fn lookup_fails_in_the_words_that_users_search_for() {
        for (name, words) in [
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
            assert_eq!(look_up(name, "/usr/bin:/bin").unwrap_err(), words);
        }
    }

    #[test]
    fn lookup_goes_through_the_path_in_order() {
        assert_eq!(look_up("sh", "/nowhere:/bin").unwrap(), Path::new("/bin/sh"));
        assert_eq!(look_up("/bin/sh", "").unwrap(), Path::new("/bin/sh"));
    }
}
