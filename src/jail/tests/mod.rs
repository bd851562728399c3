//! Tests of a jailed child process, from its parent's view.

mod attempts;

use std::{
    collections::HashMap,
    env, fs,
    io::{BufRead, BufReader, Write},
    os::fd::{AsFd, OwnedFd},
    process::{self, Child, ChildStdout, Command, ExitCode, Stdio, exit},
    ptr,
};

use rustix::fs::OFlags;

use super::*;
use crate::fs::CAPABILITIES;

/// Runs before the test harness. [`build_command`] starts this test executable: if the first argument is a role, the
/// role runs here with one thread, as in the real executable. Otherwise, the threads of devices that tests start
/// install their lists from now on.
#[used]
// SAFETY: an entry of .init_array is called once with the C runtime and std's arguments ready.
#[unsafe(link_section = ".init_array")]
static RUN_ROLE: extern "C" fn() = run_role;

extern "C" fn run_role() {
    match env::args().nth(1).as_deref() {
        Some(crate::fs::ROLE) => exit(i32::from(crate::fs::main() != ExitCode::SUCCESS)),
        Some(crate::disk::inspector::ROLE) => {
            exit(i32::from(crate::disk::inspector::main() != ExitCode::SUCCESS));
        }
        Some(crate::check::system_calls::tests::ROLE) => crate::check::system_calls::tests::check_every_call(),
        Some("jail-none") => {
            println!("free");
            answer_questions(
                &fs::File::open("/dev/null").unwrap(),
                &fs::File::open("/proc/self").unwrap(),
            );
        }
        Some("jail-empty") => run_jailed_child(CapabilitySet::empty(), OpenAccess::Nothing, None),
        Some("jail-capable") => run_jailed_child(CAPABILITIES, OpenAccess::Root, None),
        Some("jail-listed") => run_jailed_child(CapabilitySet::empty(), OpenAccess::Nothing, Some(ANSWERS)),
        _ => return seccomp::testing::enable_thread_lists(),
    }
    exit(0);
}

/// The calls that a jailed child needs to answer questions.
const ANSWERS: CallList = CallList {
    thread: "main",
    own: &[seccomp::runtime::EVERY_THREAD],
    starts: &[],
    refused: seccomp::runtime::REFUSED_WITHOUT_FILES,
};

/// Enters the jail, prints the result, and then answers questions about what the process can do, one a line.
fn run_jailed_child(capabilities: CapabilitySet, open_access: OpenAccess, calls: Option<CallList>) {
    let kept = fs::File::open("/dev/null").unwrap();
    // Tests of the namespaces pass a pidfd as standard error.
    let peer = io::stderr().as_fd().try_clone_to_owned().unwrap();
    let directory = fs::File::open("/proc/self").unwrap();
    let entered = enter(&Jail {
        role: "test",
        name: c"jailed-child",
        root: Root::Empty,
        peer: Some(peer.as_fd()),
        open_access,
        capabilities,
        keep: &[kept.as_fd(), directory.as_fd()],
        max_descriptors: 1024,
        descriptor_table_size: 256,
        max_threads: 4,
        calls,
    });
    drop(peer);
    match entered {
        Ok(()) => println!("jailed"),
        Err(error) => {
            println!("{error}");
            exit(1);
        }
    }
    answer_questions(&kept, &directory);
}

fn answer_questions(kept: &fs::File, directory: &fs::File) {
    for line in io::stdin().lines() {
        let line = line.unwrap();
        let answer = match line.as_str() {
            "root" => format!(
                "{:?}",
                fs::read_dir("/").map(Iterator::count).map_err(|error| error.kind())
            ),
            "write" => format!("{:?}", fs::write("/x", "").map_err(|error| error.kind())),
            "kept" => format!("{:?}", rustix::io::fcntl_getfd(kept).is_ok()),
            "uid 0" => {
                let changed = rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT);
                let sets = rustix::thread::capabilities(None).unwrap();
                format!("{:?} {:x}", changed.is_ok(), sets.effective.bits())
            }
            "open" => format!("{:?}", fs::File::open("/").map_err(|error| error.kind())),
            "beneath" => {
                let opened = rustix::fs::openat(directory, "status", OFlags::RDONLY, Mode::empty());
                format!("{:?}", opened.map(drop))
            }
            "pid" => process::id().to_string(),
            // Signal 0 only asks whether there is a process that it would reach.
            "kill all" => format!("{:?}", nix::sys::signal::kill(nix::unistd::Pid::from_raw(-1), None)),
            // SAFETY: this process has one thread, and the child makes one system call.
            "fork" => match unsafe { nix::unistd::fork() }.unwrap() {
                nix::unistd::ForkResult::Parent { child } => child.to_string(),
                nix::unistd::ForkResult::Child => loop {
                    nix::unistd::pause();
                },
            },
            "tcp" => {
                let bound = std::net::TcpListener::bind("0.0.0.0:0");
                format!("{:?}", bound.map(drop).map_err(|error| error.kind()))
            }
            "socket" => format!("{:?}", std::net::UdpSocket::bind("127.0.0.1:0").is_ok()),
            "panic" => panic!("requested"),
            other => match other.strip_prefix("attempt ") {
                Some(words) => attempts::answer(words),
                None => panic!("unknown question {other}"),
            },
        };
        println!("{answer}");
    }
}

