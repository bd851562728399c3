//! Finds the kernel that the boot loader of a disk would boot, and sends it to the host with its initrd.
//!
//! The file systems of the disk are mounted read-only and attached nowhere, so only this process can reach them, and
//! its end unmounts them. `nutshell_disk_reader` reads them.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use nutshell_disk_reader::{
    BootFile, Disk, FileSystem, MAX_INITRD_SIZE, MAX_KERNEL_SIZE, PartitionType, START_SIZE, find_kernel, identify,
    partition_types,
};
use nutshell_protocol::{DiskKernel, Failure, MAX_COMMAND_LINE, MAX_DISK_INITRD, MAX_DISK_KERNEL, MAX_KERNEL_SOURCE};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use rustix::net::{SendFlags, Shutdown};

use super::disk;
use crate::connection::await_connection;
use crate::failure::{Context, FailureExt};
use crate::sys;

/// The time limit of the whole request. The host usually gives up earlier; this limit applies if it does not.
const LIMIT: Duration = Duration::from_secs(120);

/// The time after [`LIMIT`] until SIGALRM ends the process, in seconds. It may be blocked in the kernel by a disk.
const EXTRA_SECONDS: u32 = 5;

/// How many partitions are read. Disks of virtual machines have fewer than ten.
const MAX_PARTITIONS: usize = 64;

/// The size of the buffer for copies, in bytes.
const BUFFER_SIZE: usize = 256 << 10;

/// Where the kernel expects an initrd after another one: at a multiple of this number of bytes
/// (Documentation/driver-api/early-userspace/buffer-format.rst).
const INITRD_ALIGNMENT: u64 = 4;

/// The largest length of an error text, in bytes.
const MAX_ERROR: usize = 4096;

const _: () = assert!(MAX_KERNEL_SIZE <= MAX_DISK_KERNEL && MAX_INITRD_SIZE <= MAX_DISK_INITRD);
const _: () = assert!(nutshell_disk_reader::MAX_COMMAND_LINE <= MAX_COMMAND_LINE);

/// Sends the kernel and the initrds of the disk in disk slot `slot`. Call this in a job.
pub(crate) fn send(slot: u32, kernel_stream: &OwnedFd, initrd_stream: &OwnedFd) -> Result<DiskKernel, Failure> {
    let deadline = Instant::now() + LIMIT;
    sys::end_after(
        u32::try_from(LIMIT.as_secs())
            .unwrap_or(u32::MAX)
            .saturating_add(EXTRA_SECONDS),
    );
    for stream in [kernel_stream, initrd_stream] {
        await_connection(stream).context(|| "wait for the streams to the host to connect".to_owned())?;
    }
    let device = disk::find(slot).context(|| format!("find the disk in disk slot {slot}"))?;
    let sent = send_from(&device, kernel_stream, initrd_stream, deadline);
    sent.map_err(|text| Failure::internal(clip(&format!("disk slot {slot}: {text}"))))
}

/// Returns `text` with at most [`MAX_ERROR`] bytes.
fn clip(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_ERROR)].to_owned()
}

fn send_from(
    device: &Path,
    kernel_stream: &OwnedFd,
    initrd_stream: &OwnedFd,
    deadline: Instant,
) -> Result<DiskKernel, String> {
    let mut unreadable = Vec::new();
    let disk = Disk::new(mount_all(device, &mut unreadable)?, deadline);
    let entry = find_kernel(&disk).map_err(|error| match unreadable.join("; ") {
        unreadable if unreadable.is_empty() => error.to_string(),
        unreadable => format!("{error}; not read: {unreadable}"),
    })?;
    let failed = |what: &str, file: &BootFile, error: io::Error| format!("send the {what} {}: {error}", file.path);
    let kernel = std::slice::from_ref(&entry.kernel);
    let kernel_size =
        send_files(kernel_stream, kernel, 1, deadline).map_err(|(file, error)| failed("kernel", file, error))?;
    let initrd_size = send_files(initrd_stream, &entry.initrds, INITRD_ALIGNMENT, deadline)
        .map_err(|(file, error)| failed("initrd", file, error))?;
    let mut source = entry.source.to_string();
    source.truncate(source.floor_char_boundary(MAX_KERNEL_SOURCE));
    Ok(DiskKernel {
        kernel_size,
        initrd_size,
        command_line: entry.command_line,
        source,
    })
}

