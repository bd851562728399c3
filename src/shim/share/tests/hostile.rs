//! Links and device nodes that a guest, an image or a tenant has left in shared files.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::*;

#[test]
fn later_mounts_are_made_within_the_root_of_the_first_cve_2020_2026() {
    let layers = Layers::new(1);
    let outside = TempDir::new().unwrap();
    fs::create_dir(layers.path("upper/data")).unwrap();
    // A guest may have left such a link. It must be resolved within the root.
    std::os::unix::fs::symlink(outside.path(), layers.path("upper/link")).unwrap();
    let bind = |target: &str| HostMount {
        kind: "bind".to_owned(),
        source: "/usr/bin".to_owned(),
        target: target.to_owned(),
        options: vec!["bind".to_owned(), "ro".to_owned()],
    };
    let (server, mut client) = start_server();
    let mounts = vec![layers.overlay(1), bind("/data")];
    server
        .attach_rootfs(&HostFiles::Mounts(mounts), &layers.path("rootfs"), "c/rootfs", false)
        .unwrap();
    client.walk("c/rootfs/data/env").unwrap();
    let data = client.walk("c/rootfs/data").unwrap().id;
    assert_eq!(client.create(data, "x", 0o644).unwrap_err(), libc::EROFS);
    let root = client.walk("c/rootfs").unwrap().id;
    client.create(root, "x", 0o644).expect("the rest can be written");

    let error = server
        .attach_rootfs(
            &HostFiles::Mounts(vec![layers.overlay(1), bind("/link")]),
            &layers.path("rootfs"),
            "d/rootfs",
            false,
        )
        .unwrap_err();
    assert!(error.to_string().contains("/link"), "{error}");
}

/// In another runtime, a guest replaced its directory by a link before the end of its container, and the host unmounted
/// what the link named.
#[test]
fn detach_follows_no_link_of_the_guest_cve_2020_2024() {
    enter_new_mount_namespace();
    let [outside, shared, rootfs, other] = std::array::from_fn(|_| TempDir::new().unwrap());
    mount_tmpfs(outside.path());
    fs::write(outside.path().join("file"), "").unwrap();
    let (server, mut client) = start_server();
    server.attach(&share(shared.path(), "c/0")).unwrap();
    server
        .attach_rootfs(
            &HostFiles::Directory(rootfs.path().to_owned()),
            Path::new("/nowhere"),
            "c/rootfs",
            false,
        )
        .unwrap();
    server.attach(&share(other.path(), "d/0")).unwrap();
    fs::write(other.path().join("file"), "").unwrap();
    let container = client.walk("c").unwrap().id;
    for name in ["0", "rootfs"] {
        let share = client.walk(&format!("c/{name}")).unwrap().id;
        client.symlink(share, "link", text(outside.path())).unwrap();
        client.symlink(share, "up", "../../../../../..").unwrap();
        client.symlink(share, "other", "/d/0").unwrap();
        // The guest cannot replace the share itself.
        client.rename(container, name, container, "moved").unwrap_err();
        client.unlink(container, name).unwrap_err();
        assert_eq!(client.symlink(container, "link", "/").unwrap_err(), libc::EROFS);
    }
    let before = read_mountinfo();

    for path in [
        "c/0/link",
        "c/0/link/file",
        "c/0/up",
        "c/0/other",
        "c/rootfs/other",
        "c/0",
        "c",
    ] {
        server.detach(path).unwrap();
        assert_eq!(read_mountinfo(), before, "{path}");
        client
            .walk("d/0/file")
            .unwrap_or_else(|error| panic!("{path} has unmounted another share: {error}"));
    }

    assert_eq!(client.walk("c").unwrap_err(), libc::ENOENT);
    assert!(outside.path().join("file").exists());
    assert!(fs::symlink_metadata(shared.path().join("link")).unwrap().is_symlink());
}

/// Another runtime shares the whole directory of a file that is mounted.
#[test]
fn shared_file_exposes_nothing_beside_it_nerdbox_file_mounts() {
    let directory = TempDir::new().unwrap();
    for name in ["file", "secret"] {
        fs::write(directory.path().join(name), name).unwrap();
    }
    let (server, mut client) = start_server();

    server.attach(&share(&directory.path().join("file"), "c/0")).unwrap();

    let container = client.walk("c").unwrap().id;
    assert_eq!(client.list(container).unwrap(), ["0"]);
    let file = client.walk("c/0").unwrap();
    assert_eq!(file.attr.mode & libc::S_IFMT, libc::S_IFREG);
    for name in ["secret", "..", "../secret"] {
        client.lookup(file.id, name).unwrap_err();
        client.lookup(container, name).unwrap_err();
    }
}

