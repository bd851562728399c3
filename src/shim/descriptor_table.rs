//! The descriptor table of a thread. Threads share that of their process unless they leave it.

use std::io;

/// Gives the calling thread its own descriptor table, which has standard input, output and error only
/// (close_range(2), `CLOSE_RANGE_UNSHARE`).
///
/// # Errors
///
/// The errors of close_range(2). Then the thread still shares the table of the process.
///
/// # Safety
///
/// After this, a descriptor number means different files on this thread and on others. Until the thread ends, it must
/// not use or close a descriptor that was opened on another thread, and must pass none that it opens to another.
pub(super) unsafe fn leave_shared_table() -> io::Result<()> {
    const FIRST: libc::c_uint = 3;
    // SAFETY: the call takes numbers only, and closes nothing in the table of the other threads. The caller keeps this
    // thread from using a descriptor of that table.
    match unsafe { libc::close_range(FIRST, libc::c_uint::MAX, libc::CLOSE_RANGE_UNSHARE.cast_signed()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
