//! Network of virtual machines in pods without a subnet: each pod has an address with the prefix length 32 and a
//! gateway that is only on its link, as with Calico. The plugin of the network is tests/lab/routed-network.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    process::Command,
    thread,
};

use crate::{
    pod::{Container, Handler, Pod},
    vm::{Console, run, start_vm},
    wait::TIMEOUT,
};

/// The host's address on the bridge of other pods (tests/lab/pods.bash).
const HOST: &str = "10.88.0.1";
/// The address of the Service. No link has it.
const SERVICE: &str = "10.96.0.10";

/// A script for udhcpc that sets the lease as other DHCP clients do: the classless routes replace the router (RFC
/// 3442).
const LEASE: &str = r#"#!/bin/sh
[ "$1" != deconfig ] || ip link set "$interface" up
[ "$1" = bound ] || exit 0
ip address add "$ip/$mask" dev "$interface"
set -- $staticroutes
while [ $# -gt 0 ]; do
  case $2 in
    0.0.0.0) ip route add "$1" dev "$interface" ;;
    *) ip route add "$1" via "$2" dev "$interface" ;;
  esac
  shift 2
done
"#;

/// A rule of the host's packet filter. It is removed when this is dropped.
#[derive(Debug)]
struct FilterRule {
    table: &'static str,
    chain: &'static str,
    rule: String,
}

impl FilterRule {
    /// Inserts a rule before the others of `chain`.
    fn insert(table: &'static str, chain: &'static str, rule: String) -> Self {
        iptables(table, "-I", chain, &rule);
        Self { table, chain, rule }
    }
}

impl Drop for FilterRule {
    fn drop(&mut self) {
        iptables(self.table, "-D", self.chain, &self.rule);
    }
}

fn iptables(table: &str, action: &str, chain: &str, rule: &str) {
    run(Command::new("iptables")
        .args(["-w", "-t", table, action, chain])
        .args(rule.split(' ')));
}

/// A GET request as a kubelet's probe sends it: a new connection for each. Returns the response.
fn get(address: &str, port: u16) -> String {
    let mut connection = TcpStream::connect((address, port)).unwrap();
    connection.set_read_timeout(Some(TIMEOUT)).unwrap();
    connection
        .write_all(b"GET /index.html HTTP/1.0\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut response = String::new();
    connection.read_to_string(&mut response).unwrap();
    response
}

/// Downloads the page of the server in the guest, from another pod. Returns the client's error otherwise.
fn download(client: &Container, address: &str, port: u16, seconds: u32) -> Result<(), String> {
    let script = format!("printf 'GET /index.html HTTP/1.0\\r\\n\\r\\n' | nc -w {seconds} {address} {port}");
    let response = client.exec(&["sh", "-c", &script]);
    match response.exit_code {
        0 => assert!(String::from_utf8_lossy(&response.stdout).ends_with("of the guest\n")),
        _ => return Err(String::from_utf8_lossy(&response.stderr).into_owned()),
    }
    Ok(())
}

/// The guest gets address and routes by DHCP. Connections work in both directions, through a Service too, a
/// NetworkPolicy holds, and probes succeed.
pub(crate) fn routed_machine_is_reached_directly_and_through_a_service(handler: Handler) {
    let pod = Pod::run(handler);
    let container = start_vm(&pod, "vm", &[]);
    let address = pod.status().network.unwrap().ip;
    let mut console = Console::attach(&container);
    for line in LEASE.lines() {
        console.run(&format!("echo '{line}' >>/lease"));
    }
    console.run("chmod +x /lease && udhcpc -i eth0 -n -q -O staticroutes -s /lease");
    assert!(
        console
            .run("ip -4 address show dev eth0")
            .contains(&format!("inet {address}/32 "))
    );
    let routes = console.run("ip route");
    assert!(routes.contains("default via 169.254.1.1 dev eth0"), "{routes}");
    assert!(routes.contains("169.254.1.1 dev eth0 scope link"), "{routes}");

    // A TCP probe and an HTTP probe.
    console.run("mkdir /www && echo of the guest >/www/index.html && httpd -p 80 -h /www");
    let page = get(&address, 80);
    assert!(page.contains("200 OK") && page.contains("of the guest"), "{page}");
    drop(TcpStream::connect((address.as_str(), 80)).unwrap());

    // From the guest to the host.
    let listener = TcpListener::bind((HOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        let (mut connection, from) = listener.accept().unwrap();
        connection.set_read_timeout(Some(TIMEOUT)).unwrap();
        let mut text = [0; 15];
        connection.read_exact(&mut text).unwrap();
        connection.write_all(b"of the host\n").unwrap();
        (text, from.ip().to_string())
    });
    let answer = console.run(&format!("(echo of the machine; sleep 2) | nc {HOST} {port}"));
    assert_eq!(answer, "of the host");
    assert_eq!(server.join().unwrap(), (*b"of the machine\n", address.clone()));

    // A Service, as kube-proxy makes it: for the host's processes and for packets of pods.
    let service = ["PREROUTING", "OUTPUT"].map(|chain| {
        let rule = format!("-d {SERVICE}/32 -p tcp --dport 8080 -j DNAT --to-destination {address}:80");
        FilterRule::insert("nat", chain, rule)
    });
    run(Command::new("ip").args(["route", "add", SERVICE, "dev", "pods"]));
    let page = get(SERVICE, 8080);
    assert!(page.contains("of the guest"), "{page}");
    run(Command::new("ip").args(["route", "del", SERVICE, "dev", "pods"]));
    let client_pod = Pod::run(handler);
    let client = client_pod.start("client", &["sleep", "1000"]);
    assert_ne!(client_pod.status().network.unwrap().ip, address);
    download(&client, &address, 80, 30).unwrap();
    download(&client, SERVICE, 8080, 30).unwrap();

    // A NetworkPolicy for this port.
    let rule = format!("-d {address}/32 -p tcp --dport 80 -j DROP");
    let policy = FilterRule::insert("filter", "FORWARD", rule);
    let error = download(&client, &address, 80, 3).unwrap_err();
    assert!(error.contains("timed out"), "{error}");
    drop(policy);
    download(&client, &address, 80, 30).unwrap();
    drop(service);
    client_pod.remove_while_other_exists(&pod);
    container.stop(60);
    assert_eq!(container.status().exit_code, 0);
    pod.remove();
}
