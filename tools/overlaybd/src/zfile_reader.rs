// SPDX-License-Identifier: GPL-2.0

//! Reads the original file of a ZFile.

use std::sync::{Mutex, PoisonError};

use crate::codec::Decoder;
use crate::error::{BlockError, BlockFault};
use crate::file::stream_pieces;
use crate::format::blob::check_range;
use crate::format::num::{le32, to_u64, to_usize};
use crate::format::zfile::{self, Geometry, JumpTable};
use crate::format::Blob;
use crate::{crc32c, parallel, Error, Part, Progress, Result};

/// Approximate number of bytes of the original file that are read and decompressed at once.
const BATCH: u64 = 1 << 20;

/// An open ZFile: a blob with the content of the original file.
pub struct ZfileReader {
    blob: Part,
    geometry: Geometry,
    table: JumpTable<Vec<u64>, Vec<u16>>,
    /// The number and content of the last block that was read in part, since the next read often
    /// needs the rest.
    recent: Mutex<Option<(u64, Vec<u8>)>>,
}

impl ZfileReader {
    /// Opens the ZFile in `blob` and checks header, trailer and index. Returns `None` if `blob` is
    /// no ZFile.
    ///
    /// # Errors
    ///
    /// One of the `Zfile` faults, and read errors.
    pub fn open(blob: Part) -> Result<Option<Self>> {
        let Some(geometry) = Geometry::read(&blob, crc32c)? else {
            return Ok(None);
        };
        let shape = geometry.table_shape();
        let mut bases = vec![0; shape.bases];
        let mut deltas = vec![0; shape.deltas];
        geometry.read_index(&blob, crc32c, &mut bases, &mut deltas)?;
        let table = JumpTable::new(&geometry, bases, deltas);
        Ok(Some(Self {
            blob,
            geometry,
            table,
            recent: Mutex::new(None),
        }))
    }

    /// Returns the checked header.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Returns the compressed file.
    pub fn blob(&self) -> &Part {
        &self.blob
    }

    /// Returns the memory of the jump table in bytes.
    pub fn table_memory(&self) -> u64 {
        self.table.memory()
    }

    /// Returns the length of all stored blocks in bytes, without header and index.
    pub fn stored_len(&self) -> u64 {
        let blocks = self.geometry.blocks();
        self.table
            .range(0..blocks)
            .map_or(0, |range| range.end - range.start)
    }

    /// Reads and checks every block. Returns the errors, in the order of the blocks.
    ///
    /// # Errors
    ///
    /// Read errors, and the error that `progress` returns.
    pub fn verify(&self, progress: Progress<'_>) -> Result<Vec<BlockError>> {
        let step = self.batch_blocks();
        let batches = self.geometry.blocks().div_ceil(step);
        let found = parallel::map(
            0..batches,
            usize::MAX,
            || (),
            |(), batch| {
                let first = batch * step;
                let last = (first + step).min(self.geometry.blocks());
                let mut bad = Vec::new();
                let mut decoder = Decoder::default();
                let stored = self.read_stored(first, last)?;
                let mut out = vec![0; to_usize(self.geometry.block_size().into())];
                for block in first..last {
                    let len = to_usize(self.geometry.block_len(block).into());
                    let out = out.get_mut(..len).unwrap_or_default();
                    if let Err(error) = self.decode(&mut decoder, &stored, block, out) {
                        bad.push(error);
                    }
                    progress(to_u64(len))?;
                }
                Ok::<_, Error>(bad)
            },
        );
        let found = found.collect::<Result<Vec<_>>>()?;
        Ok(found.into_iter().flatten().collect())
    }

    /// Returns the number of blocks in a batch.
    fn batch_blocks(&self) -> u64 {
        (BATCH >> self.geometry.block_shift()).max(1)
    }

    /// Reads the stored bytes of the blocks from `first` to `last - 1`.
    fn read_stored(&self, first: u64, last: u64) -> Result<Stored> {
        let range = self.table.range(first..last).ok_or(Error::Invalid(format!(
            "zfile blocks {first} to {last} do not exist"
        )))?;
        let mut bytes = vec![0; to_usize(range.end - range.start)];
        self.blob.read_at(range.start, &mut bytes)?;
        Ok(Stored {
            offset: range.start,
            bytes,
        })
    }

