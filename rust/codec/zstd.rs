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

    /// Decompresses `stored`, which must fill `dest` exactly.
    ///
    /// # Errors
    ///
    /// [`Corrupt`] if `stored` is malformed, or decompresses to another length.
    pub(super) fn decompress(&mut self, stored: &[u8], dest: &Dest<'_>) -> Result<(), Corrupt> {
        // SAFETY: By the type invariant the context is valid. Source and destination are valid for
        // reads and writes of their lengths. The function accesses nothing else of them, whatever
        // the source contains. Of the destination it reads back only literals and matches, to copy
        // them.
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
