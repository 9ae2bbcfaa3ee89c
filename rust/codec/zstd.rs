// SPDX-License-Identifier: GPL-2.0

//! Decompression of zstd frames.
//!
//! C header: `include/linux/zstd.h`.

use core::ptr::NonNull;

use kernel::prelude::*;

use super::Corrupt;
use crate::block::{memory, Dest};
use crate::compat;
use crate::sys;

/// A zstd decompression context.
///
/// # Invariants
///
/// `dctx` is a context in the memory of `_workspace`.
pub(super) struct Decompressor {
    dctx: NonNull<sys::zstd_dctx>,
    _workspace: VVec<u64>,
}

// SAFETY: A context may be used from any thread, by one at a time.
unsafe impl Send for Decompressor {}

impl Decompressor {
    /// Allocates a context.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(super) fn new() -> Result<Self> {
        // SAFETY: Only computes a number.
        let size = unsafe { sys::zstd_dctx_workspace_bound() };
        let mut workspace: VVec<u64> = compat::zeroed(size.div_ceil(8), memory::LARGE)?;
        // SAFETY: The workspace is aligned and has `size` bytes. It lives as long as the context.
        let dctx = unsafe { sys::zstd_init_dctx(workspace.as_mut_ptr().cast(), size) };
        // INVARIANT: The context was made in `workspace`, whose memory doesn't move.
        Ok(Self {
            dctx: NonNull::new(dctx).ok_or(ENOMEM)?,
            _workspace: workspace,
        })
    }

    /// Decompresses `stored`. The result must fill `dest` exactly.
    ///
    /// # Errors
    ///
    /// [`Corrupt`] if `stored` is malformed, or decompresses to another length.
    pub(super) fn decompress(&mut self, stored: &[u8], dest: &Dest<'_>) -> Result<(), Corrupt> {
        // SAFETY: By the type invariant the context is valid. The source is valid for reads and the
        // destination for writes of their lengths. Apart from the context, the function accesses
        // nothing else, whatever the source contains. It reads bytes that it has written to the
        // destination only to copy them (literals and matches), and to compute the checksum of a
        // frame that has one.
        let len = unsafe {
            sys::zstd_decompress_dctx(
                self.dctx.as_ptr(),
                dest.as_ptr().cast(),
                dest.len(),
                stored.as_ptr().cast(),
                stored.len(),
            )
        };
        // Error codes are larger than the length of any destination.
        if len == dest.len() {
            Ok(())
        } else {
            Err(Corrupt)
        }
    }
}
