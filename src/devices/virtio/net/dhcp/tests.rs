//! Tests of the server as a client sees it. The crate dhcproto reads its answers.

pub(in super::super) mod client;
mod hostile;

use std::{collections::BTreeMap, net::Ipv4Addr};

use dhcproto::{
    Name,
    v4::{DhcpOption, Flags, HType, MessageType, OptionCode},
};

use self::client::{ClientMessage, MAC, Received, TRANSACTION};
use super::{request::option, *};
use crate::control::{DomainName, Prefix, Route};

/// Values of the option with the message type.
const DISCOVER: u8 = 1;
const REQUEST: u8 = 3;
const DECLINE: u8 = 4;
const RELEASE: u8 = 7;
const INFORM: u8 = 8;

fn address(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

fn prefix(text: &str) -> Prefix {
    let (start, length) = text.split_once('/').unwrap();
    Prefix::new(address(start), length.parse().unwrap()).unwrap()
}

fn names(text: &str) -> Vec<DomainName> {
    text.split_whitespace()
        .map(|name| DomainName::parse(name).unwrap())
        .collect()
}

fn route(destination: &str, gateway: Option<&str>) -> Route {
    Route {
        destination: prefix(destination),
        gateway: gateway.map(address),
    }
}

/// The lease of a link on a bridge.
pub(in super::super) fn bridge_lease() -> Lease {
    Lease {
        address: prefix("10.1.0.5/24"),
        gateway: Some(address("10.1.0.1")),
        routes: Vec::new(),
        dns: vec![address("10.96.0.10"), address("192.0.2.53")],
        search: names("default.svc.cluster.local svc.cluster.local cluster.local example.org"),
        hostname: DomainName::parse("web-0"),
        mtu: 1450,
    }
}

/// The lease of a link of Calico, with a gateway outside of the subnet.
pub(in super::super) fn calico_lease() -> Lease {
    Lease {
        address: prefix("10.2.3.4/32"),
        gateway: Some(address("169.254.1.1")),
        routes: vec![
            route("10.9.0.0/17", Some("10.8.0.1")),
            route("10.8.0.0/16", None),
            route("169.254.1.1/32", None),
        ],
        dns: Vec::new(),
        search: Vec::new(),
        hostname: None,
        mtu: 1500,
    }
}

/// The answer to `message`, which must be complete.
fn answer(lease: &Lease, message: &ClientMessage) -> Received {
    let answer = DhcpServer::new(lease).answer(&message.frame()).unwrap().unwrap();
    assert!(answer.incomplete_options.is_empty(), "{answer:?}");
    let server = lease
        .gateway
        .map_or("169.254.169.1".to_owned(), |gateway| gateway.to_string());
    Received::parse(&answer.frame, &server)
}

fn by_code(options: Vec<DhcpOption>) -> BTreeMap<OptionCode, DhcpOption> {
    options
        .into_iter()
        .map(|option| (OptionCode::from(&option), option))
        .collect()
}

fn classless_routes(routes: &[(&str, &str)]) -> DhcpOption {
    let routes = routes
        .iter()
        .map(|(destination, router)| (destination.parse().unwrap(), address(router)));
    DhcpOption::ClasslessStaticRoute(routes.collect())
}

#[test]
fn offer_has_the_whole_lease_of_a_link_on_a_bridge() {
    let offer = answer(&bridge_lease(), &ClientMessage::new(DISCOVER));

    let message = &offer.message;
    assert_eq!((message.xid(), message.chaddr()), (TRANSACTION, &MAC[..]));
    assert_eq!((message.htype(), message.flags()), (HType::Eth, Flags::default()));
    assert_eq!(message.yiaddr(), address("10.1.0.5"));
    let none = Ipv4Addr::UNSPECIFIED;
    assert_eq!(
        (message.ciaddr(), message.siaddr(), message.giaddr()),
        (none, none, none)
    );
    let search = [
        "default.svc.cluster.local",
        "svc.cluster.local",
        "cluster.local",
        "example.org",
    ];
    let expected = by_code(vec![
        DhcpOption::MessageType(MessageType::Offer),
        DhcpOption::ServerIdentifier(address("10.1.0.1")),
        DhcpOption::AddressLeaseTime(u32::MAX),
        DhcpOption::SubnetMask(address("255.255.255.0")),
        DhcpOption::Router(vec![address("10.1.0.1")]),
        DhcpOption::ClasslessStaticRoute(vec![("0.0.0.0/0".parse().unwrap(), address("10.1.0.1"))]),
        DhcpOption::DomainNameServer(vec![address("10.96.0.10"), address("192.0.2.53")]),
        DhcpOption::InterfaceMtu(1450),
        DhcpOption::Hostname("web-0".to_owned()),
        DhcpOption::DomainName("default.svc.cluster.local".to_owned()),
        DhcpOption::DomainSearch(
            search
                .map(|name| Name::from_ascii(format!("{name}.")).unwrap())
                .to_vec(),
        ),
    ]);
    assert_eq!(offer.options(), expected);
}

#[test]
fn gateway_outside_of_the_subnet_has_a_route_before_those_via_it() {
    let offer = answer(&calico_lease(), &ClientMessage::new(DISCOVER));

    let expected = by_code(vec![
        DhcpOption::MessageType(MessageType::Offer),
        DhcpOption::ServerIdentifier(address("169.254.1.1")),
        DhcpOption::AddressLeaseTime(u32::MAX),
        DhcpOption::SubnetMask(address("255.255.255.255")),
        DhcpOption::Router(vec![address("169.254.1.1")]),
        classless_routes(&[
            ("169.254.1.1/32", "0.0.0.0"),
            ("10.8.0.1/32", "0.0.0.0"),
            ("0.0.0.0/0", "169.254.1.1"),
            ("10.8.0.0/16", "0.0.0.0"),
            ("10.9.0.0/17", "10.8.0.1"),
        ]),
        DhcpOption::InterfaceMtu(1500),
    ]);
    assert_eq!(offer.options(), expected);
}

#[test]
fn link_without_gateway_has_no_router_and_a_server_with_a_link_local_address() {
    let lease = Lease {
        gateway: None,
        mtu: 60,
        ..calico_lease()
    };
    let lease = Lease {
        routes: Vec::new(),
        ..lease
    };

    let offer = answer(&lease, &ClientMessage::new(DISCOVER));

    let expected = by_code(vec![
        DhcpOption::MessageType(MessageType::Offer),
        DhcpOption::ServerIdentifier(address("169.254.169.1")),
        DhcpOption::AddressLeaseTime(u32::MAX),
        DhcpOption::SubnetMask(address("255.255.255.255")),
    ]);
    assert_eq!(offer.options(), expected);
}

#[test]
fn each_request_has_the_answer_of_the_protocol() {
    use MessageType::{Ack, Nak, Offer};
    const ADDRESS: u8 = option::REQUESTED_ADDRESS;
    const SERVER: u8 = option::SERVER_ID;
    let new = ClientMessage::new;
    let cases = [
        ("discover", new(DISCOVER), Ok(Some(Offer))),
        (
            "discover with another address",
            new(DISCOVER).address_option(ADDRESS, "10.1.0.9"),
            Ok(Some(Offer)),
        ),
        (
            "request after an offer",
            new(REQUEST)
                .address_option(ADDRESS, "10.1.0.5")
                .address_option(SERVER, "10.1.0.1"),
            Ok(Some(Ack)),
        ),
        (
            "request of another address after an offer",
            new(REQUEST)
                .address_option(ADDRESS, "10.1.0.6")
                .address_option(SERVER, "10.1.0.1"),
            Ok(Some(Nak)),
        ),
        (
            "request to another server",
            new(REQUEST)
                .address_option(ADDRESS, "10.1.0.5")
                .address_option(SERVER, "10.1.0.2"),
            Ok(None),
        ),
        (
            "request after a reboot",
            new(REQUEST).address_option(ADDRESS, "10.1.0.5"),
            Ok(Some(Ack)),
        ),
        (
            "request of an old address after a reboot",
            new(REQUEST).address_option(ADDRESS, "10.7.0.5"),
            Ok(Some(Nak)),
        ),
        ("renewal", new(REQUEST).client_address("10.1.0.5"), Ok(Some(Ack))),
        (
            "renewal of another address",
            new(REQUEST).client_address("10.1.0.6"),
            Ok(Some(Nak)),
        ),
        ("request without an address", new(REQUEST), Err(RequestError::NoAddress)),
        ("inform", new(INFORM).client_address("10.7.7.7"), Ok(Some(Ack))),
        (
            "release",
            new(RELEASE)
                .client_address("10.1.0.5")
                .address_option(SERVER, "10.1.0.1"),
            Ok(None),
        ),
        (
            "decline",
            new(DECLINE)
                .address_option(ADDRESS, "10.1.0.5")
                .address_option(SERVER, "10.1.0.1"),
            Err(RequestError::Declined(address("10.1.0.5"))),
        ),
        ("message of a server", new(2), Err(RequestError::MessageType(2))),
        ("unknown message", new(200), Err(RequestError::MessageType(200))),
    ];
    let server = DhcpServer::new(&bridge_lease());
    for (what, message, expected) in cases {
        let answer = server.answer(&message.frame());

        let kind = answer.map(|answer| {
            let received = Received::parse(&answer?.frame, "10.1.0.1");
            received.message.opts().msg_type()
        });
        assert_eq!(kind, expected, "{what}");
    }
}

#[test]
fn acknowledgement_has_the_lease_and_refusal_and_information_have_none() {
    let renewal = ClientMessage::new(REQUEST).client_address("10.1.0.5");
    let inform = ClientMessage::new(INFORM).client_address("10.7.7.7");
    let foreign = ClientMessage::new(REQUEST).client_address("10.7.7.7");
    let offered = answer(&bridge_lease(), &ClientMessage::new(DISCOVER)).options();
    let none = Ipv4Addr::UNSPECIFIED;

    let acknowledgement = answer(&bridge_lease(), &renewal);
    let mut expected = offered.clone();
    expected.insert(OptionCode::MessageType, DhcpOption::MessageType(MessageType::Ack));
    assert_eq!(acknowledgement.options(), expected);
    let message = acknowledgement.message;
    assert_eq!(
        (message.yiaddr(), message.ciaddr()),
        (address("10.1.0.5"), address("10.1.0.5"))
    );

    let information = answer(&bridge_lease(), &inform);
    expected.remove(&OptionCode::AddressLeaseTime);
    assert_eq!(information.options(), expected);
    let message = information.message;
    assert_eq!((message.yiaddr(), message.ciaddr()), (none, address("10.7.7.7")));

    let refusal = answer(&bridge_lease(), &foreign);
    let expected = by_code(vec![
        DhcpOption::MessageType(MessageType::Nak),
        DhcpOption::ServerIdentifier(address("10.1.0.1")),
        DhcpOption::Message("the address of this link is 10.1.0.5".to_owned()),
    ]);
    assert_eq!(refusal.options(), expected);
    assert_eq!((refusal.message.yiaddr(), refusal.message.ciaddr()), (none, none));
}

#[test]
fn answer_goes_to_an_address_at_which_the_client_receives() {
    const BROADCAST: ([u8; 6], &str) = ([0xff; 6], "255.255.255.255");
    let new = ClientMessage::new;
    let flag = |message: ClientMessage| message.field(10, &[0x80, 0]);
    let cases = [
        ("offer", new(DISCOVER), (MAC, "10.1.0.5")),
        ("offer to a client without unicast", flag(new(DISCOVER)), BROADCAST),
        (
            "offer to a client without Ethernet address",
            new(DISCOVER).field(1, &[32, 0]),
            BROADCAST,
        ),
        (
            "offer to a client with a long address",
            new(DISCOVER).field(2, &[255]),
            BROADCAST,
        ),
        (
            "renewal",
            flag(new(REQUEST).client_address("10.1.0.5")),
            (MAC, "10.1.0.5"),
        ),
        ("refusal", new(REQUEST).client_address("10.7.7.7"), BROADCAST),
        ("information", new(INFORM).client_address("10.7.7.7"), (MAC, "10.7.7.7")),
        ("information without an address", new(INFORM), BROADCAST),
    ];
    for (what, message, (mac, destination)) in cases {
        let answer = DhcpServer::new(&bridge_lease())
            .answer(&message.frame())
            .unwrap()
            .unwrap();
        let received = Received::parse(&answer.frame, "10.1.0.1");

        assert_eq!(
            (received.mac, received.destination),
            (mac, address(destination)),
            "{what}"
        );
        assert_eq!(
            received.message.flags().broadcast(),
            message.fields[10] == 0x80,
            "{what}"
        );
    }
}

#[test]
fn every_client_gets_the_same_lease_and_its_identifier_back() {
    let identifiers: [&[u8]; 3] = [&[], &[1, 2, 0, 0, 0, 0, 7], &[0xff; 255]];
    for identifier in identifiers {
        for mac in [[2, 0, 0, 0, 0, 7], [0; 6], [0xff; 6]] {
            let message = ClientMessage::new(DISCOVER)
                .field(28, &mac)
                .option(option::MAX_MESSAGE_SIZE, &1500_u16.to_be_bytes())
                .option(option::CLIENT_ID, identifier);

            let offer = answer(&bridge_lease(), &message);

            assert_eq!(
                (offer.message.yiaddr(), offer.message.chaddr()),
                (address("10.1.0.5"), &mac[..])
            );
            let returned = offer.message.opts().get(OptionCode::ClientIdentifier);
            assert_eq!(returned, Some(&DhcpOption::ClientIdentifier(identifier.to_vec())));
        }
    }
}

#[test]
fn options_are_also_read_from_the_fields_for_file_and_server_name() {
    let wanted = [option::REQUESTED_ADDRESS, 4, 10, 1, 0, 6, 255];
    let cases = [
        ("both fields are used for text", 0, Err(RequestError::NoAddress)),
        ("file", 1, Ok(MessageType::Nak)),
        ("server name", 2, Ok(MessageType::Ack)),
        (
            "the address is in both",
            3,
            Err(RequestError::Option(option::REQUESTED_ADDRESS)),
        ),
    ];
    for (what, overload, expected) in cases {
        let message = ClientMessage::new(REQUEST)
            .field(108, &wanted)
            .field(44, &[option::PAD, option::REQUESTED_ADDRESS, 4, 10, 1, 0, 5, 255])
            .option(option::OVERLOAD, &[overload]);

        let answer = DhcpServer::new(&bridge_lease()).answer(&message.frame());

        let kind = answer.map(|answer| Received::parse(&answer.unwrap().frame, "10.1.0.1").message);
        assert_eq!(
            kind.map(|message| message.opts().msg_type().unwrap()),
            expected,
            "{what}"
        );
    }
}

/// A lease whose configuration needs more space than every client must accept.
fn large_lease() -> Lease {
    let routes = (0..40).map(|number| route(&format!("10.{number}.0.0/16"), Some("10.1.0.2")));
    let search: Vec<_> = (0..32).map(|number| format!("team-{number}.example.org")).collect();
    Lease {
        address: prefix("10.1.0.5/16"),
        routes: routes.collect(),
        search: names(&search.join(" ")),
        ..bridge_lease()
    }
}

#[test]
fn answer_has_the_size_that_the_client_accepts_and_the_most_important_options() {
    const ROUTES: u8 = option::CLASSLESS_ROUTES;
    const SEARCH: u8 = option::SEARCH_LIST;
    // The client's limit, the size of the answer, the codes of incomplete options, and how many routes it has.
    let cases: [(Option<u16>, usize, &[u8], usize); 5] = [
        (
            None,
            576,
            &[
                ROUTES,
                option::DNS_SERVERS,
                option::HOST_NAME,
                option::DOMAIN_NAME,
                SEARCH,
            ],
            39,
        ),
        (
            Some(100),
            576,
            &[
                ROUTES,
                option::DNS_SERVERS,
                option::HOST_NAME,
                option::DOMAIN_NAME,
                SEARCH,
            ],
            39,
        ),
        (Some(800), 800, &[SEARCH], 41),
        (Some(1500), 1500, &[], 41),
        (Some(u16::MAX), 1500, &[], 41),
    ];
    for (limit, size, incomplete, routes) in cases {
        let mut message = ClientMessage::new(DISCOVER);
        if let Some(limit) = limit {
            message = message.option(option::MAX_MESSAGE_SIZE, &limit.to_be_bytes());
        }

        let answer = DhcpServer::new(&large_lease())
            .answer(&message.frame())
            .unwrap()
            .unwrap();

        assert!(answer.frame.len() - 14 <= size, "{limit:?}");
        assert_eq!(answer.incomplete_options, incomplete, "{limit:?}");
        let received = Received::parse(&answer.frame, "10.1.0.1");
        let Some(DhcpOption::ClasslessStaticRoute(found)) =
            received.message.opts().get(OptionCode::ClasslessStaticRoute)
        else {
            panic!("{limit:?}: {:?}", received.message);
        };
        assert_eq!(found.len(), routes, "{limit:?}");
        assert!(received.message.opts().contains(OptionCode::SubnetMask), "{limit:?}");
    }
}

#[test]
fn long_options_are_split_and_names_compressed() {
    let lease = large_lease();
    let message = ClientMessage::new(DISCOVER).option(option::MAX_MESSAGE_SIZE, &1500_u16.to_be_bytes());

    let offer = answer(&lease, &message);

    let Some(DhcpOption::DomainSearch(found)) = offer.message.opts().get(OptionCode::DomainSearch) else {
        panic!("{:?}", offer.message);
    };
    let found: Vec<_> = found.iter().map(|name| name.to_ascii()).collect();
    let expected: Vec<_> = lease.search.iter().map(|name| format!("{}.", name.as_str())).collect();
    assert_eq!(found, expected);
    let encoded: usize = Configuration::new(&lease)
        .parameters
        .last()
        .unwrap()
        .elements
        .iter()
        .map(Vec::len)
        .sum();
    assert!((256..expected.join("").len()).contains(&encoded), "{encoded}");
}
