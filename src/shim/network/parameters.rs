//! Kernel parameters of a network namespace. The guest gets them with its links, so that values which CNI plugins,
//! hooks and administrators have set hold in containers too.

use std::{collections::HashMap, fs, path::Path};

use nutshell_protocol::NetworkParameter;

use super::discovery::Link;

/// Parameters of the whole namespace, with the kernel's defaults (kernel, `Documentation/networking/ip-sysctl.rst` and
/// `Documentation/admin-guide/sysctl/net.rst`). Those that the kernel derives from its memory are left out.
const NAMESPACE_PARAMETERS: [(&str, &str); 12] = [
    ("core/somaxconn", "4096"),
    ("ipv4/ip_local_port_range", "32768\t60999"),
    ("ipv4/ip_local_reserved_ports", ""),
    ("ipv4/ip_nonlocal_bind", "0"),
    ("ipv4/ip_unprivileged_port_start", "1024"),
    ("ipv4/ping_group_range", "1\t0"),
    ("ipv4/tcp_fin_timeout", "60"),
    ("ipv4/tcp_keepalive_intvl", "75"),
    ("ipv4/tcp_keepalive_probes", "9"),
    ("ipv4/tcp_keepalive_time", "7200"),
    ("ipv4/tcp_syncookies", "1"),
    ("ipv6/ip_nonlocal_bind", "0"),
];

/// Parameters of each link, of all links ("all") and of future links ("default"), with the kernel's defaults.
const LINK_PARAMETERS: [(&str, &str, &str); 7] = [
    ("ipv4", "accept_local", "0"),
    ("ipv4", "arp_announce", "0"),
    ("ipv4", "arp_ignore", "0"),
    ("ipv4", "proxy_arp", "0"),
    ("ipv4", "route_localnet", "0"),
    ("ipv4", "rp_filter", "0"),
    ("ipv6", "disable_ipv6", "0"),
];

/// When this one changes, the kernel sets the parameter of the same name for each link.
const DISABLE_IPV6: &str = "net/ipv6/conf/all/disable_ipv6";

/// A parameter with its value in the namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Parameter {
    /// The path below `/proc/sys`.
    pub(super) name: String,
    pub(super) value: String,
    default: &'static str,
    /// The parameter from which a new link takes the initial value of this one.
    inherited_from: Option<String>,
}

/// Reads the parameters of the calling thread's network namespace, of its loopback interface and of `links`.
pub(super) fn read(links: &[Link]) -> Vec<Parameter> {
    let of_namespace = NAMESPACE_PARAMETERS.map(|(name, default)| (format!("net/{name}"), default, None));
    let of_links = |scope: &str, is_inherited: bool| {
        LINK_PARAMETERS.map(|(family, name, default)| {
            let inherited_from = is_inherited.then(|| format!("net/{family}/conf/default/{name}"));
            (format!("net/{family}/conf/{scope}/{name}"), default, inherited_from)
        })
    };
    let of_all = ["all", "default", "lo"]
        .into_iter()
        .flat_map(|scope| of_links(scope, false));
    let of_each = links.iter().flat_map(|link| of_links(&link.name, true));
    of_namespace
        .into_iter()
        .chain(of_all)
        .chain(of_each)
        .filter_map(|(name, default, inherited_from)| {
            // A kernel without IPv6 has only some of them.
            let value = fs::read_to_string(Path::new("/proc/sys").join(&name)).ok()?;
            Some(Parameter {
                name,
                value: value.trim().to_owned(),
                default,
                inherited_from,
            })
        })
        .collect()
}

/// The values that the guest has, unless a spec or a container has set others.
#[derive(Debug, Default)]
pub(super) struct GuestParameters(HashMap<String, String>);

impl GuestParameters {
    /// The parameters that the guest must set to have the values in `found`, in the order of `found`.
    pub(super) fn changes(&self, found: &[Parameter]) -> Vec<NetworkParameter> {
        let expected = |parameter: &Parameter| {
            let inherited = || self.0.get(parameter.inherited_from.as_ref()?);
            let known = self.0.get(&parameter.name).or_else(inherited);
            known.map_or_else(|| parameter.default.to_owned(), Clone::clone)
        };
        let changes_ipv6 = found
            .iter()
            .any(|parameter| parameter.name == DISABLE_IPV6 && parameter.value != expected(parameter));
        found
            .iter()
            .map(|parameter| NetworkParameter {
                name: parameter.name.clone(),
                expected: expected(parameter),
                value: parameter.value.clone(),
            })
            .filter(|change| {
                change.value != change.expected || (changes_ipv6 && change.name.ends_with("/disable_ipv6"))
            })
            .collect()
    }

