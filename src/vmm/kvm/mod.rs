//! The virtual machine in KVM: memory slots, the in-kernel interrupt controller, [`events`], and the features
//! ([`cpuid`]) and initial state of vCPUs.
//!
//! Does not belong here: devices, and the content of guest memory. Callers are [`super::build`], [`super::board`] and
//! [`super::machine::growth`].

mod cpuid;
mod error;
mod events;

use std::{
    io,
    ops::Range,
    os::fd::{FromRawFd, IntoRawFd, OwnedFd},
    sync::Arc,
};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_segment,
    kvm_userspace_memory_region, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

pub(crate) use self::error::KvmError;
use self::error::check;
pub(super) use self::events::VmEvents;
use super::boot;
use crate::memory::MemoryRegions;

/// The guest physical address of three pages that VT-x needs for real mode. They lie in the device window, at addresses
/// without a device.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// The guest physical address of one more page that VT-x needs for real mode.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// The maximum number of `KVM_CREATE_VM` calls: a signal interrupts the call with EINTR.
const MAX_CREATE_ATTEMPTS: u32 = 5;

const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
const FAST_STRINGS: u64 = 1;

const CR0_PROTECTED: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;

fn creation_error(error: kvm_ioctls::Error) -> KvmError {
    if error.errno() == libc::EBUSY {
        return KvmError::Busy;
    }
    KvmError::Call {
        what: "creating the machine",
        source: error.into(),
    }
}

/// The virtual machine. It does not own its vCPUs.
#[derive(Debug)]
pub(super) struct Vm {
    kvm: Kvm,
    vm: Arc<VmFd>,
    events: VmEvents,
    /// The number of memory slots in use.
    memory_slots: u32,
}

impl Vm {
    /// Creates the virtual machine, with the interrupt controller and `memory`. `device` is `/dev/kvm`.
    pub(super) fn new(device: OwnedFd, memory: &MemoryRegions) -> Result<Self, KvmError> {
        // SAFETY: the shim opened this descriptor on /dev/kvm, and nothing else owns it.
        let kvm = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
        if i64::from(kvm.get_api_version()) != i64::from(KVM_API_VERSION) {
            return Err(KvmError::NotKvm);
        }
        for (capability, name) in [
            (Cap::Irqchip, "the interrupt controller"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::Irqfd, "irqfd"),
            (Cap::IrqRouting, "interrupt routing"),
            (Cap::UserMemory, "user memory"),
            (Cap::TscDeadlineTimer, "the TSC deadline timer"),
        ] {
            if !kvm.check_extension(capability) {
                return Err(KvmError::MissingCapability(name));
            }
        }
        let vm = create_vm(&kvm).map_err(creation_error)?;
        check("placing the task segment", vm.set_tss_address(TSS_ADDRESS))?;
        check(
            "placing the identity map",
            vm.set_identity_map_address(IDENTITY_MAP_ADDRESS),
        )?;
        check("creating the interrupt controller", vm.create_irq_chip())?;
        let vm = Arc::new(vm);
        let mut this = Self {
            kvm,
            events: VmEvents::new(vm.clone()),
            vm,
            memory_slots: 0,
        };
        this.add_memory(memory)?;
        Ok(this)
    }

    /// Adds the regions of `memory` that the machine does not have yet. `memory` must start with the regions of the
    /// previous call.
    pub(super) fn add_memory(&mut self, memory: &MemoryRegions) -> Result<(), KvmError> {
        for (slot, region) in (0..).zip(memory.iter()).skip(self.memory_slots as usize) {
            let host = memory
                .get_host_address(region.start_addr())
                .map_err(|error| KvmError::Call {
                    what: "finding guest memory",
                    source: io::Error::other(error),
                })?;
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: host.addr() as u64,
            };
            // SAFETY: the range is guest memory, which is mapped until the process ends. Each range is added once, and
            // no Rust reference into it exists.
            check("adding memory", unsafe { self.vm.set_user_memory_region(region) })?;
            self.memory_slots = slot + 1;
        }
        Ok(())
    }

    /// The interface that connects eventfds to the machine.
    pub(super) fn events(&self) -> &VmEvents {
        &self.events
    }

    /// Creates the vCPUs `ids` of a machine with at most `max` vCPUs. All but the first (ID 0) wait until the guest
    /// starts them.
    pub(super) fn create_vcpus(&self, ids: Range<u8>, max: u8) -> Result<Vec<VcpuFd>, KvmError> {
        let supported = check(
            "reading CPU features",
            self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES),
        )?;
        ids.map(|id| {
            let vcpu = check("creating a vCPU", self.vm.create_vcpu(id.into()))?;
            set_features(&vcpu, &supported, id, max)?;
            Ok(vcpu)
        })
        .collect()
    }
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    let mut attempts = 1;
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR && attempts < MAX_CREATE_ATTEMPTS => attempts += 1,
            other => return other,
        }
    }
}

