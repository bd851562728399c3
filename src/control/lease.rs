//! The IP configuration of a link, for a guest that gets it by DHCP.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// The maximum length of a domain name as text, in bytes: 255 bytes on the wire (RFC 1035 §2.3.4).
const MAX_DOMAIN_NAME: usize = 253;

/// The maximum length of a label of a domain name, in bytes (RFC 1035 §2.3.4).
const MAX_LABEL: usize = 63;

/// The IPv4 configuration of a link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lease {
    /// The guest's address, with the length of its subnet's prefix.
    pub(crate) address: Prefix,
    /// The next hop of the default route. It may be outside of the subnet.
    pub(crate) gateway: Option<Ipv4Addr>,
    /// The other routes of the link, without that of its subnet.
    pub(crate) routes: Vec<Route>,
    /// The DNS servers, in the order of preference.
    pub(crate) dns: Vec<Ipv4Addr>,
    /// The search list of DNS. The first entry is the domain of the guest.
    pub(crate) search: Vec<DomainName>,
    pub(crate) hostname: Option<DomainName>,
    /// The maximum size of a packet without its link header, in bytes. It may be less than the link's.
    pub(crate) mtu: u16,
}

/// An IPv4 address and the length of its prefix in bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Prefix {
    address: Ipv4Addr,
    length: u8,
}

impl Prefix {
    /// All addresses.
    pub(crate) const ANY: Self = Self {
        address: Ipv4Addr::UNSPECIFIED,
        length: 0,
    };

    /// `None` if `length` exceeds 32.
    pub(crate) fn new(address: Ipv4Addr, length: u8) -> Option<Self> {
        (length <= 32).then_some(Self { address, length })
    }

    /// The prefix that contains only `address`.
    pub(crate) fn host(address: Ipv4Addr) -> Self {
        Self { address, length: 32 }
    }

    pub(crate) fn address(self) -> Ipv4Addr {
        self.address
    }

    pub(crate) fn length(self) -> u8 {
        self.length
    }

    pub(crate) fn mask(self) -> Ipv4Addr {
        let host_bits = 32_u32.saturating_sub(self.length.into());
        Ipv4Addr::from_bits(u32::MAX.checked_shl(host_bits).unwrap_or(0))
    }

    /// The prefix with all bits of the host cleared.
    pub(crate) fn network(self) -> Self {
        Self {
            address: self.address & self.mask(),
            ..self
        }
    }

    pub(crate) fn contains(self, address: Ipv4Addr) -> bool {
        address & self.mask() == self.address & self.mask()
    }
}

/// A route of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Route {
    pub(crate) destination: Prefix,
    /// The next hop. `None` means that the destination is on the link.
    pub(crate) gateway: Option<Ipv4Addr>,
}

/// A domain name or host name, as text without the final dot.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct DomainName(String);

impl DomainName {
    /// Accepts letters, digits, hyphens and underscores, which some names of services contain, in labels of valid
    /// length. `None` for other text: a client may pass the name to a shell.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let text = text.strip_suffix('.').unwrap_or(text);
        let is_label = |label: &str| {
            (1..=MAX_LABEL).contains(&label.len())
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        };
        (text.len() <= MAX_DOMAIN_NAME && text.split('.').all(is_label)).then(|| Self(text.to_owned()))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_has_a_mask_and_contains_the_addresses_that_share_it() {
        let [inside, outside] = ["10.1.2.3", "11.1.2.3"].map(|text| text.parse::<Ipv4Addr>().unwrap());
        let cases = [
            (0, "0.0.0.0", "0.0.0.0", [true, true]),
            (8, "255.0.0.0", "10.0.0.0", [true, false]),
            (31, "255.255.255.254", "10.1.2.2", [true, false]),
            (32, "255.255.255.255", "10.1.2.3", [true, false]),
        ];
        for (length, mask, network, contained) in cases {
            let prefix = Prefix::new(inside, length).unwrap();

            assert_eq!(prefix.mask().to_string(), mask);
            assert_eq!(prefix.network().address().to_string(), network);
            assert_eq!([inside, outside].map(|address| prefix.contains(address)), contained);
        }
        assert_eq!(Prefix::new(inside, 33), None);
    }

    #[test]
    fn only_names_that_dns_can_carry_are_accepted() {
        let label = "a".repeat(MAX_LABEL);
        let longest = [&label[..], &label, &label, &label[2..]].join(".");
        for (text, name) in [
            ("default.svc.cluster.local", Some("default.svc.cluster.local")),
            ("example.org.", Some("example.org")),
            ("_tcp.web-1", Some("_tcp.web-1")),
            (&label, Some(&label[..])),
            (&longest, Some(&longest[..])),
            ("", None),
            (".", None),
            ("a..b", None),
            (".a", None),
            ("a..", None),
            ("$(reboot)", None),
            ("a b", None),
            ("ä.example", None),
            (&format!("{label}a"), None),
            (&format!("{longest}a"), None),
        ] {
            assert_eq!(DomainName::parse(text).as_ref().map(DomainName::as_str), name, "{text}");
        }
    }
}
