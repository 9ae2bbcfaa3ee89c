// SPDX-License-Identifier: GPL-2.0

//! The flags of all memory allocations.
//!
//! | Allocation                          | Flags        | If there is no memory                   |
//! |-------------------------------------|--------------|-----------------------------------------|
//! | when a table or the module is       | `GFP_KERNEL` | loading fails                           |
//! | loaded                              |              |                                         |
//! | the same, if it may be large        | [`LARGE`]    | loading fails, without a warning and    |
//! |                                     |              | without the OOM killer                  |
//! | page for a lower read               | [`PAGE`]     | a shorter read, then the spare buffer   |
//! | page for a block in the cache       | [`PAGE`]     | a read without the cache                |
//! | contiguous pages for either         | [`PAGES`]    | smaller pieces                          |
//! | list of the pieces of a lower read  | [`OPTIONAL`] | a shorter read, then the spare buffer   |
//! | data structures of the cache, block | [`CACHE`]    | a read without the cache                |
//! | of half a page or less              |              |                                         |
//!
//! The last five are made on the path of an I/O. They neither wait nor retry, since the I/O can
//! continue without them. They leave the kernel's reserves to allocations that must succeed, and
//! may be made in any context. Pieces of several pages have an order of [`MAX_ORDER`] at most;
//! allocating them does not wake kswapd. Pages come from a [`Pool`] and return to it.
//!
//! Each device has its own spare buffer, allocated when its table is loaded. A buffer that several
//! devices share would not do: one device may be above another one, and the read that uses the
//! buffer would wait for a lower read that needs it.
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

/// For allocations that are made when a table or the module is loaded, and may be large.
pub(crate) const LARGE: Flags = gfp(sys::OBD_GFP_LARGE);

/// For one page. Flags for `alloc_pages()`.
pub(crate) const PAGE: sys::gfp_t = sys::OBD_GFP_PAGE;

/// For several contiguous pages. Flags for `alloc_pages()`.
pub(crate) const PAGES: sys::gfp_t = sys::OBD_GFP_PAGES;

/// For small allocations that are freed when an I/O ends.
pub(crate) const OPTIONAL: Flags = gfp(sys::OBD_GFP_OPTIONAL);

/// For allocations of the cache, which the shrinker frees. So the kernel keeps them apart from
/// memory that it cannot reclaim (`__GFP_RECLAIMABLE`).
pub(crate) const CACHE: Flags = gfp(sys::OBD_GFP_CACHE);
