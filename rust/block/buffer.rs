// SPDX-License-Identifier: GPL-2.0

//! Memory that a lower read fills.
//!
//! A read gets pages from a [`Pool`], without waiting: up to four in one piece, more in pieces of up
//! to eight. Where there are none it gets a device's spare buffer, which was allocated when the
//! device was made.
//!
//! C headers: `include/linux/bio.h`, `include/linux/vmalloc.h`.

use core::ops::Range;
use core::ptr::NonNull;

use kernel::page::{page_align, PAGE_SIZE};
use kernel::prelude::*;

use super::memory::{self, MAX_ORDER};
use super::piece::{pages_for, Piece};
use super::Pool;
use crate::compat;
use crate::sys;

/// Up to so many pages are in one piece, if there is one, so that a small read needn't be copied to be
/// decompressed. Three pages then take four.
const IN_ONE: usize = 4;

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
    One(Piece),
    Many(KBox<Many>),
    Spare(KBox<Spare>),
}

/// Pieces, and the vector with which a bio reads into them.
struct Many {
    pieces: KVec<Piece>,
    vecs: KVec<sys::bio_vec>,
}

// SAFETY: The vector only names pages of `pieces`, which may be sent.
unsafe impl Send for Many {}
// SAFETY: Nothing is changed through a shared reference.
unsafe impl Sync for Many {}

impl Many {
    /// Takes `pages` pages from `pool`.
    fn try_new(pool: &Pool, pages: usize) -> Option<KBox<Self>> {
        let mut pieces =
            KVec::with_capacity(pages.div_ceil(1 << MAX_ORDER) + 2, memory::OPTIONAL).ok()?;
        let whole = take_pieces(pool, pages, &mut pieces);
        let vecs = compat::zeroed(pieces.len(), memory::OPTIONAL).ok();
        // Without memory for what lists them, the pages are freed.
        match (whole, vecs) {
            (Some(()), Some(vecs)) => KBox::new(Self { pieces, vecs }, memory::OPTIONAL).ok(),
            _ => None,
        }
    }
}

/// Takes pieces of `pages` pages in all from `pool`, the largest that there are. What was taken is
/// in `pieces` also where there are not so many.
pub(super) fn take_pieces(pool: &Pool, pages: usize, pieces: &mut KVec<Piece>) -> Option<()> {
    let (mut left, mut order) = (pages, MAX_ORDER);
    while left > 0 {
        order = order.min(left.ilog2());
        match pool.get(order) {
            Some(piece) => {
                left -= piece.pages();
                pieces.push(piece, memory::OPTIONAL).ok()?;
            }
            None => order = order.checked_sub(1)?,
        }
    }
    Some(())
}

/// Memory that isn't contiguous, and the vector with which a bio reads into it.
struct Spare {
    memory: VVec<u8>,
    vecs: KVec<sys::bio_vec>,
}

// SAFETY: The vector only names pages of `memory`, which may be sent.
unsafe impl Send for Spare {}

impl Buffer {
    /// Takes memory for `len` bytes from `pool`, without waiting; `None` where memory is short.
    pub(crate) fn try_new(pool: &Pool, len: usize) -> Option<Self> {
        let pages = pages_for(len);
        let one = match pages {
            0..=IN_ONE => pool.get(pages.next_power_of_two().ilog2()),
            _ => None,
        };
        let memory = match one {
            Some(piece) => Memory::One(piece),
            None if pages > 1 => Memory::Many(Many::try_new(pool, pages)?),
            None => return None,
        };
        // INVARIANT: The capacity is at least `len`; nothing is filled.
        Some(Self {
            memory,
            len,
            filled: 0,
        })
    }

    /// Gives the memory back to `pool`.
    pub(crate) fn recycle(self, pool: &Pool) {
        match self.memory {
            Memory::One(piece) => pool.put(piece),
            Memory::Many(many) => {
                let Many { pieces, vecs: _ } = KBox::into_inner(many);
                for piece in pieces {
                    pool.put(piece);
                }
            }
            Memory::Spare(_) => {}
        }
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
            Memory::One(piece) => piece.len(),
            Memory::Many(many) => many.pieces.iter().map(Piece::len).sum(),
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

    /// Bytes that the last read filled.
    pub(crate) fn filled(&self) -> usize {
        self.filled
    }

    /// A part of what the last read filled; `None` where it isn't, or isn't contiguous. Then it may
    /// be [copied](Self::copy).
    pub(crate) fn get(&self, part: Range<usize>) -> Option<&[u8]> {
        let len = part.end.checked_sub(part.start)?;
        let found = self.run(part.start)?;
        found.get(..len)
    }

    /// Copies what the last read filled, from byte `from`, to all of `to`; gives `to`.
    pub(crate) fn copy<'a>(&self, mut from: usize, to: &'a mut [u8]) -> Option<&'a [u8]> {
        let mut rest = &mut *to;
        while !rest.is_empty() {
            let run = self.run(from)?;
            let (now, later) = rest.split_at_mut(rest.len().min(run.len()));
            now.copy_from_slice(run.get(..now.len())?);
            from += now.len();
            rest = later;
        }
        Some(to)
    }

    /// The longest contiguous part from byte `from` on of what was filled; `None` where there is
    /// nothing.
    fn run(&self, from: usize) -> Option<&[u8]> {
        let left = self.filled.checked_sub(from).filter(|&left| left > 0)?;
        let (start, room) = match &self.memory {
            Memory::One(piece) => (piece.start().as_ptr().cast_const(), piece.len()),
            Memory::Spare(spare) => (spare.memory.as_ptr(), spare.memory.len()),
            Memory::Many(many) => {
                let mut before = 0;
                let piece = many.pieces.iter().find(|piece| {
                    before += piece.len();
                    from < before
                })?;
                let inside = from - (before - piece.len());
                let room = piece.len() - inside;
                // SAFETY: `inside` is below the length of the piece.
                let start = unsafe { piece.start().as_ptr().add(inside) };
                // SAFETY: By the type invariant, what was filled is initialised; so much of it is
                // in this piece.
                return Some(unsafe { core::slice::from_raw_parts(start, room.min(left)) });
            }
        };
        let room = room.checked_sub(from)?;
        // SAFETY: `from` is below `filled`, which is at most the length of the memory.
        let start = unsafe { start.add(from) };
        // SAFETY: By the type invariant these bytes are there and initialised.
        Some(unsafe { core::slice::from_raw_parts(start, room.min(left)) })
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
            Memory::One(piece) => {
                // SAFETY: The caller promises that bio, vector and device are valid.
                unsafe { sys::bio_init(bio.as_ptr(), bdev, vec.as_ptr(), 1, flags) };
                // SAFETY: The bio has room for one contiguous run, and these pages are one, of at
                // least `len` bytes.
                unsafe { sys::__bio_add_page(bio.as_ptr(), piece.page(), self.len as u32, 0) };
            }
            Memory::Many(many) => {
                let vecs = &mut many.vecs;
                let count = vecs.len() as u16;
                // SAFETY: The caller promises that bio and device are valid; the vector is as
                // valid as the buffer.
                unsafe { sys::bio_init(bio.as_ptr(), bdev, vecs.as_mut_ptr(), count, flags) };
                let mut left = self.len;
                for piece in &many.pieces {
                    let now = left.min(piece.len());
                    if now == 0 {
                        break;
                    }
                    left -= now;
                    // SAFETY: The vector has an entry for each piece, and the piece `now` bytes.
                    unsafe { sys::__bio_add_page(bio.as_ptr(), piece.page(), now as u32, 0) };
                }
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
