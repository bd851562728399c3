//! The network of a pod: the guest gets the links of the pod's network namespace, with the addresses and routes that
//! CNI has configured there.
//!
//! Each Ethernet link of the namespace that is up gets a tap device beside it, and the kernel redirects packets that
//! arrive at one to the other (tc, both ways). So traffic control and filters of the host's link still see all of its
//! traffic. The guest's link has the name, MAC address and MTU of the host's link. The guest's kernel gets the
//! addresses, routes, rules and permanent neighbours of the namespace as rtnetlink messages, with the interface indexes
//! of the guest. Links, addresses and routes that appear later are passed on when they appear; those that disappear
//! stay in the guest.
//!
//! Belongs here: all work of the shim inside a network namespace. [`namespace`] enters it, [`netlink`] sends requests
//! to the kernel, [`discovery`] and [`parameters`] read the configuration, [`connect`] connects links to tap devices
//! with [`tap`] and [`redirect`], [`guest_config`] builds the messages for the guest, and [`loopback`] connects
//! loopback addresses. A virtual machine that boots a user's kernel has [`dhcp_links`], with a lease for each. Does not belong
//! here: packets, which pass between the tap device and the vmm. [`super::pod`] and [`super::vm`] call it.

mod changes;
mod connect;
mod dhcp_links;
mod discovery;
mod error;
mod guest_config;
mod loopback;
mod namespace;
mod netlink;
mod parameters;
mod redirect;
mod tap;
#[cfg(test)]
mod tests;

use std::{
    collections::HashSet,
    future::Future,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};

use nutshell_protocol::{Request, Response};
use tokio::{
    sync::{Mutex, Notify},
    task::JoinHandle,
};

use self::{
    changes::{ChangeListener, ChangeSocket},
    connect::{ConnectedLinks, KnownLinks, TappedLink, connect_new_links},
    discovery::Link,
    loopback::{ForwardListeners, Forwarding, NameRelay},
    namespace::run_in_namespace,
    netlink::{NetlinkError, NetlinkSocket},
    parameters::GuestParameters,
    redirect::Redirect,
};
pub(crate) use self::{
    dhcp_links::{DhcpLinks, NetworkNames},
    error::NetworkError,
    loopback::{FindTarget, ForwardTarget},
};
use crate::shim::machine::{AgentError, Machine};

/// How long the agent may take to probe or configure interfaces.
const AGENT_TIMEOUT: Duration = Duration::from_secs(10);

/// The network of a pod. After [`Self::connect`] it follows the namespace until [`Self::disconnect`].
#[derive(Debug)]
pub(crate) struct Network {
    state: Arc<Mutex<NetworkState>>,
    names_ended: Arc<Notify>,
    connected: OnceLock<Connected>,
}

/// The background work of a connected network.
#[derive(Debug)]
struct Connected {
    follower: Option<JoinHandle<()>>,
    _forwarding: Option<Forwarding>,
}

impl Drop for Connected {
    /// [`Network::disconnect`] does not see a follower that is started later.
    fn drop(&mut self) {
        if let Some(follower) = &self.follower {
            follower.abort();
        }
    }
}

/// The links that are connected, and the configuration that the guest has.
#[derive(Debug)]
struct NetworkState {
    /// Kept open, so that the namespace exists at least as long as this value.
    namespace: OwnedFd,
    /// How many queues each tap device has.
    queues: usize,
    /// The redirections from the host's links to their tap devices.
    redirects: Vec<Redirect>,
    /// The links that the machine has, in the order in which it got them.
    links: Vec<Link>,
    /// Links in slots of the machine whose interface index in the guest is not known yet, with their slots.
    unprobed: Vec<(Link, u32)>,
    /// The interface indexes of all tap devices, which are links of the namespace too.
    taps: Vec<u32>,
    /// The interface index in the guest of each of `links`.
    guest_indexes: Vec<u32>,
    /// The machine's next free network slot.
    free_slot: u32,
    /// How many of `links` have been named and brought up in the guest.
    configured_links: usize,
    /// The messages that the guest's kernel has received.
    sent: HashSet<Vec<u8>>,
    parameters: GuestParameters,
    /// Started when Docker's resolver was first seen in the namespace.
    names: Option<NameRelay>,
    /// Notified when another relay may be started.
    names_ended: Arc<Notify>,
}

