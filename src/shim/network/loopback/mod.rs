//! Loopback addresses of the pod's network namespace on the host, which packets do not reach from the guest, and the
//! other way round.
//!
//! Belongs here: what connects the two. [`forward`] accepts connections to any port in the namespace, with [`lookup`], and
//! forwards them to the guest. [`names`] passes the guest's queries on to Docker's resolver in the namespace. Does not
//! belong here: links and their packets. [`super`] calls it.

mod forward;
mod lookup;
mod names;

pub(super) use self::{
    forward::{ForwardListeners, Forwarding},
    names::{NameRelay, has_resolver},
};
