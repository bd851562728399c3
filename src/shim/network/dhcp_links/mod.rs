//! The links of a virtual machine that boots a user's kernel, which gets its network by DHCP. The machine has them from
//! its first boot on, and keeps them when it boots again.
//!
//! Belongs here: connecting them, and the configuration that the guest gets by DHCP ([`lease`]). Does not belong here:
//! the DHCP server, which is in the vmm's network device. [`crate::shim::vm`] calls it.

pub(super) mod lease;

use std::{
    io,
    net::Ipv4Addr,
    os::fd::{AsFd, OwnedFd},
};

use self::lease::{ResolverConfig, lease_of_link};
use super::{
    connect::{KnownLinks, TappedLink, connect_new_links},
    error::NetworkError,
    loopback::{FindTarget, ForwardListeners, Forwarding},
    namespace::run_in_namespace,
    netlink::NetlinkSocket,
};
use crate::control::LinkConfig;

/// The configuration that a guest gets by DHCP besides the addresses and routes of its links.
#[derive(Debug, Clone, Default)]
pub(crate) struct NetworkNames {
    /// The text of a `resolv.conf`.
    pub(crate) resolv_conf: String,
    pub(crate) hostname: Option<String>,
}

/// The links of a network namespace with their tap devices. Links, addresses and routes that appear later are not
/// added.
#[derive(Debug)]
pub(crate) struct DhcpLinks {
    namespace: OwnedFd,
    links: Vec<(LinkConfig, TappedLink)>,
    /// The listening sockets for the namespace's loopback interface. [`Self::forward`] takes them.
    listeners: Option<ForwardListeners>,
    forwarding: Option<Forwarding>,
}

impl DhcpLinks {
    /// Connects each Ethernet link of `namespace` that is up to a new tap device with `queues` queues. With
    /// `forwarding`, also opens listeners for its loopback interface. After a failure, nothing is left.
    pub(crate) async fn connect(
        namespace: OwnedFd,
        queues: usize,
        names: &NetworkNames,
        forwarding: bool,
    ) -> Result<Self, NetworkError> {
        let none = KnownLinks {
            links: Vec::new(),
            taps: Vec::new(),
            configured: Vec::new(),
        };
        let copy = namespace
            .try_clone()
            .map_err(NetworkError::namespace("duplicate the descriptor of"))?;
        let connected = run_in_namespace(&namespace, move || {
            let listeners = forwarding.then(|| ForwardListeners::open(copy.as_fd()));
            Ok::<_, NetworkError>((connect_new_links(&none, queues)?, listeners.transpose()))
        });
        let (connected, listeners) = connected.await??;
        // A pod is usable without forwarding.
        let listeners = listeners.unwrap_or_else(|error| {
            log::warn!(
                "cannot forward connections to ports of the pod, so port-forward does not work: cannot listen on the \
                 loopback interface of its network namespace: {error}"
            );
            None
        });
        let resolver = ResolverConfig::parse(&names.resolv_conf);
        let links = connected.new_links.into_iter().map(|tapped| {
            let link = &tapped.link;
            let config = LinkConfig {
                mac: link.mac,
                mtu: link.mtu,
                queues: u16::try_from(tapped.queues.len()).unwrap_or(u16::MAX),
                lease: lease_of_link(&connected.config, link, &resolver, names.hostname.as_deref()),
            };
            (config, tapped)
        });
        Ok(Self {
            links: links.collect(),
            namespace,
            listeners,
            forwarding: None,
        })
    }

    /// Starts to forward connections to the namespace's loopback interface, if [`Self::connect`] opened listeners for
    /// it. Needs the Tokio runtime.
    pub(crate) fn forward(&mut self, find_target: &FindTarget) {
        if let Some(listeners) = self.listeners.take() {
            let forwarding = listeners.serve(find_target);
            self.forwarding = forwarding
                .inspect_err(|error| {
                    log::warn!(
                        "cannot forward connections to ports of the pod, so port-forward does not work: cannot serve \
                         the listeners: {error}"
                    );
                })
                .ok();
        }
    }

    /// The IPv4 address of the first link that has a lease. `None` if no link has one.
    pub(crate) fn address(&self) -> Option<Ipv4Addr> {
        let leases = self.links.iter().filter_map(|(config, _)| config.lease.as_ref());
        leases.map(|lease| lease.address.address()).next()
    }

    /// The links for the next boot of the machine, with duplicates of the queues of their tap devices.
    ///
    /// # Errors
    ///
    /// The errors of dup(2).
    pub(crate) fn for_machine(&self) -> io::Result<Vec<(LinkConfig, Vec<OwnedFd>)>> {
        let duplicate = |(config, tapped): &(LinkConfig, TappedLink)| -> io::Result<_> {
            let queues = tapped.queues.iter().map(|queue| queue.as_fd().try_clone_to_owned());
            Ok((config.clone(), queues.collect::<io::Result<_>>()?))
        };
        self.links.iter().map(duplicate).collect()
    }

    /// Removes the redirects that [`Self::connect`] made in the namespace. The kernel removes the tap devices when the
    /// vmm has ended.
    pub(crate) async fn disconnect(self) {
        if self.links.is_empty() {
            return;
        }
        let redirects: Vec<_> = self.links.into_iter().map(|(_, tapped)| tapped.redirect).collect();
        let removed = run_in_namespace(&self.namespace, move || {
            let Ok(mut netlink) = NetlinkSocket::open() else { return };
            for redirect in redirects {
                // If a link is gone, its redirect is too.
                let _ = redirect.remove(&mut netlink);
            }
        });
        if let Err(error) = removed.await {
            log::warn!("cannot remove the redirects in the network namespace of a virtual machine: {error}");
        }
    }
}
