//! A file system that does not answer, like a dead NFS or FUSE server: what waits for it cannot be killed.

use std::{
    ffi::CString,
    fs::File,
    io::{Read, Write},
    os::fd::AsRawFd,
    path::Path,
    sync::mpsc,
    thread,
    time::Duration,
};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;

/// A FUSE mount whose server reads all requests, and answers only the one that starts the session. Dropped, it is
/// removed, and the calls that wait fail.
#[derive(Debug)]
pub(in crate::shim) struct HungVolume {
    folder: TempDir,
    requests: mpsc::Receiver<()>,
}

impl HungVolume {
    pub(in crate::shim) fn mount() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut connection = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other",
            connection.as_raw_fd()
        );
        let options = CString::new(options).unwrap();
        mount("hung", folder.path(), "fuse", MountFlags::empty(), options.as_c_str()).unwrap();
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
        Self { folder, requests }
    }

    pub(in crate::shim) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Waits until a process waits for an answer, which makes it unkillable.
    pub(in crate::shim) fn wait_for_request(&self) {
        self.requests.recv_timeout(Duration::from_secs(20)).unwrap();
    }
}

impl Drop for HungVolume {
    fn drop(&mut self) {
        unmount(self.folder.path(), UnmountFlags::FORCE | UnmountFlags::DETACH).unwrap();
    }
}
