// SPDX-License-Identifier: GPL-2.0

//! The cache of recently decompressed blocks, for all zfile devices.
//!
//! A read of a part of a block goes through the cache, so that a 64 KiB block is read and
//! decompressed once, and not once for each 4 KiB read. Concurrent reads of one block share the
//! work: the first one loads the block, the others wait for it.
//!
//! There is one [`Cache`], with one limit and one shrinker. Each device has an [`Index`] in it: an
//! array with a slot for each group of [`LEAF`] consecutive blocks. While at least one block of a
//! group is cached or being loaded, its slot has a [`Leaf`]; otherwise the slot is empty. So the
//! slot of a block follows from its number, a run of blocks is looked up with one lock held, and a
//! device that is removed evicts its own blocks only.
//!
//! A clock chooses the blocks to evict: if a block was used since the hand last passed, it stays
//! until the next pass. Each device has a hand that moves over its leaves ([`Index::hand`]). A
//! device that has used up its share moves its own hand, and evicts its own blocks. If the whole
//! cache is too large, one device after the other ([`Devices::hand`]) moves its hand from where it
//! last stopped to the end of its leaves.
//!
//! The path of an I/O allocates memory without waiting. If there is none, the read does not use the
//! cache. Nothing is allocated, copied or freed with a lock held.
//!
//! Lock order: no two of these locks are held at once: the lock of the list of devices, the
//! [`SHARDS`] locks of each device's leaves, and the lock of each block. All may be taken in any
//! context but NMI.

use core::ops::Range;

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::Arc;
use kernel::sync::SetOnce;

use super::Zfile;
use crate::block::{memory, quota, Data, Lock, Pool, Shrink, Tidy};
use crate::dm::{self, Io, IoQueue};
use crate::format::num::{to_u64, to_usize};

/// Number of consecutive blocks in a leaf.
const LEAF: usize = 64;
/// Number of shards of a device's index. Each shard has a lock.
const SHARDS: usize = 8;
/// Largest number of blocks that one lookup returns.
pub(super) const RUN: usize = 32;
/// Largest number of blocks that are evicted with a lock held.
const TAKE: usize = 16;
/// Largest number of slots for leaves, or of devices, that are examined with a lock held, except
/// when a device is added or removed.
const SCAN: usize = 256;
/// Number of slots for leaves that are initialised between two calls of `cond_resched`.
const PAUSE: usize = 1 << 16;
/// Largest number of steps that a read may take in one attempt to make room. A step takes one lock:
/// that of the list of devices, or that of a shard. Only the step at which the hand reaches the end
/// of a device takes both locks, one after the other.
const STEPS: usize = 64;
/// Bytes of memory that a block takes in addition to its data: the [`Block`] and the reference
/// count of its `Arc`.
const OVERHEAD: usize = size_of::<Block>() + size_of::<usize>();
/// Bytes of memory that a leaf takes: `kmalloc` rounds up to a power of two.
const LEAF_MEMORY: usize = size_of::<Leaf>().next_power_of_two();

/// A block that is cached or being loaded.
#[pin_data]
pub(super) struct Block {
    /// The decompressed bytes. Set once, when the block has been loaded.
    data: SetOnce<Data>,
    /// Reads that wait for the block; `None` once loading has ended, with or without an error.
    #[pin]
    waiting: Lock<Option<IoQueue<Zfile>>>,
}

impl Block {
    fn new() -> Result<Arc<Self>> {
        let key = kernel::static_lock_class!();
        Arc::pin_init(
            pin_init!(Self {
                data: SetOnce::new(),
                waiting <- Lock::new(Some(IoQueue::new()), c"dm_overlaybd_block", key),
            }),
            memory::CACHE,
        )
    }

    /// Sets the block's decompressed bytes, and adds their memory to the module parameter
    /// `cache_bytes`.
    pub(super) fn keep(&self, data: Data) {
        let bytes = data.memory() + OVERHEAD;
        if self.data.populate(data) {
            quota::add(bytes);
        }
    }

