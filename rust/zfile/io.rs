// SPDX-License-Identifier: GPL-2.0

//! The path of a read: bio, blocks, one lower read of what is stored of them, decompression.
//!
//! ```text
//! map_read -> map_blocks -> launch -> [lower read] -> read_done -> [worker] decode -> end
//!                                                          `----- small: at once ------^
//!          -> map_cached -> in the cache ----------------------------------------------^
//!                        -> being loaded: waits ----------------------------------.    |
//!                        -> launch -> … -> read_done -> [worker] decode_shared ---^
//! ```

use core::ops::Range;

use kernel::prelude::*;
use kernel::sync::atomic::Relaxed;
use kernel::sync::Arc;

use super::cache::{Block, Index, Loader, Lookup};
use super::{Mode, Zfile};
use crate::block::{Buffer, Data, Pages, Status};
use crate::codec::{self, crc32c, Context, Corrupt, Decoder};
use crate::dm::{self, Bio, DeviceId, Io, IoQueue, Mapped};
use crate::format::num::{to_u64, to_usize};
use crate::format::zfile::{block_crc, Geometry};
use crate::format::SECTOR_SIZE;

/// Bytes of the image that one lower read is for: more than that is cut, so that several CPUs work
/// on a large read.
pub(super) const MAX_REQUEST: u32 = 128 << 10;

/// Most blocks of a device in the cache, if neither the table line says how many nor all reads go
/// there.
const DEFAULT_SHARE: usize = 64;

/// The only device.
const DEVICE: DeviceId = DeviceId::nth(0);

/// A part of a bio, and what must be read for it.
pub(crate) struct Request {
    /// Blocks that hold it.
    blocks: Range<u64>,
    /// Bytes before it in the first block.
    skip: usize,
    /// First byte of the lower read, from the start of the device.
    read_start: u64,
    /// Length of the lower read in bytes.
    read_len: usize,
    /// Where the blocks are for the cache.
    loader: Option<Loader>,
    /// Whether an earlier read of these blocks for the cache has failed.
    again: bool,
    /// How the lower read has ended, where a worker goes on after an error.
    status: Result<(), Status>,
}

/// Bytes that a spare buffer needs: those of one block, wherever it lies in the device's blocks.
pub(super) fn spare_len(geometry: &Geometry, device_block: u64) -> usize {
    to_usize(u64::from(geometry.stored_max()) + 2 * (device_block - 1))
}

/// Why a block can't be had.
enum Problem {
    Corrupt,
    /// Decompression needs working memory.
    NeedsContext,
}

/// A block that was decompressed.
#[derive(Clone, Copy)]
enum Loaded<'a> {
    Kept(&'a Data),
    /// There is no memory to keep it.
    Bytes(&'a [u8]),
}

impl Loaded<'_> {
    /// Copies what is behind its first `skip` bytes to `pages`; what doesn't fit is left out.
    fn copy_to(self, skip: usize, pages: &mut Pages<'_>) {
        match self {
            Self::Kept(data) => data.parts(skip).for_each(|part| pages.copy_from(part)),
            Self::Bytes(bytes) => pages.copy_from(bytes.get(skip..).unwrap_or(&[])),
        }
    }
}

impl From<Corrupt> for Problem {
    fn from(_: Corrupt) -> Self {
        Self::Corrupt
    }
}