struct JailedChild {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl JailedChild {
    fn start(role: &str) -> Self {
        Self::from(&mut RoleCommand::new(role).unwrap())
    }

    fn from(command: &mut RoleCommand) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        Self::new(command.spawn().unwrap())
    }

    fn new(mut child: Child) -> Self {
        let answers = BufReader::new(child.stdout.take().unwrap());
        Self { child, answers }
    }

    fn jailed(role: &str) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "only root can enter the jail: run these tests as root"
        );
        let mut jailed = Self::start(role);
        assert_eq!(jailed.answer(), "jailed");
        jailed
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn ask(&mut self, question: &str) -> String {
        writeln!(self.child.stdin.as_mut().unwrap(), "{question}").unwrap();
        self.answer()
    }

    fn proc(&self, file: &str) -> String {
        format!("/proc/{}/{file}", self.child.id())
    }

    fn status(&self) -> HashMap<String, String> {
        fs::read_to_string(self.proc("status"))
            .unwrap()
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
            .collect()
    }
}

impl Drop for JailedChild {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn jailed_process_has_unused_ids_and_only_the_listed_capabilities() {
    // The process starts with the groups of this thread, and must drop them.
    rustix::thread::set_thread_groups(&[Gid::from_raw(4), Gid::from_raw(6)]).unwrap();
    for (role, capabilities) in [("jail-empty", CapabilitySet::empty()), ("jail-capable", CAPABILITIES)] {
        let jailed = JailedChild::jailed(role);
        let status = jailed.status();

        let id = FIRST_ID + jailed.child.id();
        let kept = format!("{:016x}", capabilities.bits());
        for (key, expected) in [
            ("Name", "jailed-child"),
            ("Uid", &format!("{id}\t{id}\t{id}\t{id}")),
            ("Gid", &format!("{id}\t{id}\t{id}\t{id}")),
            ("Groups", ""),
            ("CapInh", "0000000000000000"),
            ("CapPrm", &kept),
            ("CapEff", &kept),
            ("CapBnd", "0000000000000000"),
            ("CapAmb", "0000000000000000"),
            ("NoNewPrivs", "1"),
            ("Threads", "1"),
            ("FDSize", "256"),
        ] {
            assert_eq!(status[key], expected, "{key} of {role}");
        }
    }
}

#[test]
fn namespaces_differ_from_the_parents() {
    let jailed = JailedChild::jailed("jail-empty");
    for namespace in ["mnt", "net", "ipc", "uts", "pid"] {
        let file = format!("ns/{namespace}");
        assert_ne!(
            fs::read_link(jailed.proc(&file)).unwrap(),
            fs::read_link(format!("/proc/self/{file}")).unwrap(),
            "{namespace}"
        );
    }
}

#[test]
fn jailed_process_shares_the_namespaces_of_a_jailed_peer_and_of_no_other() {
    let pidfd = |pid: u32| {
        let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
        rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap()
    };
    let namespaces = |jailed: &JailedChild| {
        ["net", "ipc", "uts"].map(|name| fs::read_link(jailed.proc(&format!("ns/{name}"))).unwrap())
    };
    let beside = |peer: &OwnedFd| {
        let mut command = RoleCommand::new("jail-empty").unwrap();
        let mut jailed = JailedChild::from(command.stderr(peer.try_clone().unwrap()));
        assert_eq!(jailed.answer(), "jailed");
        namespaces(&jailed)
    };
    let first = JailedChild::jailed("jail-empty");
    let of_first = pidfd(first.child.id());

    assert_eq!(beside(&of_first), namespaces(&first));

    let own = ["net", "ipc", "uts"].map(|name| fs::read_link(format!("/proc/self/ns/{name}")).unwrap());
    let of_unjailed = beside(&pidfd(process::id()));
    assert!(
        of_unjailed.iter().zip(&own).all(|(one, other)| one != other),
        "{of_unjailed:?}"
    );
    drop(first);
    let of_ended = beside(&of_first);
    assert!(
        of_ended.iter().zip(&own).all(|(one, other)| one != other),
        "{of_ended:?}"
    );
    // This descriptor is not a pidfd.
    let of_file = beside(&fs::File::open("/proc/self/ns/net").unwrap().into());
    assert!(of_file.iter().zip(&own).all(|(one, other)| one != other), "{of_file:?}");
}

#[test]
fn jailed_process_is_alone_in_its_pid_namespace() {
    let mut jailed = JailedChild::jailed("jail-capable");
    assert_eq!(jailed.ask("pid"), "1");
    assert!(jailed.ask("uid 0").starts_with("true"));
    assert_eq!(jailed.ask("kill all"), "Err(ESRCH)");
}

#[test]
fn descendants_of_a_jailed_process_end_with_it() {
    let mut jailed = JailedChild::jailed("jail-empty");
    jailed.ask("fork");
    let pid = jailed.child.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let descendant = rustix::process::Pid::from_raw(children.trim().parse().unwrap()).unwrap();
    let descendant = rustix::process::pidfd_open(descendant, rustix::process::PidfdFlags::empty()).unwrap();

    jailed.child.kill().unwrap();
    jailed.child.wait().unwrap();

    // A pidfd is readable when its process has ended.
    let mut poll = [rustix::event::PollFd::new(&descendant, rustix::event::PollFlags::IN)];
    let limit = rustix::time::Timespec { tv_sec: 10, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut poll, Some(&limit)), Ok(1));
}

