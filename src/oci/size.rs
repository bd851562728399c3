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
//!
//! The machine of a pod grows while it runs, where the limits of its members come to more than what it
//! booted with; what an annotation fixed stays as it is. What its limits ask for is bounded by what the pod's
//! control group on the host may hold: else a guest that uses its memory is ended as a whole by the host,
//! where its own kernel would have ended one process.

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

/// How many times the vCPUs that it booted with the machine of a pod may come to have: each that may come costs the
/// guest memory and time when it boots.
const VCPU_GROWTH: u8 = 4;

/// The least memory that a machine has, in bytes.
pub(crate) const MIN_MEMORY: u64 = 128 << 20;

/// What kernel and agent need beside the containers, in bytes; 1/64 of the limit comes to it for
/// the guest's page structs (64 bytes for each page of 4096).
const OVERHEAD: u64 = 64 << 20;

/// What a machine costs its control group on the host beside the guest's memory: private memory of its processes,
/// in bytes; and KVM's page tables and the index of the memory's pages, about 1/512 of it each. The sum is that of
/// the RuntimeClass in `deploy`.
const HOST_OVERHEAD: u64 = 4 << 20;
const HOST_FRACTION: u64 = 256;

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
        self.size(annotations, Limits::from_resources(resources))
    }

    /// The pod's limits are in annotations (containerd `internal/cri/annotations`): sums over the
    /// pod's containers, 0 for none.
    pub(super) fn of_sandbox(&self, annotations: &HashMap<String, String>) -> Result<PodSize, PlanError> {
        let limits = Limits {
            memory: number(annotations, "io.kubernetes.cri.sandbox-memory")?.and_then(positive),
            cpu: cpu(
                number(annotations, "io.kubernetes.cri.sandbox-cpu-quota")?,
                number(annotations, "io.kubernetes.cri.sandbox-cpu-period")?,
            ),
        };
        let boot = self.size(annotations, limits)?;
        let fixed = |annotation| annotations.contains_key(annotation);
        let exact_memory = fixed(MEMORY_ANNOTATION);
        Ok(PodSize {
            boot,
            exact_memory,
            max: Size {
                memory: if exact_memory {
                    boot.memory
                } else {
                    boot.memory.max(self.max_memory / ALIGNMENT * ALIGNMENT)
                },
                vcpus: if fixed(VCPUS_ANNOTATION) {
                    boot.vcpus
                } else {
                    boot.vcpus
                        .saturating_mul(VCPU_GROWTH)
                        .min(self.max_vcpus)
                        .max(boot.vcpus)
                },
            },
        })
    }

    fn size(&self, annotations: &HashMap<String, String>, limits: Limits) -> Result<Size, PlanError> {
        let memory_mib = number::<u64>(annotations, MEMORY_ANNOTATION)?
            .map(|mib| bounded(MEMORY_ANNOTATION, mib, MIN_MEMORY >> 20, self.max_memory >> 20))
            .transpose()?;
        let vcpus = number::<u64>(annotations, VCPUS_ANNOTATION)?
            .map(|vcpus| bounded(VCPUS_ANNOTATION, vcpus, 1, self.max_vcpus.into()))
            .transpose()?;
        let memory = memory_mib
            .map(|mib| mib << 20)
            .or_else(|| limits.machine_memory())
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

/// What bounds a container, or all containers of a pod; nothing does where there is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Memory in bytes.
    memory: Option<u64>,
    /// Thousandths of a CPU.
    cpu: Option<u64>,
}

impl Limits {
    /// Those of a spec.
    pub(crate) fn from_resources(resources: Option<&LinuxResources>) -> Self {
        resources.map_or(Self::default(), |resources| Self::default().changed(resources))
    }

    /// These after a change: what `resources`, OCI `LinuxResources` as JSON, does not name stays. What cannot
    /// be read changes nothing; whoever applies it says so.
    pub(crate) fn with_update(self, resources: &[u8]) -> Self {
        serde_json::from_slice(resources).map_or(self, |resources| self.changed(&resources))
    }