    /// Checks and decompresses block `block` into `out`, which must be as long as the block.
    fn decode(
        &self,
        decoder: &mut Decoder,
        stored: &Stored,
        block: u64,
        out: &mut [u8],
    ) -> Result<(), BlockError> {
        let range = self.table.range(block..block + 1).unwrap_or_default();
        let error = |fault| BlockError {
            block,
            offset: range.start,
            fault,
        };
        let bytes = stored
            .get(range.start, range.end)
            .ok_or(error(BlockFault::Data))?;
        let data = if self.geometry.has_crc() {
            let end = bytes
                .len()
                .checked_sub(to_usize(zfile::CRC_SIZE.into()))
                .ok_or(error(BlockFault::Data))?;
            let (data, crc) = bytes.split_at(end);
            let (found, expected) = (zfile::block_crc(data, crc32c), le32(crc, 0));
            if found != expected {
                return Err(error(BlockFault::Crc { found, expected }));
            }
            data
        } else {
            bytes
        };
        decoder
            .decode(self.geometry.algorithm(), data, out)
            .map_err(error)
    }

    /// Fills `buf` from byte `within` of the recent block if its number is `block`. Otherwise,
    /// returns false.
    fn copy_recent(&self, block: u64, within: usize, buf: &mut [u8]) -> bool {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = match &*recent {
            Some((number, bytes)) if *number == block => bytes.get(within..within + buf.len()),
            _ => None,
        };
        bytes.map(|bytes| buf.copy_from_slice(bytes)).is_some()
    }

    /// Reads the blocks from `first` to `last - 1`. `buf` gets their bytes from `offset` on.
    fn read_batch(&self, first: u64, last: u64, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut decoder = Decoder::default();
        let stored = self.read_stored(first, last)?;
        let mut rest = buf;
        let mut at = offset;
        for block in first..last {
            let start = block << self.geometry.block_shift();
            let len = to_usize(self.geometry.block_len(block).into());
            let within = to_usize(at - start);
            let take = (len - within).min(rest.len());
            let (piece, next) = rest.split_at_mut(take);
            if take == len {
                self.decode(&mut decoder, &stored, block, piece)?;
            } else {
                let mut bytes = vec![0; len];
                self.decode(&mut decoder, &stored, block, &mut bytes)?;
                if let Some(bytes) = bytes.get(within..within + take) {
                    piece.copy_from_slice(bytes);
                }
                *self.recent.lock().unwrap_or_else(PoisonError::into_inner) = Some((block, bytes));
            }
            rest = next;
            at += to_u64(take);
        }
        Ok(())
    }
}

impl Blob for ZfileReader {
    type Error = Error;

    fn size(&self) -> u64 {
        self.geometry.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.size(), offset, to_u64(buf.len()))?;
        let shift = self.geometry.block_shift();
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            let first = at >> shift;
            let end = at + to_u64(rest.len());
            let last = end.div_ceil(1 << shift).min(first + self.batch_blocks());
            let take = to_usize(end.min(last << shift) - at);
            let (piece, next) = rest.split_at_mut(take);
            let within = to_usize(at - (first << shift));
            if last != first + 1 || !self.copy_recent(first, within, piece) {
                self.read_batch(first, last, at, piece)?;
            }
            rest = next;
            at += to_u64(take);
        }
        Ok(())
    }

    fn stream(
        &self,
        offset: u64,
        len: u64,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        stream_pieces(self, offset, len, sink)
    }
}

/// The stored bytes of consecutive blocks.
struct Stored {
    /// Byte offset of the first one in the ZFile.
    offset: u64,
    bytes: Vec<u8>,
}

impl Stored {
    fn get(&self, start: u64, end: u64) -> Option<&[u8]> {
        let start = start.checked_sub(self.offset)?;
        let end = end.checked_sub(self.offset)?;
        self.bytes.get(to_usize(start)..to_usize(end))
    }
}