impl Zfile {
    /// Starts a read.
    pub(super) fn map_read<'a>(&self, bio: Bio<'a, Self>) -> Mapped<'a> {
        let start = bio.sector() * SECTOR_SIZE;
        let end = start + bio.sectors() * SECTOR_SIZE;
        let mode = self.modes.get();
        if let Some(cache) = self.part.as_ref().filter(|_| mode != Mode::None) {
            let block_size = u64::from(self.geometry.block_size());
            let block_end = start - start % block_size + block_size;
            if mode == Mode::All {
                return self.map_cached(bio, cache, start, end);
            } else if start % block_size != 0 || end < block_end.min(self.geometry.size()) {
                return self.map_cached(bio, cache, start, end.min(block_end));
            }
        }
        self.map_blocks(bio, start, end)
    }

    /// Starts a read of whole blocks, or of as many of them as there is memory for. Without cache,
    /// parts of blocks come here, too.
    fn map_blocks<'a>(&self, mut bio: Bio<'a, Self>, start: u64, mut end: u64) -> Mapped<'a> {
        let block_size = u64::from(self.geometry.block_size());
        let cut = |end: u64, limit: u64| {
            let cut = start + limit.max(block_size);
            end.min(cut - cut % block_size)
        };
        end = cut(end, u64::from(MAX_REQUEST));
        let cached = self.part.is_some() && self.modes.get() != Mode::None;
        if cached && end < self.geometry.size() && end - start > block_size {
            // The part of a block at the end goes through the cache.
            end -= end % block_size;
        }
        loop {
            let Some(request) = self.plan(start, end) else {
                return bio.refuse();
            };
            let buffer = Buffer::try_new(&self.shared.pool, request.read_len);
            if buffer.is_none() && request.blocks.end - request.blocks.start > 1 {
                end = cut(end, (end - start) / 2);
                continue;
            }
            bio.accept_partial((end - start).div_ceil(SECTOR_SIZE));
            let (io, mapped) = bio.begin(request);
            Self::launch(io, buffer);
            return mapped;
        }
    }

    /// Starts a read that goes through the cache, or of as much of it as is in one state there.
    fn map_cached<'a>(
        &self,
        mut bio: Bio<'a, Self>,
        cache: &Arc<Index>,
        start: u64,
        end: u64,
    ) -> Mapped<'a> {
        let shift = self.geometry.block_shift();
        let end = end.min(start - start % u64::from(MAX_REQUEST) + u64::from(MAX_REQUEST));
        let Some(blocks) = self.blocks(start, end) else {
            return bio.refuse();
        };
        match Index::get(cache, blocks.clone(), self.most_cached()) {
            Lookup::Found(block) if block.data().is_some() => {
                self.map_hits(bio, cache, &block, blocks, start, end)
            }
            Lookup::Found(block) => {
                let end = end.min((blocks.start + 1) << shift);
                let Some(request) = self.plan(start, end) else {
                    return bio.refuse();
                };
                self.stats.cache_hits.add(1);
                bio.accept_partial((end - start).div_ceil(SECTOR_SIZE));
                let (io, mapped) = bio.begin(request);
                if let Some(io) = block.wait(io) {
                    // It came, or failed, in between.
                    match block.data() {
                        Some(data) => {
                            Self::copy(&io, Loaded::Kept(data));
                            io.end(Ok(()));
                        }
                        None => Self::launch(io, None),
                    }
                }
                mapped
            }
            Lookup::Missing(loader) => self.map_missing(bio, loader, start, end),
            Lookup::Bypass => self.map_blocks(bio, start, end),
        }
    }

    /// Starts a read of blocks that go to the cache, or of as many of them as there is memory for.
    fn map_missing<'a>(
        &self,
        mut bio: Bio<'a, Self>,
        mut loader: Loader,
        start: u64,
        end: u64,
    ) -> Mapped<'a> {
        loop {
            let Range {
                start: first,
                end: last,
            } = loader.blocks();
            let end = end.min(last << self.geometry.block_shift());
            let Some(mut request) = self.plan(start, end) else {
                Self::pass_on(loader, false);
                return bio.refuse();
            };
            let buffer = Buffer::try_new(&self.shared.pool, request.read_len);
            if buffer.is_none() && last - first > 1 {
                Self::pass_on(loader.split_off(first + (last - first) / 2), false);
                continue;
            }
            request.loader = Some(loader);
            bio.accept_partial((end - start).div_ceil(SECTOR_SIZE));
            let (io, mapped) = bio.begin(request);
            Self::launch(io, buffer);
            return mapped;
        }
    }

    /// Doesn't load blocks after all: of the reads that wait for a block, the first loads it.
    /// `again` says that loading has failed.
    fn pass_on(mut loader: Loader, again: bool) {
        for _ in loader.blocks() {
            if let Some((mut io, own)) = loader.pass_on() {
                let request = io.request_mut();
                request.loader = Some(own);
                request.again = again;
                io.defer(|io| Self::launch(io, None));
            }
        }
    }

    /// Ends all reads that wait for blocks which can't be loaded. In a worker.
    fn fail(mut loader: Loader, status: Result<(), Status>) {
        for _ in loader.blocks() {
            let block = loader.block();
            let mut queue = loader.finish(block);
            while let Some(other) = queue.pop() {
                other.end(status);
                dm::cond_resched();
            }
        }
    }

    /// Ends a read of what is in the cache: `block`, the first of `blocks`, and those behind it.
    fn map_hits<'a>(
        &self,
        mut bio: Bio<'a, Self>,
        cache: &Index,
        block: &Block,
        blocks: Range<u64>,
        start: u64,
        end: u64,
    ) -> Mapped<'a> {
        let shift = self.geometry.block_shift();
        let skip = to_usize(start - (blocks.start << shift));
        let mut pages = bio.pages();
        let before = pages.left();
        if let Some(data) = block.data() {
            Loaded::Kept(data).copy_to(skip, &mut pages);
        }
        let mut hit = blocks.start + 1;
        while hit < blocks.end {
            let run = cache.run(hit..blocks.end);
            if run.len() == 0 {
                break;
            }
            for data in run.data() {
                Loaded::Kept(data).copy_to(0, &mut pages);
                hit += 1;
            }
        }
        self.stats.cache_hits.add(hit - blocks.start);
        let sectors = (end.min(hit << shift) - start).div_ceil(SECTOR_SIZE);
        // What the last sector has behind the end of the image.
        let copied = before - pages.left();
        pages.zero(to_usize(sectors * SECTOR_SIZE).saturating_sub(copied));
        bio.accept_partial(sectors);
        bio.end()
    }

    /// The blocks that have bytes `start` to `end` of the image; `None` where none is in it.
    fn blocks(&self, start: u64, end: u64) -> Option<Range<u64>> {
        let shift = self.geometry.block_shift();
        let end = end.min(self.geometry.size());
        (start < end).then(|| start >> shift..((end - 1) >> shift) + 1)
    }

    /// Finds out what to read for bytes `start` to `end` of the image; `None` where they aren't
    /// all in it, but for the rest of the last sector.
    fn plan(&self, start: u64, end: u64) -> Option<Request> {
        let shift = self.geometry.block_shift();
        let blocks = self.blocks(start, end)?;
        let stored = self.table.range(blocks.clone())?;
        // No overflow: construction has checked that the blocks are within the device.
        let (first, last) = (self.start + stored.start, self.start + stored.end);
        let read_start = first - first % self.device_block;
        let read_end = last.next_multiple_of(self.device_block);
        Some(Request {
            skip: to_usize(start - (blocks.start << shift)),
            blocks,
            read_start,
            read_len: to_usize(read_end - read_start),
            loader: None,
            again: false,
            status: Ok(()),
        })
    }

    /// Starts the lower read, with the spare buffer where there is no other memory.
    fn launch(mut io: Io<Self>, buffer: Option<Buffer>) {
        let len = io.request().read_len;
        io.target().shared.tidier.arm();
        if let Some(buffer) = buffer.or_else(|| Buffer::try_new(&io.target().shared.pool, len)) {
            io.attach(buffer);
            Self::start(io);
        } else if let Some(status) = io.without_memory() {
            let request = io.request_mut();
            if let Some(loader) = request.loader.take() {
                let again = request.again;
                Self::pass_on(loader, again);
            }
            io.end(Err(status));
        } else {
            io.wait_for_spare(len, Self::start);
        }
    }

    /// Reads what is stored of the blocks. May sleep.
    fn start(io: Io<Self>) {
        let (request, stats) = (io.request(), &io.target().stats);
        stats.reads.add(1);
        stats.read_bytes.add(to_u64(request.read_len));
        let sector = request.read_start / SECTOR_SIZE;
        let shared = request.loader.is_some();
        io.read(DEVICE, sector, shared, Self::read_done);
    }

    /// The lower read has ended. In any context.
    fn read_done(mut io: Io<Self>, result: Result<(), Status>) {
        // A read may take longer than it is waited for that the pool is used again.
        io.target().shared.tidier.arm();
        if let Err(status) = result {
            if status != Status::AGAIN {
                io.target().stats.read_errors.fetch_add(1, Relaxed);
            }
            if io.request().loader.is_none() {
                return io.end(Err(status));
            }
            // Many may wait, and this may be an interrupt.
            io.request_mut().status = Err(status);
            return io.defer(Self::failed);
        }
        let (this, request) = (io.target(), io.request());
        if request.loader.is_some() {
            return io.defer(Self::decode_shared);
        }
        if !this.decodes_at_once(&io) {
            return io.defer(Self::decode);
        }
        match this.fill(request, io.buffer(), &mut io.pages(), None) {
            Ok(()) => io.end(Ok(())),
            Err((block, Problem::Corrupt)) => {
                let status = Self::report(&io, block);
                io.end(Err(status));
            }
            Err((_, Problem::NeedsContext)) => io.defer(Self::decode),
        }
    }

    /// The lower read of blocks for the cache has failed. In a worker.
    fn failed(mut io: Io<Self>) {
        let status = io.request().status;
        let request = io.request_mut();
        if let Some(loader) = request.loader.take() {
            // One of those that wait tries again, not each of them.
            if request.again {
                Self::fail(loader, status);
            } else {
                Self::pass_on(loader, status != Err(Status::AGAIN));
            }
        }
        io.end(status);
    }

    /// Whether the blocks are better decompressed here and now than by a worker.
    fn decodes_at_once(&self, io: &Io<Self>) -> bool {
        let request = io.request();
        let bytes = (request.blocks.end - request.blocks.start) << self.geometry.block_shift();
        codec::works_at_once(self.geometry.algorithm())
            && request.skip == 0
            && io.pages().run_len()
                >= to_usize(self.geometry.block_len(request.blocks.start).into())
            && io.at_once(bytes)
    }

    /// Decompresses the blocks into the bio, in a worker.
    fn decode(io: Io<Self>) {
        let this = io.target();
        let result = {
            let mut context = this.contexts.borrow();
            this.fill(
                io.request(),
                io.buffer(),
                &mut io.pages(),
                Some(&mut *context),
            )
            .map_err(|(block, _)| Self::report(&io, block))
        };
        io.end(result);
    }

    /// Decompresses blocks for the cache, and ends all reads that wait for them. In a worker.
    fn decode_shared(mut io: Io<Self>) {
        let Some(mut loader) = io.request_mut().loader.take() else {
            return Self::decode(io);
        };
        let mut result = Ok(());
        let mut pages = io.pages();
        let mut skip = io.request().skip;
        for number in loader.blocks() {
            let (loaded, mut waited) = Self::share(&io, &mut loader, number, skip, &mut pages);
            // Not with the context: what is above may work, or wait, where a read ends.
            while let Some(other) = waited.pop() {
                other.end(loaded);
                dm::cond_resched();
            }
            result = result.and(loaded);
            skip = 0;
        }
        pages.zero(pages.left());
        drop(loader);
        // All that was borrowed is given back: with its last I/O the target may go.
        io.end(result);
    }

    /// Decompresses the next block of `loader` for the cache, for `pages` without its first `skip`
    /// bytes, and for the reads that wait for it. Gives these back, to be ended with the result.
    fn share(
        io: &Io<Self>,
        loader: &mut Loader,
        number: u64,
        skip: usize,
        pages: &mut Pages<'_>,
    ) -> (Result<(), Status>, IoQueue<Self>) {
        let block = loader.block();
        let len = to_usize(io.target().geometry.block_len(number).into());
        let data = block.as_ref().and_then(|_| loader.room(len));
        let mut context = io.target().contexts.borrow();
        let mut kept = None;
        let loaded = match (Self::load(io, number, data, &mut context), &block) {
            (Ok(Ok(data)), Some(block)) => {
                // Many may wait: others have use for it meanwhile.
                drop(context);
                block.keep(data);
                block.data().map(Loaded::Kept).ok_or(Status::IO_ERROR)
            }
            (Ok(Ok(data)), None) => Ok(Loaded::Kept(kept.insert(data))),
            (Ok(Err(bytes)), _) => Ok(Loaded::Bytes(bytes)),
            (Err(status), _) => Err(status),
        };
        let mut waited = IoQueue::new();
        let mut queue = loader.finish(block.clone());
        while let Some(other) = queue.pop() {
            if let Ok(loaded) = loaded {
                Self::copy(&other, loaded);
            }
            waited.push(other);
            dm::cond_resched();
        }
        if let Ok(loaded) = loaded {
            loaded.copy_to(skip, pages);
        }
        (loaded.map(|_| ()), waited)
    }

    /// Decompresses a block of `io` into `data`, and gives that; or its bytes, where there is no
    /// memory to keep them.
    fn load<'c>(
        io: &Io<Self>,
        number: u64,
        data: Option<Data>,
        context: &'c mut Context,
    ) -> Result<Result<Data, &'c [u8]>, Status> {
        let this = io.target();
        let corrupt = |Corrupt| Self::report(io, number);
        let Context { decoder, stored } = context;
        let stored = this
            .stored(number, io.request(), io.buffer(), Some(stored))
            .map_err(|_| corrupt(Corrupt))?;
        let len = to_usize(this.geometry.block_len(number).into());
        this.stats.blocks.add(1);
        match data {
            Some(mut data) => {
                decoder
                    .decompress_into(stored, len, &mut data)
                    .map_err(corrupt)?;
                Ok(Ok(data))
            }
            None => decoder
                .decompress_bounced(stored, len)
                .map(Err)
                .map_err(corrupt),
        }
    }

    /// Copies to `io` its part of a block.
    fn copy(io: &Io<Self>, block: Loaded<'_>) {
        let mut pages = io.pages();
        block.copy_to(io.request().skip, &mut pages);
        pages.zero(pages.left());
    }

    /// Most blocks of the device that are in the cache.
    fn most_cached(&self) -> usize {
        self.cache_blocks.unwrap_or(match self.modes.get() {
            Mode::All => usize::MAX,
            Mode::Parts | Mode::None => DEFAULT_SHARE,
        })
    }

    /// Fills `pages` from what was read; tells which block can't be had.
    fn fill(
        &self,
        request: &Request,
        buffer: Option<&Buffer>,
        pages: &mut Pages<'_>,
        mut context: Option<&mut Context>,
    ) -> Result<(), (u64, Problem)> {
        let mut skip = request.skip;
        for block in request.blocks.clone() {
            let (decoder, stored) = match context.as_deref_mut() {
                Some(Context { decoder, stored }) => (Some(decoder), Some(stored)),
                None => (None, None),
            };
            self.stored(block, request, buffer, stored.map(|stored| &mut **stored))
                .and_then(|stored| self.fill_block(block, skip, stored, pages, decoder))
                .map_err(|problem| (block, problem))?;
            skip = 0;
        }
        let blocks = request.blocks.end - request.blocks.start;
        self.stats.blocks.add(blocks);
        // What is left is behind the end of the image, in its last sector.
        pages.zero(pages.left());
        Ok(())
    }

    /// Fills the next of `pages` from block `block`, without its first `skip` bytes.
    fn fill_block(
        &self,
        block: u64,
        skip: usize,
        stored: &[u8],
        pages: &mut Pages<'_>,
        decoder: Option<&mut Decoder>,
    ) -> Result<(), Problem> {
        let len = to_usize(self.geometry.block_len(block).into());
        let wanted = len.saturating_sub(skip).min(pages.left());
        if wanted == len {
            if let Some(dest) = pages.take(len) {
                return match decoder {
                    Some(decoder) => {
                        // A decompressor may check what it has written, which a reader may have
                        // changed meanwhile: that isn't corruption.
                        if decoder.decompress(stored, &dest).is_err() {
                            dest.copy_from(decoder.decompress_bounced(stored, len)?);
                        }
                        Ok(())
                    }
                    None => codec::decompress_at_once(self.geometry.algorithm(), stored, &dest)
                        .ok_or(Problem::NeedsContext)?
                        .map_err(Problem::from),
                };
            }
        }
        let decoder = decoder.ok_or(Problem::NeedsContext)?;
        let bytes = decoder.decompress_bounced(stored, len)?;
        pages.copy_from(bytes.get(skip..skip + wanted).ok_or(Corrupt)?);
        Ok(())
    }

    /// The stored bytes of block `block` in `buffer`, what was read for `request`; in `room` where
    /// they aren't contiguous. Their CRC is right, where there is one.
    fn stored<'d>(
        &self,
        block: u64,
        request: &Request,
        buffer: Option<&'d Buffer>,
        room: Option<&'d mut [u8]>,
    ) -> Result<&'d [u8], Problem> {
        let buffer = buffer.ok_or(Corrupt)?;
        let stored = self.table.range(block..block + 1).ok_or(Corrupt)?;
        let from = (self.start + stored.start)
            .checked_sub(request.read_start)
            .ok_or(Corrupt)?;
        let (from, len) = (to_usize(from), to_usize(stored.end - stored.start));
        let to = from.checked_add(len).filter(|&to| to <= buffer.filled());
        let stored = match buffer.get(from..to.ok_or(Corrupt)?) {
            Some(stored) => stored,
            None => {
                let room = room.ok_or(Problem::NeedsContext)?;
                let room = room.get_mut(..len).ok_or(Corrupt)?;
                buffer.copy(from, room).ok_or(Corrupt)?
            }
        };
        if !self.geometry.has_crc() {
            return Ok(stored);
        }
        let (stored, crc) = stored.split_last_chunk().ok_or(Corrupt)?;
        if block_crc(stored, crc32c) != u32::from_le_bytes(*crc) {
            return Err(Problem::Corrupt);
        }
        Ok(stored)
    }

    /// Counts a corrupt block, and tells of it.
    #[cold]
    fn report(io: &Io<Self>, block: u64) -> Status {
        io.target().stats.corrupt.fetch_add(1, Relaxed);
        io.tell_corrupt(block, io.target().panic_on_corruption);
        Status::IO_ERROR
    }
}
