//! Tests of the running file server: a jailed process that serves requests from a virtqueue.

pub(crate) mod client;
mod hostile;
mod limits;

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
    time::Duration,
};

use client::{BY_ROOT, Client, KEEP_CACHE, NOFLUSH};
use tempfile::TempDir;

use super::node_id::{OWNED_TTL, SHARED_TTL};
use crate::{
    oci::{HostFiles, HostMount, ReadOnly, Share},
    shim::share::FileServer,
};

/// A file server with one shared directory at `c/0`, and one at `c/rootfs` that only the guest changes.
pub(crate) struct TestServer {
    pub(crate) process: FileServer,
    pub(crate) client: Client,
    pub(crate) directory: TempDir,
    pub(crate) rootfs: TempDir,
}

pub(crate) fn start_server() -> TestServer {
    assert!(
        rustix::process::geteuid().is_root(),
        "only root can start the file server: run these tests as root"
    );
    let [directory, rootfs, place] = std::array::from_fn(|_| TempDir::new().unwrap());
    let (mut process, socket) = FileServer::spawn(None).unwrap();
    let mut stderr = fs::File::from(process.take_stderr().unwrap());
    std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::stderr()));
    process
        .attach(&Share {
            source: directory.path().to_owned(),
            path: "c/0".to_owned(),
            read_only: ReadOnly::None,
            recursive: false,
            id_map: None,
        })
        .unwrap();
    let mount = HostMount {
        kind: "bind".to_owned(),
        source: rootfs.path().to_str().unwrap().to_owned(),
        target: String::new(),
        options: vec!["rbind".to_owned(), "rw".to_owned()],
    };
    process
        .attach_rootfs(&HostFiles::Mounts(vec![mount]), place.path(), "c/rootfs", false)
        .unwrap();
    TestServer {
        process,
        client: Client::connect(socket),
        directory,
        rootfs,
    }
}

impl TestServer {
    fn on_host(&self, name: &str) -> fs::Metadata {
        fs::symlink_metadata(self.directory.path().join(name)).unwrap()
    }
}

const OWNERS: [(u32, u32); 4] = [(0, 0), (1000, 1000), (0, 1000), (1000, 0)];

#[test]
fn new_files_belong_to_the_user_who_creates_them() {
    let mut server = start_server();
    let parent = server.client.walk("c/0").unwrap().id;
    for (uid, gid) in OWNERS {
        let name = |kind: &str| format!("{kind}-{uid}-{gid}");
        let client = server.client.as_user((uid, gid));
        let (file, _) = client.create(parent, &name("file"), 0o640).unwrap();
        let directory = client.mkdir(parent, &name("directory"), 0o750).unwrap();
        let fifo = client.mknod(parent, &name("fifo"), libc::S_IFIFO | 0o600, 0).unwrap();
        let link = client.symlink(parent, &name("symlink"), "/nowhere").unwrap();
        for node in [file, directory, fifo, link] {
            assert_eq!((node.attr.uid, node.attr.gid), (uid, gid), "as the guest sees it");
        }
        for kind in ["file", "directory", "fifo", "symlink"] {
            let status = server.on_host(&name(kind));
            assert_eq!((status.uid(), status.gid()), (uid, gid), "{kind} on the host");
        }
        assert_eq!(server.on_host(&name("file")).mode() & 0o7777, 0o640);
        assert_eq!(server.on_host(&name("directory")).mode() & 0o7777, 0o750);
        assert!(server.on_host(&name("fifo")).file_type().is_fifo());
    }
}

#[test]
fn users_without_a_valid_id_cannot_create_files() {
    let mut server = start_server();
    let parent = server.client.walk("c/0").unwrap().id;
    for ids in [(u32::MAX, 0), (0, u32::MAX)] {
        assert_eq!(
            server.client.as_user(ids).mkdir(parent, "x", 0o755).unwrap_err(),
            libc::EINVAL
        );
    }
    assert_eq!(fs::read_dir(server.directory.path()).unwrap().count(), 0);
}

#[test]
fn owner_and_mode_of_any_file_can_be_changed() {
    let mut server = start_server();
    let parent = server.client.walk("c/0").unwrap().id;
    let (file, _) = server
        .client
        .as_user((1000, 1000))
        .create(parent, "file", 0o600)
        .unwrap();
    let client = server.client.as_user(BY_ROOT);
    let attr = client.set_owner(file.id, (7, 8)).unwrap();
    assert_eq!((attr.uid, attr.gid), (7, 8));
    let attr = client.set_mode(file.id, libc::S_IFREG | 0o6755).unwrap();
    assert_eq!(attr.mode & 0o7777, 0o6755, "set-id bits of another user's file");
    assert_eq!(server.on_host("file").mode() & 0o7777, 0o6755);
}

