// SPDX-License-Identifier: GPL-2.0

//! Buffers: memory for the stored bytes that a lower read fetches.
//!
//! A read gets pages from a [`Pool`], without waiting. A buffer of up to four pages is one piece,
//! if there is one. All other buffers are made of pieces of up to eight pages. If there are no
//! pages, the read gets the device's spare buffer, which was allocated when the device was made.
//!
//! C headers: `include/linux/bio.h`, `include/linux/vmalloc.h`.

use core::ptr::NonNull;

use kernel::page::{page_align, PAGE_SIZE};
use kernel::prelude::*;

use super::memory::{self, MAX_ORDER};
use super::piece::{pages_for, Piece};
use super::Pool;
use crate::compat;
use crate::sys;

/// Largest number of pages that a buffer has in one piece, so that a small read is decompressed
/// without a copy. Three pages then take a piece of four.
const IN_ONE: usize = 4;

/// Memory for one lower read.
///
/// # Invariants
///
/// `len` is at most the size of the memory. Its first `filled` bytes are initialised, and `filled`
/// is at most `len`. All in bytes.
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

/// Pieces, and the vector of the bio that reads into them.
///
/// # Invariants
///
/// No piece is larger than the one before it. `largest` of them are of order [`MAX_ORDER`]. `vecs`
/// has an entry for each piece.
struct Many {
    pieces: KVec<Piece>,
    /// Number of the pieces of order [`MAX_ORDER`].
    largest: usize,
    vecs: KVec<sys::bio_vec>,
}

// SAFETY: The vector refers only to pages of `pieces`, which may be sent.
unsafe impl Send for Many {}
// SAFETY: Nothing is changed through a shared reference.
unsafe impl Sync for Many {}

impl Many {
    /// Takes `pages` pages from `pool`, without waiting. Returns `None` if there are not enough.
    fn try_new(pool: &Pool, pages: usize) -> Option<KBox<Self>> {
        let mut pieces =
            KVec::with_capacity(pages.div_ceil(1 << MAX_ORDER) + 2, memory::OPTIONAL).ok()?;
        let whole = take_pieces(pool, pages, &mut pieces);
        let vecs = compat::zeroed(pieces.len(), memory::OPTIONAL).ok();
        // If there are too few pages, or there is no memory for the vector, the pieces are freed;
        // they do not return to the pool.
        match (whole, vecs) {
            (Some(()), Some(vecs)) => {
                let largest = pieces.iter().filter(|piece| piece.order() == MAX_ORDER);
                // INVARIANT: `take_pieces` appends smaller pieces after larger ones; counted above.
                let many = Self {
                    largest: largest.count(),
                    pieces,
                    vecs,
                };
                KBox::new(many, memory::OPTIONAL).ok()
            }
            _ => None,
        }
    }

    /// Returns the piece that has byte `from` of the buffer, and the number of that byte in the
    /// piece; `None` if the pieces have fewer bytes.
    fn piece(&self, from: usize) -> Option<(&Piece, usize)> {
        const LARGEST: usize = PAGE_SIZE << MAX_ORDER;
        // By the type invariant, so many pieces of the largest size are before that piece.
        let mut nth = (from / LARGEST).min(self.largest);
        // Doesn't wrap: `nth` is at most `from / LARGEST`.
        let mut inside = from - nth * LARGEST;
        loop {
            let piece = self.pieces.get(nth)?;
            if inside < piece.len() {
                return Some((piece, inside));
            }
            inside -= piece.len();
            nth += 1;
        }
    }
}

/// Takes pieces with `pages` pages in total from `pool`, the largest that there are, and appends
/// them to `pieces`, larger ones first. Returns `None` if there are not enough; then `pieces` has
/// those that were found, and frees them when it is dropped.
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

/// Memory of a spare buffer, from vmalloc, and the vector of the bio that reads into it.
struct Spare {
    memory: VVec<u8>,
    vecs: KVec<sys::bio_vec>,
}

// SAFETY: The vector refers only to pages of `memory`, which may be sent.
unsafe impl Send for Spare {}

