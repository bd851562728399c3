//! What is in a pod's network namespace.

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::AddressMessage,
    link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage},
    neighbour::NeighbourMessage,
    route::RouteMessage,
    rule::RuleMessage,
};

use super::netlink::{Netlink, NetlinkError};

/// A link that the machine gets too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    /// The number of the interface in the namespace.
    pub(super) index: u32,
    /// Its name.
    pub(super) name: String,
    /// Its hardware address.
    pub(super) mac: [u8; 6],
    /// Bytes.
    pub(super) mtu: u16,
}

/// What else is configured, in the kernel's words.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) addresses: Vec<AddressMessage>,
    pub(super) routes: Vec<RouteMessage>,
    pub(super) rules: Vec<RuleMessage>,
    pub(super) neighbours: Vec<NeighbourMessage>,
}

/// The Ethernet links that are up and no part of another link.
pub(super) fn links(netlink: &mut Netlink) -> Result<Vec<Link>, NetlinkError> {
    let question = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let answers = netlink.dump("list the links of the pod", &question)?;
    let mut links: Vec<Link> = answers
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(message) => link(&message),
            _ => None,
        })
        .collect();
    links.sort_by_key(|link| link.index);
    Ok(links)
}

fn link(message: &LinkMessage) -> Option<Link> {
    let header = &message.header;
    if header.link_layer_type != LinkLayerType::Ether || !header.flags.contains(LinkFlags::Up) {
        return None;
    }
    let (mut name, mut mac, mut mtu) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name = Some(value.clone()),
            LinkAttribute::Address(value) => mac = <[u8; 6]>::try_from(value.as_slice()).ok(),
            LinkAttribute::Mtu(value) => mtu = u16::try_from(*value).ok(),
            LinkAttribute::Controller(_) => return None,
            _ => {}
        }
    }
    Some(Link {
        index: header.index,
        name: name?,
        mac: mac.filter(|mac| *mac != [0; 6])?,
        mtu: mtu?,
    })
}

/// Addresses, routes, rules and neighbours of all links.
pub(super) fn rest(netlink: &mut Netlink) -> Result<Found, NetlinkError> {
    let mut found = Found::default();
    let address = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let neighbour = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
    let mut questions = vec![
        ("list the pod's addresses", address),
        ("list the pod's neighbours", neighbour),
    ];
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut route = RouteMessage::default();
        route.header.address_family = family;
        questions.push(("list the pod's routes", RouteNetlinkMessage::GetRoute(route)));
        let mut rule = RuleMessage::default();
        rule.header.family = family;
        questions.push(("list the pod's routing rules", RouteNetlinkMessage::GetRule(rule)));
    }
    for (what, question) in questions {
        for answer in netlink.dump(what, &question)? {
            match answer {
                RouteNetlinkMessage::NewAddress(message) => found.addresses.push(message),
                RouteNetlinkMessage::NewRoute(message) => found.routes.push(message),
                RouteNetlinkMessage::NewRule(message) => found.rules.push(message),
                RouteNetlinkMessage::NewNeighbour(message) => found.neighbours.push(message),
                _ => {}
            }
        }
    }
    Ok(found)
}
