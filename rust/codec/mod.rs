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
/// result must fill `dest` exactly. Doesn't sleep, and may be called in process and interrupt
/// context. Returns `None` if the algorithm needs a codec context.
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

/// Returns the CRC-32C of `data`, starting with `seed`. Neither the seed nor the result is
/// inverted, unlike in most libraries.
pub(crate) fn crc32c(seed: u32, data: &[u8]) -> u32 {
    // SAFETY: The slice is valid for reads of its length.
    unsafe { sys::crc32c(seed, data.as_ptr().cast(), data.len()) }
}

/// A block cannot be decompressed: its CRC is wrong, its compressed bytes are malformed, or they do
/// not decompress to the length of the block. Also returned if the source or the destination has
/// not the room that the block needs, which callers rule out.
pub(crate) struct Corrupt;
