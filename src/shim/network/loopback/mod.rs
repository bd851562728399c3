//! Relays connections and DNS queries between the loopback addresses of the pod's network namespace on the host and
//! those of the guest. Links pass no packets for loopback addresses.
//!
//! Belongs here: [`forward`], which accepts connections to any port in the namespace, with [`lookup`], and forwards
//! them to the guest, and [`names`], which passes the guest's queries on to Docker's resolver in the namespace. Does
//! not belong here: links and their packets. [`super`] calls it.

mod forward;
mod lookup;
mod names;

pub(crate) use self::forward::{FindTarget, ForwardTarget};
pub(super) use self::{
    forward::{ForwardListeners, Forwarding},
    names::{NameRelay, has_resolver},
};
