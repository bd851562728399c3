//! How large a machine is: annotations, else the limits that were asked for, else a default.
//!
//! | from | memory of the machine | vCPUs |
//! |---|---|---|
//! | `io.containerd.nutshell.memory_mib`, `io.containerd.nutshell.vcpus` | exactly that | exactly that |
//! | the container's limits, or for a pod's sandbox `io.kubernetes.cri.sandbox-*` | limit + overhead | quota / period, rounded up |
//! | neither | [`DEFAULT_MEMORY`] or as configured | [`DEFAULT_VCPUS`] or as configured |
//!
//! All is rounded up to 2 MiB. An annotation out of bounds is an error; limits above the bounds give
//! the largest machine, as they would give all of the host without one.

use std::collections::HashMap;

use oci_spec::runtime::LinuxResources;

use super::{PlanError, Size};

/// Memory of a machine whose containers have no limit, in bytes. Real programs run in it, and the
/// guest's page structs for it cost 8 MiB.
pub(crate) const DEFAULT_MEMORY: u64 = 512 << 20;

/// vCPUs of a machine whose containers have no limit.
pub(crate) const DEFAULT_VCPUS: u8 = 1;

/// The most vCPUs that a machine has.
pub(crate) const MAX_VCPUS: u8 = 64;

/// The least memory that a machine has, in bytes.
pub(crate) const MIN_MEMORY: u64 = 128 << 20;

/// What kernel and agent need beside the containers, in bytes; 1/64 of the limit comes to it for
/// the guest's page structs (64 bytes for each page of 4096).
const OVERHEAD: u64 = 64 << 20;

const ALIGNMENT: u64 = 2 << 20;

/// cgroup v1 and v2: the period where only a quota is given, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

const VCPUS_ANNOTATION: &str = "io.containerd.nutshell.vcpus";
const MEMORY_ANNOTATION: &str = "io.containerd.nutshell.memory_mib";

/// What the host's owner allows and prefers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizing {
    /// Memory where nothing asks for any, in bytes.
    pub(crate) default_memory: u64,
    /// vCPUs where nothing asks for any.
    pub(crate) default_vcpus: u8,
    /// The most memory, in bytes.
    pub(crate) max_memory: u64,
    /// The most vCPUs.
    pub(crate) max_vcpus: u8,
}

impl Sizing {
    pub(super) fn of_container(
        &self,
        annotations: &HashMap<String, String>,
        resources: Option<&LinuxResources>,
    ) -> Result<Size, PlanError> {
        let memory = resources.and_then(|resources| resources.memory().as_ref()?.limit());
        let cpu = resources.and_then(|resources| resources.cpu().as_ref());
        self.size(
            annotations,
            &Limits {
                memory,
                quota: cpu.and_then(|cpu| cpu.quota()),
                period: cpu.and_then(|cpu| cpu.period()),
            },
        )
    }

    /// The pod's limits are in annotations (containerd `internal/cri/annotations`): sums over the
    /// pod's containers, 0 for none.
    pub(super) fn of_sandbox(&self, annotations: &HashMap<String, String>) -> Result<Size, PlanError> {
        self.size(
            annotations,
            &Limits {
                memory: number(annotations, "io.kubernetes.cri.sandbox-memory")?,
                quota: number(annotations, "io.kubernetes.cri.sandbox-cpu-quota")?,
                period: number(annotations, "io.kubernetes.cri.sandbox-cpu-period")?,
            },
        )
    }

    fn size(&self, annotations: &HashMap<String, String>, limits: &Limits) -> Result<Size, PlanError> {
        let memory_mib = number::<u64>(annotations, MEMORY_ANNOTATION)?
            .map(|mib| bounded(MEMORY_ANNOTATION, mib, MIN_MEMORY >> 20, self.max_memory >> 20))
            .transpose()?;
        let vcpus = number::<u64>(annotations, VCPUS_ANNOTATION)?
            .map(|vcpus| bounded(VCPUS_ANNOTATION, vcpus, 1, self.max_vcpus.into()))
            .transpose()?;
        let memory = memory_mib
            .map(|mib| mib << 20)
            .or_else(|| limits.memory())
            .unwrap_or(self.default_memory);
        let vcpus = vcpus
            .or_else(|| limits.vcpus())
            .unwrap_or(self.default_vcpus.into())
            .clamp(1, self.max_vcpus.into());
        Ok(Size {
            memory: memory
                .clamp(MIN_MEMORY, self.max_memory.max(MIN_MEMORY))
                .next_multiple_of(ALIGNMENT),
            vcpus: u8::try_from(vcpus).unwrap_or(self.max_vcpus),
        })
    }
}

struct Limits {
    memory: Option<i64>,
    quota: Option<i64>,
    period: Option<u64>,
}

impl Limits {
    fn memory(&self) -> Option<u64> {
        let limit = positive(self.memory)?;
        Some(limit.saturating_add(limit / 64).saturating_add(OVERHEAD))
    }

    fn vcpus(&self) -> Option<u64> {
        let period = self.period.filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD);
        Some(positive(self.quota)?.div_ceil(period))
    }
}

