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

/// Decompresses `stored`, the stored bytes of a block without its CRC, without a codec context. The
/// result must fill `dest` exactly. Doesn't sleep; may be called in process and interrupt context.
/// Returns `None` if the algorithm needs a codec context.
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

/// Returns whether [`decompress_at_once`] can decompress blocks of this algorithm.
pub(crate) fn works_at_once(algorithm: Algorithm) -> bool {
    matches!(algorithm, Algorithm::Lz4)
}

/// Returns the CRC-32C of `data`, continued from `seed`. Unlike in most libraries, neither the seed
/// nor the result is inverted.
pub(crate) fn crc32c(seed: u32, data: &[u8]) -> u32 {
    // SAFETY: The slice is valid for reads of its length.
    unsafe { sys::crc32c(seed, data.as_ptr().cast(), data.len()) }
}

/// The error for a block that cannot be decompressed: its CRC is wrong, its compressed bytes are
/// malformed, or their decompressed length is not that of the block. Also the error for a buffer
/// that is too small for the block, which callers rule out.
pub(crate) struct Corrupt;
