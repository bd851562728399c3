//! Hostile qcow2 images.

use std::io;

use crate::{Base, Image, ReadAt};

/// The number of bytes of the input that are placed at the start of each cluster.
const PART: usize = 512;

/// The maximum number of clusters of a disk whose tables are all read.
const MAX_SURVEYED_CLUSTERS: u64 = 1 << 20;

/// The maximum number of bytes that are read at once.
const MAX_READ: usize = 256 << 10;

/// A file whose clusters start with parts of the input and are zero after that, so that a small input can be an image
/// with large clusters.
#[derive(Debug, Clone)]
struct SparseFile {
    parts: Vec<u8>,
    cluster_size: u64,
    size: u64,
}

impl SparseFile {
    fn new(parts: &[u8]) -> Self {
        let cluster_bits = match parts.get(20..24) {
            Some(&[0, 0, 0, bits @ 9..=21]) => bits,
            _ => 9,
        };
        let cluster_size = 1 << cluster_bits;
        let whole = (parts.len() / PART) as u64;
        Self {
            parts: parts.to_vec(),
            cluster_size,
            size: whole * cluster_size + (parts.len() % PART) as u64,
        }
    }
}

impl ReadAt for SparseFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let count = usize::try_from(self.size.saturating_sub(offset))
            .unwrap()
            .min(buffer.len());
        let mut rest = &mut buffer[..count];
        let mut position = offset;
        while !rest.is_empty() {
            let within = usize::try_from(position % self.cluster_size).unwrap();
            let cluster = usize::try_from(position / self.cluster_size).unwrap();
            let length = (usize::try_from(self.cluster_size).unwrap() - within).min(rest.len());
            let (target, others) = rest.split_at_mut(length);
            target.fill(0);
            if within < PART {
                let part = &self.parts[(cluster * PART + within).min(self.parts.len())..];
                let filled = part.len().min(PART - within).min(length);
                target[..filled].copy_from_slice(&part[..filled]);
            }
            rest = others;
            position += length as u64;
        }
        Ok(count)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.size)
    }
}

/// Opens the image in `data` and reads parts of its disk. The last 32 bytes of `data` select some of these parts, the
/// bytes before that are the image.
///
/// # Panics
///
/// If two reads of the same bytes differ.
pub fn read_qcow2(data: &[u8]) {
    let Some((image, selection)) = data.split_last_chunk::<32>() else {
        return;
    };
    let file = SparseFile::new(image);
    let Ok(base) = Base::open(Box::new(file.clone())) else {
        return;
    };
    if let Base::Qcow2(qcow2) = &base
        && qcow2.size() / qcow2.cluster_size() <= MAX_SURVEYED_CLUSTERS
    {
        // An error only says that the image is invalid.
        let _ = qcow2.survey();
    }
    let image = Image::open_read_only(Box::new(file)).unwrap();
    let size = image.size();
    let (numbers, _) = selection.as_chunks::<8>();
    let selected = numbers.iter().map(|number| u64::from_le_bytes(*number));
    let starts = [0, size / 2, size.saturating_sub(MAX_READ as u64)]
        .into_iter()
        .chain(selected);
    for start in starts {
        compare_reads(&image, &base, start % size, MAX_READ);
        compare_reads(&image, &base, start % size, 1 + usize::try_from(start % 1500).unwrap());
    }
    assert!(image.read(&mut &mut [0; 2][..], size - 1).is_err());
    assert!(image.read(&mut &mut [0; 1][..], u64::MAX).is_err());
}

/// Reads the same bytes at once and in two parts.
fn compare_reads(image: &Image, base: &Base, offset: u64, length: usize) {
    let length = usize::try_from(image.size() - offset).unwrap().min(length);
    let split = length / 3;
    let read = |part: &mut [u8], offset| image.read(&mut &mut part[..], offset);
    let (mut whole, mut parts) = (vec![0xaa; length], vec![0x55; length]);
    let whole_result = read(&mut whole, offset);
    let first_result = read(&mut parts[..split], offset);
    let second_result = read(&mut parts[split..], offset + split as u64);
    assert_eq!(whole_result.is_ok(), first_result.is_ok() && second_result.is_ok());
    if whole_result.is_ok() {
        assert_eq!(whole, parts);
        if base.is_unallocated(offset, length as u64).unwrap() {
            assert!(whole.iter().all(|byte| *byte == 0));
        }
    }
}
