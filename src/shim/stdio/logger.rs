//! Logging programs (`binary://`). containerd does not start them; the shim does. It gives a program the reading ends
//! of two pipes, whose writing ends are the machine's (containerd `pkg/cio` `LogURI`, and the runc shim's
//! `process/io.go` `NewBinaryIO`).
//!
//! A program reads the process's standard output and error from its descriptors 3 and 4. It reports on descriptor 5
//! that it is ready, by a byte or by closing it; the process is created after that. When its streams have ended it has
//! [`FINISH_TIMEOUT`] to finish.

use std::{
    fs,
    io::{self, PipeReader, PipeWriter},
    os::fd::OwnedFd,
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use command_fds::{CommandFdExt, FdMapping};
use parking_lot::Mutex;
use rustix::process::Signal;
use tokio::{io::AsyncReadExt, net::unix::pipe::Receiver, task::JoinHandle};

use super::endpoint::Program;
use crate::shim::{
    blocking::{self, BlockingError},
    child::{Child, WaitStatus},
    descriptor_limit,
};

/// How long a program may take to become ready.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a program may take to exit after its streams have ended. It gets SIGTERM then.
const FINISH_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a program may take to exit after SIGTERM. It gets SIGKILL then.
const TERMINATE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a program may take to end after SIGKILL. A file system of this host can keep it in an uninterruptible call.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long to wait for the end of standard error of a program that has exited.
const STDERR_TIMEOUT: Duration = Duration::from_secs(1);

/// How much of a program's standard error is kept for error messages: its last bytes.
const MAX_STDERR_TAIL: usize = 1 << 10;

/// Why a logging program cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoggerError {
    /// It cannot be executed.
    #[error("cannot start the logging program {}: {source}", path.display())]
    Start { path: PathBuf, source: io::Error },
    /// Its file system does not answer.
    #[error("{}: {source}", path.display())]
    Blocked { path: PathBuf, source: BlockingError },
    /// It was started, and did not become ready.
    #[error("the logging program {} {outcome}{}{stderr}", path.display(), if stderr.is_empty() { "" } else { ": " })]
    NotReady {
        path: PathBuf,
        /// A predicate, such as "exited with status 1".
        outcome: String,
        /// The end of its standard error.
        stderr: String,
    },
}

/// Where the output comes from, for the program's environment.
#[derive(Debug, Clone, Copy)]
pub(super) struct LogSource<'a> {
    /// The id of the container or exec.
    pub(super) id: &'a str,
    /// containerd's namespace.
    pub(super) namespace: &'a str,
}

/// A running logging program. It is killed on drop.
#[derive(Debug)]
pub(super) struct Logger {
    child: Arc<Child>,
    /// Reaps it, and logs a failure.
    reaper: JoinHandle<()>,
}

impl Logger {
    /// Starts `program` and waits until it is ready. `wanted` selects the streams that it reads: standard output,
    /// standard error. Returns the machine's ends of their pipes; the pipe of an unwanted stream is at EOF.
    pub(super) async fn start(
        program: &Program,
        source: LogSource<'_>,
        wanted: [bool; 2],
    ) -> Result<(Self, [Option<OwnedFd>; 2]), LoggerError> {
        let SpawnedProgram {
            child,
            stdout,
            stderr,
            ready,
            own_stderr,
        } = SpawnedProgram::spawn_off_thread(program, source).await?;
        let own_stderr = StderrTail::collect(own_stderr);
        if let Err(outcome) = wait_until_ready(program, &child, ready).await {
            child.end("the logging program").await;
            return Err(LoggerError::NotReady {
                path: program.path.clone(),
                outcome,
                stderr: own_stderr.finish().await,
            });
        }
        let child = Arc::new(child);
        let reaper = tokio::spawn(reap(child.clone(), program.path.clone(), own_stderr));
        let [want_stdout, want_stderr] = wanted;
        let pipes = [
            want_stdout.then_some(stdout.into()),
            want_stderr.then_some(stderr.into()),
        ];
        Ok((Self { child, reaper }, pipes))
    }

