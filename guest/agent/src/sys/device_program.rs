//! Loads and attaches the BPF programs that restrict a cgroup's access to devices (bpf(2)).

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nutshell_linux::bpf::Instruction;

use super::check;

// Commands, program and attach types, and flags of bpf(2) (kernel, `include/uapi/linux/bpf.h`).
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 1 << 1;

/// The first fields of `union bpf_attr` for BPF_PROG_LOAD. The kernel treats missing fields as zero (bpf(2)).
#[repr(C)]
struct BpfLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
}

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
    let attributes = BpfLoad {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr().addr() as u64,
        license: c"".as_ptr().addr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
    };
    // SAFETY: the attributes, and the instructions and string that they point to, outlive the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const attributes,
            size_of::<BpfLoad>(),
        )
    };
    let fd = check(i32::try_from(fd).unwrap_or(-1))?;
    // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
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
