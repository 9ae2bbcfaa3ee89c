// SPDX-License-Identifier: GPL-2.0

//! Blocks that were decompressed of late, of all devices.
//!
//! A read of a part of a block goes through the cache, so that a 64 KiB block under 4 KiB reads is
//! read and decompressed once. Reads of one block that come together share the work: the first
//! loads it, the others wait for that.
//!
//! There is one [`Cache`], with one limit and one shrinker. Each device has an [`Index`] in it: for
//! each [`LEAF`] blocks that follow one another a [`Leaf`], which is there while one of them is. So a
//! block's place follows from its number, a run of blocks is looked up at once, and a device that
//! goes takes out its own blocks only.
//!
//! What makes room is chosen by a clock: its hand goes through all leaves of a device, then through
//! those of the next one. A block that was used since the hand came by last stays once more. A device
//! that has more than its share makes room for its own blocks, with a hand that is its own.
//!
//! Memory is only ever asked for without waiting; without it, a read does without the cache. Nothing
//! is allocated, copied or freed under a lock.
//!
//! Lock order: all locks are taken alone: that of the list of devices, those of the leaves, of which
//! each device has [`SHARDS`], and each block's. All are taken in any context.

use core::ops::Range;

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::Arc;
use kernel::sync::SetOnce;

use super::Zfile;
use crate::block::{memory, quota, Data, Lock, Pool, Shrink, Tidy};
use crate::dm::{self, Io, IoQueue};
use crate::format::num::{to_u64, to_usize};

/// Blocks of a leaf.
const LEAF: usize = 64;
/// Locks of a device.
const SHARDS: usize = 8;
/// Most blocks that are looked up at once.
pub(super) const RUN: usize = 32;
/// Most blocks that are taken out with a lock held.
const TAKE: usize = 16;
/// Most places for leaves, or devices, that are looked at with a lock held.
const SCAN: usize = 256;
/// Places for leaves that are made between two pauses.
const PAUSE: usize = 1 << 16;
/// Most times that a read takes a lock to make room.
const STEPS: usize = 64;
/// Bytes that a block takes beside its data: itself, with a counter of references.
const OVERHEAD: usize = size_of::<Block>() + size_of::<usize>();
/// Bytes that a leaf takes.
const LEAF_MEMORY: usize = size_of::<Leaf>().next_power_of_two();

/// A block, or the place for it while it is being loaded.
#[pin_data]
pub(super) struct Block {
    /// What it decompresses to, once it was loaded.
    data: SetOnce<Data>,
    /// Reads that wait; `None` when loading has ended, well or not.
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

    /// Keeps `data` as the block's bytes.
    pub(super) fn keep(&self, data: Data) {
        let bytes = data.memory() + OVERHEAD;
        if self.data.populate(data) {
            quota::add(bytes);
        }
    }

    /// The block's bytes, if it is loaded.
    pub(super) fn data(&self) -> Option<&Data> {
        self.data.as_ref()
    }

    /// Bytes that it counts for.
    fn memory(&self) -> usize {
        self.data().map_or(0, |data| data.memory() + OVERHEAD)
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

/// Blocks that follow one another.
#[derive(Default)]
pub(super) struct Run {
    blocks: [Option<Arc<Block>>; RUN],
    len: usize,
}

impl Run {
    /// Adds one; gives it back where there is no room.
    fn push(&mut self, block: Arc<Block>) -> Option<Arc<Block>> {
        let Some(slot) = self.blocks.get_mut(self.len) else {
            return Some(block);
        };
        self.len += 1;
        slot.replace(block)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The blocks' bytes.
    pub(super) fn data(&self) -> impl Iterator<Item = &Data> {
        let blocks = self.blocks.iter().flatten();
        blocks.filter_map(|block| block.data())
    }
}

/// Loads a range of blocks in order. Dropping it fails the reads that wait for blocks that are left.
///
/// # Invariants
///
/// Those of `blocks` that are in the cache are being loaded by this.
pub(super) struct Loader {
    index: Arc<Index>,
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
            index: self.index.clone(),
            blocks: at..self.blocks.end,
        };
        self.blocks.end = at;
        rest
    }

    /// The next block.
    pub(super) fn block(&self) -> Option<Arc<Block>> {
        self.index.find(self.blocks.start)
    }

    /// Memory for the next block's data, of `len` bytes, for which others may have to make room.
    pub(super) fn room(&self, len: usize) -> Option<Data> {
        let cache = &self.index.cache;
        let over = (quota::used() + len + OVERHEAD).saturating_sub(quota::limit());
        if over > 0 && cache.evict(over, STEPS) < over && quota::used() + len > quota::limit() {
            return None;
        }
        Data::try_new(&cache.pool, len)
    }

    /// Ends loading of the next block, which is `block`; gives those that wait for it. A block
    /// without data leaves the cache.
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
            drop(self.finish(block));
        }
    }
}