    /// Returns the decompressed bytes, or `None` if the block isn't loaded.
    pub(super) fn data(&self) -> Option<&Data> {
        self.data.as_ref()
    }

    /// Returns the bytes of memory that `cache_bytes` includes for this block.
    fn memory(&self) -> usize {
        self.data().map_or(0, |data| data.memory() + OVERHEAD)
    }

    /// Queues `io` until loading of the block has ended. Returns `io` if that is already so.
    pub(super) fn wait(&self, io: Io<Zfile>) -> Option<Io<Zfile>> {
        match &mut *self.waiting.lock() {
            Some(queue) => {
                queue.push(io);
                None
            }
            None => Some(io),
        }
    }

    /// Removes and returns the first waiting read. If no read waits, marks loading as ended.
    fn first_waiting(&self) -> Option<Io<Zfile>> {
        let mut waiting = self.waiting.lock();
        let first = (*waiting).as_mut().and_then(IoQueue::pop);
        if first.is_none() {
            *waiting = None;
        }
        first
    }
}

/// Up to [`RUN`] consecutive blocks.
#[derive(Default)]
pub(super) struct Run {
    blocks: [Option<Arc<Block>>; RUN],
    len: usize,
}

impl Run {
    /// Appends `block`. Returns `block` if the run is full.
    fn push(&mut self, block: Arc<Block>) -> Option<Arc<Block>> {
        let Some(slot) = self.blocks.get_mut(self.len) else {
            return Some(block);
        };
        self.len += 1;
        slot.replace(block)
    }

    /// Returns the number of blocks.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Returns the decompressed bytes of each block, in order.
    pub(super) fn data(&self) -> impl Iterator<Item = &Data> {
        let blocks = self.blocks.iter().flatten();
        blocks.filter_map(|block| block.data())
    }
}

/// Loads a range of blocks in order. Dropping it fails the reads that wait for blocks not loaded
/// yet.
///
/// # Invariants
///
/// `blocks` are in the cache, unless the device was removed, and only this loader loads them.
pub(super) struct Loader {
    index: Arc<Index>,
    blocks: Range<u64>,
}

impl Loader {
    /// Returns the numbers of the blocks that aren't loaded yet.
    pub(super) fn blocks(&self) -> Range<u64> {
        self.blocks.clone()
    }

    /// Splits the range at block `at`. Keeps the blocks before it, and returns a loader for the
    /// others.
    pub(super) fn split_off(&mut self, at: u64) -> Self {
        let at = at.clamp(self.blocks.start, self.blocks.end);
        // INVARIANT: Each block belongs to one of the two loaders.
        let rest = Self {
            index: self.index.clone(),
            blocks: at..self.blocks.end,
        };
        self.blocks.end = at;
        rest
    }

    /// Returns the next block to load; `None` if it isn't in the cache any more, because the device
    /// was removed. Must be called only while blocks are left.
    pub(super) fn block(&self) -> Option<Arc<Block>> {
        self.index.find(self.blocks.start)
    }

    /// Allocates memory for the decompressed bytes of the next block, `len` bytes, without waiting.
    /// If the cache would exceed its limit, evicts blocks of any device first. Returns `None` if
    /// not enough can be evicted, or if there is no memory.
    pub(super) fn room(&self, len: usize) -> Option<Data> {
        let cache = &self.index.cache;
        let wanted = len + OVERHEAD;
        let over = (quota::used() + wanted).saturating_sub(quota::limit());
        // Another thread may have made room meanwhile.
        if over > 0 && cache.evict(over, STEPS) < over && quota::used() + wanted > quota::limit() {
            return None;
        }
        Data::try_new(&cache.pool, len)
    }

