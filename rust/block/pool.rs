// SPDX-License-Identifier: GPL-2.0

//! A pool of free pages for buffers and cached blocks. Reusing pages is faster than freeing and
//! allocating them for each I/O: many kernels clear the pages that they allocate (`init_on_alloc`),
//! which takes longer than all other work of a read on a page.
//!
//! Each CPU has a shelf. When it is full, pages go to the common shelf, and from there to the CPUs
//! whose shelves are empty: a read may end on another CPU than it began on. The size of each shelf
//! is bounded. A [`Tidier`] frees pages that were not used for a while, and [`Pool::drain`] frees
//! pages when the kernel is short of memory.
//!
//! Lock order: no other lock is taken with the lock of a shelf held. It may be taken in any context
//! but NMI.

use kernel::cpu::CpuId;
use kernel::page::PAGE_SIZE;
use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::Arc;

use super::memory::MAX_ORDER;
use super::piece::Piece;
use super::tidy::{Tidier, Tidy};
use super::Lock;

/// Number of the orders of pieces: 0 to [`MAX_ORDER`].
const ORDERS: usize = MAX_ORDER as usize + 1;
/// Largest number of pieces of each order on a CPU's shelf: 896 KiB in total.
const ON_CPU: [usize; ORDERS] = scaled([32, 16, 8, 16]);
/// Largest number of pieces of each order on the common shelf: 3.5 MiB in total.
const IN_COMMON: [usize; ORDERS] = scaled([128, 64, 32, 64]);
/// Largest number of pieces that are taken from a shelf while its lock is held.
const BATCH: usize = 8;

/// Scales numbers of pieces for pages of 4 KiB to the size of pages of this kernel: as many as have
/// the same number of bytes, at least one.
const fn scaled(pieces: [usize; ORDERS]) -> [usize; ORDERS] {
    let [a, b, c, d] = pieces;
    let pages = PAGE_SIZE / 4096;
    [
        a.div_ceil(pages),
        b.div_ceil(pages),
        c.div_ceil(pages),
        d.div_ceil(pages),
    ]
}

/// Pieces between two shelves. Dropping it frees those that are left.
#[derive(Default)]
struct Batch([Option<Piece>; BATCH]);

/// The pieces of one order on a shelf.
struct Stack {
    /// Never more than its capacity.
    pieces: KVec<Piece>,
    /// Smallest number of pieces since the last trim: so many were not used.
    least: usize,
}

impl Stack {
    fn pop(&mut self) -> Option<Piece> {
        let piece = self.pieces.pop();
        self.least = self.least.min(self.pieces.len());
        piece
    }

    /// Puts `piece` on the stack. Returns it if the stack is full.
    fn push(&mut self, piece: Piece) -> Option<Piece> {
        if self.pieces.len() == self.pieces.capacity() {
            return Some(piece);
        }
        // Doesn't fail: the capacity was checked.
        let _ = self.pieces.push_within_capacity(piece);
        None
    }

    /// Removes and returns up to `most` pieces, at most [`BATCH`].
    fn take(&mut self, most: usize) -> Batch {
        let mut batch = Batch::default();
        for slot in batch.0.iter_mut().take(most) {
            *slot = self.pop();
        }
        batch
    }

    /// Moves pieces of `batch` to the stack, as many as fit.
    fn put(&mut self, batch: &mut Batch) {
        for slot in &mut batch.0 {
            if let Some(piece) = slot.take() {
                *slot = self.push(piece);
            }
        }
    }
}

/// A store of pieces of each order.
#[pin_data]
struct Shelf {
    #[pin]
    stacks: Lock<[Stack; ORDERS]>,
    /// Number of pages on the shelf. Written with the lock held, read without.
    pages: Atomic<usize>,
}

impl Shelf {
    fn new(most: &[usize; ORDERS]) -> Result<Pin<KBox<Self>>> {
        let stack = |most: usize| {
            let pieces = KVec::with_capacity(most, GFP_KERNEL)?;
            Ok::<_, Error>(Stack { pieces, least: 0 })
        };
        let [one, two, four, eight] = *most;
        let stacks = [stack(one)?, stack(two)?, stack(four)?, stack(eight)?];
        let key = kernel::static_lock_class!();
        KBox::pin_init(
            pin_init!(Self {
                stacks <- Lock::new(stacks, c"dm_overlaybd_pool", key),
                pages: Atomic::new(0),
            }),
            GFP_KERNEL,
        )
    }

    /// Locks the shelf, and calls `change` with the stack of `order`. Returns the result, or `None`
    /// if there is no such order.
    fn with<R>(&self, order: u32, change: impl FnOnce(&mut Stack) -> R) -> Option<R> {
        let mut stacks = self.stacks.lock();
        let stack = stacks.get_mut(order as usize)?;
        let before = stack.pieces.len();
        let result = change(stack);
        let pages = (self.pages.load(Relaxed) + (stack.pieces.len() << order))
            .saturating_sub(before << order);
        self.pages.store(pages, Relaxed);
        Some(result)
    }