impl Buffer {
    /// Makes a buffer of `len` bytes with pages from `pool`, without waiting. Returns `None` if
    /// there is no memory.
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
        // INVARIANT: The memory has at least `len` bytes; nothing is filled.
        Some(Self {
            memory,
            len,
            filled: 0,
        })
    }

    /// Returns the pages to `pool`. Frees a spare buffer.
    pub(crate) fn recycle(self, pool: &Pool) {
        match self.memory {
            Memory::One(piece) => pool.put(piece),
            Memory::Many(many) => {
                let pieces = KBox::into_inner(many).pieces;
                for piece in pieces {
                    pool.put(piece);
                }
            }
            Memory::Spare(_) => {}
        }
    }

    /// Allocates a spare buffer of `len` bytes, rounded up to whole pages. Reads of metadata use
    /// such buffers, too. Called in process context.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`], and [`EOVERFLOW`] if `len` cannot be rounded up.
    pub(crate) fn new_spare(len: usize) -> Result<Self> {
        let len = page_align(len).ok_or(EOVERFLOW)?;
        let memory = compat::zeroed(len, memory::LARGE)?;
        let vecs = compat::zeroed(len / PAGE_SIZE, GFP_KERNEL)?;
        let spare = KBox::new(Spare { memory, vecs }, GFP_KERNEL)?;
        // INVARIANT: The memory has `len` bytes; nothing counts as filled.
        Ok(Self {
            memory: Memory::Spare(spare),
            len,
            filled: 0,
        })
    }

    /// Returns whether this is a spare buffer: one that [`Buffer::new_spare`] has made.
    pub(crate) fn is_spare(&self) -> bool {
        matches!(self.memory, Memory::Spare(_))
    }

    /// Returns whether the length of the buffer is 0.
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Sets the length of the buffer to `len` bytes, none of them filled.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if the memory is smaller.
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

    /// Returns the number of bytes that the last read has filled.
    pub(crate) fn filled(&self) -> usize {
        self.filled
    }

    /// Returns `len` of the bytes that the last read has filled, from byte `from` on; `None` if they
    /// aren't all filled, or aren't contiguous. In the second case, [`Buffer::copy`] copies them.
    pub(crate) fn get(&self, from: usize, len: usize) -> Option<&[u8]> {
        self.run(from)?.get(..len)
    }

    /// Copies filled bytes, from byte `from` on, to all of `to`, and returns `to`; `None` if too
    /// few bytes are filled.
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

    /// Returns the longest contiguous part of the filled bytes from byte `from` on; `None` if there
    /// are none.
    fn run(&self, from: usize) -> Option<&[u8]> {
        let left = self.filled.checked_sub(from).filter(|&left| left > 0)?;
        let (start, room) = match &self.memory {
            Memory::One(piece) => (piece.start().as_ptr().cast_const(), piece.len()),
            Memory::Spare(spare) => (spare.memory.as_ptr(), spare.memory.len()),
            Memory::Many(many) => {
                let (piece, inside) = many.piece(from)?;
                let room = piece.len() - inside;
                // SAFETY: `inside` is below the length of the piece.
                let start = unsafe { piece.start().as_ptr().add(inside) };
                // SAFETY: By the type invariant the filled bytes are initialised, and this piece
                // has so many of them.
                return Some(unsafe { core::slice::from_raw_parts(start, room.min(left)) });
            }
        };
        let room = room.checked_sub(from)?;
        // SAFETY: `from` is below `filled`, which is at most the length of the memory.
        let start = unsafe { start.add(from) };
        // SAFETY: By the type invariant the memory has these bytes, and they are initialised.
        Some(unsafe { core::slice::from_raw_parts(start, room.min(left)) })
    }

    /// Marks all `len` bytes as filled.
    ///
    /// # Safety
    ///
    /// A read of `len` bytes into the buffer has succeeded.
    pub(crate) unsafe fn set_filled(&mut self) {
        if let Memory::Spare(spare) = &mut self.memory {
            let addr = spare.memory.as_mut_ptr().cast();
            // SAFETY: The memory is from vmalloc and has at least `len` bytes. Lossless: a spare
            // buffer is for one block of a ZFile, or for a chunk of metadata.
            unsafe { sys::obd_invalidate_kernel_vmap_range(addr, self.len as i32) };
        }
        // INVARIANT: By the safety requirement.
        self.filled = self.len;
    }

    /// Initialises `bio` as a read from `bdev` that fills the buffer. The caller must uninitialise
    /// it again, also after an error. If `bdev` isn't null, the bio is charged to the control group
    /// of the current task; if it is null, the bio has neither a device nor a group yet.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if the bio has no room for all of the buffer. It must not be submitted then.
    ///
    /// # Safety
    ///
    /// - `bio` and `vec` are valid for writes. They and this buffer stay where they are until the
    ///   bio is uninitialised.
    /// - `bdev` is null, or a block device that stays open until then.
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
                // SAFETY: The bio has room for one contiguous range, and these pages are one, of at
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
                    // SAFETY: The vector has an entry for each piece, and the piece has `now`
                    // bytes.
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
