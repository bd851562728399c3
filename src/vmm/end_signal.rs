//! The end of a machine, which any thread can report. Only the first reported reason is kept.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    sync::atomic::{AtomicBool, Ordering},
};

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::control::EndReason;

#[derive(Debug)]
pub(super) struct EndSignal {
    event: EventFd,
    reason: Mutex<Option<EndReason>>,
    has_ended: AtomicBool,
}

impl EndSignal {
    /// The signal of a machine that has not ended.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            reason: Mutex::new(None),
            has_ended: AtomicBool::new(false),
        })
    }

    /// Records `reason` as the reason for the end of the machine, unless one is recorded already, and makes
    /// [`Self::event`] readable.
    pub(super) fn report(&self, reason: EndReason) {
        self.reason.lock().get_or_insert(reason);
        self.has_ended.store(true, Ordering::Release);
        // The counter cannot overflow: each report adds one.
        let _ = self.event.write(1);
    }

    /// Whether the end was reported.
    pub(super) fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Acquire)
    }

    /// The reason, if the machine has ended.
    pub(super) fn reason(&self) -> Option<EndReason> {
        self.reason.lock().clone()
    }

    /// A descriptor that is readable once the machine has ended.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open for as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_reported_reason_is_kept() {
        let end = EndSignal::new().unwrap();
        assert_eq!((end.reason(), end.has_ended()), (None, false));

        end.report(EndReason::GuestReset);
        end.report(EndReason::KvmFailed("later".to_owned()));

        assert_eq!((end.reason(), end.has_ended()), (Some(EndReason::GuestReset), true));
    }
}
