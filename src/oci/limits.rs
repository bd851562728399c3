//! Limits of containers and pods: memory and CPU time.

use std::collections::HashMap;

use oci_spec::runtime::LinuxResources;

use super::{PlanError, annotations::parse_number};

/// The period of a CPU quota that comes without one, in microseconds: the kernel's default, in cgroup v1 and v2.
const DEFAULT_PERIOD: u64 = 100_000;

/// The limits of a container, or their sums over a pod's containers. `None` means unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// In bytes.
    pub(super) memory: Option<u64>,
    /// In thousandths of a CPU.
    pub(super) millicpus: Option<u64>,
}

impl Limits {
    /// Limits from a memory limit in bytes, and a CPU quota and its period in microseconds. For each, zero or less
    /// means unlimited (OCI spec, "Memory" and "CPU").
    pub(super) fn new(memory: Option<i64>, cpu_quota: Option<i64>, cpu_period: Option<u64>) -> Self {
        let period = cpu_period.filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD);
        Self {
            memory: memory.and_then(positive),
            millicpus: cpu_quota
                .and_then(positive)
                .map(|quota| quota.saturating_mul(1000).div_ceil(period)),
        }
    }

    /// The limits in an OCI spec.
    pub(super) fn from_resources(resources: Option<&LinuxResources>) -> Self {
        resources.map_or(Self::default(), |resources| Self::default().with_resources(resources))
    }

    /// The sums over a pod's containers in the annotations of its sandbox (containerd `internal/cri/annotations`).
    pub(super) fn from_annotations(annotations: &HashMap<String, String>) -> Result<Self, PlanError> {
        Ok(Self::new(
            parse_number(annotations, "io.kubernetes.cri.sandbox-memory")?,
            parse_number(annotations, "io.kubernetes.cri.sandbox-cpu-quota")?,
            parse_number(annotations, "io.kubernetes.cri.sandbox-cpu-period")?,
        ))
    }

    /// These limits after an update: OCI `LinuxResources` as JSON. A limit that the update does not contain stays.
    /// Malformed JSON changes nothing; the agent, which applies the update, reports it.
    #[must_use]
    pub(crate) fn with_update(self, resources: &[u8]) -> Self {
        serde_json::from_slice(resources).map_or(self, |resources| self.with_resources(&resources))
    }

    fn with_resources(self, resources: &LinuxResources) -> Self {
        let memory = resources.memory().as_ref().and_then(|memory| memory.limit());
        let cpu = resources.cpu().as_ref();
        let quota = cpu.and_then(|cpu| cpu.quota());
        let new = Self::new(memory, quota, cpu.and_then(|cpu| cpu.period()));
        Self {
            memory: if memory.is_some() { new.memory } else { self.memory },
            millicpus: if quota.is_some() { new.millicpus } else { self.millicpus },
        }
    }

    /// The larger value of each limit. `None` counts as zero, as it does in [`Self::sum`].
    #[must_use]
    pub(crate) fn max(self, other: Self) -> Self {
        Self {
            memory: self.memory.max(other.memory),
            millicpus: self.millicpus.max(other.millicpus),
        }
    }

    /// The sums of the limits of several containers. Unlimited containers add nothing.
    pub(crate) fn sum(limits: impl IntoIterator<Item = Self>) -> Self {
        let add = |sum: Option<u64>, limit: Option<u64>| match (sum, limit) {
            (Some(sum), Some(limit)) => Some(sum.saturating_add(limit)),
            (sum, limit) => sum.or(limit),
        };
        limits.into_iter().fold(Self::default(), |sum, limits| Self {
            memory: add(sum.memory, limits.memory),
            millicpus: add(sum.millicpus, limits.millicpus),
        })
    }
}

fn positive(limit: i64) -> Option<u64> {
    u64::try_from(limit).ok().filter(|limit| *limit > 0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn limits_of_a_spec_are_positive_or_unlimited() {
        for (resources, memory, millicpus) in [
            (json!({}), None, None),
            (
                json!({"memory": {"limit": 1}, "cpu": {"quota": 1, "period": 100_000}}),
                Some(1),
                Some(1),
            ),
            (
                json!({"memory": {"limit": 0}, "cpu": {"quota": 0, "period": 0}}),
                None,
                None,
            ),
            (
                json!({"memory": {"limit": -1}, "cpu": {"quota": -1, "period": 100_000}}),
                None,
                None,
            ),
            (json!({"cpu": {"quota": 150_001, "period": 100_000}}), None, Some(1501)),
            (json!({"cpu": {"quota": 200_000}}), None, Some(2000)),
            (json!({"cpu": {"quota": 200_000, "period": 0}}), None, Some(2000)),
            (json!({"cpu": {"period": 100_000}}), None, None),
            (
                json!({"memory": {"limit": i64::MAX}, "cpu": {"quota": i64::MAX, "period": 1}}),
                Some(i64::MAX.unsigned_abs()),
                Some(u64::MAX),
            ),
        ] {
            let parsed: LinuxResources = serde_json::from_value(resources.clone()).unwrap();
            let limits = Limits::from_resources(Some(&parsed));
            assert_eq!(limits, Limits { memory, millicpus }, "{resources}");
        }
        assert_eq!(Limits::from_resources(None), Limits::default());
    }

    #[test]
    fn update_changes_only_the_limits_that_it_contains() {
        let before = Limits::new(Some(1 << 30), Some(200_000), Some(100_000));
        for (update, memory, millicpus) in [
            (r#"{"memory": {"limit": 2147483648}}"#, Some(2 << 30), Some(2000)),
            (
                r#"{"cpu": {"quota": 50000, "period": 100000}}"#,
                Some(1 << 30),
                Some(500),
            ),
            (r#"{"cpu": {"shares": 2}}"#, Some(1 << 30), Some(2000)),
            (r#"{"memory": {"limit": -1}, "cpu": {"quota": -1}}"#, None, None),
            ("{}", Some(1 << 30), Some(2000)),
            ("no JSON", Some(1 << 30), Some(2000)),
        ] {
            let after = before.with_update(update.as_bytes());
            assert_eq!(after, Limits { memory, millicpus }, "{update}");
        }
    }
}