    /// Ends loading of the next block, which is `block`, and returns the reads that wait for it. If
    /// the block has no data, removes it from the cache.
    pub(super) fn finish(&mut self, block: Option<Arc<Block>>) -> IoQueue<Zfile> {
        let Some(number) = self.blocks.next() else {
            return IoQueue::new();
        };
        let Some(block) = block else {
            return IoQueue::new();
        };
        self.index.loaded(number, &block);
        let waited = block.waiting.lock().take();
        waited.unwrap_or_default()
    }

    /// Stops loading the next block. The first read that waits for the block has to load it
    /// instead: returns that read, and a loader for the block. The other reads continue to wait. If
    /// no read waits, removes the block from the cache and returns `None`.
    pub(super) fn pass_on(&mut self) -> Option<(Io<Zfile>, Self)> {
        let block = self.block();
        let Some(io) = block.as_ref().and_then(|block| block.first_waiting()) else {
            drop(self.finish(block));
            return None;
        };
        let number = self.blocks.next()?;
        // INVARIANT: The block is still being loaded, now by the new loader only.
        let loader = Self {
            index: self.index.clone(),
            blocks: number..number + 1,
        };
        Some((io, loader))
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        while !self.blocks.is_empty() {
            let block = self.block();
            // The reads in the queue end with an error.
            drop(self.finish(block));
        }
    }
}

/// Result of looking up a block.
pub(super) enum Lookup {
    /// The block is cached or being loaded.
    Found(Arc<Block>),
    /// The block was not in the cache. It and the missing blocks directly after it have been added
    /// as blocks being loaded. The caller must load them with this loader.
    Missing(Loader),
    /// The cache has no room or no memory for the block. The caller must read without the cache.
    Bypass,
}

/// The state of [`LEAF`] consecutive blocks: bit n of each mask, and element n of `blocks`, are for
/// block n of the leaf.
///
/// # Invariants
///
/// A bit in `there` is set if and only if `blocks` has that block. `loaded` and `used` are subsets
/// of `there`. A block in `loaded` has data. The memory of the leaf is counted in `cache_bytes`.
struct Leaf {
    there: u64,
    /// Blocks that have been loaded, and may be evicted.
    loaded: u64,
    /// Blocks that were used since the hand of the clock last passed.
    used: u64,
    blocks: [Option<Arc<Block>>; LEAF],
}

impl Leaf {
    fn new() -> Option<KBox<Self>> {
        quota::add(LEAF_MEMORY);
        // INVARIANT: Counted above; it has no blocks.
        let leaf = Self {
            there: 0,
            loaded: 0,
            used: 0,
            blocks: [const { None }; LEAF],
        };
        KBox::new(leaf, memory::CACHE).ok()
    }

    fn block(&self, at: usize) -> Option<&Arc<Block>> {
        self.blocks.get(at)?.as_ref()
    }

    /// Removes and returns the block at `at`.
    fn take(&mut self, at: usize) -> Option<Arc<Block>> {
        let keep = !(1 << at);
        self.there &= keep;
        self.loaded &= keep;
        self.used &= keep;
        self.blocks.get_mut(at)?.take()
    }

    /// Puts `block` at `at`, which must be empty.
    fn put(&mut self, at: usize, block: Arc<Block>) {
        if let Some(slot) = self.blocks.get_mut(at) {
            *slot = Some(block);
            self.there |= 1 << at;
        }
    }
}

impl Drop for Leaf {
    fn drop(&mut self) {
        quota::sub(LEAF_MEMORY);
    }
}

/// The leaves that one lock protects: those whose number modulo [`SHARDS`] is the shard's.
struct Shard {
    leaves: KVVec<Option<KBox<Leaf>>>,
}

/// A number of blocks, and of bytes of their memory: evicted, or to be evicted.
#[derive(Default)]
struct Amount {
    blocks: usize,
    bytes: usize,
}