/// Mounts the file systems on the partitions of a disk, or that on the disk itself if it has no partitions. Appends to
/// `unreadable` why a file system is left out.
fn mount_all(device: &Path, unreadable: &mut Vec<String>) -> Result<Vec<FileSystem>, String> {
    let name = device.file_name().unwrap_or_default().to_string_lossy();
    let sysfs = Path::new("/sys/block").join(&*name);
    let partitions = list_partitions(&sysfs).map_err(|error| format!("list the partitions of {name}: {error}"))?;
    let start = read_start(device).map_err(|error| format!("read {name}: {error}"))?;
    let types = partition_types(
        &start,
        read_number(&sysfs.join("queue/logical_block_size")).unwrap_or(512),
    );
    let supported =
        fs::read_to_string("/proc/filesystems").map_err(|error| format!("read /proc/filesystems: {error}"))?;
    if partitions.is_empty() {
        let whole = Partition {
            name: name.into_owned(),
            number: None,
            label: None,
        };
        let mounted = mount(whole, PartitionType::Other, &supported);
        return Ok(mounted
            .map_err(|reason| unreadable.push(reason))
            .ok()
            .flatten()
            .into_iter()
            .collect());
    }
    let mut file_systems = Vec::new();
    for partition in partitions {
        let partition_type = partition.number.and_then(|number| types.get(&number)).copied();
        match mount(partition, partition_type.unwrap_or_default(), &supported) {
            Ok(mounted) => file_systems.extend(mounted),
            Err(reason) => unreadable.push(reason),
        }
    }
    Ok(file_systems)
}

/// A partition, or a whole disk.
#[derive(Debug, PartialEq, Eq)]
struct Partition {
    /// The name of its device.
    name: String,
    /// `None` for a whole disk.
    number: Option<u32>,
    /// The name in a GPT.
    label: Option<String>,
}

/// Returns the partitions of the disk at `sysfs`, a directory of `/sys/block`, in the order of their numbers.
fn list_partitions(sysfs: &Path) -> io::Result<Vec<Partition>> {
    let mut partitions = Vec::new();
    for entry in fs::read_dir(sysfs)? {
        let entry = entry?;
        let Some(number) = read_number(&entry.path().join("partition")) else {
            continue;
        };
        let event = fs::read_to_string(entry.path().join("uevent")).unwrap_or_default();
        let label = event.lines().find_map(|line| line.strip_prefix("PARTNAME="));
        partitions.push(Partition {
            name: entry.file_name().to_string_lossy().into_owned(),
            number: Some(number),
            label: label.map(str::to_owned),
        });
    }
    partitions.sort_by_key(|partition| partition.number);
    partitions.truncate(MAX_PARTITIONS);
    Ok(partitions)
}

fn read_number<T: std::str::FromStr>(path: &Path) -> Option<T> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn read_start(device: &Path) -> io::Result<Vec<u8>> {
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let device = File::options().read(true).custom_flags(flags).open(device)?;
    let mut start = Vec::new();
    device.take(START_SIZE as u64).read_to_end(&mut start)?;
    Ok(start)
}

/// Mounts the file system on a partition. Returns `None` if none is recognized there, and a reason if there is one that
/// cannot be mounted.
fn mount(partition: Partition, partition_type: PartitionType, supported: &str) -> Result<Option<FileSystem>, String> {
    let name = &partition.name;
    let device = Path::new("/dev").join(name);
    let start = read_start(&device).map_err(|error| format!("{name}: {error}"))?;
    let Some(superblock) = identify(&start) else {
        return Ok(None);
    };
    let kind = superblock.kind;
    if !supported.lines().any(|line| line.trim() == kind) {
        return Err(format!("{name} ({kind}, which the guest's kernel does not support)"));
    }
    let root = mount_detached(&device, kind).map_err(|error| format!("{name} ({kind}): {error}"))?;
    Ok(Some(FileSystem {
        name: partition.name,
        number: partition.number,
        partition_type,
        partition_label: partition.label,
        kind: kind.to_owned(),
        uuid: superblock.uuid,
        label: superblock.label,
        root,
    }))
}

/// Mounts a file system read-only, and returns its root directory. If the journal cannot be replayed, as on a device
/// that cannot be written, it is left out.
fn mount_detached(device: &Path, kind: &str) -> io::Result<OwnedFd> {
    type Options<'o> = &'o [(&'o str, &'o str)];
    let (options, without_journal): (Options<'_>, Option<(&str, &str)>) = match kind {
        // A superblock may set errors=panic.
        "ext4" => (&[("errors", "continue")], Some(("noload", ""))),
        "xfs" => (&[], Some(("norecovery", ""))),
        "btrfs" => (&[], Some(("rescue", "nologreplay"))),
        _ => (&[], None),
    };
    let mounted = mount_with(device, kind, options).or_else(|error| {
        let option = without_journal.ok_or(error)?;
        mount_with(device, kind, &[options, &[option]].concat())
    });
    Ok(mounted?)
}

fn mount_with(device: &Path, kind: &str, options: &[(&str, &str)]) -> rustix::io::Result<OwnedFd> {
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "source", device)?;
    rustix::mount::fsconfig_set_flag(&context, "ro")?;
    for (name, value) in options {
        if value.is_empty() {
            rustix::mount::fsconfig_set_flag(&context, *name)?;
        } else {
            rustix::mount::fsconfig_set_string(&context, *name, *value)?;
        }
    }
    rustix::mount::fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Sends files one after the other, each padded to a multiple of `alignment` bytes, and ends the stream. Returns the
