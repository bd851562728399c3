//! Forwarded ports.

use std::{thread, time::Duration};

use sha2::{Digest, Sha256};

use crate::{
    pod::{Handler, Pod},
    streaming::ForwardedPort,
};

/// A server that reads a length in 8 bytes and then that many bytes. It answers with their SHA-256 and the same number
/// of bytes of a pattern. It has a separate port for each address.
const SERVER: &str = r#"
import hashlib, socket, struct, sys, threading
def exactly(connection, length):
    parts = []
    while length:
        part = connection.recv(min(length, 1 << 16))
        if not part: sys.exit()
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
def serve(connection):
    with connection:
        length, = struct.unpack(">Q", exactly(connection, 8))
        connection.sendall(hashlib.sha256(exactly(connection, length)).digest())
        connection.sendall((bytes(range(251)) * (length // 251 + 1))[:length])
        connection.recv(1)
def listen(family, address, port):
    server = socket.socket(family)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6: server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    server.bind((address, port))
    server.listen(100)
    def accept():
        while True: threading.Thread(target=serve, args=server.accept()[:1], daemon=True).start()
    threading.Thread(target=accept).start()
listen(socket.AF_INET, "127.0.0.1", 8001)
listen(socket.AF_INET6, "::1", 8002)
listen(socket.AF_INET, "0.0.0.0", 8003)
print("ready", flush=True)
"#;

/// Sends `length` bytes, and checks the digest and the bytes that come back.
fn exchange(connection: &mut ForwardedPort, length: usize) {
    let sent: Vec<u8> = (0_u32..)
        .flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes())
        .take(length)
        .collect();
    let expected: Vec<u8> = (0..251).cycle().take(length).collect();
    connection.send(&(length as u64).to_be_bytes());
    connection.send(&sent);
    assert_eq!(connection.receive(32), Sha256::digest(&sent).as_slice());
    assert!(
        connection.receive(length) == expected,
        "the received bytes differ from the pattern"
    );
}

pub(crate) fn forwarded_ports(handler: Handler) {
    let pod = Pod::run(handler);
    let server = pod.start_debian("server", &["python3", "-c", SERVER]);
    server.wait_for_line("ready");
    // A closed port is reported at once.
    let (message, after) = ForwardedPort::open(&pod, 8009).wait_for_failure();
    assert!(message.contains("refused") || message.contains("reset"), "{message}");
    assert!(after < Duration::from_secs(5), "{after:?}");
    for port in [8001, 8003, 8002] {
        exchange(&mut ForwardedPort::open(&pod, port), 10 << 20);
    }
    pod.remove();
}

pub(crate) fn fifty_connections(handler: Handler) {
    let pod = Pod::run(handler);
    let server = pod.start_debian("server", &["python3", "-c", SERVER]);
    server.wait_for_line("ready");
    // One connection first: a failure that is common to all is then reported only once.
    exchange(&mut ForwardedPort::open(&pod, 8001), 1000);
    let mut connections: Vec<_> = (0..50)
        .map(|number| ForwardedPort::open(&pod, [8001, 8003][number % 2]))
        .collect();
    thread::scope(|scope| {
        for (number, connection) in connections.iter_mut().enumerate() {
            scope.spawn(move || exchange(connection, 10_000 + number));
        }
    });
    pod.remove();
}
