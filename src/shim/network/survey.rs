//! Reads the configuration of a network namespace, and makes a tap device for each link that is new. Everything here
//! runs on a thread in that namespace.

use std::os::fd::OwnedFd;

use nutshell_protocol::NETWORK_SLOTS;

use super::{
    discovery::{self, IpConfig, Link},
    error::NetworkError,
    netlink::NetlinkSocket,
    redirect::Redirect,
    tap,
};

/// Links, by interface index, that get no tap device.
pub(super) struct KnownLinks {
    /// Links that have a tap device.
    pub(super) links: Vec<u32>,
    /// The tap devices of this shim.
    pub(super) taps: Vec<u32>,
}

/// A link with its new tap device.
#[derive(Debug)]
pub(super) struct TappedLink {
    pub(super) link: Link,
    /// The interface index of the tap device.
    pub(super) tap: u32,
    /// The queues of the tap device.
    pub(super) queues: Vec<OwnedFd>,
    /// From the link to the tap device. The kernel removes the other direction with the tap device.
    pub(super) redirect: Redirect,
}

/// The result of [`survey`].
#[derive(Default)]
pub(super) struct Survey {
    pub(super) config: IpConfig,
    pub(super) new_links: Vec<TappedLink>,
}

/// Reads the configuration of the calling thread's namespace. Makes a tap device with `queues` queues for each link
/// that is not `known`, and redirects packets between the two. A failure leaves no redirect.
pub(super) fn survey(known: &KnownLinks, queues: usize) -> Result<Survey, NetworkError> {
    let mut netlink = NetlinkSocket::open()?;
    let links = discovery::list_links(&mut netlink)?;
    if links.is_empty() {
        // The usual case for a container that belongs to no pod: only a loopback interface.
        return Ok(Survey::default());
    }
    let is_new = |link: &Link| !known.links.contains(&link.index) && !known.taps.contains(&link.index);
    let new: Vec<_> = links.into_iter().filter(is_new).collect();
    let count = known.links.len() + new.len();
    if count > NETWORK_SLOTS as usize {
        return Err(NetworkError::TooManyLinks(count));
    }
    let mut survey = Survey {
        config: discovery::read_ip_config(&mut netlink)?,
        ..Survey::default()
    };
    for link in new {
        if let Err(error) = tap_link(&mut netlink, &mut survey, link, queues) {
            for link in survey.new_links {
                // The first error is the one to report.
                let _ = link.redirect.remove(&mut netlink);
            }
            return Err(error);
        }
    }
    Ok(survey)
}

fn tap_link(netlink: &mut NetlinkSocket, survey: &mut Survey, link: Link, queues: usize) -> Result<(), NetworkError> {
    let tap = tap::create(queues).map_err(|(step, source)| NetworkError::Tap {
        link: link.name.clone(),
        step,
        source,
    })?;
    tap::bring_up(netlink, tap.index, &link)?;
    Redirect::install(netlink, tap.index, link.index)?;
    let redirect = Redirect::install(netlink, link.index, tap.index)?;
    survey.new_links.push(TappedLink {
        link,
        tap: tap.index,
        queues: tap.queues,
        redirect,
    });
    Ok(())
}
