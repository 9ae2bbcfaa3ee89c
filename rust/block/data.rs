// SPDX-License-Identifier: GPL-2.0

//! The memory of a cached block.

use kernel::page::PAGE_SIZE;
use kernel::prelude::*;
use kernel::sync::Arc;

use super::buffer::take_pieces;
use super::memory::{self, MAX_ORDER};
use super::piece::{pages_for, Piece};
use super::{Dest, Pool};

/// The decompressed bytes of a cached block: in pages of a [`Pool`], to which the pages return, or,
/// if the block has half a page or less, in slab memory.
///
/// # Invariants
///
/// The first `filled` bytes of the memory are initialised.
pub(crate) struct Data {
    memory: Memory,
    filled: usize,
    pool: Arc<Pool>,
}

enum Memory {
    Small(KVec<u8>),
    One(Piece),
    Many(KVec<Piece>),
    None,
}

impl Data {
    /// Allocates memory for `len` bytes, without waiting. Returns `None` if there is none.
    pub(crate) fn try_new(pool: &Arc<Pool>, len: usize) -> Option<Self> {
        let pages = pages_for(len);
        let memory = if len <= PAGE_SIZE / 2 {
            Memory::Small(KVec::with_capacity(len, memory::CACHE).ok()?)
        } else if let Some(piece) = (pages <= 1 << MAX_ORDER && pages.is_power_of_two())
            .then(|| pool.get(pages.ilog2()))
            .flatten()
        {
            Memory::One(piece)
        } else if pages > 1 {
            let mut pieces =
                KVec::with_capacity(pages.div_ceil(1 << MAX_ORDER), memory::CACHE).ok()?;
            take_pieces(pool, pages, &mut pieces)?;
            Memory::Many(pieces)
        } else {
            return None;
        };
        // INVARIANT: Nothing is filled.
        Some(Self {
            memory,
            filled: 0,
            pool: pool.clone(),
        })
    }

    /// Returns the size of the memory in bytes: at least the `len` of [`Data::try_new`].
    pub(crate) fn memory(&self) -> usize {
        match &self.memory {
            Memory::Small(bytes) => bytes.capacity(),
            Memory::One(piece) => piece.len(),
            Memory::Many(pieces) => pieces.iter().map(Piece::len).sum(),
            Memory::None => 0,
        }
    }

    /// Marks the memory as empty, and returns all of it as the destination of a write; `None` if
    /// the memory isn't contiguous.
    pub(crate) fn dest(&mut self) -> Option<Dest<'_>> {
        self.filled = 0;
        match &mut self.memory {
            Memory::Small(bytes) => {
                bytes.clear();
                Some(Dest::from(bytes.spare_capacity_mut()))
            }
            // SAFETY: `self` owns the piece, and is borrowed as long as the result lives.
            Memory::One(piece) => Some(unsafe { Dest::new(piece.start(), piece.len()) }),
            Memory::Many(_) | Memory::None => None,
        }
    }

    /// Marks the first `len` bytes as filled.
    ///
    /// # Safety
    ///
    /// The first `len` bytes of the memory that [`Data::dest`] returned have been written.
    pub(crate) unsafe fn set_filled(&mut self, len: usize) {
        // INVARIANT: By the safety requirement.
        self.filled = len;
    }

    /// Copies `bytes` to the memory. Returns `None` if they don't fit.
    pub(crate) fn fill(&mut self, bytes: &[u8]) -> Option<()> {
        if bytes.len() > self.memory() {
            return None;
        }
        let mut rest = bytes;
        match &mut self.memory {
            Memory::Many(pieces) => {
                for piece in &*pieces {
                    let (now, later) = rest.split_at(rest.len().min(piece.len()));
                    // SAFETY: `self` owns the piece, which has `len` bytes.
                    let dest = unsafe { Dest::new(piece.start(), piece.len()) };
                    dest.copy_from(now);
                    rest = later;
                }
            }
            _ => self.dest()?.copy_from(bytes),
        }
        // INVARIANT: All of `bytes` was copied: it fits.
        self.filled = bytes.len();
        Some(())
    }

    /// Returns the filled bytes from byte `from` on, in contiguous parts.
    pub(crate) fn parts(&self, from: usize) -> impl Iterator<Item = &[u8]> {
        let mut at = from;
        core::iter::from_fn(move || {
            let part = self.run(at)?;
            at += part.len();
            Some(part)
        })
    }

    /// Returns the longest contiguous part of the filled bytes from byte `from` on; `None` if there
    /// are none.
    fn run(&self, from: usize) -> Option<&[u8]> {
        let left = self.filled.checked_sub(from).filter(|&left| left > 0)?;
        let (start, inside, room) = match &self.memory {
            Memory::Small(bytes) => (bytes.as_ptr(), from, bytes.capacity()),
            Memory::One(piece) => (piece.start().as_ptr().cast_const(), from, piece.len()),
            Memory::Many(pieces) => {
                let mut before = 0;
                let piece = pieces.iter().find(|piece| {
                    before += piece.len();
                    from < before
                })?;
                let inside = from - (before - piece.len());
                (piece.start().as_ptr().cast_const(), inside, piece.len())
            }
            Memory::None => return None,
        };
        let room = room.checked_sub(inside)?;
        // SAFETY: `inside` is within this memory.
        let start = unsafe { start.add(inside) };
        // SAFETY: By the type invariant the bytes up to `filled` are initialised, and this memory
        // has so many of them.
        Some(unsafe { core::slice::from_raw_parts(start, room.min(left)) })
    }
}

impl Drop for Data {
    fn drop(&mut self) {
        match core::mem::replace(&mut self.memory, Memory::None) {
            Memory::One(piece) => self.pool.put(piece),
            Memory::Many(pieces) => {
                for piece in pieces {
                    self.pool.put(piece);
                }
            }
            Memory::Small(_) | Memory::None => {}
        }
    }
}
