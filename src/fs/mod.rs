//! The file server of a pod: a child of the shim, jailed, one per pod that shares directories. It
//! serves one tree over vhost-user (virtio 1.3 §5.11) with the `virtiofsd` crate.
//!
//! Lives here: what the tree does for the guest ([`tree`]), as whom ([`identity`]), and the queues
//! ([`device`]). May not live here: mounts. The tree is the root of a mount namespace that
//! [`crate::shim`] makes and fills; nothing of the host is behind it. The shim uses only [`ROLE`]
//! and [`OWNED_BY_GUEST`].
//!
//! Everything that a guest sends is hostile. At worst it ends this process, and with it its own
//! machine; it never names anything outside of the tree, and what it can make this process hold is
//! bounded by [`DESCRIPTORS`].

mod device;
mod identity;
mod opened;
mod report;
#[cfg(test)]
pub(crate) mod tests;
mod tree;

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    process::ExitCode,
    sync::Arc,
};

use device::Backend;
use rustix::{fs::CWD, mount::OpenTreeFlags, process::Resource, thread::CapabilitySet};
pub(crate) use tree::OWNED_BY_GUEST;
use tree::Tree;
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use virtiofsd_vhost::vhost_user::{Error as ConnectionError, Listener};

use crate::jail::{self, Jail, JailError, Root};

/// The first argument that selects this role.
pub(crate) const ROLE: &str = "fs";

/// What the file server may do to files, and nothing else. The guest's kernel has checked what its
/// processes may do; this process then acts for all of their users, root among them.
///
/// Not `DAC_READ_SEARCH`: it opens files by handle, on the whole file system that a share lies on.
/// Not `SYS_ADMIN`: so there are no `trusted.*` attributes.
pub(crate) const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    // Any user's file, whatever its mode.
    .union(CapabilitySet::DAC_OVERRIDE)
    // chmod, utimes and extended attributes of any user's file.
    .union(CapabilitySet::FOWNER)
    // Else writes and chmod would clear set-id bits that the guest's kernel wants kept.
    .union(CapabilitySet::FSETID)
    // New files belong to the guest's user and group: setfsuid, setfsgid.
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    // Device nodes in a root file system; nobody opens them here, its mounts are nodev.
    .union(CapabilitySet::MKNOD)
    // File capabilities (`security.capability`): packages set them as they are installed.
    .union(CapabilitySet::SETFCAP);

/// The most descriptors of this process, if the shim's own limit allows as many: the kernel's
/// default for `fs.nr_open`. Each file that the guest knows or holds open is one.
const DESCRIPTORS: u32 = 1 << 20;

/// How many of them are not the guest's.
const OWN_DESCRIPTORS: u64 = 256;

/// Why the file server ends.
#[derive(Debug, thiserror::Error)]
enum FsError {
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error("take over the descriptors from the shim: {0}")]
    Inherit(#[source] io::Error),
    #[error("open the tree: {0}")]
    Tree(#[source] io::Error),
    #[error("serve the machine: {0}")]
    Serve(DaemonError),
}

/// Runs the role until the machine's end of the connection closes. The shim gives the listening
/// vhost-user socket as descriptor 0, with one connection pending, and the mount namespace of the
/// tree as descriptor 1.
pub(crate) fn main() -> ExitCode {
    report::install();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nutshell fs: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), FsError> {
    let Inherited {
        listener,
        namespace,
        own_descriptors,
    } = Inherited::take().map_err(FsError::Inherit)?;
    jail::enter(&Jail {
        role: ROLE,
        name: c"nutshell-fs",
        root: Root::Namespace(namespace.as_fd()),
        capabilities: CAPABILITIES,
        keep: &[listener.as_fd(), namespace.as_fd(), own_descriptors.as_fd()],
        max_descriptors: DESCRIPTORS,
        descriptor_table_size: 4096,
        max_threads: 8,
    })?;
    drop(namespace);

    let descriptors = rustix::process::getrlimit(Resource::Nofile)
        .current
        .unwrap_or(u64::from(DESCRIPTORS));
    let guest_descriptors = descriptors.saturating_sub(OWN_DESCRIPTORS);
    let tree = Tree::open(File::from(own_descriptors), guest_descriptors).map_err(FsError::Tree)?;
    serve(tree, listener)
}

/// What this process has from the shim, and cannot get once it is jailed.
struct Inherited {
    listener: UnixListener,
    namespace: OwnedFd,
    /// `/proc/self/fd`, through which a file that is known can be opened.
    own_descriptors: OwnedFd,
}

impl Inherited {
    fn take() -> io::Result<Self> {
        let listener = io::stdin().as_fd().try_clone_to_owned()?;
        let namespace = io::stdout().as_fd().try_clone_to_owned()?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        nix::unistd::dup2_stdin(&null)?;
        nix::unistd::dup2_stdout(&null)?;
        // A mount of its own, whose root is this one directory: `..` does not lead out of it into
        // the host's /proc, where uid 0 may write much without any capability.
        let own_descriptors = rustix::mount::open_tree(
            CWD,
            "/proc/self/fd",
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
        )?;
        Ok(Self {
            listener: listener.into(),
            namespace,
            own_descriptors,
        })
    }
}

fn serve(tree: Tree, listener: UnixListener) -> Result<(), FsError> {
    let memory = device::no_memory();
    let backend = Arc::new(Backend::new(tree, memory.clone()));
    let mut daemon = VhostUserDaemon::new("vhost-user".to_owned(), backend, memory).map_err(FsError::Serve)?;
    daemon.start(&mut Listener::from(listener)).map_err(FsError::Serve)?;
    match daemon.wait() {
        // How it looks when the vmm ends: between two messages, or within one if it was killed.
        Ok(()) | Err(DaemonError::HandleRequest(ConnectionError::Disconnected | ConnectionError::PartialMessage)) => {
            Ok(())
        }
        Err(error) => Err(FsError::Serve(error)),
    }
}