/// A device's part of the cache.
#[pin_data]
pub(crate) struct Index {
    cache: Arc<Cache>,
    /// Number of blocks that are cached, being loaded, or about to be added: see
    /// [`Self::reserve`].
    count: Atomic<usize>,
    /// Number of blocks that have been loaded, and may be evicted.
    loaded: Atomic<usize>,
    /// Position of the hand of the clock: (shard · `places` + slot of the leaf) · [`LEAF`] + bit.
    hand: Atomic<usize>,
    /// Number of slots for leaves in each shard.
    places: usize,
    #[pin]
    shards: [Lock<Shard>; SHARDS],
}

impl Index {
    /// Returns where block `number` is: its shard, the slot of its leaf in the shard, and its bit
    /// in the leaf.
    fn place(&self, number: u64) -> (Option<&Lock<Shard>>, usize, usize) {
        let (leaf, bit) = (
            to_usize(number / to_u64(LEAF)),
            to_usize(number % to_u64(LEAF)),
        );
        (self.shards.get(leaf % SHARDS), leaf / SHARDS, bit)
    }

    /// Returns the number of blocks that are cached, being loaded, or about to be added.
    pub(super) fn len(&self) -> usize {
        self.count.load(Relaxed)
    }

    /// Returns whether any block may be evicted.
    fn has_loaded(&self) -> bool {
        self.loaded.load(Relaxed) > 0
    }

    /// Looks up the first of `blocks`. If it is missing, adds it and the missing blocks directly
    /// after it as blocks being loaded, and returns a loader for them. If the device would then
    /// have more than `share` blocks, evicts some of its blocks first.
    pub(super) fn get(this: &Arc<Self>, blocks: Range<u64>, share: usize) -> Lookup {
        // Tries twice: another thread may change the leaf while this one allocates memory.
        for _ in 0..2 {
            let (missing, new_leaf) = match this.look_up(blocks.clone()) {
                Ok(block) => return Lookup::Found(block),
                Err(missing) => missing,
            };
            let room = this.reserve(missing, share);
            let placed = this.add(blocks.start, room, new_leaf);
            this.count.fetch_sub(room - placed, Relaxed);
            if placed > 0 {
                // INVARIANT: `add` has just added them.
                return Lookup::Missing(Loader {
                    index: this.clone(),
                    blocks: blocks.start..blocks.start + to_u64(placed),
                });
            }
            if room == 0 {
                break;
            }
        }
        Lookup::Bypass
    }

    /// Looks up the first of `blocks`. If that block is missing, returns as the error how many
    /// consecutive blocks are missing from there on, and whether their leaf is missing, too.
    fn look_up(&self, blocks: Range<u64>) -> Result<Arc<Block>, (usize, bool)> {
        let (shard, place, first) = self.place(blocks.start);
        let most = to_usize(blocks.end - blocks.start)
            .min(RUN)
            .min(LEAF - first);
        let mut shard = shard.ok_or((0, false))?.lock();
        let Some(Some(leaf)) = shard.leaves.get_mut(place) else {
            return Err((most, true));
        };
        let Some(block) = leaf.block(first).cloned() else {
            let missing = (!leaf.there >> first).trailing_ones() as usize;
            return Err((missing.min(most), false));
        };
        leaf.used |= leaf.loaded & (1 << first);
        Ok(block)
    }

    /// Returns the loaded blocks at the start of `blocks`: up to the first one that isn't loaded,
    /// the end of the leaf, or [`RUN`] blocks. Marks them as used.
    pub(super) fn run(&self, blocks: Range<u64>) -> Run {
        let mut run = Run::default();
        let (shard, place, first) = self.place(blocks.start);
        let most = to_usize(blocks.end.saturating_sub(blocks.start)).min(RUN);
        let Some(shard) = shard else { return run };
        let mut shard = shard.lock();
        if let Some(Some(leaf)) = shard.leaves.get_mut(place) {
            let there = (leaf.loaded >> first).trailing_ones() as usize;
            for at in (first..LEAF).take(there.min(most)) {
                leaf.used |= 1 << at;
                if let Some(block) = leaf.block(at) {
                    // Never full: `most` is at most `RUN`.
                    let _ = run.push(block.clone());
                }
            }
        }
        run
    }

