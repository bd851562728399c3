//! A part of a file as the bytes of a disk.

use std::{fs::File, io, os::unix::fs::FileExt};

use nutshell_disk_image::{SECTOR_SIZE, io::ReadAt};

use crate::control::Extent;

/// A part of a file, padded with zeroes to a whole sector.
#[derive(Debug)]
pub(super) struct FilePart {
    file: File,
    extent: Extent,
}

impl FilePart {
    pub(super) fn new(file: File, extent: Extent) -> Self {
        Self { file, extent }
    }

    fn padded_length(&self) -> Option<u64> {
        self.extent.length.checked_next_multiple_of(SECTOR_SIZE)
    }
}

impl ReadAt for FilePart {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let in_buffer = |length: u64| usize::try_from(length).map_or(buffer.len(), |length| length.min(buffer.len()));
        let Some(left) = self.extent.length.checked_sub(offset).filter(|left| *left > 0) else {
            let padding = in_buffer(self.padded_length().unwrap_or_default().saturating_sub(offset));
            buffer[..padding].fill(0);
            return Ok(padding);
        };
        let count = in_buffer(left);
        let position = self
            .extent
            .offset
            .checked_add(offset)
            .ok_or(io::ErrorKind::InvalidInput)?;
        FileExt::read_at(&self.file, &mut buffer[..count], position)
    }

    fn size(&self) -> io::Result<u64> {
        self.padded_length().ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn part_of_a_file_ends_with_zeroes_up_to_a_whole_sector() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 3000], 0).unwrap();
        file.write_all_at(&[2; 600], 1000).unwrap();
        let part = FilePart::new(
            file,
            Extent {
                offset: 1000,
                length: 600,
            },
        );
        assert_eq!(part.size().unwrap(), 1024);
        let mut bytes: Vec<u8> = Vec::new();
        loop {
            let mut buffer = [9; 70];
            match ReadAt::read_at(&part, &mut buffer, bytes.len() as u64).unwrap() {
                0 => break,
                count => bytes.extend(&buffer[..count]),
            }
        }
        assert_eq!(bytes, [vec![2; 600], vec![0; 424]].concat());
        assert_eq!(part.read_at(&mut [0; 8], u64::MAX).unwrap(), 0);
    }
}