#[test]
fn set_id_bits_are_cleared_only_at_the_guests_request() {
    let mut server = start_server();
    let parent = server.client.walk("c/0").unwrap().id;
    let client = &mut server.client;
    let (file, handle) = client.create(parent, "file", 0o600).unwrap();
    let set = |client: &mut Client| client.set_mode(file.id, libc::S_IFREG | 0o6755).unwrap();

    set(client);
    client.write(file.id, handle, b"x", false).unwrap();
    client.truncate(file.id, 0, false).unwrap();
    assert_eq!(client.attr(file.id).unwrap().mode & 0o7777, 0o6755);

    client.write(file.id, handle, b"x", true).unwrap();
    assert_eq!(client.attr(file.id).unwrap().mode & 0o7777, 0o755, "written");
    set(client);
    client.truncate(file.id, 0, true).unwrap();
    assert_eq!(client.attr(file.id).unwrap().mode & 0o7777, 0o755, "truncated");
    assert_eq!(set(client).mode & 0o7777, 0o6755, "the capability is effective again");
}

#[test]
fn files_of_any_mode_can_be_read_and_written() {
    let mut server = start_server();
    let secret = server.directory.path().join("secret");
    fs::write(&secret, "host").unwrap();
    fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o000)).unwrap();
    let file = server.client.walk("c/0/secret").unwrap();
    let (handle, _) = server.client.open(file.id, libc::O_RDWR).unwrap();
    assert_eq!(server.client.read(file.id, handle, 10).unwrap(), b"host");
    server.client.write(file.id, handle, b"guest", false).unwrap();
    server.client.release(file.id, handle).unwrap();
    assert_eq!(fs::read(&secret).unwrap(), b"guest");
}

