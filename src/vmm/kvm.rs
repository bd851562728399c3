//! The virtual machine as KVM knows it: memory slots, the in-kernel interrupt controller, eventfds
//! in place of exits, and the processors' features and first state.

use std::{
    io,
    ops::Range,
    os::fd::{FromRawFd, IntoRawFd, OwnedFd},
};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_segment,
    kvm_userspace_memory_region, kvm_xcrs,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::{boot, cpuid};
use crate::memory::MemoryRegions;

/// Three pages that VT-x wants for real mode, in the device window, where no device is.
const TSS: usize = 0xfffb_d000;
/// One page for the same, before it.
const IDENTITY_MAP: u64 = 0xfffb_c000;

/// How often `KVM_CREATE_VM` is tried: a signal that arrives meanwhile ends it with EINTR.
const CREATE_ATTEMPTS: u32 = 5;

const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
const FAST_STRINGS: u64 = 1;

const CR0_PROTECTED: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;

/// What KVM refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KvmError {
    /// An ioctl failed.
    #[error("KVM: {what}: {source}")]
    Call {
        /// What it was to do.
        what: &'static str,
        /// Why it did not.
        source: io::Error,
    },
    /// What the shim was given as KVM is something else.
    #[error("/dev/kvm is not KVM's device: load the module kvm_intel or kvm_amd")]
    NoKvm,
    /// `KVM_CREATE_VM` failed with `EBUSY`.
    #[error(
        "/dev/kvm is busy: another hypervisor (VirtualBox, VMware) has the processor's virtualization; end it, or \
         unload its module"
    )]
    Busy,
    /// An interface that we need is missing.
    #[error("this host's KVM lacks {0}, which nutshell needs: a newer kernel has it")]
    Lacks(&'static str),
}

/// Names what a call was to do.
fn call<T>(what: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, KvmError> {
    result.map_err(|error| KvmError::Call {
        what,
        source: error.into(),
    })
}

fn not_created(error: kvm_ioctls::Error) -> KvmError {
    if error.errno() == libc::EBUSY {
        return KvmError::Busy;
    }
    KvmError::Call {
        what: "creating the machine",
        source: error.into(),
    }
}

/// A machine without processors yet.
#[derive(Debug)]
pub(crate) struct Vm {
    kvm: Kvm,
    vm: VmFd,
    memory_slots: u32,
}

impl Vm {
    /// Creates the machine with the interrupt controller and `memory`.
    pub(crate) fn new(device: OwnedFd, memory: &MemoryRegions) -> Result<Self, KvmError> {
        // SAFETY: the shim opened this descriptor on /dev/kvm, and it is owned here alone.
        let kvm = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
        if i64::from(kvm.get_api_version()) != i64::from(KVM_API_VERSION) {
            return Err(KvmError::NoKvm);
        }
        for (capability, name) in [
            (Cap::Irqchip, "the interrupt controller"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::Irqfd, "irqfd"),
            (Cap::UserMemory, "user memory"),
            (Cap::TscDeadlineTimer, "the TSC deadline timer"),
        ] {
            if !kvm.check_extension(capability) {
                return Err(KvmError::Lacks(name));
            }
        }
        let vm = create(&kvm).map_err(not_created)?;
        call("placing the task segment", vm.set_tss_address(TSS))?;
        call("placing the identity map", vm.set_identity_map_address(IDENTITY_MAP))?;
        call("creating the interrupt controller", vm.create_irq_chip())?;
        let mut this = Self {
            kvm,
            vm,
            memory_slots: 0,
        };
        this.add_memory(memory)?;
        Ok(this)
    }

    /// Gives the machine the regions of `memory` that it does not have yet: those behind the ones that
    /// an earlier call named.
    pub(crate) fn add_memory(&mut self, memory: &MemoryRegions) -> Result<(), KvmError> {
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
            // SAFETY: the range is guest memory, mapped until the process ends, and each range is
            // given once; Rust holds no reference into it.
            call("adding memory", unsafe { self.vm.set_user_memory_region(region) })?;
            self.memory_slots = slot + 1;
        }
        Ok(())
    }

    /// Makes a guest's 32-bit write of `value` to `address` an event of `event`, without an exit
    /// to this process.
    pub(crate) fn signal_on_write(&self, event: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        let address = IoEventAddress::Mmio(address);
        call("adding an ioeventfd", self.vm.register_ioevent(event, &address, value))
    }

    /// Makes an event of `event` an interrupt on `line`.
    pub(crate) fn interrupt_on(&self, event: &EventFd, line: u32) -> Result<(), KvmError> {
        call("adding an irqfd", self.vm.register_irqfd(event, line))
    }

    /// Creates the processors `ids` of `most`, which wait to be started by the first.
    pub(crate) fn create_vcpus(&self, ids: Range<u8>, most: u8) -> Result<Vec<VcpuFd>, KvmError> {
        let supported = call(
            "reading CPU features",
            self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES),
        )?;
        ids.map(|id| {
            let vcpu = call("creating a processor", self.vm.create_vcpu(id.into()))?;
            set_features(&vcpu, &supported, id, most)?;
            Ok(vcpu)
        })
        .collect()
    }
}