    /// Waits for the exit of a program whose streams have ended. Signals it if it takes too long.
    pub(super) async fn finish(mut self) {
        for (limit, signal) in [(FINISH_TIMEOUT, Signal::TERM), (TERMINATE_TIMEOUT, Signal::KILL)] {
            if tokio::time::timeout(limit, &mut self.reaper).await.is_ok() {
                return;
            }
            self.child.signal(signal);
        }
        if tokio::time::timeout(KILL_TIMEOUT, &mut self.reaper).await.is_err() {
            log::warn!(
                "the logging program, process {}, does not end after SIGKILL: a file system of this host hangs",
                self.child.pid()
            );
        }
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        self.child.kill();
    }
}

/// A started program, and the opposite ends of its pipes.
struct SpawnedProgram {
    child: Child,
    /// The output that it is to log.
    stdout: PipeWriter,
    stderr: PipeWriter,
    ready: PipeReader,
    /// The program's own standard error.
    own_stderr: PipeReader,
}

impl SpawnedProgram {
    /// [`Self::spawn`] on a thread that may block: the start of a program on a hung file system does not return.
    async fn spawn_off_thread(program: &Program, source: LogSource<'_>) -> Result<Self, LoggerError> {
        let (wanted, id, namespace) = (program.clone(), source.id.to_owned(), source.namespace.to_owned());
        let spawn = move || {
            let source = LogSource {
                id: &id,
                namespace: &namespace,
            };
            Self::spawn(&wanted, source)
        };
        let path = || program.path.clone();
        // A late program is killed by the drop of its child.
        blocking::run("start the logging program", spawn)
            .await
            .map_err(|source| LoggerError::Blocked { path: path(), source })?
            .map_err(|source| LoggerError::Start { path: path(), source })
    }

    fn spawn(program: &Program, source: LogSource<'_>) -> io::Result<Self> {
        let (stdout_reader, stdout) = io::pipe()?;
        let (stderr_reader, stderr) = io::pipe()?;
        let (ready, ready_writer) = io::pipe()?;
        let (own_stderr, own_stderr_writer) = io::pipe()?;
        let mut command = Command::new(&program.path);
        command
            .args(&program.arguments)
            .env_clear()
            .env("CONTAINER_ID", source.id)
            .env("CONTAINER_NAMESPACE", source.namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(own_stderr_writer);
        let mappings = [stdout_reader.into(), stderr_reader.into(), ready_writer.into()]
            .into_iter()
            .zip(3..)
            .map(|(parent_fd, child_fd): (OwnedFd, _)| FdMapping { parent_fd, child_fd })
            .collect();
        descriptor_limit::restore_for(&mut command);
        command.fd_mappings(mappings).map_err(io::Error::other)?;
        let child = Child::from_std(&command.spawn()?)?;
        // Dropping `command` closes the program's ends in this process.
        Ok(Self {
            child,
            stdout,
            stderr,
            ready,
            own_stderr,
        })
    }
}

/// `Err` is the outcome for [`LoggerError::NotReady`].
async fn wait_until_ready(program: &Program, child: &Child, ready: PipeReader) -> Result<(), String> {
    let unreadable = |error: io::Error| format!("cannot be watched: {error}");
    let mut ready = Receiver::from_owned_fd(ready.into()).map_err(unreadable)?;
    let mut byte = [0];
    match tokio::time::timeout(READY_TIMEOUT, ready.read(&mut byte)).await {
        Err(_) => Err(format!("was not ready within {} s", READY_TIMEOUT.as_secs())),
        Ok(Err(error)) => Err(unreadable(error)),
        Ok(Ok(1..)) => Ok(()),
        Ok(Ok(0)) if is_exiting(child) => match child.wait().await {
            // The logging program may have forked a daemon that does the work.
            Ok(WaitStatus::Exited(0)) if !program.must_report_ready => Ok(()),
            Ok(status) => Err(status.to_string()),
            Err(error) => Err(unreadable(error)),
        },
        Ok(Ok(0)) if program.must_report_ready => Err("closed its descriptor 5 without a byte".to_owned()),
        Ok(Ok(0)) => Ok(()),
    }
}

/// Whether the process is exiting. The kernel sets this flag before it closes the process's descriptors, so it shows
/// whether a pipe has ended because of the exit (proc_pid_stat(5), `flags`; `PF_EXITING` of `linux/sched.h`).
fn is_exiting(child: &Child) -> bool {
    const PF_EXITING: u32 = 4;
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.pid())).unwrap_or_default();
    // The name may contain blanks and parentheses. The flags are the seventh field after it.
    let fields = stat.rsplit_once(") ").map(|(_, fields)| fields).unwrap_or_default();
    let flags = fields.split(' ').nth(6).and_then(|flags| flags.parse::<u32>().ok());
    flags.is_some_and(|flags| flags & PF_EXITING != 0)
}

