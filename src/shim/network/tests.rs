//! Tests with real links, in new network namespaces. Redirects are tested by the end-to-end suites, because they need
//! modules that not every kernel has.

use std::{
    fs::File,
    io,
    net::TcpStream,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, unshare};

use super::{
    changes::ChangeSocket,
    connect::{KnownLinks, connect_new_links},
    dhcp_links::lease::{ResolverConfig, lease_of_link},
    discovery, guest_config,
    loopback::ForwardListeners,
    namespace::run_in_namespace,
    netlink::NetlinkSocket,
    tap,
};
use crate::control::Lease;

/// A new network namespace, configured by `commands` of ip(8).
fn new_namespace(commands: &[&str]) -> OwnedFd {
    let commands: Vec<String> = commands.iter().map(|command| (*command).to_owned()).collect();
    let made = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        for command in commands {
            let status = Command::new("ip").args(command.split(' ')).status().unwrap();
            assert!(status.success(), "ip {command}");
        }
        OwnedFd::from(File::open("/proc/thread-self/ns/net").unwrap())
    });
    made.join().unwrap()
}

async fn run_in<T: Send + 'static>(namespace: &OwnedFd, work: impl FnOnce() -> T + Send + 'static) -> T {
    run_in_namespace(namespace, work).await.unwrap()
}

fn ip(arguments: &str) -> Vec<String> {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}");
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines: Vec<String> = text.lines().map(|line| line.trim().to_owned()).collect();
    lines.sort();
    lines
}

/// The configuration of the calling thread's namespace, as ip(8) shows it.
fn read_config() -> Vec<String> {
    let addresses = ip("-o addr").into_iter().map(|line| {
        // Without the interface index.
        let words: Vec<_> = line.split_whitespace().skip(1).collect();
        words.join(" ").replace(" nodad", "").replace(" noprefixroute", "")
    });
    let mut lines: Vec<String> = addresses.collect();
    lines.extend(ip("route show table all"));
    lines.extend(ip("-6 route show table all"));
    lines.extend(ip("rule"));
    lines.extend(ip("-6 rule"));
    lines.extend(ip("neigh show nud permanent"));
    lines.sort();
    // The kernel adds these routes for each link that is up.
    lines.retain(|line| !line.contains("multicast ff00::/8"));
    lines
}

/// Sends the requests to the kernel, as the agent does (`guest/agent/src/machine/network.rs`).
fn configure(messages: &[(String, Vec<u8>)]) {
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::empty(),
        SockProtocol::NetlinkRoute,
    )
    .unwrap();
    for (purpose, message) in messages {
        send(socket.as_raw_fd(), message, MsgFlags::empty()).unwrap();
        let mut answer = [0; 4096];
        recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()).unwrap();
        let error = -i32::from_le_bytes(answer[16..20].try_into().unwrap());
        assert!(
            [0, nix::libc::EEXIST].contains(&error),
            "{purpose}: {}",
            io::Error::from_raw_os_error(error)
        );
    }
}

/// A namespace for the guest: its two Ethernet links represent the network devices of the machine.
fn guest_namespace() -> OwnedFd {
    new_namespace(&["link set lo up", "link add veth0 type veth peer name veth1"])
}

/// Configures `guest` as the machine of the namespace `pod` would be.
async fn replicate(pod: &OwnedFd, guest: &OwnedFd) {
    let (links, config) = run_in(pod, || {
        let mut netlink = NetlinkSocket::open().unwrap();
        (
            discovery::list_links(&mut netlink).unwrap(),
            discovery::read_ip_config(&mut netlink).unwrap(),
        )
    })
    .await;
    run_in(guest, move || {
        let index = |name| nix::net::if_::if_nametoindex(name).unwrap();
        let indexes = [index("veth0"), index("veth1")];
        configure(&guest_config::link_messages(&links, &indexes[..links.len()]));
        configure(&guest_config::ip_messages(&config, &links, &indexes[..links.len()]));
    })
    .await;
}

