//! The entry point of the fuzz target for the file server: FUSE requests in a virtqueue, for files in a small tmpfs.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

mod request;

use std::{
    fs::{self, File, Permissions},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    sync::LazyLock,
};

use arbitrary::{Result, Unstructured};
use nix::sched::{CloneFlags, unshare};
use rustix::{
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen},
    thread::CapabilitiesSecureBits,
};
use virtiofsd_memory::{GuestAddress, GuestMemoryMmap};

use self::request::Session;
use super::*;
use crate::fs::{credentials::set_fs_ids, node_id::OWNED_BY_GUEST};

const MAX_STEPS: usize = 100;

/// The maximum number of files that the guest can have open.
const MAX_FILES: u64 = 60;

const QUEUE_SIZE: u16 = 16;

/// The queue in the guest's memory.
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;

/// Where requests and replies are, and the size of the guest's memory.
const REQUEST: u64 = 0x1_0000;
const REPLY: u64 = 0x4_0000;
const MEMORY_SIZE: usize = 0x8_0000;

/// What the guest must not reach: a file beside its tree.
const SECRET: &[u8] = b"not the guest's";

/// A tmpfs of a few MiB that is mounted nowhere, so nothing of the host is in it, and it ends with the process.
static FILES: LazyLock<OwnedFd> = LazyLock::new(mount_tmpfs);

pub(in crate::fs) fn mount_tmpfs() -> OwnedFd {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).expect("the target needs root: it mounts a tmpfs");
    for (option, value) in [("size", "4m"), ("nr_inodes", "500")] {
        fsconfig_set_string(&context, option, value).unwrap();
    }
    fsconfig_create(&context).unwrap();
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap()
}

// A process never unmaps guest memory, so all inputs use the same.
static MEMORY: LazyLock<Memory> = LazyLock::new(|| {
    let regions = [(GuestAddress(0), MEMORY_SIZE)];
    Memory::new(GuestMemoryMmap::from_ranges(&regions).unwrap())
});

/// A backend that flushes files in the thread that takes the request: to the fuzzer, a thread that is just starting
/// looks like lost memory.
pub(in crate::fs) fn backend_without_sync_threads(tree: Tree, memory: Memory) -> Backend {
    let mut backend = Backend::new(tree, memory).unwrap();
    Arc::get_mut(&mut backend.queues).unwrap().sync_threads = SyncThreads::without_threads();
    backend
}

/// Interprets `data` as FUSE requests, with node ids and handles of earlier replies.
///
/// # Panics
///
/// If a reply is malformed, or a file beside the guest's tree is read or changed.
pub fn serve_files(data: &[u8]) {
    prepare_thread();
    let top = PathBuf::from(format!("/proc/self/fd/{}/.", FILES.as_raw_fd()));
    empty_folder(&top);
    fill(&top);
    let own_descriptors = File::open("/proc/self/fd").unwrap();
    let tree = Tree::open_at(top.join("tree").to_str().unwrap(), own_descriptors, MAX_FILES).unwrap();
    let backend = backend_without_sync_threads(tree, MEMORY.clone());
    let mut guest = Guest::new(backend);
    // The input may end anywhere.
    let _ = guest.run(&mut Unstructured::new(data));
    drop(guest);
    set_fs_ids(0, 0).unwrap();
    assert_eq!(fs::read(top.join("secret/file")).unwrap(), SECRET);
    assert_eq!(fs::read_dir(top.join("secret")).unwrap().count(), 1);
    assert_eq!(fs::read_dir(&top).unwrap().count(), 2);
    empty_folder(&top);
}

/// Gives this thread its own working directory and umask, which requests change for a moment, and lets it keep its
/// capabilities when requests change its user.
pub(in crate::fs) fn prepare_thread() {
    unshare(CloneFlags::CLONE_FS).unwrap();
    let bits = rustix::thread::capabilities_secure_bits().unwrap();
    if !bits.contains(CapabilitiesSecureBits::NO_SETUID_FIXUP) {
        rustix::thread::set_capabilities_secure_bits(bits | CapabilitiesSecureBits::NO_SETUID_FIXUP).unwrap();
    }
}

fn empty_folder(folder: &Path) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            fs::remove_dir_all(&path).unwrap();
        } else {
            fs::remove_file(&path).unwrap();
        }
    }
}

/// Makes a tree with two containers, of which the guest owns the files of one, and a secret beside it.
fn fill(top: &Path) {
    let tree = top.join("tree");
    for folder in ["a/rootfs/bin", "a/0", "b/rootfs"] {
        fs::create_dir_all(tree.join(folder)).unwrap();
    }
    fs::create_dir(top.join("secret")).unwrap();
    fs::write(top.join("secret/file"), SECRET).unwrap();
    fs::set_permissions(tree.join("a"), Permissions::from_mode(0o755 | OWNED_BY_GUEST)).unwrap();
    for file in ["a/rootfs/file", "a/0/file", "b/rootfs/file"] {
        fs::write(tree.join(file), [b'f'; 5000]).unwrap();
    }
    for (target, link) in [
        ("../../secret", "a/0/link"),
        ("/etc", "b/rootfs/link"),
        ("file", "a/rootfs/link"),
    ] {
        symlink(target, tree.join(link)).unwrap();
    }
}

