// SPDX-License-Identifier: GPL-2.0

//! The path of a read: bio, blocks, one lower read of what is stored of them, decompression.
//!
//! ```text
//! map_read -> start -> [lower read] -> read_done -> [worker] decode -> end
//! ```

use core::ops::Range;

use kernel::prelude::*;

use super::{count, Zfile};
use crate::block::{Buffer, Pages, Status};
use crate::codec::{crc32c, Context, Corrupt};
use crate::dm::{self, Bio, DeviceId, Io, Mapped};
use crate::format::num::{bytes_at, to_u64, to_usize};
use crate::format::zfile::{block_crc, Geometry, CRC_SIZE};
use crate::format::SECTOR_SIZE;

/// Bytes of the image that one lower read is for: more than that is cut, so that several CPUs work
/// on a large read.
pub(super) const MAX_REQUEST: u32 = 128 << 10;

/// The only device.
const DEVICE: DeviceId = DeviceId::nth(0);

/// A part of a bio, and what must be read for it.
#[derive(Clone)]
pub(crate) struct Request {
    /// Blocks that hold it.
    blocks: Range<u64>,
    /// Bytes before it in the first block.
    skip: u32,
    /// First byte of the lower read, from the start of the device.
    read_start: u64,
    /// Length of the lower read in bytes.
    read_len: usize,
}

/// Bytes that a spare buffer needs: those of one block, wherever it lies in the device's blocks.
pub(super) fn spare_len(geometry: &Geometry, device_block: u64) -> usize {
    to_usize(u64::from(geometry.stored_max()) + 2 * (device_block - 1))
}

impl Zfile {
    /// Starts a read.
    pub(super) fn map_read<'a>(&self, mut bio: Bio<'a, Self>) -> Mapped<'a> {
        if !bio.is_read() {
            return bio.refuse();
        }
        let start = bio.sector() * SECTOR_SIZE;
        let mut end = start + bio.sectors() * SECTOR_SIZE;
        // A part of what is wanted will do, down to one block, where there is no memory for all.
        let mut limit = u64::from(MAX_REQUEST);
        loop {
            let block_size = u64::from(self.geometry.block_size());
            if end - start > limit {
                let cut = start + limit.max(block_size);
                end = end.min(cut - cut % block_size);
            }
            let Some(request) = self.plan(start, end) else {
                return bio.refuse();
            };
            let buffer = Buffer::try_new(request.read_len);
            let blocks = request.blocks.end - request.blocks.start;
            if buffer.is_none() && blocks > 1 {
                limit = (end - start) / 2;
                continue;
            }

            bio.accept_partial((end - start) / SECTOR_SIZE);
            let len = request.read_len;
            let (mut io, mapped) = bio.begin(request);
            match buffer {
                Some(buffer) => {
                    io.attach(buffer);
                    Self::start(io);
                }
                None => io.wait_for_spare(len, Self::start),
            }
            return mapped;
        }
    }

    /// Finds out what to read for bytes `start` to `end` of the image; `None` where they aren't
    /// all in it, but for the rest of the last sector.
    fn plan(&self, start: u64, end: u64) -> Option<Request> {
        let shift = self.geometry.block_shift();
        let end = end.min(self.geometry.size());
        if start >= end {
            return None;
        }
        let blocks = start >> shift..((end - 1) >> shift) + 1;
        let stored = self.table.range(blocks.clone())?;
        // No overflow: construction has checked that the blocks are within the device.
        let (first, last) = (self.start + stored.start, self.start + stored.end);
        let read_start = first - first % self.device_block;
        let read_end = last.next_multiple_of(self.device_block);
        Some(Request {
            skip: (start - (blocks.start << shift)) as u32,
            blocks,
            read_start,
            read_len: to_usize(read_end - read_start),
        })
    }

    /// Reads what is stored of the blocks. May sleep.
    fn start(io: Io<Self>) {
        let (request, stats) = (io.request(), &io.target().stats);
        count(&stats.reads, 1);
        count(&stats.read_bytes, to_u64(request.read_len));
        let sector = request.read_start / SECTOR_SIZE;
        io.read(DEVICE, sector, Self::read_done);
    }

    /// The lower read has ended. In any context.
    fn read_done(io: Io<Self>, result: Result<(), Status>) {
        match result {
            Ok(()) => io.defer(Self::decode),
            Err(_) => {
                count(&io.target().stats.read_errors, 1);
                io.end(result);
            }
        }
    }

    /// Decompresses the blocks into the bio.
    fn decode(io: Io<Self>) {
        let this = io.target();
        let contexts = this.shared.contexts(this.geometry.algorithm());
        let result = {
            let mut context = contexts.borrow();
            let mut pages = io.pages();
            match context.get() {
                Ok(context) => this.fill(io.request(), io.data(), &mut pages, context),
                Err(Corrupt) => Err(Status::IO_ERROR),
            }
        };
        io.end(result);
    }

    /// Fills `pages` from what was read.
    fn fill(
        &self,
        request: &Request,
        data: &[u8],
        pages: &mut Pages<'_>,
        context: &mut Context,
    ) -> Result<(), Status> {
        let mut skip = to_usize(request.skip.into());
        for block in request.blocks.clone() {
            self.fill_block(block, skip, request, data, pages, context)
                .map_err(|Corrupt| self.report(block))?;
            skip = 0;
        }
        count(
            &self.stats.blocks,
            request.blocks.end - request.blocks.start,
        );
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
        context: &mut Context,
    ) -> Result<(), Corrupt> {
        let stored = self.table.range(block..block + 1).ok_or(Corrupt)?;
        let from = (self.start + stored.start)
            .checked_sub(request.read_start)
            .ok_or(Corrupt)?;
        let to = from + (stored.end - stored.start);
        let stored = data.get(to_usize(from)..to_usize(to)).ok_or(Corrupt)?;
        let stored = if self.geometry.has_crc() {
            let (stored, crc) = stored
                .split_at_checked(stored.len().wrapping_sub(CRC_SIZE as usize))
                .ok_or(Corrupt)?;
            if block_crc(stored, crc32c) != u32::from_le_bytes(bytes_at(crc, 0)) {
                return Err(Corrupt);
            }
            stored
        } else {
            stored
        };

        let len = self.geometry.block_len(block) as usize;
        let wanted = (len - skip.min(len)).min(pages.left());
        if wanted == len {
            if let Some(dest) = pages.take(len) {
                return context.decompress(stored, &dest);
            }
        }
        let bytes = context.decompress_bounced(stored, len)?;
        pages.copy_from(bytes.get(skip..skip + wanted).ok_or(Corrupt)?);
        Ok(())
    }

    /// Counts a corrupt block, and tells of it.
    #[cold]
    fn report(&self, block: u64) -> Status {
        count(&self.stats.corrupt, 1);
        if dm::may_print() {
            pr_err!("{}: zfile: block {block} is corrupt\n", self.name.as_str());
        }
        Status::IO_ERROR
    }
}
