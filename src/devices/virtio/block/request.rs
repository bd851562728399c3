//! Parses one virtio-blk request (virtio 1.3 §5.2.6), checks it against the disk and executes it.

use std::io;

use nutshell_disk_image::io::{discard_file_range, zero_file_range};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{
    disk::{Backing, Disk, SECTOR_SIZE},
    transfer::{read_file, write_file},
};
use crate::devices::{
    counters::Obstacle,
    virtio::buffers::{Buffers, Chain},
};

/// The maximum number of sectors of one discard or write-zeroes request, 1 GiB. It limits the time for which one slow
/// system call can delay the requests after it.
pub(super) const MAX_ZERO_SECTORS: u32 = 1 << 21;

/// Why a request fails.
#[derive(Debug)]
enum RequestError {
    /// A system call on the disk's file failed.
    Host(io::Error),
    /// virtio forbids the request, or the disk cannot execute it. The value completes the log message.
    Invalid(&'static str),
    /// The device does not support the type, a flag, or the size of a discard or write-zeroes request.
    Unsupported,
}

impl From<io::Error> for RequestError {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

/// Executes a request of queue `queue` and writes its status. Returns the number of bytes written to guest memory,
/// status included.
pub(super) fn process(mut chain: Chain<'_>, disk: &Disk, queue: u16) -> u32 {
    let counters = &disk.counters;
    counters.add_requests(1);
    let Some(data_length) = chain.writable.len().checked_sub(1) else {
        counters.add_error();
        log::warn!(target: disk.serial(), "queue {queue}: a request of the guest has no space for its status");
        return 0;
    };
    let mut data = chain.writable.split_to(data_length);
    let mut status = chain.writable;
    let mut header = [0; 16];
    let has_header = chain.readable.take(&mut header);
    // struct virtio_blk_req: type, reserved, sector, all little-endian.
    let [kind, _, sector_low, sector_high] = [0, 4, 8, 12].map(|offset| {
        let field = header[offset..].first_chunk().copied().unwrap_or_default();
        u32::from_le_bytes(field)
    });
    let sector = u64::from(sector_high) << 32 | u64::from(sector_low);
    let outcome = if has_header {
        if let Some(obstacle) = obstacle(kind) {
            counters.wait(queue, obstacle);
        }
        let outcome = execute(kind, sector, &mut chain.readable, &mut data, disk);
        counters.resume(queue);
        outcome
    } else {
        Err(RequestError::Invalid("it has no complete header"))
    };
    let operation = || match has_header {
        true => operation_name(kind, sector),
        false => "request".to_owned(),
    };
    if outcome.is_err() {
        counters.add_error();
    }
    let (written, code) = match outcome {
        Ok(written) => (written, VIRTIO_BLK_S_OK),
        Err(RequestError::Host(error)) => {
            log::warn!(
                target: disk.serial(),
                "queue {queue}: {} failed, the guest gets an I/O error: {error}",
                operation()
            );
            (0, VIRTIO_BLK_S_IOERR)
        }
        Err(RequestError::Invalid(reason)) => {
            log::warn!(
                target: disk.serial(),
                "queue {queue}: {} is refused, the guest gets an I/O error: {reason}",
                operation()
            );
            (0, VIRTIO_BLK_S_IOERR)
        }
        Err(RequestError::Unsupported) => {
            log::warn!(
                target: disk.serial(),
                "queue {queue}: a request of type {kind} is refused: its type, a flag or its size is not supported"
            );
            (0, VIRTIO_BLK_S_UNSUPP)
        }
    };
    let status_length = status.put(&[u8::try_from(code).unwrap_or(1)]);
    u32::try_from(written + status_length).unwrap_or(u32::MAX)
}

/// Returns the number of bytes written to `writable`.
fn execute(
    kind: u32,
    sector: u64,
    readable: &mut Buffers<'_>,
    writable: &mut Buffers<'_>,
    disk: &Disk,
) -> Result<usize, RequestError> {
    let Disk { backing, counters, .. } = disk;
    let (capacity, serial) = (disk.capacity.sectors(), disk.serial());
    if kind == VIRTIO_BLK_T_GET_ID {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        let length = serial.len().min(id.len());
        id[..length].copy_from_slice(&serial.as_bytes()[..length]);
        return Ok(writable.put(&id));
    }
    let writes = matches!(
        kind,
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES
    );
    if writes && backing.is_read_only() {
        return Err(RequestError::Invalid("the disk is read-only"));
    }
    match kind {
        VIRTIO_BLK_T_IN => {
            let length = writable.len();
            let offset = checked_offset(sector, length as u64, capacity)?;
            match backing {
                Backing::File { file, .. } => read_file(file, offset, length, writable)?,
                Backing::Joined(files) => files.read(writable, offset)?,
                Backing::Image(image) => image.read(writable, offset)?,
            }
            counters.add_bytes_to_guest(length as u64);
            Ok(length)
        }
        VIRTIO_BLK_T_OUT => {
            let length = readable.len();
            let offset = checked_offset(sector, length as u64, capacity)?;
            match backing {
                Backing::File { file, .. } => write_file(file, offset, length, readable)?,
                Backing::Joined(files) => files.write(readable, offset)?,
                Backing::Image(image) => image.write(readable, offset)?,
            }
            counters.add_bytes_from_guest(length as u64);
            Ok(0)
        }
        VIRTIO_BLK_T_FLUSH => {
            match backing {
                Backing::File { read_only: true, .. } => {}
                Backing::File { file, .. } => file.sync_data()?,
                Backing::Joined(files) => files.flush()?,
                Backing::Image(image) => image.flush()?,
            }
            Ok(0)
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            let mut segment = [0; 16];
            if !readable.take(&mut segment) || readable.len() > 0 {
                return Err(RequestError::Unsupported);
            }
            // struct virtio_blk_discard_write_zeroes: sector, number of sectors, flags, all little-endian.
            let [s0, s1, s2, s3, s4, s5, s6, s7, c0, c1, c2, c3, f0, f1, f2, f3] = segment;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let count = u32::from_le_bytes([c0, c1, c2, c3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            let discard = kind == VIRTIO_BLK_T_DISCARD;
            let known = if discard { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
            if flags & !known != 0 || count > MAX_ZERO_SECTORS {
                return Err(RequestError::Unsupported);
            }
            let length = u64::from(count) * SECTOR_SIZE;
            let offset = checked_offset(sector, length, capacity)?;
            let unmap = discard || flags != 0;
            match backing {
                Backing::File { file, .. } if discard => discard_file_range(file, offset, length)?,
                Backing::File { file, .. } => zero_file_range(file, offset, length, unmap)?,
                Backing::Joined(files) => files.zero_or_discard(offset, length, discard, unmap)?,
                Backing::Image(image) => image.zero(offset, length, unmap)?,
            }
            Ok(0)
        }
        _ => Err(RequestError::Unsupported),
    }
}

/// What the queue waits for while it executes a request of type `kind`. `None` if it accesses no file.
fn obstacle(kind: u32) -> Option<Obstacle> {
    match kind {
        VIRTIO_BLK_T_IN => Some(Obstacle::HostRead),
        VIRTIO_BLK_T_OUT => Some(Obstacle::HostWrite),
        VIRTIO_BLK_T_FLUSH => Some(Obstacle::HostFlush),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => Some(Obstacle::HostDiscard),
        _ => None,
    }
}

/// The name of a request's operation, for the log.
fn operation_name(kind: u32, sector: u64) -> String {
    let name = match kind {
        VIRTIO_BLK_T_IN => "read",
        VIRTIO_BLK_T_OUT => "write",
        VIRTIO_BLK_T_FLUSH => return "flush".to_owned(),
        VIRTIO_BLK_T_DISCARD => return "discard".to_owned(),
        VIRTIO_BLK_T_WRITE_ZEROES => return "write of zeroes".to_owned(),
        _ => return "request".to_owned(),
    };
    format!("{name} at byte {}", u128::from(sector) * u128::from(SECTOR_SIZE))
}

/// The byte offset of `sector`, if `length` bytes from there lie inside the disk.
fn checked_offset(sector: u64, length: u64, capacity: u64) -> Result<u64, RequestError> {
    let inside = length.is_multiple_of(SECTOR_SIZE)
        && sector
            .checked_add(length / SECTOR_SIZE)
            .is_some_and(|end| end <= capacity);
    if inside {
        Ok(sector * SECTOR_SIZE)
    } else {
        Err(RequestError::Invalid(
            "it lies outside the disk, or is not a multiple of a sector",
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Seek, Write},
    };

    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};

    use super::{super::disk::Capacity, *};
    use crate::devices::{
        counters::Counters,
        log_capture::LogCapture,
        virtio::mock::{NEXT, WRITE, descriptor, device_queue, memory},
    };

    const CAPACITY: u64 = 8;

    struct Outcome {
        status: u8,
        written: u32,
        data: Vec<u8>,
        file: Vec<u8>,
    }

    fn run(kind: u32, sector: u64, out: &[u8], in_length: u32, read_only: bool) -> Outcome {
        let memory = memory();
        let mock = MockSplitQueue::new(&*memory, 16);
        let mut header = Vec::from(kind.to_le_bytes());
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        memory.write_slice(&header, GuestAddress(0x8000)).unwrap();
        memory.write_slice(out, GuestAddress(0x9000)).unwrap();
        memory.write_obj(0xaa_u8, GuestAddress(0xf000)).unwrap();
        // The header is split into two buffers, which the standard allows (§2.7.4).
        let layout = [
            (0x8000, 7, NEXT),
            (0x8007, 9, NEXT),
            (0x9000, u32::try_from(out.len()).unwrap(), NEXT),
            (0xb000, in_length, NEXT | WRITE),
            (0xf000, 1, WRITE),
        ];
        for (index, (address, length, flags)) in (0..).zip(layout) {
            let entry = descriptor(address, length, flags, index + 1);
            mock.desc_table().store(index, entry).unwrap();
        }
        mock.avail().ring().ref_at(0).unwrap().store(0);
        mock.avail().idx().store(1);
        let (mut queue, _) = device_queue(&mock, &memory);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[b'x'; 4096]).unwrap();
        let disk = Disk::new(Backing::File { file, read_only }, Counters::new("nutshell-0")).unwrap();
        assert_eq!(disk.capacity.sectors(), CAPACITY);

        let chain = queue.pop().unwrap().unwrap();
        let written = process(chain, &disk, 0);

        let mut data = vec![0; in_length as usize];
        memory.read_slice(&mut data, GuestAddress(0xb000)).unwrap();
        let mut bytes = Vec::new();
        let Backing::File { mut file, .. } = disk.backing else {
            panic!("not a file");
        };
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        Outcome {
            status: memory.read_obj(GuestAddress(0xf000)).unwrap(),
            written,
            data,
            file: bytes,
        }
    }

    #[test]
    fn read_fills_the_buffer_and_counts_the_status_byte() {
        let outcome = run(VIRTIO_BLK_T_IN, 1, &[], 1024, true);
        assert_eq!((outcome.status, outcome.written), (0, 1025));
        assert!(outcome.data.iter().all(|&byte| byte == b'x'));
    }

    #[test]
    fn write_reaches_the_file_at_its_sector() {
        let outcome = run(VIRTIO_BLK_T_OUT, 2, &[b'w'; 512], 0, false);
        assert_eq!((outcome.status, outcome.written), (0, 1));
        assert_eq!(outcome.file[1023..1537], [&b"x"[..], &[b'w'; 512], b"x"].concat());
    }

    #[test]
    fn request_outside_the_disk_or_write_to_a_read_only_disk_fails() {
        let cases = [
            ("read past the end", VIRTIO_BLK_T_IN, 7, 0, 1024, true),
            (
                "read at a sector whose offset wraps",
                VIRTIO_BLK_T_IN,
                u64::MAX,
                0,
                512,
                true,
            ),
            ("read of part of a sector", VIRTIO_BLK_T_IN, 0, 0, 100, true),
            ("write past the end", VIRTIO_BLK_T_OUT, 8, 512, 0, false),
            ("write to a read-only disk", VIRTIO_BLK_T_OUT, 0, 512, 0, true),
        ];
        for (name, kind, sector, out, in_length, read_only) in cases {
            let outcome = run(kind, sector, &vec![b'w'; out], in_length, read_only);
            assert_eq!(u32::from(outcome.status), VIRTIO_BLK_S_IOERR, "{name}");
            assert!(outcome.file.iter().all(|&byte| byte == b'x'), "{name}");
            assert_eq!(outcome.file.len() as u64, CAPACITY * SECTOR_SIZE, "{name}");
        }
    }

    /// Executes a request on `file`, and returns its status and the log lines of the disk `name`.
    fn run_on(name: &str, file: File, kind: u32, layout: &[(u64, u32, u16)], data: &[u8]) -> (u8, Vec<String>, u64) {
        let memory = memory();
        let mock = MockSplitQueue::new(&*memory, 16);
        let header = [u64::from(kind).to_le_bytes(), 2_u64.to_le_bytes()].concat();
        memory.write_slice(&header, GuestAddress(0x8000)).unwrap();
        memory.write_slice(data, GuestAddress(0x9000)).unwrap();
        memory.write_obj(0xaa_u8, GuestAddress(0xf000)).unwrap();
        for (index, (address, length, flags)) in (0..).zip(layout) {
            let entry = descriptor(*address, *length, *flags, index + 1);
            mock.desc_table().store(index, entry).unwrap();
        }
        mock.avail().ring().ref_at(0).unwrap().store(0);
        mock.avail().idx().store(1);
        let (mut queue, _) = device_queue(&mock, &memory);
        let disk = Disk {
            backing: Backing::File { file, read_only: false },
            capacity: Capacity::new(CAPACITY),
            counters: Counters::new(name),
        };
        let log = LogCapture::start(name);

        process(queue.pop().unwrap().unwrap(), &disk, 3);

        (
            memory.read_obj(GuestAddress(0xf000)).unwrap(),
            log.lines(),
            disk.counters.read().errors,
        )
    }

    #[test]
    fn each_failure_is_counted_and_logged_once_with_queue_operation_and_cause() {
        const HEADER: (u64, u32, u16) = (0x8000, 16, NEXT);
        const OUT: (u64, u32, u16) = (0x9000, 512, NEXT);
        const SEGMENT: (u64, u32, u16) = (0x9000, 16, NEXT);
        const IN: (u64, u32, u16) = (0xb000, 512, NEXT | WRITE);
        const STATUS: (u64, u32, u16) = (0xf000, 1, WRITE);
        let open = |path: &str, write: bool| File::options().read(!write).write(write).open(path).unwrap();
        let full = || open("/dev/full", true);
        let short = || {
            let file = tempfile::tempfile().unwrap();
            file.set_len(512).unwrap();
            file
        };
        // Sector 1, one sector, no flags.
        let segment = [1_u64.to_le_bytes(), 1_u64.to_le_bytes()].concat();
        let io_error = "the guest gets an I/O error";
        let cases: [(&str, File, u32, &[_], String); 9] = [
            (
                "d-read",
                full(),
                VIRTIO_BLK_T_IN,
                &[HEADER, IN, STATUS],
                format!("read at byte 1024 failed, {io_error}: Bad file descriptor (os error 9)"),
            ),
            (
                "d-gone",
                short(),
                VIRTIO_BLK_T_IN,
                &[HEADER, IN, STATUS],
                format!(
                    "read at byte 1024 failed, {io_error}: the file has less than 1536 bytes: it was truncated after it \
                     was opened"
                ),
            ),
            (
                "d-write",
                full(),
                VIRTIO_BLK_T_OUT,
                &[HEADER, OUT, STATUS],
                format!("write at byte 1024 failed, {io_error}: No space left on device (os error 28)"),
            ),
            (
                "d-flush",
                full(),
                VIRTIO_BLK_T_FLUSH,
                &[HEADER, STATUS],
                format!("flush failed, {io_error}: Invalid argument (os error 22)"),
            ),
            (
                "d-discard",
                full(),
                VIRTIO_BLK_T_DISCARD,
                &[HEADER, SEGMENT, STATUS],
                format!("discard failed, {io_error}: No such device (os error 19)"),
            ),
            (
                "d-zero",
                full(),
                VIRTIO_BLK_T_WRITE_ZEROES,
                &[HEADER, SEGMENT, STATUS],
                format!("write of zeroes failed, {io_error}: No such device (os error 19)"),
            ),
            (
                "d-header",
                full(),
                VIRTIO_BLK_T_OUT,
                &[(0x8000, 8, NEXT), STATUS],
                format!("request is refused, {io_error}: it has no complete header"),
            ),
            (
                "d-range",
                full(),
                VIRTIO_BLK_T_IN,
                &[HEADER, (0xb000, 100, NEXT | WRITE), STATUS],
                format!(
                    "read at byte 1024 is refused, {io_error}: it lies outside the disk, or is not a multiple of a sector"
                ),
            ),
            (
                "d-status",
                full(),
                VIRTIO_BLK_T_FLUSH,
                &[(0x8000, 16, 0)],
                "a request of the guest has no space for its status".to_owned(),
            ),
        ];
        for (name, file, kind, layout, expected) in cases {
            let (status, lines, errors) = run_on(name, file, kind, layout, &segment);
            assert_eq!(lines, [format!("queue 3: {expected}")], "{name}");
            assert_eq!(errors, 1, "{name}");
            assert!(
                status == 0xaa || u32::from(status) == VIRTIO_BLK_S_IOERR,
                "{name}: {status}"
            );
        }
        let (status, lines, _) = run_on("d-type", full(), 0x77, &[HEADER, STATUS], &[]);
        assert_eq!(u32::from(status), VIRTIO_BLK_S_UNSUPP);
        assert_eq!(
            lines,
            ["queue 3: a request of type 119 is refused: its type, a flag or its size is not supported"]
        );
    }

    #[test]
    fn only_whole_sectors_inside_the_disk_have_an_offset() {
        let capacities = [0, 1, CAPACITY, 1 << 40, (1 << 55) - 1];
        for capacity in capacities {
            let near = |value: u64| (0..3).map(move |offset| value.wrapping_add(offset).wrapping_sub(1));
            for sector in [0, 1, capacity, u64::MAX / 512, u64::MAX].into_iter().flat_map(near) {
                let rest = capacity.wrapping_sub(sector).wrapping_mul(512);
                for length in [0, 512, 1 << 32, rest].into_iter().flat_map(near) {
                    let end = u128::from(sector) * 512 + u128::from(length);
                    let inside = length.is_multiple_of(512) && end <= u128::from(capacity) * 512;
                    let offset = checked_offset(sector, length, capacity).ok();
                    assert_eq!(offset, inside.then(|| sector * 512), "{sector} {length} {capacity}");
                }
            }
        }
    }

    #[test]
    fn unknown_and_scsi_requests_are_unsupported_cve_2026_48914() {
        const SCSI_COMMAND: u32 = 2;
        const SCSI_COMMAND_OUT: u32 = 3;
        for kind in [SCSI_COMMAND, SCSI_COMMAND_OUT, 0x77, u32::MAX] {
            for (out, in_length) in [(0, 0), (512, 0), (0, 512)] {
                let outcome = run(kind, 0, &vec![b'w'; out], in_length, false);
                assert_eq!(u32::from(outcome.status), VIRTIO_BLK_S_UNSUPP, "{kind}");
                assert_eq!(outcome.written, 1, "{kind}");
                assert!(outcome.file.iter().all(|&byte| byte == b'x'), "{kind}");
            }
        }
    }

    /// The device refuses, whatever features the driver has accepted, and although the host's file is writable here.
    #[test]
    fn no_request_changes_a_read_only_disk_cve_2026_24834() {
        let segment = [0_u64.to_le_bytes(), 2_u64.to_le_bytes()].concat();
        for (kind, out) in [
            (VIRTIO_BLK_T_OUT, &[b'w'; 512][..]),
            (VIRTIO_BLK_T_DISCARD, &segment),
            (VIRTIO_BLK_T_WRITE_ZEROES, &segment),
        ] {
            let outcome = run(kind, 0, out, 0, true);
            assert_eq!(u32::from(outcome.status), VIRTIO_BLK_S_IOERR, "{kind}");
            assert!(outcome.file.iter().all(|&byte| byte == b'x'), "{kind}");
        }
    }

    #[test]
    fn write_zeroes_and_discard_zero_the_range_and_keep_the_file_size() {
        for kind in [VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD] {
            let segment = [3_u64.to_le_bytes().to_vec(), 2_u32.to_le_bytes().to_vec(), vec![0; 4]].concat();
            let outcome = run(kind, 0, &segment, 0, false);
            assert_eq!(outcome.status, 0);
            let zeroes = outcome.file.iter().filter(|&&byte| byte == 0).count();
            assert_eq!((zeroes, outcome.file.len()), (1024, 4096));
            assert!(outcome.file[1536..2560].iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn get_id_returns_the_serial() {
        let outcome = run(VIRTIO_BLK_T_GET_ID, 0, &[], 20, true);
        assert_eq!(&outcome.data, b"nutshell-0\0\0\0\0\0\0\0\0\0\0");
    }
}
