//! The stand-in for containerd: bundles, the actions of the executable, and a look at the host after
//! every test.

use std::{
    env, fs,
    io::{self, Read, Write},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use containerd_shim_protos::{api::DeleteResponse, protobuf::Message};
use serde_json::Value;

use crate::{
    bootstrap::{Answer, Caller},
    bundle::Bundle,
    events::Events,
    host,
    stdio::Output,
    task::{Task, V3},
};

/// Everything that containerd has, for one test.
#[derive(Debug)]
pub struct Containerd {
    /// containerd's namespace of this test.
    pub namespace: String,
    /// The service that takes events.
    pub events: Events,
    name: String,
    folder: PathBuf,
    bundles: Mutex<Vec<Arc<Bundle>>>,
    outputs: Mutex<Vec<Arc<Output>>>,
    sockets: Mutex<Vec<PathBuf>>,
    serial: AtomicU32,
}

/// A shim that serves.
#[derive(Debug, Clone)]
pub struct Shim {
    /// What `start` answered.
    pub answer: Answer,
    /// A connection.
    pub task: Task,
    /// Its pid.
    pub pid: u32,
}

/// What an action of the executable came to.
#[derive(Debug)]
pub struct Outcome {
    /// It exited with 0.
    pub succeeded: bool,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: String,
}

/// Runs a test with a containerd of its own, and asserts that it leaves nothing on the host and that
/// its events came in order. On failure prints what the containers and their shims wrote.
///
/// # Panics
///
/// Where the test fails.
pub fn with_containerd(test: impl FnOnce(&Containerd)) {
    let start = Instant::now();
    let containerd = Containerd::new();
    let outcome = catch_unwind(AssertUnwindSafe(|| test(&containerd)));
    let outcome = outcome.and_then(|()| {
        catch_unwind(AssertUnwindSafe(|| {
            let nothing = host::eventually(Duration::from_secs(10), || match containerd.left() {
                left if left.is_empty() => Ok(()),
                left => Err(left.join("\n")),
            });
            nothing.unwrap_or_else(|left| panic!("left on the host:\n{left}"));
            let violations = containerd.events.violations();
            assert!(
                violations.is_empty(),
                "{violations:#?} in {:#?}",
                containerd.events.all()
            );
        }))
    });
    if outcome.is_err() {
        containerd.report();
    }
    containerd.clear();
    // Not with a macro of the standard library, whose output is shown for failures only.
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    let _ = writeln!(io::stderr(), "took {} ms {name}", start.elapsed().as_millis());
    if let Err(panic) = outcome {
        resume_unwind(panic);
    }
}

/// Where everything of this run is.
pub(crate) fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = env::temp_dir().join("conformance");
        fs::create_dir_all(&folder).unwrap();
        folder
    })
}

/// The executable under test.
pub fn executable() -> PathBuf {
    PathBuf::from(env::var_os("NUTSHELL_TEST_SHIM").expect("NUTSHELL_TEST_SHIM names the executable under test"))
}

