// SPDX-License-Identifier: GPL-2.0

//! Blocks that were decompressed of late.
//!
//! A read of a part of a block goes through the cache, so that a 64 KiB block under 4 KiB reads is
//! read and decompressed once. Reads of one block that come together share the work: the first
//! loads it, the others wait for that. The kernel takes the memory back when it is short.
//!
//! A block's number chooses a set of [`WAYS`] places; the one that wasn't used for longest makes
//! room. Memory is only ever asked for without waiting; without it, a read does without the cache.
//!
//! Lock order: the cache's lock and a block's lock are taken alone. Both are taken in any context.

use core::ops::Range;

use kernel::prelude::*;
use kernel::sync::{Arc, SetOnce};

use super::Zfile;
use crate::block::{memory, Lock, Shrink};
use crate::dm::{self, Io, IoQueue};
use crate::format::num::{to_u64, to_usize};

/// Places that a block may be in.
const WAYS: usize = 8;
/// Places that the shrinker looks at while it has the lock, and for each block that it is to free.
const SCAN: usize = 64;
/// Places that are made between two pauses.
const PAUSE: usize = 1 << 16;

/// A block, or the place for it while it is being loaded.
#[pin_data]
pub(super) struct Block {
    number: u64,
    /// What it decompresses to, once it was loaded.
    data: SetOnce<KVec<u8>>,
    /// Reads that wait; `None` when loading has ended, well or not.
    #[pin]
    waiting: Lock<Option<IoQueue<Zfile>>>,
}

impl Block {
    fn new(number: u64) -> Result<Arc<Self>> {
        let key = kernel::static_lock_class!();
        Arc::pin_init(
            pin_init!(Self {
                number,
                data: SetOnce::new(),
                waiting <- Lock::new(Some(IoQueue::new()), c"dm_overlaybd_block", key),
            }),
            memory::CACHE,
        )
    }

    /// Keeps `data` as the block's bytes.
    pub(super) fn keep(&self, data: KVec<u8>) {
        self.data.populate(data);
    }

    /// The block's bytes, if it is loaded.
    pub(super) fn data(&self) -> Option<&[u8]> {
        self.data.as_ref().map(|data| data.as_slice())
    }

    /// Lets `io` wait until the block is loaded; gives it back where loading has ended.
    pub(super) fn wait(&self, io: Io<Zfile>) -> Option<Io<Zfile>> {
        match &mut *self.waiting.lock() {
            Some(queue) => {
                queue.push(io);
                None
            }
            None => Some(io),
        }
    }

    /// Takes the first read that waits. Where there is none, loading has ended.
    fn first_waiting(&self) -> Option<Io<Zfile>> {
        let mut waiting = self.waiting.lock();
        let first = (*waiting).as_mut().and_then(IoQueue::pop);
        if first.is_none() {
            *waiting = None;
        }
        first
    }
}

/// Loads a range of blocks in order. Dropping it fails the reads that wait for blocks that are left.
///
/// # Invariants
///
/// Those of `blocks` that are in the cache are being loaded by this.
pub(super) struct Loader {
    cache: Arc<Cache>,
    blocks: Range<u64>,
}

impl Loader {
    /// The blocks that are left.
    pub(super) fn blocks(&self) -> Range<u64> {
        self.blocks.clone()
    }

    /// Keeps the blocks before `at`, and gives the others away.
    pub(super) fn split_off(&mut self, at: u64) -> Self {
        let at = at.clamp(self.blocks.start, self.blocks.end);
        // INVARIANT: Each block belongs to one of the two.
        let rest = Self {
            cache: self.cache.clone(),
            blocks: at..self.blocks.end,
        };
        self.blocks.end = at;
        rest
    }

    /// The next block.
    pub(super) fn block(&self) -> Option<Arc<Block>> {
        self.cache.find(self.blocks.start)
    }

