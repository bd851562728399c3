//! Tests of shared files from the guest's view, and of mounts, which must appear only in the server's namespace.

mod common_shares;
mod hostile;
mod overlays;

use std::{
    fs,
    mem::MaybeUninit,
    os::unix::fs::{MetadataExt, symlink},
    time::Duration,
};

use nix::mount::{MsFlags, mount};
use nutshell_fixtures::HungVolume;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify,
    process::{Pid, PidfdFlags, Signal, Uid, WaitId, WaitIdOptions},
};
use tempfile::TempDir;

use super::*;
use crate::fs::tests::client::{BY_ROOT, Client, KEEP_CACHE};
use crate::oci::HostMount;

fn start_server() -> (FileServer, Client) {
    assert!(
        rustix::process::geteuid().is_root(),
        "mounts are made by root: run these tests as root"
    );
    let (server, socket) = FileServer::spawn(None).unwrap();
    (server, Client::connect(socket))
}

/// With the file, code that takes the server over could shrink the memory under the vmm.
#[test]
fn server_closes_the_file_of_guest_memory() {
    let (server, _client) = start_server();
    let descriptors = fs::read_dir(format!("/proc/{}/fd", server.child().id())).unwrap();
    let files: Vec<_> = descriptors
        .map(|descriptor| fs::read_link(descriptor.unwrap().path()).unwrap())
        .collect();
    assert!(files.len() > 3, "{files:?}");
    assert!(
        !files.iter().any(|file| file.starts_with("/memfd:guest (deleted)")),
        "{files:?}"
    );
}

