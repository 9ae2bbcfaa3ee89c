// SPDX-License-Identifier: GPL-2.0

//! The path of a read: from the bio to its blocks, one lower read of their stored bytes, and their
//! decompression.
//!
//! ```text
//! map_read -> map_blocks -> launch -> [lower read] -> read_done -> [worker] decode -----> end
//!                                                          `----- small LZ4 read --------^
//!          -> map_cached -> cached: copied ----------------------------------------------^
//!                        -> missing: launch -> … -> read_done -> [worker] decode_shared -^
//!                        -> being loaded: waits
//! ```
//!
//! A read that waits for a block is usually ended by `decode_shared` of the read that loads the
//! block.

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

/// Largest number of bytes of the original file that one lower read is for: two blocks or more, as
/// a block has 64 KiB at most. Longer bios are cut, so that several CPUs work on a large read.
pub(super) const MAX_REQUEST: u32 = 128 << 10;

/// A read whose blocks have at most this number of bytes in total overtakes larger reads that wait
/// for a worker, even if it has several blocks.
const SMALL: u32 = 16 << 10;

/// Share of a device: the largest number of its blocks in the cache, if the table line sets none
/// and the mode isn't [`Mode::All`].
const DEFAULT_SHARE: usize = 64;

/// The target's only lower device.
const DEVICE: DeviceId = DeviceId::nth(0);

/// The part of a bio that one [`Io`] reads, and the lower read for it.
pub(crate) struct Request {
    /// Blocks that have the bytes of this part.
    blocks: Range<u64>,
    /// Bytes of the first block before this part.
    skip: usize,
    /// First byte of the lower read, from the start of the lower device.
    read_start: u64,
    /// Length of the lower read in bytes.
    read_len: usize,
    /// Which bytes of the lower read are stored bytes of the blocks.
    stored: Range<usize>,
    /// The loader of the blocks, if they go to the cache. Its blocks are `blocks`.
    loader: Option<Loader>,
    /// Whether an earlier lower read of these blocks for the cache has failed.
    again: bool,
    /// Result of the lower read, for the worker that handles its error.
    status: Result<(), Status>,
}

impl Request {
    /// Returns the number of bytes that the blocks of this part have when decompressed. The last
    /// block of the file counts as a whole one.
    pub(super) fn block_bytes(&self, geometry: &Geometry) -> u32 {
        let blocks = self.blocks.end.saturating_sub(self.blocks.start);
        // No overflow: the blocks have at most `MAX_REQUEST` bytes, and the rest of the first and
        // the last block.
        u32::try_from(blocks << geometry.block_shift()).unwrap_or(u32::MAX)
    }
}

/// Returns the bytes that a spare buffer needs: enough for the stored bytes of one block, in whole
/// logical blocks of the lower device, which have `device_block` bytes each.
pub(super) fn spare_len(geometry: &Geometry, device_block: u64) -> usize {
    to_usize(u64::from(geometry.stored_max()) + 2 * (device_block - 1))
}

/// Why a block was not decompressed.
enum Problem {
    Corrupt,
    /// Decompression needs a codec context, and the caller has passed none.
    NeedsContext,
}

