//! Compressed clusters. Decompressed clusters are cached, because a guest usually reads a cluster in several requests.

use std::{fmt, io};

use miniz_oxide::inflate::{
    TINFLStatus,
    core::{DecompressorOxide, decompress, inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF},
};
use parking_lot::Mutex;
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use super::{error::Qcow2Error, header::Compression};
use crate::io::{ReadAt, read_up_to};

/// The size of the cache in bytes. It holds at least [`MIN_CACHED_CLUSTERS`].
const CACHE_SIZE: usize = 4 << 20;
const MIN_CACHED_CLUSTERS: usize = 2;
const MAX_CACHED_CLUSTERS: usize = 64;

/// The maximum window of a zstd frame in bytes. A decoder keeps that many bytes in memory. zstd's highest ordinary
/// level, 19, uses this window for data of unknown size.
const MAX_ZSTD_WINDOW: u64 = 8 << 20;

/// The maximum number of zstd clusters that are decompressed at the same time.
const MAX_ZSTD_DECODERS: usize = 4;

/// Where the compressed data of a guest's cluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CompressedCluster {
    /// The number of the guest's cluster.
    pub(super) number: u64,
    /// Where the compressed data starts in the file, in bytes.
    pub(super) position: u64,
    /// The maximum number of bytes of the compressed data, at most two clusters.
    pub(super) length: u64,
}

/// A slot of the cache. Its lock is held while its cluster is decompressed, so other queues that need the same cluster
/// wait for it.
#[derive(Debug, Default)]
struct Slot {
    number: Option<u64>,
    bytes: Vec<u8>,
}

#[derive(Debug)]
pub(super) struct ClusterCache {
    decompressor: Decompressor,
    cluster_size: usize,
    /// A cluster is only in the slot of its number modulo the number of slots.
    slots: Vec<Mutex<Slot>>,
}

impl ClusterCache {
    pub(super) fn new(compression: Compression, cluster_bits: u32) -> Self {
        let cluster_size = 1 << cluster_bits;
        let slots = (CACHE_SIZE / cluster_size).clamp(MIN_CACHED_CLUSTERS, MAX_CACHED_CLUSTERS);
        Self {
            decompressor: Decompressor::new(compression),
            cluster_size,
            slots: (0..slots).map(|_| Mutex::default()).collect(),
        }
    }

    /// Calls `use_bytes` with the decompressed `cluster`.
    pub(super) fn with(
        &self,
        file: &dyn ReadAt,
        cluster: CompressedCluster,
        use_bytes: impl FnOnce(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let index = usize::try_from(cluster.number % self.slots.len() as u64).unwrap_or(0);
        let mut slot = self.slots[index].lock();
        if slot.number != Some(cluster.number) {
            // The file may end before the last sector of the last compressed cluster does.
            let mut input = vec![0; usize::try_from(cluster.length).map_err(io::Error::other)?];
            let count = read_up_to(file, &mut input, cluster.position)?;
            slot.number = None;
            slot.bytes.resize(self.cluster_size, 0);
            self.decompressor
                .decompress(index, &input[..count], &mut slot.bytes)
                .map_err(|problem| {
                    io::Error::other(Qcow2Error::Compressed {
                        cluster: cluster.number,
                        format: self.decompressor.compression().name(),
                        position: cluster.position,
                        problem,
                    })
                })?;
            slot.number = Some(cluster.number);
        }
        use_bytes(&slot.bytes)
    }
}

enum Decompressor {
    Zlib,
    /// Decoders are reused, because allocating the tables of one takes longer than decompressing a cluster. Their
    /// number limits the memory for the windows of hostile frames, for any number of queues.
    Zstd([Mutex<Option<Box<FrameDecoder>>>; MAX_ZSTD_DECODERS]),
}

impl fmt::Debug for Decompressor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.compression().name())
    }
}

impl Decompressor {
    fn new(compression: Compression) -> Self {
        match compression {
            Compression::Zlib => Self::Zlib,
            Compression::Zstd => Self::Zstd(Default::default()),
        }
    }

    fn compression(&self) -> Compression {
        match self {
            Self::Zlib => Compression::Zlib,
            Self::Zstd(_) => Compression::Zstd,
        }
    }

    /// Fills `output` exactly. `input` may have more bytes than the compressed data. `slot` is the number of the
    /// cache's slot for the cluster.
    fn decompress(&self, slot: usize, input: &[u8], output: &mut [u8]) -> Result<(), String> {
        match self {
            Self::Zlib => inflate(input, output),
            Self::Zstd(decoders) => {
                let mut decoder = decoders[slot % MAX_ZSTD_DECODERS].lock();
                let decoder = decoder.get_or_insert_with(|| {
                    let mut decoder = Box::new(FrameDecoder::new());
                    decoder.set_max_window_size(MAX_ZSTD_WINDOW);
                    decoder
                });
                decode_zstd(decoder, input, output)
            }
        }
    }
}

fn inflate(input: &[u8], output: &mut [u8]) -> Result<(), String> {
    let mut decompressor = Box::<DecompressorOxide>::default();
    let (status, _, written) = decompress(
        &mut decompressor,
        input,
        output,
        0,
        TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
    );
    match status {
        TINFLStatus::Done if written == output.len() => Ok(()),
        // More output than a cluster.
        TINFLStatus::HasMoreOutput => Err(longer(output)),
        TINFLStatus::Done => Err(shorter(written, output)),
        status => Err(format!("{status:?} after {written} bytes")),
    }
}

/// Decodes one or more frames, as QEMU does.
fn decode_zstd(decoder: &mut FrameDecoder, mut input: &[u8], output: &mut [u8]) -> Result<(), String> {
    let mut done = 0;
    // Each frame consumes input.
    while done < output.len() {
        decoder.reset(&mut input).map_err(|error| error.to_string())?;
        // Each block consumes input. It has at most 128 KiB of output.
        loop {
            let finished = decoder
                .decode_blocks(&mut input, BlockDecodingStrategy::UptoBlocks(1))
                .map_err(|error| error.to_string())?;
            while decoder.can_collect() > 0 {
                if done == output.len() {
                    return Err(longer(output));
                }
                done += io::Read::read(decoder, &mut output[done..]).map_err(|error| error.to_string())?;
            }
            if finished {
                break;
            }
        }
        if input.is_empty() && done < output.len() {
            return Err(shorter(done, output));
        }
    }
    Ok(())
}

fn longer(output: &[u8]) -> String {
    format!("it has more than {} bytes", output.len())
}

fn shorter(written: usize, output: &[u8]) -> String {
    format!("it has {written} bytes instead of {}", output.len())
}
