// SPDX-License-Identifier: GPL-2.0

//! What the kernels that we build for have in different ways. All of that is here.
//!
//! The oldest is 7.2. What a later one has is written once with what 7.2 has, if that does the
//! same: then nothing has to ask for the kernel's version.
//!
//! - 7.3 has `Vec::zeroed`: [`zeroed`].
//!
//! What no kernel has yet: names for all allocation flags ([`gfp`]).

use kernel::alloc::flags::__GFP_ZERO;
use kernel::alloc::{AllocError, Allocator, Flags, Vec};
use kernel::prelude::*;

/// Allocation flags that the kernel crate has no names for.
pub(crate) const fn gfp(raw: super::gfp_t) -> Flags {
    // SAFETY: `Flags` is a number of this type in a structure of its own, without limits on its
    // value. Should its size differ, this does not compile.
    unsafe { core::mem::transmute(raw) }
}

/// A vector of `len` zeroes.
///
/// # Errors
///
/// [`AllocError`].
pub(crate) fn zeroed<T: Zeroable, A: Allocator>(
    len: usize,
    flags: Flags,
) -> Result<Vec<T, A>, AllocError> {
    let mut vec = Vec::with_capacity(len, flags | __GFP_ZERO)?;
    // SAFETY: The vector is empty and has room for `len` elements. They are zero bytes, which are
    // valid values, because of `__GFP_ZERO` and `T: Zeroable`.
    unsafe { vec.inc_len(len) };
    Ok(vec)
}
