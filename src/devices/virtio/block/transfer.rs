//! Guest memory as the target and source of files and disk images, whose data is not copied on the way.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use nutshell_disk_image::{Source, Target};

use crate::devices::virtio::buffers::Buffers;

/// Fills the first `count` bytes of `writable` from `offset` of `file`, and removes them from `writable`.
pub(super) fn read_file(file: &File, mut offset: u64, mut count: usize, writable: &mut Buffers<'_>) -> io::Result<()> {
    while count > 0 {
        let read = retry_interrupted(|| Target::read_from(writable, file.as_fd(), offset, count))?;
        if read == 0 {
            return Err(io::Error::other(format!(
                "the file has less than {} bytes: it was truncated after it was opened",
                offset.saturating_add(count as u64)
            )));
        }
        offset += read as u64;
        count -= read;
    }
    Ok(())
}

/// Writes the first `count` bytes of `readable` at `offset` of `file`, and removes them from `readable`.
pub(super) fn write_file(file: &File, mut offset: u64, mut count: usize, readable: &mut Buffers<'_>) -> io::Result<()> {
    while count > 0 {
        let written = retry_interrupted(|| Source::write_to(readable, file.as_fd(), offset, count))?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        offset += written as u64;
        count -= written;
    }
    Ok(())
}

/// Repeats `call` while a signal interrupts it.
fn retry_interrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

impl Target for Buffers<'_> {
    fn remaining(&self) -> usize {
        self.len()
    }

    fn read_from(&mut self, file: BorrowedFd<'_>, offset: u64, count: usize) -> io::Result<usize> {
        let read = if count < self.len() {
            self.prefix(count).read_from(file, Some(offset))?
        } else {
            Buffers::read_from(self, file, Some(offset))?
        };
        self.split_to(read);
        Ok(read)
    }

    fn put(&mut self, bytes: &[u8]) {
        Buffers::put(self, bytes);
    }
}

