//! The entry point of the fuzz target for DHCP requests.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

use std::net::Ipv4Addr;

use super::{DhcpServer, MAX_HEADERS_SIZE, is_for_server};
use crate::control::{DomainName, Lease, Prefix, Route};

/// The sizes of the headers of an answer in bytes: Ethernet, IPv4, UDP, and DHCP with the magic cookie.
const HEADERS: usize = 14 + 20 + 8 + 236 + 4;

/// Answers the frame in `data`, whose first byte selects the lease.
///
/// # Panics
///
/// If the answer is not a DHCP message of at most 1500 bytes that ends after its options.
pub fn answer_request(data: &[u8]) {
    let Some((selection, frame)) = data.split_first() else {
        return;
    };
    let start = &frame[..frame.len().min(MAX_HEADERS_SIZE)];
    assert_eq!(is_for_server(frame), is_for_server(start));
    let Ok(Some(answer)) = DhcpServer::new(&lease(*selection)).answer(frame) else {
        return;
    };
    let frame = &answer.frame;
    assert!((HEADERS..=14 + 1500).contains(&frame.len()), "{} bytes", frame.len());
    let length = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
    assert_eq!(length, frame.len() - 14);
    let mut options = &frame[HEADERS..];
    while let [code, rest @ ..] = options
        && *code != 255
    {
        let (length, rest) = rest.split_first().unwrap();
        options = &rest[usize::from(*length)..];
    }
    let end = options.split_first().expect("no end option").1;
    assert!(end.iter().all(|padding| *padding == 0));
}

/// A lease with few or many options.
pub(in super::super) fn lease(selection: u8) -> Lease {
    let name = |text: &str| DomainName::parse(text).unwrap();
    let prefix = |number: u8, length| Prefix::new(Ipv4Addr::new(10, number, 0, 5), length).unwrap();
    let count = |bits: u8| selection >> bits & 1 | selection >> bits & 2;
    let routes = (0..count(0) * 20).map(|number| Route {
        destination: prefix(number, 16 + number % 16),
        gateway: (number % 3 > 0).then(|| Ipv4Addr::new(10, 9, number % 2, 1)),
    });
    let dns = (0..count(2) * 30).map(|number| Ipv4Addr::new(10, 96, 0, number));
    let search = (0..count(4) * 10).map(|number| name(&format!("ns-{number}.svc.cluster-{}.local", number % 3)));
    Lease {
        address: prefix(1, 8 + count(6) * 8),
        gateway: (selection & 1 << 7 != 0).then(|| Ipv4Addr::new(10, 1, 0, 1)),
        routes: routes.collect(),
        dns: dns.collect(),
        search: search.collect(),
        hostname: (selection & 1 != 0).then(|| name(&"a".repeat(63))),
        mtu: [0, 576, 1500, 65535][usize::from(count(6))],
    }
}
