//! The network of a pod: what CNI has put into the pod's network namespace appears in its machine.
//!
//! Every Ethernet link of the namespace that is up gets a tap device beside it, and the kernel
//! redirects what arrives at one to the other (tc, both ways), so that whatever polices the link on
//! the host still sees all of its traffic. The guest's link has the name, MAC and MTU of the host's,
//! and the guest's kernel is told the namespace's addresses, routes, rules and permanent neighbours in
//! rtnetlink's own messages, with the guest's interface numbers in place of the host's. Links, addresses
//! and routes that appear later are passed on when they appear; what disappears stays in the guest.
//!
//! Lives here: all that the shim does inside a network namespace. May not live here: packets (those
//! pass from the tap to the vmm). [`namespace`] enters, [`netlink`] asks the kernel, [`discovery`] says
//! what is there, [`tap`] and [`redirect`] make the host's side, [`replica`] words the guest's. Called
//! by [`super::pod`] when a pod starts.

mod changes;
mod discovery;
mod forward;
mod lookup;
mod namespace;
mod netlink;
mod redirect;
mod replica;
mod tap;
#[cfg(test)]
mod tests;

use std::{
    collections::HashSet,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Weak},
};

use nutshell_protocol::{NETWORK_SLOTS, Request, Response};
use tokio::{sync::Mutex, task::JoinHandle};

use self::{
    changes::Changes,
    discovery::{Found, Link},
    forward::{Forwarding, Listeners},
    netlink::{Netlink, NetlinkError},
    redirect::Redirect,
};
use super::machine::{AgentError, Machine, VmmError};

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
    #[error("the pod's network namespace has {0} links that are up, and a virtual machine can have {NETWORK_SLOTS}")]
    TooMany(usize),
    /// The vmm cannot plug the link's device.
    #[error("give {link} to the virtual machine: {source}")]
    Plug { link: String, source: VmmError },
    /// The guest cannot be told.
    #[error("set the guest's network up: {0}")]
    Guest(#[from] AgentError),
}

/// A pod's network. It goes on by itself until [`Self::disconnect`].
#[derive(Debug)]
pub(crate) struct Network {
    wiring: Arc<Mutex<Wiring>>,
    follower: Option<JoinHandle<()>>,
    _forwarding: Option<Forwarding>,
}

/// What is connected.
#[derive(Debug)]
struct Wiring {
    /// Keeps it alive.
    namespace: OwnedFd,
    queues: usize,
    redirects: Vec<Redirect>,
    links: Vec<Link>,
    /// The numbers of their tap devices, which are links of the namespace too.
    taps: Vec<u32>,
    /// Their numbers in the guest.
    indexes: Vec<u32>,
    /// The next slot of the machine.
    free_slot: u32,
    /// How many of the links have their names in the guest.
    named: usize,
    /// What the guest was told of them, of addresses, routes and the like.
    told: HashSet<Vec<u8>>,
}

/// What a look into the namespace found.
struct Survey {
    found: Found,
    wired: Vec<Wired>,
    redirects: Vec<Redirect>,
}

/// Links, by their numbers in the namespace, that need no tap device.
struct Known {
    /// These have one.
    links: Vec<u32>,
    /// These are such.
    taps: Vec<u32>,
}

/// A link with its tap device.
#[derive(Debug)]
struct Wired {
    link: Link,
    /// The number of the tap device.
    tap: u32,
    queues: Vec<OwnedFd>,
}

impl Network {
    /// Connects all links of `namespace` with `machine`, by `queues` queues each; when this returns, the
    /// guest has its network. `forwarding`: so do connections to the namespace's loopback interface.
    pub(crate) async fn connect(
        machine: &Arc<Machine>,
        namespace: OwnedFd,
        queues: usize,
        forwarding: bool,
    ) -> Result<Self, NetworkError> {
        let inside = namespace.try_clone().map_err(NetworkError::Namespace)?;
        let opened = namespace::within(&namespace, move || {
            let listeners = forwarding.then(|| Listeners::open(inside.as_fd()));
            Ok::<_, NetlinkError>((Changes::watch()?, listeners.transpose()))
        });
        let (changes, listeners) = opened.await.map_err(NetworkError::Namespace)??;
        let mut wiring = Wiring {
            namespace,
            queues,
            redirects: Vec::new(),
            links: Vec::new(),
            taps: Vec::new(),
            indexes: Vec::new(),
            free_slot: 0,
            named: 0,
            told: HashSet::new(),
        };
        if let Err(error) = wiring.update(machine).await {
            wiring.take_down().await;
            return Err(error);
        }
        // Without either the pod is a pod still.
        let forwarding = listeners
            .and_then(|listeners| listeners.map(|listeners| listeners.serve(machine)).transpose())
            .unwrap_or_else(|error| {
                log::warn!("connections to ports of the pod cannot be forwarded: {error}");
                None
            });
        let wiring = Arc::new(Mutex::new(wiring));
        let follower = changes
            .listen()
            .map(|changes| tokio::spawn(follow(changes, wiring.clone(), Arc::downgrade(machine))))
            .inspect_err(|error| log::warn!("watch the pod's network: {error}"));
        Ok(Self {
            wiring,
            follower: follower.ok(),
            _forwarding: forwarding,
        })
    }

    /// Takes the redirections back and lets the namespace go. The tap devices go with the vmm.
    pub(crate) async fn disconnect(self) {
        if let Some(follower) = &self.follower {
            follower.abort();
        }
        self.wiring.lock().await.take_down().await;
    }
}

