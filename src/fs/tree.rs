//! The tree as the guest sees it: virtiofsd's passthrough file system, with the guest's users as
//! owners of what they create, names that are single components, and caching by who may change
//! what.
//!
//! The tree's first two levels are the shim's: `<container id>/<share>`, each share a mount. What
//! the guest alone can change it may cache for good; the rest it may cache for as long as NFS
//! clients do, and file contents as long as the file is unchanged at open (close-to-open).

use std::{ffi::CStr, fs::File, io, time::Duration};

use virtiofsd::{
    filesystem::{
        Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions, ROOT_ID,
        SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
    },
    fuse::{Attr, SetattrIn},
    passthrough::{CachePolicy, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs},
    read_dir::ReadDir,
    soft_idmap::Id,
};

use super::{
    identity::{ClearingSetId, act_as},
    opened::Opened,
};

/// Set in the mode of a container's directory in the tree where the container's [`ROOTFS`] is
/// changed by nobody but the guest.
pub(crate) const OWNED_BY_GUEST: u32 = libc::S_ISVTX;

/// The name of a container's root file system in its directory.
const ROOTFS: &CStr = c"rootfs";

/// How long the guest may use names and attributes of files that the host may change.
const SHARED_TTL: Duration = Duration::from_secs(1);

/// How long it may use those that only it changes.
const OWNED_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// In a node id that the guest has: below a root file system of its own. The inner file system
/// counts its ids up from 1 and comes nowhere near these bits; a guest that makes up such an id only
/// misleads itself.
const OWNED: u64 = 1 << 63;

/// In a node id that the guest has: a directory with [`OWNED_BY_GUEST`].
const HOLDS_OWNED: u64 = 1 << 62;

/// The tree.
pub(super) struct Tree {
    inner: PassthroughFs,
    opened: Opened,
}

impl Tree {
    /// The tree at this process's root. At most `descriptors` files are known to the guest or open
    /// at one time. `own_descriptors` is `/proc/self/fd`.
    pub(super) fn open(own_descriptors: File, descriptors: u64) -> io::Result<Self> {
        let inner = PassthroughFs::new(Config {
            root_dir: "/".to_owned(),
            proc_sfd_rawfd: Some(own_descriptors),
            guest_fd_limit: descriptors,
            entry_timeout: SHARED_TTL,
            attr_timeout: SHARED_TTL,
            cache_policy: CachePolicy::Auto,
            // Else what a killed guest had written but not yet sent would be lost.
            writeback: false,
            announce_submounts: true,
            // Handles need CAP_DAC_READ_SEARCH, which reaches beyond the tree.
            inode_file_handles: InodeFileHandlesMode::Never,
            readdirplus: true,
            xattr: true,
            posix_acl: NegotiationMode::Auto,
            // Else the guest asks for `security.capability` before each write.
            killpriv_v2: true,
            ..Config::default()
        })?;
        Ok(Self {
            inner,
            opened: Opened::default(),
        })
    }

    /// What the guest is told about the file `name` in `parent`.
    fn entry(&self, parent: u64, name: &CStr, found: io::Result<Entry>) -> io::Result<Entry> {
        let class = |mode: u32| {
            if parent & OWNED != 0 || parent & HOLDS_OWNED != 0 && name == ROOTFS {
                OWNED
            } else if parent == ROOT_ID && mode & OWNED_BY_GUEST != 0 {
                HOLDS_OWNED
            } else {
                0
            }
        };
        match found {
            Ok(mut entry) => {
                let class = class(entry.attr.mode);
                entry.inode |= class;
                entry.entry_timeout = ttl(class);
                entry.attr_timeout = ttl(class);
                Ok(entry)
            }
            // Node 0 means that there is none, and that this may be cached (virtiofsd's `Entry`).
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) && class(0) == OWNED => Ok(Entry {
                inode: 0,
                generation: 0,
                attr: Attr::default(),
                attr_timeout: OWNED_TTL,
                entry_timeout: OWNED_TTL,
            }),
            Err(error) => Err(error),
        }
    }

    /// How the guest may cache the file that it has just opened.
    fn caching(&self, ctx: Context, node: u64) -> OpenOptions {
        if node & OWNED != 0 {
            // Its closing needs no report either: only network file systems fail then.
            OpenOptions::KEEP_CACHE | OpenOptions::NOFLUSH
        } else if self
            .inner
            .getattr(ctx, inner(node), None)
            .is_ok_and(|(attr, _)| self.opened.is_unchanged(node, &attr))
        {
            OpenOptions::KEEP_CACHE
        } else {
            OpenOptions::empty()
        }
    }
}

