// SPDX-License-Identifier: GPL-2.0

//! zstd frames.
//!
//! C header: `include/linux/zstd.h`.

use core::ptr::NonNull;

use kernel::prelude::*;

use super::Corrupt;
use crate::block::{memory, Dest};
use crate::compat;
use crate::sys;

/// A decompression context.
///
/// # Invariants
///
/// `dctx` is a context that lives in `workspace`.
pub(super) struct Decompressor {
    dctx: NonNull<sys::zstd_dctx>,
    _workspace: VVec<u64>,
}

// SAFETY: A context may be used from any thread, one at a time.
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
        // SAFETY: The workspace is aligned and as large as said; it lives as long as the context.
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
    /// [`Corrupt`] where it is malformed, shorter or longer.
    pub(super) fn decompress(&mut self, stored: &[u8], dest: &Dest<'_>) -> Result<(), Corrupt> {
        // SAFETY: By the type invariant the context is valid. Source and destination are valid for
        // reads and writes of their lengths; the function stays within both whatever the source
        // holds. Of the destination it reads back literals and matches only, which it copies.
        let len = unsafe {
            sys::zstd_decompress_dctx(
                self.dctx.as_ptr(),
                dest.as_ptr().cast(),
                dest.len(),
                stored.as_ptr().cast(),
                stored.len(),
            )
        };
        // An error is a number that no destination is as long as.
        if len == dest.len() {
            Ok(())
        } else {
            Err(Corrupt)
        }
    }
}