/// What the cache knows of a block.
pub(super) enum Lookup {
    /// It is there, or being loaded.
    Found(Arc<Block>),
    /// It isn't there, and neither are the next ones: load them.
    Missing(Loader),
    /// There is no room or no memory for it.
    Bypass,
}

/// [`LEAF`] blocks that follow one another: a bit or a place for each.
///
/// # Invariants
///
/// A block has a place and a bit in `there`, or neither. `loaded` and `used` have bits of `there`
/// only. A block in `loaded` has data. The leaf's own memory is counted.
struct Leaf {
    there: u64,
    /// Those that have been loaded, and may be taken out.
    loaded: u64,
    /// Those that were used since the hand of a clock came by.
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

    /// Takes a block out.
    fn take(&mut self, at: usize) -> Option<Arc<Block>> {
        let keep = !(1 << at);
        self.there &= keep;
        self.loaded &= keep;
        self.used &= keep;
        self.blocks.get_mut(at)?.take()
    }

    /// Puts a block in a place that is empty.
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

/// The leaves that a lock guards.
struct Shard {
    leaves: KVVec<Option<KBox<Leaf>>>,
}

/// What was taken out, or is to be.
#[derive(Default)]
struct Amount {
    blocks: usize,
    bytes: usize,
}

/// A device's part of the cache.
#[pin_data]
pub(crate) struct Index {
    cache: Arc<Cache>,
    /// Blocks that are there, or being loaded.
    count: Atomic<usize>,
    /// Those of them that have been loaded, and may be taken out.
    loaded: Atomic<usize>,
    /// Where the hand of the clock is: a block's place, counted through all shards.
    hand: Atomic<usize>,
    /// Places for leaves in each shard.
    places: usize,
    #[pin]
    shards: [Lock<Shard>; SHARDS],
}

impl Index {
    /// Where a block is: shard, place there, bit.
    fn place(&self, number: u64) -> (Option<&Lock<Shard>>, usize, usize) {
        let (leaf, bit) = (
            to_usize(number / to_u64(LEAF)),
            to_usize(number % to_u64(LEAF)),
        );
        (self.shards.get(leaf % SHARDS), leaf / SHARDS, bit)
    }

    /// Blocks that are there, or being loaded.
    pub(super) fn len(&self) -> usize {
        self.count.load(Relaxed)
    }

    /// Whether there are blocks that may be taken out.
    fn has_loaded(&self) -> bool {
        self.loaded.load(Relaxed) > 0
    }

    /// Looks the first of `blocks` up. Where it is missing, it has a place now, and so have those
    /// behind it that are missing. Of this device, `share` blocks are kept at most.
    pub(super) fn get(this: &Arc<Self>, blocks: Range<u64>, share: usize) -> Lookup {
        // Twice, as others may change what is there while memory is asked for.
        for _ in 0..2 {
            let (missing, new_leaf) = match this.look_up(blocks.clone()) {
                Ok(block) => return Lookup::Found(block),
                Err(missing) => missing,
            };
            let room = this.reserve(missing, share);
            let placed = this.add(blocks.start, room, new_leaf);
            this.count.fetch_sub(room - placed, Relaxed);
            if placed > 0 {
                // INVARIANT: They have just got their places.
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

    /// Looks the first of `blocks` up. Where it is missing, gives how many are, and whether the leaf
    /// for them is.
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

    /// Those of `blocks` that are loaded, from the first on, and no more than are in one leaf and a
    /// run.
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
                    // There is room, and nothing to drop.
                    let _ = run.push(block.clone());
                }
            }
        }
        run
    }

