//! How a machine ends: the first reason that any thread has is the one that counts.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use parking_lot::Mutex;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::control::EndReason;

/// Where threads report that the machine has ended.
#[derive(Debug)]
pub(crate) struct End {
    event: EventFd,
    reason: Mutex<Option<EndReason>>,
}

impl End {
    /// No end yet.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            reason: Mutex::new(None),
        })
    }

    /// Ends the machine for `reason`, if nothing has yet.
    pub(crate) fn report(&self, reason: EndReason) {
        self.reason.lock().get_or_insert(reason);
        // A counter of single increments does not overflow.
        let _ = self.event.write(1);
    }

    /// The reason, once [`Self::event`] is readable.
    pub(crate) fn reason(&self) -> Option<EndReason> {
        self.reason.lock().clone()
    }

    /// Readable once the machine has ended.
    pub(crate) fn event(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open for as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_reason_counts() {
        let end = End::new().unwrap();
        assert_eq!(end.reason(), None);
        end.report(EndReason::GuestReset);
        end.report(EndReason::KvmFailed("later".to_owned()));
        assert_eq!(end.reason(), Some(EndReason::GuestReset));
    }
}
