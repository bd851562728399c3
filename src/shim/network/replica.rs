//! The guest's network in rtnetlink's words: what was found on the host, for other interface numbers.
//!
//! The guest's kernel is asked for exactly what the namespace has: prefix routes are not made from
//! addresses but copied, as is whether they are on-link, their scope and their metric. What the kernel
//! made by itself (local routes), and what comes by router advertisements, which the guest receives too,
//! is left out.

use std::collections::HashMap;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope},
    link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage},
    neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHopFlags, RouteProtocol, RouteScope},
    rule::{RuleAttribute, RuleMessage},
};
use nix::libc;

use super::{
    discovery::{Found, Link},
    netlink::serialize,
};

/// The loopback interface has this number in every namespace.
const LOOPBACK: u32 = 1;

/// A message in words and in bytes.
pub(super) type Message = (String, Vec<u8>);

/// Names the guest's interfaces `indexes` as `links` and brings them up.
pub(super) fn link_messages(links: &[Link], indexes: &[u32]) -> Vec<Message> {
    let mut messages = Vec::new();
    if links.len() > 1 {
        // The kernel has named them by itself, perhaps as another is to be called.
        for index in indexes {
            let name = LinkAttribute::IfName(format!("link{index}"));
            messages.push(link_message("rename a link".to_owned(), *index, vec![name], false));
        }
    }
    for (link, index) in links.iter().zip(indexes) {
        // Addresses of IPv6 are copied like all others.
        let quiet = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        let named = vec![
            LinkAttribute::IfName(link.name.clone()),
            LinkAttribute::AfSpecUnspec(vec![quiet]),
        ];
        messages.push(link_message(format!("name link {}", link.name), *index, named, false));
        messages.push(link_message(
            format!("bring link {} up", link.name),
            *index,
            Vec::new(),
            true,
        ));
    }
    messages
}

/// All else that the agent passes to the guest's kernel, in this order: `links` are its interfaces
/// `indexes`.
pub(super) fn messages(found: &Found, links: &[Link], indexes: &[u32]) -> Vec<Message> {
    let mut numbers: HashMap<u32, u32> = links
        .iter()
        .map(|link| link.index)
        .zip(indexes.iter().copied())
        .collect();
    let mut messages = Vec::new();
    numbers.insert(LOOPBACK, LOOPBACK);
    messages.extend(found.addresses.iter().filter_map(|message| address(message, &numbers)));
    messages.extend(
        found
            .neighbours
            .iter()
            .filter_map(|message| neighbour(message, &numbers)),
    );
    let mut routes: Vec<_> = found.routes.iter().collect();
    // Gateways must be reachable when a route by one of them is added.
    routes.sort_by_key(|route| route.attributes.iter().any(goes_by_gateway));
    messages.extend(routes.into_iter().filter_map(|message| route(message, &numbers)));
    messages.extend(found.rules.iter().filter_map(rule));
    messages
}

fn message(what: String, message: RouteNetlinkMessage, flags: u16) -> Message {
    (what, serialize(message, NLM_F_ACK | flags, 0))
}

fn link_message(what: String, index: u32, attributes: Vec<LinkAttribute>, up: bool) -> Message {
    let mut link = LinkMessage::default();
    link.header.index = index;
    if up {
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
    }
    link.attributes = attributes;
    message(what, RouteNetlinkMessage::SetLink(link), 0)
}

fn address(found: &AddressMessage, numbers: &HashMap<u32, u32>) -> Option<Message> {
    let mut address = found.clone();
    address.header.index = *numbers.get(&address.header.index)?;
    let mut permanent = address.header.flags.contains(AddressHeaderFlags::Permanent);
    let mut text = String::new();
    for attribute in &address.attributes {
        match attribute {
            AddressAttribute::Flags(flags) => permanent = flags.contains(AddressFlags::Permanent),
            AddressAttribute::Local(value) => text = value.to_string(),
            AddressAttribute::Address(value) if text.is_empty() => text = value.to_string(),
            _ => {}
        }
    }
    let own = address.header.index == LOOPBACK && address.header.scope == AddressScope::Host;
    if !permanent || own {
        return None;
    }
    address.attributes.retain(|attribute| {
        use AddressAttribute::{Address, Anycast, Broadcast, Label, Local, RoutePriority};
        matches!(
            attribute,
            Address(_) | Local(_) | Broadcast(_) | Anycast(_) | Label(_) | RoutePriority(_)
        )
    });
    // The host has found out already that nobody else has it.
    let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
    address.attributes.push(AddressAttribute::Flags(flags));
    address.header.flags = AddressHeaderFlags::empty();
    Some(message(
        format!("add address {text}/{}", address.header.prefix_len),
        RouteNetlinkMessage::NewAddress(address),
        NLM_F_CREATE,
    ))
}