/// The decompressed bytes of a block.
#[derive(Clone, Copy)]
enum Loaded<'a> {
    /// In memory of the block itself, which the cache keeps.
    Kept(&'a Data),
    /// In the bounce buffer of a codec context, because the cache has no room for the block, or the
    /// device was removed.
    Bytes(&'a [u8]),
}

impl Loaded<'_> {
    /// Copies the bytes after the first `skip` to `pages`, as many as fit.
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
    /// Starts a read: determines which part of the bio [`Zfile::map_cached`] or
    /// [`Zfile::map_blocks`] has to handle. That function cuts the bio.
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

    /// Starts a read of whole blocks that bypasses the cache. If memory is short, cuts the bio to
    /// as many blocks as there is memory for. Parts of blocks are read here, too, if the device
    /// doesn't use the cache (`cache_blocks 0` or [`Mode::None`]), or if the cache has no room.
    fn map_blocks<'a>(&self, mut bio: Bio<'a, Self>, start: u64, mut end: u64) -> Mapped<'a> {
        let block_size = u64::from(self.geometry.block_size());
        let cut = |end: u64, limit: u64| {
            let cut = start + limit.max(block_size);
            end.min(cut - cut % block_size)
        };
        end = cut(end, u64::from(MAX_REQUEST));
        let cached = self.part.is_some() && self.modes.get() != Mode::None;
        if cached && end < self.geometry.size() && end - start > block_size {
            // The rest of the bio, a part of the last block, goes through the cache.
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

    /// Starts a read through the cache. If the first block is being loaded, cuts the bio to that
    /// block. Otherwise cuts it to the first block and those directly after it in the same state:
    /// cached or missing.
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
                    // Loading has ended since the lookup, with or without an error.
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

    /// Starts a read that loads missing blocks into the cache. If memory is short, cuts the bio to
    /// as many blocks as there is memory for.
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

    /// Stops loading the blocks of `loader`: for each block, the first read that waits for it loads
    /// it instead. `again` says that a lower read for these blocks has failed.
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

    /// Ends all reads that wait for the blocks of `loader` with `status`. Called in a worker.
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

    /// Copies `block`, which is the first of `blocks`, and the cached blocks directly after it to
    /// the bio. Cuts the bio to these blocks, and ends it.
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
        // If the original file ends within the last sector, the rest of that sector is zeros.
        let copied = before - pages.left();
        pages.zero(to_usize(sectors * SECTOR_SIZE).saturating_sub(copied));
        bio.accept_partial(sectors);
        bio.end()
    }

    /// Returns the numbers of the blocks that have bytes `start` to `end` of the original file;
    /// `None` if the file has none of these bytes.
    fn blocks(&self, start: u64, end: u64) -> Option<Range<u64>> {
        let shift = self.geometry.block_shift();
        let end = end.min(self.geometry.size());
        (start < end).then(|| start >> shift..((end - 1) >> shift) + 1)
    }

    /// Plans the lower read for bytes `start` to `end` of the original file: the stored bytes of
    /// their blocks, in whole logical blocks of the lower device. `end` may be after the end of the
    /// file, in its last sector. Returns `None` if `start` isn't in the file.
    fn plan(&self, start: u64, end: u64) -> Option<Request> {
        let shift = self.geometry.block_shift();
        let blocks = self.blocks(start, end)?;
        let stored = self.table.range(blocks.clone())?;
        // No overflow: the constructor has checked that all blocks are within the device, whose size is
        // a whole number of logical blocks.
        let (first, last) = (self.start + stored.start, self.start + stored.end);
        // A logical block has a power of two of bytes.
        let within = self.device_block - 1;
        let read_start = first & !within;
        let read_end = (last + within) & !within;
        Some(Request {
            skip: to_usize(start - (blocks.start << shift)),
            blocks,
            read_start,
            read_len: to_usize(read_end - read_start),
            stored: to_usize(first - read_start)..to_usize(last - read_start),
            loader: None,
            again: false,
            status: Ok(()),
        })
    }

    /// Starts the lower read. Without `buffer`, allocates one. If there is no memory, the read
    /// waits for the spare buffer; a read-ahead or a bio with `REQ_NOWAIT` ends with an error
    /// instead.
    fn launch(mut io: Io<Self>, buffer: Option<Buffer>) {
        let len = io.request().read_len;
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

    /// Submits the lower read of the stored bytes of the blocks. May sleep. Doesn't sleep in the
    /// map function for a bio with `REQ_NOWAIT`, since the lower bio has this flag, too.
    fn start(io: Io<Self>) {
        let (request, stats) = (io.request(), &io.target().stats);
        stats.reads.add(1);
        stats.read_bytes.add(to_u64(request.read_len));
        let sector = request.read_start / SECTOR_SIZE;
        // Other reads may wait for a read that loads the cache. So the lower read for it must not
        // fail early or have a low priority, even if the bio is a read-ahead, for example: see
        // [`Io::read`].
        let shared = request.loader.is_some();
        io.read(DEVICE, sector, shared, Self::read_done);
    }

    /// Completion of the lower read. Called in any context.
    fn read_done(mut io: Io<Self>, result: Result<(), Status>) {
        if let Err(status) = result {
            if status != Status::AGAIN {
                io.target().stats.read_errors.fetch_add(1, Relaxed);
            }
            if io.request().loader.is_none() {
                return io.end(Err(status));
            }
            // Many reads may wait for these blocks, and this may be an interrupt.
            io.request_mut().status = Err(status);
            return io.defer(Self::failed);
        }
        let (this, request) = (io.target(), io.request());
        if request.loader.is_some() {
            return Self::defer_decoding(io, Self::decode_shared);
        }
        let mut pages = io.pages();
        if !this.decodes_at_once(&io, &mut pages) {
            return Self::defer_decoding(io, Self::decode);
        }
        match this.fill(request, io.buffer(), &mut pages, None) {
            Ok(()) => io.end(Ok(())),
            Err((block, Problem::Corrupt)) => {
                let status = Self::report(&io, block);
                io.end(Err(status));
            }
            Err((_, Problem::NeedsContext)) => Self::defer_decoding(io, Self::decode),
        }
    }

    /// Continues with `step`, which decompresses the blocks, in a worker. A read of one block or of
    /// at most [`SMALL`] bytes overtakes others, unless it is of the idle class.
    fn defer_decoding(io: Io<Self>, step: fn(Io<Self>)) {
        let geometry = &io.target().geometry;
        let bytes = io.request().block_bytes(geometry);
        if bytes <= geometry.block_size().max(SMALL) && !io.is_idle_class() {
            io.defer_small(step, bytes);
        } else {
            io.defer(step);
        }
    }

    /// Handles an error of a lower read for the cache. Called in a worker.
    fn failed(mut io: Io<Self>) {
        let status = io.request().status;
        let request = io.request_mut();
        if let Some(loader) = request.loader.take() {
            // After the first error, each block is read again, by the first read that waits for it.
            // After the second error, all reads that wait fail. `AGAIN` doesn't count as an error.
            if request.again {
                Self::fail(loader, status);
            } else {
                Self::pass_on(loader, status != Err(Status::AGAIN));
            }
        }
        io.end(status);
    }

    /// Returns whether to try to decompress the blocks in the completion, and not in a worker: if
    /// they are LZ4, the read begins at the start of a block, the memory for the first block is
    /// contiguous, and [`Io::at_once`] returns true. If a later block then needs a codec context, a
    /// worker decompresses all blocks again. `pages` is at the start of the memory of the bio.
    fn decodes_at_once(&self, io: &Io<Self>, pages: &mut Pages<'_>) -> bool {
        let request = io.request();
        let bytes = request.block_bytes(&self.geometry).into();
        codec::works_at_once(self.geometry.algorithm())
            && request.skip == 0
            && pages.run_len() >= to_usize(self.geometry.block_len(request.blocks.start).into())
            && io.at_once(bytes)
    }

    /// Decompresses the blocks into the bio, and ends the bio. Called in a worker.
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

    /// Decompresses blocks for the cache, and ends this read and all that wait for the blocks.
    /// Called in a worker.
    fn decode_shared(mut io: Io<Self>) {
        let Some(mut loader) = io.request_mut().loader.take() else {
            return Self::decode(io);
        };
        let mut result = Ok(());
        let mut pages = io.pages();
        let mut skip = io.request().skip;
        let mut from = io.request().stored.start;
        for number in loader.blocks() {
            let part = io.target().next_stored(number, io.request(), &mut from);
            let (loaded, mut waited) =
                Self::share(&io, &mut loader, number, part, skip, &mut pages);
            // No context is borrowed here: the completion of the file system or device on top may
            // take long.
            while let Some(other) = waited.pop() {
                other.end(loaded);
                dm::cond_resched();
            }
            result = result.and(loaded);
            skip = 0;
        }
        pages.zero(pages.left());
        drop(loader);
        // Armed after the blocks were counted, since the tidier stops when the cache is empty. A
        // call on another CPU at this moment may not see the blocks yet and stop all the same: then
        // the next read that fills the cache arms the tidier.
        io.target().shared.tidier.arm();
        // Nothing is borrowed from the target any more: the target may be destroyed once its last
        // I/O has ended.
        io.end(result);
    }

    /// Decompresses block `number`, the next one of `loader`, whose stored bytes are bytes `part` of
    /// the lower read. Copies it to the cache, to `pages` without its first `skip` bytes, and to the
    /// reads that wait for it. Returns the result, and these reads; the caller must end them with
    /// that result.
    fn share(
        io: &Io<Self>,
        loader: &mut Loader,
        number: u64,
        part: Option<Range<usize>>,
        skip: usize,
        pages: &mut Pages<'_>,
    ) -> (Result<(), Status>, IoQueue<Self>) {
        let block = loader.block();
        let len = to_usize(io.target().geometry.block_len(number).into());
        let data = block.as_ref().and_then(|_| loader.room(len));
        let mut context = io.target().contexts.borrow();
        let mut kept = None;
        let loaded = match (Self::load(io, number, part, data, &mut context), &block) {
            (Ok(Ok(data)), Some(block)) => {
                // Many reads may wait for the block; other threads can use the context during the
                // copies.
                drop(context);
                block.keep(data);
                block.data().map(Loaded::Kept).ok_or(Status::IO_ERROR)
            }
            // Doesn't happen: if `block` is `None`, `data` was `None`, too.
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

    /// Decompresses block `number`, whose stored bytes are bytes `part` of the lower read, into
    /// `data`, and returns `Ok(Ok(data))`. Without `data`, returns `Ok(Err(bytes))`, a slice of the
    /// bounce buffer of `context`; this isn't an error.
    fn load<'c>(
        io: &Io<Self>,
        number: u64,
        part: Option<Range<usize>>,
        data: Option<Data>,
        context: &'c mut Context,
    ) -> Result<Result<Data, &'c [u8]>, Status> {
        let this = io.target();
        let corrupt = |Corrupt| Self::report(io, number);
        let Context { decoder, stored } = context;
        let stored = this
            .stored(part, io.buffer(), Some(stored))
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

    /// Copies the part of `block` that `io` reads to the pages of `io`, and zeros the rest of
    /// these pages.
    fn copy(io: &Io<Self>, block: Loaded<'_>) {
        let mut pages = io.pages();
        block.copy_to(io.request().skip, &mut pages);
        pages.zero(pages.left());
    }

    /// Returns the share of the device: the largest number of its blocks in the cache.
    fn most_cached(&self) -> usize {
        self.cache_blocks.unwrap_or(match self.modes.get() {
            Mode::All => usize::MAX,
            Mode::Parts | Mode::None => DEFAULT_SHARE,
        })
    }

    /// Decompresses the blocks of `request` into `pages`, and zeros the rest of `pages`. The error
    /// has the number of the block that failed. Without `context`, fails at the first block that
    /// needs one.
    fn fill(
        &self,
        request: &Request,
        buffer: Option<&Buffer>,
        pages: &mut Pages<'_>,
        mut context: Option<&mut Context>,
    ) -> Result<(), (u64, Problem)> {
        let mut skip = request.skip;
        let mut from = request.stored.start;
        for block in request.blocks.clone() {
            let (decoder, room) = match context.as_deref_mut() {
                Some(Context { decoder, stored }) => (Some(decoder), Some(stored)),
                None => (None, None),
            };
            let part = self.next_stored(block, request, &mut from);
            self.stored(part, buffer, room.map(|room| &mut **room))
                .and_then(|stored| self.fill_block(block, skip, stored, pages, decoder))
                .map_err(|problem| (block, problem))?;
            skip = 0;
        }
        let blocks = request.blocks.end - request.blocks.start;
        self.stats.blocks.add(blocks);
        let rest = pages.left();
        if rest > 0 {
            // This is after the end of the original file, in its last sector.
            pages.zero(rest);
        }
        Ok(())
    }

    /// Decompresses `stored`, the compressed bytes of block `block` without the CRC, and fills the
    /// next bytes of `pages`, without the first `skip` bytes of the block.
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
                        // A decompressor may check its output, which the owner of the pages may
                        // have changed meanwhile. That isn't corruption. So decompress once more,
                        // to the bounce buffer.
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

    /// Returns which bytes of the lower read of `request` are the stored bytes of block `block`, and
    /// sets `from` to their end. Called for each block of `request` in turn; before the first call,
    /// `from` is the start of [`Request::stored`]. Returns `None` if the table doesn't have the
    /// block.
    #[inline]
    fn next_stored(&self, block: u64, request: &Request, from: &mut usize) -> Option<Range<usize>> {
        let to = if block + 1 == request.blocks.end {
            request.stored.end
        } else {
            // No overflow: the constructor has checked that all blocks are within the device.
            let end = self.start + self.table.offset(block + 1)?;
            to_usize(end.checked_sub(request.read_start)?)
        };
        Some(core::mem::replace(from, to)..to)
    }

    /// Returns the compressed bytes of a block, without their CRC: bytes `part` of those that the
    /// lower read has filled in `buffer`. Checks the CRC, if there is one. Copies the bytes to
    /// `room` if they aren't contiguous.
    fn stored<'d>(
        &self,
        part: Option<Range<usize>>,
        buffer: Option<&'d Buffer>,
        room: Option<&'d mut [u8]>,
    ) -> Result<&'d [u8], Problem> {
        let (buffer, part) = (buffer.ok_or(Corrupt)?, part.ok_or(Corrupt)?);
        let len = part.end.checked_sub(part.start).ok_or(Corrupt)?;
        let stored = match buffer.get(part.start, len) {
            Some(stored) => stored,
            None => {
                let room = room.ok_or(Problem::NeedsContext)?;
                let room = room.get_mut(..len).ok_or(Corrupt)?;
                buffer.copy(part.start, room).ok_or(Corrupt)?
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

    /// Counts and reports a corrupt block. Returns the status for the reads that need it.
    #[cold]
    fn report(io: &Io<Self>, block: u64) -> Status {
        io.target().stats.corrupt.fetch_add(1, Relaxed);
        io.tell_corrupt(block, io.target().panic_on_corruption);
        Status::IO_ERROR
    }
}
