// SPDX-License-Identifier: GPL-2.0

//! Pages that are used again, instead of being freed and allocated for each I/O: many kernels clear
//! what they allocate (`init_on_alloc`), which takes longer than all else that a read does with a
//! page.
//!
//! Each CPU has a shelf; what one has too much of goes to the common one, and from there to the CPUs
//! that lack it: a read may end on another CPU than it began. All have bounds. What was not used for
//! a while is freed ([`Pool::trim`]), and the kernel takes pages back when it is short of memory
//! ([`Pool::drain`]).
//!
//! Lock order: each shelf's lock is taken alone, in any context.

use kernel::cpu::CpuId;
use kernel::page::PAGE_SIZE;
use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::Arc;

use super::memory::MAX_ORDER;
use super::piece::Piece;
use super::Lock;

/// Orders of pieces.
const ORDERS: usize = MAX_ORDER as usize + 1;
/// Pieces of each order that a CPU's shelf has at most: 896 KiB.
const ON_CPU: [usize; ORDERS] = scaled([32, 16, 8, 16]);
/// Pieces of each order that the common shelf has at most: 3.5 MiB.
const IN_COMMON: [usize; ORDERS] = scaled([128, 64, 32, 64]);
/// Pieces that go from one shelf to another at once.
const BATCH: usize = 8;

/// Returns how many pieces have the memory that so many have where pages are of 4 KiB; at least one.
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

/// Pieces that are on their way; what is left is freed.
#[derive(Default)]
struct Batch([Option<Piece>; BATCH]);

/// Pieces of one order.
struct Stack {
    /// Never more than it has room for.
    pieces: KVec<Piece>,
    /// The fewest that there were since the last trim: so many weren't used.
    least: usize,
}

impl Stack {
    fn pop(&mut self) -> Option<Piece> {
        let piece = self.pieces.pop();
        self.least = self.least.min(self.pieces.len());
        piece
    }

    /// Puts `piece` there, or gives it back.
    fn push(&mut self, piece: Piece) -> Option<Piece> {
        if self.pieces.len() == self.pieces.capacity() {
            return Some(piece);
        }
        // There is room, so this doesn't fail.
        let _ = self.pieces.push_within_capacity(piece);
        None
    }

    /// Takes up to `most` pieces.
    fn take(&mut self, most: usize) -> Batch {
        let mut batch = Batch::default();
        for slot in batch.0.iter_mut().take(most) {
            *slot = self.pop();
        }
        batch
    }

    /// Puts as much of `batch` there as there is room for.
    fn put(&mut self, batch: &mut Batch) {
        for slot in &mut batch.0 {
            if let Some(piece) = slot.take() {
                *slot = self.push(piece);
            }
        }
    }
}

/// Some pieces of each order.
#[pin_data]
struct Shelf {
    #[pin]
    stacks: Lock<[Stack; ORDERS]>,
    /// Pages that are there. Changed with the lock held, read without.
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

    /// Calls `change` with the stack of `order`, and `None` where there is no such order.
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

    /// Frees up to `target` pages, and gives how many.
    fn drain(&self, target: usize) -> usize {
        let mut freed = 0;
        for order in 0..=MAX_ORDER {
            while freed < target && self.pages.load(Relaxed) > 0 {
                // Freed here, without the lock.
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

    /// Frees what was not used since the last time.
    fn trim(&self) {
        for order in 0..=MAX_ORDER {
            let mut left = self.with(order, |stack| stack.least).unwrap_or(0);
            while left > 0 {
                let now = left.min(BATCH);
                // Freed here, without the lock.
                drop(self.with(order, |stack| stack.take(now)));
                left -= now;
            }
            self.with(order, |stack| stack.least = stack.pieces.len());
        }
    }
}

/// Pages for all devices.
pub(crate) struct Pool {
    each: KVec<Pin<KBox<Shelf>>>,
    common: Pin<KBox<Shelf>>,
}

impl Pool {
    /// Makes a pool, which is empty.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new() -> Result<Arc<Self>> {
        let cpus = kernel::cpu::nr_cpu_ids() as usize;
        let mut each = KVec::with_capacity(cpus, GFP_KERNEL)?;
        for _ in 0..cpus {
            each.push(Shelf::new(&ON_CPU)?, GFP_KERNEL)?;
        }
        let common = Shelf::new(&IN_COMMON)?;
        Ok(Arc::new(Self { each, common }, GFP_KERNEL)?)
    }

    /// This CPU's shelf. It doesn't matter if the thread moves on.
    fn here(&self) -> &Shelf {
        let here = self.each.get(CpuId::current().as_u32() as usize);
        here.unwrap_or(&self.common)
    }

    /// Gives `1 << order` pages, without waiting.
    pub(super) fn get(&self, order: u32) -> Option<Piece> {
        let here = self.here();
        if let Some(piece) = here.with(order, Stack::pop).flatten() {
            return Some(piece);
        }
        if self.common.pages.load(Relaxed) > 0 {
            let mut batch = self.common.with(order, |stack| stack.take(BATCH))?;
            let first = batch.0.iter_mut().find_map(Option::take);
            if first.is_some() {
                here.with(order, |stack| stack.put(&mut batch));
                return first;
            }
        }
        Piece::try_new(order)
    }

    /// Takes pages back.
    pub(super) fn put(&self, piece: Piece) {
        let order = piece.order();
        let here = self.here();
        let Some(Some(piece)) = here.with(order, |stack| stack.push(piece)) else {
            return;
        };
        let Some(mut batch) = here.with(order, |stack| stack.take(BATCH)) else {
            return;
        };
        self.common.with(order, |stack| stack.put(&mut batch));
        // What isn't taken is freed.
        drop(here.with(order, |stack| stack.push(piece)));
    }

    fn shelves(&self) -> impl Iterator<Item = &Shelf> {
        let each = self.each.iter().map(|shelf| &**shelf);
        Iterator::chain(core::iter::once(&*self.common), each)
    }

    /// Pages that are here.
    pub(crate) fn pages(&self) -> usize {
        self.shelves().map(|shelf| shelf.pages.load(Relaxed)).sum()
    }

    /// Frees up to `target` pages, or a few more; gives how many.
    pub(crate) fn drain(&self, target: usize) -> usize {
        let mut freed = 0;
        for shelf in self.shelves() {
            if freed >= target {
                break;
            }
            freed += shelf.drain(target - freed);
        }
        freed
    }

    /// Frees what nobody has used since the last time. In process context.
    pub(crate) fn trim(&self) {
        for shelf in self.shelves() {
            shelf.trim();
        }
    }
}
