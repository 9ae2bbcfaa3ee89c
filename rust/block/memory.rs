// SPDX-License-Identifier: GPL-2.0

//! How memory is asked for: the flags of all allocations.
//!
//! | For                                  | Flags          | Where there is none                      |
//! |--------------------------------------|----------------|------------------------------------------|
//! | a device or the module being made    | `GFP_KERNEL`   | making it fails                          |
//! | the same, of any size                | [`LARGE`]      | making it fails, without a warning, and  |
//! |                                      |                | nothing is killed for it                 |
//! | a page for a lower read or the cache | [`PAGE`]       | a shorter read, then the spare buffer; a |
//! |                                      |                | read without the cache                   |
//! | pages in one piece, for the same     | [`PAGES`]      | smaller pieces                           |
//! | what lists such pieces               | [`OPTIONAL`]   | as for a page                            |
//! | a place in the cache, a small block  | [`CACHE`]      | a read without the cache                 |
//!
//! What is on the path of an I/O neither waits nor retries, since there is a way without it, and
//! leaves the kernel's reserves to those for whom there is none. So it may be asked for in any
//! context. Pieces of several pages are of order [`MAX_ORDER`] at most, and nobody is woken to make
//! them. Pages come from a [`Pool`] and go back there.
//!
//! [`Pool`]: super::Pool
//!
//! C header: `include/linux/gfp_types.h`.

use kernel::alloc::Flags;

use crate::compat::gfp;
use crate::sys;

/// The largest order of what an I/O asks for. Pages of this order and below are on the kernel's
/// per-CPU lists, and count as ones that can be had.
pub(crate) const MAX_ORDER: u32 = 3;

/// For what is made with a device and may be large.
pub(crate) const LARGE: Flags = gfp(sys::OBD_GFP_LARGE);

/// For one page. These flags are the C function's.
pub(crate) const PAGE: sys::gfp_t = sys::OBD_GFP_PAGE;

/// For pages in one piece. These flags are the C function's.
pub(crate) const PAGES: sys::gfp_t = sys::OBD_GFP_PAGES;

/// For what is small and there for as long as an I/O.
pub(crate) const OPTIONAL: Flags = gfp(sys::OBD_GFP_OPTIONAL);

/// For what is in the cache. The shrinker gives it back, so the kernel keeps it apart from memory
/// that cannot be freed.
pub(crate) const CACHE: Flags = gfp(sys::OBD_GFP_CACHE);