impl Containerd {
    fn new() -> Self {
        static LAST: AtomicU32 = AtomicU32::new(0);
        let name = format!("test-{}", LAST.fetch_add(1, Ordering::Relaxed) + 1);
        let folder = folder().join(&name);
        for part in ["bundles", "stdio"] {
            fs::create_dir_all(folder.join(part)).unwrap();
        }
        fs::create_dir_all(group().join(&name).join("shims")).unwrap();
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

    /// The folder of this test, for whatever it needs.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A name that nothing else of this test has.
    pub fn new_name(&self, kind: &str) -> String {
        format!("{kind}{}", self.serial.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// The control group below which a pod of this test may be.
    pub fn cgroups_path(&self, id: &str) -> String {
        format!("/conformance/{}/{id}", self.name)
    }

    /// All processes that shims of this test are or have started.
    pub fn processes(&self) -> Vec<host::Process> {
        host::processes_in(&group().join(&self.name))
    }

    /// The pids of its processes whose name begins so.
    pub fn pids_of(&self, name: &str) -> Vec<u32> {
        let processes = self.processes().into_iter();
        processes
            .filter(|process| process.name.starts_with(name))
            .map(|process| process.pid)
            .collect()
    }

    /// A bundle with a new id, its control group set.
    pub fn bundle(&self, spec: &Value) -> Arc<Bundle> {
        self.bundle_of(&self.new_name("c"), spec)
    }

    /// A bundle for `id`.
    pub fn bundle_of(&self, id: &str, spec: &Value) -> Arc<Bundle> {
        let mut spec = spec.clone();
        spec["linux"]["cgroupsPath"] = self.cgroups_path(id).into();
        self.keep(Bundle::make(&self.folder.join("bundles"), id, Some(&spec)))
    }

    /// A bundle without `config.json`.
    pub fn bundle_without_spec(&self, id: &str) -> Arc<Bundle> {
        self.keep(Bundle::make(&self.folder.join("bundles"), id, None))
    }

    fn keep(&self, bundle: Bundle) -> Arc<Bundle> {
        let bundle = Arc::new(bundle);
        self.bundles.lock().unwrap().push(bundle.clone());
        bundle
    }

    /// A fifo that is read.
    pub fn output(&self, name: &str) -> Arc<Output> {
        let output = Arc::new(Output::open(self.fifo(name)));
        self.outputs.lock().unwrap().push(output.clone());
        output
    }

    /// The path for a new fifo.
    pub fn fifo(&self, name: &str) -> PathBuf {
        self.folder.join("stdio").join(self.new_name(name))
    }

    /// `start` as `caller` calls it; the answer as `caller` reads it.
    ///
    /// # Errors
    ///
    /// What a user would be shown.
    pub fn start(&self, bundle: &Bundle, caller: &Caller) -> Result<Answer, String> {
        let (succeeded, output) = self.start_with(bundle, caller, &["-id", &bundle.id, "-debug"]);
        if !succeeded {
            return Err(String::from_utf8_lossy(&output).into_owned());
        }
        let answer = caller.read(&output)?;
        self.sockets.lock().unwrap().push(answer.socket());
        Ok(answer)
    }

    /// `start` with these flags beside those that are always the same: whether it succeeded, and its
    /// output, standard error included.
    pub fn start_with(&self, bundle: &Bundle, caller: &Caller, flags: &[&str]) -> (bool, Vec<u8>) {
        let input = caller.input(&self.namespace, &bundle.id, &self.ttrpc_address(), &self.address());
        let (mut output, writer) = io::pipe().unwrap();
        let mut command = self.command(bundle, flags);
        command.arg("start").stdout(writer.try_clone().unwrap()).stderr(writer);
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        let mut child = command.spawn().unwrap();
        // It holds the writing ends.
        drop(command);
        if let Some(input) = input {
            // A process that refuses its arguments does not read.
            let _ = child.stdin.take().unwrap().write_all(&input);
        }
        let mut bytes = Vec::new();
        output.read_to_end(&mut bytes).unwrap();
        (child.wait().unwrap().success(), bytes)
    }

    /// A shim for `bundle`, started by the newest containerd, and a connection for version 3.
    pub fn shim(&self, bundle: &Bundle) -> Shim {
        let answer = self.start(bundle, &Caller::newest()).unwrap();
        self.shim_at(answer)
    }

    /// The shim at an address.
    pub fn shim_at(&self, answer: Answer) -> Shim {
        let task = Task::connect(&answer.address, V3);
        let pid = task.connect_to("").unwrap().shim_pid;
        Shim { answer, task, pid }
    }

    /// `delete` as every containerd calls it.
    pub fn delete(&self, bundle: &Bundle) -> Outcome {
        let mut command = self.command(bundle, &["-id", &bundle.id, "-bundle", bundle.path.to_str().unwrap()]);
        Outcome::of(command.arg("delete").stdin(Stdio::null()))
    }

    /// [`Self::delete`], which must succeed: its answer.
    pub fn delete_answer(&self, bundle: &Bundle) -> DeleteResponse {
        let outcome = self.delete(bundle);
        assert!(outcome.succeeded, "delete: {}", outcome.stderr);
        assert_eq!(outcome.stderr, "", "delete says something is wrong");
        DeleteResponse::parse_from_bytes(&outcome.stdout).unwrap()
    }

    fn ttrpc_address(&self) -> PathBuf {
        self.folder.join("events.sock")
    }

    fn address(&self) -> PathBuf {
        self.folder.join("containerd.sock")
    }

    /// The executable with containerd's flags, environment and working directory, in a control group
    /// of this test.
    fn command(&self, bundle: &Bundle, flags: &[&str]) -> Command {
        use std::os::unix::process::CommandExt;
        let procs = group().join(&self.name).join("shims/cgroup.procs");
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
        // An orderly test may delete what it has removed.
        if bundle.path.exists() {
            command.current_dir(&bundle.path);
        }
        command
    }

    /// What this test has left on the host, a line each.
    fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        for process in self.processes() {
            left.push(format!("process {} {}", process.pid, process.name));
        }
        let own = group().join(&self.name);
        for folder in host::groups_at(&own) {
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

    fn report(&self) {
        for output in self.outputs.lock().unwrap().iter() {
            let text = output.so_far();
            if !text.is_empty() {
                println!("-- {}:\n{text}", output.path().display());
            }
        }
        for bundle in self.bundles.lock().unwrap().iter() {
            println!(
                "-- the shim's log, with the guest's console where it is known, {}:",
                bundle.id
            );
            println!("{}", bundle.logged());
        }
        println!("-- events:");
        for event in self.events.all() {
            println!("{} {}", event.container, event.what);
        }
    }

    fn clear(&self) {
        host::remove_group(&group().join(&self.name)).unwrap();
        for mount in host::mounts_below(&self.folder).iter().rev() {
            let _ = rustix::mount::unmount(mount.as_str(), rustix::mount::UnmountFlags::DETACH);
        }
        for socket in self.sockets.lock().unwrap().iter() {
            let _ = fs::remove_file(socket);
        }
        self.events.leave();
        self.outputs.lock().unwrap().clear();
        fs::remove_dir_all(&self.folder).unwrap();
    }
}

impl Outcome {
    /// Runs a command.
    pub fn of(command: &mut Command) -> Self {
        let output = command.output().unwrap();
        Self {
            succeeded: output.status.success(),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

fn group() -> &'static Path {
    Path::new("/sys/fs/cgroup/conformance")
}
