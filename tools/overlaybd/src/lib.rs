// SPDX-License-Identifier: GPL-2.0

//! Reads and writes OverlayBD images.
//!
//! The formats are in [`format`], whose source files the kernel module uses, too. This crate adds what
//! needs an allocator, files and codecs, and the parts of the formats that only writers and `obdsetup
//! info` need: [`on_disk`].
//!
//! ```text
//! FileBlob -> [tar] -> Part -> [ZfileReader] -> LayerReader -> Stack
//! ```
//!
//! Byte offsets and lengths are `u64`; a sector is 512 bytes.

#![forbid(unsafe_code)]

// The build of the kernel module runs clippy on these files, with the kernel's choice of lints.
#[allow(clippy::all)]
#[path = "../../../rust/format/mod.rs"]
pub mod format;

pub mod changes;
pub mod coarsen;
pub mod codec;
pub mod dax;
pub mod diff;
pub mod error;
pub mod file;
pub mod flatten;
pub mod identity;
pub mod layer;
pub mod lsmt_writer;
pub mod on_disk;
pub mod parallel;
pub mod progress;
pub mod stack;
pub mod tar_writer;
pub mod wrap;
pub mod zfile_reader;
pub mod zfile_writer;

pub use error::{Error, Result};
pub use file::{FileBlob, Part};
pub use layer::{LayerReader, Payload};
pub use progress::Progress;
pub use stack::Stack;
pub use zfile_reader::ZfileReader;

/// Returns whether all bytes are 0.
pub fn is_zero(bytes: &[u8]) -> bool {
    let mut chunks = bytes.chunks_exact(64);
    // Without a branch for each byte.
    chunks.all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && chunks.remainder().iter().all(|&byte| byte == 0)
}

/// Returns the CRC-32C as the kernel computes it: without inversion before or after.
pub fn crc32c(seed: u32, data: &[u8]) -> u32 {
    !::crc32c::crc32c_append(!seed, data)
}
