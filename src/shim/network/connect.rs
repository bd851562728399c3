//! Reads the configuration of a network namespace, and connects each new link to a new tap device. Everything here runs
//! on a thread in that namespace.

use std::os::fd::OwnedFd;

use nutshell_protocol::NETWORK_SLOTS;

use super::{
    discovery::{self, IpConfig, Link},
    error::NetworkError,
    loopback,
    netlink::NetlinkSocket,
    parameters::{self, Parameter},
    redirect::Redirect,
    tap,
};

/// Interfaces, by index, for which no new tap device is made.
pub(super) struct KnownLinks {
    /// Links that already have one.
    pub(super) links: Vec<u32>,
    /// The tap devices that this shim has made.
    pub(super) taps: Vec<u32>,
    /// The subset of `links` that is configured in the guest.
    pub(super) configured: Vec<u32>,
}

/// A link with its new tap device.
#[derive(Debug)]
pub(super) struct TappedLink {
    pub(super) link: Link,
    /// The interface index of the tap device.
    pub(super) tap: u32,
    /// The queues of the tap device.
    pub(super) queues: Vec<OwnedFd>,
    /// The redirection from the link to the tap device. The kernel removes the other direction with the tap device.
    pub(super) redirect: Redirect,
}

/// The result of [`connect_new_links`].
#[derive(Debug, Default)]
pub(super) struct ConnectedLinks {
    pub(super) config: IpConfig,
    /// Empty if the guest has configured all links already. Later changes are not copied, because the kernel does not
    /// announce them.
    pub(super) parameters: Vec<Parameter>,
    pub(super) new_links: Vec<TappedLink>,
    /// Docker's resolver runs in the namespace.
    pub(super) has_resolver: bool,
}

/// Reads the configuration of the calling thread's namespace. Makes a tap device with `queues` queues for each link
/// that is not `known`, and redirects packets between the two. A failure leaves no redirect.
pub(super) fn connect_new_links(known: &KnownLinks, queues: usize) -> Result<ConnectedLinks, NetworkError> {
    let mut netlink = NetlinkSocket::open()?;
    let links = discovery::list_links(&mut netlink)?;
    if links.is_empty() {
        // The usual case for a single container: only a loopback interface.
        return Ok(ConnectedLinks::default());
    }
    // A second redirect of a link would take its packets from the first machine.
    let is_foreign_tap = |link: &&Link| tap::is_tap_name(&link.name) && !known.taps.contains(&link.index);
    if let Some(tap) = links.iter().find(is_foreign_tap) {
        return Err(NetworkError::Occupied { tap: tap.name.clone() });
    }
    let guest_links: Vec<_> = links
        .into_iter()
        .filter(|link| !known.taps.contains(&link.index))
        .collect();
    let is_configured = |link: &Link| known.configured.contains(&link.index);
    let parameters = match guest_links.iter().all(is_configured) {
        true => Vec::new(),
        false => parameters::read(&guest_links),
    };
    let is_new = |link: &Link| !known.links.contains(&link.index);
    let new: Vec<_> = guest_links.into_iter().filter(is_new).collect();
    let count = known.links.len() + new.len();
    if count > NETWORK_SLOTS as usize {
        return Err(NetworkError::TooManyLinks(count));
    }
    let mut connected = ConnectedLinks {
        config: discovery::read_ip_config(&mut netlink)?,
        has_resolver: loopback::has_resolver().map_err(NetworkError::Names)?,
        parameters,
        ..ConnectedLinks::default()
    };
    for link in new {
        if let Err(error) = tap_link(&mut netlink, &mut connected, link, queues) {
            for link in connected.new_links {
                // The first error is the one to report.
                let _ = link.redirect.remove(&mut netlink);
            }
            return Err(error);
        }
    }
    Ok(connected)
}

fn tap_link(
    netlink: &mut NetlinkSocket,
    connected: &mut ConnectedLinks,
    link: Link,
    queues: usize,
) -> Result<(), NetworkError> {
    let tap = tap::create(queues).map_err(|(step, source)| NetworkError::Tap {
        link: link.name.clone(),
        step,
        source,
    })?;
    tap::bring_up(netlink, tap.index, &link)?;
    Redirect::install(netlink, &link.name, tap.index, link.index)?;
    let redirect = Redirect::install(netlink, &link.name, link.index, tap.index)?;
    connected.new_links.push(TappedLink {
        link,
        tap: tap.index,
        queues: tap.queues,
        redirect,
    });
    Ok(())
}
