//! The guest as a whole. `setup` prepares it at boot, [`reboot`] ends it. The other modules serve requests of the host:
//! clock, size, disks and the kernels on them, share, network devices, forwarded connections, shells, DNS queries, and
//! settings of the machine's own namespaces.
//!
//! Nothing here depends on containers. `main`, the event loop and its jobs call this.

pub(crate) mod clock;
pub(crate) mod disk;
pub(crate) mod disk_kernel;
pub(crate) mod forward;
pub(crate) mod names;
pub(crate) mod network;
pub(crate) mod settings;
mod setup;
pub(crate) mod share;
pub(crate) mod shell;
pub(crate) mod size;
mod slot;

pub(crate) use setup::set_up;

use rustix::system::RebootCommand;

use crate::sys;

/// Ends the machine by a reset. nutshell's machines have no other way to power off.
pub(crate) fn reboot() -> ! {
    if let Err(error) = rustix::system::reboot(RebootCommand::Restart) {
        eprintln!("nutshell-agent: cannot reset the machine, ending PID 1 instead: {error}");
    }
    // The kernel panics when PID 1 ends, and after a panic it resets the machine.
    sys::exit_now(1)
}