    /// Ends loading of the next block, which is `block`; gives those that wait for it. A block
    /// without data leaves the cache.
    pub(super) fn finish(&mut self, block: Option<Arc<Block>>) -> IoQueue<Zfile> {
        self.blocks.next();
        let Some(block) = block else {
            return IoQueue::new();
        };
        if block.data().is_none() {
            self.cache.remove(&block);
        }
        let waited = block.waiting.lock().take();
        waited.unwrap_or_default()
    }

    /// Gives the next block up. The first read that waits for it has to load it now; it comes with
    /// the loader for that. The others wait on. A block that no read waits for leaves the cache.
    pub(super) fn pass_on(&mut self) -> Option<(Io<Zfile>, Self)> {
        let block = self.block();
        let Some(io) = block.as_ref().and_then(|block| block.first_waiting()) else {
            drop(self.finish(block));
            return None;
        };
        let number = self.blocks.next()?;
        // INVARIANT: The block is still being loaded, by the new one alone.
        let loader = Self {
            cache: self.cache.clone(),
            blocks: number..number + 1,
        };
        Some((io, loader))
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        while !self.blocks.is_empty() {
            let block = self.block();
            drop(self.finish(block));
        }
    }
}

/// What the cache knows of a block.
pub(super) enum Lookup {
    /// The first is there, or is being loaded.
    Found(Arc<Block>),
    /// The first isn't there, and neither are the next ones: load them.
    Missing(Loader),
    /// There is no room or no memory for it.
    Bypass,
}

/// A place for a block.
struct Way {
    block: Option<Arc<Block>>,
    /// When it was used last.
    used: u64,
}

/// What the cache's lock guards.
///
/// # Invariants
///
/// `filled` is the number of ways with a block. There are whole sets of ways.
struct Sets {
    ways: KVVec<Way>,
    filled: usize,
    clock: u64,
    /// Where the shrinker goes on.
    hand: usize,
}

/// The cache of a device.
#[pin_data]
pub(crate) struct Cache {
    #[pin]
    sets: Lock<Sets>,
}