fn create(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    let mut attempts = 1;
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR && attempts < CREATE_ATTEMPTS => attempts += 1,
            other => return other,
        }
    }
}

fn set_features(vcpu: &VcpuFd, supported: &CpuId, id: u8, count: u8) -> Result<(), KvmError> {
    let features = cpuid::for_vcpu(supported, id, count);
    call("setting CPU features", vcpu.set_cpuid2(&features))?;
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    };
    let registers = Msrs::from_entries(&[
        entry(MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLED_WRITE_BACK),
        entry(MSR_MISC_ENABLE, FAST_STRINGS),
    ]);
    let registers = registers.map_err(|_| KvmError::Lacks("model-specific registers"))?;
    // KVM takes as many as it knows; a host without one of the two boots as well.
    call("setting model-specific registers", vcpu.set_msrs(&registers))?;
    enable_extended_state(vcpu, cpuid::extended_state(&features))
}

/// Enables every part of the extended state that the processor has, as the guest will. KVM derives
/// the size in CPUID leaf 0xD from this register; under QEMU's emulation of AMD's virtualization it
/// does not see the guest set it, and the guest would find size and register at odds.
fn enable_extended_state(vcpu: &VcpuFd, parts: u64) -> Result<(), KvmError> {
    if parts == 0 {
        return Ok(());
    }
    let mut registers = kvm_xcrs {
        nr_xcrs: 1,
        ..kvm_xcrs::default()
    };
    registers.xcrs[0].value = parts;
    call("setting the extended state", vcpu.set_xcrs(&registers))
}

/// Lets a processor that came while others run be reached by them: KVM finds the target of an interrupt, such
/// as the one that starts it, in a map that it makes anew when the state of an interrupt controller is set.
pub(crate) fn announce(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let state = call("reading a local interrupt controller", vcpu.get_lapic())?;
    call("setting a local interrupt controller", vcpu.set_lapic(&state))
}

/// Has the first processor start at `entry` in 64-bit mode as Linux wants it
/// (Documentation/arch/x86/boot.rst, "64-bit boot protocol").
pub(crate) fn set_entry(vcpu: &VcpuFd, entry: u64) -> Result<(), KvmError> {
    let mut sregs = call("reading a processor's state", vcpu.get_sregs())?;
    sregs.gdt.base = boot::GDT;
    sregs.gdt.limit = u16::try_from(size_of_val(&boot::DESCRIPTORS) - 1).unwrap_or(0);
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    let code = segment(1);
    let data = segment(2);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(3);
    sregs.cr0 |= CR0_PROTECTED | CR0_PAGING;
    sregs.cr3 = boot::PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LONG_MODE;
    call("setting a processor's state", vcpu.set_sregs(&sregs))?;
    let regs = kvm_regs {
        rflags: 2,
        rip: entry,
        rsi: boot::ZERO_PAGE,
        rsp: boot::ZERO_PAGE,
        ..kvm_regs::default()
    };
    call("setting a processor's registers", vcpu.set_regs(&regs))
}

/// Descriptor `index` of [`boot::DESCRIPTORS`] as a loaded segment (Intel SDM 3A §3.4.5).
fn segment(index: u8) -> kvm_segment {
    let descriptor = boot::DESCRIPTORS[usize::from(index)];
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
    fn busy_device_is_named_and_other_failures_keep_their_reason() {
        let text = |errno| not_created(kvm_ioctls::Error::new(errno)).to_string();
        assert!(text(libc::EBUSY).starts_with("/dev/kvm is busy"));
        assert!(text(libc::ENOMEM).contains("Cannot allocate memory"));
    }

    #[test]
    fn segments_are_those_of_64_bit_boot() {
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