/// A guest with one request at a time.
struct Guest {
    backend: Backend,
    ring: VringMutex<Memory>,
    available: u16,
}

impl Guest {
    fn new(backend: Backend) -> Self {
        let ring = VringMutex::new(MEMORY.clone(), QUEUE_SIZE).unwrap();
        ring.set_queue_size(QUEUE_SIZE);
        ring.set_queue_info(DESCRIPTORS, AVAILABLE, USED).unwrap();
        ring.set_queue_ready(true);
        ring.set_enabled(true);
        write(AVAILABLE, &[0; 64]);
        write(USED, &[0; 256]);
        Self {
            backend,
            ring,
            available: 0,
        }
    }

    fn run(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let mut session = Session::default();
        let init = session.init(input)?;
        self.exchange(&init, &[0x1000], input)?;
        for _ in 0..MAX_STEPS {
            if input.is_empty() {
                break;
            }
            if input.ratio(1_u8, 32)? {
                self.damage(input)?;
                continue;
            }
            let request = session.request(input)?;
            let room = *input.choose(&[0x2000, 0x2000, 0x2000, 0x1_0000, 144, 16, 8, 0])?;
            let parts = if input.ratio(1_u8, 4)? {
                vec![16, room]
            } else {
                vec![room]
            };
            if let Some(reply) = self.exchange(&request, &parts, input)? {
                session.take(&request, &reply);
            }
        }
        Ok(())
    }

    /// Sends a request, whose reply has buffers of these sizes. `None` if the queue is broken.
    fn exchange(&mut self, request: &[u8], room: &[u32], input: &mut Unstructured<'_>) -> Result<Option<Vec<u8>>> {
        write(REQUEST, request);
        let first = input.int_in_range(0..=request.len().min(100))?;
        let sizes = [first, request.len() - first].map(|size| u32::try_from(size).unwrap());
        let mut buffers = vec![(REQUEST, sizes[0], 0)];
        if sizes[1] > 0 {
            buffers.push((REQUEST + u64::from(sizes[0]), sizes[1], 0));
        }
        let mut address = REPLY;
        for size in room {
            buffers.push((address, *size, 2));
            address += u64::from(*size);
        }
        let last = buffers.len() - 1;
        for (index, (address, length, flags)) in buffers.into_iter().enumerate() {
            let next = u16::from(index < last);
            let index = u16::try_from(index).unwrap();
            write_descriptor(index, address, length, flags | next, index + 1);
        }
        let before = used_index();
        self.make_available(0);
        self.backend.queues.serve_queue(&self.ring, self.backend.standby.main());
        if used_index() != before.wrapping_add(1) {
            return Ok(None);
        }
        let element = read(USED + 4 + 8 * u64::from(before % QUEUE_SIZE), 8);
        let written = u32::from_le_bytes(element[4..].try_into().unwrap());
        let total: u32 = room.iter().sum();
        assert!(written <= total, "{written} bytes in buffers of {total}");
        Ok(Some(read(REPLY, written as usize)))
    }

    /// What only a hostile driver does.
    fn damage(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        match input.int_in_range(0..=2_u8)? {
            0 => {
                let length = if input.arbitrary()? {
                    u32::from(input.arbitrary::<u16>()?)
                } else {
                    input.arbitrary()?
                };
                let address = u64::from(input.arbitrary::<u32>()? & 0xf_ffff);
                let flags = u16::from(input.arbitrary::<u8>()? & 7);
                write_descriptor(
                    input.int_in_range(0..=17)?,
                    address,
                    length,
                    flags,
                    input.int_in_range(0..=17)?,
                );
                self.make_available(input.int_in_range(0..=17)?);
            }
            1 => self.make_available(input.arbitrary::<u16>()? & 0x1f),
            _ => {
                self.available = self.available.wrapping_add(input.int_in_range(0..=20)?);
                write(AVAILABLE + 2, &self.available.to_le_bytes());
            }
        }
        self.backend.queues.serve_queue(&self.ring, self.backend.standby.main());
        Ok(())
    }

    fn make_available(&mut self, head: u16) {
        let slot = u64::from(self.available % QUEUE_SIZE);
        write(AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        write(AVAILABLE + 2, &self.available.to_le_bytes());
    }
}

fn used_index() -> u16 {
    let bytes = read(USED + 2, 2);
    u16::from_le_bytes([bytes[0], bytes[1]])
}

fn write_descriptor(index: u16, address: u64, length: u32, flags: u16, next: u16) {
    let at = DESCRIPTORS + 16 * u64::from(index);
    write(at, &address.to_le_bytes());
    write(at + 8, &length.to_le_bytes());
    write(at + 12, &flags.to_le_bytes());
    write(at + 14, &next.to_le_bytes());
}

fn write(address: u64, bytes: &[u8]) {
    MEMORY.memory().write_slice(bytes, GuestAddress(address)).unwrap();
}

fn read(address: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    MEMORY.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}
