//! The number of files that a guest can have looked up.

use std::{
    ffi::CString,
    fs::{self, File},
};

use nix::sched::{CloneFlags, unshare};
use virtiofsd::filesystem::{Context, FileSystem, FsOptions};

use super::{super::tree::Tree, client::ROOT};

/// The server changes the umask of the threads that share its working directory.
fn run_in_thread(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_FS).unwrap();
            test();
        });
        thread.join().unwrap();
    });
}

#[test]
fn guest_that_looks_up_every_file_gets_no_more_descriptors_than_its_limit() {
    run_in_thread(|| {
        const LIMIT: u64 = 64;
        let directory = tempfile::tempdir().unwrap();
        for number in 0..2 * LIMIT {
            fs::write(directory.path().join(number.to_string()), "").unwrap();
        }
        let root = directory.path().to_str().unwrap();
        let tree = Tree::open_at(root, File::open("/proc/self/fd").unwrap(), LIMIT).unwrap();
        tree.init(FsOptions::all()).unwrap();
        let look_up = |name: &str| {
            let by = Context {
                uid: 0.into(),
                gid: 0.into(),
                pid: 1,
            };
            let name = CString::new(name).unwrap();
            tree.lookup(by, ROOT, &name).map(|entry| (by, entry.inode))
        };

        let found: Vec<_> = (0..2 * LIMIT).map(|number| look_up(&number.to_string())).collect();

        let (known, refused): (Vec<_>, Vec<_>) = found.into_iter().partition(Result::is_ok);
        assert!((LIMIT / 2..=LIMIT).contains(&(known.len() as u64)), "{}", known.len());
        for error in refused.into_iter().filter_map(Result::err) {
            assert_eq!(error.raw_os_error(), Some(libc::ENFILE));
        }
        let (by, forgotten) = known.into_iter().flatten().next().unwrap();
        tree.forget(by, forgotten, 1);
        look_up(&(2 * LIMIT - 1).to_string()).unwrap();
    });
}
