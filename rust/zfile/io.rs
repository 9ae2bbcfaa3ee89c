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

use super::cache::{Block, Cache, Loader, Lookup};
use super::{Mode, Zfile};
use crate::block::{self, memory, Buffer, Pages, Status};
use crate::codec::{self, crc32c, Context, Corrupt};
use crate::dm::{self, Bio, DeviceId, Io, IoQueue, Mapped};
use crate::format::num::{to_u64, to_usize};
use crate::format::zfile::{block_crc, Geometry};
use crate::format::SECTOR_SIZE;

/// Bytes of the image that one lower read is for: more than that is cut, so that several CPUs work
/// on a large read.
pub(super) const MAX_REQUEST: u32 = 128 << 10;

/// Bytes of the image that are decompressed where the lower read ends, without a worker, in case
/// the algorithm needs no working memory and interrupts are on.
const AT_ONCE: u64 = 16 << 10;

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

impl Request {
    /// The part that is wanted of the bytes of the first block, at most `len` bytes.
    fn part<'b>(&self, block: &'b [u8], len: usize) -> &'b [u8] {
        let rest = block.get(self.skip..).unwrap_or(&[]);
        rest.get(..len).unwrap_or(rest)
    }
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
        if let Some(cache) = self.cache.as_ref().filter(|_| mode != Mode::None) {
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
        let cached = self.cache.is_some() && self.modes.get() != Mode::None;
        if cached && end < self.geometry.size() && end - start > block_size {
            // The part of a block at the end goes through the cache.
            end -= end % block_size;
        }
        loop {
            let Some(request) = self.plan(start, end) else {
                return bio.refuse();
            };
            let buffer = Buffer::try_new(request.read_len);
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
        cache: &Arc<Cache>,
        start: u64,
        end: u64,
    ) -> Mapped<'a> {
        let shift = self.geometry.block_shift();
        let end = end.min(start - start % u64::from(MAX_REQUEST) + u64::from(MAX_REQUEST));
        let Some(blocks) = self.blocks(start, end) else {
            return bio.refuse();
        };
        let found = Cache::get(cache, blocks.clone());
        if let Lookup::Found(block) = &found {
            if block.data().is_some() {
                return self.map_hits(bio, cache, block.clone(), blocks, start, end);
            }
        }
        match found {
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
                            Self::copy(&io, data);
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
            let buffer = Buffer::try_new(request.read_len);
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
        cache: &Cache,
        block: Arc<Block>,
        blocks: Range<u64>,
        start: u64,
        end: u64,
    ) -> Mapped<'a> {
        let shift = self.geometry.block_shift();
        let mut skip = to_usize(start - (blocks.start << shift));
        let mut hit = blocks.start;
        let mut next = Some(block);
        let mut pages = bio.pages();
        let before = pages.left();
        while let Some(data) = next.as_ref().and_then(|block| block.data()?.get(skip..)) {
            pages.copy_from(data);
            skip = 0;
            hit += 1;
            next = (hit < blocks.end).then(|| cache.find(hit)).flatten();
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
        if let Some(buffer) = buffer.or_else(|| Buffer::try_new(len)) {
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
        match this.fill(request, io.data(), &mut io.pages(), None) {
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
        bytes <= AT_ONCE
            && codec::works_at_once(self.geometry.algorithm())
            && request.skip == 0
            && io.pages().run_len()
                >= to_usize(self.geometry.block_len(request.blocks.start).into())
            && !block::interrupts_off()
    }

    /// Decompresses the blocks into the bio, in a worker.
    fn decode(io: Io<Self>) {
        let this = io.target();
        let result = {
            let mut context = this.contexts.borrow();
            this.fill(
                io.request(),
                io.data(),
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
        let mut context = io.target().contexts.borrow();
        let bytes = match Self::load(io, number, block.as_deref(), &mut context) {
            Ok(Some(bytes)) => Ok(bytes),
            Ok(None) => {
                // Many may wait: others have use for it meanwhile.
                drop(context);
                let data = block.as_ref().and_then(|block| block.data());
                data.ok_or(Status::IO_ERROR)
            }
            Err(status) => Err(status),
        };
        let mut waited = IoQueue::new();
        let mut queue = loader.finish(block.clone());
        while let Some(other) = queue.pop() {
            if let Ok(bytes) = bytes {
                Self::copy(&other, bytes);
            }
            waited.push(other);
            dm::cond_resched();
        }
        let loaded = bytes.and_then(|bytes| {
            pages.copy_from(bytes.get(skip..).ok_or(Status::IO_ERROR)?);
            Ok(())
        });
        (loaded, waited)
    }

    /// Decompresses a block of `io`. Gives its bytes where they aren't kept in `block`.
    fn load<'c>(
        io: &Io<Self>,
        number: u64,
        block: Option<&Block>,
        context: &'c mut Context,
    ) -> Result<Option<&'c [u8]>, Status> {
        let this = io.target();
        let corrupt = |Corrupt| Self::report(io, number);
        let stored = this
            .stored(number, io.request(), io.data())
            .map_err(corrupt)?;
        let len = to_usize(this.geometry.block_len(number).into());
        this.stats.blocks.add(1);
        match (block, KVec::with_capacity(len, memory::CACHE)) {
            (Some(block), Ok(mut data)) => {
                context
                    .decompress_into(stored, len, &mut data)
                    .map_err(corrupt)?;
                block.keep(data);
                Ok(None)
            }
            _ => context
                .decompress_bounced(stored, len)
                .map(Some)
                .map_err(corrupt),
        }
    }

    /// Copies to `io` its part of a block's bytes.
    fn copy(io: &Io<Self>, bytes: &[u8]) {
        let mut pages = io.pages();
        pages.copy_from(io.request().part(bytes, pages.left()));
        pages.zero(pages.left());
    }

    /// Fills `pages` from what was read; tells which block can't be had.
    fn fill(
        &self,
        request: &Request,
        data: &[u8],
        pages: &mut Pages<'_>,
        mut context: Option<&mut Context>,
    ) -> Result<(), (u64, Problem)> {
        let mut skip = request.skip;
        for block in request.blocks.clone() {
            let context = context.as_deref_mut();
            self.fill_block(block, skip, request, data, pages, context)
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
        request: &Request,
        data: &[u8],
        pages: &mut Pages<'_>,
        context: Option<&mut Context>,
    ) -> Result<(), Problem> {
        let stored = self.stored(block, request, data)?;
        let len = to_usize(self.geometry.block_len(block).into());
        let wanted = len.saturating_sub(skip).min(pages.left());
        if wanted == len {
            if let Some(dest) = pages.take(len) {
                return match context {
                    Some(context) => {
                        // A decompressor may check what it has written, which a reader may have
                        // changed meanwhile: that isn't corruption.
                        if context.decompress(stored, &dest).is_err() {
                            dest.copy_from(context.decompress_bounced(stored, len)?);
                        }
                        Ok(())
                    }
                    None => codec::decompress_at_once(self.geometry.algorithm(), stored, &dest)
                        .ok_or(Problem::NeedsContext)?
                        .map_err(Problem::from),
                };
            }
        }
        let context = context.ok_or(Problem::NeedsContext)?;
        let bytes = context.decompress_bounced(stored, len)?;
        pages.copy_from(bytes.get(skip..skip + wanted).ok_or(Corrupt)?);
        Ok(())
    }

    /// The stored bytes of block `block` in `data`, what was read for `request`. Their CRC is
    /// right, where there is one.
    fn stored<'d>(
        &self,
        block: u64,
        request: &Request,
        data: &'d [u8],
    ) -> Result<&'d [u8], Corrupt> {
        let stored = self.table.range(block..block + 1).ok_or(Corrupt)?;
        let from = (self.start + stored.start)
            .checked_sub(request.read_start)
            .ok_or(Corrupt)?;
        let to = from + (stored.end - stored.start);
        let stored = data.get(to_usize(from)..to_usize(to)).ok_or(Corrupt)?;
        if !self.geometry.has_crc() {
            return Ok(stored);
        }
        let (stored, crc) = stored.split_last_chunk().ok_or(Corrupt)?;
        if block_crc(stored, crc32c) != u32::from_le_bytes(*crc) {
            return Err(Corrupt);
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
