//! The lease of a link, for a guest that configures its network by DHCP: a user's kernel has no agent that could
//! apply the rtnetlink messages of [`crate::shim::network::guest_config`].
//!
//! DHCP cannot express the whole configuration of a namespace. IPv6, further addresses of a link, routing tables,
//! rules, metrics, source addresses and permanent neighbours are left out.

use std::net::{IpAddr, Ipv4Addr};

use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressMessage},
    route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteType},
};

use crate::control::{DomainName, Lease, Prefix, Route};
use crate::shim::network::{
    discovery::{IpConfig, Link},
    guest_config::routing_table,
};

/// The maximum number of routes of a lease besides the default route.
const MAX_ROUTES: usize = 64;

/// The maximum number of DNS servers that a resolver uses (resolv.conf(5), `MAXNS`).
const MAX_DNS_SERVERS: usize = 3;

/// The maximum number of entries of the search list, as in Kubernetes (`MaxDNSSearchPaths`).
const MAX_SEARCH_ENTRIES: usize = 32;

/// The settings of a resolver that DHCP can pass on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::shim::network) struct ResolverConfig {
    dns: Vec<Ipv4Addr>,
    search: Vec<DomainName>,
}

impl ResolverConfig {
    /// Parses the text of a `resolv.conf` (resolv.conf(5)). Invalid lines and names, options, and IPv6 servers are
    /// left out, and so are servers on the loopback interface, which the guest cannot reach.
    pub(in crate::shim::network) fn parse(text: &str) -> Self {
        let mut config = Self::default();
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => {
                    let server = words.next().and_then(|word| word.parse::<Ipv4Addr>().ok());
                    let usable = server.filter(|server| !server.is_loopback() && !server.is_unspecified());
                    config.dns.extend(usable);
                    config.dns.truncate(MAX_DNS_SERVERS);
                }
                // The last of these lines applies.
                Some("search") => {
                    config.search = words.filter_map(DomainName::parse).take(MAX_SEARCH_ENTRIES).collect();
                }
                Some("domain") => config.search = words.take(1).filter_map(DomainName::parse).collect(),
                _ => {}
            }
        }
        config
    }
}

/// The lease for the guest's link `link`, whose namespace has the configuration `config`. `None` if the link has no
/// IPv4 address. A host name that is not a valid domain name is left out.
pub(in crate::shim::network) fn lease_of_link(
    config: &IpConfig,
    link: &Link,
    resolver: &ResolverConfig,
    hostname: Option<&str>,
) -> Option<Lease> {
    let address = config
        .addresses
        .iter()
        .filter(|address| address.header.index == link.index)
        .find_map(parse_address)?;
    let mut found: Vec<_> = config
        .routes
        .iter()
        .filter_map(|route| FoundRoute::parse(route, link.index))
        .collect();
    // Of several routes to a destination, the guest gets the one that the kernel would use. The sort is stable.
    found.sort_by_key(|found| {
        (
            found.route.destination.length(),
            found.route.destination.address(),
            found.metric,
        )
    });
    found.dedup_by_key(|found| found.route.destination);

    let default = found
        .iter()
        .find(|found| found.route.destination == Prefix::ANY && found.route.gateway.is_some());
    let gateway = default.and_then(|found| found.route.gateway);
    let mtu = default.and_then(|found| found.mtu).unwrap_or(link.mtu);
    // The DHCP server derives these routes from the address and the gateway.
    let is_derived = |route: &Route| match route.gateway {
        Some(_) => route.destination == Prefix::ANY,
        None => route.destination == address.network(),
    };
    let mut routes: Vec<_> = found
        .iter()
        .map(|found| found.route)
        .filter(|route| !is_derived(route))
        .collect();
    if routes.len() > MAX_ROUTES {
        log::warn!(
            "link {}: the guest gets {MAX_ROUTES} of its {} routes by DHCP",
            link.name,
            routes.len()
        );
        routes.truncate(MAX_ROUTES);
    }
    Some(Lease {
        address,
        gateway,
        routes,
        dns: resolver.dns.clone(),
        search: resolver.search.clone(),
        hostname: hostname.and_then(DomainName::parse),
        mtu: mtu.min(link.mtu),
    })
}

/// The IPv4 address of a link. The prefix of an address with a peer belongs to the peer, so the address has none.
fn parse_address(message: &AddressMessage) -> Option<Prefix> {
    let (mut local, mut peer) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(IpAddr::V4(address)) => local = Some(*address),
            AddressAttribute::Address(IpAddr::V4(address)) => peer = Some(*address),
            _ => {}
        }
    }
    let address = local.or(peer)?;
    match peer {
        Some(peer) if peer != address => Some(Prefix::host(address)),
        _ => Prefix::new(address, message.header.prefix_len),
    }
}