fn inner(node: u64) -> u64 {
    node & !(OWNED | HOLDS_OWNED)
}

fn ttl(node: u64) -> Duration {
    if node & OWNED == 0 { SHARED_TTL } else { OWNED_TTL }
}

/// A name is one component: no request reaches beyond the directory that it names.
fn component(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        _ => Ok(name),
    }
}

/// Acts as the guest's user, and returns what tells the inner file system not to switch to anybody.
fn as_creator(ctx: Context) -> io::Result<Context> {
    act_as(ctx.uid.into_inner(), ctx.gid.into_inner())?;
    Ok(Context {
        uid: 0.into(),
        gid: 0.into(),
        pid: ctx.pid,
    })
}

/// Acts as the guest's user where the request has one, for file systems that decide by it (NFS).
fn as_user(ctx: Context) {
    // A user that the host has not is no reason to refuse: what the user may do is decided already.
    let _ = act_as(ctx.uid.into_inner(), ctx.gid.into_inner());
}

/// The guest's groups matter to its own kernel only: this process may write every directory.
fn without_groups(extensions: Extensions) -> Extensions {
    Extensions {
        secctx: extensions.secctx,
        sup_gids: Vec::new(),
    }
}

fn clearing_set_id(asked: bool) -> io::Result<Option<ClearingSetId>> {
    asked.then(ClearingSetId::start).transpose()
}