    fn changed(self, resources: &LinuxResources) -> Self {
        let memory = resources.memory().as_ref().and_then(|memory| memory.limit());
        let quota = resources
            .cpu()
            .as_ref()
            .and_then(|cpu| Some((cpu.quota()?, cpu.period())));
        Self {
            memory: memory.map_or(self.memory, positive),
            cpu: quota.map_or(self.cpu, |(quota, period)| cpu(Some(quota), period)),
        }
    }

    /// Of each the larger one.
    #[must_use]
    pub(crate) fn max(self, other: Self) -> Self {
        Self {
            memory: self.memory.max(other.memory),
            cpu: self.cpu.max(other.cpu),
        }
    }

    /// What containers with these limits come to together.
    pub(crate) fn sum(limits: impl IntoIterator<Item = Self>) -> Self {
        let add = |sum: Option<u64>, limit: Option<u64>| match (sum, limit) {
            (Some(sum), Some(limit)) => Some(sum.saturating_add(limit)),
            (sum, limit) => sum.or(limit),
        };
        limits.into_iter().fold(Self::default(), |sum, limits| Self {
            memory: add(sum.memory, limits.memory),
            cpu: add(sum.cpu, limits.cpu),
        })
    }

    fn machine_memory(self) -> Option<u64> {
        let limit = self.memory?;
        Some(limit.saturating_add(limit / 64).saturating_add(OVERHEAD))
    }

    fn vcpus(self) -> Option<u64> {
        Some(self.cpu?.div_ceil(1000))
    }
}

/// What the machine of a pod boots with, and what it may come to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PodSize {
    /// At the start, and never less.
    pub(crate) boot: Size,
    /// While it runs.
    pub(crate) max: Size,
    /// An annotation says what the memory is, and no limit changes that.
    pub(crate) exact_memory: bool,
}

impl PodSize {
    /// A machine that keeps its size.
    pub(crate) fn fixed(size: Size) -> Self {
        Self {
            boot: size,
            max: size,
            exact_memory: true,
        }
    }

    /// This, booting with no more memory than fits into a control group of the host that may hold `group` bytes.
    #[must_use]
    pub(crate) fn bound_boot_memory(mut self, group: Option<u64>) -> Self {
        self.boot.memory = self.boot.memory.min(self.most_within(group).max(MIN_MEMORY));
        self
    }

    /// The size for containers that come to these limits, in a control group of the host that may hold `group`
    /// bytes.
    pub(crate) fn size_for(&self, limits: Limits, group: Option<u64>) -> Size {
        let most_memory = self.most_within(group).max(self.boot.memory);
        let memory = limits.machine_memory().unwrap_or(0);
        let vcpus = limits.vcpus().unwrap_or(0);
        Size {
            memory: memory
                .clamp(self.boot.memory, most_memory)
                .next_multiple_of(ALIGNMENT)
                .min(most_memory),
            vcpus: u8::try_from(vcpus)
                .unwrap_or(u8::MAX)
                .clamp(self.boot.vcpus, self.max.vcpus),
        }
    }

    fn most_within(&self, group: Option<u64>) -> u64 {
        let room = group.filter(|_| !self.exact_memory).map(|group| {
            // What is left is the machine's and one part of HOST_FRACTION more.
            let room = group.saturating_sub(HOST_OVERHEAD);
            let machine = room - room.div_ceil(HOST_FRACTION + 1);
            machine / ALIGNMENT * ALIGNMENT
        });
        room.map_or(self.max.memory, |room| room.min(self.max.memory))
    }
}

/// Zero and below mean "no limit" (OCI spec, "Memory" and "CPU").
fn positive(limit: i64) -> Option<u64> {
    u64::try_from(limit).ok().filter(|limit| *limit > 0)
}

