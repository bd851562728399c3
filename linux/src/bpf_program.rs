//! Loads BPF programs (bpf(2)).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::bpf::Instruction;

// Commands and map types (`linux/bpf.h`).
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;

// The first fields of `union bpf_attr` for each command. The kernel treats missing fields as zero.

#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
struct MapUpdate {
    map: RawFd,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgramLoad {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

#[repr(C)]
struct LinkCreate {
    program: RawFd,
    target: RawFd,
    attach_type: u32,
    flags: u32,
}

/// Loads a program of type `kind`, and returns its descriptor. `attach_type` is where it will be attached, if programs
/// of this type can be attached to several places, and 0 otherwise.
///
/// # Errors
///
/// The error of bpf(2): the caller lacks `CAP_BPF`, or the kernel refuses the program.
pub fn load_program(kind: u32, attach_type: u32, instructions: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = ProgramLoad {
        kind,
        instruction_count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: instructions.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        attach_type,
        ..ProgramLoad::default()
    };
    // SAFETY: the attributes of BPF_PROG_LOAD; instructions and license outlive the call.
    unsafe { bpf(BPF_PROG_LOAD, &attributes) }.and_then(own_descriptor)
}

/// Creates a map of `size` sockets. Its keys are their indexes.
pub(crate) fn create_socket_map(size: u32) -> io::Result<OwnedFd> {
    let attributes = MapCreate {
        kind: BPF_MAP_TYPE_SOCKMAP,
        key_size: 4,
        value_size: 8,
        max_entries: size,
    };
    // SAFETY: the attributes of BPF_MAP_CREATE, which has no pointers.
    unsafe { bpf(BPF_MAP_CREATE, &attributes) }.and_then(own_descriptor)
}

/// Puts a socket into a map of [`create_socket_map`].
pub(crate) fn insert_socket(map: &OwnedFd, index: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
    let value = i64::from(socket.as_raw_fd());
    let attributes = MapUpdate {
        map: map.as_raw_fd(),
        padding: 0,
        key: (&raw const index).addr() as u64,
        value: (&raw const value).addr() as u64,
        flags: 0,
    };
    // SAFETY: the attributes of BPF_MAP_UPDATE_ELEM; key and value have the map's sizes and outlive the call.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &attributes) }.map(drop)
}

/// Attaches a program to `target` until the last copy of the result is closed.
pub(crate) fn attach_program(program: &OwnedFd, target: BorrowedFd<'_>, attach_type: u32) -> io::Result<OwnedFd> {
    let attributes = LinkCreate {
        program: program.as_raw_fd(),
        target: target.as_raw_fd(),
        attach_type,
        flags: 0,
    };
    // SAFETY: the attributes of BPF_LINK_CREATE, which has no pointers.
    unsafe { bpf(BPF_LINK_CREATE, &attributes) }.and_then(own_descriptor)
}

/// Calls bpf(2).
///
/// # Safety
///
/// `attributes` must be those of `command`, and the memory that they point to must be as large as the command needs.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: by this function's own contract.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    match result {
        0.. => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

fn own_descriptor(descriptor: libc::c_long) -> io::Result<OwnedFd> {
    let descriptor = RawFd::try_from(descriptor).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it for this process, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
