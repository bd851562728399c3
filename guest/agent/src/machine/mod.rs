//! The guest as a whole, which PID 1 looks after: `setup` prepares it at boot, [`reboot`] resets it. The rest is
//! for requests of the host: its clock, size, disks, share and network, and the settings of the namespaces that
//! all of a pod's containers share.
//!
//! Nothing here knows of containers. The event loop and its jobs call this.

pub(crate) mod clock;
pub(crate) mod disk;
pub(crate) mod forward;
pub(crate) mod network;
pub(crate) mod settings;
mod setup;
pub(crate) mod share;
pub(crate) mod size;
mod slot;

pub(crate) use setup::set_up;

use rustix::system::RebootCommand;

use crate::sys;

/// Ends the machine: by a reset, which the machine has no other end than.
pub(crate) fn reboot() -> ! {
    let error = rustix::system::reboot(RebootCommand::Restart);
    eprintln!("nutshell-agent: reboot: {error:?}");
    // The kernel panics at the end of PID 1, and resets after a panic.
    sys::exit_now(1)
}
