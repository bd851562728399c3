//! The network of a pod: what CNI has put into the pod's network namespace appears in its machine.
//!
//! Every Ethernet link of the namespace that is up gets a tap device beside it, and the kernel
//! redirects what arrives at one to the other (tc, both ways), so that whatever polices the link on
//! the host still sees all of its traffic. The guest's link has the name, MAC and MTU of the host's,
//! and the guest's kernel is told the namespace's addresses, routes, rules and permanent neighbours in
//! rtnetlink's own messages, with the guest's interface numbers in place of the host's.
//!
//! Lives here: all that the shim does inside a network namespace. May not live here: packets (those
//! pass from the tap to the vmm). [`namespace`] enters, [`netlink`] asks the kernel, [`discovery`] says
//! what is there, [`tap`] and [`redirect`] make the host's side, [`replica`] words the guest's. Called
//! by [`super::pod`] when a pod starts.

mod discovery;
mod namespace;
mod netlink;
mod redirect;
mod replica;
mod tap;
#[cfg(test)]
mod tests;

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use nutshell_protocol::{LINK_SLOTS, Request, Response};

use self::{
    discovery::Found,
    netlink::{Netlink, NetlinkError},
    redirect::Redirect,
};
use super::machine::{AgentError, Machine};
use crate::vmm::control::ControlError;

/// Why a pod has no network.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    /// The namespace cannot be worked in.
    #[error("work in the pod's network namespace: {0}")]
    Namespace(#[source] io::Error),
    /// The kernel does not say what is there, or refuses a change.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// No tap device.
    #[error("make a tap device for {link}: {step}: {source}")]
    Tap {
        /// The link that it is for.
        link: String,
        /// What failed.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// More links than a machine can have.
    #[error("the pod's network namespace has {0} links that are up, and a virtual machine can have {LINK_SLOTS}")]
    TooMany(usize),
    /// The vmm cannot be told.
    #[error("give {link} to the virtual machine: {source}")]
    Control {
        /// The link.
        link: String,
        /// Why.
        source: ControlError,
    },
    /// The machine cannot have the link.
    #[error("give {link} to the virtual machine: {reason}")]
    Plug {
        /// The link.
        link: String,
        /// Why.
        reason: String,
    },
    /// The guest cannot be told.
    #[error("set the guest's network up: {0}")]
    Guest(#[from] AgentError),
}

/// What is connected; taken back by [`Self::disconnect`].
#[derive(Debug)]
pub(crate) struct Network {
    /// Speaks with the namespace from outside of it, and keeps it alive.
    netlink: Netlink,
    redirects: Vec<Redirect>,
}

/// A link with its tap device.
#[derive(Debug)]
struct Wired {
    link: discovery::Link,
    queues: Vec<OwnedFd>,
}

impl Network {
    /// Connects all links of `namespace` with `machine`, by `queues` queues each. The machine may be
    /// booting still; when this returns, the guest has its network. `None` if there is no link.
    pub(crate) async fn connect(
        machine: &Machine,
        namespace: OwnedFd,
        queues: usize,
    ) -> Result<Option<Self>, NetworkError> {
        let wired = namespace::within(namespace, move || wire(queues)).await;
        let Some((mut network, found, links)) = wired.map_err(NetworkError::Namespace)?? else {
            return Ok(None);
        };
        match plug(machine, &found, links).await {
            Ok(()) => Ok(Some(network)),
            Err(error) => {
                network.disconnect();
                Err(error)
            }
        }
    }

    /// Takes the redirections back and lets the namespace go. The tap devices went with the vmm.
    pub(crate) fn disconnect(&mut self) {
        for redirect in self.redirects.drain(..) {
            // The link may be gone, and everything with it.
            let _ = redirect.remove(&mut self.netlink);
        }
    }
}

/// Makes the host's side; to be called in the namespace.
fn wire(queues: usize) -> Result<Option<(Network, Found, Vec<Wired>)>, NetworkError> {
    let mut network = Network {
        netlink: Netlink::open()?,
        redirects: Vec::new(),
    };
    let links = discovery::links(&mut network.netlink)?;
    if links.is_empty() {
        return Ok(None);
    }
    if links.len() > LINK_SLOTS as usize {
        return Err(NetworkError::TooMany(links.len()));
    }
    let found = discovery::rest(&mut network.netlink)?;
    let mut wired = Vec::new();
    for link in links {
        match wire_link(&mut network, link, queues) {
            Ok(link) => wired.push(link),
            Err(error) => {
                network.disconnect();
                return Err(error);
            }
        }
    }
    Ok(Some((network, found, wired)))
}

fn wire_link(network: &mut Network, link: discovery::Link, queues: usize) -> Result<Wired, NetworkError> {
    let failed = |step| {
        let link = link.name.clone();
        move |source| NetworkError::Tap { link, step, source }
    };
    let tap = tap::make(queues).map_err(|(step, source)| failed(step)(source))?;
    tap::set_up(&mut network.netlink, tap.index, &link)?;
    for (from, to) in [(link.index, tap.index), (tap.index, link.index)] {
        let redirect = Redirect::make(&mut network.netlink, from, to)?;
        // The tap's goes with the tap.
        if from == link.index {
            network.redirects.push(redirect);
        }
    }
    Ok(Wired {
        link,
        queues: tap.queues,
    })
}

/// Makes the guest's side.
async fn plug(machine: &Machine, found: &Found, wired: Vec<Wired>) -> Result<(), NetworkError> {
    let mut links = Vec::new();
    for (slot, Wired { link, queues }) in (0..).zip(wired) {
        let descriptors: Vec<_> = queues.iter().map(AsFd::as_fd).collect();
        let plugged = machine.plug_link(slot, link.mac, link.mtu, &descriptors).await;
        let name = || link.name.clone();
        plugged
            .map_err(|source| NetworkError::Control { link: name(), source })?
            .map_err(|reason| NetworkError::Plug { link: name(), reason })?;
        links.push(link);
    }
    let request = Request::PlugLinks {
        slots: (0..).take(links.len()).collect(),
    };
    let Response::Links(indexes) = machine.agent().request(request).await? else {
        return Err(AgentError::Unexpected.into());
    };
    let messages = replica::messages(found, &links, &indexes);
    Ok(machine.agent().run(Request::ConfigureNetwork { messages }).await?)
}
