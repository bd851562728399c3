//! The file system that the guest sees. It is virtiofsd's passthrough file system with these changes: new files belong
//! to the guest's users, names are single components, there are no device nodes, only files in root file systems have
//! file capabilities, and caching depends on who may change a file.
//!
//! The tree's first two levels belong to the shim: `<container id>/<share>`, or `.shared/<number>` for what several
//! containers may use. Each share is a mount. Files that only the guest can change may be cached by it for a day. It
//! may cache names and attributes of other files for [`SHARED_TTL`], and their contents as long as the file is
//! unchanged at each open (close-to-open).

mod listings;
mod open_history;
mod rootfs_nodes;

use std::{ffi::CStr, fs::File, io, sync::Arc, time::Duration};

use virtiofsd::{
    filesystem::{
        Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid,
        SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
    },
    fuse::{Attr, SetattrIn},
    passthrough::{CachePolicy, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs},
    soft_idmap::Id,
};

use self::{
    listings::{Listing, Listings, MAX_READ_SIZE},
    open_history::OpenHistory,
    rootfs_nodes::RootfsNodes,
};
use super::{
    credentials::{WithoutFsetid, set_fs_ids},
    node_id::{OWNED_TTL, SHARED_TTL, inner_id, is_owned, ttl, with_class},
};

/// The attribute of a file's capabilities (capabilities(7)). In a volume, a user of the host could execute the file.
const FILE_CAPABILITIES: &CStr = c"security.capability";

pub(super) struct Tree {
    inner: PassthroughFs,
    open_history: OpenHistory,
    rootfs_nodes: RootfsNodes,
    listings: Arc<Listings>,
}

impl Tree {
    /// Opens the tree at this process's working directory. The guest can have at most `max_files` files looked up or open at a time.
    /// `own_descriptors` is `/proc/self/fd`.
    pub(super) fn open(own_descriptors: File, max_files: u64) -> io::Result<Self> {
        Self::open_at(".", own_descriptors, max_files)
    }

    /// Like [`Self::open`], for the tree at the path `root`.
    pub(super) fn open_at(root: &str, own_descriptors: File, max_files: u64) -> io::Result<Self> {
        let inner = PassthroughFs::new(Config {
            root_dir: root.to_owned(),
            proc_sfd_rawfd: Some(own_descriptors),
            guest_fd_limit: max_files,
            entry_timeout: SHARED_TTL,
            attr_timeout: SHARED_TTL,
            cache_policy: CachePolicy::Auto,
            // With writeback, data that a guest wrote but had not yet sent would be lost if the guest is killed.
            writeback: false,
            announce_submounts: true,
            // Handles need CAP_DAC_READ_SEARCH, which reaches files outside of the tree.
            inode_file_handles: InodeFileHandlesMode::Never,
            readdirplus: true,
            xattr: true,
            posix_acl: NegotiationMode::Auto,
            // Without it, the guest reads `security.capability` before each write.
            killpriv_v2: true,
            ..Config::default()
        })?;
        Ok(Self {
            inner,
            open_history: OpenHistory::default(),
            rootfs_nodes: RootfsNodes::default(),
            listings: Arc::default(),
        })
    }

    /// Sets node id and cache times of the entry `name` in `parent`.
    fn complete_entry(&self, parent: u64, name: &CStr, found: io::Result<Entry>) -> io::Result<Entry> {
        match found {
            Ok(mut entry) => {
                self.rootfs_nodes.add(inner_id(parent), name, entry.inode);
                entry.inode = with_class(entry.inode, parent, name, entry.attr.mode);
                entry.entry_timeout = ttl(entry.inode);
                entry.attr_timeout = ttl(entry.inode);
                Ok(entry)
            }
            // Node 0 is a missing name that the guest may cache (virtiofsd's `Entry`).
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) && is_owned(with_class(0, parent, name, 0)) => {
                Ok(without_node(OWNED_TTL))
            }
            // The entry was removed since the directory was read, or its file system fails. The guest lists it
            // without attributes, as getdents64(2) does, and not the directory with an error.
            Err(_) if listings::is_listing() => Ok(without_node(Duration::ZERO)),
            Err(error) => Err(error),
        }
    }

    /// Returns how the guest may cache the file `node`, which it is opening.
    fn cache_options(&self, ctx: Context, node: u64) -> OpenOptions {
        if is_owned(node) {
            // The guest need not send a flush at close: it can fail only on network file systems.
            OpenOptions::KEEP_CACHE | OpenOptions::NOFLUSH
        } else if self
            .inner
            .getattr(ctx, inner_id(node), None)
            .is_ok_and(|(attr, _)| self.open_history.record(node, &attr))
        {
            OpenOptions::KEEP_CACHE
        } else {
            OpenOptions::empty()
        }
    }
}

/// A name without a node: one that does not exist, or an entry of a directory without attributes.
fn without_node(ttl: Duration) -> Entry {
    Entry {
        inode: 0,
        generation: 0,
        attr: Attr::default(),
        attr_timeout: ttl,
        entry_timeout: ttl,
    }
}