#[tokio::test]
async fn guest_has_the_addresses_routes_rules_and_neighbours_of_the_pod() {
    // One of the guest's links also has the name `veth1` at first, so that temporary names are needed.
    let pod = new_namespace(&[
        "link set lo up",
        "link add veth1 type veth peer name net1",
        "link set veth1 addrgenmode none",
        "link set net1 addrgenmode none",
        "link set veth1 up",
        "link set net1 up",
        "addr add 10.1.0.5/24 brd + dev veth1",
        "addr add 10.1.0.6/24 dev veth1 label veth1:1",
        "addr add fd00::5/64 dev veth1 nodad",
        "addr add fe80::5/64 dev veth1 nodad",
        "addr add 10.2.0.5/32 dev net1",
        "addr add 192.0.2.9/32 dev lo",
        "route add default via 10.1.0.1 src 10.1.0.6 mtu 1400",
        "route add 10.9.0.0/16 via 169.254.1.1 dev veth1 onlink",
        "route add 10.8.0.0/16 dev net1 scope link metric 7",
        "route add unreachable 10.7.0.0/16",
        "route add 10.6.0.0/16 nexthop via 10.1.0.1 weight 2 nexthop dev net1 weight 3",
        "route add default dev net1 table 100",
        "route add 10.5.0.0/16 dev net1 table 1000",
        "-6 route add default via fd00::1 dev veth1 metric 5",
        "-6 route add fd01::/64 dev net1",
        "neigh add 169.254.1.1 lladdr 02:00:00:00:00:01 dev veth1 nud permanent",
        "neigh add fd00::1 lladdr 02:00:00:00:00:01 dev veth1 nud permanent",
        "rule add from 10.2.0.5 lookup 100 priority 500",
        "rule add fwmark 9 lookup 1000",
        "-6 rule add from fd00::5 lookup 100 priority 500",
    ]);
    let guest = guest_namespace();

    replicate(&pod, &guest).await;

    let (expected, actual) = (run_in(&pod, read_config).await, run_in(&guest, read_config).await);
    assert!(
        expected
            .iter()
            .any(|line| line.contains("10.9.0.0/16") && line.contains("onlink")),
        "{expected:#?}"
    );
    assert_eq!(actual, expected);
}

#[tokio::test]
async fn guest_gets_ethernet_links_that_are_up_and_not_bridged() {
    let pod = new_namespace(&[
        "link set lo up",
        "link add eth0 type veth peer name down",
        "link set eth0 up",
        "link set eth0 mtu 1400",
        "link set eth0 address 02:00:00:00:00:07",
        "link add bridge type bridge",
        "link add port type veth peer name other",
        "link set port master bridge",
        "link set port up",
    ]);

    let links = run_in(&pod, || {
        discovery::list_links(&mut NetlinkSocket::open().unwrap()).unwrap()
    })
    .await;

    let names: Vec<_> = links.iter().map(|link| link.name.as_str()).collect();
    assert_eq!(names, ["eth0"]);
    assert_eq!((links[0].mac, links[0].mtu), ([2, 0, 0, 0, 0, 7], 1400));
}

#[tokio::test]
async fn tap_device_has_queues_mtu_of_its_link_and_no_address() {
    let pod = new_namespace(&[]);

    let lines = run_in(&pod, || {
        let tap = tap::create(2).unwrap();
        assert_eq!(tap.queues.len(), 2);
        let link = discovery::Link {
            index: 7,
            name: "eth0".to_owned(),
            mac: [2, 0, 0, 0, 0, 7],
            mtu: 9000,
        };
        tap::bring_up(&mut NetlinkSocket::open().unwrap(), tap.index, &link).unwrap();
        let lines = ip("-o link show nutshell0");
        let addresses = ip("-o addr show nutshell0");
        assert!(addresses.is_empty(), "{addresses:?}");
        lines
    })
    .await;

    assert!(lines[0].contains("mtu 9000") && lines[0].contains(",UP"), "{lines:?}");
    // A child process that another test is starting may have copies of the queues' descriptors for a moment.
    let mut changes = run_in(&pod, || ChangeSocket::open().unwrap()).await.listen().unwrap();
    while run_in(&pod, || ip("-o link")).await.len() > 1 {
        let change = tokio::time::timeout(Duration::from_secs(10), changes.next()).await;
        change.expect("the tap device is removed").unwrap();
    }
}

