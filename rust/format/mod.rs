// SPDX-License-Identifier: GPL-2.0

//! The on-disk formats (tar wrapper, ZFile and LSMT), and the merge of layers.
//!
//! This code makes no kernel calls, allocates nothing, and has no `unsafe`. The same files are
//! compiled into the kernel module and into the user-space library, which has the tests of this
//! code. Every value from an image is checked against its bounds before it is used.
//!
//! Only what the kernel module uses is here. The other parts of the formats, which only the tools
//! use, are in `tools/overlaybd/src/on_disk.rs`.
//!
//! A blob is opened from the outside in; the steps in `[]?` are for optional wrappers:
//!
//! ```text
//! blob -> [tar::payload]? -> [zfile::Geometry::read]? -> lsmt::Layer::read
//! ```
//!
//! Numbers on disk are little-endian, except in tar. Byte offsets are `u64`; a sector is 512 bytes.
//!
//! Format descriptions: `Documentation/formats/`.

#![forbid(unsafe_code)]

pub mod blob;
pub mod dax;
pub mod error;
pub mod heap;
pub mod lsmt;
pub mod merge;
pub mod num;
pub mod tar;
pub mod zfile;

pub use blob::{Blob, Window};
pub use error::{Error, Fault};

/// Length of a sector in bytes. Offsets and lengths in LSMT entries are in sectors.
pub const SECTOR_SIZE: u64 = 512;

/// A function that returns the CRC-32C (reflected polynomial 0x82f63b78) of `data`, continued from
/// `seed`, without inversion at either end, as the kernel's `crc32c()` does.
pub type Crc32c = fn(seed: u32, data: &[u8]) -> u32;