/// Neither a volume nor an image makes a device of the host available. The node is that of a device that exists: of
/// `/dev/null`.
#[test]
fn device_node_of_the_host_is_never_opened_cve_2026_24054() {
    enter_new_mount_namespace();
    let directory = TempDir::new().unwrap();
    mount_tmpfs(directory.path());
    let device = directory.path().join("device");
    let (kind, mode) = (SFlag::S_IFCHR, Mode::from_bits_truncate(0o666));
    mknod(&device, kind, mode, makedev(1, 3)).unwrap();
    fs::OpenOptions::new()
        .write(true)
        .open(&device)
        .expect("the host can open it");
    let (server, mut client) = start_server();
    server.attach(&share(&device, "c/0")).unwrap();
    server
        .attach_rootfs(
            &HostFiles::Directory(directory.path().to_owned()),
            Path::new("/nowhere"),
            "c/rootfs",
            false,
        )
        .unwrap();
    for path in ["c/0", "c/rootfs/device"] {
        let node = client.walk(path).unwrap().id;
        for access in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR] {
            assert!(client.open(node, access).is_err(), "{path} {access:#o}");
        }
    }
}

/// Ends the storm also if an assertion fails: the scope waits for its thread.
struct EndOfStorm<'a>(&'a AtomicBool);

impl Drop for EndOfStorm<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A guest moves and replaces the mount point of a nested share all the time, while the host shares and detaches it.
#[test]
fn storm_of_renames_and_links_moves_no_mount_and_leaves_none() {
    const ROUNDS: usize = 300;
    let [outer, inner, outside] = std::array::from_fn(|_| TempDir::new().unwrap());
    fs::write(outside.path().join("file"), "outside").unwrap();
    let (server, mut client) = start_server();
    let mounts = || {
        let mountinfo = fs::read_to_string(format!("/proc/{}/mountinfo", server.child().id())).unwrap();
        let mount_points = mountinfo.lines().map(|line| line.split(' ').nth(4).unwrap().to_owned());
        mount_points.collect::<Vec<_>>()
    };
    let before = mounts();
    let has_ended = AtomicBool::new(false);
    let path = |name| outer.path().join(name);
    let storm = || {
        // These are the calls that the file server makes for a guest. Most fail while a share is attached.
        while !has_ended.load(Ordering::Relaxed) {
            let _ = fs::create_dir(path("data"));
            let _ = fs::rename(path("data"), path("moved"));
            let _ = symlink(outside.path(), path("data"));
            let _ = fs::rename(path("data"), path("link"));
            let _ = fs::create_dir(path("data"));
            let _ = fs::remove_dir(path("moved"));
            let _ = fs::remove_file(path("link"));
        }
    };
    thread::scope(|scope| {
        scope.spawn(storm);
        let _end = EndOfStorm(&has_ended);
        let (mut attached, mut refused) = (0, 0);
        let deadline = Instant::now() + Duration::from_secs(60);
        while attached + refused < ROUNDS || ((attached == 0 || refused == 0) && Instant::now() < deadline) {
            let shares = [share(outer.path(), "srv"), share(inner.path(), "srv/data")];
            match server.attach_all(&shares) {
                Ok(()) => attached += 1,
                Err(_) => refused += 1,
            }
            for mount_point in mounts() {
                assert!(
                    before.contains(&mount_point) || mount_point.starts_with("/srv"),
                    "{mount_point}"
                );
            }
            server.detach("srv/data").unwrap();
            server.detach("srv").unwrap();
        }
        assert!(attached > 0 && refused > 0, "{attached} attached, {refused} refused");
    });

    assert_eq!(mounts(), before);
    assert_eq!(fs::read_dir(inner.path()).unwrap().count(), 0);
    assert_eq!(fs::read_to_string(outside.path().join("file")).unwrap(), "outside");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    assert_eq!(client.walk("srv").unwrap_err(), libc::ENOENT);
}
