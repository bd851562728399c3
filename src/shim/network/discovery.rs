//! Reads the links and the IP configuration of a network namespace.

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::AddressMessage,
    link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage},
    neighbour::NeighbourMessage,
    route::RouteMessage,
    rule::RuleMessage,
};

use super::netlink::{NetlinkError, NetlinkSocket};

/// A link of the namespace that is passed on to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    /// The interface index in the namespace.
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: [u8; 6],
    /// In bytes.
    pub(super) mtu: u16,
}

/// The IP configuration of all links, as rtnetlink messages.
#[derive(Debug, Default)]
pub(super) struct IpConfig {
    pub(super) addresses: Vec<AddressMessage>,
    pub(super) routes: Vec<RouteMessage>,
    pub(super) rules: Vec<RuleMessage>,
    pub(super) neighbours: Vec<NeighbourMessage>,
}

/// The Ethernet links that are up and are not part of another link, such as a bridge. Ordered by index.
pub(super) fn list_links(netlink: &mut NetlinkSocket) -> Result<Vec<Link>, NetlinkError> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let messages = netlink.dump("list the links of the pod", &request)?;
    let mut links: Vec<Link> = messages
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(message) => parse_link(&message),
            _ => None,
        })
        .collect();
    links.sort_by_key(|link| link.index);
    Ok(links)
}

/// `None` for links that the guest does not get.
fn parse_link(message: &LinkMessage) -> Option<Link> {
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

/// Reads addresses, routes, rules and neighbours, of IPv4 and IPv6.
pub(super) fn read_ip_config(netlink: &mut NetlinkSocket) -> Result<IpConfig, NetlinkError> {
    let mut config = IpConfig::default();
    let address = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let neighbour = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
    let mut requests = vec![
        ("list the pod's addresses", address),
        ("list the pod's neighbours", neighbour),
    ];
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut route = RouteMessage::default();
        route.header.address_family = family;
        requests.push(("list the pod's routes", RouteNetlinkMessage::GetRoute(route)));
        let mut rule = RuleMessage::default();
        rule.header.family = family;
        requests.push(("list the pod's routing rules", RouteNetlinkMessage::GetRule(rule)));
    }
    for (action, request) in requests {
        for message in netlink.dump(action, &request)? {
            match message {
                RouteNetlinkMessage::NewAddress(message) => config.addresses.push(message),
                RouteNetlinkMessage::NewRoute(message) => config.routes.push(message),
                RouteNetlinkMessage::NewRule(message) => config.rules.push(message),
                RouteNetlinkMessage::NewNeighbour(message) => config.neighbours.push(message),
                _ => {}
            }
        }
    }
    Ok(config)
}