fn share(source: &Path, path: &str) -> Share {
    Share {
        source: source.to_owned(),
        path: path.to_owned(),
        read_only: ReadOnly::None,
        recursive: false,
        id_map: None,
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The directories of an overlay, on a tmpfs in a new mount namespace of the calling thread. Not every file system can
/// hold an upper directory.
struct Layers(TempDir);

impl Layers {
    fn new(lower: usize) -> Self {
        enter_new_mount_namespace();
        let directory = TempDir::new().unwrap();
        mount_tmpfs(directory.path());
        for name in ["upper", "work", "rootfs"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        for layer in 0..lower {
            let layer = directory.path().join(format!("snapshots/{layer}/fs"));
            fs::create_dir_all(&layer).unwrap();
            fs::write(layer.join("file"), "lower").unwrap();
        }
        for layer in 0..lower {
            let path = directory.path().join(format!("snapshots/{layer}/fs/of-{layer}"));
            fs::write(path, "").unwrap();
        }
        Self(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn overlay(&self, lower: usize) -> HostMount {
        let layers: Vec<_> = (0..lower)
            .map(|layer| text(&self.path(&format!("snapshots/{layer}/fs"))).to_owned())
            .collect();
        HostMount {
            kind: "overlay".to_owned(),
            source: "overlay".to_owned(),
            target: String::new(),
            options: vec![
                "index=off".to_owned(),
                format!("workdir={}", text(&self.path("work"))),
                format!("upperdir={}", text(&self.path("upper"))),
                format!("lowerdir={}", layers.join(":")),
            ],
        }
    }
}

fn enter_new_mount_namespace() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .unwrap();
}

fn mount_tmpfs(at: &Path) {
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
}

fn read_mountinfo() -> String {
    fs::read_to_string("/proc/thread-self/mountinfo").unwrap()
}

fn ids() -> crate::oci::IdMap {
    let options = ["uidmap=0:100000:65536", "gidmap=0:200000:65536"].map(str::to_owned);
    crate::oci::IdMap::from_options(&options).unwrap().unwrap()
}

/// The owner of `path` as the guest sees it: uid, gid.
fn owner(client: &mut Client, path: &str) -> (u32, u32) {
    let node = client.walk(path).unwrap().id;
    let attr = client.attr(node).unwrap();
    (attr.uid, attr.gid)
}

#[test]
fn ids_of_a_share_are_mapped_both_ways() {
    enter_new_mount_namespace();
    let directory = TempDir::new().unwrap();
    mount_tmpfs(directory.path());
    fs::write(directory.path().join("file"), "").unwrap();
    let (server, mut client) = start_server();
    let ids = crate::oci::ShareIdMap {
        map: ids(),
        recursive: false,
    };
    let share = Share {
        id_map: Some(ids),
        ..share(directory.path(), "c/0")
    };
    server.attach(&share).unwrap();

    assert_eq!(owner(&mut client, "c/0/file"), (100_000, 200_000));
    let root = client.walk("c/0").unwrap().id;
    client.as_user((100_007, 200_008)).mkdir(root, "made", 0o700).unwrap();

    let made = fs::metadata(directory.path().join("made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (7, 8));
    assert!(client.as_user((5, 5)).mkdir(root, "unmapped", 0o700).is_err());
}

#[test]
fn read_only_shares_are_read_only_on_the_host_cve_2020_28914() {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join("file"), "x").unwrap();
    let (server, mut client) = start_server();
    let read_only = Share {
        read_only: ReadOnly::All,
        ..share(directory.path(), "c/0")
    };
    server.attach(&read_only).unwrap();
    server
        .attach_rootfs(
            &HostFiles::Directory(directory.path().to_owned()),
            Path::new("/nowhere"),
            "c/rootfs",
            true,
        )
        .unwrap();
    for path in ["c/0", "c/rootfs"] {
        let parent = client.walk(path).unwrap().id;
        let file = client.lookup(parent, "file").unwrap().id;
        assert_eq!(client.create(parent, "x", 0o644).unwrap_err(), libc::EROFS, "{path}");
        assert_eq!(client.open(file, libc::O_RDWR).unwrap_err(), libc::EROFS, "{path}");
        assert_eq!(client.set_owner(file, BY_ROOT).unwrap_err(), libc::EROFS, "{path}");
        assert_eq!(client.unlink(parent, "file").unwrap_err(), libc::EROFS, "{path}");
    }
}

#[test]
fn existing_directory_as_root_has_a_short_cache_timeout() {
    let directory = TempDir::new().unwrap();
    let (server, mut client) = start_server();
    server
        .attach_rootfs(
            &HostFiles::Directory(directory.path().to_owned()),
            Path::new("/nowhere"),
            "c/rootfs",
            false,
        )
        .unwrap();
    let root = client.walk("c/rootfs").unwrap();
    assert!(root.ttl < Duration::from_millis(100), "{:?}", root.ttl);
    client.create(root.id, "file", 0o644).unwrap();
    assert!(directory.path().join("file").exists());
}

#[test]
fn single_file_is_shared_and_stays_cached_in_the_guest_while_unchanged() {
    let (server, mut client) = start_server();
    server
        .attach(&Share {
            read_only: ReadOnly::All,
            ..share(Path::new("/usr/bin/env"), "c/0")
        })
        .unwrap();
    let file = client.walk("c/0").unwrap();
    assert_eq!(file.attr.size, fs::metadata("/usr/bin/env").unwrap().len());
    let (handle, first) = client.open(file.id, libc::O_RDONLY).unwrap();
    assert_eq!(client.read(file.id, handle, 4).unwrap(), b"\x7fELF");
    let (_, second) = client.open(file.id, libc::O_RDONLY).unwrap();
    assert_eq!([first & KEEP_CACHE, second & KEEP_CACHE], [0, KEEP_CACHE]);
}

#[test]
fn mounts_below_a_source_are_shared_only_if_recursive() {
    enter_new_mount_namespace();
    let directory = TempDir::new().unwrap();
    let below = directory.path().join("below");
    fs::create_dir(&below).unwrap();
    mount_tmpfs(&below);
    fs::write(below.join("file"), "").unwrap();
    let (server, mut client) = start_server();
    server.attach(&share(directory.path(), "c/0")).unwrap();
    let recursive = Share {
        recursive: true,
        ..share(directory.path(), "c/1")
    };
    server.attach(&recursive).unwrap();
    assert_eq!(client.walk("c/0/below/file").unwrap_err(), libc::ENOENT);
    client.walk("c/1/below/file").unwrap();
}

/// Volumes of a virtual machine, in any order.
#[test]
fn shares_can_be_inside_of_each_other() {
    let [outer, middle, inner] = [(); 3].map(|()| TempDir::new().unwrap());
    for (directory, text) in [(&outer, "outer"), (&middle, "middle"), (&inner, "inner")] {
        fs::write(directory.path().join("file"), text).unwrap();
    }
    let (server, mut client) = start_server();
    let shares = [
        share(&inner.path().join("file"), "srv/a/b/single"),
        share(inner.path(), "srv/a/b/c/d"),
        share(outer.path(), "srv"),
        share(middle.path(), "srv/a/b"),
        share(outer.path(), "srv2"),
    ];

    server.attach_all(&shares).unwrap();

    for (path, text) in [
        ("srv/file", "outer"),
        ("srv/a/b/file", "middle"),
        ("srv/a/b/c/d/file", "inner"),
        ("srv/a/b/single", "inner"),
        ("srv2/file", "outer"),
    ] {
        let node = client.walk(path).unwrap().id;
        let (handle, _) = client.open(node, libc::O_RDONLY).unwrap();
        assert_eq!(client.read(node, handle, 16).unwrap(), text.as_bytes(), "{path}");
    }
    // The mount points are in the outer volume, and the mounts are not on the host.
    assert!(outer.path().join("a/b").is_dir());
    assert!(!outer.path().join("a/b/file").exists());
    assert!(!read_mountinfo().contains(text(outer.path())));
}

#[test]
fn share_inside_of_another_is_refused_with_both_paths_if_it_has_no_mount_point() {
    let inner = TempDir::new().unwrap();
    let read_only = TempDir::new().unwrap();
    let (server, _client) = start_server();
    let outside = TempDir::new().unwrap();
    let link = TempDir::new().unwrap();
    symlink(outside.path(), link.path().join("data")).unwrap();
    let file = TempDir::new().unwrap();
    fs::write(file.path().join("data"), "").unwrap();
    for (number, (outer, read_only, expected)) in [
        (
            &read_only,
            ReadOnly::All,
            "make its mount point in the outer volume: Read-only file system",
        ),
        (
            &link,
            ReadOnly::None,
            "make its mount point in the outer volume: Too many levels of symbolic links",
        ),
        (
            &file,
            ReadOnly::None,
            "make its mount point in the outer volume: Not a directory",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let shares = [
            Share {
                read_only,
                ..share(outer.path(), &format!("srv{number}"))
            },
            share(inner.path(), &format!("srv{number}/data")),
        ];
        let error = server.attach_all(&shares).unwrap_err().to_string();
        let paths = format!("as srv{number}/data, inside of srv{number}: {expected}");
        assert!(error.contains(&paths), "{error}");
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    // A mount point that is there already is enough.
    fs::create_dir(read_only.path().join("data")).unwrap();
    let shares = [
        Share {
            read_only: ReadOnly::All,
            ..share(read_only.path(), "srv")
        },
        share(inner.path(), "srv/data"),
    ];
    server.attach_all(&shares).unwrap();
}

#[test]
fn mounts_below_a_read_only_source_are_read_only_only_if_requested() {
    enter_new_mount_namespace();
    let directory = TempDir::new().unwrap();
    let below = directory.path().join("below");
    fs::create_dir(&below).unwrap();
    mount_tmpfs(&below);
    let (server, mut client) = start_server();
    for (path, read_only, is_below_writable) in [
        ("c/0", ReadOnly::None, true),
        ("c/1", ReadOnly::Top, true),
        ("c/2", ReadOnly::All, false),
    ] {
        let recursive = Share {
            recursive: true,
            read_only,
            ..share(directory.path(), path)
        };
        server.attach(&recursive).unwrap();
        let top = client.walk(path).unwrap().id;
        let is_top_writable = client.create(top, &format!("top{}", &path[2..]), 0o644).is_ok();
        assert_eq!(is_top_writable, read_only == ReadOnly::None, "{read_only:?}");
        let mount = client.walk(&format!("{path}/below")).unwrap().id;
        let created = client.create(mount, &format!("below{}", &path[2..]), 0o644);
        assert_eq!(created.is_ok(), is_below_writable, "{read_only:?}");
    }
}

#[test]
fn host_mounts_made_later_do_not_appear() {
    enter_new_mount_namespace();
    let directory = TempDir::new().unwrap();
    let below = directory.path().join("below");
    fs::create_dir(&below).unwrap();
    let peers = MsFlags::MS_SHARED;
    mount_tmpfs(directory.path());
    fs::create_dir(&below).unwrap();
    mount(None::<&str>, directory.path(), None::<&str>, peers, None::<&str>).unwrap();
    let (server, mut client) = start_server();
    server.attach(&share(directory.path(), "c/0")).unwrap();
    mount_tmpfs(&below);
    fs::write(below.join("file"), "").unwrap();
    assert_eq!(client.walk("c/0/below/file").unwrap_err(), libc::ENOENT);
}

#[test]
fn detached_share_is_gone_and_its_path_can_be_reused() {
    let [first, second] = std::array::from_fn(|_| TempDir::new().unwrap());
    let (server, mut client) = start_server();
    server.attach(&share(first.path(), "c/0")).unwrap();
    server.attach(&share(first.path(), "c/1")).unwrap();
    let known = client.walk("c/0").unwrap().id;

    server.detach("c/0").unwrap();

    assert_eq!(client.walk("c/0").unwrap_err(), libc::ENOENT);
    client
        .create(known, "late", 0o644)
        .expect("a file that the guest has looked up stays");
    server.attach(&share(second.path(), "c/0")).unwrap();
    let parent = client.walk("c/0").unwrap().id;
    client.create(parent, "file", 0o644).unwrap();
    assert!(second.path().join("file").exists());

    server.detach("c").unwrap();
    assert_eq!(
        client.list(crate::fs::tests::client::ROOT).unwrap(),
        Vec::<String>::new()
    );
    server.detach("c").expect("gone already");
    assert!(first.path().join("late").exists(), "the source is untouched");
}

#[test]
fn error_names_the_source_and_the_failed_step() {
    let directory = TempDir::new().unwrap();
    let (server, _client) = start_server();
    server.attach(&share(directory.path(), "c/0")).unwrap();
    for (source, path, expected) in [
        (
            Path::new("/no/such"),
            "c/1",
            "share /no/such with the machine as c/1: open it: No such",
        ),
        (directory.path(), "c/0", "something is shared there already"),
        (directory.path(), "../x", "check its path"),
        (directory.path(), "/x", "check its path"),
        (directory.path(), "", "check its path"),
    ] {
        let error = server.attach(&share(source, path)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let overlay = HostMount {
        kind: "overlay".to_owned(),
        source: "overlay".to_owned(),
        target: String::new(),
        options: vec!["lowerdir=/no/such".to_owned()],
    };
    let error = server
        .attach_rootfs(&HostFiles::Mounts(vec![overlay]), directory.path(), "d/rootfs", false)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("overlay") && error.contains("lowerdir=/no/such"),
        "{error}"
    );
}

#[test]
fn mounts_are_gone_when_the_server_is_killed_and_dropped() {
    enter_new_mount_namespace();
    let directory = TempDir::new().unwrap();
    mount_tmpfs(directory.path());
    let (server, client) = start_server();
    server.attach(&share(directory.path(), "c/0")).unwrap();
    // After that only the server's tree has the file system mounted, and inotify reports when it is unmounted.
    let end = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&end, directory.path(), inotify::WatchFlags::ATTRIB).unwrap();
    rustix::mount::unmount(directory.path(), UnmountFlags::DETACH).unwrap();

    let pid = Pid::from_raw(i32::try_from(server.child().id()).unwrap());
    let descriptor = rustix::process::pidfd_open(pid.unwrap(), PidfdFlags::empty()).unwrap();
    rustix::process::pidfd_send_signal(&descriptor, Signal::KILL).unwrap();
    client.wait_for_close();
    rustix::process::waitid(WaitId::PidFd(descriptor.as_fd()), WaitIdOptions::EXITED).unwrap();
    drop(server);

    let deadline = Timespec { tv_sec: 30, tv_nsec: 0 };
    let mut ready = [PollFd::new(&end, PollFlags::IN)];
    assert_eq!(poll(&mut ready, Some(&deadline)).unwrap(), 1, "still mounted");
    let mut buffer = [MaybeUninit::uninit(); 256];
    let mut events = inotify::Reader::new(&end, &mut buffer);
    assert!(events.next().unwrap().events().contains(inotify::ReadFlags::UNMOUNT));
}

#[test]
fn requests_for_a_volume_that_hangs_do_not_delay_others() {
    enter_new_mount_namespace();
    let directory = TempDir::new().unwrap();
    let below = directory.path().join("below");
    fs::create_dir(&below).unwrap();
    let volume = HungVolume::mount_temporary();
    let none = None::<&str>;
    mount(Some(volume.path()), &below, none, MsFlags::MS_BIND, none).unwrap();
    let (server, mut client) = start_server();
    let recursive = Share {
        recursive: true,
        ..share(directory.path(), "c/0")
    };
    server.attach(&recursive).unwrap();
    let top = client.walk("c/0").unwrap().id;
    // The main thread has the list of the process, and the threads that serve also have their own one: not one more for
    // each thread that replaces another.
    let check_system_call_lists = || {
        for task in fs::read_dir(format!("/proc/{}/task", server.child().id())).unwrap() {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let count = status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:"));
            assert!(matches!(count.map(str::trim), Some("1" | "2")), "{status}");
        }
    };
    let count_threads = || {
        let tasks = fs::read_dir(format!("/proc/{}/task", server.child().id())).unwrap();
        let names = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("comm")).unwrap());
        names.filter(|name| name == "standby\n").count()
    };
    for hung in 0..3 {
        client.start_hung_lookup(top, "below");
        volume.wait_for_request();
        client.attr(top).unwrap();
        client.create(top, &format!("file{hung}"), 0o644).unwrap();
        assert_eq!(count_threads(), hung + 2, "one that serves, and one that watches");
        check_system_call_lists();
    }

    drop(volume);
    client.wait_for_hung_requests();
    // The threads find out with the next request that they are not needed any more.
    while count_threads() > 1 {
        client.attr(top).unwrap();
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 4);
}

#[test]
fn fsync_that_hangs_does_not_delay_others() {
    enter_new_mount_namespace();
    let directory = TempDir::new().unwrap();
    let below = directory.path().join("below");
    fs::create_dir(&below).unwrap();
    let volume = HungVolume::mount_temporary_with_file("file");
    let none = None::<&str>;
    mount(Some(volume.path()), &below, none, MsFlags::MS_BIND, none).unwrap();
    let (server, mut client) = start_server();
    let recursive = Share {
        recursive: true,
        ..share(directory.path(), "c/0")
    };
    server.attach(&recursive).unwrap();
    let top = client.walk("c/0").unwrap().id;
    let on_volume = client.walk("c/0/below/file").unwrap().id;
    let (hung, _) = client.open(on_volume, libc::O_WRONLY).unwrap();
    let (file, handle) = client.create(top, "file", 0o644).unwrap();
    client.start_hung_fsync(on_volume, hung);
    volume.wait_for_request();
    for _ in 0..3 {
        client.fsync(file.id, handle).unwrap();
        // It waits for the first one in the host's kernel.
        client.start_hung_fsync(on_volume, hung);
    }
    client.fsync(file.id, handle).unwrap();

    drop(volume);
    client.wait_for_hung_requests();
}