    /// Adds to [`Self::count`] how many blocks the caller may add to the cache, at most `wanted`,
    /// and returns that number. If the device would have more than `share` blocks, evicts some of
    /// its blocks; the number is below `wanted` if that isn't enough.
    fn reserve(&self, wanted: usize, share: usize) -> usize {
        let now = self.count.fetch_add(wanted, Relaxed) + wanted;
        let over = now.saturating_sub(share);
        if over == 0 {
            return wanted;
        }
        let mut steps = STEPS;
        let mut left = over;
        // Up to three passes: the first one may start in the middle, and if all blocks were used, a
        // full pass only clears their used bits.
        for _ in 0..3 {
            let amount = Amount {
                blocks: left,
                bytes: 0,
            };
            left = left.saturating_sub(self.evict(&amount, &mut steps).0.blocks);
            if left == 0 {
                break;
            }
        }
        let over = self.len().saturating_sub(share).min(wanted);
        self.count.fetch_sub(over, Relaxed);
        wanted - over
    }

    /// Adds up to `count` blocks to the leaf of block `number`, from that block on. Stops before a
    /// block that the leaf already has. Allocates the leaf if `new_leaf` is set. Returns the number
    /// of blocks added.
    fn add(&self, number: u64, count: usize, new_leaf: bool) -> usize {
        let mut run = Run::default();
        for _ in 0..count {
            let Ok(block) = Block::new() else { break };
            if run.push(block).is_some() {
                break;
            }
        }
        // A leaf without blocks would never be freed.
        let mut new_leaf = (new_leaf && run.len() > 0).then(Leaf::new).flatten();
        let (shard, place, first) = self.place(number);
        let Some(shard) = shard else { return 0 };
        let mut placed = 0;
        {
            let mut shard = shard.lock();
            let Some(slot) = shard.leaves.get_mut(place) else {
                return 0;
            };
            if slot.is_none() {
                *slot = new_leaf.take();
            }
            if let Some(leaf) = slot {
                for (at, block) in (first..LEAF).zip(&mut run.blocks) {
                    if leaf.there & (1 << at) != 0 {
                        break;
                    }
                    let Some(block) = block.take() else { break };
                    leaf.put(at, block);
                    placed += 1;
                }
            }
        }
        // Blocks and a leaf that were not added are freed here, after unlocking.
        drop((run, new_leaf));
        placed
    }

    /// Returns block `number` if it is cached or being loaded.
    fn find(&self, number: u64) -> Option<Arc<Block>> {
        let (shard, place, at) = self.place(number);
        let mut shard = shard?.lock();
        let leaf = shard.leaves.get_mut(place)?.as_ref()?;
        leaf.block(at).cloned()
    }

    /// Records that loading of `block`, whose number is `number`, has ended. If the block has no
    /// data, removes it.
    fn loaded(&self, number: u64, block: &Arc<Block>) {
        let (shard, place, at) = self.place(number);
        let Some(shard) = shard else { return };
        // The caller holds a reference to the block, so it isn't freed with the lock held.
        let mut empty = None;
        {
            let mut shard = shard.lock();
            let Some(slot) = shard.leaves.get_mut(place) else {
                return;
            };
            let Some(leaf) = slot else { return };
            if !leaf
                .block(at)
                .is_some_and(|there| Arc::ptr_eq(there, block))
            {
                return;
            }
            if block.data().is_some() {
                leaf.loaded |= 1 << at;
                self.loaded.fetch_add(1, Relaxed);
                return;
            }
            leaf.take(at);
            if leaf.there == 0 {
                empty = slot.take();
            }
        }
        drop(empty);
        self.count.fetch_sub(1, Relaxed);
    }