impl Source for Buffers<'_> {
    fn remaining(&self) -> usize {
        self.len()
    }

    fn write_to(&mut self, file: BorrowedFd<'_>, offset: u64, count: usize) -> io::Result<usize> {
        let written = if count < self.len() {
            self.prefix(count).write_to(file, Some(offset))?
        } else {
            Buffers::write_to(self, file, Some(offset))?
        };
        self.split_to(written);
        Ok(written)
    }

    fn take(&mut self, buffer: &mut [u8]) {
        // The caller takes no more than there is.
        let _ = Buffers::take(self, buffer);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{fs::File, os::unix::fs::FileExt};

    use nutshell_disk_image::Image;
    use virtio_bindings::virtio_blk::{
        VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR,
        VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    };
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::{
        Block,
        disk::{Backing, Disk},
        request::process,
    };
    use crate::devices::{
        counters::Counters,
        log_capture::LogCapture,
        virtio::{
            device::Device,
            mock::{NEXT, WRITE, descriptor, device_queue, memory, stall_timer},
        },
    };

    const CLUSTER: usize = 64 << 10;
    const DISK_SIZE: usize = 3 * CLUSTER;

    fn base() -> (Vec<u8>, File) {
        let bytes: Vec<u8> = (0..DISK_SIZE).map(|index| (index / 100).to_le_bytes()[0] | 1).collect();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        (bytes, file)
    }

    fn disk(name: &str, image: Image) -> Disk {
        Disk::new(Backing::Image(Box::new(image)), Counters::new(name)).unwrap()
    }

    /// Executes a request whose data is in three buffers. Returns its status and the data that the guest received.
    pub(in super::super) fn run(disk: &Disk, kind: u32, sector: u64, out: &[u8], in_length: u32) -> (u8, Vec<u8>) {
        let memory = memory();
        let mock = MockSplitQueue::new(&*memory, 16);
        let header = [u64::from(kind).to_le_bytes(), sector.to_le_bytes()].concat();
        memory.write_slice(&header, GuestAddress(0x8000)).unwrap();
        memory.write_obj(0xaa_u8, GuestAddress(0xf000)).unwrap();
        let (flags, length) = match in_length {
            0 => (NEXT, u32::try_from(out.len()).unwrap()),
            length => (NEXT | WRITE, length),
        };
        let parts = [
            (0x9000, length.min(300)),
            (0xa000, length.saturating_sub(300).min(1)),
            (0xb000, length.saturating_sub(301)),
        ];
        let mut position = 0;
        for (address, length) in parts {
            let part = out.get(position..position + length as usize).unwrap_or_default();
            memory.write_slice(part, GuestAddress(address)).unwrap();
            position += length as usize;
        }
        let layout = [
            (0x8000, 16, NEXT),
            (parts[0].0, parts[0].1, flags),
            (parts[1].0, parts[1].1, flags),
            (parts[2].0, parts[2].1, flags),
            (0xf000, 1, WRITE),
        ];
        for (index, (address, length, flags)) in (0..).zip(layout) {
            let entry = descriptor(address, length, flags, index + 1);
            mock.desc_table().store(index, entry).unwrap();
        }
        mock.avail().ring().ref_at(0).unwrap().store(0);
        mock.avail().idx().store(1);
        let (mut queue, _) = device_queue(&mock, &memory);

        process(queue.pop().unwrap().unwrap(), disk, 0);

        let mut data = Vec::new();
        for (address, length) in parts.into_iter().filter(|_| in_length > 0) {
            let mut part = vec![0; length as usize];
            memory.read_slice(&mut part, GuestAddress(address)).unwrap();
            data.extend(part);
        }
        (memory.read_obj(GuestAddress(0xf000)).unwrap(), data)
    }

    pub(in super::super) fn segment(sector: u64, count: u32) -> Vec<u8> {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &[0; 4]].concat()
    }

    #[test]
    fn guest_writes_and_discards_reach_the_copy_on_write_file_and_never_the_base() {
        let (mut expected, base_file) = base();
        let original = expected.clone();
        let cow = tempfile::tempfile().unwrap();
        let open = || {
            let (base, cow) = (base_file.try_clone().unwrap(), cow.try_clone().unwrap());
            disk("cow-disk", Image::open(Box::new(base), Box::new(cow), [1; 16]).unwrap())
        };
        let disk = open();
        assert_eq!(disk.capacity.sectors(), 384);
        let data: Vec<u8> = (0..4096_u32).map(|index| index.to_le_bytes()[0]).collect();

        // Across the border of two clusters, then into a cluster that is present.
        for sector in [124, 1] {
            assert_eq!(run(&disk, VIRTIO_BLK_T_OUT, sector, &data, 0).0, 0);
            let offset = usize::try_from(sector).unwrap() * 512;
            expected[offset..offset + data.len()].copy_from_slice(&data);
        }
        assert_eq!(run(&disk, VIRTIO_BLK_T_DISCARD, 0, &segment(256, 128), 0).0, 0);
        expected[2 * CLUSTER..].fill(0);
        assert_eq!(run(&disk, VIRTIO_BLK_T_WRITE_ZEROES, 0, &segment(3, 2), 0).0, 0);
        expected[3 * 512..5 * 512].fill(0);
        assert_eq!(run(&disk, VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, 0);

        // The open disk, then the disk as a later vmm opens it.
        for disk in [disk, open()] {
            for sector in (0..384).step_by(8) {
                let (status, data) = run(&disk, VIRTIO_BLK_T_IN, sector, &[], 4096);
                let offset = usize::try_from(sector).unwrap() * 512;
                assert_eq!(status, 0);
                assert!(data == expected[offset..offset + 4096], "sector {sector}");
            }
        }
        let mut base = vec![0; DISK_SIZE];
        base_file.read_exact_at(&mut base, 0).unwrap();
        assert!(base == original);
    }

    #[test]
    fn failed_read_of_an_image_is_logged_with_the_error_of_the_host() {
        let (_, base) = base();
        let image = Image::open_read_only(Box::new(base.try_clone().unwrap())).unwrap();
        let disk = disk("short-image", image);
        base.set_len(CLUSTER as u64).unwrap();
        let log = LogCapture::start("short-image");

        let (status, _) = run(&disk, VIRTIO_BLK_T_IN, 200, &[], 1024);

        assert_eq!(u32::from(status), VIRTIO_BLK_S_IOERR);
        assert_eq!(
            log.lines(),
            [
                "queue 0: read at byte 102400 failed, the guest gets an I/O error: the file has less than 103424 bytes: it \
              was truncated after it was opened"
            ]
        );
        assert_eq!(disk.counters.read().errors, 1);
    }

    #[test]
    fn guest_sees_a_read_only_image_as_such_and_a_writable_one_with_all_operations() {
        let operations = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        let read_only = 1 << VIRTIO_BLK_F_RO;
        let cow = Box::new(tempfile::tempfile().unwrap());
        for (image, expected) in [
            (Image::open_read_only(Box::new(base().1)), read_only),
            (Image::open(Box::new(base().1), cow, [1; 16]), operations),
        ] {
            let backing = Backing::Image(Box::new(image.unwrap()));
            let block = Block::new("image".to_owned(), backing, 1, &stall_timer()).unwrap();
            assert_eq!(block.features() & (operations | read_only), expected);
            let mut config = [0; 60];
            block.read_config(0, &mut config);
            assert_eq!(config[..8], 384_u64.to_le_bytes());
            // discard_sector_alignment: a cluster.
            assert_eq!(config[44..48], 128_u32.to_le_bytes());
        }
        let (_, base) = base();
        let disk = disk("read-only-image", Image::open_read_only(Box::new(base)).unwrap());
        let (status, _) = run(&disk, VIRTIO_BLK_T_OUT, 0, &[1; 512], 0);
        assert_eq!(u32::from(status), VIRTIO_BLK_S_IOERR);
        assert_eq!(run(&disk, VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, 0);
    }
}