/// `cap_net_raw+ep`, revision 2 (include/uapi/linux/capability.h).
fn file_capability() -> Vec<u8> {
    let words = [0x0200_0001_u32, 1 << 13, 0, 0, 0];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[test]
fn extended_attributes_are_stored_except_trusted_ones() {
    let mut server = start_server();
    let parent = server.client.walk("c/0").unwrap().id;
    let (file, _) = server.client.create(parent, "file", 0o755).unwrap();
    // tmpfs before Linux 6.6 has no user attributes: expect the same result as on the host.
    let probe = server.directory.path().join("probe");
    fs::write(&probe, "").unwrap();
    let on_host = rustix::fs::setxattr(&probe, "user.comment", b"text", rustix::fs::XattrFlags::empty());
    assert_eq!(
        server.client.setxattr(file.id, "user.comment", b"text"),
        on_host.map_err(rustix::io::Errno::raw_os_error)
    );
    assert_eq!(
        server.client.setxattr(file.id, "trusted.x", b"y").unwrap_err(),
        libc::EPERM
    );
}

#[test]
fn file_capabilities_are_stored_in_a_root_file_system_and_refused_in_a_volume() {
    const NAME: &str = "security.capability";
    let mut server = start_server();
    let client = &mut server.client;
    let rootfs = client.walk("c/rootfs").unwrap().id;
    let (file, _) = client.create(rootfs, "file", 0o755).unwrap();
    client.setxattr(file.id, NAME, &file_capability()).unwrap();
    assert_eq!(client.getxattr(file.id, NAME).unwrap(), file_capability());

    let volume = client.walk("c/0").unwrap().id;
    let (file, _) = client.create(volume, "file", 0o755).unwrap();
    // The two highest bits of a node id claim that it is in a root file system.
    for bits in 0..4_u64 {
        let id = file.id | bits << 62;
        assert_eq!(
            client.setxattr(id, NAME, &file_capability()).unwrap_err(),
            libc::EOPNOTSUPP
        );
    }
    let on_host = server.directory.path().join("file");
    let stored = rustix::fs::getxattr(on_host, NAME, &mut [0_u8; 64]);
    assert_eq!(stored.unwrap_err(), rustix::io::Errno::NODATA);
}

/// Another file server left the capabilities of a file that a user without privileges had changed.
#[test]
fn change_of_a_file_removes_its_capabilities_cve_2021_20263() {
    const NAME: &str = "security.capability";
    let mut server = start_server();
    let client = &mut server.client;
    let rootfs = client.walk("c/rootfs").unwrap().id;
    let (file, handle) = client.create(rootfs, "file", 0o777).unwrap();
    type Change = fn(&mut Client, u64, u64);
    let changes: [(&str, Change); 3] = [
        ("write", |client, file, handle| {
            client.write(file, handle, b"x", true).unwrap();
        }),
        ("truncate", |client, file, _| {
            client.truncate(file, 0, true).unwrap();
        }),
        ("change of the owner", |client, file, _| {
            client.set_owner(file, (1000, 1000)).unwrap();
        }),
    ];
    for (name, change) in changes {
        client.setxattr(file.id, NAME, &file_capability()).unwrap();
        assert_eq!(client.getxattr(file.id, NAME).unwrap(), file_capability());
        change(client, file.id, handle);
        assert_eq!(client.getxattr(file.id, NAME).unwrap_err(), libc::ENODATA, "{name}");
    }
}

#[test]
fn whiteouts_can_be_created_and_device_nodes_cannot() {
    let mut server = start_server();
    for share in ["c/0", "c/rootfs"] {
        let parent = server.client.walk(share).unwrap().id;
        for (mode, device) in [
            (libc::S_IFCHR, 0x0103),
            (libc::S_IFBLK, 0x0800),
            // Device 0:0 is a whiteout only as a character device.
            (libc::S_IFBLK, 0),
        ] {
            let made = server.client.mknod(parent, "device", mode | 0o666, device);
            assert_eq!(made.unwrap_err(), libc::EPERM, "{share} {mode:#o} {device:#x}");
        }
        let whiteout = server.client.mknod(parent, "whiteout", libc::S_IFCHR, 0).unwrap();
        assert_eq!(whiteout.attr.rdev, 0);
        assert_eq!(server.client.open(whiteout.id, libc::O_RDWR).unwrap_err(), libc::EBADF);
    }
    assert_eq!(server.on_host("whiteout").rdev(), 0);
    assert!(!fs::exists(server.directory.path().join("device")).unwrap());
}

#[test]
fn files_are_linked_renamed_and_removed() {
    let mut server = start_server();
    let parent = server.client.walk("c/0").unwrap().id;
    let client = &mut server.client;
    let (file, _) = client.create(parent, "a", 0o644).unwrap();
    let linked = client.link(file.id, parent, "b").unwrap();
    assert_eq!(linked.id, file.id);
    client.rename(parent, "a", parent, "c").unwrap();
    assert_eq!(client.list(parent).unwrap(), ["b", "c"]);
    client.unlink(parent, "b").unwrap();
    assert_eq!(client.lookup(parent, "b").unwrap_err(), libc::ENOENT);
    assert_eq!(client.list(parent).unwrap(), ["c"]);
}

#[test]
fn fsync_runs_in_one_other_thread_while_it_is_fast() {
    let mut server = start_server();
    let parent = server.client.walk("c/0").unwrap().id;
    let (file, handle) = server.client.create(parent, "file", 0o644).unwrap();
    server.client.write(file.id, handle, b"x", false).unwrap();
    for _ in 0..3 {
        server.client.fsync(file.id, handle).unwrap();
        assert_eq!(server.client.fsync(file.id, handle + 1).unwrap_err(), libc::EBADF);
        server.client.attr(file.id).unwrap();
    }
    let tasks = fs::read_dir(format!("/proc/{}/task", server.process.child().id())).unwrap();
    let names = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("comm")).unwrap());
    assert_eq!(names.filter(|name| name == "sync\n").count(), 1);
}

#[test]
fn symbolic_links_are_returned_and_not_followed() {
    let mut server = start_server();
    std::os::unix::fs::symlink("/etc", server.directory.path().join("etc")).unwrap();
    let link = server.client.walk("c/0/etc").unwrap();
    assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!(server.client.readlink(link.id).unwrap(), "/etc");
    assert_eq!(server.client.lookup(link.id, "passwd").unwrap_err(), libc::ENOTDIR);
}