/// Passes on what changes in the namespace.
async fn follow(mut changes: changes::Listener, wiring: Arc<Mutex<Wiring>>, machine: Weak<Machine>) {
    loop {
        if let Err(error) = changes.next().await {
            log::warn!("watch the pod's network: {error}");
            return;
        }
        let Some(machine) = machine.upgrade() else { return };
        if let Err(error) = wiring.lock().await.update(&machine).await {
            log::warn!("the pod's network has changed: {error}");
        }
    }
}

impl Wiring {
    /// Looks what is there, and passes on what is new.
    async fn update(&mut self, machine: &Machine) -> Result<(), NetworkError> {
        let known = Known {
            links: self.links.iter().map(|link| link.index).collect(),
            taps: self.taps.clone(),
        };
        let queues = self.queues;
        let survey = namespace::within(&self.namespace, move || survey(&known, queues)).await;
        let Survey {
            found,
            wired,
            redirects,
        } = survey.map_err(NetworkError::Namespace)??;
        self.redirects.extend(redirects);
        self.taps.extend(wired.iter().map(|wired| wired.tap));
        let mut messages = Vec::new();
        let plugged = self.plug(machine, wired).await;
        let named = self.links.len();
        messages.extend(replica::link_messages(
            &self.links[self.named..],
            &self.indexes[self.named..],
        ));
        if named > 0 {
            let rest = replica::messages(&found, &self.links, &self.indexes);
            messages.extend(rest.into_iter().filter(|(_, message)| !self.told.contains(message)));
        }
        if !messages.is_empty() {
            let told: Vec<_> = messages.iter().map(|(_, message)| message.clone()).collect();
            // What the guest refuses may fit with the next look: a route whose address came too late.
            machine.agent().run(Request::ConfigureNetwork { messages }).await?;
            self.told.extend(told);
        }
        self.named = named;
        plugged
    }

    /// Puts links into free slots of the machine and learns their numbers in the guest.
    async fn plug(&mut self, machine: &Machine, wired: Vec<Wired>) -> Result<(), NetworkError> {
        let mut outcome = Ok(());
        let (mut links, mut slots) = (Vec::new(), Vec::new());
        for Wired { link, queues, .. } in wired {
            let descriptors: Vec<_> = queues.iter().map(AsFd::as_fd).collect();
            let plugged = machine
                .plug_link(self.free_slot, link.mac, link.mtu, &descriptors)
                .await;
            outcome = plugged.map_err(|source| NetworkError::Plug {
                link: link.name.clone(),
                source,
            });
            if outcome.is_err() {
                break;
            }
            links.push(link);
            slots.push(self.free_slot);
            self.free_slot += 1;
        }
        if !slots.is_empty() {
            match machine.agent().request(Request::ProbeNetworkDevices { slots }).await? {
                Response::InterfaceIndexes(indexes) if indexes.len() == links.len() => {
                    self.links.extend(links);
                    self.indexes.extend(indexes);
                }
                _ => return Err(AgentError::Unexpected.into()),
            }
        }
        outcome
    }

    /// Removes the redirections. A link may be gone, and everything with it.
    async fn take_down(&mut self) {
        let redirects = std::mem::take(&mut self.redirects);
        if redirects.is_empty() {
            return;
        }
        let removed = namespace::within(&self.namespace, move || {
            let Ok(mut netlink) = Netlink::open() else { return };
            for redirect in redirects {
                let _ = redirect.remove(&mut netlink);
            }
        });
        if let Err(error) = removed.await {
            log::warn!("enter the pod's network namespace: {error}");
        }
    }
}

/// Looks what is in the namespace, and gives each link that is not `known` a tap device. To be called in
/// it.
fn survey(known: &Known, queues: usize) -> Result<Survey, NetworkError> {
    let mut netlink = Netlink::open()?;
    let links = discovery::links(&mut netlink)?;
    if links.is_empty() {
        // Most containers that stand alone.
        return Ok(Survey {
            found: Found::default(),
            wired: Vec::new(),
            redirects: Vec::new(),
        });
    }
    let new = |link: &Link| !known.links.contains(&link.index) && !known.taps.contains(&link.index);
    let new: Vec<_> = links.into_iter().filter(new).collect();
    let count = known.links.len() + new.len();
    if count > NETWORK_SLOTS as usize {
        return Err(NetworkError::TooMany(count));
    }
    let mut survey = Survey {
        found: discovery::rest(&mut netlink)?,
        wired: Vec::new(),
        redirects: Vec::new(),
    };
    for link in new {
        if let Err(error) = wire(&mut netlink, &mut survey, link, queues) {
            for redirect in survey.redirects {
                // The first error counts.
                let _ = redirect.remove(&mut netlink);
            }
            return Err(error);
        }
    }
    Ok(survey)
}

fn wire(netlink: &mut Netlink, survey: &mut Survey, link: Link, queues: usize) -> Result<(), NetworkError> {
    let tap = tap::make(queues).map_err(|(step, source)| NetworkError::Tap {
        link: link.name.clone(),
        step,
        source,
    })?;
    tap::set_up(netlink, tap.index, &link)?;
    // It goes with the tap.
    Redirect::make(netlink, tap.index, link.index)?;
    survey.redirects.push(Redirect::make(netlink, link.index, tap.index)?);
    survey.wired.push(Wired {
        link,
        tap: tap.index,
        queues: tap.queues,
    });
    Ok(())
}
