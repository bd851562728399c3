//! The place of a container: its pod, and its control group on the host.

use std::{collections::HashMap, path::Path};

use oci_spec::runtime::Linux;

use crate::oci::{CgroupPath, ContainerId, IdError, Placement, PlanError};

/// The control group of the machine on the host.
pub(super) fn cgroup_path(linux: &Linux) -> Result<Option<CgroupPath>, PlanError> {
    let path = linux.cgroups_path().as_deref().unwrap_or(Path::new(""));
    CgroupPath::parse(&path.to_string_lossy()).map_err(|reason| PlanError::invalid("linux.cgroupsPath", reason))
}

/// The container's relation to a pod, from the annotations of containerd's CRI (`internal/cri/annotations`). `None` if
/// the bundle is that of a pod's sandbox.
pub(super) fn parse_placement(annotations: &HashMap<String, String>) -> Result<Option<Placement>, PlanError> {
    const TYPE: &str = "io.kubernetes.cri.container-type";
    const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";
    let invalid = |name: &str, reason: String| PlanError::invalid(format!("annotation {name}"), reason);
    match annotations.get(TYPE).map(String::as_str) {
        None => Ok(Some(Placement::Single)),
        Some("sandbox") => Ok(None),
        Some("container") => {
            let sandbox = annotations
                .get(SANDBOX)
                .ok_or_else(|| invalid(SANDBOX, "a container of a pod needs this annotation".to_owned()))?;
            let sandbox: ContainerId = sandbox
                .parse()
                .map_err(|error: IdError| invalid(SANDBOX, error.to_string()))?;
            Ok(Some(Placement::Member {
                sandbox: sandbox.to_string(),
            }))
        }
        Some(other) => Err(invalid(
            TYPE,
            format!("{other:?} is neither \"sandbox\" nor \"container\""),
        )),
    }
}