/// Refuses names of more than one component, so that no request reaches beyond the directory that it names.
fn check_name(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        _ => Ok(name),
    }
}

/// Refuses an offset that no file has: virtiofsd panics if it does not fit into an `off_t`.
fn check_offset(offset: u64) -> io::Result<u64> {
    match libc::off_t::try_from(offset) {
        Ok(_) => Ok(offset),
        Err(_) => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

/// Makes this thread create files as the user and group of the request. The returned context has the ids 0, so that the
/// inner file system does not switch ids itself.
fn set_creator(ctx: Context) -> io::Result<Context> {
    set_fs_ids(ctx.uid.into_inner(), ctx.gid.into_inner())?;
    Ok(Context {
        uid: 0.into(),
        gid: 0.into(),
        pid: ctx.pid,
    })
}

/// Makes this thread access files as the user and group of the request, for file systems that check permissions
/// themselves (NFS).
fn set_user(ctx: Context) {
    // A failure is ignored: the guest's kernel has already checked the user's permissions.
    let _ = set_fs_ids(ctx.uid.into_inner(), ctx.gid.into_inner());
}

/// Refuses device nodes: on the host, a process with access to the file could open the device. Whiteouts, with which
/// overlayfs marks removed files, are no devices (`WHITEOUT_DEV` in Linux).
fn refuse_device(mode: u32, rdev: u32) -> io::Result<()> {
    match (mode & libc::S_IFMT, rdev) {
        (libc::S_IFBLK, _) | (libc::S_IFCHR, 1..) => Err(io::Error::from_raw_os_error(libc::EPERM)),
        _ => Ok(()),
    }
}

/// Drops the user's groups, which only the guest's own kernel needs: this process may write to every directory. Drops
/// the security context too, which is not negotiated.
fn without_extensions(_: Extensions) -> Extensions {
    Extensions {
        secctx: None,
        sup_gids: Vec::new(),
    }
}

/// Makes the kernel clear set-id bits while the returned value exists, if the guest requests it.
fn clear_set_id(is_requested: bool) -> io::Result<Option<WithoutFsetid>> {
    is_requested.then(WithoutFsetid::enter).transpose()
}

impl FileSystem for Tree {
    type Inode = u64;
    type Handle = u64;
    type DirIter = Listing;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // virtiofsd forgets all nodes and handles at this request. A guest may repeat it.
        self.rootfs_nodes.clear();
        self.listings.clear();
        // The target of a symbolic link never changes: a link with another target is another file.
        Ok(self.inner.init(capable)? | FsOptions::CACHE_SYMLINKS)
    }

    fn destroy(&self) {
        self.rootfs_nodes.clear();
        self.listings.clear();
        self.inner.destroy();
    }

    fn lookup(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        set_user(ctx);
        let found = self.inner.lookup(ctx, inner_id(parent), check_name(name)?);
        self.complete_entry(parent, name, found)
    }

    fn forget(&self, ctx: Context, node: u64, count: u64) {
        self.rootfs_nodes.forget(inner_id(node), count);
        self.inner.forget(ctx, inner_id(node), count);
    }

    fn batch_forget(&self, ctx: Context, mut requests: Vec<(u64, u64)>) {
        for (node, count) in &mut requests {
            *node = inner_id(*node);
            self.rootfs_nodes.forget(*node, *count);
        }
        self.inner.batch_forget(ctx, requests);
    }

    fn getattr(&self, ctx: Context, node: u64, handle: Option<u64>) -> io::Result<(Attr, Duration)> {
        let (attr, _) = self.inner.getattr(ctx, inner_id(node), handle)?;
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
        set_user(ctx);
        let _clearing = clear_set_id(valid.contains(SetattrValid::KILL_SUIDGID))?;
        valid.remove(SetattrValid::KILL_SUIDGID);
        let (attr, _) = self.inner.setattr(ctx, inner_id(node), attr, handle, valid)?;
        Ok((attr, ttl(node)))
    }

    fn readlink(&self, ctx: Context, node: u64) -> io::Result<Vec<u8>> {
        self.inner.readlink(ctx, inner_id(node))
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
            set_creator(ctx)?,
            linkname,
            inner_id(parent),
            check_name(name)?,
            without_extensions(extensions),
        );
        self.complete_entry(parent, name, created)
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
        refuse_device(mode, rdev)?;
        let created = self.inner.mknod(
            set_creator(ctx)?,
            inner_id(parent),
            check_name(name)?,
            mode,
            rdev,
            umask,
            without_extensions(extensions),
        );
        self.complete_entry(parent, name, created)
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
            set_creator(ctx)?,
            inner_id(parent),
            check_name(name)?,
            mode,
            umask,
            without_extensions(extensions),
        );
        self.complete_entry(parent, name, created)
    }

    fn unlink(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        set_user(ctx);
        self.inner.unlink(ctx, inner_id(parent), check_name(name)?)
    }

    fn rmdir(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        set_user(ctx);
        self.inner.rmdir(ctx, inner_id(parent), check_name(name)?)
    }

    fn rename(&self, ctx: Context, from: u64, old_name: &CStr, to: u64, new_name: &CStr, flags: u32) -> io::Result<()> {
        set_user(ctx);
        self.inner.rename(
            ctx,
            inner_id(from),
            check_name(old_name)?,
            inner_id(to),
            check_name(new_name)?,
            flags,
        )
    }

    fn link(&self, ctx: Context, node: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        set_user(ctx);
        let linked = self
            .inner
            .link(ctx, inner_id(node), inner_id(parent), check_name(name)?);
        self.complete_entry(parent, name, linked)
    }

    fn open(&self, ctx: Context, node: u64, kill_priv: bool, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        set_user(ctx);
        let _clearing = clear_set_id(kill_priv)?;
        let (handle, mut options) = self.inner.open(ctx, inner_id(node), false, flags)?;
        // Nothing was written that a close could report as lost.
        if flags & libc::O_ACCMODE.unsigned_abs() == libc::O_RDONLY.unsigned_abs() {
            options |= OpenOptions::NOFLUSH;
        }
        Ok((handle, options | self.cache_options(ctx, node)))
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
        let creator = set_creator(ctx)?;
        let _clearing = clear_set_id(kill_priv)?;
        let (entry, handle, options) = self.inner.create(
            creator,
            inner_id(parent),
            check_name(name)?,
            mode,
            false,
            flags,
            umask,
            without_extensions(extensions),
        )?;
        let entry = self.complete_entry(parent, name, Ok(entry))?;
        let caching = self.cache_options(ctx, entry.inode);
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
        let offset = check_offset(offset)?;
        self.inner
            .read(ctx, inner_id(node), handle, w, size, offset, lock_owner, flags)
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
        let offset = check_offset(offset)?;
        let _clearing = clear_set_id(kill_priv)?;
        self.inner.write(
            ctx,
            inner_id(node),
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
        self.inner.flush(ctx, inner_id(node), handle, lock_owner)
    }

    fn fsync(&self, ctx: Context, node: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.inner.fsync(ctx, inner_id(node), datasync, handle)
    }

    fn fallocate(&self, ctx: Context, node: u64, handle: u64, mode: u32, offset: u64, length: u64) -> io::Result<()> {
        self.inner.fallocate(ctx, inner_id(node), handle, mode, offset, length)
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
            .release(ctx, inner_id(node), flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: Context, node: u64) -> io::Result<libc::statvfs64> {
        self.inner.statfs(ctx, inner_id(node))
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
        if name == FILE_CAPABILITIES && !self.rootfs_nodes.contains(inner_id(node)) {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        set_user(ctx);
        self.inner
            .setxattr(ctx, inner_id(node), name, value, flags, extra_flags)
    }

    fn getxattr(&self, ctx: Context, node: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        set_user(ctx);
        self.inner.getxattr(ctx, inner_id(node), name, size)
    }

    fn listxattr(&self, ctx: Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        set_user(ctx);
        self.inner.listxattr(ctx, inner_id(node), size)
    }

    fn removexattr(&self, ctx: Context, node: u64, name: &CStr) -> io::Result<()> {
        set_user(ctx);
        self.inner.removexattr(ctx, inner_id(node), name)
    }

    fn opendir(&self, ctx: Context, node: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        set_user(ctx);
        let (handle, mut options) = self.inner.opendir(ctx, inner_id(node), flags)?;
        if is_owned(node) {
            options |= OpenOptions::KEEP_CACHE | OpenOptions::CACHE_DIR;
        }
        Ok((handle, options))
    }

    fn readdir(&self, ctx: Context, node: u64, handle: u64, size: u32, offset: u64) -> io::Result<Self::DirIter> {
        let size = size.min(MAX_READ_SIZE);
        let read = |offset| self.inner.readdir(ctx, inner_id(node), handle, size, offset);
        self.listings.continue_at(handle, offset, read)
    }

    fn fsyncdir(&self, ctx: Context, node: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.inner.fsyncdir(ctx, inner_id(node), datasync, handle)
    }

    fn releasedir(&self, ctx: Context, node: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.listings.remove(handle);
        self.inner.releasedir(ctx, inner_id(node), flags, handle)
    }

    fn access(&self, ctx: Context, node: u64, mask: u32) -> io::Result<()> {
        self.inner.access(ctx, inner_id(node), mask)
    }

    fn lseek(&self, ctx: Context, node: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        self.inner.lseek(ctx, inner_id(node), handle, offset, whence)
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
            inner_id(node_in),
            handle_in,
            offset_in,
            inner_id(node_out),
            handle_out,
            offset_out,
            len,
            flags,
        )
    }

    fn syncfs(&self, ctx: Context, node: u64) -> io::Result<()> {
        self.inner.syncfs(ctx, inner_id(node))
    }
}

#[cfg(test)]
mod tests;
