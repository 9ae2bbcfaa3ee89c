// SPDX-License-Identifier: GPL-2.0

//! Decompression of raw LZ4 blocks.
//!
//! C header: `include/linux/lz4.h`.

use super::Corrupt;
use crate::block::Dest;
use crate::sys;

/// Decompresses `stored`. The result must fill `dest` exactly. May be called in any context.
///
/// # Errors
///
/// [`Corrupt`] if `stored` is malformed, or decompresses to another length.
pub(super) fn decompress(stored: &[u8], dest: &Dest<'_>) -> Result<(), Corrupt> {
    let stored_len = i32::try_from(stored.len()).map_err(|_| Corrupt)?;
    let dest_len = i32::try_from(dest.len()).map_err(|_| Corrupt)?;
    // SAFETY: The source is valid for reads and the destination for writes of their lengths. The
    // function accesses nothing else, whatever the source contains. It reads bytes that it has
    // written only to copy them, and makes no decision based on them.
    let len = unsafe {
        sys::LZ4_decompress_safe(
            stored.as_ptr().cast(),
            dest.as_ptr().cast(),
            stored_len,
            dest_len,
        )
    };
    if len == dest_len {
        Ok(())
    } else {
        Err(Corrupt)
    }
}