/// A route of the namespace that DHCP can express.
struct FoundRoute {
    route: Route,
    metric: u32,
    /// The MTU of the route in bytes, if it has one.
    mtu: Option<u16>,
}

impl FoundRoute {
    /// `None` for routes of other links, of IPv6 or with an IPv6 gateway, of other tables than the main one, and for
    /// those that are not unicast.
    fn parse(message: &RouteMessage, link: u32) -> Option<Self> {
        if message.header.address_family != AddressFamily::Inet
            || message.header.kind != RouteType::Unicast
            || routing_table(message) != u32::from(RouteHeader::RT_TABLE_MAIN)
        {
            return None;
        }
        let mut found = Self {
            route: Route {
                destination: Prefix::new(Ipv4Addr::UNSPECIFIED, message.header.destination_prefix_length)?,
                gateway: None,
            },
            metric: 0,
            mtu: None,
        };
        let mut interface = None;
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(RouteAddress::Inet(address)) => {
                    found.route.destination = Prefix::new(*address, found.route.destination.length())?;
                }
                RouteAttribute::Priority(metric) => found.metric = *metric,
                RouteAttribute::Metrics(metrics) => found.mtu = metrics.iter().find_map(route_mtu),
                RouteAttribute::Oif(index) => interface = Some(*index),
                RouteAttribute::MultiPath(hops) => {
                    // DHCP has one next hop per destination.
                    let hop = hops.iter().find(|hop| hop.interface_index == link)?;
                    interface = Some(link);
                    found.set_gateway(&hop.attributes)?;
                }
                _ => {}
            }
        }
        found.set_gateway(&message.attributes)?;
        (interface == Some(link)).then_some(found)
    }

    /// Sets the gateway in `attributes`, if there is one. `None` for an IPv6 gateway.
    fn set_gateway(&mut self, attributes: &[RouteAttribute]) -> Option<()> {
        for attribute in attributes {
            match attribute {
                RouteAttribute::Gateway(RouteAddress::Inet(address)) => self.route.gateway = Some(*address),
                RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => return None,
                _ => {}
            }
        }
        Some(())
    }
}

fn route_mtu(metric: &RouteMetric) -> Option<u16> {
    match metric {
        RouteMetric::Mtu(mtu) => u16::try_from(*mtu).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolver_configuration_has_the_reachable_servers_and_the_last_search_list() {
        let many_servers = "nameserver 192.0.2.1\n".repeat(1000);
        let many_names = format!("search {}", "a.example ".repeat(1000));
        // The text, the servers, and the search list.
        let cases = [
            ("", vec![], vec![]),
            (
                "search default.svc.cluster.local svc.cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n",
                vec!["10.96.0.10"],
                vec!["default.svc.cluster.local", "svc.cluster.local"],
            ),
            (
                "# nameserver 192.0.2.1\n; nameserver 192.0.2.2\nnameserver\t192.0.2.3 # first\n nameserver 192.0.2.4\r\n",
                vec!["192.0.2.3", "192.0.2.4"],
                vec![],
            ),
            (
                "nameserver 127.0.0.53\nnameserver 127.0.0.11\nnameserver 0.0.0.0\nnameserver fd00::53\nnameserver x\n\
                 nameserver\nnameserver 192.0.2.1",
                vec!["192.0.2.1"],
                vec![],
            ),
            (&many_servers, vec!["192.0.2.1"; 3], vec![]),
            (
                "search a.example b.example\ndomain c.example d.example\n",
                vec![],
                vec!["c.example"],
            ),
            (
                "domain c.example\nsearch a.example. $(reboot) . b.example\n",
                vec![],
                vec!["a.example", "b.example"],
            ),
            ("search a.example\nsearch\n", vec![], vec![]),
            (&many_names, vec![], vec!["a.example"; 32]),
            ("nameservers 192.0.2.1\n\0\u{ffff}\n", vec![], vec![]),
        ];
        for (text, dns, search) in cases {
            let config = ResolverConfig::parse(text);

            let found: Vec<_> = config.dns.iter().map(Ipv4Addr::to_string).collect();
            assert_eq!(found, dns, "{text:?}");
            let found: Vec<_> = config.search.iter().map(DomainName::as_str).collect();
            assert_eq!(found, search, "{text:?}");
        }
    }
}