#[tokio::test]
async fn namespace_with_the_tap_device_of_another_machine_is_refused() {
    let pod = new_namespace(&["link add eth0 type veth peer name peer", "link set eth0 up"]);

    let error = run_in(&pod, || {
        let other = tap::create(1).unwrap();
        let link = discovery::Link {
            index: 7,
            name: "eth0".to_owned(),
            mac: [2, 0, 0, 0, 0, 7],
            mtu: 1500,
        };
        tap::bring_up(&mut NetlinkSocket::open().unwrap(), other.index, &link).unwrap();
        let known = KnownLinks {
            links: Vec::new(),
            taps: Vec::new(),
            configured: Vec::new(),
        };
        connect_new_links(&known, 1).unwrap_err().to_string()
    })
    .await;

    assert!(
        error.contains("another virtual machine, whose tap device is nutshell0"),
        "{error}"
    );
}

#[tokio::test]
async fn links_that_cannot_all_be_connected_are_left_as_they_were() {
    // The largest MTU of a veth link. That of a tap device is 14 bytes less, so the second link fails, and on a kernel
    // without tc's matchall even the first.
    let pod = new_namespace(&[
        "link add eth0 type veth peer name peer0",
        "link set eth0 up",
        "link add eth1 type veth peer name peer1",
        "link set eth1 mtu 65535",
        "link set eth1 up",
    ]);
    let state = || {
        let qdiscs = Command::new("tc").args(["qdisc", "show"]).output().unwrap();
        assert!(qdiscs.status.success());
        (ip("-o link"), String::from_utf8(qdiscs.stdout).unwrap())
    };
    let before = run_in(&pod, state).await;

    let failed = run_in(&pod, || {
        let known = KnownLinks {
            links: Vec::new(),
            taps: Vec::new(),
            configured: Vec::new(),
        };
        connect_new_links(&known, 2).is_err()
    })
    .await;

    assert!(failed);
    // A child process that another test is starting may have copies of the queues' descriptors for a moment.
    let deadline = Instant::now() + Duration::from_secs(10);
    while run_in(&pod, state).await != before {
        assert!(Instant::now() < deadline, "{:?}", run_in(&pod, state).await);
    }
}

#[tokio::test]
async fn connection_to_any_loopback_port_arrives_and_keeps_its_port() {
    let pod = new_namespace(&["link set lo up", "addr add 192.0.2.9/32 dev lo"]);
    let inside = pod.try_clone().unwrap();
    let listeners = run_in(&pod, move || ForwardListeners::open(inside.as_fd()).unwrap()).await;

    let (clients, refused) = run_in(&pod, || {
        let connect = |address: &str| TcpStream::connect(address);
        let clients = ["127.0.0.1:80", "127.1.2.3:65535", "[::1]:8080"].map(|address| connect(address).unwrap());
        (clients, connect("192.0.2.9:80").is_err())
    })
    .await;

    assert!(refused);
    let accepted: Vec<_> = [0, 0, 1]
        .into_iter()
        .map(|index: usize| listeners.accept(index).local_addr().unwrap().to_string())
        .collect();
    assert_eq!(accepted, ["127.0.0.1:80", "127.1.2.3:65535", "[::1]:8080"]);
    drop((clients, listeners));
    // A child process that another test is starting may have a copy of the program's descriptor for a moment.
    let deadline = Instant::now() + Duration::from_secs(10);
    while run_in(&pod, || TcpStream::connect("127.0.0.1:80").is_ok()).await {
        assert!(Instant::now() < deadline);
    }
}

