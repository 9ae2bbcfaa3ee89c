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

use kernel::alloc::flags::__GFP_NOWARN;
use kernel::prelude::*;
use kernel::sync::{Arc, SetOnce};

use super::Zfile;
use crate::block::{Lock, Shrink};
use crate::dm::{Io, IoQueue};
use crate::format::num::to_usize;

/// Places that a block may be in.
const WAYS: usize = 8;
/// Places that the shrinker looks at while it has the lock.
const SCAN: usize = 64;

/// A block, or the place for it while it is being loaded.
#[pin_data]
pub(crate) struct Block {
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
            GFP_NOWAIT | __GFP_NOWARN,
        )
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
}

/// The duty to load a block. Dropped, those that wait for it fail.
pub(super) struct Loader {
    cache: Arc<Cache>,
    block: Arc<Block>,
    done: bool,
}

impl Loader {
    /// Keeps `data` as the block's bytes.
    pub(super) fn keep(&self, data: KVec<u8>) {
        self.block.data.populate(data);
    }

    /// The block.
    pub(super) fn block(&self) -> Arc<Block> {
        self.block.clone()
    }

    /// Ends loading; gives those that waited. A block without data leaves the cache.
    pub(super) fn finish(mut self) -> IoQueue<Zfile> {
        self.end()
    }

    fn end(&mut self) -> IoQueue<Zfile> {
        self.done = true;
        if self.block.data().is_none() {
            self.cache.remove(&self.block);
        }
        let waited = self.block.waiting.lock().take();
        waited.unwrap_or_default()
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        if !self.done {
            drop(self.end());
        }
    }
}

/// What the cache knows of a block.
pub(super) enum Lookup {
    /// It is there, or is being loaded.
    Found(Arc<Block>),
    /// It isn't there: load it.
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
        let mut ways = KVVec::with_capacity(count, GFP_KERNEL | __GFP_NOWARN)?;
        for _ in 0..count {
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

    /// Looks block `number` up; where it is missing, it has a place now.
    pub(super) fn get(this: &Arc<Self>, number: u64) -> Lookup {
        let removed;
        let block;
        {
            let mut sets = this.sets.lock();
            sets.clock += 1;
            let clock = sets.clock;
            let set = sets.set(number);
            for way in set.iter_mut() {
                if let Some(block) = way.block.as_ref().filter(|block| block.number == number) {
                    way.used = clock;
                    return Lookup::Found(block.clone());
                }
            }
            // A place that is empty or has a block that isn't being loaded.
            let oldest = set
                .iter_mut()
                .filter(|way| way.is_free())
                .min_by_key(|way| way.block.as_ref().map_or(0, |_| way.used));
            let Some(way) = oldest else {
                return Lookup::Bypass;
            };
            let Ok(new) = Block::new(number) else {
                return Lookup::Bypass;
            };
            block = new.clone();
            removed = way.block.replace(new);
            way.used = clock;
            if removed.is_none() {
                sets.filled += 1;
            }
        }
        drop(removed);
        Lookup::Missing(Loader {
            cache: this.clone(),
            block,
            done: false,
        })
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

impl Way {
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
        // Fibonacci hashing: strides don't crowd in one set.
        let hash = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let sets = self.ways.len() / WAYS;
        let start = to_usize(hash).checked_rem(sets).unwrap_or(0) * WAYS;
        self.ways.get_mut(start..start + WAYS).unwrap_or(&mut [])
    }
}

impl Shrink for Cache {
    fn count(&self) -> usize {
        self.len()
    }

    fn scan(&self, target: usize) -> usize {
        let mut left = self.sets.lock().ways.len();
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
