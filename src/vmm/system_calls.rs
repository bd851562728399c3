//! The system calls of the vmm's process and threads. The lists of devices' threads are in [`crate::devices`].

use crate::{
    devices::system_calls::{ACTIVATION, BLOCK, DISK_SIZES, NET},
    jail::seccomp::{
        Call, CallList, allowed,
        runtime::{EVERY_THREAD, REFUSED_WITHOUT_FILES, START_OF_THREADS, WAIT_FOR_EVENTS},
    },
};

/// The numbers of KVM's ioctls (`include/uapi/linux/kvm.h`). kvm-ioctls does not export them.
mod kvm {
    pub(super) const GET_API_VERSION: u32 = 0xae00;
    pub(super) const CREATE_VM: u32 = 0xae01;
    pub(super) const CHECK_EXTENSION: u32 = 0xae03;
    pub(super) const GET_VCPU_MMAP_SIZE: u32 = 0xae04;
    pub(super) const GET_SUPPORTED_CPUID: u32 = 0xc008_ae05;
    pub(super) const CREATE_VCPU: u32 = 0xae41;
    pub(super) const SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
    pub(super) const SET_TSS_ADDR: u32 = 0xae47;
    pub(super) const SET_IDENTITY_MAP_ADDR: u32 = 0x4008_ae48;
    pub(super) const CREATE_IRQCHIP: u32 = 0xae60;
    pub(super) const SET_GSI_ROUTING: u32 = 0x4008_ae6a;
    pub(super) const IRQFD: u32 = 0x4020_ae76;
    pub(super) const IOEVENTFD: u32 = 0x4040_ae79;
    pub(super) const RUN: u32 = 0xae80;
    pub(super) const GET_REGS: u32 = 0x8090_ae81;
    pub(super) const SET_REGS: u32 = 0x4090_ae82;
    pub(super) const GET_SREGS: u32 = 0x8138_ae83;
    pub(super) const SET_SREGS: u32 = 0x4138_ae84;
    pub(super) const SET_MSRS: u32 = 0x4008_ae89;
    pub(super) const GET_LAPIC: u32 = 0x8400_ae8e;
    pub(super) const SET_LAPIC: u32 = 0x4400_ae8f;
    pub(super) const SET_CPUID2: u32 = 0x4008_ae90;
    pub(super) const SET_XCRS: u32 = 0x4188_aea7;
}

/// The ioctls of a vCPU. They come first in each list that has them: the kernel compares the number of an ioctl with
/// the values one after the other, each time a vCPU enters the guest.
const VCPU_CALLS: &[Call] = &[allowed!(
    SYS_ioctl[1] in [kvm::RUN, kvm::IRQFD, kvm::IOEVENTFD, kvm::SET_GSI_ROUTING, kvm::GET_REGS],
    "running a guest; interrupts and doorbells of PCI devices; the address of an instruction that KVM cannot emulate"
)];

/// What accesses to registers of devices need.
const REGISTER_CALLS: &[Call] = &[allowed!(SYS_ppoll, "the pending bits of MSI-X interrupts")];

/// The thread of a vCPU. It activates devices, and the threads of their queues inherit its list.
pub(crate) const VCPU: CallList = CallList {
    thread: "vcpu",
    own: &[VCPU_CALLS, REGISTER_CALLS, EVERY_THREAD, START_OF_THREADS, ACTIVATION],
    starts: &[&BLOCK, &NET],
    refused: REFUSED_WITHOUT_FILES,
};