impl Network {
    /// The network for a machine whose links have `queues` queues each. No link is connected yet.
    pub(crate) fn new(namespace: OwnedFd, queues: usize) -> Self {
        let names_ended = Arc::new(Notify::new());
        let state = NetworkState {
            namespace,
            queues,
            redirects: Vec::new(),
            links: Vec::new(),
            unprobed: Vec::new(),
            taps: Vec::new(),
            guest_indexes: Vec::new(),
            free_slot: 0,
            configured_links: 0,
            sent: HashSet::new(),
            parameters: GuestParameters::default(),
            names: None,
            names_ended: names_ended.clone(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            names_ended,
            connected: OnceLock::new(),
        }
    }

    /// Connects all links of the namespace to `machine`. The guest's network is configured when this returns. With
    /// `forwarding`, connections to the namespace's loopback interface go to the guest too.
    ///
    /// After a failure the machine keeps the links that it already has, and nothing is left of the others. A further
    /// call continues from there. Dropping the future does not interrupt the work.
    pub(crate) async fn connect(&self, machine: &Arc<Machine>, forwarding: bool) -> Result<(), NetworkError> {
        let (state, machine_copy) = (self.state.clone(), machine.clone());
        let update = tokio::spawn(async move {
            let mut state = state.lock().await;
            let opened = state.open_sockets(forwarding).await?;
            state.update(&machine_copy).await?;
            Ok::<_, NetworkError>(opened)
        });
        let (changes, listeners) = update.await.map_err(|_| NetworkError::Interrupted)??;
        // A pod is usable without forwarding, and without later changes of its network.
        let weak = Arc::downgrade(machine);
        let find_target: FindTarget = Arc::new(move || {
            let machine = weak.upgrade()?;
            let agent = machine.agent().clone();
            Some(ForwardTarget::Loopback(machine, agent))
        });
        let forwarding = listeners
            .and_then(|listeners| listeners.map(|listeners| listeners.serve(&find_target)).transpose())
            .unwrap_or_else(|error| {
                log::warn!("cannot forward connections to ports of the pod, so port-forward does not work: {error}");
                None
            });
        let follower = changes
            .listen()
            .map(|changes| {
                let (state, names_ended) = (self.state.clone(), self.names_ended.clone());
                tokio::spawn(follow_changes(changes, state, names_ended, Arc::downgrade(machine)))
            })
            .inspect_err(|error| {
                log::warn!("cannot watch the pod's network, so the guest does not get its changes: {error}");
            });
        // Cannot fail: a connected network is not connected again, so the cell is empty.
        let _ = self.connected.set(Connected {
            follower: follower.ok(),
            _forwarding: forwarding,
        });
        Ok(())
    }

    /// Removes the redirects, and stops following the namespace. The kernel removes the tap devices when the vmm ends.
    /// Port forwarding ends, and the namespace is released, when this value is dropped.
    pub(crate) async fn disconnect(&self) {
        if let Some(follower) = self.connected.get().and_then(|connected| connected.follower.as_ref()) {
            follower.abort();
        }
        self.state.lock().await.remove_redirects().await;
    }
}

/// Passes on changes in the namespace until the machine has ended. Also replaces a relay of names that has ended.
async fn follow_changes(
    mut changes: ChangeListener,
    state: Arc<Mutex<NetworkState>>,
    names_ended: Arc<Notify>,
    machine: Weak<Machine>,
) {
    loop {
        let changed = tokio::select! {
            changed = changes.next() => changed,
            () = names_ended.notified() => Ok(()),
        };
        if let Err(error) = changed {
            log::warn!("cannot watch the pod's network, so the guest does not get its changes: {error}");
            return;
        }
        let Some(machine) = machine.upgrade().filter(|machine| !machine.has_ended()) else {
            return;
        };
        if let Err(error) = state.lock().await.update(&machine).await {
            log::warn!("cannot pass a change of the pod's network on to the guest: {error}");
        }
    }
}

/// Waits for an answer of the agent for at most [`AGENT_TIMEOUT`].
async fn within_limit<T>(answer: impl Future<Output = Result<T, AgentError>>) -> Result<T, NetworkError> {
    let answer = tokio::time::timeout(AGENT_TIMEOUT, answer).await;
    Ok(answer.map_err(|_| NetworkError::NoAnswer(AGENT_TIMEOUT))??)
}

impl NetworkState {
    /// Opens the socket that reports later changes, and with `forwarding` the sockets that accept connections.
    async fn open_sockets(
        &self,
        forwarding: bool,
    ) -> Result<(ChangeSocket, io::Result<Option<ForwardListeners>>), NetworkError> {
        let namespace = self
            .namespace
            .try_clone()
            .map_err(NetworkError::namespace("duplicate the descriptor of"))?;
        let opened = run_in_namespace(&self.namespace, move || {
            let listeners = forwarding.then(|| ForwardListeners::open(namespace.as_fd()));
            Ok::<_, NetlinkError>((ChangeSocket::open()?, listeners.transpose()))
        });
        Ok(opened.await??)
    }