fn set_features(vcpu: &VcpuFd, supported: &CpuId, id: u8, count: u8) -> Result<(), KvmError> {
    let features = cpuid::for_vcpu(supported, id, count);
    check("setting CPU features", vcpu.set_cpuid2(&features))?;
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    };
    let registers = Msrs::from_entries(&[
        entry(MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLED_WRITE_BACK),
        entry(MSR_MISC_ENABLE, FAST_STRINGS),
    ]);
    let registers = registers.map_err(|_| KvmError::MissingCapability("model-specific registers"))?;
    // KVM sets the registers that it supports. The guest also boots without them.
    check("setting model-specific registers", vcpu.set_msrs(&registers))?;
    enable_extended_state(vcpu, cpuid::xcr0_components(&features))
}

/// Sets XCR0 to all supported components of the extended state, as the guest will do. KVM derives the size in CPUID
/// leaf 0xD from XCR0. Under QEMU's emulation of AMD-V, KVM does not see the guest set XCR0, and the size would not
/// match it.
fn enable_extended_state(vcpu: &VcpuFd, components: u64) -> Result<(), KvmError> {
    if components == 0 {
        return Ok(());
    }
    let mut registers = kvm_xcrs {
        nr_xcrs: 1,
        ..kvm_xcrs::default()
    };
    registers.xcrs[0].value = components;
    check("setting the extended state", vcpu.set_xcrs(&registers))
}

/// Makes a hot-added vCPU reachable by interrupts, including the one that starts it. KVM looks up the target of an
/// interrupt in a map, which it rebuilds when the state of a local interrupt controller is set.
pub(super) fn make_reachable(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let state = check("reading a local interrupt controller", vcpu.get_lapic())?;
    check("setting a local interrupt controller", vcpu.set_lapic(&state))
}

/// Sets the initial state of the first vCPU: it starts at `entry` in 64-bit mode, as Linux requires
/// (Documentation/arch/x86/boot.rst, "64-bit boot protocol").
pub(super) fn set_entry(vcpu: &VcpuFd, entry: u64) -> Result<(), KvmError> {
    let mut sregs = check("reading the state of a vCPU", vcpu.get_sregs())?;
    sregs.gdt.base = boot::layout::GDT;
    sregs.gdt.limit = u16::try_from(size_of_val(&boot::layout::GDT_ENTRIES) - 1).unwrap_or(0);
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    let code = segment(1);
    let data = segment(2);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(3);
    sregs.cr0 |= CR0_PROTECTED | CR0_PAGING;
    sregs.cr3 = boot::layout::PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LONG_MODE;
    check("setting the state of a vCPU", vcpu.set_sregs(&sregs))?;
    let regs = kvm_regs {
        rflags: 2,
        rip: entry,
        rsi: boot::layout::ZERO_PAGE,
        rsp: boot::layout::ZERO_PAGE,
        ..kvm_regs::default()
    };
    check("setting the registers of a vCPU", vcpu.set_regs(&regs))
}

/// Entry `index` of [`boot::layout::GDT_ENTRIES`] as a loaded segment (Intel SDM 3A §3.4.5).
fn segment(index: u8) -> kvm_segment {
    let descriptor = boot::layout::GDT_ENTRIES[usize::from(index)];
    let bits = |from: u32, count: u32| u8::try_from(descriptor >> from & ((1 << count) - 1)).unwrap_or(0);
    let limit = u32::try_from(descriptor & 0xffff | descriptor >> 32 & 0xf_0000).unwrap_or(0);
    kvm_segment {
        base: 0,
        limit: if bits(55, 1) == 1 { limit << 12 | 0xfff } else { limit },
        selector: u16::from(index) * 8,
        type_: bits(40, 4),
        present: bits(47, 1),
        dpl: bits(45, 2),
        db: bits(54, 1),
        s: bits(44, 1),
        l: bits(53, 1),
        g: bits(55, 1),
        avl: bits(52, 1),
        unusable: 0,
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_device_has_a_message_and_other_failures_keep_their_reason() {
        let text = |errno| creation_error(kvm_ioctls::Error::new(errno)).to_string();
        assert!(text(libc::EBUSY).starts_with("/dev/kvm is busy"));
        assert!(text(libc::ENOMEM).contains("Cannot allocate memory"));
    }

    #[test]
    fn segments_match_the_64_bit_boot_protocol() {
        let code = segment(1);
        assert_eq!(
            (code.selector, code.type_, code.l, code.db, code.limit),
            (8, 11, 1, 0, u32::MAX)
        );
        let data = segment(2);
        assert_eq!((data.selector, data.type_, data.s, data.present), (16, 3, 1, 1));
        let task = segment(3);
        assert_eq!((task.type_, task.s, task.present), (11, 0, 1));
    }
}
