// SPDX-License-Identifier: GPL-2.0

//! Memory that a lower read fills.
//!
//! A read gets pages, without waiting. Where there are none it gets a device's spare buffer, which
//! was allocated when the device was made.
//!
//! It is pages and not slab memory, because lower devices may take references to them: the network
//! does, below loop devices and others.
//!
//! C headers: `include/linux/gfp.h`, `include/linux/vmalloc.h`.

use core::ptr::NonNull;

use kernel::page::{page_align, PAGE_SIZE};
use kernel::prelude::*;

use super::memory;
use crate::compat;
use crate::sys;

/// Memory for one read.
///
/// # Invariants
///
/// `len` is at most the capacity of the memory. Its first `filled` bytes are initialised, and
/// `filled` is at most `len`.
pub(crate) struct Buffer {
    memory: Memory,
    len: usize,
    filled: usize,
}

enum Memory {
    Pages(Pages),
    Spare(KBox<Spare>),
}

/// Contiguous pages.
///
/// # Invariants
///
/// `page` is the first of `1 << order` pages in one piece, owned by this.
struct Pages {
    page: NonNull<sys::page>,
    order: u32,
}

// SAFETY: Pages may be used and freed from any thread.
unsafe impl Send for Pages {}
// SAFETY: Nothing is changed through a shared reference.
unsafe impl Sync for Pages {}

impl Pages {
    /// Allocates room for `len` bytes without waiting.
    fn try_new(len: usize) -> Option<Self> {
        let order = len.div_ceil(PAGE_SIZE).checked_next_power_of_two()?.ilog2();
        // SAFETY: May be called in any context with these flags.
        let page = unsafe { sys::alloc_pages(memory::READ, order) };
        // INVARIANT: Just allocated.
        Some(Self {
            page: NonNull::new(page)?,
            order,
        })
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: By the type invariant the page is valid, and it isn't in high memory.
        unsafe { sys::obd_page_address(self.page.as_ptr()) }.cast()
    }

    fn capacity(&self) -> usize {
        PAGE_SIZE << self.order
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the pages are ours.
        unsafe { sys::__free_pages(self.page.as_ptr(), self.order) };
    }
}

/// Memory that isn't contiguous, and the vector with which a bio reads into it.
struct Spare {
    memory: VVec<u8>,
    vecs: KVec<sys::bio_vec>,
}

// SAFETY: The vector only names pages of `memory`, which may be sent.
unsafe impl Send for Spare {}

impl Buffer {
    /// Allocates `len` bytes without waiting, at a multiple of the page size; `None` where memory
    /// is short.
    pub(crate) fn try_new(len: usize) -> Option<Self> {
        // INVARIANT: The capacity is at least `len`; nothing is filled.
        Some(Self {
            memory: Memory::Pages(Pages::try_new(len)?),
            len,
            filled: 0,
        })
    }

    /// Allocates a spare buffer of `len` bytes, in process context.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new_spare(len: usize) -> Result<Self> {
        let len = page_align(len).ok_or(EOVERFLOW)?;
        let memory = compat::zeroed(len, memory::LARGE)?;
        let vecs = compat::zeroed(len / PAGE_SIZE, GFP_KERNEL)?;
        let spare = KBox::new(Spare { memory, vecs }, GFP_KERNEL)?;
        // INVARIANT: The capacity is `len`; nothing counts as filled.
        Ok(Self {
            memory: Memory::Spare(spare),
            len,
            filled: 0,
        })
    }

    /// Whether this is a device's spare buffer.
    pub(crate) fn is_spare(&self) -> bool {
        matches!(self.memory, Memory::Spare(_))
    }

    /// Whether it has no room at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes the buffer empty, with room for `len` bytes.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] where it is smaller.
    pub(crate) fn reset(&mut self, len: usize) -> Result {
        let capacity = match &self.memory {
            Memory::Pages(pages) => pages.capacity(),
            Memory::Spare(spare) => spare.memory.len(),
        };
        if len > capacity {
            return Err(EINVAL);
        }
        // INVARIANT: Checked above; nothing is filled.
        self.len = len;
        self.filled = 0;
        Ok(())
    }

    /// What the last read filled.
    pub(crate) fn bytes(&self) -> &[u8] {
        let start = match &self.memory {
            Memory::Pages(pages) => pages.start().cast_const(),
            Memory::Spare(spare) => spare.memory.as_ptr(),
        };
        // SAFETY: By the type invariant these bytes are there and initialised.
        unsafe { core::slice::from_raw_parts(start, self.filled) }
    }

    /// Marks the whole length as filled.
    ///
    /// # Safety
    ///
    /// A read of the length of the buffer into it has succeeded.
    pub(crate) unsafe fn set_filled(&mut self) {
        if let Memory::Spare(spare) = &mut self.memory {
            let addr = spare.memory.as_mut_ptr().cast();
            // SAFETY: The memory is from vmalloc, and `len` bytes of it are there. Lossless: a
            // spare buffer holds a block or a chunk.
            unsafe { sys::obd_invalidate_kernel_vmap_range(addr, self.len as i32) };
        }
        // INVARIANT: By the safety requirement.
        self.filled = self.len;
    }

    /// Initialises `bio` as a read from `bdev` that fills the buffer; it must be uninitialised
    /// again, also after an error. With a device, the bio is charged to the control group of the
    /// current task; without, it has neither device nor group yet.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] where not all of the buffer is in the bio, which must not be submitted then.
    ///
    /// # Safety
    ///
    /// - `bio` and `vec` are valid for writes and stay where they are until the bio was
    ///   uninitialised; so does this buffer.
    /// - `bdev` is an open block device, and stays so, or null.
    pub(crate) unsafe fn init_read(
        &mut self,
        bio: NonNull<sys::bio>,
        vec: NonNull<sys::bio_vec>,
        bdev: *mut sys::block_device,
        flags: sys::blk_opf_t,
    ) -> Result {
        let flags = sys::req_op_REQ_OP_READ as sys::blk_opf_t | flags;
        self.filled = 0;
        match &mut self.memory {
            Memory::Pages(pages) => {
                // SAFETY: The caller promises that bio, vector and device are valid.
                unsafe { sys::bio_init(bio.as_ptr(), bdev, vec.as_ptr(), 1, flags) };
                // SAFETY: The bio has room for one contiguous run, and these pages are one, of at
                // least `len` bytes.
                unsafe {
                    sys::__bio_add_page(bio.as_ptr(), pages.page.as_ptr(), self.len as u32, 0)
                };
            }
            Memory::Spare(spare) => {
                let vecs = &mut spare.vecs;
                let count = vecs.len() as u16;
                // SAFETY: The caller promises that bio and device are valid; the vector is as
                // valid as the buffer.
                unsafe { sys::bio_init(bio.as_ptr(), bdev, vecs.as_mut_ptr(), count, flags) };
                let addr = spare.memory.as_mut_ptr().cast();
                // SAFETY: The memory is from vmalloc and at least `len` bytes long, and the vector
                // has an entry for each of its pages.
                let added = unsafe { sys::bio_add_vmalloc(bio.as_ptr(), addr, self.len as u32) };
                if !added {
                    return Err(EINVAL);
                }
            }
        }
        Ok(())
    }
}
