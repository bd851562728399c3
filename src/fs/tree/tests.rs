use std::{fs, os::fd::AsRawFd, path::Path, thread};

use nix::sched::{CloneFlags, unshare};

use super::*;

/// Runs `test` on the tree in `directory`, on a thread of its own.
fn on_tree<T: Send + 'static>(directory: &Path, test: impl FnOnce(Tree) -> T + Send + 'static) -> T {
    let opened = File::open(directory).unwrap();
    let root = format!("/proc/self/fd/{}/.", opened.as_raw_fd());
    let result = thread::spawn(move || {
        // A session changes the umask.
        unshare(CloneFlags::CLONE_FS).unwrap();
        test(Tree::open_at(&root, File::open("/proc/self/fd").unwrap(), 100).unwrap())
    });
    result.join().unwrap()
}

fn root_user() -> Context {
    Context {
        uid: 0.into(),
        gid: 0.into(),
        pid: 1,
    }
}

/// The server also lacks the capability, which this test has.
#[test]
fn device_nodes_are_refused_to_a_process_that_may_make_them() {
    let directory = tempfile::tempdir().unwrap();
    let results = on_tree(directory.path(), |tree| {
        tree.init(FsOptions::empty()).map(drop).unwrap();
        [(libc::S_IFCHR, 0x0103), (libc::S_IFBLK, 0x0800), (libc::S_IFBLK, 0)].map(|(kind, device)| {
            let root = virtiofsd::filesystem::ROOT_ID;
            let made = tree.mknod(
                root_user(),
                root,
                c"node",
                kind | 0o666,
                device,
                0,
                Extensions::default(),
            );
            made.map(drop).unwrap_err().raw_os_error()
        })
    });
    assert_eq!(results, [Some(libc::EPERM); 3]);
    assert!(!fs::exists(directory.path().join("node")).unwrap());
}

#[test]
fn nodes_are_forgotten_when_the_guest_starts_or_ends_its_session() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir_all(directory.path().join("c/rootfs")).unwrap();
    let remaining = on_tree(directory.path(), |tree| {
        let start = || tree.init(FsOptions::empty()).map(drop).unwrap();
        [&start as &dyn Fn(), &|| tree.destroy()].map(|end| {
            start();
            let container = tree.lookup(root_user(), virtiofsd::filesystem::ROOT_ID, c"c").unwrap();
            let rootfs = tree.lookup(root_user(), container.inode, c"rootfs").unwrap();
            let rootfs = inner_id(rootfs.inode);
            assert!(tree.rootfs_nodes.contains(rootfs));
            end();
            tree.rootfs_nodes.contains(rootfs)
        })
    });
    assert_eq!(remaining, [false, false]);
}

#[test]
fn entry_that_is_removed_while_its_directory_is_listed_has_no_attributes() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        fs::write(directory.path().join(name), "").unwrap();
    }
    let files = directory.path().to_owned();
    let (found, after) = on_tree(directory.path(), move |tree| {
        let root = virtiofsd::filesystem::ROOT_ID;
        tree.init(FsOptions::empty()).map(drop).unwrap();
        let (handle, _) = tree.opendir(root_user(), root, 0).unwrap();
        let listing = tree.readdir(root_user(), root, handle.unwrap(), 4096, 0).unwrap();
        fs::remove_file(files.join("b")).unwrap();
        let found = [c"a", c"b"].map(|name| tree.lookup(root_user(), root, name).unwrap().inode != 0);
        drop(listing);
        (found, tree.lookup(root_user(), root, c"b").map(drop))
    });
    assert_eq!(found, [true, false]);
    assert_eq!(after.unwrap_err().raw_os_error(), Some(libc::ENOENT));
}
