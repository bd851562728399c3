//! Settings of the machine: of its own namespaces, which all containers of a pod share, and of its kernel.

use std::fs;
use std::path::{Component, Path};

use nutshell_protocol::{Failure, GuestSettings};

use crate::failure::{Context, FailureExt};

/// Sets the host name in the UTS namespace that the containers of a pod share.
pub(crate) fn set_hostname(name: &str) -> Result<(), Failure> {
    rustix::system::sethostname(name.as_bytes()).context(|| format!("set the host name {name}"))
}

/// Applies the node's settings. Parameters that this kernel does not have are ignored, because the node's kernel is
/// another version. Continues after a failure and returns the first one.
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

/// Sets the NIS domain name in the same namespace.
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
}