impl FileSystem for Tree {
    type Inode = u64;
    type Handle = u64;
    type DirIter = ReadDir<Vec<u8>>;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // What a symbolic link says never changes: one that says something else is another file.
        Ok(self.inner.init(capable)? | FsOptions::CACHE_SYMLINKS)
    }

    fn destroy(&self) {
        self.inner.destroy();
    }

    fn lookup(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        as_user(ctx);
        let found = self.inner.lookup(ctx, inner(parent), component(name)?);
        self.entry(parent, name, found)
    }

    fn forget(&self, ctx: Context, node: u64, count: u64) {
        self.inner.forget(ctx, inner(node), count);
    }

    fn batch_forget(&self, ctx: Context, mut requests: Vec<(u64, u64)>) {
        for (node, _) in &mut requests {
            *node = inner(*node);
        }
        self.inner.batch_forget(ctx, requests);
    }

    fn getattr(&self, ctx: Context, node: u64, handle: Option<u64>) -> io::Result<(Attr, Duration)> {
        let (attr, _) = self.inner.getattr(ctx, inner(node), handle)?;
        Ok((attr, ttl(node)))
    }

    fn setattr(
        &self,
        ctx: Context,
        node: u64,
        attr: SetattrIn,
        handle: Option<u64>,
        mut valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        as_user(ctx);
        let _clearing = clearing_set_id(valid.contains(SetattrValid::KILL_SUIDGID))?;
        valid.remove(SetattrValid::KILL_SUIDGID);
        let (attr, _) = self.inner.setattr(ctx, inner(node), attr, handle, valid)?;
        Ok((attr, ttl(node)))
    }

    fn readlink(&self, ctx: Context, node: u64) -> io::Result<Vec<u8>> {
        self.inner.readlink(ctx, inner(node))
    }

    fn symlink(
        &self,
        ctx: Context,
        linkname: &CStr,
        parent: u64,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let created = self.inner.symlink(
            as_creator(ctx)?,
            linkname,
            inner(parent),
            component(name)?,
            without_groups(extensions),
        );
        self.entry(parent, name, created)
    }

    fn mknod(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let created = self.inner.mknod(
            as_creator(ctx)?,
            inner(parent),
            component(name)?,
            mode,
            rdev,
            umask,
            without_groups(extensions),
        );
        self.entry(parent, name, created)
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let created = self.inner.mkdir(
            as_creator(ctx)?,
            inner(parent),
            component(name)?,
            mode,
            umask,
            without_groups(extensions),
        );
        self.entry(parent, name, created)
    }

    fn unlink(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        as_user(ctx);
        self.inner.unlink(ctx, inner(parent), component(name)?)
    }

    fn rmdir(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        as_user(ctx);
        self.inner.rmdir(ctx, inner(parent), component(name)?)
    }

    fn rename(&self, ctx: Context, from: u64, old_name: &CStr, to: u64, new_name: &CStr, flags: u32) -> io::Result<()> {
        as_user(ctx);
        self.inner.rename(
            ctx,
            inner(from),
            component(old_name)?,
            inner(to),
            component(new_name)?,
            flags,
        )
    }

    fn link(&self, ctx: Context, node: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        as_user(ctx);
        let linked = self.inner.link(ctx, inner(node), inner(parent), component(name)?);
        self.entry(parent, name, linked)
    }

    fn open(&self, ctx: Context, node: u64, kill_priv: bool, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        as_user(ctx);
        let _clearing = clearing_set_id(kill_priv)?;
        let (handle, options) = self.inner.open(ctx, inner(node), false, flags)?;
        Ok((handle, options | self.caching(ctx, node)))
    }

    fn create(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        let creator = as_creator(ctx)?;
        let _clearing = clearing_set_id(kill_priv)?;
        let (entry, handle, options) = self.inner.create(
            creator,
            inner(parent),
            component(name)?,
            mode,
            false,
            flags,
            umask,
            without_groups(extensions),
        )?;
        let entry = self.entry(parent, name, Ok(entry))?;
        let caching = self.caching(ctx, entry.inode);
        Ok((entry, handle, options | caching))
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        node: u64,
        handle: u64,
        w: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        self.inner
            .read(ctx, inner(node), handle, w, size, offset, lock_owner, flags)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        node: u64,
        handle: u64,
        r: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        let _clearing = clearing_set_id(kill_priv)?;
        self.inner.write(
            ctx,
            inner(node),
            handle,
            r,
            size,
            offset,
            lock_owner,
            delayed_write,
            false,
            flags,
        )
    }

    fn flush(&self, ctx: Context, node: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        self.inner.flush(ctx, inner(node), handle, lock_owner)
    }

    fn fsync(&self, ctx: Context, node: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.inner.fsync(ctx, inner(node), datasync, handle)
    }

    fn fallocate(&self, ctx: Context, node: u64, handle: u64, mode: u32, offset: u64, length: u64) -> io::Result<()> {
        self.inner.fallocate(ctx, inner(node), handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: Context,
        node: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.inner
            .release(ctx, inner(node), flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: Context, node: u64) -> io::Result<libc::statvfs64> {
        self.inner.statfs(ctx, inner(node))
    }

    fn setxattr(
        &self,
        ctx: Context,
        node: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra_flags: SetxattrFlags,
    ) -> io::Result<()> {
        as_user(ctx);
        self.inner.setxattr(ctx, inner(node), name, value, flags, extra_flags)
    }

    fn getxattr(&self, ctx: Context, node: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        as_user(ctx);
        self.inner.getxattr(ctx, inner(node), name, size)
    }

    fn listxattr(&self, ctx: Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        as_user(ctx);
        self.inner.listxattr(ctx, inner(node), size)
    }

    fn removexattr(&self, ctx: Context, node: u64, name: &CStr) -> io::Result<()> {
        as_user(ctx);
        self.inner.removexattr(ctx, inner(node), name)
    }

    fn opendir(&self, ctx: Context, node: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        as_user(ctx);
        let (handle, mut options) = self.inner.opendir(ctx, inner(node), flags)?;
        if node & OWNED != 0 {
            options |= OpenOptions::KEEP_CACHE | OpenOptions::CACHE_DIR;
        }
        Ok((handle, options))
    }

    fn readdir(&self, ctx: Context, node: u64, handle: u64, size: u32, offset: u64) -> io::Result<Self::DirIter> {
        self.inner.readdir(ctx, inner(node), handle, size, offset)
    }

    fn fsyncdir(&self, ctx: Context, node: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.inner.fsyncdir(ctx, inner(node), datasync, handle)
    }

    fn releasedir(&self, ctx: Context, node: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.inner.releasedir(ctx, inner(node), flags, handle)
    }

    fn access(&self, ctx: Context, node: u64, mask: u32) -> io::Result<()> {
        self.inner.access(ctx, inner(node), mask)
    }

    fn lseek(&self, ctx: Context, node: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        self.inner.lseek(ctx, inner(node), handle, offset, whence)
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        node_in: u64,
        handle_in: u64,
        offset_in: u64,
        node_out: u64,
        handle_out: u64,
        offset_out: u64,
        len: u64,
        flags: u64,
    ) -> io::Result<usize> {
        self.inner.copyfilerange(
            ctx,
            inner(node_in),
            handle_in,
            offset_in,
            inner(node_out),
            handle_out,
            offset_out,
            len,
            flags,
        )
    }

    fn syncfs(&self, ctx: Context, node: u64) -> io::Result<()> {
        self.inner.syncfs(ctx, inner(node))
    }
}