/// number of bytes. An error comes with its file.
fn send_files<'f>(
    stream: &OwnedFd,
    files: &'f [BootFile],
    alignment: u64,
    deadline: Instant,
) -> Result<u64, (&'f BootFile, io::Error)> {
    let mut sent = 0;
    for file in files {
        let padded = file.size.next_multiple_of(alignment);
        let padding = vec![0; usize::try_from(padded - file.size).unwrap_or_default()];
        send_file(stream, file, deadline)
            .and_then(|()| send_bytes(stream, &padding, deadline))
            .map_err(|error| (file, error))?;
        sent += padded;
    }
    // Fails only if the host has already closed the stream.
    let _ = rustix::net::shutdown(stream, Shutdown::Write);
    Ok(sent)
}

fn send_file(stream: &OwnedFd, file: &BootFile, deadline: Instant) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_SIZE];
    let mut sent = 0;
    while sent < file.size {
        let left = usize::try_from(file.size - sent).unwrap_or(usize::MAX);
        let part = &mut buffer[..left.min(BUFFER_SIZE)];
        file.file.read_exact_at(part, file.offset + sent)?;
        send_bytes(stream, part, deadline)?;
        sent += part.len() as u64;
    }
    Ok(())
}

/// Sends all bytes over a stream that does not block.
fn send_bytes(stream: &OwnedFd, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::net::send(stream, bytes, SendFlags::NOSIGNAL) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let text = "the host did not read the stream in time";
                    return Err(io::Error::new(io::ErrorKind::TimedOut, text));
                }
                let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
                let mut ready = [PollFd::new(stream, PollFlags::OUT)];
                match rustix::event::poll(&mut ready, Some(&timeout)) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    use std::io::Write;

    fn boot_file(content: &[u8], offset: u64) -> BootFile {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        BootFile {
            file_system: 0,
            path: "/file".to_owned(),
            offset,
            size: content.len() as u64 - offset,
            file,
        }
    }

    fn streams() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn files_are_padded_to_the_alignment() {
        for (contents, alignment, expected) in [
            (&["abcde"][..], 1, &b"abcde"[..]),
            (&["abcde", "fghi", "j"], 4, b"abcde\0\0\0fghij\0\0\0"),
            (&[], 4, b""),
        ] {
            let (ours, theirs) = streams();
            let files: Vec<_> = contents
                .iter()
                .map(|content| boot_file(content.as_bytes(), 0))
                .collect();
            assert_eq!(
                send_files(&ours, &files, alignment, soon()).unwrap(),
                expected.len() as u64
            );
            rustix::io::ioctl_fionbio(&theirs, false).unwrap();
            let mut received = Vec::new();
            File::from(theirs).read_to_end(&mut received).unwrap();
            assert_eq!(received, expected);
        }
    }

    #[test]
    fn section_of_a_file_is_sent_completely() {
        let content: Vec<u8> = (0..=255).cycle().take(3 * BUFFER_SIZE + 7).collect();
        let (ours, theirs) = streams();
        let reader = std::thread::spawn(move || {
            rustix::io::ioctl_fionbio(&theirs, false).unwrap();
            let mut received = Vec::new();
            File::from(theirs).read_to_end(&mut received).unwrap();
            received
        });
        let file = boot_file(&content, 100);
        send_files(&ours, &[file], 1, soon()).unwrap();
        drop(ours);
        assert!(reader.join().unwrap() == content[100..]);
    }

    #[test]
    fn host_that_does_not_read_ends_the_copy() {
        let content = vec![1; 4 << 20];
        let (ours, theirs) = streams();
        let files = [boot_file(&content, 0)];
        let (_, error) = send_files(&ours, &files, 1, Instant::now() + Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(theirs);
        let (_, error) = send_files(&ours, &files, 1, soon()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn partitions_are_listed_in_the_order_of_their_numbers() {
        let sysfs = tempfile::tempdir().unwrap();
        for (name, number, event) in [
            ("vda15", "15\n", "PARTN=15\nPARTNAME=EFI System\n"),
            ("vda1", "1\n", "PARTN=1\n"),
        ] {
            let directory = sysfs.path().join(name);
            fs::create_dir(&directory).unwrap();
            fs::write(directory.join("partition"), number).unwrap();
            fs::write(directory.join("uevent"), event).unwrap();
        }
        fs::create_dir(sysfs.path().join("queue")).unwrap();
        let partition = |name: &str, number, label: Option<&str>| Partition {
            name: name.to_owned(),
            number: Some(number),
            label: label.map(str::to_owned),
        };
        let expected = [partition("vda1", 1, None), partition("vda15", 15, Some("EFI System"))];
        assert_eq!(list_partitions(sysfs.path()).unwrap(), expected);
    }
}
