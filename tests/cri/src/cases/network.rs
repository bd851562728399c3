//! Network of pods on a bridge: other pods, the host, DNS, host ports.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use crate::{
    dns,
    messages::{DnsConfig, PortMapping, Protocol},
    pod::{Handler, Pod},
    wait::TIMEOUT,
};

/// The host's addresses on the bridge (tests/lab/pods.bash).
const HOST: [&str; 2] = ["10.88.0.1", "fd00:88::1"];

/// An echo server on port 7 of every address, for TCP and UDP.
const ECHO_SERVER: &str = r#"
import socket, threading
def echo(connection):
    with connection:
        while part := connection.recv(1 << 16): connection.sendall(part)
def tcp(server):
    while True: threading.Thread(target=echo, args=server.accept()[:1], daemon=True).start()
def udp(server):
    while True: server.sendto(*server.recvfrom(1 << 16))
for family, address in (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::"):
    for kind, serve in (socket.SOCK_STREAM, tcp), (socket.SOCK_DGRAM, udp):
        server = socket.socket(family, kind)
        if family == socket.AF_INET6: server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        server.bind((address, 7))
        if kind == socket.SOCK_STREAM: server.listen(10)
        threading.Thread(target=serve, args=(server,)).start()
print("ready", flush=True)
"#;

/// A client of the echo server at the address in its argument: 1 MiB over TCP, and datagrams from one byte to more than
/// fits into a frame.
const ECHO_CLIENT: &str = r#"
import os, socket, sys, threading
address = sys.argv[1], 7
connection = socket.create_connection(address, timeout=60)
data = os.urandom(1 << 20)
def send():
    connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)
threading.Thread(target=send).start()
received = b""
while part := connection.recv(1 << 16): received += part
assert received == data, len(received)
datagrams = socket.socket(connection.family, socket.SOCK_DGRAM)
datagrams.settimeout(2)
for size in 1, 1400, 8000:
    for attempt in range(5):
        datagrams.sendto(data[:size], address)
        try: answer = datagrams.recv(1 << 16)
        except TimeoutError: continue
        assert answer == data[:size], (size, len(answer))
        break
    else: sys.exit(f"no answer to a datagram of {size} bytes")
"#;

pub(crate) fn pods_reach_each_other_and_the_host(handler: Handler) {
    let echo = Pod::run(handler);
    let server = echo.start_debian("echo", &["python3", "-c", ECHO_SERVER]);
    let client_pod = Pod::run(handler);
    let client = client_pod.start_debian("client", &["sleep", "1000"]);
    let tools = client_pod.start("tools", &["sleep", "1000"]);
    server.wait_for_line("ready");
    serve_echo();

    let addresses = echo.addresses();
    assert_ne!(addresses, client_pod.addresses());
    for address in addresses.iter().map(String::as_str).chain(HOST) {
        // Packets may be lost: one answer is enough.
        tools.sh(&format!("ping -c 3 -w 10 {address}"));
        tools.sh(&format!("ping -c 3 -w 10 -s 1472 {address}"));
        let response = client.exec(&["python3", "-c", ECHO_CLIENT, address]);
        assert_eq!(
            response.exit_code,
            0,
            "{address}: {}",
            String::from_utf8_lossy(&response.stderr)
        );
    }
    // From the host to the pod.
    for address in &addresses {
        let mut connection = TcpStream::connect((address.as_str(), 7)).unwrap();
        connection.set_read_timeout(Some(TIMEOUT)).unwrap();
        connection.write_all(b"hello").unwrap();
        let mut answer = [0; 5];
        connection.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"hello");
        assert_eq!(exchange_datagram(address, 7, b"hello"), b"hello");
    }
    // A closed port is reported in both directions.
    let response = tools.exec(&["nc", "-w", "10", HOST[0], "9"]);
    assert_ne!(response.exit_code, 0);
    let refused = TcpStream::connect((addresses[0].as_str(), 9)).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    // The pod has the addresses and routes that CNI has set up.
    let interface = tools.sh("ip address show eth0");
    for address in client_pod.addresses() {
        assert!(interface.contains(&address), "{address}: {interface}");
    }
    assert!(tools.sh("ip route").contains("default via 10.88.0.1 dev eth0"));
    assert!(tools.sh("ip -6 route").contains("default via fd00:88::1 dev eth0"));
    client_pod.remove_while_other_exists(&echo);
    echo.remove();
}

