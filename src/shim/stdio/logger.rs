//! Logging programs (`binary://`): containerd starts none itself, the shim does, and gives it the reading
//! ends of pipes whose writing ends are the machine's (containerd `pkg/cio` `LogURI`, the runc shim's
//! `process/io.go` `NewBinaryIO`).
//!
//! A program finds its streams as descriptors 3 and 4 and says by descriptor 5, a byte or its end, that it
//! is ready; not before is the process created. When the streams end it has [`FINISH_LIMIT`] to do what is
//! left.

use std::{
    fs,
    io::{self, PipeReader, PipeWriter},
    os::fd::OwnedFd,
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::Signal;
use tokio::{io::AsyncReadExt, net::unix::pipe::Receiver, task::JoinHandle};

use super::endpoint::Program;
use crate::shim::child::{Child, WaitStatus};

/// How long a program may take until it is ready.
const READY_LIMIT: Duration = Duration::from_secs(10);

/// How long a program may take to end once its streams have ended, and again once it was told to.
const FINISH_LIMIT: Duration = Duration::from_secs(10);
const TERMINATE_LIMIT: Duration = Duration::from_secs(2);

/// How long the last words of a program that failed may take.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(1);

/// How much of what a program says on its standard error is kept: the end of it.
const LAST_WORDS: usize = 1 << 10;

/// Why there is no logging program.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoggerError {
    /// It cannot be executed.
    #[error("start the logging program {}: {source}", path.display())]
    Start {
        /// The program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It was started, and is not ready.
    #[error("the logging program {} {how}{}{words}", path.display(), if words.is_empty() { "" } else { ": " })]
    NotReady {
        /// The program.
        path: PathBuf,
        /// What it did instead.
        how: String,
        /// What it said of it.
        words: String,
    },
}

/// Whose output a program gets: what it finds in its environment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Owner<'a> {
    /// The container's id, or the exec's.
    pub(super) id: &'a str,
    /// containerd's namespace.
    pub(super) namespace: &'a str,
}

/// A logging program that runs. Dropped, it is killed.
#[derive(Debug)]
pub(super) struct Logger {
    child: Arc<Child>,
    /// Reaps it, whenever it ends.
    reaper: JoinHandle<()>,
}

impl Logger {
    /// Starts `program` for the streams that are wanted (standard output, standard error) and waits until
    /// it is ready. Of a stream that is not wanted it finds the end. The machine gets the pipes.
    pub(super) async fn start(
        program: &Program,
        owner: Owner<'_>,
        wanted: [bool; 2],
    ) -> Result<(Self, [Option<OwnedFd>; 2]), LoggerError> {
        let failed = |source| LoggerError::Start {
            path: program.path.clone(),
            source,
        };
        let Spawned {
            child,
            writers,
            ready,
            stderr,
        } = Spawned::spawn(program, owner).map_err(failed)?;
        let words = Words::listen(stderr);
        if let Err(how) = wait_until_ready(program, &child, ready).await {
            child.kill_and_reap();
            return Err(LoggerError::NotReady {
                path: program.path.clone(),
                how,
                words: words.last().await,
            });
        }
        let [stdout, stderr] = writers.map(OwnedFd::from);
        let [out, err] = wanted;
        let child = Arc::new(child);
        let reaper = tokio::spawn(reap(child.clone(), program.path.clone(), words));
        Ok((Self { child, reaper }, [out.then_some(stdout), err.then_some(stderr)]))
    }

    /// Waits for the end of a program whose streams have ended; helps it if it takes too long.
    pub(super) async fn finish(mut self) {
        for (limit, signal) in [(FINISH_LIMIT, Signal::TERM), (TERMINATE_LIMIT, Signal::KILL)] {
            if tokio::time::timeout(limit, &mut self.reaper).await.is_ok() {
                return;
            }
            self.child.signal(signal);
        }
        // It fails only by a panic, which was logged.
        let _ = (&mut self.reaper).await;
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        self.child.kill();
    }
}

/// A program that was started, and our ends of what it has.
struct Spawned {
    child: Child,
    writers: [PipeWriter; 2],
    ready: PipeReader,
    stderr: PipeReader,
}

