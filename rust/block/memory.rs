// SPDX-License-Identifier: GPL-2.0

//! How memory is asked for: the flags of all allocations.
//!
//! | For                                | Flags          | Where there is none                   |
//! |------------------------------------|----------------|---------------------------------------|
//! | a device or the module being made  | `GFP_KERNEL`   | making it fails                       |
//! | the same, of any size              | [`LARGE`]      | making it fails, without a warning    |
//! | the buffer of a lower read         | [`READ`]       | a shorter read, then the spare buffer |
//! | a block in the cache, or its place | [`CACHE`]      | a read without the cache              |
//!
//! What is on the path of an I/O neither waits nor retries, since there is a way without it, and
//! leaves the kernel's reserves to those for whom there is none. So it may be asked for in any
//! context.
//!
//! C header: `include/linux/gfp_types.h`.

use kernel::alloc::Flags;

use crate::compat::gfp;
use crate::sys;

/// For what is made with a device and may be large.
pub(crate) const LARGE: Flags = gfp(sys::OBD_GFP_LARGE);

/// For the pages of a lower read's buffer, whatever their order. These flags are the C function's.
pub(crate) const READ: sys::gfp_t = sys::OBD_GFP_READ;

/// For what is in the cache. The shrinker gives it back, so the kernel keeps it apart from memory
/// that cannot be freed.
pub(crate) const CACHE: Flags = gfp(sys::OBD_GFP_CACHE);