const EVENT_LOOP_CALLS: &[Call] = &[
    allowed!(
        SYS_ppoll,
        "the wait for the reader of the console after the end of the machine"
    ),
    allowed!(SYS_recvfrom, "the end of the stream at a named port"),
    allowed!(SYS_shutdown, "streams of the guest: sockets"),
    allowed!(SYS_readv, "streams of the guest"),
    allowed!(SYS_writev, "streams of the guest"),
    allowed!(SYS_fcntl[1] in [libc::F_GETFL as u32, libc::F_SETFL as u32], "descriptors of streams"),
    allowed!(SYS_lseek, "the size of a block device"),
    allowed!(SYS_statx, "the size of a disk"),
    allowed!(
        SYS_ftruncate,
        "the size of a new copy-on-write file, memory that is added"
    ),
    allowed!(SYS_memfd_create, "memory that is added"),
    allowed!(SYS_fcntl[1] in [libc::F_ADD_SEALS as u32], "memory that is added"),
    allowed!(SYS_mmap[2] without libc::PROT_EXEC as u32, "memory that is added, vCPUs that are added"),
    allowed!(
        SYS_ioctl[1] in [
            kvm::SET_USER_MEMORY_REGION, kvm::CREATE_VCPU, kvm::GET_VCPU_MMAP_SIZE, kvm::CHECK_EXTENSION,
            kvm::GET_SUPPORTED_CPUID, kvm::SET_CPUID2, kvm::SET_MSRS, kvm::SET_XCRS, kvm::GET_LAPIC, kvm::SET_LAPIC,
            kvm::GET_SREGS, kvm::SET_SREGS, kvm::SET_REGS
        ],
        "memory and vCPUs that are added"
    ),
];

/// The thread of the event loop, once the machine runs.
pub(crate) const EVENT_LOOP: CallList = CallList {
    thread: "event loop",
    own: &[
        VCPU_CALLS,
        EVENT_LOOP_CALLS,
        EVERY_THREAD,
        START_OF_THREADS,
        WAIT_FOR_EVENTS,
        ACTIVATION,
    ],
    starts: &[&VCPU, &DISK_SIZES, &UNPLUG],
    refused: REFUSED_WITHOUT_FILES,
};

const BUILD_CALLS: &[Call] = &[
    allowed!(
        SYS_ioctl[1] in [
            kvm::GET_API_VERSION, kvm::CREATE_VM, kvm::SET_TSS_ADDR, kvm::SET_IDENTITY_MAP_ADDR, kvm::CREATE_IRQCHIP
        ],
        "creating the machine"
    ),
    allowed!(SYS_memfd_create, "the guest's memory"),
    allowed!(SYS_fcntl[1] in [libc::F_ADD_SEALS as u32, libc::F_GET_SEALS as u32], "the guest's memory"),
    allowed!(SYS_sendfile, "the copy of kernel and initramfs into the guest's memory"),
    allowed!(SYS_timerfd_create, "the timer that finds stalled queues"),
];

/// The process, from the jail until the machine is built.
pub(crate) const PROCESS: CallList = CallList {
    thread: "build",
    own: &[VCPU_CALLS, BUILD_CALLS, EVERY_THREAD, START_OF_THREADS, WAIT_FOR_EVENTS],
    starts: &[&EVENT_LOOP, &VCPU, &DISK_SIZES],
    refused: REFUSED_WITHOUT_FILES,
};

/// The thread that waits until an unplugged disk is unused.
pub(crate) const UNPLUG: CallList = CallList {
    thread: "unplug",
    own: &[
        EVERY_THREAD,
        &[
            allowed!(SYS_ioctl[1] in [kvm::IRQFD, kvm::IOEVENTFD], "interrupts and doorbells of a PCI device"),
            allowed!(SYS_sendmsg, "the notice for the shim"),
        ],
    ],
    starts: &[],
    refused: REFUSED_WITHOUT_FILES,
};

#[cfg(test)]
mod tests {
    use std::thread;

    use super::VCPU;
    use crate::{
        devices::pci::msix::{MessageTable, mock::MockVector},
        jail::seccomp,
    };

    #[test]
    fn vcpu_reads_pending_interrupts_under_its_list() {
        let reader = thread::spawn(|| {
            seccomp::testing::limit_thread(&VCPU);
            let (vector, _) = MockVector::pair();
            vector.event().write(1).unwrap();
            let mut bits = [0; 8];
            MessageTable::new("test".to_owned(), vec![vector]).read_pending(0, &mut bits);
            bits
        });
        assert_eq!(reader.join().unwrap(), [1, 0, 0, 0, 0, 0, 0, 0]);
    }
}