#[tokio::test]
async fn change_in_the_namespace_is_reported_but_not_before_it_happens() {
    let pod = new_namespace(&["link set lo up"]);
    let mut changes = run_in(&pod, || ChangeSocket::open().unwrap()).await.listen().unwrap();

    let early = tokio::time::timeout(Duration::from_millis(50), changes.next()).await;
    run_in(&pod, || ip("link add eth0 type veth peer name other")).await;
    let change = tokio::time::timeout(Duration::from_secs(10), changes.next()).await;

    assert!(early.is_err());
    change.unwrap().unwrap();
}

/// The leases of the links of `pod` with their names.
async fn read_leases(pod: &OwnedFd, resolver: ResolverConfig) -> Vec<(String, Option<Lease>)> {
    run_in(pod, move || {
        let mut netlink = NetlinkSocket::open().unwrap();
        let config = discovery::read_ip_config(&mut netlink).unwrap();
        let links = discovery::list_links(&mut netlink).unwrap();
        let lease = |link: &discovery::Link| lease_of_link(&config, link, &resolver, Some("web-0"));
        links.iter().map(|link| (link.name.clone(), lease(link))).collect()
    })
    .await
}

/// Address and prefix, gateway, routes, and MTU of a lease, as text.
fn describe(lease: &Lease) -> (String, Option<String>, Vec<String>, u16) {
    let prefix = |prefix: crate::control::Prefix| format!("{}/{}", prefix.address(), prefix.length());
    let routes = lease.routes.iter().map(|route| {
        let gateway = route.gateway.map(|gateway| format!(" via {gateway}"));
        prefix(route.destination) + &gateway.unwrap_or_default()
    });
    (
        prefix(lease.address),
        lease.gateway.map(|gateway| gateway.to_string()),
        routes.collect(),
        lease.mtu,
    )
}