impl Cache {
    /// A cache for `blocks` blocks, rounded up to whole sets; `None` for 0.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(super) fn new(blocks: usize) -> Result<Option<Arc<Self>>> {
        if blocks == 0 {
            return Ok(None);
        }
        let count = blocks.checked_next_multiple_of(WAYS).ok_or(EOVERFLOW)?;
        let mut ways = KVVec::with_capacity(count, memory::LARGE)?;
        for nth in 0..count {
            if nth % PAUSE == 0 {
                dm::cond_resched();
            }
            let way = Way {
                block: None,
                used: 0,
            };
            ways.push(way, GFP_KERNEL)?;
        }
        // INVARIANT: No way has a block.
        let sets = Sets {
            ways,
            filled: 0,
            clock: 0,
            hand: 0,
        };
        let key = kernel::static_lock_class!();
        let cache = pin_init!(Self { sets <- Lock::new(sets, c"dm_overlaybd_cache", key) });
        Ok(Some(Arc::pin_init(cache, GFP_KERNEL)?))
    }

    /// Looks the first of `blocks` up. Where it is missing, it has a place now, and so have those
    /// behind it that are missing.
    pub(super) fn get(this: &Arc<Self>, blocks: Range<u64>) -> Lookup {
        let mut end = blocks.start;
        while end < blocks.end {
            match this.place(end) {
                Place::Found(block) if end == blocks.start => return Lookup::Found(block),
                Place::New => end += 1,
                Place::Found(_) | Place::None => break,
            }
        }
        if end == blocks.start {
            return Lookup::Bypass;
        }
        // INVARIANT: They have just got their places.
        Lookup::Missing(Loader {
            cache: this.clone(),
            blocks: blocks.start..end,
        })
    }

    /// Looks a block up, and gives it a place where it has none.
    fn place(&self, number: u64) -> Place {
        let removed;
        {
            let mut sets = self.sets.lock();
            sets.clock += 1;
            let clock = sets.clock;
            let set = sets.set(number);
            if let Some(way) = set.iter_mut().find(|way| way.has(number)) {
                way.used = clock;
                return way.block.clone().map_or(Place::None, Place::Found);
            }
            // A place that is empty or has a block that isn't being loaded.
            let oldest = set
                .iter_mut()
                .filter(|way| way.is_free())
                .min_by_key(|way| way.block.as_ref().map_or(0, |_| way.used));
            let Some(way) = oldest else {
                return Place::None;
            };
            let Ok(new) = Block::new(number) else {
                return Place::None;
            };
            removed = way.block.replace(new);
            way.used = clock;
            if removed.is_none() {
                sets.filled += 1;
            }
        }
        // The memory is freed here, without the lock.
        drop(removed);
        Place::New
    }

    /// A block that is there.
    pub(super) fn find(&self, number: u64) -> Option<Arc<Block>> {
        let mut sets = self.sets.lock();
        sets.clock += 1;
        let clock = sets.clock;
        let way = sets.set(number).iter_mut().find(|way| way.has(number))?;
        way.used = clock;
        way.block.clone()
    }

    /// Takes `block` out, if it is there.
    fn remove(&self, block: &Arc<Block>) {
        let mut sets = self.sets.lock();
        let way = sets.set(block.number).iter_mut().find(|way| {
            let there = way.block.as_ref();
            there.is_some_and(|there| Arc::ptr_eq(there, block))
        });
        // The caller has a reference, so nothing is freed under the lock.
        if way.is_some_and(|way| way.block.take().is_some()) {
            sets.filled -= 1;
        }
    }

    /// Blocks that are there.
    pub(super) fn len(&self) -> usize {
        self.sets.lock().filled
    }

    /// Looks at the next places for a block that isn't being loaded, and takes it out. Gives how
    /// many places it has looked at, too.
    fn evict(&self) -> (Option<Arc<Block>>, usize) {
        let mut sets = self.sets.lock();
        let count = sets.ways.len();
        if sets.filled == 0 {
            return (None, count);
        }
        // Not for long: interrupts are off.
        for looked in 1..=count.min(SCAN) {
            let hand = sets.hand;
            sets.hand = if hand + 1 < count { hand + 1 } else { 0 };
            let way = sets.ways.get_mut(hand).filter(|way| way.is_free());
            if let Some(block) = way.and_then(|way| way.block.take()) {
                sets.filled -= 1;
                return (Some(block), looked);
            }
        }
        (None, count.min(SCAN))
    }
}

/// What became of the search for a place.
enum Place {
    /// The block was there.
    Found(Arc<Block>),
    /// It has a place now.
    New,
    /// There is no place or no memory.
    None,
}

impl Way {
    /// Whether it has block `number`.
    fn has(&self, number: u64) -> bool {
        self.block
            .as_ref()
            .is_some_and(|block| block.number == number)
    }

    /// Whether the place may be given to another block.
    fn is_free(&self) -> bool {
        self.block
            .as_ref()
            .is_none_or(|block| block.data().is_some())
    }
}

impl Sets {
    /// The set that block `number` belongs in.
    fn set(&mut self, number: u64) -> &mut [Way] {
        // Neighbours are in different sets, so that an image of as many blocks as there are places
        // fits. Fibonacci hashing of the rest: strides don't crowd in one set.
        let sets = to_u64(self.ways.len() / WAYS);
        let row = number.checked_div(sets).unwrap_or(0);
        let turn = row.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let start = to_usize((number % sets.max(1) + turn) % sets.max(1)) * WAYS;
        self.ways.get_mut(start..start + WAYS).unwrap_or(&mut [])
    }
}

impl Shrink for Cache {
    fn count(&self) -> usize {
        self.len()
    }

    fn scan(&self, target: usize) -> usize {
        // It goes on there the next time.
        let mut left = target.saturating_mul(SCAN);
        let mut freed = 0;
        while freed < target && left > 0 {
            let (block, looked) = self.evict();
            left = left.saturating_sub(looked);
            // The memory is freed here, without the lock.
            freed += usize::from(block.is_some());
        }
        freed
    }
}
