//! Builds the rtnetlink requests that give the guest's kernel the configuration of the namespace, with the interface
//! indexes of the guest.
//!
//! The guest gets exactly the routes of the namespace: prefix routes are copied and not derived from addresses, and
//! routes keep their on-link flag, scope and metric. Left out are local routes, which the kernel makes itself, and
//! routes of router advertisements, which the guest receives too.

use std::collections::HashMap;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope},
    link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHopFlags, RouteProtocol,
        RouteScope,
    },
    rule::{RuleAttribute, RuleMessage},
};
use nix::libc;

use super::{
    discovery::{IpConfig, Link},
    netlink::serialize_request,
};

/// The index of the loopback interface, in every network namespace.
const LOOPBACK_INDEX: u32 = 1;

/// A request with its purpose, as [`Request::ConfigureNetwork`](nutshell_protocol::Request) takes it.
pub(super) type DescribedMessage = (String, Vec<u8>);

/// Requests that name the guest's interfaces `indexes` as `links`, and bring them up.
pub(super) fn link_messages(links: &[Link], indexes: &[u32]) -> Vec<DescribedMessage> {
    let mut messages = Vec::new();
    if links.len() > 1 {
        // Temporary names first: the kernel may have given one interface the name that another is to get.
        for index in indexes {
            let name = LinkAttribute::IfName(format!("link{index}"));
            let action = format!("rename interface {index} of the guest");
            messages.push(link_message(action, *index, vec![name], false));
        }
    }
    for (link, index) in links.iter().zip(indexes) {
        // The guest's kernel must not generate IPv6 addresses: those of the namespace are copied.
        let no_address = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        let named = vec![
            LinkAttribute::IfName(link.name.clone()),
            LinkAttribute::AfSpecUnspec(vec![no_address]),
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

/// Requests for addresses, neighbours, routes and rules, in the order in which the kernel accepts them. `indexes` are
/// the guest's interfaces for `links`. Objects of other interfaces are left out.
pub(super) fn ip_messages(config: &IpConfig, links: &[Link], indexes: &[u32]) -> Vec<DescribedMessage> {
    let mut guest_indexes: HashMap<u32, u32> = links
        .iter()
        .map(|link| link.index)
        .zip(indexes.iter().copied())
        .collect();
    guest_indexes.insert(LOOPBACK_INDEX, LOOPBACK_INDEX);
    let mut routes: Vec<_> = config.routes.iter().collect();
    // A gateway must be reachable when a route via it is added.
    routes.sort_by_key(|route| route.attributes.iter().any(has_gateway));
    let addresses = config.addresses.iter();
    let neighbours = config.neighbours.iter();
    let routes = routes.into_iter();
    addresses
        .filter_map(|address| address_message(address, &guest_indexes))
        .chain(neighbours.filter_map(|neighbour| neighbour_message(neighbour, &guest_indexes)))
        .chain(routes.filter_map(|route| route_message(route, &guest_indexes)))
        .chain(config.rules.iter().filter_map(rule_message))
        .collect()
}

fn describe(purpose: String, message: RouteNetlinkMessage, flags: u16) -> DescribedMessage {
    (purpose, serialize_request(message, NLM_F_ACK | flags, 0))
}

fn link_message(purpose: String, index: u32, attributes: Vec<LinkAttribute>, up: bool) -> DescribedMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    if up {
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
    }
    link.attributes = attributes;
    describe(purpose, RouteNetlinkMessage::SetLink(link), 0)
}

fn address_message(found: &AddressMessage, indexes: &HashMap<u32, u32>) -> Option<DescribedMessage> {
    let mut address = found.clone();
    address.header.index = *indexes.get(&address.header.index)?;
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
    // 127.0.0.1 and ::1, which the guest has already.
    let is_loopback = address.header.index == LOOPBACK_INDEX && address.header.scope == AddressScope::Host;
    if !permanent || is_loopback {
        return None;
    }
    address.attributes.retain(|attribute| {
        use AddressAttribute::{Address, Anycast, Broadcast, Label, Local, RoutePriority};
        matches!(
            attribute,
            Address(_) | Local(_) | Broadcast(_) | Anycast(_) | Label(_) | RoutePriority(_)
        )
    });
    // No duplicate address detection: the host has done it.
    let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
    address.attributes.push(AddressAttribute::Flags(flags));
    address.header.flags = AddressHeaderFlags::empty();
    Some(describe(
        format!("add address {text}/{}", address.header.prefix_len),
        RouteNetlinkMessage::NewAddress(address),
        NLM_F_CREATE,
    ))
}

/// Only permanent neighbours; the others are learned.
fn neighbour_message(found: &NeighbourMessage, indexes: &HashMap<u32, u32>) -> Option<DescribedMessage> {
    if found.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut neighbour = found.clone();
    neighbour.header.ifindex = *indexes.get(&neighbour.header.ifindex)?;
    neighbour.attributes.retain(|attribute| {
        matches!(
            attribute,
            NeighbourAttribute::Destination(_) | NeighbourAttribute::LinkLayerAddress(_)
        )
    });
    let address = neighbour.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(address) => Some(neighbour_text(address)),
        _ => None,
    });
    Some(describe(
        format!("add the permanent neighbour {}", address.unwrap_or_default()),
        RouteNetlinkMessage::NewNeighbour(neighbour),
        NLM_F_CREATE,
    ))
}