#[tokio::test]
async fn lease_has_the_address_and_routes_of_its_link() {
    const LINKS: [&str; 6] = [
        "link set lo up",
        "link add eth0 type veth peer name peer0",
        "link add net1 type veth peer name peer1",
        "link set eth0 up",
        "link set net1 up",
        "addr add 192.0.2.9/32 dev lo",
    ];
    // The network, the commands, and the lease of `eth0`.
    type Case<'a> = (&'a str, &'a [&'a str], (&'a str, Option<&'a str>, &'a [&'a str], u16));
    let cases: [Case<'_>; 8] = [
        (
            "bridge",
            &["addr add 10.1.0.5/24 brd + dev eth0", "route add default via 10.1.0.1"],
            ("10.1.0.5/24", Some("10.1.0.1"), &[], 1500),
        ),
        (
            "calico",
            &[
                "link set eth0 mtu 1450",
                "addr add 10.2.3.4/32 dev eth0",
                "route add 169.254.1.1 dev eth0 scope link",
                "route add default via 169.254.1.1 dev eth0",
                "neigh add 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent",
            ],
            ("10.2.3.4/32", Some("169.254.1.1"), &["169.254.1.1/32"], 1450),
        ),
        (
            "cilium, which sets the MTU of routes",
            &[
                "addr add 10.2.3.4/32 dev eth0",
                "route add 10.2.3.1 dev eth0 scope link",
                "route add default via 10.2.3.1 dev eth0 mtu 1450",
            ],
            ("10.2.3.4/32", Some("10.2.3.1"), &["10.2.3.1/32"], 1450),
        ),
        (
            "route with a larger MTU than the link",
            &[
                "addr add 10.1.0.5/24 dev eth0",
                "route add default via 10.1.0.1 mtu 9000",
            ],
            ("10.1.0.5/24", Some("10.1.0.1"), &[], 1500),
        ),
        (
            "on-link gateway without a route",
            &[
                "addr add 10.2.3.4/32 dev eth0",
                "route add default via 169.254.1.1 dev eth0 onlink",
            ],
            ("10.2.3.4/32", Some("169.254.1.1"), &[], 1500),
        ),
        (
            "several addresses, routes, and links",
            &[
                "addr add 10.1.0.5/24 dev eth0",
                "addr add 10.1.0.6/24 dev eth0",
                "addr add fd00::5/64 dev eth0 nodad",
                "addr add 10.5.0.5/24 dev net1",
                "route add default via 10.1.0.3 metric 9",
                "route add default via 10.1.0.2 metric 5",
                "route add default via 10.5.0.1 metric 1",
                "route add 10.9.0.0/17 via 10.1.0.9",
                "route add 10.8.0.0/16 dev eth0 scope link metric 7",
                "route add 10.8.0.0/16 via 10.1.0.8 metric 8",
                "route add 10.7.0.0/16 nexthop via 10.5.0.7 nexthop via 10.1.0.7",
                "route add 10.6.0.0/16 via inet6 fd00::6 dev eth0",
                "route add unreachable 10.4.0.0/16",
                "route add default via 10.1.0.4 table 100",
                "route add 10.3.0.0/16 dev eth0 table 1000",
            ],
            (
                "10.1.0.5/24",
                Some("10.1.0.2"),
                &["10.7.0.0/16 via 10.1.0.7", "10.8.0.0/16", "10.9.0.0/17 via 10.1.0.9"],
                1500,
            ),
        ),
        (
            "peer",
            &[
                "addr add 10.1.0.5 peer 10.1.0.1/32 dev eth0",
                "route add default via 10.1.0.1",
            ],
            ("10.1.0.5/32", Some("10.1.0.1"), &["10.1.0.1/32"], 1500),
        ),
        (
            "default route without gateway",
            &["addr add 10.1.0.5/24 dev eth0", "route add default dev eth0"],
            ("10.1.0.5/24", None, &["0.0.0.0/0"], 1500),
        ),
    ];
    for (what, commands, expected) in cases {
        let pod = new_namespace(&[&LINKS[..], commands].concat());

        let leases = read_leases(&pod, ResolverConfig::default()).await;

        let (_, lease) = leases.iter().find(|(name, _)| name == "eth0").unwrap();
        let (address, gateway, routes, mtu) = describe(lease.as_ref().unwrap());
        let routes: Vec<_> = routes.iter().map(String::as_str).collect();
        assert_eq!((&*address, gateway.as_deref(), &routes[..], mtu), expected, "{what}");
    }
}

#[tokio::test]
async fn lease_has_names_and_servers_and_a_link_without_ipv4_address_has_none() {
    let pod = new_namespace(&[
        "link set lo up",
        "link add eth0 type veth peer name eth1",
        "link set eth0 up",
        "link set eth1 up",
        "addr add 10.1.0.5/24 dev eth0",
        "addr add fd00::5/64 dev eth1 nodad",
    ]);
    let resolver = ResolverConfig::parse("nameserver 10.96.0.10\nsearch default.svc.cluster.local cluster.local");

    let mut leases = read_leases(&pod, resolver).await;

    leases.sort_by(|left, right| left.0.cmp(&right.0));
    let [(_, Some(lease)), (_, None)] = &leases[..] else {
        panic!("{leases:?}");
    };
    assert_eq!(lease.dns, [std::net::Ipv4Addr::new(10, 96, 0, 10)]);
    let search: Vec<_> = lease.search.iter().map(|name| name.as_str()).collect();
    assert_eq!(search, ["default.svc.cluster.local", "cluster.local"]);
    assert_eq!(lease.hostname.as_ref().map(|name| name.as_str()), Some("web-0"));
}
