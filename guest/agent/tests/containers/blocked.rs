//! Tests of processes that SIGKILL does not end, because they wait for a file system that does not answer.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nutshell_protocol::{BlockedThread, FailureKind, Request, Response, SHARE_PATH, Stdio};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::harness::{Agent, shell, unique};

/// How long the kernel may take for a step.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A FUSE mount whose server reads all requests, and answers only the one that starts the session. Dropped, it is
/// removed, and the calls that wait fail.
struct HungVolume {
    path: PathBuf,
    requests: mpsc::Receiver<()>,
}

impl HungVolume {
    fn mount(path: PathBuf) -> Self {
        fs::create_dir(&path).unwrap();
        let mut connection = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", connection.as_raw_fd());
        let options = CString::new(options).unwrap();
        mount("hung", &path, "fuse", MountFlags::empty(), options.as_c_str()).unwrap();
        // include/uapi/linux/fuse.h: `fuse_in_header` has the unique id at 8; the reply is `fuse_out_header`, and
        // `fuse_init_out` with version 7.31 and 4 KiB in a write.
        let mut request = [0; 8192];
        assert!(connection.read(&mut request).unwrap() >= 40);
        let mut reply = [80_u32.to_le_bytes(), 0_u32.to_le_bytes()].concat();
        reply.extend(&request[8..16]);
        reply.extend([7_u32, 31, 0, 0, 0, 4096].map(u32::to_le_bytes).concat());
        reply.resize(80, 0);
        connection.write_all(&reply).unwrap();
        let (sender, requests) = mpsc::channel();
        // Ends with the mount.
        thread::spawn(move || while connection.read(&mut request).is_ok() && sender.send(()).is_ok() {});
        Self { path, requests }
    }

    /// Waits until a process waits for an answer, which makes it unkillable.
    fn wait_for_request(&self) {
        self.requests.recv_timeout(TIMEOUT).unwrap();
    }
}

impl Drop for HungVolume {
    fn drop(&mut self) {
        unmount(&self.path, UnmountFlags::FORCE | UnmountFlags::DETACH).unwrap();
        // Containers of other tests use the same root file system. One that was created meanwhile has a copy of the mount
        // until it is deleted.
        let deadline = Instant::now() + TIMEOUT;
        while let Err(error) = fs::remove_dir(&self.path) {
            assert_eq!(error.kind(), io::ErrorKind::ResourceBusy, "{error}");
            assert!(Instant::now() < deadline, "{} stays a mount point", self.path.display());
            thread::yield_now();
        }
    }
}

fn blocked_threads(agent: &mut Agent, id: &str, exec: Option<&str>) -> Vec<BlockedThread> {
    let request = Request::BlockedThreads {
        container: id.to_owned(),
        exec: exec.map(str::to_owned),
    };
    match agent.ask(request).unwrap() {
        Response::BlockedThreads(threads) => threads,
        other => panic!("{other:?} instead of threads"),
    }
}

#[test]
fn killed_container_that_waits_for_a_hung_file_system_is_blocked_and_can_be_abandoned() {
    let mut agent = Agent::start();
    agent.run(&shell("true"));
    let id = &format!("blocked-{}", unique());
    let volume = HungVolume::mount(Path::new(SHARE_PATH).join("busybox").join(id));
    // The first process ends only after the one that is blocked.
    let script = format!("cat /{id}/x; true");
    agent.create(id, &shell(&script), Stdio::default()).unwrap();
    agent.start_container(id);
    volume.wait_for_request();
    // A signal still interrupts the wait.
    assert_eq!(blocked_threads(&mut agent, id, None), []);

    agent.kill(id, 9).unwrap();
    let deadline = Instant::now() + TIMEOUT;
    let mut before = Vec::new();
    let threads = loop {
        let threads = blocked_threads(&mut agent, id, None);
        if !threads.is_empty() && threads == before {
            break threads;
        }
        assert!(Instant::now() < deadline, "the threads are not blocked: {threads:?}");
        before = threads;
    };
    let names: Vec<_> = threads.iter().map(|thread| thread.name.as_str()).collect();
    assert!(names.contains(&"cat"), "{threads:?}");
    assert_eq!(blocked_threads(&mut agent, id, Some("none")), []);

    let container = id.clone();
    assert_eq!(agent.ask(Request::AbandonContainer { container }), Ok(Response::Done));
    let container = id.clone();
    let failure = agent.ask(Request::DeleteContainer { container }).unwrap_err();
    assert_eq!(failure.kind, FailureKind::NotFound);
    assert!(!Path::new("/run/nutshell/state").join(id).exists());
    let cgroup = Path::new("/sys/fs/cgroup").join(format!("container-{id}"));
    assert!(cgroup.exists(), "the cgroup of a blocked process was removed");

    drop(volume);
    let deadline = Instant::now() + TIMEOUT;
    while fs::remove_dir(&cgroup).is_err() {
        assert!(Instant::now() < deadline, "the process did not end");
    }
    // The next exit is that of another container.
    agent.run(&shell("true"));
    crate::harness::assert_nothing_left(id);
}

#[test]
fn abandoned_container_whose_processes_end_is_deleted() {
    let mut agent = Agent::start();
    let id = &format!("abandoned-{}", unique());
    agent.create(id, &shell("sleep 1000"), Stdio::default()).unwrap();
    agent.start_container(id);
    let container = id.clone();
    assert_eq!(agent.ask(Request::AbandonContainer { container }), Ok(Response::Done));
    crate::harness::assert_nothing_left(id);
}