#[test]
fn thread_that_starts_a_jailed_process_can_start_threads_and_further_ones() {
    let first = JailedChild::jailed("jail-empty");
    let second = JailedChild::jailed("jail-empty");
    let namespace = |jailed: &JailedChild| fs::read_link(jailed.proc("ns/pid")).unwrap();
    assert_ne!(namespace(&first), namespace(&second));
    std::thread::spawn(|| ()).join().unwrap();
    let mut child = Command::new("true").spawn().unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn nothing_is_opened_beneath_a_kept_directory() {
    let mut jailed = JailedChild::jailed("jail-empty");
    assert_eq!(
        jailed.ask("beneath"),
        "Err(Os { code: 13, kind: PermissionDenied, message: \"Permission denied\" })"
    );
}

/// Its network namespace has no peer, so this matters only if another layer fails.
#[test]
fn tcp_port_cannot_be_bound() {
    let mut jailed = JailedChild::jailed("jail-empty");
    assert_eq!(jailed.ask("tcp"), "Err(PermissionDenied)");
}

#[test]
fn environment_is_empty_and_the_arguments_name_only_the_role_and_the_shim() {
    let jailed = JailedChild::jailed("jail-empty");
    assert_eq!(fs::read(jailed.proc("environ")).unwrap(), b"");
    let arguments = fs::read_to_string(jailed.proc("cmdline")).unwrap();
    assert_eq!(
        arguments,
        format!("nutshell-jail-empty\0jail-empty\0{}\0", process::id())
    );
}

/// The mountinfo that a process at the root of the child's mount namespace would see. The child's own root is not there.
fn mounts_of_namespace(child: &JailedChild) -> String {
    let namespace = fs::File::open(child.proc("ns/mnt")).unwrap();
    let list = |proc: fs::File| {
        unshare(CloneFlags::CLONE_FS).unwrap();
        setns(namespace, CloneFlags::CLONE_NEWNS).unwrap();
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let mounts = rustix::fs::openat(proc, "thread-self/mountinfo", flags, Mode::empty()).unwrap();
        io::read_to_string(fs::File::from(mounts)).unwrap()
    };
    let proc = fs::File::open("/proc").unwrap();
    std::thread::spawn(move || list(proc)).join().unwrap()
}

#[test]
fn only_an_empty_read_only_root_is_mounted_cve_2026_1386() {
    // Landlock does not hide the root from this one.
    let mut jailed = JailedChild::jailed("jail-capable");
    let mounts = mounts_of_namespace(&jailed);
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains(" / / ro,nosuid,nodev,noexec"), "{mounts}");
    assert_eq!(jailed.ask("root"), "Ok(0)");
    assert_eq!(jailed.ask("write"), "Err(ReadOnlyFilesystem)");
}