    /// Counts up to `wanted` blocks more, as many as there is room for.
    fn reserve(&self, wanted: usize, share: usize) -> usize {
        let now = self.count.fetch_add(wanted, Relaxed) + wanted;
        let over = now.saturating_sub(share);
        if over == 0 {
            return wanted;
        }
        let mut steps = STEPS;
        let mut left = over;
        // The hand comes by once more where all were used, and it may have begun in the middle.
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

    /// Gives places to up to `count` blocks from `number` on, all in one leaf; gives to how many.
    fn add(&self, number: u64, count: usize, new_leaf: bool) -> usize {
        let mut run = Run::default();
        for _ in 0..count {
            let Ok(block) = Block::new() else { break };
            if run.push(block).is_some() {
                break;
            }
        }
        // Without a block, nothing would take the leaf out again.
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
        // What wasn't needed is freed here, without the lock.
        drop((run, new_leaf));
        placed
    }

    /// A block that is there, or being loaded.
    fn find(&self, number: u64) -> Option<Arc<Block>> {
        let (shard, place, at) = self.place(number);
        let mut shard = shard?.lock();
        let leaf = shard.leaves.get_mut(place)?.as_ref()?;
        leaf.block(at).cloned()
    }

    /// Loading of `block` has ended. Without data, it is taken out.
    fn loaded(&self, number: u64, block: &Arc<Block>) {
        let (shard, place, at) = self.place(number);
        let Some(shard) = shard else { return };
        // The caller has a reference to the block, so it isn't freed under the lock.
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

    /// Takes out blocks that weren't used, from where the hand is, until they are as much as
    /// `wanted` in blocks and bytes. Takes locks up to `steps` times, which it counts down. Gives
    /// what was taken out, and whether the hand has come to the end.
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
            // Several may do this at once: then some blocks are passed twice.
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

    /// Looks at one leaf, the next one from `hand` on. Takes up to `most` blocks of it out, or fewer
    /// if they have `bytes` bytes. Gives where to go on.
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
        // The memory is freed here and by the caller, without the lock.
        drop(empty);
        (next, blocks)
    }

    /// Takes all blocks out, in process context. Nobody adds any.
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
    /// What a hand does that comes by, from bit `from` on: takes up to `most` blocks, or `bytes`
    /// bytes of them, that have been loaded and not used. Gives where it has stopped.
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

/// A device's part of the cache, until it is dropped: then its blocks are out.
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

/// The devices that have a part.
struct Devices {
    all: KVVec<Arc<Index>>,
    /// Where the hand of the clock is.
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
    /// A cache, with pages from `pool`.
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

    /// A part for a device of so many blocks.
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

    /// Lists a device.
    fn enter(&self, index: Arc<Index>) -> Result {
        let mut more = KVVec::new();
        loop {
            let wanted = {
                let mut devices = self.devices.lock();
                if devices.all.len() < devices.all.capacity() {
                    // There is room, so this doesn't fail.
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
            // Without the lock.
            more = KVVec::with_capacity(wanted, memory::LARGE)?;
        }
    }

    /// Takes a device off the list.
    fn remove(&self, index: &Arc<Index>) {
        let mut devices = self.devices.lock();
        let all = &mut devices.all;
        let last = all.pop();
        if let Some(last) = last {
            if !Arc::ptr_eq(&last, index) {
                let own = all.iter_mut().find(|device| Arc::ptr_eq(device, index));
                // The caller has a reference, so nothing is freed under the lock.
                if let Some(own) = own {
                    *own = last;
                }
            }
        }
    }

    /// The device that the hand is at, or the next one that has blocks to be taken out. Looks at some
    /// devices only; where none of them has any, gives how many devices there are.
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

    /// Takes out blocks of `wanted` bytes in all; gives what they had. Takes a lock of a device up to
    /// `steps` times.
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
            // Their pages are in the pool now, or free already.
            self.pool.drain(bytes / kernel::page::PAGE_SIZE);
            freed += bytes / kernel::page::PAGE_SIZE;
        }
        freed
    }
}

impl Tidy for Cache {
    fn tidy(&self) -> bool {
        // The limit may be lower than it was.
        let over = quota::used().saturating_sub(quota::limit());
        let (mut left, mut turns) = (over, over / kernel::page::PAGE_SIZE / STEPS + 1);
        while left > 0 && turns > 0 {
            left = left.saturating_sub(self.evict(left, STEPS));
            turns -= 1;
            dm::cond_resched();
        }
        self.pool.trim();
        self.pool.pages() > 0 || quota::used() > 0
    }
}