    /// Reads the namespace's configuration, and passes on what the guest does not have. The next call retries what
    /// failed.
    async fn update(&mut self, machine: &Machine) -> Result<(), NetworkError> {
        let plugged = self.links.iter().chain(self.unprobed.iter().map(|(link, _)| link));
        let known = KnownLinks {
            links: plugged.map(|link| link.index).collect(),
            taps: self.taps.clone(),
            configured: self.links[..self.configured_links]
                .iter()
                .map(|link| link.index)
                .collect(),
        };
        let queues = self.queues;
        let connected = run_in_namespace(&self.namespace, move || connect_new_links(&known, queues)).await;
        let ConnectedLinks {
            config,
            parameters,
            new_links,
            has_resolver,
        } = connected??;
        // If one link cannot be plugged, the links before it are still configured.
        let plugged = self.plug(machine, new_links).await;
        self.probe(machine).await?;
        let links = guest_config::link_messages(
            &self.links[self.configured_links..],
            &self.guest_indexes[self.configured_links..],
        );
        let mut messages = Vec::new();
        if !self.links.is_empty() {
            let ip_messages = guest_config::ip_messages(&config, &self.links, &self.guest_indexes);
            messages.extend(
                ip_messages
                    .into_iter()
                    .filter(|(_, message)| !self.sent.contains(message)),
            );
        }
        if !links.is_empty() || !messages.is_empty() {
            let sent: Vec<_> = messages.iter().map(|(_, message)| message.clone()).collect();
            // On a failure the next update sends them again: a route may have been read before its address.
            within_limit(machine.agent().run(Request::ConfigureNetwork {
                links,
                parameters: self.parameters.changes(&parameters),
                messages,
            }))
            .await?;
            self.sent.extend(sent);
            self.parameters.record(parameters);
        }
        self.configured_links = self.links.len();
        if has_resolver && !self.names.as_ref().is_some_and(NameRelay::is_running) {
            self.relay_names(machine).await;
        }
        plugged
    }

    /// Starts to relay the guest's DNS queries. A pod is usable without the names of Docker's networks.
    async fn relay_names(&mut self, machine: &Machine) {
        let relay = match self.namespace.try_clone() {
            Ok(namespace) => NameRelay::start(machine, namespace, self.names_ended.clone()).await,
            Err(error) => Err(NetworkError::Names(error)),
        };
        self.names = relay
            .inspect_err(|error| log::warn!("the names of Docker's networks do not resolve: {error}"))
            .ok();
    }

    /// Puts links into free slots of the machine. After a failure, nothing is left of the links without a slot.
    async fn plug(&mut self, machine: &Machine, new_links: Vec<TappedLink>) -> Result<(), NetworkError> {
        let mut new_links = new_links.into_iter();
        while let Some(TappedLink {
            link,
            tap,
            queues,
            redirect,
        }) = new_links.next()
        {
            let descriptors: Vec<_> = queues.iter().map(AsFd::as_fd).collect();
            let plugged = machine
                .plug_link(self.free_slot, link.mac, link.mtu, &descriptors)
                .await;
            // Record the device also after a failure: the vmm may still hold the tap device for a moment.
            self.taps.push(tap);
            if let Err(source) = plugged {
                let unused = new_links.map(|new| new.redirect);
                self.remove(std::iter::once(redirect).chain(unused).collect()).await;
                return Err(NetworkError::Plug {
                    link: link.name,
                    source,
                });
            }
            self.redirects.push(redirect);
            self.unprobed.push((link, self.free_slot));
            self.free_slot += 1;
        }
        Ok(())
    }

    /// Reads the interface indexes in the guest of links that were plugged.
    async fn probe(&mut self, machine: &Machine) -> Result<(), NetworkError> {
        if self.unprobed.is_empty() {
            return Ok(());
        }
        let slots = self.unprobed.iter().map(|(_, slot)| *slot).collect();
        let count = self.unprobed.len();
        let probed = machine
            .agent()
            .ask(Request::ProbeNetworkDevices { slots }, |response| match response {
                Response::InterfaceIndexes(indexes) if indexes.len() == count => Some(indexes),
                _ => None,
            });
        let indexes = within_limit(probed).await?;
        self.links.extend(self.unprobed.drain(..).map(|(link, _)| link));
        self.guest_indexes.extend(indexes);
        Ok(())
    }

    async fn remove_redirects(&mut self) {
        let redirects = std::mem::take(&mut self.redirects);
        self.remove(redirects).await;
    }

    /// Removes redirects. Failures are ignored: if a link is gone, its redirect is too.
    async fn remove(&self, redirects: Vec<Redirect>) {
        if redirects.is_empty() {
            return;
        }
        let removed = run_in_namespace(&self.namespace, move || {
            let Ok(mut netlink) = NetlinkSocket::open() else { return };
            for redirect in redirects {
                let _ = redirect.remove(&mut netlink);
            }
        });
        if let Err(error) = removed.await {
            log::warn!("cannot remove the redirects in the pod's network namespace: {error}");
        }
    }
}
