//! Settings of the machine: of its own namespaces, which all containers of a pod share, and of its kernel.

use std::fs;
use std::path::{Component, Path};

use nutshell_protocol::{Failure, GuestSettings, NetworkParameter};

use crate::failure::{Context, FailureExt};

/// Sets the host name in the UTS namespace that the containers of a pod share.
pub(crate) fn set_hostname(name: &str) -> Result<(), Failure> {
    rustix::system::sethostname(name.as_bytes()).context(|| format!("set the host name {name}"))
}

/// Applies the node's settings. Parameters that this kernel does not have are ignored, because the node's kernel
/// may be another version. Continues after a failure and returns the first one.
pub(crate) fn apply(settings: &GuestSettings) -> Result<(), Failure> {
    let mut result = set_hostname(&settings.hostname);
    let mut set = |name: &str, value: &str| {
        let set = set_sysctl(name, value);
        if result.is_ok() {
            result = set;
        }
    };
    let path = |name: &str| Path::new("/proc/sys").join(name.replace('.', "/"));
    for (name, minimum) in &settings.minimum_limits {
        let current = fs::read_to_string(path(name)).ok();
        let is_lower = |current: String| current.trim().parse().is_ok_and(|current: u64| current < *minimum);
        if current.is_some_and(is_lower) {
            set(name, &minimum.to_string());
        }
    }
    for (name, value) in &settings.parameters {
        if path(name).exists() {
            set(name, value);
        }
    }
    result
}

/// Sets the parameters that have the expected value. Ignores those that this kernel does not have. Continues after a
/// failure and returns the first one.
pub(crate) fn set_network_parameters(parameters: &[NetworkParameter]) -> Result<(), Failure> {
    let has_expected_value = |parameter: &&NetworkParameter| {
        let current = fs::read_to_string(Path::new("/proc/sys").join(&parameter.name));
        current.is_ok_and(|current| current.trim() == parameter.expected)
    };
    // Compared before the first is set, because the kernel changes some together with others.
    let mut pending: Vec<_> = parameters.iter().filter(has_expected_value).collect();
    let mut result = Ok(());
    // Twice, because the kernel checks some against others: the ranges of local and of privileged ports must not
    // overlap.
    for _ in 0..2 {
        result = Ok(());
        pending.retain(|parameter| {
            let set = set_sysctl(&parameter.name, &parameter.value);
            let is_refused = set.is_err();
            if result.is_ok() {
                result = set;
            }
            is_refused
        });
    }
    result
}

/// Sets the NIS domain name in the UTS namespace that the containers of a pod share.
pub(crate) fn set_domainname(name: &str) -> Result<(), Failure> {
    rustix::system::setdomainname(name.as_bytes()).context(|| format!("set the domain name {name}"))
}

/// Sets a kernel parameter. `name` has the form of sysctl(8), with `.` or `/` as separator.
pub(crate) fn set_sysctl(name: &str, value: &str) -> Result<(), Failure> {
    // As with sysctl(8), a "." is part of a component if the name contains "/".
    let path = match name.contains('/') {
        true => name.to_owned(),
        false => name.replace('.', "/"),
    };
    let is_name = !path.is_empty()
        && Path::new(&path)
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
    if !is_name {
        return Err(Failure::invalid(format!(
            "sysctl {name:?} is not the name of a kernel parameter"
        )));
    }
    match std::fs::write(Path::new("/proc/sys").join(path), value) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(Failure::invalid(format!(
            "sysctl {name}: this kernel has no such parameter"
        ))),
        Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => Err(Failure::invalid(format!(
            "sysctl {name}: {value:?} is not a valid value"
        ))),
        result => result.context(|| format!("set sysctl {name} to {value:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys;
    use nutshell_protocol::FailureKind;

    #[test]
    fn error_names_the_sysctl_that_cannot_be_set() {
        for name in [
            "",
            "../../etc/passwd",
            "net/../../x",
            "/etc/passwd",
            "no.such.parameter",
        ] {
            let failure = set_sysctl(name, "1").unwrap_err();
            assert_eq!(failure.kind, FailureKind::InvalidArgument, "{name}");
            assert!(failure.message.contains(name), "{}", failure.message);
        }
    }

    #[test]
    fn network_parameters_are_set_unless_they_have_another_value() {
        let in_namespace = std::thread::spawn(|| {
            sys::unshare_network().unwrap();
            fs::write("/proc/sys/net/ipv4/tcp_fin_timeout", "55").unwrap();
            let parameter = |name: &str, expected: &str, value: &str| NetworkParameter {
                name: format!("net/{name}"),
                expected: expected.to_owned(),
                value: value.to_owned(),
            };

            set_network_parameters(&[
                parameter("ipv4/tcp_fin_timeout", "60", "7"),
                parameter("ipv4/no_such_parameter", "0", "1"),
                // Refused until the second is set.
                parameter("ipv4/ip_local_port_range", "32768\t60999", "600\t700"),
                parameter("ipv4/ip_unprivileged_port_start", "1024", "500"),
                // The kernel also sets the parameter of lo.
                parameter("ipv6/conf/all/disable_ipv6", "0", "1"),
                parameter("ipv6/conf/lo/disable_ipv6", "0", "0"),
            ])
            .unwrap();
            let refused = set_network_parameters(&[
                parameter("ipv4/ip_unprivileged_port_start", "500", "601"),
                parameter("ipv4/tcp_keepalive_time", "7200", "5"),
            ]);

            let failure = refused.unwrap_err();
            assert!(
                failure.message.contains("ip_unprivileged_port_start"),
                "{}",
                failure.message
            );
            for (name, value) in [
                ("ipv4/tcp_fin_timeout", "55"),
                ("ipv4/ip_local_port_range", "600\t700"),
                ("ipv4/ip_unprivileged_port_start", "500"),
                ("ipv4/tcp_keepalive_time", "5"),
                ("ipv6/conf/all/disable_ipv6", "1"),
                ("ipv6/conf/default/disable_ipv6", "1"),
                ("ipv6/conf/lo/disable_ipv6", "0"),
            ] {
                let found = fs::read_to_string(format!("/proc/sys/net/{name}")).unwrap();
                assert_eq!(found.trim(), value, "{name}");
            }
        });
        in_namespace.join().unwrap();
    }
}