    /// Frees about `target` pages, in batches of up to [`BATCH`] pieces. Returns the number of
    /// pages freed.
    fn drain(&self, target: usize) -> usize {
        let mut freed = 0;
        for order in 0..=MAX_ORDER {
            while freed < target && self.pages.load(Relaxed) > 0 {
                // The pieces are freed here, after unlocking.
                let batch = self.with(order, |stack| stack.take(BATCH));
                let pieces = batch.map_or(0, |batch| batch.0.iter().flatten().count());
                if pieces == 0 {
                    break;
                }
                freed += pieces << order;
            }
        }
        freed
    }

    /// Frees as many pieces as were not used since the last trim.
    fn trim(&self) {
        for order in 0..=MAX_ORDER {
            let mut left = self.with(order, |stack| stack.least).unwrap_or(0);
            while left > 0 {
                let now = left.min(BATCH);
                // The pieces are freed here, after unlocking.
                drop(self.with(order, |stack| stack.take(now)));
                left -= now;
            }
            self.with(order, |stack| stack.least = stack.pieces.len());
        }
    }
}

/// The shelves of a pool.
struct Shelves {
    each: KVec<Pin<KBox<Shelf>>>,
    common: Pin<KBox<Shelf>>,
}

impl Shelves {
    fn new() -> Result<Arc<Self>> {
        let cpus = kernel::cpu::nr_cpu_ids() as usize;
        let mut each = KVec::with_capacity(cpus, GFP_KERNEL)?;
        for _ in 0..cpus {
            each.push(Shelf::new(&ON_CPU)?, GFP_KERNEL)?;
        }
        let common = Shelf::new(&IN_COMMON)?;
        Ok(Arc::new(Self { each, common }, GFP_KERNEL)?)
    }

    /// Returns this CPU's shelf. The thread may move to another CPU meanwhile: any shelf would do.
    fn here(&self) -> &Shelf {
        let here = self.each.get(CpuId::current().as_u32() as usize);
        here.unwrap_or(&self.common)
    }

    fn all(&self) -> impl Iterator<Item = &Shelf> {
        let each = self.each.iter().map(|shelf| &**shelf);
        Iterator::chain(core::iter::once(&*self.common), each)
    }

    /// Returns the number of pages on all shelves.
    fn pages(&self) -> usize {
        self.all().map(|shelf| shelf.pages.load(Relaxed)).sum()
    }
}

impl Tidy for Shelves {
    /// Frees pages that were not used since the last call.
    fn tidy(&self) -> bool {
        for shelf in self.all() {
            shelf.trim();
        }
        // While there are pages, a later call may free some.
        self.pages() > 0
    }
}

/// A pool of pages for all devices. The last reference is dropped in process context, since that
/// waits for the tidier.
pub(crate) struct Pool {
    shelves: Arc<Shelves>,
    /// Armed each time after a piece was put on a shelf, since it stops when all shelves are empty.
    ///
    /// No piece stays without a later call. A call takes the lock of each shelf. If it takes the
    /// lock after the thread that has put the piece there, it finds the piece. If it takes the lock
    /// before, the thread finds that the tidier isn't armed.
    tidier: Pin<KBox<Tidier<Shelves>>>,
}

impl Pool {
    /// Makes an empty pool. May sleep.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new() -> Result<Arc<Self>> {
        let shelves = Shelves::new()?;
        let tidier = Tidier::new(shelves.clone())?;
        Ok(Arc::new(Self { shelves, tidier }, GFP_KERNEL)?)
    }

    /// Returns a piece of `1 << order` pages: from this CPU's shelf, the common shelf, or newly
    /// allocated without waiting.
    pub(super) fn get(&self, order: u32) -> Option<Piece> {
        let (here, common) = (self.shelves.here(), &self.shelves.common);
        if let Some(piece) = here.with(order, Stack::pop).flatten() {
            return Some(piece);
        }
        if common.pages.load(Relaxed) > 0 {
            let mut batch = common.with(order, |stack| stack.take(BATCH))?;
            let first = batch.0.iter_mut().find_map(Option::take);
            if first.is_some() {
                here.with(order, |stack| stack.put(&mut batch));
                self.tidier.arm();
                return first;
            }
        }
        Piece::try_new(order)
    }

    /// Puts `piece` on this CPU's shelf. If that is full, first moves a batch from there to the
    /// common shelf. Pieces that fit on neither are freed.
    pub(super) fn put(&self, piece: Piece) {
        let order = piece.order();
        let (here, common) = (self.shelves.here(), &self.shelves.common);
        if let Some(Some(piece)) = here.with(order, |stack| stack.push(piece)) {
            let Some(mut batch) = here.with(order, |stack| stack.take(BATCH)) else {
                return;
            };
            common.with(order, |stack| stack.put(&mut batch));
            // Frees the piece if the shelf is full again.
            drop(here.with(order, |stack| stack.push(piece)));
        }
        self.tidier.arm();
    }

    /// Returns the number of pages in the pool.
    pub(crate) fn pages(&self) -> usize {
        self.shelves.pages()
    }

    /// Frees about `target` pages: up to a batch more, or fewer if the pool has fewer. Returns the
    /// number of pages freed.
    pub(crate) fn drain(&self, target: usize) -> usize {
        let mut freed = 0;
        for shelf in self.shelves.all() {
            if freed >= target {
                break;
            }
            freed += shelf.drain(target - freed);
        }
        freed
    }
}