    /// The guest has the values in `found`.
    pub(super) fn record(&mut self, found: Vec<Parameter>) {
        self.0
            .extend(found.into_iter().map(|parameter| (parameter.name, parameter.value)));
    }
}

#[cfg(test)]
mod tests {
    use std::{process::Command, thread};

    use nix::sched::{CloneFlags, unshare};

    use super::*;
    use crate::shim::network::{discovery, netlink::NetlinkSocket};

    #[test]
    fn values_of_the_namespace_are_read() {
        let read = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            for command in ["link add eth0.5 type veth peer name peer", "link set eth0.5 up"] {
                let status = Command::new("ip").args(command.split(' ')).status().unwrap();
                assert!(status.success(), "ip {command}");
            }
            for (name, value) in [
                ("core/somaxconn", "77"),
                ("ipv4/ip_local_port_range", "20000 30000"),
                ("ipv4/conf/eth0.5/arp_ignore", "2"),
                ("ipv6/conf/all/disable_ipv6", "1"),
            ] {
                fs::write(format!("/proc/sys/net/{name}"), value).unwrap();
            }
            super::read(&discovery::list_links(&mut NetlinkSocket::open().unwrap()).unwrap())
        });

        let read = read.join().unwrap();

        for (name, value) in [
            ("net/core/somaxconn", "77"),
            ("net/ipv4/ip_local_port_range", "20000\t30000"),
            ("net/ipv4/tcp_fin_timeout", "60"),
            ("net/ipv4/conf/eth0.5/arp_ignore", "2"),
            ("net/ipv6/conf/all/disable_ipv6", "1"),
            // The kernel has changed it with the one above.
            ("net/ipv6/conf/eth0.5/disable_ipv6", "1"),
            ("net/ipv6/conf/lo/disable_ipv6", "1"),
        ] {
            let found = read.iter().find(|parameter| parameter.name == name);
            assert_eq!(found.map(|parameter| parameter.value.as_str()), Some(value), "{name}");
        }
    }

    fn parameter(name: &str, value: &str) -> Parameter {
        let inherited_from = name
            .contains("eth")
            .then(|| name.replace("eth0", "default").replace("eth1", "default"));
        Parameter {
            name: format!("net/{name}"),
            value: value.to_owned(),
            default: "0",
            inherited_from: inherited_from.map(|name| format!("net/{name}")),
        }
    }

    #[test]
    fn guest_sets_the_values_that_it_does_not_have() {
        let all = "ipv6/conf/all/disable_ipv6";
        let (eth0, eth1) = ("ipv6/conf/eth0/disable_ipv6", "ipv6/conf/eth1/disable_ipv6");
        let (default, filter) = ("ipv4/conf/default/rp_filter", "ipv4/conf/eth1/rp_filter");
        // What the guest has, what the namespace has, and the changes: name, expected value, value.
        type Case<'a> = (
            &'a [(&'a str, &'a str)],
            &'a [(&'a str, &'a str)],
            &'a [(&'a str, &'a str, &'a str)],
        );
        let cases: [Case<'_>; 6] = [
            (&[], &[(all, "0"), (eth0, "0")], &[]),
            (&[], &[(all, "0"), (eth0, "1")], &[(eth0, "0", "1")]),
            // Setting it for all links turns IPv6 off, so it is turned on again for the link that has it.
            (&[], &[(all, "1"), (eth0, "0")], &[(all, "0", "1"), (eth0, "0", "0")]),
            (&[(all, "1"), (eth0, "0")], &[(all, "1"), (eth0, "0")], &[]),
            (
                &[(all, "1"), (eth0, "0")],
                &[(all, "1"), (eth0, "0"), (eth1, "1")],
                &[(eth1, "0", "1")],
            ),
            // A new link inherits its value in the guest.
            (
                &[(default, "2")],
                &[(default, "2"), (filter, "0")],
                &[(filter, "2", "0")],
            ),
        ];
        for (has, found, expected) in cases {
            let parameters =
                |values: &[(&str, &str)]| values.iter().map(|(name, value)| parameter(name, value)).collect();
            let mut guest = GuestParameters::default();
            guest.record(parameters(has));

            let found: Vec<_> = parameters(found);
            let changes = guest.changes(&found);

            let expected: Vec<_> = expected
                .iter()
                .map(|(name, expected, value)| NetworkParameter {
                    name: format!("net/{name}"),
                    expected: (*expected).to_owned(),
                    value: (*value).to_owned(),
                })
                .collect();
            assert_eq!(changes, expected, "{has:?} {found:?}");
        }
    }
}