async fn reap(child: Arc<Child>, path: PathBuf, stderr: StderrTail) {
    match child.reap().await {
        Ok(WaitStatus::Exited(0)) => {}
        Ok(status) => {
            let stderr = stderr.finish().await;
            log::warn!("the logging program {} {status}: {stderr}", path.display());
        }
        Err(error) => log::error!("cannot reap the logging program {}: {error}", path.display()),
    }
}

/// Reads the standard error of a program to its end, so that the program never blocks on it, and keeps its last bytes.
struct StderrTail {
    tail: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl StderrTail {
    fn collect(stderr: PipeReader) -> Self {
        let tail = Arc::new(Mutex::new(Vec::new()));
        let kept = tail.clone();
        let reader = tokio::spawn(async move {
            let Ok(mut stderr) = Receiver::from_owned_fd(stderr.into()) else {
                return;
            };
            let mut bytes = [0; MAX_STDERR_TAIL];
            while let Ok(count @ 1..) = stderr.read(&mut bytes).await {
                let mut kept = kept.lock();
                kept.extend_from_slice(&bytes[..count]);
                let surplus = kept.len().saturating_sub(MAX_STDERR_TAIL);
                kept.drain(..surplus);
            }
        });
        Self { tail, reader }
    }

    /// The tail, once the program has exited. Does not wait for other processes that have inherited standard error.
    async fn finish(mut self) -> String {
        let _ = tokio::time::timeout(STDERR_TIMEOUT, &mut self.reader).await;
        let tail = self.tail.lock();
        String::from_utf8_lossy(&tail).trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write, path::Path};

    use nutshell_fixtures::HungVolume;
    use tempfile::TempDir;

    use super::*;
    use crate::shim::{blocking::tests::leaves_thread_free, tests::script::write_script};

    const SOURCE: LogSource<'_> = LogSource {
        id: "c1",
        namespace: "tests",
    };

    /// A logging program that runs a shell script.
    fn program(folder: &TempDir, script: &str) -> Program {
        let path = folder.path().join("logger");
        write_script(&path, &format!("cd {}\n{script}", folder.path().display()));
        Program {
            path,
            arguments: ["key", "value"].map(str::to_owned).into(),
            must_report_ready: false,
        }
    }

