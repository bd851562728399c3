//! The system calls of the file server's process and threads.

use crate::jail::seccomp::{
    Call, CallList, allowed,
    runtime::{EVERY_THREAD, REFUSED, START_OF_THREADS, WAIT_FOR_EVENTS_WITH_LIBC},
};

/// What a request of the guest does.
const REQUEST_CALLS: &[Call] = &[
    allowed!(
        SYS_openat,
        "open, create, look-up: by the name in a directory, or by a descriptor in /proc/self/fd"
    ),
    allowed!(SYS_openat2, "look-up"),
    allowed!(SYS_statx, "look-up, attributes"),
    allowed!(SYS_fstatfs, "statfs"),
    allowed!(SYS_readlinkat, "readlink"),
    allowed!(SYS_getdents64, "readdir"),
    allowed!(SYS_lseek, "readdir, lseek"),
    allowed!(SYS_preadv2, "read"),
    allowed!(SYS_pwritev2, "write"),
    allowed!(SYS_copy_file_range, "copy_file_range"),
    allowed!(SYS_fallocate, "fallocate"),
    allowed!(SYS_ftruncate, "truncate"),
    allowed!(SYS_fchmod, "chmod"),
    allowed!(SYS_fchmodat, "chmod"),
    allowed!(SYS_fchownat, "chown"),
    allowed!(SYS_utimensat, "utimes"),
    allowed!(SYS_mkdirat, "mkdir"),
    allowed!(SYS_mknodat, "mknod"),
    allowed!(SYS_symlinkat, "symlink"),
    allowed!(SYS_linkat, "link"),
    allowed!(SYS_unlinkat, "unlink, rmdir"),
    allowed!(SYS_renameat2, "rename"),
    allowed!(SYS_fgetxattr, "getxattr"),
    allowed!(SYS_fsetxattr, "setxattr"),
    allowed!(SYS_flistxattr, "listxattr"),
    allowed!(SYS_fremovexattr, "removexattr"),
    allowed!(SYS_getxattr, "getxattr of a file that is not regular"),
    allowed!(SYS_setxattr, "setxattr of a file that is not regular"),
    allowed!(SYS_listxattr, "listxattr of a file that is not regular"),
    allowed!(SYS_removexattr, "removexattr of a file that is not regular"),
    allowed!(SYS_fchdir, "extended attributes of a file that is not regular"),
    allowed!(SYS_fsync, "fsync"),
    allowed!(SYS_fdatasync, "fdatasync, flush"),
    allowed!(SYS_syncfs, "syncfs"),
    allowed!(SYS_dup, "flush: a close that reports errors of network file systems"),
    allowed!(SYS_fcntl[1] in [libc::F_GETFL as u32, libc::F_SETFL as u32], "O_DIRECT"),
    allowed!(SYS_flock, "flock"),
    allowed!(SYS_umask, "create"),
    allowed!(SYS_geteuid, "create"),
    allowed!(SYS_getegid, "create"),
    allowed!(SYS_setfsuid, "the owner of a new file"),
    allowed!(SYS_setfsgid, "the group of a new file"),
    allowed!(SYS_capset, "a change without CAP_FSETID"),
    allowed!(SYS_timerfd_settime, "the timer that finds requests that hang"),
];

const WORKER_CALLS: &[Call] =
    &[allowed!(SYS_unshare[0] in [libc::CLONE_FS as u32], "a working directory of this thread")];

/// A thread that serves queues.
pub(crate) const WORKER: CallList = CallList {
    thread: "queue",
    own: &[
        EVERY_THREAD,
        START_OF_THREADS,
        REQUEST_CALLS,
        WAIT_FOR_EVENTS_WITH_LIBC,
        WORKER_CALLS,
    ],
    starts: &[&SYNC],
    refused: REFUSED,
};

const SYNC_CALLS: &[Call] = &[
    allowed!(SYS_openat, "a file that the guest has looked up and not opened"),
    allowed!(SYS_fsync, "fsync"),
    allowed!(SYS_fdatasync, "fdatasync"),
    allowed!(SYS_syncfs, "syncfs"),
    allowed!(SYS_statx, "the kind of a file"),
];

/// The thread for fsync.
pub(crate) const SYNC: CallList = CallList {
    thread: "sync",
    own: &[EVERY_THREAD, SYNC_CALLS],
    starts: &[],
    refused: REFUSED,
};

const CONNECTION_CALLS: &[Call] = &[
    allowed!(SYS_accept4, "the connection of the vmm"),
    allowed!(SYS_recvmsg, "vhost-user: messages of the vmm"),
    allowed!(SYS_sendmsg, "vhost-user: answers to the vmm"),
    allowed!(SYS_dup3, "closing the files of guest memory that is mapped"),
    allowed!(SYS_eventfd2, "the end of a thread"),
    allowed!(SYS_timerfd_create, "the timer that finds requests that hang"),
    allowed!(SYS_prlimit64, "the limit of descriptors"),
];

/// The process, with the thread of the vhost-user connection.
pub(crate) const PROCESS: CallList = CallList {
    thread: "connection",
    own: &[
        EVERY_THREAD,
        START_OF_THREADS,
        WAIT_FOR_EVENTS_WITH_LIBC,
        CONNECTION_CALLS,
    ],
    starts: &[&WORKER],
    refused: REFUSED,
};