impl Spawned {
    fn spawn(program: &Program, owner: Owner<'_>) -> io::Result<Self> {
        let (stdout, stdout_writer) = io::pipe()?;
        let (stderr, stderr_writer) = io::pipe()?;
        let (ready, ready_writer) = io::pipe()?;
        let (words, words_writer) = io::pipe()?;
        let mut command = Command::new(&program.path);
        command
            .args(&program.arguments)
            .env_clear()
            .env("CONTAINER_ID", owner.id)
            .env("CONTAINER_NAMESPACE", owner.namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(words_writer);
        let mappings = [stdout.into(), stderr.into(), ready_writer.into()]
            .into_iter()
            .zip(3..)
            .map(|(parent_fd, child_fd): (OwnedFd, _)| FdMapping { parent_fd, child_fd })
            .collect();
        command.fd_mappings(mappings).map_err(io::Error::other)?;
        let child = Child::from_std(&command.spawn()?)?;
        // The program's ends close with `command`.
        Ok(Self {
            child,
            writers: [stdout_writer, stderr_writer],
            ready,
            stderr: words,
        })
    }
}

/// `Err` says what it did instead.
async fn wait_until_ready(program: &Program, child: &Child, ready: PipeReader) -> Result<(), String> {
    let text = |error: io::Error| format!("cannot be heard: {error}");
    let mut ready = Receiver::from_owned_fd(ready.into()).map_err(text)?;
    let mut byte = [0];
    match tokio::time::timeout(READY_LIMIT, ready.read(&mut byte)).await {
        Err(_) => Err(format!("was not ready within {} s", READY_LIMIT.as_secs())),
        Ok(Err(error)) => Err(text(error)),
        Ok(Ok(1..)) => Ok(()),
        Ok(Ok(0)) if is_exiting(child) => match child.wait().await {
            // It may have left another process to do the work.
            Ok(WaitStatus::Exited(0)) if !program.must_say_ready => Ok(()),
            Ok(ended) => Err(ended.to_string()),
            Err(error) => Err(text(error)),
        },
        Ok(Ok(0)) if program.must_say_ready => Err("closed its descriptor 5 without a byte".to_owned()),
        Ok(Ok(0)) => Ok(()),
    }
}

/// Whether the end of a pipe comes from the end of the process: an exiting process says so before it
/// closes anything (proc_pid_stat(5), `flags`; `PF_EXITING` of `linux/sched.h`).
fn is_exiting(child: &Child) -> bool {
    const PF_EXITING: u32 = 4;
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.pid())).unwrap_or_default();
    // Its name may have blanks and parentheses; the flags are the seventh field after it.
    let fields = stat.rsplit_once(") ").map(|(_, fields)| fields).unwrap_or_default();
    let flags = fields.split(' ').nth(6).and_then(|flags| flags.parse::<u32>().ok());
    flags.is_some_and(|flags| flags & PF_EXITING != 0)
}

async fn reap(child: Arc<Child>, path: PathBuf, words: Words) {
    match child.reap().await {
        Ok(WaitStatus::Exited(0)) => {}
        Ok(ended) => {
            let words = words.last().await;
            log::warn!("the logging program {} {ended}: {words}", path.display());
        }
        Err(error) => log::error!("wait for the logging program {}: {error}", path.display()),
    }
}

/// What a program says on its standard error. It is read to its end, so that nobody waits.
struct Words {
    last: Arc<Mutex<Vec<u8>>>,
    listener: JoinHandle<()>,
}

impl Words {
    fn listen(stderr: PipeReader) -> Self {
        let last = Arc::new(Mutex::new(Vec::new()));
        let kept = last.clone();
        let listener = tokio::spawn(async move {
            let Ok(mut stderr) = Receiver::from_owned_fd(stderr.into()) else {
                return;
            };
            let mut bytes = [0; LAST_WORDS];
            while let Ok(count @ 1..) = stderr.read(&mut bytes).await {
                let mut kept = kept.lock();
                kept.extend_from_slice(&bytes[..count]);
                let surplus = kept.len().saturating_sub(LAST_WORDS);
                kept.drain(..surplus);
            }
        });
        Self { last, listener }
    }

    /// The end of what was said by a program that has ended. Whoever inherited its standard error is not
    /// waited for.
    async fn last(mut self) -> String {
        let _ = tokio::time::timeout(LAST_WORDS_LIMIT, &mut self.listener).await;
        let last = self.last.lock();
        String::from_utf8_lossy(&last).trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write, path::Path};

    use tempfile::TempDir;

    use super::*;
    use crate::shim::tests::script::write_script;

