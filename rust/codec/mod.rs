// SPDX-License-Identifier: GPL-2.0

//! Decompression and checksums, with the functions of the kernel.
//!
//! C headers: `include/linux/lz4.h`, `include/linux/zstd.h`, `include/linux/crc32.h`.

mod context;
mod lz4;
mod zstd;

pub(crate) use context::{Context, Contexts, Decoder};

use crate::block::Dest;
use crate::format::zfile::Algorithm;
use crate::sys;

/// Decompresses `stored`, which must fill `dest` exactly, without working memory. May be called in
/// any context. Returns `None` if the algorithm needs working memory.
pub(crate) fn decompress_at_once(
    algorithm: Algorithm,
    stored: &[u8],
    dest: &Dest<'_>,
) -> Option<Result<(), Corrupt>> {
    match algorithm {
        Algorithm::Lz4 => Some(lz4::decompress(stored, dest)),
        Algorithm::Zstd => None,
    }
}

/// Returns whether [`decompress_at_once`] can decompress `algorithm`.
pub(crate) fn works_at_once(algorithm: Algorithm) -> bool {
    matches!(algorithm, Algorithm::Lz4)
}

/// Returns the CRC-32C of `data`, continued from `seed`, without inversion at either end.
pub(crate) fn crc32c(seed: u32, data: &[u8]) -> u32 {
    // SAFETY: The slice is valid for reads of its length.
    unsafe { sys::crc32c(seed, data.as_ptr().cast(), data.len()) }
}

/// A block is corrupt: its CRC is wrong, or it does not decompress to its length.
pub(crate) struct Corrupt;
