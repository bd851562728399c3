//! The file server: a jailed child of the shim, one per pod that shares directories. It serves one tree over vhost-user
//! (virtio 1.3 §5.11) with the `virtiofsd` crate.
//!
//! Belongs here: the file system ([`tree`]), the credentials with which it accesses files ([`credentials`]), and the
//! queues ([`backend`], [`standby`], [`sync_threads`]). Does not belong here: mounts. The tree is the root of a mount
//! namespace that [`crate::shim`] makes and fills, with nothing else of the host in it. The shim uses only [`ROLE`] and
//! [`OWNED_BY_GUEST`].
//!
//! Requests of a guest are untrusted. At worst they end this process, and with it the guest's own machine. They cannot
//! name files outside of the tree, and [`MAX_DESCRIPTORS`] bounds the number of files that this process has open.

mod backend;
mod credentials;
#[cfg(any(test, fuzzing))]
mod fuzz;
mod guest_memory;
mod node_id;
mod standby;
mod stderr_log;
mod sync_threads;
pub(crate) mod system_calls;
#[cfg(test)]
pub(crate) mod tests;
mod tree;

use std::{
    env,
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    process::ExitCode,
    sync::Arc,
};

use rustix::{fs::CWD, mount::OpenTreeFlags, process::Resource};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use virtiofsd_vhost::vhost_user::{Error as ConnectionError, Listener};

use self::{
    backend::Backend, guest_memory::Memory, standby::MAX_HUNG_REQUESTS, sync_threads::MAX_SYNC_THREADS, tree::Tree,
};
#[cfg(any(test, fuzzing))]
pub use self::{backend::fuzz::serve_files, fuzz::serve_vmm};
pub(crate) use self::{credentials::CAPABILITIES, node_id::OWNED_BY_GUEST};
use crate::jail::{self, FailedStep, Jail, JailError, OpenAccess, Root, step};

/// The first argument that selects this role.
pub(crate) const ROLE: &str = "fs";

/// Maximum number of descriptors of this process, if the shim's own limit allows as many: the kernel's default for
/// `fs.nr_open`. Each file that the guest has looked up or holds open takes one.
const MAX_DESCRIPTORS: u32 = 1 << 20;

/// How many of the [`MAX_DESCRIPTORS`] descriptors are reserved for the process itself.
const RESERVED_DESCRIPTORS: u64 = 256;

/// Maximum number of threads: those of the vhost-user daemon, those for fsync, and one for each request that hangs.
const MAX_THREADS: u32 = 8 + MAX_HUNG_REQUESTS + MAX_SYNC_THREADS;

#[derive(Debug, thiserror::Error)]
enum FsError {
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error("cannot {step}: {source}")]
    Inherit { step: &'static str, source: io::Error },
    #[error("cannot open the root of the tree of shared files: {0}")]
    Tree(#[source] io::Error),
    #[error("cannot create the timer that detects hung requests: {0}")]
    Timer(#[source] io::Error),
    #[error("cannot serve the machine: {0}")]
    Serve(DaemonError),
}

/// The file server process: serves the machine until the vmm closes its end of the connection. Descriptor 0 is the
/// listening vhost-user socket with one pending connection. Descriptor 1 is a pidfd of the vmm, or /dev/null if the shim
/// has none. The third argument is the number of the shim's descriptor that is the mount namespace of the tree.
pub(crate) fn main() -> ExitCode {
    stderr_log::install();
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
        vmm,
    } = Inherited::take().map_err(|(step, source)| FsError::Inherit { step, source })?;
    jail::enter(&Jail {
        role: ROLE,
        name: c"nutshell-fs",
        root: Root::Namespace(namespace.as_fd()),
        open_access: OpenAccess::Root,
        peer: Some(vmm.as_fd()),
        capabilities: CAPABILITIES,
        keep: &[listener.as_fd(), namespace.as_fd(), own_descriptors.as_fd()],
        max_descriptors: MAX_DESCRIPTORS,
        descriptor_table_size: 4096,
        max_threads: MAX_THREADS,
        calls: Some(system_calls::PROCESS),
    })?;
    drop((namespace, vmm));

    let descriptors = rustix::process::getrlimit(Resource::Nofile)
        .current
        .unwrap_or(u64::from(MAX_DESCRIPTORS));
    let guest_descriptors = descriptors.saturating_sub(RESERVED_DESCRIPTORS);
    let tree = Tree::open(File::from(own_descriptors), guest_descriptors).map_err(FsError::Tree)?;
    let memory = guest_memory::empty_memory();
    let backend = Backend::new(tree, memory.clone()).map_err(FsError::Timer)?;
    serve(Arc::new(backend), memory, listener)
}

/// Descriptors from the shim, and one that is opened before the jail, which has no /proc.
struct Inherited {
    listener: UnixListener,
    namespace: OwnedFd,
    /// `/proc/self/fd`, for opening files that the guest has looked up.
    own_descriptors: OwnedFd,
    /// A pidfd of the vmm, whose network, IPC and UTS namespaces this process enters. If that fails, as with /dev/null, it
    /// makes new ones.
    vmm: OwnedFd,
}

impl Inherited {
    fn take() -> Result<Self, FailedStep> {
        let listener = io::stdin().as_fd().try_clone_to_owned();
        let listener = listener.map_err(step("duplicate the listening socket"))?;
        let vmm = io::stdout().as_fd().try_clone_to_owned();
        let vmm = vmm.map_err(step("duplicate the pidfd of the vmm"))?;
        let namespace = env::args_os().nth(3).and_then(|number| number.to_str()?.parse().ok());
        let namespace = namespace
            .ok_or_else(|| io::Error::other("the third argument is not a descriptor number"))
            .and_then(jail::open_namespace_of_parent)
            .map_err(step("open the mount namespace of the shared files"))?;
        let null = File::options().read(true).write(true).open("/dev/null");
        let null = null.map_err(step("open /dev/null"))?;
        nix::unistd::dup2_stdin(&null).map_err(step("replace standard input by /dev/null"))?;
        nix::unistd::dup2_stdout(&null).map_err(step("replace standard output by /dev/null"))?;
        // A separate mount with this directory as root: `..` does not lead into the host's /proc, where uid 0 may
        // write many files without any capability.
        let own_descriptors = rustix::mount::open_tree(
            CWD,
            "/proc/self/fd",
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
        )
        .map_err(step("clone the mount of /proc/self/fd"))?;
        Ok(Self {
            listener: listener.into(),
            namespace,
            own_descriptors,
            vmm,
        })
    }
}

/// Takes a connection, and serves it until the vmm closes it. `memory` is the one of `backend`.
fn serve(backend: Arc<Backend>, memory: Memory, listener: UnixListener) -> Result<(), FsError> {
    let mut daemon = VhostUserDaemon::new("vhost-user".to_owned(), backend, memory).map_err(FsError::Serve)?;
    daemon.start(&mut Listener::from(listener)).map_err(FsError::Serve)?;
    match daemon.wait() {
        // The vmm has ended: between two messages, or within one if it was killed.
        Ok(()) | Err(DaemonError::HandleRequest(ConnectionError::Disconnected | ConnectionError::PartialMessage)) => {
            Ok(())
        }
        Err(error) => Err(FsError::Serve(error)),
    }
}
