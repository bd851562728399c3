//! Loads and attaches the BPF programs that restrict a cgroup's access to devices (bpf(2)).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nutshell_linux::bpf::Instruction;
use nutshell_linux::bpf_program::load_program;

use super::check;

// Command, program and attach type, and flag of bpf(2) (kernel, `include/uapi/linux/bpf.h`).
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 1 << 1;

/// The first fields of `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C)]
struct BpfAttach {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

/// Loads a program of type BPF_PROG_TYPE_CGROUP_DEVICE, and returns its descriptor.
pub(crate) fn load_device_program(program: &[Instruction]) -> io::Result<OwnedFd> {
    load_program(BPF_PROG_TYPE_CGROUP_DEVICE, 0, program)
}

/// Attaches a program of [`load_device_program`] to the cgroup whose directory is `cgroup`.
pub(crate) fn attach_device_program(program: impl AsFd, cgroup: impl AsFd) -> io::Result<()> {
    let attributes = BpfAttach {
        target: cgroup.as_fd().as_raw_fd().unsigned_abs(),
        program: program.as_fd().as_raw_fd().unsigned_abs(),
        attach_type: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the attributes outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            &raw const attributes,
            size_of::<BpfAttach>(),
        )
    };
    check(i32::try_from(result).unwrap_or(-1)).map(drop)
}
