//! The role as it runs: a jailed process, asked through a virtqueue.

pub(crate) mod client;
mod hostile;

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use client::{BY_ROOT, Client, KEEP_CACHE};
use tempfile::TempDir;

use crate::{
    oci::{HostMount, Share},
    shim::share::FileServer,
};

/// A file server with one shared directory as `c/0`, and one as the root file system `c/rootfs` that
/// belongs to the guest.
pub(crate) struct Served {
    pub(crate) process: FileServer,
    pub(crate) client: Client,
    pub(crate) directory: TempDir,
    pub(crate) rootfs: TempDir,
}

pub(crate) fn serve() -> Served {
    assert!(
        rustix::process::geteuid().is_root(),
        "the file server is started by root: run these tests as root"
    );
    let [directory, rootfs, place] = std::array::from_fn(|_| TempDir::new().unwrap());
    let (process, socket) = FileServer::spawn().unwrap();
    process
        .attach(&Share {
            source: directory.path().to_owned(),
            path: "c/0".to_owned(),
            read_only: false,
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
        .attach_rootfs(&[mount], None, place.path(), "c/rootfs", false)
        .unwrap();
    Served {
        process,
        client: Client::connect(socket),
        directory,
        rootfs,
    }
}

impl Served {
    fn on_host(&self, name: &str) -> fs::Metadata {
        fs::symlink_metadata(self.directory.path().join(name)).unwrap()
    }
}

const OWNERS: [(u32, u32); 4] = [(0, 0), (1000, 1000), (0, 1000), (1000, 0)];

#[test]
fn what_a_user_creates_belongs_to_that_user() {
    let mut served = serve();
    let parent = served.client.walk("c/0").unwrap().id;
    for (uid, gid) in OWNERS {
        let name = |kind: &str| format!("{kind}-{uid}-{gid}");
        let client = served.client.by((uid, gid));
        let (file, _) = client.create(parent, &name("file"), 0o640).unwrap();
        let directory = client.mkdir(parent, &name("directory"), 0o750).unwrap();
        let fifo = client.mknod(parent, &name("fifo"), libc::S_IFIFO | 0o600, 0).unwrap();
        let link = client.symlink(parent, &name("symlink"), "/nowhere").unwrap();
        for node in [file, directory, fifo, link] {
            assert_eq!((node.attr.uid, node.attr.gid), (uid, gid), "told to the guest");
        }
        for kind in ["file", "directory", "fifo", "symlink"] {
            let status = served.on_host(&name(kind));
            assert_eq!((status.uid(), status.gid()), (uid, gid), "{kind} on the host");
        }
        assert_eq!(served.on_host(&name("file")).mode() & 0o7777, 0o640);
        assert_eq!(served.on_host(&name("directory")).mode() & 0o7777, 0o750);
        assert!(served.on_host(&name("fifo")).file_type().is_fifo());
    }
}

#[test]
fn users_without_a_number_create_nothing() {
    let mut served = serve();
    let parent = served.client.walk("c/0").unwrap().id;
    for ids in [(u32::MAX, 0), (0, u32::MAX)] {
        assert_eq!(
            served.client.by(ids).mkdir(parent, "x", 0o755).unwrap_err(),
            libc::EINVAL
        );
    }
    assert_eq!(fs::read_dir(served.directory.path()).unwrap().count(), 0);
}

#[test]
fn owner_and_mode_of_any_file_can_be_changed() {
    let mut served = serve();
    let parent = served.client.walk("c/0").unwrap().id;
    let (file, _) = served.client.by((1000, 1000)).create(parent, "file", 0o600).unwrap();
    let client = served.client.by(BY_ROOT);
    let attr = client.set_owner(file.id, (7, 8)).unwrap();
    assert_eq!((attr.uid, attr.gid), (7, 8));
    let attr = client.set_mode(file.id, libc::S_IFREG | 0o6755).unwrap();
    assert_eq!(attr.mode & 0o7777, 0o6755, "set-id bits of a foreign file and group");
    assert_eq!(served.on_host("file").mode() & 0o7777, 0o6755);
}

#[test]
fn set_id_bits_go_where_the_guest_says_so_and_stay_else() {
    let mut served = serve();
    let parent = served.client.walk("c/0").unwrap().id;
    let client = &mut served.client;
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
    assert_eq!(set(client).mode & 0o7777, 0o6755, "and the capability is back");
}

#[test]
fn root_owned_files_are_opened_and_changed_whatever_their_mode() {
    let mut served = serve();
    let secret = served.directory.path().join("secret");
    fs::write(&secret, "host").unwrap();
    fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o000)).unwrap();
    let file = served.client.walk("c/0/secret").unwrap();
    let (handle, _) = served.client.open(file.id, libc::O_RDWR).unwrap();
    assert_eq!(served.client.read(file.id, handle, 10).unwrap(), b"host");
    served.client.write(file.id, handle, b"guest", false).unwrap();
    served.client.release(file.id, handle).unwrap();
    assert_eq!(fs::read(&secret).unwrap(), b"guest");
}

#[test]
fn extended_attributes_are_kept_but_for_those_of_the_hosts_administrator() {
    let mut served = serve();
    let parent = served.client.walk("c/0").unwrap().id;
    let (file, _) = served.client.create(parent, "file", 0o755).unwrap();
    // cap_net_raw+ep, revision 2 (include/uapi/linux/capability.h).
    let capability: Vec<u8> = [0x0200_0001_u32, 1 << 13, 0, 0, 0]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    served
        .client
        .setxattr(file.id, "security.capability", &capability)
        .unwrap();
    assert_eq!(
        served.client.getxattr(file.id, "security.capability").unwrap(),
        capability
    );
    // Not every file system below a test has these (tmpfs before Linux 6.6): it is as on the host.
    let probe = served.directory.path().join("probe");
    fs::write(&probe, "").unwrap();
    let on_host = rustix::fs::setxattr(&probe, "user.comment", b"text", rustix::fs::XattrFlags::empty());
    assert_eq!(
        served.client.setxattr(file.id, "user.comment", b"text"),
        on_host.map_err(rustix::io::Errno::raw_os_error)
    );
    assert_eq!(
        served.client.setxattr(file.id, "trusted.x", b"y").unwrap_err(),
        libc::EPERM
    );
}

