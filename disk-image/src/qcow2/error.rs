//! Why a qcow2 image is refused.

use std::{fmt, io};

/// Why a qcow2 image is refused, or a part of it cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// The file cannot be read.
    #[error("cannot read {what}: {source}")]
    Read {
        /// The part of the image.
        what: &'static str,
        /// The error of the host.
        source: io::Error,
    },
    /// A field of the header has a value that is invalid or not supported.
    #[error("{field} is {value}, {problem}")]
    Field {
        /// The name of the field in QEMU's specification.
        field: &'static str,
        /// What the header has.
        value: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The image is only the difference to another image.
    #[error(
        "it has the backing file {0}: only images that are complete are supported, make one with `qemu-img convert -O \
         qcow2`"
    )]
    BackingFile(Text),
    /// The data is in another file.
    #[error(
        "its data is in another file (incompatible feature bit 2, \"external data file\"): make one file with \
         `qemu-img convert -O qcow2`"
    )]
    DataFile,
    /// The field `crypt_method` is not 0.
    #[error(
        "it is encrypted (crypt_method {method}, {name}), which is not supported: make an image without encryption with \
         `qemu-img convert`"
    )]
    Encrypted {
        /// The value of the field.
        method: u32,
        /// The name of the method.
        name: &'static str,
    },
    /// The image was not closed.
    #[error(
        "it was not closed by the program that wrote it (incompatible feature bit 0, \"dirty bit\"): repair it with \
         `qemu-img check -r all`"
    )]
    Dirty,
    /// QEMU found errors in the image.
    #[error(
        "it is marked as damaged (incompatible feature bit 1, \"corrupt bit\"): repair it with `qemu-img check -r all`"
    )]
    Corrupt,
    /// The image has subclusters.
    #[error(
        "it has extended L2 entries (incompatible feature bit 4), which are not supported: convert it with `qemu-img \
         convert -O qcow2`"
    )]
    ExtendedL2,
    /// An incompatible feature that is not known.
    #[error(
        "it needs the unknown incompatible feature bit {bit}{}: convert it with `qemu-img convert -O qcow2`",
        NameOf(name)
    )]
    UnknownFeature {
        /// Its position in the field `incompatible_features`, from 0.
        bit: u32,
        /// The name that the image's feature name table has for it.
        name: Option<Text>,
    },
    /// The file ends before a part of the image.
    #[error(
        "the file is truncated: it has {size} bytes, and {part} is at byte {position}: copy or download the image again"
    )]
    Truncated {
        /// For the text: "the L1 table" or "a cluster", for example.
        part: &'static str,
        /// Where it starts, in bytes.
        position: u64,
        /// The size of the file in bytes.
        size: u64,
    },
    /// An entry of a table is invalid.
    #[error("entry {index} of the {table} table is {value:#x}, {problem}")]
    Entry {
        /// "L1" or "L2".
        table: &'static str,
        /// For the L1 table, the index in it. For an L2 table, the number of the guest's cluster.
        index: u64,
        /// As it is in the table, flags included.
        value: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A compressed cluster is invalid.
    #[error("guest cluster {cluster}, {format} data at byte {position}, cannot be decompressed: {problem}")]
    Compressed {
        /// The number of the guest's cluster.
        cluster: u64,
        /// The name of the compression.
        format: &'static str,
        /// Where the data starts in the file, in bytes.
        position: u64,
        /// What is wrong with it.
        problem: String,
    },
}

/// A text from an image, shown with quotation marks and without control characters.
#[derive(Clone, PartialEq, Eq)]
pub struct Text(Vec<u8>);

impl Text {
    pub(super) fn new(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }
}

impl fmt::Display for Text {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "\"{}\"", self.0.escape_ascii())
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

struct NameOf<'a>(&'a Option<Text>);

impl fmt::Display for NameOf<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(name) => write!(formatter, ", {name}"),
            None => Ok(()),
        }
    }
}

/// Returns a function that adds the part of the image that could not be read.
pub(super) fn read_error(what: &'static str) -> impl Fn(io::Error) -> Qcow2Error {
    move |source| Qcow2Error::Read { what, source }
}