/// Serves [`ECHO_CLIENT`] on the host until the program ends.
fn serve_echo() {
    for address in HOST {
        let server = TcpListener::bind((address, 7)).unwrap();
        thread::spawn(move || {
            for connection in server.incoming() {
                let mut connection = connection.unwrap();
                thread::spawn(move || std::io::copy(&mut connection.try_clone().unwrap(), &mut connection));
            }
        });
        let server = UdpSocket::bind((address, 7)).unwrap();
        thread::spawn(move || {
            let mut datagram = vec![0; 1 << 16];
            while let Ok((length, client)) = server.recv_from(&mut datagram) {
                server.send_to(&datagram[..length], client).unwrap();
            }
        });
    }
}

/// Sends a datagram and returns the answer. Retries, because datagrams may be lost.
fn exchange_datagram(address: &str, port: u16, bytes: &[u8]) -> Vec<u8> {
    let any = if address.contains(':') { "::" } else { "0.0.0.0" };
    let socket = UdpSocket::bind((any, 0)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let mut answer = vec![0; 1 << 16];
    for _ in 0..5 {
        socket.send_to(bytes, (address, port)).unwrap();
        if let Ok(length) = socket.recv(&mut answer) {
            answer.truncate(length);
            return answer;
        }
    }
    panic!("no answer from {address} port {port}");
}

pub(crate) fn names_are_resolved(handler: Handler) {
    dns::serve(HOST[0]);
    let pod = Pod::run_with(handler, |config| {
        config.dns_config = Some(DnsConfig {
            servers: vec![HOST[0].into()],
            searches: vec!["cluster.test".into()],
            options: vec!["ndots:5".into()],
        });
    });
    let small = pod.start("small", &["sleep", "1000"]);
    let large = pod.start_debian("large", &["sleep", "1000"]);
    let address = dns::ADDRESS.to_string();
    let response = small.exec(&["nslookup", dns::NAME]);
    let text = String::from_utf8_lossy(&response.stdout);
    assert!(
        text.contains(&address),
        "{text}{}",
        String::from_utf8_lossy(&response.stderr)
    );
    let found = large.sh("getent ahostsv4 service");
    assert!(found.starts_with(&address), "{found}");
    assert_eq!(large.exec(&["getent", "hosts", "no-such-service"]).exit_code, 2);
    pod.remove();
}

pub(crate) fn host_ports(handler: Handler) {
    let pod = Pod::run_with(handler, |config| {
        config.port_mappings = [(Protocol::Tcp, 18007), (Protocol::Udp, 18007)]
            .map(|(protocol, host_port)| PortMapping {
                protocol: protocol.into(),
                container_port: 7,
                host_port,
                host_ip: String::new(),
            })
            .to_vec();
    });
    let server = pod.start_debian("echo", &["python3", "-c", ECHO_SERVER]);
    server.wait_for_line("ready");
    for address in ["127.0.0.1", HOST[0]] {
        let mut connection = TcpStream::connect((address, 18007)).unwrap();
        connection.set_read_timeout(Some(TIMEOUT)).unwrap();
        connection.write_all(b"hello").unwrap();
        let mut answer = [0; 5];
        connection.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"hello");
    }
    assert_eq!(exchange_datagram(HOST[0], 18007, b"hello"), b"hello");
    pod.remove();
    let gone = TcpStream::connect((HOST[0], 18007)).unwrap_err();
    assert_eq!(gone.kind(), std::io::ErrorKind::ConnectionRefused);
}
