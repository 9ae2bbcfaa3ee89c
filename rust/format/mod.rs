// SPDX-License-Identifier: GPL-2.0

//! The on-disk formats: tar wrapper, ZFile and LSMT, and the merge of layers.
//!
//! Pure code: no kernel, no allocation, no `unsafe`. The same files are compiled into the kernel
//! module and into the user-space library, which tests them. Nothing that comes from an image is
//! used before it is bounded.
//!
//! A blob is opened from the outside in:
//!
//! ```text
//! blob -> [tar::payload]? -> [zfile::Geometry::read]? -> lsmt::Layer::read
//! ```
//!
//! Everything is little-endian. Byte offsets are `u64`; a sector is 512 bytes.
//!
//! Format descriptions: `Documentation/formats/`.

#![forbid(unsafe_code)]

pub mod blob;
pub mod error;
pub mod lsmt;
pub mod merge;
pub mod num;
pub mod tar;
pub mod zfile;

pub use blob::{Blob, Window};
pub use error::{Error, Fault};

/// Bytes in a sector, the unit of LSMT offsets.
pub const SECTOR_SIZE: u64 = 512;

/// CRC-32C (reflected polynomial 0x82f63b78) continued from `seed`, without inversion at either
/// end: the kernel's `crc32c()`.
pub type Crc32c = fn(seed: u32, data: &[u8]) -> u32;
