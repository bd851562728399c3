//! A name server with one name, on the host's address of the pods' bridge.

use std::{
    net::{Ipv4Addr, UdpSocket},
    thread,
};

/// The only name that resolves.
pub(crate) const NAME: &str = "service.cluster.test";
/// What [`NAME`] resolves to.
pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);

/// Serves on UDP port 53 of `address` until the program ends.
pub(crate) fn serve(address: &str) {
    let socket = UdpSocket::bind((address, 53)).unwrap();
    thread::spawn(move || {
        let mut question = [0; 512];
        while let Ok((length, client)) = socket.recv_from(&mut question) {
            if let Some(answer) = answer(&question[..length]) {
                // An error means that the client has closed its socket.
                let _ = socket.send_to(&answer, client);
            }
        }
    });
}

/// Returns the answer to a message with one question, or `None` if the message is malformed (RFC 1035, section 4).
fn answer(question: &[u8]) -> Option<Vec<u8>> {
    const HEADER: usize = 12;
    const A: &[u8] = &[0, 1];
    let mut labels = Vec::new();
    let mut rest = question.get(HEADER..)?;
    loop {
        let (&length, after) = rest.split_first()?;
        if length == 0 {
            rest = after;
            break;
        }
        labels.push(str::from_utf8(after.get(..length.into())?).ok()?.to_lowercase());
        rest = &after[length.into()..];
    }
    let kind = rest.get(..2)?;
    let end = question.len() - rest.len() + 4;
    let exists = labels.join(".") == NAME;
    let has_address = exists && kind == A;

    let mut answer = question[..2].to_vec();
    // An authoritative response, recursion desired and available; 3 is NXDOMAIN.
    answer.extend([0x85, if exists { 0x80 } else { 0x83 }]);
    answer.extend([0, 1, 0, u8::from(has_address), 0, 0, 0, 0]);
    answer.extend(&question[HEADER..end]);
    if has_address {
        // A pointer to the name in the question, type A, class IN, TTL 60 s, 4 bytes of data.
        answer.extend([0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(ADDRESS.octets());
    }
    Some(answer)
}