    /// Evicts blocks that weren't used, from the position of the hand on, until both numbers in
    /// `wanted` are reached, the hand has reached the end, no block may be evicted, or no steps are
    /// left. Decrements `steps` for each lock taken. Returns the amount evicted, and whether the
    /// hand has reached the end.
    fn evict(&self, wanted: &Amount, steps: &mut usize) -> (Amount, bool) {
        let mut taken = Amount::default();
        let mut end = false;
        while *steps > 0
            && !end
            && (taken.blocks < wanted.blocks || taken.bytes < wanted.bytes)
            && self.has_loaded()
        {
            *steps -= 1;
            let most = if wanted.bytes > taken.bytes {
                TAKE
            } else {
                (wanted.blocks - taken.blocks).min(TAKE)
            };
            let hand = self.hand.load(Relaxed);
            let (next, mut blocks) =
                self.sweep(hand, most, wanted.bytes.saturating_sub(taken.bytes));
            end = next >= self.places * LEAF * SHARDS;
            // If several threads do this at once, the hand may pass some blocks twice.
            self.hand.store(if end { 0 } else { next }, Relaxed);
            for block in blocks.iter_mut().filter_map(Option::take) {
                taken.blocks += 1;
                taken.bytes += block.memory();
                self.loaded.fetch_sub(1, Relaxed);
                self.count.fetch_sub(1, Relaxed);
                quota::sub(block.memory());
            }
        }
        (taken, end)
    }

    /// Passes the hand, from position `hand` on, over the next leaf in [`SCAN`] slots, or over all
    /// of these slots if they are empty. Evicts up to `most` blocks of the leaf; if `bytes` isn't
    /// 0, stops when the evicted blocks have that many bytes. Returns the new position of the hand,
    /// and the evicted blocks, which the caller frees.
    fn sweep(&self, hand: usize, most: usize, bytes: usize) -> (usize, [Option<Arc<Block>>; TAKE]) {
        let mut blocks = [const { None }; TAKE];
        let leaf = hand / LEAF;
        let (nth, place) = (leaf / self.places, leaf % self.places);
        let stop = self.places.min(place + SCAN);
        let start = nth * self.places;
        let Some(shard) = self.shards.get(nth) else {
            return (usize::MAX, blocks);
        };
        let mut empty = None;
        let next = {
            let mut shard = shard.lock();
            let mut leaves = shard.leaves.iter_mut().enumerate().take(stop).skip(place);
            match leaves.find(|(_, slot)| slot.is_some()) {
                Some((at, slot @ Some(_))) => {
                    let from = if at == place { hand % LEAF } else { 0 };
                    let next = match slot {
                        Some(leaf) => leaf.sweep(from, most, bytes, &mut blocks),
                        None => LEAF,
                    };
                    if slot.as_ref().is_some_and(|leaf| leaf.there == 0) {
                        empty = slot.take();
                    }
                    (start + at) * LEAF + next
                }
                _ => (start + stop) * LEAF,
            }
        };
        // The leaf is freed here, and the blocks by the caller, after unlocking.
        drop(empty);
        (next, blocks)
    }

    /// Removes all blocks. Called in process context, when no more blocks are added. May sleep.
    fn clear(&self) {
        for shard in &self.shards {
            let mut place = 0;
            while self.len() > 0 && place < self.places {
                let stop = self.places.min(place + SCAN);
                let leaf = {
                    let mut shard = shard.lock();
                    let mut leaves = shard.leaves.iter_mut().take(stop).skip(place);
                    leaves.find_map(Option::take)
                };
                let Some(leaf) = leaf else {
                    place = stop;
                    continue;
                };
                self.loaded
                    .fetch_sub(leaf.loaded.count_ones() as usize, Relaxed);
                for block in leaf.blocks.iter().flatten() {
                    self.count.fetch_sub(1, Relaxed);
                    quota::sub(block.memory());
                }
                drop(leaf);
                dm::cond_resched();
            }
        }
    }
}