#[test]
fn device_nodes_and_whiteouts_can_be_made_and_never_opened() {
    let mut served = serve();
    let parent = served.client.walk("c/0").unwrap().id;
    let null = served
        .client
        .mknod(parent, "null", libc::S_IFCHR | 0o666, 0x0103)
        .unwrap();
    assert_eq!(null.attr.rdev, 0x0103);
    let whiteout = served.client.mknod(parent, "whiteout", libc::S_IFCHR, 0).unwrap();
    assert_eq!(served.on_host("whiteout").rdev(), 0);
    for node in [null.id, whiteout.id] {
        assert_eq!(served.client.open(node, libc::O_RDWR).unwrap_err(), libc::EBADF);
    }
}

#[test]
fn files_are_linked_renamed_and_removed() {
    let mut served = serve();
    let parent = served.client.walk("c/0").unwrap().id;
    let client = &mut served.client;
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
fn files_are_synced_beside_other_requests() {
    let mut served = serve();
    let parent = served.client.walk("c/0").unwrap().id;
    let (file, handle) = served.client.create(parent, "file", 0o644).unwrap();
    served.client.write(file.id, handle, b"x", false).unwrap();
    for _ in 0..3 {
        served.client.fsync(file.id, handle).unwrap();
        assert_eq!(served.client.fsync(file.id, handle + 1).unwrap_err(), libc::EBADF);
        served.client.attr(file.id).unwrap();
    }
    let tasks = fs::read_dir(format!("/proc/{}/task", served.process.child().id())).unwrap();
    let names = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("comm")).unwrap());
    assert_eq!(names.filter(|name| name == "sync\n").count(), 1);
}

#[test]
fn symbolic_links_are_told_and_not_followed() {
    let mut served = serve();
    std::os::unix::fs::symlink("/etc", served.directory.path().join("etc")).unwrap();
    let link = served.client.walk("c/0/etc").unwrap();
    assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!(served.client.readlink(link.id).unwrap(), "/etc");
    assert_eq!(served.client.lookup(link.id, "passwd").unwrap_err(), libc::ENOTDIR);
}

#[test]
fn cache_of_a_shared_file_is_kept_only_while_the_file_is_unchanged() {
    let mut served = serve();
    let path = served.directory.path().join("file");
    fs::write(&path, "1").unwrap();
    // As if it had been changed long ago: ctime cannot be set, so the machine's clock decides.
    let file = served.client.walk("c/0/file").unwrap();
    assert_eq!(file.ttl, 1);
    let (_, options) = served.client.open(file.id, libc::O_RDONLY).unwrap();
    assert_eq!(options & KEEP_CACHE, 0, "never seen before");
    fs::write(&path, "22").unwrap();
    let (_, options) = served.client.open(file.id, libc::O_RDONLY).unwrap();
    assert_eq!(options & KEEP_CACHE, 0, "changed since");
}

#[test]
fn names_and_contents_of_an_own_root_file_system_are_cached_for_good() {
    let mut served = serve();
    fs::create_dir(served.rootfs.path().join("bin")).unwrap();
    fs::write(served.rootfs.path().join("bin/sh"), "#!").unwrap();
    let root = served.client.walk("c/rootfs").unwrap();
    let shell = served.client.walk("c/rootfs/bin/sh").unwrap();
    let day = 24 * 60 * 60;
    assert_eq!((root.ttl, shell.ttl), (day, day));
    let (handle, options) = served.client.open(shell.id, libc::O_RDONLY).unwrap();
    assert_ne!(options & KEEP_CACHE, 0);
    assert_eq!(served.client.read(shell.id, handle, 10).unwrap(), b"#!");
    let missing = served.client.lookup(root.id, "missing").unwrap();
    assert_eq!((missing.id, missing.ttl), (0, day), "that there is none");
    let parent = served.client.walk("c/0").unwrap();
    assert_eq!(parent.ttl, 1);
    assert_eq!(served.client.lookup(parent.id, "missing").unwrap_err(), libc::ENOENT);
}

#[test]
fn submounts_are_announced() {
    let mut served = serve();
    for (path, expected) in [("c", 0), ("c/0", 1), ("c/rootfs", 1)] {
        let node = served.client.walk(path).unwrap();
        assert_eq!(node.attr.flags & 1, expected, "{path}");
    }
}

#[test]
fn status_shows_an_unprivileged_user_and_the_stated_capabilities() {
    let mut served = serve();
    served.client.walk("c/0").unwrap();
    let pid = served.process.child().id();
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
fn server_ends_when_the_machine_does() {
    let served = serve();
    let pid = served.process.child().id();
    let status = rustix::process::pidfd_open(
        rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(),
        rustix::process::PidfdFlags::empty(),
    )
    .unwrap();
    drop(served.client);
    let ended = rustix::process::waitid(
        rustix::process::WaitId::PidFd(std::os::fd::AsFd::as_fd(&status)),
        rustix::process::WaitIdOptions::EXITED,
    )
    .unwrap()
    .unwrap();
    assert_eq!(ended.exit_status(), Some(0));
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}