    const OWNER: Owner<'_> = Owner {
        id: "c1",
        namespace: "tests",
    };

    /// A program that is this shell script.
    fn program(folder: &TempDir, script: &str) -> Program {
        let path = folder.path().join("logger");
        write_script(&path, &format!("cd {}\n{script}", folder.path().display()));
        Program {
            path,
            arguments: ["key", "value"].map(str::to_owned).into(),
            must_say_ready: false,
        }
    }

    async fn refusal(program: &Program) -> String {
        let started = Logger::start(program, OWNER, [true, true]).await;
        started.map(drop).unwrap_err().to_string()
    }

    fn text(folder: &TempDir, name: &str) -> String {
        fs::read_to_string(folder.path().join(name)).unwrap()
    }

    #[tokio::test]
    async fn program_gets_streams_environment_and_arguments_and_time_to_finish() {
        let folder = tempfile::tempdir().unwrap();
        let script = "PATH=/usr/bin:/bin; echo $CONTAINER_ID $CONTAINER_NAMESPACE \"$@\" >who; env >env; exec 5>&-
            cat <&3 >out; cat <&4 >err; echo done >end";
        for must_say_ready in [false, true] {
            let mut program = program(&folder, &script.replace("exec 5", "echo >&5; exec 5"));
            program.must_say_ready = must_say_ready;
            let (logger, [stdout, stderr]) = Logger::start(&program, OWNER, [true, true]).await.unwrap();
            // It was ready, so it has written this.
            assert_eq!(text(&folder, "who"), "c1 tests key value\n");
            assert!(!text(&folder, "env").contains("HOME="), "{}", text(&folder, "env"));
            File::from(stdout.unwrap()).write_all(b"to out").unwrap();
            File::from(stderr.unwrap()).write_all(b"to err").unwrap();

            let child = logger.child.clone();
            logger.finish().await;

            assert_eq!(
                (text(&folder, "out"), text(&folder, "err"), text(&folder, "end")),
                ("to out".to_owned(), "to err".to_owned(), "done\n".to_owned())
            );
            assert!(!Path::new(&format!("/proc/{}", child.pid())).exists(), "not reaped");
            fs::remove_file(folder.path().join("end")).unwrap();
        }
    }

    #[tokio::test]
    async fn stream_that_is_not_wanted_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let program = program(&folder, "exec 5>&-; cat <&4; cat <&3 >out");
        let (logger, [stdout, stderr]) = Logger::start(&program, OWNER, [true, false]).await.unwrap();
        assert!(stderr.is_none());
        File::from(stdout.unwrap()).write_all(b"x").unwrap();
        logger.finish().await;
        assert_eq!(text(&folder, "out"), "x");
    }

    #[tokio::test]
    async fn program_that_is_not_ready_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let mut missing = program(&folder, "");
        missing.path = "/no/such/logger".into();
        let error = refusal(&missing).await;
        assert_eq!(
            error,
            "start the logging program /no/such/logger: No such file or directory (os error 2)"
        );
        let path = folder.path().join("logger").display().to_string();

        let error = refusal(&program(&folder, "echo no room >&2; exit 3")).await;
        assert_eq!(
            error,
            format!("the logging program {path} exited with status 3: no room")
        );

        let error = refusal(&program(&folder, "exec 3<&- 4<&-; kill -9 $$")).await;
        assert_eq!(error, format!("the logging program {path} was killed by signal 9"));

        let mut silent = program(&folder, "exec 5>&-; exec sleep 1000");
        silent.must_say_ready = true;
        let error = refusal(&silent).await;
        assert_eq!(
            error,
            format!("the logging program {path} closed its descriptor 5 without a byte")
        );
    }

    #[tokio::test]
    async fn program_over_its_time_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        let stubborn = program(&folder, "trap '' TERM; exec 5>&-; exec /bin/sleep 1000");
        let (logger, streams) = Logger::start(&stubborn, OWNER, [true, true]).await.unwrap();
        drop(streams);
        let child = logger.child.clone();
        // From here on time passes while nothing happens.
        tokio::time::pause();
        logger.finish().await;
        assert!(!Path::new(&format!("/proc/{}", child.pid())).exists(), "not reaped");

        let error = refusal(&program(&folder, "exec /bin/sleep 1000")).await;
        assert!(error.ends_with("was not ready within 10 s"), "{error}");
    }

    #[tokio::test]
    async fn program_that_ends_early_is_reaped() {
        let folder = tempfile::tempdir().unwrap();
        let early = program(&folder, "exec 5>&-; read line <&3; exit 1");
        let (mut logger, [stdout, _stderr]) = Logger::start(&early, OWNER, [true, true]).await.unwrap();
        File::from(stdout.unwrap()).write_all(b"line\n").unwrap();
        (&mut logger.reaper).await.unwrap();
        assert!(
            !Path::new(&format!("/proc/{}", logger.child.pid())).exists(),
            "not reaped"
        );
    }
}
