//! Tests with frames that are not requests, malformed requests, and random bytes.

use super::{
    client::{discover_frame, udp_frame},
    *,
};

#[test]
fn only_whole_udp_datagrams_to_the_servers_port_are_for_the_server() {
    let valid = discover_frame();
    let edit = |offset: usize, bytes: &[u8]| {
        let mut frame = valid.clone();
        frame[offset..offset + bytes.len()].copy_from_slice(bytes);
        frame
    };
    let mut with_ip_options = edit(14, &[0x4f]);
    with_ip_options.splice(34..34, [1; 40]);
    let mut with_vlan_tag = valid.clone();
    with_vlan_tag.splice(12..12, [0x81, 0, 0, 5]);
    let cases = [
        ("request", valid.clone(), true),
        ("request with IP options", with_ip_options, true),
        ("request with a wrong length", edit(16, &[0, 0]), true),
        ("request that must not be fragmented", edit(20, &[0x40, 0]), true),
        ("ports only", valid[..38].to_vec(), true),
        ("another port", edit(36, &[0, 68]), false),
        ("TCP", edit(23, &[6]), false),
        ("IPv6", edit(12, &[0x86, 0xdd]), false),
        ("ARP", edit(12, &[0x08, 0x06]), false),
        ("another IP version", edit(14, &[0x65]), false),
        ("IP header that is too short", edit(14, &[0x44]), false),
        ("IP header beyond the ports", edit(14, &[0x46]), false),
        ("first fragment", edit(20, &[0x20, 0]), false),
        ("last fragment", edit(20, &[0, 1]), false),
        ("VLAN tag", with_vlan_tag, false),
        ("no ports", valid[..37].to_vec(), false),
        ("no IP header", valid[..14].to_vec(), false),
        ("no EtherType", valid[..13].to_vec(), false),
        ("nothing", Vec::new(), false),
    ];
    for (what, frame, expected) in cases {
        assert_eq!(is_for_server(&frame), expected, "{what}");
        assert_eq!(
            is_for_server(&frame[..frame.len().min(MAX_HEADERS_SIZE)]),
            expected,
            "{what}"
        );
    }
}

#[test]
fn malformed_request_is_refused_with_its_cause() {
    use RequestError::{MessageType, NotARequest, Option, Relayed, Truncated};
    let new = || ClientMessage::new(DISCOVER);
    let untyped = |options: &[u8]| ClientMessage {
        options: options.to_vec(),
        ..new()
    };
    let edit = |offset: usize, bytes: &[u8]| {
        let mut frame = discover_frame();
        frame[offset..offset + bytes.len()].copy_from_slice(bytes);
        frame
    };
    let frames = [
        ("datagram longer than its frame", edit(16, &[0xff, 0xff]), Truncated),
        ("datagram shorter than its headers", edit(16, &[0, 27]), Truncated),
        ("UDP length beyond the datagram", edit(38, &[0xff, 0xff]), Truncated),
        ("UDP length of zero", edit(38, &[0, 0]), Truncated),
        ("no message", udp_frame(67, &[]), Truncated),
        ("fields only", udp_frame(67, &new().fields), NotARequest),
        ("wrong cookie", edit(278, &[0]), NotARequest),
    ];
    let messages = [
        ("answer", new().field(0, &[2]), NotARequest),
        ("request of a relay agent", new().field(24, &[10, 0, 0, 1]), Relayed),
        ("BOOTP request", untyped(&[]), NotARequest),
        ("type without value", untyped(&[53, 0]), Option(53)),
        ("long type", untyped(&[53, 2, 1, 1]), Option(53)),
        ("two types", new().option(53, &[1]), Option(53)),
        ("type of zero", untyped(&[53, 1, 0]), MessageType(0)),
        ("option without length", untyped(&[53]), Truncated),
        ("option beyond the message", untyped(&[12, 200, b'a']), Truncated),
        ("short address", new().option(50, &[10, 1, 0]), Option(50)),
        (
            "long server identifier",
            new().option(54, &[10, 1, 0, 1, 10, 1, 0, 2]),
            Option(54),
        ),
        ("short maximum size", new().option(57, &[1]), Option(57)),
        (
            "two client identifiers",
            new().option(61, &[1]).option(61, &[1]),
            Option(61),
        ),
        (
            "option beyond the file field",
            new().field(108, &[12, 255]).option(52, &[1]),
            Truncated,
        ),
        ("long overload", new().option(52, &[1, 1]), Option(52)),
    ];
    let messages = messages.map(|(what, message, error)| (what, message.frame(), error));
    for (what, frame, expected) in frames.into_iter().chain(messages) {
        let answer = DhcpServer::new(&bridge_lease()).answer(&frame);

        assert_eq!(answer.unwrap_err(), expected, "{what}");
    }
}

#[test]
fn truncated_request_has_no_answer() {
    let server = DhcpServer::new(&bridge_lease());
    let frame = discover_frame();
    for length in 0..frame.len() {
        assert!(server.answer(&frame[..length]).is_err(), "{length}");
    }
}

/// Pseudo-random numbers (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit as u64).unwrap()
    }

    fn byte(&mut self) -> u8 {
        u8::try_from(self.below(256)).unwrap()
    }
}

#[test]
fn random_requests_have_valid_answers_or_none() {
    const ROUNDS: usize = 50_000;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let servers = [bridge_lease(), calico_lease(), large_lease()].map(|lease| {
        let address = lease.gateway.unwrap().to_string();
        (DhcpServer::new(&lease), address)
    });
    let mut answers = 0;
    for _ in 0..ROUNDS {
        let mut message = ClientMessage::new([DISCOVER, REQUEST, INFORM][random.below(3)]);
        for _ in 0..random.below(6) {
            let length = random.below(12);
            let value: Vec<u8> = (0..length).map(|_| random.byte()).collect();
            message = message.option([50, 52, 54, 57, 61, 12, random.byte()][random.below(7)], &value);
        }
        let mut frame = message.frame();
        for _ in 0..random.below(4) {
            let offset = random.below(frame.len());
            frame[offset] = random.byte();
        }
        if random.below(4) == 0 {
            frame.truncate(random.below(frame.len() + 1));
        }
        is_for_server(&frame);
        let (server, address) = &servers[random.below(servers.len())];
        if let Ok(Some(answer)) = server.answer(&frame) {
            assert!(answer.frame.len() <= 14 + 1500);
            Received::parse(&answer.frame, address);
            answers += 1;
        }
    }
    assert!(answers > ROUNDS / 10, "{answers}");
}