#[test]
fn cache_of_a_shared_file_is_kept_only_while_the_file_is_unchanged() {
    let mut server = start_server();
    let path = server.directory.path().join("file");
    fs::write(&path, "1").unwrap();
    let file = server.client.walk("c/0/file").unwrap();
    assert_eq!(file.ttl, SHARED_TTL);
    let mut open = || server.client.open(file.id, libc::O_RDONLY).unwrap().1 & KEEP_CACHE;

    assert_eq!(open(), 0, "first open");
    std::thread::sleep(Duration::from_millis(2100));
    // Now the change is old enough to be told from a later one.
    open();
    assert_eq!(open(), KEEP_CACHE, "unchanged since the last open");
    fs::write(&path, "22").unwrap();
    assert_eq!(open(), 0, "changed since the last open");
}

/// The close of a file on a network file system reports that writes were lost.
#[test]
fn close_of_a_shared_file_is_reported_unless_it_is_only_read() {
    let mut server = start_server();
    fs::write(server.directory.path().join("file"), "1").unwrap();
    let file = server.client.walk("c/0/file").unwrap();
    let mut options = |flags| server.client.open(file.id, flags).unwrap().1 & NOFLUSH;
    assert_eq!(options(libc::O_RDONLY), NOFLUSH);
    assert_eq!(options(libc::O_RDONLY | libc::O_NONBLOCK), NOFLUSH);
    assert_eq!(options(libc::O_WRONLY), 0);
    assert_eq!(options(libc::O_RDWR), 0);
}

#[test]
fn owned_root_file_system_is_cached_including_missing_names() {
    let mut server = start_server();
    fs::create_dir(server.rootfs.path().join("bin")).unwrap();
    fs::write(server.rootfs.path().join("bin/sh"), "#!").unwrap();
    let root = server.client.walk("c/rootfs").unwrap();
    let shell = server.client.walk("c/rootfs/bin/sh").unwrap();
    assert_eq!((root.ttl, shell.ttl), (OWNED_TTL, OWNED_TTL));
    let (handle, options) = server.client.open(shell.id, libc::O_RDONLY).unwrap();
    assert_ne!(options & KEEP_CACHE, 0);
    assert_eq!(server.client.read(shell.id, handle, 10).unwrap(), b"#!");
    let missing = server.client.lookup(root.id, "missing").unwrap();
    assert_eq!((missing.id, missing.ttl), (0, OWNED_TTL), "missing name");
    let parent = server.client.walk("c/0").unwrap();
    assert_eq!(parent.ttl, SHARED_TTL);
    assert_eq!(server.client.lookup(parent.id, "missing").unwrap_err(), libc::ENOENT);
}

#[test]
fn submounts_are_announced() {
    let mut server = start_server();
    for (path, expected) in [("c", 0), ("c/0", 1), ("c/rootfs", 1)] {
        let node = server.client.walk(path).unwrap();
        assert_eq!(node.attr.flags & 1, expected, "{path}");
    }
}

#[test]
fn server_runs_as_an_unused_user_with_file_capabilities_only() {
    let mut server = start_server();
    server.client.walk("c/0").unwrap();
    let pid = server.process.child().id();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |key: &str| {
        let line = status.lines().find(|line| line.starts_with(key)).unwrap();
        line[key.len() + 1..].trim().to_owned()
    };
    let id = (0x7000_0000 + pid).to_string();
    assert_eq!(field("Uid"), [id.as_str(); 4].join("\t"));
    assert_eq!(field("Gid"), [id.as_str(); 4].join("\t"));
    assert_eq!(field("Groups"), "");
    let kept = format!("{:016x}", super::CAPABILITIES.bits());
    assert_eq!([field("CapPrm"), field("CapEff")], [kept.clone(), kept]);
    assert_eq!(field("CapBnd"), "0000000000000000");
    assert_eq!(field("NoNewPrivs"), "1");
    assert_eq!(field("Name"), "nutshell-fs");
    assert_ne!(
        fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap(),
        fs::read_link("/proc/self/ns/mnt").unwrap()
    );
}

#[test]
fn server_ends_when_its_connection_closes() {
    let server = start_server();
    let pid = server.process.child().id();
    let status = rustix::process::pidfd_open(
        rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(),
        rustix::process::PidfdFlags::empty(),
    )
    .unwrap();
    drop(server.client);
    let ended = rustix::process::waitid(
        rustix::process::WaitId::PidFd(std::os::fd::AsFd::as_fd(&status)),
        rustix::process::WaitIdOptions::EXITED,
    )
    .unwrap()
    .unwrap();
    assert_eq!(ended.exit_status(), Some(0));
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}
