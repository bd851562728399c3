//! Encodes a lease's configuration.

use std::{collections::HashMap, net::Ipv4Addr};

use super::request::option;
use crate::control::{DomainName, Lease, Prefix, Route};

/// The minimum value of the MTU option (RFC 2132 §5.1).
const MIN_MTU: u16 = 68;

/// The largest offset that a pointer of a compressed domain name can have (RFC 1035 §4.1.4).
const MAX_POINTER: usize = 0x3fff;

/// The server's address on a link without a gateway.
const FALLBACK_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 1);

/// The part of the answers that is the same for all requests.
#[derive(Debug)]
pub(super) struct Configuration {
    /// The server identifier, and the source of answers.
    pub(super) server: Ipv4Addr,
    /// The guest's address.
    pub(super) leased: Ipv4Addr,
    /// In bytes.
    pub(super) mtu: u16,
    /// The options of the lease, the most important ones first.
    pub(super) parameters: Vec<Parameter>,
}

impl Configuration {
    pub(super) fn new(lease: &Lease) -> Self {
        Self {
            server: lease.gateway.unwrap_or(FALLBACK_ADDRESS),
            leased: lease.address.address(),
            mtu: lease.mtu,
            parameters: encode(lease),
        }
    }
}

/// An option. If an answer has no space for all of its elements, it has the first ones.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parameter {
    pub(super) code: u8,
    pub(super) elements: Vec<Vec<u8>>,
}

/// The options for `lease`. If an answer has too little space, the last ones are missing in it.
fn encode(lease: &Lease) -> Vec<Parameter> {
    let routes = classless_routes(lease);
    let mtu = (lease.mtu >= MIN_MTU).then(|| lease.mtu.to_be_bytes().to_vec());
    let text = |name: &DomainName| name.as_str().as_bytes().to_vec();
    let options = [
        (option::SUBNET_MASK, vec![octets(lease.address.mask())]),
        // An answer has the router option even if it has the option of classless routes. RFC 3442 advises against that
        // only to save space, and a client that requests classless routes may still not use them.
        (option::ROUTER, lease.gateway.map(octets).into_iter().collect()),
        (option::MTU, mtu.into_iter().collect()),
        (option::CLASSLESS_ROUTES, routes.iter().map(encode_route).collect()),
        (option::DNS_SERVERS, lease.dns.iter().copied().map(octets).collect()),
        (option::HOST_NAME, lease.hostname.iter().map(text).collect()),
        (
            option::DOMAIN_NAME,
            lease.search.first().map(text).into_iter().collect(),
        ),
        (option::SEARCH_LIST, encode_search_list(&lease.search)),
    ];
    options
        .into_iter()
        .filter(|(_, elements)| !elements.is_empty())
        .map(|(code, elements)| Parameter { code, elements })
        .collect()
}

fn octets(address: Ipv4Addr) -> Vec<u8> {
    address.octets().to_vec()
}

/// All routes of `lease`, in an order in which each gateway is reachable when a client adds the route via it. The
/// default route is among them, because a client that knows this option ignores the router option (RFC 3442).
fn classless_routes(lease: &Lease) -> Vec<Route> {
    let on_link = |address| Route {
        destination: Prefix::host(address),
        gateway: None,
    };
    let default = lease.gateway.map(|gateway| Route {
        destination: Prefix::ANY,
        gateway: Some(gateway),
    });
    let gateways = lease.routes.iter().filter_map(|route| route.gateway);
    let remote_gateways = lease
        .gateway
        .into_iter()
        .chain(gateways)
        .filter(|gateway| !lease.address.contains(*gateway));
    let (direct, indirect): (Vec<_>, Vec<_>) = lease.routes.iter().partition(|route| route.gateway.is_none());
    let mut routes: Vec<Route> = Vec::new();
    for route in remote_gateways
        .map(on_link)
        .chain(default)
        .chain(direct.into_iter().copied())
        .chain(indirect.into_iter().copied())
    {
        if !routes.contains(&route) {
            routes.push(route);
        }
    }
    routes
}

/// A destination descriptor, which has only the significant bytes of the destination, and the router, which is 0.0.0.0
/// for a destination on the link (RFC 3442).
fn encode_route(route: &Route) -> Vec<u8> {
    let destination = route.destination.network();
    let significant = usize::from(destination.length()).div_ceil(8);
    let mut bytes = vec![destination.length()];
    bytes.extend(destination.address().octets().into_iter().take(significant));
    bytes.extend(route.gateway.unwrap_or(Ipv4Addr::UNSPECIFIED).octets());
    bytes
}

/// The names, compressed by pointers to equal suffixes of earlier names (RFC 3397, RFC 1035 §4.1.4).
fn encode_search_list(names: &[DomainName]) -> Vec<Vec<u8>> {
    let mut offsets = HashMap::new();
    let mut length = 0;
    let encode_name = |name| {
        let bytes = encode_name(name, length, &mut offsets);
        length += bytes.len();
        bytes
    };
    names.iter().map(DomainName::as_str).map(encode_name).collect()
}

/// The name, which starts at `offset` of the list. `known` has the offsets of the suffixes of earlier names.
fn encode_name<'n>(name: &'n str, offset: usize, known: &mut HashMap<&'n str, usize>) -> Vec<u8> {
    const POINTER: u16 = 0xc000;
    let mut bytes = Vec::new();
    let mut suffix = name;
    while !suffix.is_empty() {
        if let Some(earlier) = known.get(suffix).and_then(|earlier| u16::try_from(*earlier).ok()) {
            bytes.extend((POINTER | earlier).to_be_bytes());
            return bytes;
        }
        if offset + bytes.len() <= MAX_POINTER {
            known.insert(suffix, offset + bytes.len());
        }
        let (label, parent) = suffix.split_once('.').unwrap_or((suffix, ""));
        // Fits: a label has at most 63 bytes.
        bytes.push(u8::try_from(label.len()).unwrap_or(u8::MAX));
        bytes.extend(label.bytes());
        suffix = parent;
    }
    bytes.push(0);
    bytes
}
