// SPDX-License-Identifier: GPL-2.0

//! Raw LZ4 blocks.
//!
//! C header: `include/linux/lz4.h`.

use super::Corrupt;
use crate::block::Dest;
use crate::sys;

/// Decompresses `stored`, which must fill `dest` exactly. Works in any context.
///
/// # Errors
///
/// [`Corrupt`] where it is malformed, shorter or longer.
pub(super) fn decompress(stored: &[u8], dest: &Dest<'_>) -> Result<(), Corrupt> {
    let stored_len = i32::try_from(stored.len()).map_err(|_| Corrupt)?;
    let dest_len = i32::try_from(dest.len()).map_err(|_| Corrupt)?;
    // SAFETY: The source is valid for reads and the destination for writes of their lengths. The
    // function stays within both whatever the source holds, and takes no decision on what it reads
    // back from the destination.
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
