//! Changes the resource limits of a container.

use std::path::Path;

use libcgroups::common::{CgroupManager, ControllerOpt};
use libcgroups::v2::manager::Manager;
use nutshell_protocol::Failure;
use oci_spec::runtime::{LinuxHugepageLimit, LinuxResources};

use super::{Cgroup, ROOT};
use crate::failure::{Context, FailureExt};

/// Applies OCI `LinuxResources`, in JSON. Limits that are not in it do not change.
pub(crate) fn update(cgroup: &Cgroup, resources: &[u8]) -> Result<(), Failure> {
    let resources: LinuxResources = serde_json::from_slice(resources)
        .map_err(|error| Failure::invalid(format!("cannot parse the resources: {error}")))?;
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
        .context(|| format!("find the cgroup {}", cgroup.path().display()))?;
    let manager =
        Manager::new(ROOT.into(), below.into()).context(|| format!("find the cgroup {}", cgroup.path().display()))?;
    manager
        .apply(&options)
        .context(|| format!("update the limits of cgroup {}", cgroup.path().display()))
}

/// Drops limits that refer to the host (CPUs by number, devices, page sizes that the guest lacks) and those that only
/// cgroup v1 has. It drops the device rules, too: see [`super::devices`].
pub(crate) fn clean_resources(mut resources: LinuxResources) -> LinuxResources {
    resources.set_devices(None);
    resources.set_block_io(None);
    resources.set_network(None);
    resources.set_rdma(None);
    if let Some(mut cpu) = resources.cpu().clone() {
        cpu.set_cpus(None);
        cpu.set_mems(None);
        cpu.set_realtime_period(None);
        cpu.set_realtime_runtime(None);
        resources.set_cpu(Some(cpu));
    }
    if let Some(limits) = resources.hugepage_limits().clone() {
        let known = limits.into_iter().filter(is_supported_page_size).collect();
        resources.set_hugepage_limits(Some(known));
    }
    resources
}

fn is_supported_page_size(limit: &LinuxHugepageLimit) -> bool {
    let size = limit.page_size();
    let kilobytes = [("KB", 1), ("MB", 1 << 10), ("GB", 1 << 20)]
        .iter()
        .find_map(|(unit, factor)| size.strip_suffix(unit)?.parse::<u64>().ok()?.checked_mul(*factor));
    kilobytes.is_some_and(|size| Path::new(&format!("/sys/kernel/mm/hugepages/hugepages-{size}kB")).exists())
}
