//! Changes a container's limits while it lives.

use libcgroups::common::{CgroupManager, ControllerOpt};
use libcgroups::v2::manager::Manager;
use nutshell_protocol::Failure;
use oci_spec::runtime::LinuxResources;

use super::cgroup::{Cgroup, ROOT};
use super::spec::clean_resources;
use crate::failure::{Context, FailureExt};

/// Applies OCI `LinuxResources`; what they do not name stays as it is.
pub(crate) fn update(cgroup: &Cgroup, resources: &[u8]) -> Result<(), Failure> {
    let resources: LinuxResources = serde_json::from_slice(resources)
        .map_err(|error| Failure::invalid(format!("the resources cannot be read: {error}")))?;
    let resources = clean_resources(resources);
    let options = ControllerOpt {
        resources: &resources,
        disable_oom_killer: false,
        oom_score_adj: None,
        freezer_state: None,
    };
    let below = cgroup
        .path()
        .strip_prefix(ROOT)
        .context(|| "find the container's cgroup".to_owned())?;
    let manager = Manager::new(ROOT.into(), below.into()).context(|| "find the container's cgroup".to_owned())?;
    manager
        .apply(&options)
        .context(|| "update the container's limits".to_owned())
}
