//! Ends the process at a call that is not on its list, and says which.

use std::{cell::Cell, io, sync::OnceLock};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// The exit status after a forbidden call: the one that a shell reports for a process that SIGSYS has killed.
pub(super) const EXIT_STATUS: i32 = 128 + libc::SIGSYS;

static ROLE: OnceLock<&'static str> = OnceLock::new();

thread_local! {
    // Without a destructor, so that a signal handler can read it.
    static THREAD: Cell<&'static str> = const { Cell::new("") };
}

/// The start of `siginfo_t` for SIGSYS (`asm-generic/siginfo.h`). The libc crate has no accessor for it.
#[repr(C)]
struct SigsysInfo {
    signal: i32,
    errno: i32,
    code: i32,
    padding: i32,
    /// The address of the instruction.
    address: usize,
    number: i32,
    architecture: u32,
}

/// Installs the handler of SIGSYS.
pub(super) fn report_violations(role: &'static str) -> io::Result<()> {
    // Called once in a process.
    let _ = ROLE.set(role);
    let action = SigAction::new(
        SigHandler::SigAction(on_violation),
        SaFlags::SA_SIGINFO | SaFlags::SA_NODEFER,
        SigSet::empty(),
    );
    // SAFETY: the handler makes only calls that are safe in a signal handler: it writes to a descriptor and exits.
    unsafe { sigaction(Signal::SIGSYS, &action) }?;
    Ok(())
}

pub(super) fn set_thread_name(name: &'static str) {
    THREAD.set(name);
}

/// The name of the calling thread in messages ([`super::CallList::thread`]); empty before the thread has a list.
pub(super) fn thread_name() -> &'static str {
    THREAD.get()
}

extern "C" fn on_violation(_: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: for a handler with SA_SIGINFO, the kernel passes valid pointers, and for SIGSYS the fields of
    // `SigsysInfo`.
    let number = unsafe { (*info.cast::<SigsysInfo>()).number };
    // SAFETY: as above, and the context of a handler is a `ucontext_t` (sigaction(2)).
    let registers = unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let mut message = Message::default();
    message.text("seccomp: the forbidden system call ");
    match usize::try_from(number).ok().and_then(syscalls::Sysno::new) {
        Some(known) => message.text(known.name()),
        None => message.number(u64::from(number.unsigned_abs()), 10),
    }
    message.text(" (first four arguments");
    for register in [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX, libc::REG_R10] {
        let value = usize::try_from(register)
            .ok()
            .and_then(|index| registers.get(index))
            .copied();
        message.text(" 0x");
        message.number(value.unwrap_or_default().cast_unsigned(), 16);
    }
    message.text(") in thread \"");
    message.text(THREAD.get());
    message.text("\" of ");
    message.text(ROLE.get().copied().unwrap_or_default());
    message.text(" ends this process. It is a bug of nutshell or an attack by the guest: report it\n");
    // SAFETY: the buffer is valid for its length. A failure cannot be reported anywhere.
    let _ = unsafe { libc::write(2, message.bytes.as_ptr().cast(), message.length) };
    // SAFETY: ends the process at once.
    unsafe { libc::_exit(EXIT_STATUS) }
}

/// A text on the stack: a signal handler must not allocate memory.
struct Message {
    bytes: [u8; 512],
    length: usize,
}

impl Default for Message {
    fn default() -> Self {
        Self {
            bytes: [0; 512],
            length: 0,
        }
    }
}

impl Message {
    fn text(&mut self, text: &str) {
        for byte in text.bytes() {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = byte;
                self.length += 1;
            }
        }
    }

    fn number(&mut self, number: u64, base: u64) {
        if number >= base {
            self.number(number / base, base);
        }
        let digit = u32::try_from(number % base).unwrap_or_default();
        let mut buffer = [0; 4];
        let digit = char::from_digit(digit, 16).unwrap_or('?');
        self.text(digit.encode_utf8(&mut buffer));
    }
}