/// Thousandths of a CPU.
fn cpu(quota: Option<i64>, period: Option<u64>) -> Option<u64> {
    let period = period.filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD);
    Some(positive(quota?)?.saturating_mul(1000).div_ceil(period))
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
        assert_eq!((size.boot.memory, size.boot.vcpus), ((1024 + 16 + 64) * MIB, 4));
        assert_eq!((size.max.memory, size.max.vcpus), (8192 * MIB, 8));
        let unlimited = annotations(&[("io.kubernetes.cri.sandbox-memory", "0")]);
        assert_eq!(SIZING.of_sandbox(&unlimited).unwrap().boot.memory, DEFAULT_MEMORY);
    }

    #[test]
    fn sandbox_with_an_annotation_keeps_the_size_that_it_names() {
        let asked = annotations(&[(MEMORY_ANNOTATION, "256")]);
        let size = SIZING.of_sandbox(&asked).unwrap();
        assert_eq!((size.boot.memory, size.max.memory), (256 * MIB, 256 * MIB));
        assert_eq!((size.boot.vcpus, size.max.vcpus), (1, 4));
        let asked = annotations(&[(VCPUS_ANNOTATION, "2")]);
        let size = SIZING.of_sandbox(&asked).unwrap();
        assert_eq!((size.boot.vcpus, size.max.vcpus), (2, 2));
    }

    #[test]
    fn machine_grows_to_what_its_members_come_to_and_not_below_its_boot() {
        let of = |memory, quota| Limits::from_resources(Some(&resources(memory, quota, 100_000)));
        let mib = i64::try_from(MIB).unwrap();
        let boot = Size {
            memory: 512 * MIB,
            vcpus: 1,
        };
        let max = Size {
            memory: 2048 * MIB,
            vcpus: 4,
        };
        let size = PodSize {
            boot,
            max,
            exact_memory: false,
        };
        for (members, memory, vcpus) in [
            (vec![], 512, 1),
            (vec![of(-1, -1)], 512, 1),
            (vec![of(64 * mib, 50_000)], 512, 1),
            (vec![of(512 * mib, 70_000), of(512 * mib, 70_000)], 1024 + 16 + 64, 2),
            (vec![of(512 * mib, 100_000), of(-1, -1)], 512 + 8 + 64, 1),
            (vec![of(i64::MAX, i64::MAX); 3], 2048, 4),
        ] {
            let size = size.size_for(Limits::sum(members.clone()), None);
            assert_eq!((size.memory / MIB, size.vcpus), (memory, vcpus), "{members:?}");
        }
        assert_eq!(PodSize::fixed(boot).size_for(of(4096 * mib, 800_000), None), boot);
    }

    #[test]
    fn machine_fits_into_its_control_group_unless_an_annotation_says_its_memory() {
        let pod = annotations(&[("io.kubernetes.cri.sandbox-memory", "1073741824")]);
        let size = SIZING.of_sandbox(&pod).unwrap();
        for (group, boot) in [
            (None, 1024 + 16 + 64),
            (Some(u64::MAX), 1024 + 16 + 64),
            // With the overhead of the RuntimeClass, and without.
            (Some((1024 + 130) * MIB), 1024 + 16 + 64),
            (Some(1024 * MIB), 1024 - 4 - 4),
            (Some(0), MIN_MEMORY / MIB),
        ] {
            assert_eq!(size.bound_boot_memory(group).boot.memory / MIB, boot, "{group:?}");
        }
        let limits = Limits::from_resources(Some(&resources(4 << 30, 100_000, 100_000)));
        for (group, grown) in [
            (None, 4096 + 64 + 64),
            (Some((4096 + 256) * MIB), 4096 + 64 + 64),
            (Some(4096 * MIB), 4096 - 4 - 16),
            // It has been lowered below what the machine booted with.
            (Some(512 * MIB), 1024 + 16 + 64),
        ] {
            assert_eq!(size.size_for(limits, group).memory / MIB, grown, "{group:?}");
        }
        // The largest pod that the RuntimeClass's overhead of 130 MiB is enough for.
        let pod = annotations(&[("io.kubernetes.cri.sandbox-memory", "3221225472")]);
        let size = SIZING.of_sandbox(&pod).unwrap();
        assert_eq!(size.bound_boot_memory(Some((3072 + 130) * MIB)), size);
        let exact = SIZING.of_sandbox(&annotations(&[(MEMORY_ANNOTATION, "512")])).unwrap();
        assert_eq!(exact.bound_boot_memory(Some(256 * MIB)), exact);
        assert_eq!(exact.size_for(limits, Some(256 * MIB)).memory, 512 * MIB);
    }

    #[test]
    fn update_changes_what_it_names() {
        let before = Limits::from_resources(Some(&resources(1 << 30, 200_000, 100_000)));
        for (update, memory, cpu) in [
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
            assert_eq!(
                before.with_update(update.as_bytes()),
                Limits { memory, cpu },
                "{update}"
            );
        }
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
