//! The size of a machine: from annotations, else from limits, else a default.
//!
//! | source | memory | vCPUs |
//! |---|---|---|
//! | `io.containerd.nutshell.memory_mib`, `io.containerd.nutshell.vcpus` | exactly that | exactly that |
//! | the limits of the container, or their sums over the pod | limit + overhead | quota / period, rounded up |
//! | the memory limit of a virtual machine that boots a user's disk | exactly that | as above |
//! | neither | [`DEFAULT_MEMORY`], unless configured | [`DEFAULT_VCPUS`], unless configured |
//!
//! Memory is rounded up to 2 MiB. An annotation out of bounds is an error. Limits above the bounds are not: they give
//! the largest machine, just as runc accepts limits above the host's size.
//!
//! The machine of a pod grows while it runs, if the limits of the pod's containers exceed what it booted with. A size
//! that an annotation sets does not change. The memory of a virtual machine that boots a user's disk follows its limit
//! up to the annotation `io.containerd.nutshell.vm.max-memory`.
//!
//! The memory limit of the pod's cgroup on the host bounds guest memory: above it, the host's OOM killer would end the
//! whole machine. Below it, the guest's OOM killer ends one process.

use std::collections::HashMap;

use super::{Limits, PlanError, annotations::parse_number};

/// Memory of a machine whose containers have no limit, in bytes. It is enough for typical programs, and the guest's
/// page structs for it cost 8 MiB.
pub(crate) const DEFAULT_MEMORY: u64 = 512 << 20;

/// vCPUs of a machine whose containers have no limit.
pub(crate) const DEFAULT_VCPUS: u8 = 1;

/// Maximum number of vCPUs of a machine.
pub(crate) const MAX_VCPUS: u8 = 64;

/// The machine of a pod can grow to this many times the vCPUs that it boots with. Each possible vCPU costs the guest
/// memory and boot time.
const VCPU_GROWTH_FACTOR: u8 = 4;

/// Minimum memory of a machine, in bytes.
pub(crate) const MIN_MEMORY: u64 = 128 << 20;

/// Memory for the guest's kernel and the agent, in bytes.
const GUEST_OVERHEAD: u64 = 64 << 20;

/// The page structs of the guest's kernel take one part in this many: 64 bytes for each page of 4096.
const PAGE_STRUCT_DIVISOR: u64 = 64;

/// Memory that a machine uses in its cgroup on the host in addition to guest memory, in bytes: private memory of its
/// processes. The RuntimeClass in `deploy` has the sum of the overheads for a pod of 3 GiB. It has 1 MiB more for
/// processes, because it includes the shim.
const HOST_OVERHEAD: u64 = 4 << 20;

/// The host needs one byte for this many bytes of guest memory: KVM's page tables and the index of the memory's pages
/// take about 1/512 each.
const HOST_OVERHEAD_DIVISOR: u64 = 256;

/// Memory sizes are multiples of this, in bytes.
const ALIGNMENT: u64 = 2 << 20;

const VCPUS_ANNOTATION: &str = "io.containerd.nutshell.vcpus";
const VM_MAX_MEMORY_ANNOTATION: &str = "io.containerd.nutshell.vm.max-memory";
const VM_MAX_VCPUS_ANNOTATION: &str = "io.containerd.nutshell.vm.max-vcpus";
const MEMORY_ANNOTATION: &str = "io.containerd.nutshell.memory_mib";

/// The size of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    /// Guest memory in bytes, a multiple of 2 MiB, overhead included.
    pub(crate) memory: u64,
    pub(crate) vcpus: u8,
}

/// The maxima that a virtual machine's annotations request. `None` means that it does not grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct VmGrowth {
    /// In bytes.
    pub(super) max_memory: Option<u64>,
    pub(super) max_vcpus: Option<u8>,
}

/// Defaults and maxima from the host's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizing {
    /// Memory without an annotation or a limit, in bytes.
    pub(crate) default_memory: u64,
    /// vCPUs without an annotation or a limit.
    pub(crate) default_vcpus: u8,
    /// In bytes.
    pub(crate) max_memory: u64,
    pub(crate) max_vcpus: u8,
}