fn neighbour(found: &NeighbourMessage, numbers: &HashMap<u32, u32>) -> Option<Message> {
    if found.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut neighbour = found.clone();
    neighbour.header.ifindex = *numbers.get(&neighbour.header.ifindex)?;
    neighbour.attributes.retain(|attribute| {
        matches!(
            attribute,
            NeighbourAttribute::Destination(_) | NeighbourAttribute::LinkLayerAddress(_)
        )
    });
    Some(message(
        "add a permanent neighbour".to_owned(),
        RouteNetlinkMessage::NewNeighbour(neighbour),
        NLM_F_CREATE,
    ))
}

fn goes_by_gateway(attribute: &RouteAttribute) -> bool {
    match attribute {
        RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => true,
        RouteAttribute::MultiPath(hops) => hops.iter().any(|hop| hop.attributes.iter().any(goes_by_gateway)),
        _ => false,
    }
}

/// The routing table of a route, where the header's byte is too small for its number too.
fn table(route: &RouteMessage) -> u32 {
    let whole = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    whole.unwrap_or(route.header.table.into())
}

fn route(found: &RouteMessage, numbers: &HashMap<u32, u32>) -> Option<Message> {
    if table(found) == u32::from(libc::RT_TABLE_LOCAL) || found.header.protocol == RouteProtocol::Ra {
        return None;
    }
    let mut route = found.clone();
    let mut text = "default".to_owned();
    for attribute in &mut route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => *index = *numbers.get(index)?,
            RouteAttribute::Destination(address) => text = format!("{address:?}"),
            RouteAttribute::MultiPath(hops) => {
                for hop in hops.iter_mut() {
                    hop.interface_index = *numbers.get(&hop.interface_index)?;
                    hop.flags &= RouteNextHopFlags::Onlink;
                }
            }
            _ => {}
        }
    }
    // IPv6's own of a link that is up: the guest's kernel has it too.
    let own = route.header.address_family == AddressFamily::Inet6
        && route.header.protocol == RouteProtocol::Kernel
        && route.attributes.contains(&RouteAttribute::Oif(LOOPBACK));
    if own {
        return None;
    }
    route.header.flags &= RouteFlags::Onlink;
    route.attributes.retain(|attribute| {
        use RouteAttribute::{CacheInfo, Expires, MfcStats, MulticastExpires};
        !matches!(attribute, CacheInfo(_) | Expires(_) | MfcStats(_) | MulticastExpires(_))
    });
    if route.header.scope == RouteScope::NoWhere {
        route.header.scope = RouteScope::Universe;
    }
    Some(message(
        format!("add route {text}/{}", route.header.destination_prefix_length),
        RouteNetlinkMessage::NewRoute(route),
        NLM_F_CREATE,
    ))
}

/// Rules that every namespace has are left out: those for the tables local, main and default.
fn rule(found: &RuleMessage) -> Option<Message> {
    let priority = found.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Priority(priority) => Some(*priority),
        _ => None,
    });
    let usual = [
        (None, libc::RT_TABLE_LOCAL),
        (Some(32766), RouteHeader::RT_TABLE_MAIN),
        (Some(32767), libc::RT_TABLE_DEFAULT),
    ];
    if usual.contains(&(priority, found.header.table)) {
        return None;
    }
    Some(message(
        "add a routing rule".to_owned(),
        RouteNetlinkMessage::NewRule(found.clone()),
        NLM_F_CREATE,
    ))
}