fn has_gateway(attribute: &RouteAttribute) -> bool {
    match attribute {
        RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => true,
        RouteAttribute::MultiPath(hops) => hops.iter().any(|hop| hop.attributes.iter().any(has_gateway)),
        _ => false,
    }
}

/// The routing table of a route. Numbers above 255 do not fit into the header and are in an attribute.
pub(super) fn routing_table(route: &RouteMessage) -> u32 {
    let attribute = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    attribute.unwrap_or(route.header.table.into())
}

fn route_message(found: &RouteMessage, indexes: &HashMap<u32, u32>) -> Option<DescribedMessage> {
    if routing_table(found) == u32::from(libc::RT_TABLE_LOCAL) || found.header.protocol == RouteProtocol::Ra {
        return None;
    }
    let mut route = found.clone();
    let mut text = "default".to_owned();
    for attribute in &mut route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => *index = *indexes.get(index)?,
            RouteAttribute::Destination(address) => text = address_text(address),
            RouteAttribute::MultiPath(hops) => {
                for hop in hops.iter_mut() {
                    hop.interface_index = *indexes.get(&hop.interface_index)?;
                    hop.flags &= RouteNextHopFlags::Onlink;
                }
            }
            _ => {}
        }
    }
    // The IPv6 route of the loopback interface, which the guest's kernel makes itself.
    let is_loopback = route.header.address_family == AddressFamily::Inet6
        && route.header.protocol == RouteProtocol::Kernel
        && route.attributes.contains(&RouteAttribute::Oif(LOOPBACK_INDEX));
    if is_loopback {
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
    Some(describe(
        format!("add route {text}/{}", route.header.destination_prefix_length),
        RouteNetlinkMessage::NewRoute(route),
        NLM_F_CREATE,
    ))
}

/// The address in error texts.
fn neighbour_text(address: &NeighbourAddress) -> String {
    match address {
        NeighbourAddress::Inet(address) => address.to_string(),
        NeighbourAddress::Inet6(address) => address.to_string(),
        other => format!("{other:?}"),
    }
}

/// The address in error texts.
fn address_text(address: &RouteAddress) -> String {
    match address {
        RouteAddress::Inet(address) => address.to_string(),
        RouteAddress::Inet6(address) => address.to_string(),
        other => format!("{other:?}"),
    }
}

/// The rules that every namespace has, for the tables local, main and default, are left out.
fn rule_message(found: &RuleMessage) -> Option<DescribedMessage> {
    let priority = found.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Priority(priority) => Some(*priority),
        _ => None,
    });
    let default_rules = [
        (None, libc::RT_TABLE_LOCAL),
        (Some(32766), RouteHeader::RT_TABLE_MAIN),
        (Some(32767), libc::RT_TABLE_DEFAULT),
    ];
    if default_rules.contains(&(priority, found.header.table)) {
        return None;
    }
    Some(describe(
        format!("add the routing rule with priority {}", priority.unwrap_or_default()),
        RouteNetlinkMessage::NewRule(found.clone()),
        NLM_F_CREATE,
    ))
}
