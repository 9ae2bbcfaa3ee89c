// SPDX-License-Identifier: GPL-2.0

//! The flags of all memory allocations.
//!
//! | Allocation                          | Flags        | If there is no memory                   |
//! |-------------------------------------|--------------|-----------------------------------------|
//! | with a device or the module         | `GFP_KERNEL` | making it fails                         |
//! | the same, of any size               | [`LARGE`]    | making it fails, without a warning and  |
//! |                                     |              | without the OOM killer                  |
//! | page for a lower read or the cache  | [`PAGE`]     | a shorter read, then the spare buffer;  |
//! |                                     |              | a read without the cache                |
//! | contiguous pages for the same       | [`PAGES`]    | smaller pieces                          |
//! | list of such pieces                 | [`OPTIONAL`] | as for a page                           |
//! | place in the cache, small block     | [`CACHE`]    | a read without the cache                |
//!
//! Allocations on the path of an I/O neither wait nor retry, since the I/O can do without them.
//! They leave the kernel's reserves to allocations that must succeed, and may be made in any
//! context. Pieces of several pages have an order of [`MAX_ORDER`] at most; allocating them does
//! not wake kswapd. Pages come from a [`Pool`] and return there.
//!
//! [`Pool`]: super::Pool
//!
//! C header: `include/linux/gfp_types.h`.

use kernel::alloc::Flags;

use crate::compat::gfp;
use crate::sys;

/// Largest order of the pages that an I/O allocates. The kernel has per-CPU lists for the orders up
/// to this one, and does not regard them as costly (`PAGE_ALLOC_COSTLY_ORDER`).
pub(crate) const MAX_ORDER: u32 = 3;

/// For allocations that are made with a device and may be large.
pub(crate) const LARGE: Flags = gfp(sys::OBD_GFP_LARGE);

/// For one page. Flags for `alloc_pages()`.
pub(crate) const PAGE: sys::gfp_t = sys::OBD_GFP_PAGE;

/// For several contiguous pages. Flags for `alloc_pages()`.
pub(crate) const PAGES: sys::gfp_t = sys::OBD_GFP_PAGES;

/// For small allocations that live as long as an I/O.
pub(crate) const OPTIONAL: Flags = gfp(sys::OBD_GFP_OPTIONAL);

/// For allocations of the cache. The shrinker frees them, so the kernel groups them apart from
/// memory that cannot be freed (`__GFP_RECLAIMABLE`).
pub(crate) const CACHE: Flags = gfp(sys::OBD_GFP_CACHE);
