//! The stand-in for containerd: it creates bundles, runs the actions of the executable, and checks the host after every
//! test.

use std::{
    env, fs,
    io::{self, Read, Write},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use containerd_shim_protos::{api::DeleteResponse, protobuf::Message};
use serde_json::Value;

use crate::{
    bootstrap::{Caller, StartAnswer},
    bundle::Bundle,
    events::Events,
    host,
    stdio::Output,
    task::{TaskClient, V3},
};

/// Plays containerd's part in one test.
#[derive(Debug)]
pub struct FakeContainerd {
    /// The containerd namespace of this test.
    pub namespace: String,
    /// The events service.
    pub events: Events,
    name: String,
    folder: PathBuf,
    bundles: Mutex<Vec<Arc<Bundle>>>,
    outputs: Mutex<Vec<Arc<Output>>>,
    sockets: Mutex<Vec<PathBuf>>,
    serial: AtomicU32,
}

/// A running shim, and a connection to it.
#[derive(Debug, Clone)]
pub struct Shim {
    /// The answer of `start`.
    pub answer: StartAnswer,
    /// A connection to the shim.
    pub task: TaskClient,
    /// On the host, from the response to Connect.
    pub pid: u32,
}

/// The result of an action of the executable.
#[derive(Debug)]
pub struct Outcome {
    /// Whether it exited with 0.
    pub succeeded: bool,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: String,
}

/// Runs a test with a new [`FakeContainerd`], and then asserts that nothing is left on the host and that all events
/// came in order. If the test fails, prints the output of the containers, the logs of the shims, and the events.
///
/// # Panics
///
/// If the test fails.
pub fn with_fake_containerd(test: impl FnOnce(&FakeContainerd)) {
    let start = Instant::now();
    let containerd = FakeContainerd::new();
    let outcome = catch_unwind(AssertUnwindSafe(|| test(&containerd)));
    let outcome = outcome.and_then(|()| {
        catch_unwind(AssertUnwindSafe(|| {
            let clean = host::eventually(Duration::from_secs(10), || match containerd.leftovers() {
                left if left.is_empty() => Ok(()),
                left => Err(left.join("\n")),
            });
            clean.unwrap_or_else(|left| panic!("left on the host:\n{left}"));
            let violations = containerd.events.violations();
            assert!(
                violations.is_empty(),
                "{violations:#?} in {:#?}",
                containerd.events.all()
            );
        }))
    });
    if outcome.is_err() {
        containerd.print_report();
    }
    containerd.clean_up();
    // Not with eprintln!, whose output the test harness shows for failed tests only.
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    let _ = writeln!(io::stderr(), "took {} ms {name}", start.elapsed().as_millis());
    if let Err(panic) = outcome {
        resume_unwind(panic);
    }
}

/// The path of the executable under test.
pub fn executable() -> PathBuf {
    PathBuf::from(env::var_os("NUTSHELL_TEST_SHIM").expect("NUTSHELL_TEST_SHIM names the executable under test"))
}

/// The path of a program of `tests/conformance/programs`.
pub fn program(name: &str) -> PathBuf {
    executable().with_file_name(name)
}

impl FakeContainerd {
    fn new() -> Self {
        static LAST: AtomicU32 = AtomicU32::new(0);
        let name = format!("test-{}", LAST.fetch_add(1, Ordering::Relaxed) + 1);
        let folder = host::work_folder().join(&name);
        for part in ["bundles", "stdio"] {
            fs::create_dir_all(folder.join(part)).unwrap();
        }
        fs::create_dir_all(run_group().join(&name).join("shims")).unwrap();
        let namespace = format!("ns-{name}");
        Self {
            events: Events::serve(&folder.join("events.sock"), &namespace),
            namespace,
            name,
            folder,
            bundles: Mutex::default(),
            outputs: Mutex::default(),
            sockets: Mutex::default(),
            serial: AtomicU32::new(0),
        }
    }

    /// The folder of this test. It is removed after the test.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns a name that nothing else in this test has.
    pub fn new_name(&self, kind: &str) -> String {
        format!("{kind}{}", self.serial.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// The control group path for a container or pod of this test, as a spec has it.
    pub fn cgroups_path(&self, id: &str) -> String {
        format!("/conformance/{}/{id}", self.name)
    }

    /// All shims of this test, and all processes that they have started.
    pub fn processes(&self) -> Vec<host::Process> {
        host::processes_in(&run_group().join(&self.name))
    }

    /// The pids of [`Self::processes`] whose name starts with `name`.
    pub fn pids_of(&self, name: &str) -> Vec<u32> {
        let processes = self.processes().into_iter();
        processes
            .filter(|process| process.name.starts_with(name))
            .map(|process| process.pid)
            .collect()
    }

    /// Creates a bundle with a new id. The spec gets a control group of this test.
    pub fn bundle(&self, spec: &Value) -> Arc<Bundle> {
        self.bundle_with_id(&self.new_name("c"), spec)
    }

    /// Like [`Self::bundle`], but with this id.
    pub fn bundle_with_id(&self, id: &str, spec: &Value) -> Arc<Bundle> {
        let mut spec = spec.clone();
        spec["linux"]["cgroupsPath"] = self.cgroups_path(id).into();
        self.register(Bundle::create(&self.folder.join("bundles"), id, Some(&spec)))
    }

    /// Creates a bundle without `config.json`.
    pub fn bundle_without_spec(&self, id: &str) -> Arc<Bundle> {
        self.register(Bundle::create(&self.folder.join("bundles"), id, None))
    }

    fn register(&self, bundle: Bundle) -> Arc<Bundle> {
        let bundle = Arc::new(bundle);
        self.bundles.lock().unwrap().push(bundle.clone());
        bundle
    }

    /// Creates a fifo and collects what is written to it.
    pub fn output(&self, name: &str) -> Arc<Output> {
        let output = Arc::new(Output::open(self.fifo_path(name)));
        self.outputs.lock().unwrap().push(output.clone());
        output
    }

    /// Returns a path for a new fifo, which does not exist yet.
    pub fn fifo_path(&self, name: &str) -> PathBuf {
        self.folder.join("stdio").join(self.new_name(name))
    }

    /// Calls `start` as `caller` does, and parses the answer as `caller` does.
    ///
    /// # Errors
    ///
    /// The message that a user would see.
    pub fn start(&self, bundle: &Bundle, caller: &Caller) -> Result<StartAnswer, String> {
        let (succeeded, output) = self.start_with(bundle, caller, &["-id", &bundle.id, "-debug"]);
        if !succeeded {
            return Err(String::from_utf8_lossy(&output).into_owned());
        }
        let answer = caller.parse_answer(&output)?;
        self.sockets.lock().unwrap().push(answer.socket());
        Ok(answer)
    }

    /// Calls `start` with the usual flags and `flags`. Returns whether it succeeded, and its output, which includes
    /// standard error.
    pub fn start_with(&self, bundle: &Bundle, caller: &Caller, flags: &[&str]) -> (bool, Vec<u8>) {
        let input = caller.input(&self.namespace, &bundle.id, &self.ttrpc_address(), &self.address());
        let (mut output, writer) = io::pipe().unwrap();
        let mut command = self.command(bundle, flags);
        command.arg("start").stdout(writer.try_clone().unwrap()).stderr(writer);
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        let mut child = command.spawn().unwrap();
        // `command` holds the write ends of the pipe.
        drop(command);
        if let Some(input) = input {
            // A process that refuses its arguments does not read its input.
            let _ = child.stdin.take().unwrap().write_all(&input);
        }
        let mut bytes = Vec::new();
        output.read_to_end(&mut bytes).unwrap();
        (child.wait().unwrap().success(), bytes)
    }

    /// Starts a shim for `bundle` as the newest containerd does, and connects to it with version 3 of the Task service.
    pub fn start_shim(&self, bundle: &Bundle) -> Shim {
        let answer = self.start(bundle, &Caller::newest()).unwrap();
        self.connect_shim(answer)
    }

    /// Connects to the shim of a `start` answer.
    pub fn connect_shim(&self, answer: StartAnswer) -> Shim {
        let task = TaskClient::connect(&answer.address, V3);
        let pid = task.connect_to("").unwrap().shim_pid;
        Shim { answer, task, pid }
    }

    /// Calls `delete` as every version of containerd does.
    pub fn delete(&self, bundle: &Bundle) -> Outcome {
        let mut command = self.command(bundle, &["-id", &bundle.id, "-bundle", bundle.path.to_str().unwrap()]);
        Outcome::run(command.arg("delete").stdin(Stdio::null()))
    }

    /// Calls `delete`, asserts that it succeeds, and returns its answer.
    pub fn delete_bundle(&self, bundle: &Bundle) -> DeleteResponse {
        let outcome = self.delete(bundle);
        assert!(outcome.succeeded, "delete: {}", outcome.stderr);
        assert_eq!(outcome.stderr, "", "delete writes to standard error");
        DeleteResponse::parse_from_bytes(&outcome.stdout).unwrap()
    }

    fn ttrpc_address(&self) -> PathBuf {
        self.folder.join("events.sock")
    }

    fn address(&self) -> PathBuf {
        self.folder.join("containerd.sock")
    }

    /// The command of the executable with containerd's flags, environment and working directory. It runs in a control
    /// group of this test.
    fn command(&self, bundle: &Bundle, flags: &[&str]) -> Command {
        use std::os::unix::process::CommandExt;
        let procs = run_group().join(&self.name).join("shims/cgroup.procs");
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", r#"echo 0 >"$0" && exec "$@""#])
            .arg(procs)
            .arg(executable())
            .args(["-namespace", &self.namespace, "-address"])
            .arg(self.address())
            .args(["-publish-binary", "/usr/bin/containerd"])
            .args(flags)
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .env("GOMAXPROCS", "2")
            .env("MAX_SHIM_VERSION", "2")
            .env("TTRPC_ADDRESS", self.ttrpc_address())
            .env("GRPC_ADDRESS", self.address())
            .env("NAMESPACE", &self.namespace)
            .process_group(0);
        // A test may call `delete` after it has removed the bundle.
        if bundle.path.exists() {
            command.current_dir(&bundle.path);
        }
        command
    }

    /// Processes, control groups, mounts, sockets and bundles that this test has left on the host, one line each.
    fn leftovers(&self) -> Vec<String> {
        let mut left = Vec::new();
        for process in self.processes() {
            left.push(format!("process {} {}", process.pid, process.name));
        }
        let own = run_group().join(&self.name);
        for folder in host::cgroups_at(&own) {
            if folder != own && folder != own.join("shims") {
                left.push(format!("control group {}", folder.display()));
            }
        }
        for mount in host::mounts_below(&self.folder) {
            left.push(format!("mount {mount}"));
        }
        for socket in self.sockets.lock().unwrap().iter().filter(|socket| socket.exists()) {
            left.push(format!("socket {}", socket.display()));
        }
        for entry in fs::read_dir(self.folder.join("bundles")).unwrap() {
            left.push(format!("file {}", entry.unwrap().path().display()));
        }
        left
    }

    fn print_report(&self) {
        for output in self.outputs.lock().unwrap().iter() {
            let text = output.so_far();
            if !text.is_empty() {
                println!("-- {}:\n{text}", output.path().display());
            }
        }
        for bundle in self.bundles.lock().unwrap().iter() {
            println!("-- the shim's log of {}, with the guest's console:", bundle.id);
            println!("{}", bundle.read_log());
        }
        println!("-- events:");
        for event in self.events.all() {
            println!("{} {}", event.container, event.kind);
        }
    }

    fn clean_up(&self) {
        host::remove_cgroup(&run_group().join(&self.name)).unwrap();
        for mount in host::mounts_below(&self.folder).iter().rev() {
            let _ = rustix::mount::unmount(mount.as_str(), rustix::mount::UnmountFlags::DETACH);
        }
        for socket in self.sockets.lock().unwrap().iter() {
            let _ = fs::remove_file(socket);
        }
        self.events.stop();
        self.outputs.lock().unwrap().clear();
        fs::remove_dir_all(&self.folder).unwrap();
    }
}

impl Outcome {
    /// Runs a command to its end.
    pub fn run(command: &mut Command) -> Self {
        let output = command.output().unwrap();
        Self {
            succeeded: output.status.success(),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// The control group of this run, which the suite creates.
fn run_group() -> &'static Path {
    Path::new("/sys/fs/cgroup/conformance")
}