impl Leaf {
    /// Passes the hand over this leaf, from bit `from` on: clears the used bits, and evicts up to
    /// `most` loaded blocks that weren't used. If `bytes` isn't 0, stops when the evicted blocks
    /// have that many bytes. Stores these in `blocks`. Returns the bit at which the hand has
    /// stopped, [`LEAF`] at the end.
    fn sweep(
        &mut self,
        from: usize,
        most: usize,
        bytes: usize,
        blocks: &mut [Option<Arc<Block>>; TAKE],
    ) -> usize {
        let mut taken = 0;
        let mut slots = blocks.iter_mut().take(most);
        for at in from..LEAF {
            let bit = 1 << at;
            if self.loaded & bit == 0 {
                continue;
            }
            if self.used & bit != 0 {
                self.used &= !bit;
                continue;
            }
            let Some(slot) = slots.next() else { return at };
            *slot = self.take(at);
            taken += slot.as_ref().map_or(0, |block| block.memory());
            if bytes > 0 && taken >= bytes {
                return at + 1;
            }
        }
        LEAF
    }
}

/// Owner of a device's part of the cache. Dropping it removes the device's blocks from the cache.
pub(crate) struct Part(Arc<Index>);

impl core::ops::Deref for Part {
    type Target = Arc<Index>;

    fn deref(&self) -> &Arc<Index> {
        &self.0
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.0.cache.remove(&self.0);
        self.0.clear();
    }
}

/// The devices that have a part of the cache.
struct Devices {
    all: KVVec<Arc<Index>>,
    /// Position of the hand of the clock in `all`.
    hand: usize,
}

/// The cache of all devices.
#[pin_data]
pub(crate) struct Cache {
    pool: Arc<Pool>,
    #[pin]
    devices: Lock<Devices>,
}