    async fn start_error(program: &Program) -> String {
        let started = Logger::start(program, SOURCE, [true, true]).await;
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
        for must_report_ready in [false, true] {
            let mut program = program(&folder, &script.replace("exec 5", "echo >&5; exec 5"));
            program.must_report_ready = must_report_ready;
            let (logger, [stdout, stderr]) = Logger::start(&program, SOURCE, [true, true]).await.unwrap();
            // The program writes this before it is ready.
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
    async fn unwanted_stream_is_at_eof() {
        let folder = tempfile::tempdir().unwrap();
        let program = program(&folder, "exec 5>&-; cat <&4; cat <&3 >out");
        let (logger, [stdout, stderr]) = Logger::start(&program, SOURCE, [true, false]).await.unwrap();
        assert!(stderr.is_none());
        File::from(stdout.unwrap()).write_all(b"x").unwrap();
        logger.finish().await;
        assert_eq!(text(&folder, "out"), "x");
    }

    #[tokio::test]
    async fn error_reports_why_a_program_is_not_ready() {
        let folder = tempfile::tempdir().unwrap();
        let mut missing = program(&folder, "");
        missing.path = "/no/such/logger".into();
        let error = start_error(&missing).await;
        assert_eq!(
            error,
            "cannot start the logging program /no/such/logger: No such file or directory (os error 2)"
        );
        let path = folder.path().join("logger").display().to_string();

        let error = start_error(&program(&folder, "echo no room >&2; exit 3")).await;
        assert_eq!(
            error,
            format!("the logging program {path} exited with status 3: no room")
        );

        let error = start_error(&program(&folder, "exec 3<&- 4<&-; kill -9 $$")).await;
        assert_eq!(error, format!("the logging program {path} was killed by signal 9"));

        let mut silent = program(&folder, "exec 5>&-; exec sleep 1000");
        silent.must_report_ready = true;
        let error = start_error(&silent).await;
        assert_eq!(
            error,
            format!("the logging program {path} closed its descriptor 5 without a byte")
        );
    }

    #[tokio::test]
    async fn program_that_exceeds_its_time_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let stubborn = program(&folder, "trap '' TERM; exec 5>&-; exec /bin/sleep 1000");
        let (logger, streams) = Logger::start(&stubborn, SOURCE, [true, true]).await.unwrap();
        drop(streams);
        let child = logger.child.clone();
        // From here on time advances while the test waits.
        tokio::time::pause();
        logger.finish().await;
        tokio::time::resume();
        let proc = format!("/proc/{}", child.pid());
        let reaped = async {
            while Path::new(&proc).exists() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), reaped)
            .await
            .expect("not reaped");
        tokio::time::pause();

        let error = start_error(&program(&folder, "exec /bin/sleep 1000")).await;
        assert!(error.ends_with("was not ready within 10 s"), "{error}");
    }

    #[tokio::test]
    async fn program_on_a_hung_file_system_does_not_block_the_thread() {
        let volume = HungVolume::mount_temporary();
        let program = Program {
            path: volume.path().join("logger"),
            arguments: Vec::new(),
            must_report_ready: false,
        };
        assert!(leaves_thread_free(volume, Logger::start(&program, SOURCE, [true, true])).await);
    }

    #[tokio::test]
    async fn program_that_waits_for_a_hung_file_system_is_not_awaited_after_sigkill() {
        let volume = HungVolume::mount_temporary();
        let folder = tempfile::tempdir().unwrap();
        let script = format!("exec 5>&-; exec /bin/cat {}", volume.path().join("file").display());
        let program = program(&folder, &script);
        let (logger, streams) = Logger::start(&program, SOURCE, [true, true]).await.unwrap();
        volume.wait_for_request();
        drop(streams);

        tokio::time::pause();
        logger.finish().await;

        drop(volume);
    }

    #[tokio::test]
    async fn program_that_exits_early_is_reaped() {
        let folder = tempfile::tempdir().unwrap();
        let early = program(&folder, "exec 5>&-; read line <&3; exit 1");
        let (mut logger, [stdout, _stderr]) = Logger::start(&early, SOURCE, [true, true]).await.unwrap();
        File::from(stdout.unwrap()).write_all(b"line\n").unwrap();
        (&mut logger.reaper).await.unwrap();
        assert!(
            !Path::new(&format!("/proc/{}", logger.child.pid())).exists(),
            "not reaped"
        );
    }
}