impl Sizing {
    /// The size of the machine of a single container.
    pub(super) fn size_for_container(
        &self,
        annotations: &HashMap<String, String>,
        limits: Limits,
    ) -> Result<Size, PlanError> {
        let memory_mib = parse_number::<u64>(annotations, MEMORY_ANNOTATION)?
            .map(|mib| check_bounds(MEMORY_ANNOTATION, mib, MIN_MEMORY >> 20, self.max_memory >> 20, "MiB"))
            .transpose()?;
        let vcpus = parse_number::<u64>(annotations, VCPUS_ANNOTATION)?
            .map(|vcpus| check_bounds(VCPUS_ANNOTATION, vcpus, 1, self.max_vcpus.into(), "vCPUs"))
            .transpose()?;
        let memory = memory_mib
            .map(|mib| mib << 20)
            .or_else(|| memory_for(limits))
            .unwrap_or(self.default_memory);
        let vcpus = vcpus
            .or_else(|| vcpus_for(limits))
            .unwrap_or(self.default_vcpus.into())
            .clamp(1, self.max_vcpus.into());
        Ok(Size {
            memory: self.bound_memory(memory),
            vcpus: u8::try_from(vcpus).unwrap_or(self.max_vcpus),
        })
    }

    /// The size of a virtual machine that boots a user's disk. The memory of its guest is the memory limit. It boots
    /// with all vCPUs that it can have.
    pub(super) fn size_for_virtual_machine(
        &self,
        annotations: &HashMap<String, String>,
        limits: Limits,
        growth: VmGrowth,
    ) -> Result<PodSize, PlanError> {
        let size = self.size_for_container(annotations, limits)?;
        let memory = match limits.memory {
            Some(limit) if !annotations.contains_key(MEMORY_ANNOTATION) => self.bound_memory(limit),
            _ => size.memory,
        };
        let vcpus = match growth.max_vcpus {
            None => size.vcpus,
            Some(vcpus) => {
                check_bounds(
                    VM_MAX_VCPUS_ANNOTATION,
                    vcpus.into(),
                    size.vcpus.into(),
                    self.max_vcpus.into(),
                    "vCPUs",
                )?;
                vcpus
            }
        };
        let max_memory = match growth.max_memory {
            None => memory,
            Some(max) => {
                // Rounded up, because it may be no whole number of MiB.
                let mib = max.div_ceil(1 << 20);
                check_bounds(
                    VM_MAX_MEMORY_ANNOTATION,
                    mib,
                    memory >> 20,
                    self.max_memory >> 20,
                    "MiB",
                )?;
                self.bound_memory(max)
            }
        };
        let with_memory = |memory| Size { memory, vcpus };
        Ok(PodSize {
            boot: with_memory(memory),
            max: with_memory(max_memory),
        })
    }

    /// The possible size that is nearest to `memory`, rounded up.
    fn bound_memory(&self, memory: u64) -> u64 {
        memory
            .clamp(MIN_MEMORY, self.max_memory.max(MIN_MEMORY))
            .next_multiple_of(ALIGNMENT)
    }

    /// The sizes of a pod's machine. `limits` are the sums over the pod's containers.
    pub(super) fn size_for_pod(
        &self,
        annotations: &HashMap<String, String>,
        limits: Limits,
    ) -> Result<PodSize, PlanError> {
        let boot = self.size_for_container(annotations, limits)?;
        let max_memory = if annotations.contains_key(MEMORY_ANNOTATION) {
            boot.memory
        } else {
            boot.memory.max(self.max_memory / ALIGNMENT * ALIGNMENT)
        };
        let max_vcpus = if annotations.contains_key(VCPUS_ANNOTATION) {
            boot.vcpus
        } else {
            boot.vcpus
                .saturating_mul(VCPU_GROWTH_FACTOR)
                .min(self.max_vcpus)
                .max(boot.vcpus)
        };
        Ok(PodSize {
            boot,
            max: Size {
                memory: max_memory,
                vcpus: max_vcpus,
            },
        })
    }
}

/// The size that a pod's machine boots with, and the largest size that it can grow to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PodSize {
    /// At boot. The machine never has less.
    pub(crate) boot: Size,
    pub(crate) max: Size,
}

impl PodSize {
    /// A machine that keeps its size.
    pub(crate) fn fixed(size: Size) -> Self {
        Self { boot: size, max: size }
    }

    /// Lowers the memory at boot to what fits into a cgroup of the host with a limit of `cgroup_limit` bytes. `None`
    /// means unlimited.
    #[must_use]
    pub(crate) fn bound_boot_memory(mut self, cgroup_limit: Option<u64>) -> Self {
        self.boot.memory = self
            .boot
            .memory
            .min(self.max_memory_within(cgroup_limit).max(MIN_MEMORY));
        self
    }

