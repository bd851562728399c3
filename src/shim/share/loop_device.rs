//! Loop devices: block devices whose bytes are those of a file (kernel, `drivers/block/loop.c`).

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd,
    path::PathBuf,
};

use rustix::io::Errno;

const CONTROL: &str = "/dev/loop-control";

/// Requests and flags (kernel, `include/uapi/linux/loop.h`).
const LOOP_CTL_GET_FREE: u32 = 0x4c82;
const LOOP_CONFIGURE: u32 = 0x4c0a;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// How often another process may take the free device first.
const MAX_ATTEMPTS: u32 = 64;

/// `struct loop_info64`.
#[repr(C)]
struct Information {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encryption_type: u32,
    encryption_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    encryption_name: [u8; 64],
    encryption_key: [u8; 32],
    initialization: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Configuration {
    descriptor: u32,
    block_size: u32,
    information: Information,
    reserved: [u64; 8],
}

/// A loop device. The kernel frees it when it is neither open nor mounted.
#[derive(Debug)]
pub(super) struct LoopDevice {
    pub(super) path: PathBuf,
    /// Keeps the device until it is mounted.
    _device: File,
}

impl LoopDevice {
    /// Attaches a free device to `file`, which it only reads.
    ///
    /// # Errors
    ///
    /// The kernel has no loop devices (module `loop`), or the file is neither a regular file nor a block device.
    pub(super) fn attach_read_only(file: &File) -> io::Result<Self> {
        let control = OpenOptions::new().read(true).write(true).open(CONTROL);
        let control = control.map_err(|error| io::Error::new(error.kind(), format!("{CONTROL}: {error}")))?;
        let mut attempt = 1;
        loop {
            match attach_free(&control, file) {
                Err(error) if Errno::from_io_error(&error) == Some(Errno::BUSY) && attempt < MAX_ATTEMPTS => {
                    attempt += 1;
                }
                attached => return attached,
            }
        }
    }
}

fn attach_free(control: &File, file: &File) -> io::Result<LoopDevice> {
    // SAFETY: LOOP_CTL_GET_FREE takes no argument.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), libc::Ioctl::from(LOOP_CTL_GET_FREE)) };
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    let path = PathBuf::from(format!("/dev/loop{number}"));
    let device = File::open(&path)?;
    let configuration = Configuration {
        descriptor: file.as_raw_fd().cast_unsigned(),
        block_size: 0,
        information: Information {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encryption_type: 0,
            encryption_key_size: 0,
            flags: LO_FLAGS_AUTOCLEAR | LO_FLAGS_READ_ONLY,
            file_name: [0; 64],
            encryption_name: [0; 64],
            encryption_key: [0; 32],
            initialization: [0; 2],
        },
        reserved: [0; 8],
    };
    // SAFETY: LOOP_CONFIGURE reads the configuration, which outlives the call.
    let configured = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            libc::Ioctl::from(LOOP_CONFIGURE),
            &raw const configuration,
        )
    };
    match configured {
        0 => Ok(LoopDevice { path, _device: device }),
        _ => Err(io::Error::last_os_error()),
    }
}
