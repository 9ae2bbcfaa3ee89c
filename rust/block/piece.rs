// SPDX-License-Identifier: GPL-2.0

//! Pieces: contiguous pages.
//!
//! Buffers are made of pages and not of slab memory, because lower devices may take references to
//! the pages of a bio: the network stack does, for example below a loop device.
//!
//! C header: `include/linux/gfp.h`.

use core::ptr::NonNull;

use kernel::page::PAGE_SIZE;

use super::memory;
use crate::sys;

/// Contiguous pages.
///
/// # Invariants
///
/// `page` is the first of `1 << order` contiguous pages, owned by this object. The order is at most
/// [`memory::MAX_ORDER`].
pub(super) struct Piece {
    page: NonNull<sys::page>,
    order: u32,
}

// SAFETY: Pages may be used and freed from any thread.
unsafe impl Send for Piece {}
// SAFETY: Nothing is changed through a shared reference.
unsafe impl Sync for Piece {}

impl Piece {
    /// Allocates `1 << order` pages without waiting. Returns `None` if there is no memory, or if
    /// the order is above [`memory::MAX_ORDER`].
    pub(super) fn try_new(order: u32) -> Option<Self> {
        let flags = match order {
            0 => memory::PAGE,
            1..=memory::MAX_ORDER => memory::PAGES,
            _ => return None,
        };
        // SAFETY: May be called in any context with these flags.
        let page = NonNull::new(unsafe { sys::alloc_pages(flags, order) })?;
        // SAFETY: The pages were just allocated, and are counted once.
        unsafe { sys::obd_count_reclaimable(page.as_ptr(), 1 << order) };
        // INVARIANT: Just allocated.
        Some(Self { page, order })
    }

    /// Returns the order: the binary logarithm of the number of pages.
    pub(super) fn order(&self) -> u32 {
        self.order
    }

    /// Returns the number of pages.
    pub(super) fn pages(&self) -> usize {
        1 << self.order
    }

    /// Returns the length in bytes.
    pub(super) fn len(&self) -> usize {
        PAGE_SIZE << self.order
    }

    /// Returns the first page.
    pub(super) fn page(&self) -> *mut sys::page {
        self.page.as_ptr()
    }

    /// Returns the address of the first byte, which is valid for reads and writes of [`Piece::len`]
    /// bytes.
    pub(super) fn start(&self) -> NonNull<u8> {
        // SAFETY: By the type invariant the page is valid, and it isn't in high memory.
        let start = unsafe { sys::obd_page_address(self.page.as_ptr()) };
        // SAFETY: No page is at address 0.
        unsafe { NonNull::new_unchecked(start.cast()) }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the pages are valid. `try_new` has counted them.
        unsafe { sys::obd_count_reclaimable(self.page.as_ptr(), -(1 << self.order)) };
        // SAFETY: By the type invariant this object owns the pages.
        unsafe { sys::__free_pages(self.page.as_ptr(), self.order) };
    }
}

/// Returns the number of pages that `len` bytes need, at least one.
pub(super) fn pages_for(len: usize) -> usize {
    len.div_ceil(PAGE_SIZE).max(1)
}