/// Zero and below mean "no limit" (OCI spec, "Memory" and "CPU").
fn positive(limit: Option<i64>) -> Option<u64> {
    limit
        .and_then(|limit| u64::try_from(limit).ok())
        .filter(|limit| *limit > 0)
}

fn number<T: std::str::FromStr>(annotations: &HashMap<String, String>, name: &str) -> Result<Option<T>, PlanError> {
    annotations
        .get(name)
        .map(|text| {
            text.parse()
                .map_err(|_| PlanError::invalid(format!("annotation {name}"), format!("{text:?} is not a number")))
        })
        .transpose()
}

fn bounded(name: &str, value: u64, least: u64, most: u64) -> Result<u64, PlanError> {
    if (least..=most).contains(&value) {
        Ok(value)
    } else {
        Err(PlanError::invalid(
            format!("annotation {name}"),
            format!("{value} is not within {least} to {most}"),
        ))
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxCpuBuilder, LinuxMemoryBuilder, LinuxResourcesBuilder};

    use super::*;

    const MIB: u64 = 1 << 20;

    const SIZING: Sizing = Sizing {
        default_memory: DEFAULT_MEMORY,
        default_vcpus: DEFAULT_VCPUS,
        max_memory: 8192 * MIB,
        max_vcpus: 8,
    };

    fn resources(memory: i64, quota: i64, period: u64) -> LinuxResources {
        let cpu = LinuxCpuBuilder::default().quota(quota).period(period).build().unwrap();
        let memory = LinuxMemoryBuilder::default().limit(memory).build().unwrap();
        LinuxResourcesBuilder::default()
            .cpu(cpu)
            .memory(memory)
            .build()
            .unwrap()
    }

    fn annotations(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn container_is_sized_by_its_limits() {
        let mib = |mib: u64| i64::try_from(mib * MIB).unwrap();
        for (limits, memory, vcpus) in [
            (None, DEFAULT_MEMORY, 1),
            (Some(resources(-1, -1, 100_000)), DEFAULT_MEMORY, 1),
            (Some(resources(0, 0, 0)), DEFAULT_MEMORY, 1),
            (Some(resources(mib(1), 1, 100_000)), MIN_MEMORY, 1),
            (Some(resources(mib(512), 150_000, 100_000)), (512 + 8 + 64) * MIB, 2),
            (Some(resources(mib(513), 200_000, 0)), 586 * MIB, 2),
            (
                Some(resources(i64::MAX, i64::MAX, 1)),
                SIZING.max_memory,
                SIZING.max_vcpus,
            ),
        ] {
            let size = SIZING.of_container(&HashMap::new(), limits.as_ref()).unwrap();
            assert_eq!(size, Size { memory, vcpus }, "{limits:?}");
        }
    }

    #[test]
    fn sandbox_is_sized_by_the_pods_sums() {
        let pod = annotations(&[
            ("io.kubernetes.cri.sandbox-memory", "1073741824"),
            ("io.kubernetes.cri.sandbox-cpu-quota", "350000"),
            ("io.kubernetes.cri.sandbox-cpu-period", "100000"),
        ]);
        let size = SIZING.of_sandbox(&pod).unwrap();
        assert_eq!((size.memory, size.vcpus), ((1024 + 16 + 64) * MIB, 4));
        let unlimited = annotations(&[("io.kubernetes.cri.sandbox-memory", "0")]);
        assert_eq!(SIZING.of_sandbox(&unlimited).unwrap().memory, DEFAULT_MEMORY);
    }

    #[test]
    fn annotations_of_nutshell_come_before_limits() {
        let asked = annotations(&[(VCPUS_ANNOTATION, "3"), (MEMORY_ANNOTATION, "301")]);
        let size = SIZING
            .of_container(&asked, Some(&resources(1 << 30, 100_000, 100_000)))
            .unwrap();
        assert_eq!((size.memory, size.vcpus), (302 * MIB, 3));
    }

    #[test]
    fn annotation_that_is_no_number_or_out_of_bounds_is_an_error_that_names_it() {
        for (name, value) in [
            (VCPUS_ANNOTATION, "0"),
            (VCPUS_ANNOTATION, "9"),
            (VCPUS_ANNOTATION, "256"),
            (VCPUS_ANNOTATION, "-1"),
            (VCPUS_ANNOTATION, "two"),
            (MEMORY_ANNOTATION, "127"),
            (MEMORY_ANNOTATION, "8193"),
            (MEMORY_ANNOTATION, "18446744073709551615"),
            (MEMORY_ANNOTATION, "512M"),
            (MEMORY_ANNOTATION, ""),
        ] {
            let error = SIZING.of_container(&annotations(&[(name, value)]), None).unwrap_err();
            assert!(error.to_string().contains(name), "{value}: {error}");
        }
        let error = SIZING
            .of_sandbox(&annotations(&[("io.kubernetes.cri.sandbox-memory", "lots")]))
            .unwrap_err();
        assert!(error.to_string().contains("sandbox-memory"), "{error}");
    }
}