    /// The size for containers whose limits sum up to `limits`, in a cgroup of the host with a limit of
    /// `cgroup_limit` bytes. `None` means unlimited.
    pub(crate) fn size_for(&self, limits: Limits, cgroup_limit: Option<u64>) -> Size {
        let max_memory = self.max_memory_within(cgroup_limit).max(self.boot.memory);
        let memory = memory_for(limits).unwrap_or(0);
        let vcpus = vcpus_for(limits).unwrap_or(0);
        Size {
            memory: memory
                .clamp(self.boot.memory, max_memory)
                .next_multiple_of(ALIGNMENT)
                .min(max_memory),
            vcpus: u8::try_from(vcpus)
                .unwrap_or(u8::MAX)
                .clamp(self.boot.vcpus, self.max.vcpus),
        }
    }

    /// The memory of a virtual machine after an update of its limits, in bytes. `None` if the update does not change
    /// the memory limit, or removes it: the machine keeps its memory.
    ///
    /// # Errors
    ///
    /// A limit exceeds the maximum of the machine. The text names the limit, and the annotation that raises the
    /// maximum.
    pub(crate) fn memory_of_virtual_machine(&self, before: Limits, limits: Limits) -> Result<Option<u64>, String> {
        if let Some(vcpus) = vcpus_for(limits).filter(|vcpus| *vcpus > self.boot.vcpus.into()) {
            return Err(format!(
                "the CPU limit needs {vcpus} vCPUs, but the virtual machine has {}: request more at its start by the \
                 annotation {VM_MAX_VCPUS_ANNOTATION}",
                self.boot.vcpus
            ));
        }
        let Some(memory) = limits.memory.filter(|_| limits.memory != before.memory) else {
            return Ok(None);
        };
        if memory > self.max.memory {
            return Err(format!(
                "the memory limit of {} MiB exceeds {} MiB, the maximum of the virtual machine: request more at its \
                 start by the annotation {VM_MAX_MEMORY_ANNOTATION}",
                memory >> 20,
                self.max.memory >> 20
            ));
        }
        let bounded = memory.next_multiple_of(ALIGNMENT).max(MIN_MEMORY);
        Ok(Some(bounded.min(self.max.memory)))
    }

    fn max_memory_within(&self, cgroup_limit: Option<u64>) -> u64 {
        match cgroup_limit {
            Some(limit) => {
                // The rest is guest memory, and one part in HOST_OVERHEAD_DIVISOR on top of it.
                let rest = limit.saturating_sub(HOST_OVERHEAD);
                let memory = rest - rest.div_ceil(HOST_OVERHEAD_DIVISOR + 1);
                self.max.memory.min(memory / ALIGNMENT * ALIGNMENT)
            }
            _ => self.max.memory,
        }
    }
}

/// Memory of a machine for containers with these limits, in bytes.
fn memory_for(limits: Limits) -> Option<u64> {
    let limit = limits.memory?;
    Some(
        limit
            .saturating_add(limit / PAGE_STRUCT_DIVISOR)
            .saturating_add(GUEST_OVERHEAD),
    )
}

fn vcpus_for(limits: Limits) -> Option<u64> {
    Some(limits.millicpus?.div_ceil(1000))
}