impl Cache {
    /// Makes an empty cache that takes its pages from `pool`.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(super) fn new(pool: Arc<Pool>) -> Result<Arc<Self>> {
        quota::init();
        let devices = Devices {
            all: KVVec::new(),
            hand: 0,
        };
        let key = kernel::static_lock_class!();
        Arc::pin_init(
            pin_init!(Self {
                pool,
                devices <- Lock::new(devices, c"dm_overlaybd_devices", key),
            }),
            GFP_KERNEL,
        )
    }

    /// Makes a part of the cache for a device with `blocks` blocks. May sleep.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(super) fn part(this: &Arc<Self>, blocks: u64) -> Result<Part> {
        let places = to_usize(blocks).div_ceil(LEAF).div_ceil(SHARDS).max(1);
        let key = kernel::static_lock_class!();
        let mut all = [const { KVVec::new() }; SHARDS];
        for leaves in &mut all {
            leaves.reserve(places, memory::LARGE)?;
            for nth in 0..places {
                if nth % PAUSE == 0 {
                    dm::cond_resched();
                }
                leaves.push(None, GFP_KERNEL)?;
            }
        }
        let shards = pin_init::pin_init_array_from_fn(move |nth| {
            let leaves = all.get_mut(nth).map(core::mem::take).unwrap_or_default();
            Lock::new(Shard { leaves }, c"dm_overlaybd_leaves", key)
        });
        let index = Arc::pin_init(
            try_pin_init!(Index {
                cache: this.clone(),
                count: Atomic::new(0),
                loaded: Atomic::new(0),
                hand: Atomic::new(0),
                places,
                shards <- shards,
            }? Error),
            GFP_KERNEL,
        )?;
        this.enter(index.clone())?;
        Ok(Part(index))
    }

    /// Adds a device to the list. May sleep.
    fn enter(&self, index: Arc<Index>) -> Result {
        let mut more = KVVec::new();
        loop {
            let wanted = {
                let mut devices = self.devices.lock();
                if devices.all.len() < devices.all.capacity() {
                    // Doesn't fail: the capacity was checked.
                    let _ = devices.all.push_within_capacity(index);
                    return Ok(());
                }
                if devices.all.len() < more.capacity() {
                    for device in devices.all.drain_all() {
                        let _ = more.push_within_capacity(device);
                    }
                    core::mem::swap(&mut devices.all, &mut more);
                    continue;
                }
                devices.all.len() * 2 + 8
            };
            // Allocated without the lock held.
            more = KVVec::with_capacity(wanted, memory::LARGE)?;
        }
    }

    /// Removes a device from the list.
    fn remove(&self, index: &Arc<Index>) {
        let mut devices = self.devices.lock();
        let all = &mut devices.all;
        let last = all.pop();
        if let Some(last) = last {
            if !Arc::ptr_eq(&last, index) {
                let own = all.iter_mut().find(|device| Arc::ptr_eq(device, index));
                // The caller holds a reference, so nothing is freed with the lock held.
                if let Some(own) = own {
                    *own = last;
                }
            }
        }
    }

    /// Returns the first device, from the hand on, that has blocks to evict. Examines at most
    /// [`SCAN`] devices. If none of these has any, returns the number of all devices as the error.
    fn current(&self) -> Result<Arc<Index>, usize> {
        let mut devices = self.devices.lock();
        let Devices { all, hand } = &mut *devices;
        for _ in 0..all.len().min(SCAN) {
            if *hand >= all.len() {
                *hand = 0;
            }
            match all.get(*hand) {
                Some(index) if index.has_loaded() => return Ok(index.clone()),
                _ => *hand += 1,
            }
        }
        Err(all.len())
    }

    /// Evicts blocks of any device, `wanted` bytes in total, or fewer if `steps` steps are not
    /// enough: see [`STEPS`]. Returns the number of bytes evicted.
    fn evict(&self, wanted: usize, mut steps: usize) -> usize {
        let (mut bytes, mut without) = (0, 0);
        while bytes < wanted && steps > 0 {
            steps -= 1;
            let index = match self.current() {
                Ok(index) => index,
                Err(devices) => {
                    without += SCAN;
                    if without >= devices {
                        break;
                    }
                    continue;
                }
            };
            without = 0;
            let rest = Amount {
                blocks: 0,
                bytes: wanted - bytes,
            };
            let (taken, end) = index.evict(&rest, &mut steps);
            bytes += taken.bytes;
            if end {
                self.devices.lock().hand += 1;
            }
        }
        bytes
    }
}

impl Shrink for Cache {
    fn count(&self) -> usize {
        self.pool.pages() + quota::used() / kernel::page::PAGE_SIZE
    }

    fn scan(&self, target: usize) -> usize {
        let mut freed = self.pool.drain(target);
        if freed < target {
            let wanted = (target - freed).saturating_mul(kernel::page::PAGE_SIZE);
            let bytes = self.evict(wanted, STEPS.saturating_add(target));
            // The pages of the evicted blocks are in the pool now, or already freed.
            self.pool.drain(bytes / kernel::page::PAGE_SIZE);
            freed += bytes / kernel::page::PAGE_SIZE;
        }
        freed
    }
}

impl Tidy for Cache {
    /// Evicts blocks if the user has lowered the limit.
    fn tidy(&self) -> bool {
        let over = quota::used().saturating_sub(quota::limit());
        let (mut left, mut turns) = (over, over / kernel::page::PAGE_SIZE / STEPS + 1);
        while left > 0 && turns > 0 {
            left = left.saturating_sub(self.evict(left, STEPS));
            turns -= 1;
            dm::cond_resched();
        }
        // As long as the cache has blocks, a later call may be able to free some: the user may lower
        // the limit.
        quota::used() > 0
    }
}
