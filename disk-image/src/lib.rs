//! Disk images of virtual machines.
//!
//! An [`Image`] is a read-only base image, raw or qcow2, and optionally a copy-on-write file that gets all writes. The
//! base image is hostile input: nothing in it can cause a panic, an endless loop, or memory use that grows with its
//! content. This crate opens no path. It reads and writes files that its caller has opened, or any other source of
//! bytes that implements [`ReadAt`] or [`Storage`].
//!
//! - [`base`]: detection of the format, and access to a base image of either format
//! - [`qcow2`]: the reader for qcow2
//! - [`cow`]: the copy-on-write file
//! - [`io`]: the traits between this crate, files and guest memory

#![forbid(unsafe_code)]

pub mod base;
pub mod cow;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod image;
pub mod io;
mod limits;
pub mod qcow2;

pub use self::{
    base::{Base, BaseError, BaseFormat},
    cow::CowError,
    image::{Image, ImageError},
    io::{ReadAt, Source, Storage, Target},
    limits::{DISCARD_ALIGNMENT, MAX_VIRTUAL_SIZE, SECTOR_SIZE},
    qcow2::Qcow2Error,
};
