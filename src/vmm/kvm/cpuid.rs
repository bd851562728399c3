//! The CPUID tables of vCPUs: the features that KVM supports on this host, except for leaves that differ between vCPUs
//! or must not have the host's values.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_MULTI_THREADED: u32 = 1 << 28;

/// The CPUID table for vCPU `id` of `count`. The vCPUs are the cores of one package, so that the guest calibrates its
/// delay loop only once; hardware threads would misrepresent the host's topology.
pub(super) fn for_vcpu(supported: &CpuId, id: u8, count: u8) -> CpuId {
    let mut table = supported.clone();
    for entry in table.as_mut_slice() {
        rewrite_leaf(entry, id, count);
    }
    table
}

/// The components of the extended state (bits of XCR0) that a vCPU with this table supports; 0 without XSAVE.
pub(super) fn xcr0_components(table: &CpuId) -> u64 {
    let leaf = table
        .as_slice()
        .iter()
        .find(|entry| (entry.function, entry.index) == (0xd, 0));
    leaf.map_or(0, |entry| u64::from(entry.eax) | u64::from(entry.edx) << 32)
}

fn rewrite_leaf(entry: &mut kvm_cpuid_entry2, id: u8, count: u8) {
    let (id, count) = (u32::from(id), u32::from(count));
    let id_bits = count.next_power_of_two().trailing_zeros();
    match (entry.function, entry.index) {
        // Intel SDM 2A, CPUID: initial APIC ID, logical processors in the package.
        (0x1, _) => {
            entry.ebx = entry.ebx & 0x0000_ffff | id << 24 | count << 16;
            entry.ecx |= ECX_TSC_DEADLINE | ECX_HYPERVISOR;
            entry.edx = if count > 1 {
                entry.edx | EDX_MULTI_THREADED
            } else {
                entry.edx & !EDX_MULTI_THREADED
            };
        }
        // Caches: the number of threads that share each, and the number of cores.
        (0x4, _) if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | (count - 1).min(63) << 26;
        }
        // No performance counters: probing them takes boot time, and they belong to the host.
        (0xa, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // Topology: level 0 threads, level 1 cores.
        (0xb | 0x1f, 0) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 1, 1 << 8, id),
        (0xb | 0x1f, 1) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (id_bits, count, 2 << 8 | 1, id),
        (0xb | 0x1f, index) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, index, id),
        // AMD APM 3, CPUID: cores in the package.
        (0x8000_0008, _) => entry.ecx = entry.ecx & !0xf0ff | id_bits << 12 | (count - 1),
        // AMD: caches, and extended APIC ID with one thread per core.
        (0x8000_001d, _) if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
        }
        (0x8000_001e, _) => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> CpuId {
        let entry = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            ebx: 0x0b0a_0908,
            ..kvm_cpuid_entry2::default()
        };
        CpuId::from_entries(&[entry(0x1, 0), entry(0xa, 0), entry(0xb, 0), entry(0xb, 1)]).unwrap()
    }

    #[test]
    fn each_vcpu_has_a_distinct_apic_id_in_one_package() {
        for (id, count) in [(0, 1), (1, 2), (63, 64)] {
            let table = for_vcpu(&table(), id, count);
            let leaves = table.as_slice();
            assert_eq!(leaves[0].ebx >> 24, u32::from(id));
            assert_eq!(leaves[0].ebx >> 16 & 0xff, u32::from(count));
            assert_eq!(
                leaves[0].ebx & 0xffff,
                0x0908,
                "brand index and cache line size are kept"
            );
            assert_eq!(leaves[3].ebx, u32::from(count));
            assert_eq!(leaves[3].edx, u32::from(id));
            assert_eq!(1 << leaves[3].eax, u32::from(count).next_power_of_two());
        }
    }

    #[test]
    fn guest_has_hypervisor_bit_and_deadline_timer_but_no_performance_counters() {
        let table = for_vcpu(&table(), 0, 1);
        let leaves = table.as_slice();
        assert_eq!(
            leaves[0].ecx & (ECX_TSC_DEADLINE | ECX_HYPERVISOR),
            ECX_TSC_DEADLINE | ECX_HYPERVISOR
        );
        assert_eq!(leaves[1].ebx, 0);
    }
}