fn check_bounds(name: &str, value: u64, min: u64, max: u64, unit: &str) -> Result<u64, PlanError> {
    if (min..=max).contains(&value) {
        Ok(value)
    } else {
        Err(PlanError::invalid(
            format!("annotation {name}"),
            format!("{value} {unit} is not between {min} {unit} and {max} {unit}"),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    const SIZING: Sizing = Sizing {
        default_memory: DEFAULT_MEMORY,
        default_vcpus: DEFAULT_VCPUS,
        max_memory: 8192 * MIB,
        max_vcpus: 8,
    };

    fn limits(memory: i64, quota: i64, period: u64) -> Limits {
        Limits::new(Some(memory), Some(quota), Some(period))
    }

    fn size_for_pod(annotations: &HashMap<String, String>) -> Result<PodSize, PlanError> {
        SIZING.size_for_pod(annotations, Limits::from_annotations(annotations)?)
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
            (Limits::default(), DEFAULT_MEMORY, 1),
            (limits(-1, -1, 100_000), DEFAULT_MEMORY, 1),
            (limits(0, 0, 0), DEFAULT_MEMORY, 1),
            (limits(mib(1), 1, 100_000), MIN_MEMORY, 1),
            (limits(mib(512), 150_000, 100_000), (512 + 8 + 64) * MIB, 2),
            (limits(mib(513), 200_000, 0), 586 * MIB, 2),
            (limits(i64::MAX, i64::MAX, 1), SIZING.max_memory, SIZING.max_vcpus),
        ] {
            let size = SIZING.size_for_container(&HashMap::new(), limits).unwrap();
            assert_eq!(size, Size { memory, vcpus }, "{limits:?}");
        }
    }

    #[test]
    fn memory_limit_of_a_virtual_machine_is_the_memory_of_its_guest() {
        let mib = |mib: u64| i64::try_from(mib * MIB).unwrap();
        for (limits, annotation, memory) in [
            (limits(mib(2048), -1, 0), None, 2048 * MIB),
            (limits(mib(2048), -1, 0), Some("300"), 300 * MIB),
            (limits(mib(1), -1, 0), None, MIN_MEMORY),
            (Limits::default(), None, DEFAULT_MEMORY),
        ] {
            let pairs = annotation.map(|value| (MEMORY_ANNOTATION, value));
            let annotations = annotations(pairs.as_slice());
            let size = SIZING
                .size_for_virtual_machine(&annotations, limits, VmGrowth::default())
                .unwrap();
            assert_eq!(size.boot.memory, memory, "{limits:?} {annotation:?}");
        }
    }

    #[test]
    fn pod_is_sized_by_the_sums_of_its_limits() {
        let pod = annotations(&[
            ("io.kubernetes.cri.sandbox-memory", "1073741824"),
            ("io.kubernetes.cri.sandbox-cpu-quota", "350000"),
            ("io.kubernetes.cri.sandbox-cpu-period", "100000"),
        ]);
        let size = size_for_pod(&pod).unwrap();
        assert_eq!((size.boot.memory, size.boot.vcpus), ((1024 + 16 + 64) * MIB, 4));
        assert_eq!((size.max.memory, size.max.vcpus), (8192 * MIB, 8));
        let unlimited = annotations(&[("io.kubernetes.cri.sandbox-memory", "0")]);
        assert_eq!(size_for_pod(&unlimited).unwrap().boot.memory, DEFAULT_MEMORY);
    }

    #[test]
    fn virtual_machine_grows_up_to_its_annotations() {
        let limits = |memory: u64, millicpus| Limits {
            memory: Some(memory * MIB),
            millicpus: Some(millicpus),
        };
        let size = |growth| SIZING.size_for_virtual_machine(&HashMap::new(), limits(1024, 1500), growth);
        let fixed = size(VmGrowth::default()).unwrap();
        assert_eq!(
            fixed,
            PodSize::fixed(Size {
                memory: 1024 * MIB,
                vcpus: 2
            })
        );
        let growing = size(VmGrowth {
            max_memory: Some(2048 * MIB),
            max_vcpus: Some(4),
        });
        let growing = growing.unwrap();
        assert_eq!((growing.boot.memory, growing.max.memory), (1024 * MIB, 2048 * MIB));
        assert_eq!((growing.boot.vcpus, growing.max.vcpus), (4, 4));

        for (size, limits, expected) in [
            (growing, limits(2048, 4000), Ok(2048 * MIB)),
            (growing, limits(1025, 1), Ok(1026 * MIB)),
            (growing, limits(2050, 1), Err("exceeds 2048 MiB, the maximum")),
            (
                growing,
                limits(1024, 4001),
                Err("needs 5 vCPUs, but the virtual machine has 4"),
            ),
            (
                fixed,
                limits(1026, 1),
                Err("annotation io.containerd.nutshell.vm.max-memory"),
            ),
        ] {
            match (size.memory_of_virtual_machine(Limits::default(), limits), expected) {
                (Ok(memory), Ok(expected)) => assert_eq!(memory, Some(expected)),
                (Err(text), Err(expected)) => assert!(text.contains(expected), "{text}"),
                (found, expected) => panic!("{found:?} instead of {expected:?}"),
            }
        }
        let unlimited = Limits {
            memory: None,
            millicpus: Some(1000),
        };
        for (before, after) in [
            (limits(4096, 1000), limits(4096, 2000)),
            (Limits::default(), unlimited),
            (limits(1024, 1000), unlimited),
        ] {
            assert_eq!(growing.memory_of_virtual_machine(before, after), Ok(None), "{before:?}");
        }
        for (growth, name) in [
            (
                VmGrowth {
                    max_memory: Some(512 * MIB),
                    max_vcpus: None,
                },
                "max-memory: 512 MiB is not between 1024 MiB and 8192 MiB",
            ),
            (
                VmGrowth {
                    max_memory: Some(u64::MAX / 2),
                    max_vcpus: None,
                },
                "max-memory",
            ),
            (
                VmGrowth {
                    max_memory: None,
                    max_vcpus: Some(1),
                },
                "max-vcpus",
            ),
            (
                VmGrowth {
                    max_memory: None,
                    max_vcpus: Some(255),
                },
                "max-vcpus: 255 vCPUs is not between 2 vCPUs and 8 vCPUs",
            ),
        ] {
            let error = size(growth).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn size_set_by_annotation_does_not_grow() {
        let size = size_for_pod(&annotations(&[(MEMORY_ANNOTATION, "256")])).unwrap();
        assert_eq!((size.boot.memory, size.max.memory), (256 * MIB, 256 * MIB));
        assert_eq!((size.boot.vcpus, size.max.vcpus), (1, 4));

        let size = size_for_pod(&annotations(&[(VCPUS_ANNOTATION, "2")])).unwrap();
        assert_eq!((size.boot.vcpus, size.max.vcpus), (2, 2));
    }

    #[test]
    fn size_follows_the_sum_of_limits_between_boot_and_maximum() {
        let of = |memory, quota| limits(memory, quota, 100_000);
        let mib = i64::try_from(MIB).unwrap();
        let boot = Size {
            memory: 512 * MIB,
            vcpus: 1,
        };
        let max = Size {
            memory: 2048 * MIB,
            vcpus: 4,
        };
        let size = PodSize { boot, max };
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
    fn memory_is_bounded_by_the_cgroup_also_if_an_annotation_sets_it() {
        let pod = annotations(&[("io.kubernetes.cri.sandbox-memory", "1073741824")]);
        let size = size_for_pod(&pod).unwrap();
        for (cgroup_limit, boot) in [
            (None, 1024 + 16 + 64),
            (Some(u64::MAX), 1024 + 16 + 64),
            // With the overhead of the RuntimeClass, and without.
            (Some((1024 + 130) * MIB), 1024 + 16 + 64),
            (Some(1024 * MIB), 1024 - 4 - 4),
            (Some(0), MIN_MEMORY / MIB),
        ] {
            assert_eq!(
                size.bound_boot_memory(cgroup_limit).boot.memory / MIB,
                boot,
                "{cgroup_limit:?}"
            );
        }
        let limits = limits(4 << 30, 100_000, 100_000);
        for (cgroup_limit, grown) in [
            (None, 4096 + 64 + 64),
            (Some((4096 + 256) * MIB), 4096 + 64 + 64),
            (Some(4096 * MIB), 4096 - 4 - 16),
            // The limit was lowered to less than the machine booted with.
            (Some(512 * MIB), 1024 + 16 + 64),
        ] {
            assert_eq!(
                size.size_for(limits, cgroup_limit).memory / MIB,
                grown,
                "{cgroup_limit:?}"
            );
        }
        // The largest pod that the RuntimeClass's overhead of 130 MiB suffices for.
        let pod = annotations(&[("io.kubernetes.cri.sandbox-memory", "3221225472")]);
        let size = size_for_pod(&pod).unwrap();
        assert_eq!(size.bound_boot_memory(Some((3072 + 130) * MIB)), size);
        let exact = size_for_pod(&annotations(&[(MEMORY_ANNOTATION, "512")])).unwrap();
        assert_eq!(exact.bound_boot_memory(Some(1024 * MIB)), exact);
        let bounded = exact.bound_boot_memory(Some(256 * MIB));
        assert!(bounded.boot.memory < 256 * MIB, "{bounded:?}");
        assert_eq!(exact.size_for(limits, None).memory, 512 * MIB);
    }

    #[test]
    fn annotations_override_limits() {
        let annotations = annotations(&[(VCPUS_ANNOTATION, "3"), (MEMORY_ANNOTATION, "301")]);
        let size = SIZING
            .size_for_container(&annotations, limits(1 << 30, 100_000, 100_000))
            .unwrap();
        assert_eq!((size.memory, size.vcpus), (302 * MIB, 3));
    }

    #[test]
    fn invalid_annotation_is_an_error_that_names_it() {
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
            let error = SIZING
                .size_for_container(&annotations(&[(name, value)]), Limits::default())
                .unwrap_err();
            assert!(error.to_string().contains(name), "{value}: {error}");
        }
        let error = size_for_pod(&annotations(&[("io.kubernetes.cri.sandbox-memory", "lots")])).unwrap_err();
        assert!(error.to_string().contains("sandbox-memory"), "{error}");
    }
}