#[test]
fn only_the_loopback_interface_exists() {
    let jailed = JailedChild::jailed("jail-empty");
    let devices = fs::read_to_string(jailed.proc("net/dev")).unwrap();
    let names: Vec<_> = devices
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, _)| name.trim())
        .collect();
    assert_eq!(names, ["lo"], "{devices}");
}

#[test]
fn inherited_descriptors_are_closed_except_the_listed_ones() {
    let leaked = fs::File::open("/proc/self/exe").unwrap();
    rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
    let mut jailed = JailedChild::jailed("jail-empty");
    let open = fs::read_dir(jailed.proc("fd")).unwrap().count();
    assert_eq!(open, 6, "0, 1, 2, the listed ones, and the empty root");
    assert_eq!(jailed.ask("kept"), "true");
}

#[test]
fn resource_limits_are_set() {
    let jailed = JailedChild::jailed("jail-empty");
    let limits = fs::read_to_string(jailed.proc("limits")).unwrap();
    for (limit, value) in [
        ("Max core file size", "0"),
        ("Max locked memory", "0"),
        ("Max msgqueue size", "0"),
        ("Max nice priority", "0"),
        ("Max realtime priority", "0"),
        ("Max processes", "4"),
        ("Max open files", "1024"),
    ] {
        let line = limits.lines().find(|line| line.starts_with(limit)).unwrap();
        let fields: Vec<_> = line[limit.len()..].split_whitespace().collect();
        assert_eq!(fields[..2], [value, value], "{limit}");
    }
}

#[test]
fn taking_uid_0_gains_no_capability() {
    let mut jailed = JailedChild::jailed("jail-capable");
    assert_eq!(jailed.ask("uid 0"), format!("true {:x}", CAPABILITIES.bits()));
    let mut jailed = JailedChild::jailed("jail-empty");
    assert_eq!(jailed.ask("uid 0"), "false 0");
}

#[test]
fn jailed_process_dies_with_the_thread_that_started_it() {
    let mut jailed = std::thread::spawn(|| JailedChild::jailed("jail-empty")).join().unwrap();
    assert_eq!(jailed.answer(), "", "end of file");
    let status = jailed.child.wait().unwrap();
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(libc::SIGKILL)
    );
}

#[test]
fn role_refuses_to_run_without_the_shim_as_parent() {
    let start =
        |command: &mut Command| JailedChild::new(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
    let mut with_other_parent = Command::new("/proc/self/exe");
    with_other_parent.args(["jail-empty", "1"]);
    assert_eq!(start(&mut with_other_parent).answer(), JailError::Orphaned.to_string());
    let mut without_parent = Command::new("/proc/self/exe");
    without_parent.arg("jail-empty");
    assert_eq!(
        start(&mut without_parent).answer(),
        JailError::NotStartedByShim.to_string()
    );
}

#[test]
fn forbidden_call_ends_the_process_with_a_message_that_names_it() {
    let mut command = RoleCommand::new("jail-listed").unwrap();
    let mut jailed = JailedChild::from(command.stderr(Stdio::piped()));
    assert_eq!(jailed.answer(), "jailed");
    assert_eq!(jailed.ask("open"), "Err(NotFound)", "refused, and not forbidden");

    assert_eq!(jailed.ask("socket"), "");

    assert_eq!(jailed.child.wait().unwrap().code(), Some(159));
    let mut message = String::new();
    let mut stderr = jailed.child.stderr.take().unwrap();
    io::Read::read_to_string(&mut stderr, &mut message).unwrap();
    let expected = "seccomp: the forbidden system call socket (first four arguments 0x2 0x80002 0x0 ";
    assert!(message.starts_with(expected), "{message}");
    assert!(
        message.contains(") in thread \"main\" of test ends this process. It is a bug of nutshell or an attack"),
        "{message}"
    );
}

#[test]
fn panic_under_a_list_aborts_with_its_message() {
    let mut command = RoleCommand::new("jail-listed").unwrap();
    let mut jailed = JailedChild::from(command.stderr(Stdio::piped()).env("RUST_BACKTRACE", "1"));
    assert_eq!(jailed.answer(), "jailed");

    assert_eq!(jailed.ask("panic"), "");

    let status = jailed.child.wait().unwrap();
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        // The C library raises SIGABRT, which the init process of a pid namespace ignores, and then executes HLT.
        Some(libc::SIGSEGV)
    );
    let mut message = String::new();
    let mut stderr = jailed.child.stderr.take().unwrap();
    io::Read::read_to_string(&mut stderr, &mut message).unwrap();
    assert!(message.contains("requested"), "{message}");
    assert!(!message.contains("seccomp"), "{message}");
}
