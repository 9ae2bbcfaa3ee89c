// SPDX-License-Identifier: GPL-2.0

//! ZFile: a seekable compressed file.
//!
//! ```text
//! header (512 bytes) | block | block | … | index: u32 stored length × blocks | trailer (512 bytes)
//! ```
//!
//! Each block has `block_size` bytes of the original file, compressed; the last one has the rest of
//! the file. A CRC-32C of the compressed bytes may follow each block.
//!
//! Format description: `Documentation/formats/zfile.rst`.

use core::ops::{Deref, Range};

use super::num::{bytes_at, le32, le64, to_u64, to_usize, Records};
use super::{Blob, Crc32c, Error, Fault};

/// Length of the header, and of the trailer, in bytes.
pub const HEADER_SIZE: u64 = 512;
/// The first bytes of a ZFile.
pub const MAGIC: [u8; 24] = *b"ZFile\0\x01\0tuji.yyf@Alibaba";
/// Smallest block size in bytes.
pub const MIN_BLOCK_SIZE: u32 = 512;
/// Largest block size in bytes.
pub const MAX_BLOCK_SIZE: u32 = 65536;
/// Largest number of blocks in a file.
pub const MAX_BLOCKS: u64 = 1_000_000_000;
/// Seed of the CRC-32C after each block.
pub const BLOCK_CRC_SEED: u32 = 100_007;
/// Length of the CRC after a block in bytes.
pub const CRC_SIZE: u32 = 4;

/// Bits of the `flags` field.
pub mod flag {
    /// Set in the header, clear in the trailer.
    pub const HEADER: u64 = 1 << 0;
    /// The file has data, and not only an index.
    pub const DATA_FILE: u64 = 1 << 1;
    /// The file is complete.
    pub const SEALED: u64 = 1 << 2;
    /// In the header: the header was overwritten when the file was complete, and has all fields.
    /// The trailer isn't needed.
    pub const OVERWRITTEN: u64 = 1 << 3;
    /// `digest` and `index_crc` are valid.
    pub const DIGEST: u64 = 1 << 4;
    /// The index is compressed. No tool writes such a file.
    pub const COMPRESSED_INDEX: u64 = 1 << 5;
}

/// Byte offsets of the fields that a reader needs, in the header and in the trailer.
pub mod field {
    /// `u32` CRC-32C of all 512 bytes, computed with the four bytes of this field as 0.
    pub const DIGEST: usize = 28;
    /// `u64` flag bits.
    pub const FLAGS: usize = 32;
    /// `u64` byte offset of the index.
    pub const INDEX_OFFSET: usize = 40;
    /// `u64` number of index entries, one for each block.
    pub const INDEX_COUNT: usize = 48;
    /// `u64` length of the original file in bytes.
    pub const ORIGINAL_SIZE: usize = 56;
    /// `u32` CRC-32C of the index.
    pub const INDEX_CRC: usize = 64;
    /// `u32` block size in bytes.
    pub const BLOCK_SIZE: usize = 72;
    /// `u8` number of the compression algorithm.
    pub const ALGORITHM: usize = 76;
    /// `u32` size of the dictionary in bytes.
    pub const DICT_SIZE: usize = 84;
    /// `u8`: if not 0, a CRC follows each block.
    pub const VERIFY: usize = 88;
}

/// The compression algorithm of the blocks, with its on-disk number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Algorithm {
    /// Each block is a raw LZ4 block.
    Lz4 = 1,
    /// Each block is a zstd frame.
    Zstd = 2,
}

impl Algorithm {
    /// Returns the algorithm with the on-disk number `id`.
    pub const fn from_id(id: u8) -> Option<Self> {
        match id {
            1 => Some(Self::Lz4),
            2 => Some(Self::Zstd),
            _ => None,
        }
    }

    /// Returns the name in tables, status lines and tools.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    /// Returns the largest compressed length of `n` bytes, in bytes.
    pub const fn bound(self, n: u32) -> u32 {
        match self {
            Self::Lz4 => n + n / 255 + 16,
            Self::Zstd => n + n / 256 + 64,
        }
    }
}

/// The fields of a header or trailer that a reader needs, as they are on disk. None of them is
/// checked.
#[derive(Clone, Copy, Debug)]
pub struct RawHeader {
    /// CRC-32C of the header or trailer.
    pub digest: u32,
    /// Flag bits. In files without digest, the bits above `DIGEST` may be garbage.
    pub flags: u64,
    /// Byte offset of the index.
    pub index_offset: u64,
    /// Number of index entries.
    pub index_count: u64,
    /// Length of the original file in bytes.
    pub original_size: u64,
    /// CRC-32C of the index.
    pub index_crc: u32,
    /// Block size in bytes.
    pub block_size: u32,
    /// Algorithm number.
    pub algorithm: u8,
    /// Size of the dictionary in bytes.
    pub dict_size: u32,
    /// If not 0, a CRC follows each block.
    pub verify: u8,
}

impl RawHeader {
    /// Parses a header or trailer. Returns `None` if the magic is missing.
    pub fn parse(bytes: &[u8; 512]) -> Option<Self> {
        if bytes_at(bytes, 0) != MAGIC {
            return None;
        }
        Some(Self {
            digest: le32(bytes, field::DIGEST),
            flags: le64(bytes, field::FLAGS),
            index_offset: le64(bytes, field::INDEX_OFFSET),
            index_count: le64(bytes, field::INDEX_COUNT),
            original_size: le64(bytes, field::ORIGINAL_SIZE),
            index_crc: le32(bytes, field::INDEX_CRC),
            block_size: le32(bytes, field::BLOCK_SIZE),
            algorithm: bytes[field::ALGORITHM],
            dict_size: le32(bytes, field::DICT_SIZE),
            verify: bytes[field::VERIFY],
        })
    }

    /// Returns whether all of the flag bits `bits` are set.
    pub const fn has(&self, bits: u64) -> bool {
        self.flags & bits == bits
    }

    /// Returns whether the digest of `bytes` is right, or absent.
    fn digest_ok(&self, bytes: &[u8; 512], crc32c: Crc32c) -> bool {
        !self.has(flag::DIGEST) || digest(bytes, crc32c) == self.digest
    }
}

/// Computes the digest of a header or trailer: its CRC-32C, with the four bytes of the digest as 0.
pub fn digest(bytes: &[u8; 512], crc32c: Crc32c) -> u32 {
    let (head, rest) = bytes.split_at(field::DIGEST);
    let (_, tail) = rest.split_at(4);
    crc32c(crc32c(crc32c(0, head), &[0; 4]), tail)
}

/// Computes the CRC-32C that follows a block with the compressed bytes `stored`.
pub fn block_crc(stored: &[u8], crc32c: Crc32c) -> u32 {
    crc32c(BLOCK_CRC_SEED, stored)
}

/// The values of a ZFile's header or trailer that a reader needs, checked.
///
/// # Invariants
///
/// - `block_size` is a power of two from [`MIN_BLOCK_SIZE`] to [`MAX_BLOCK_SIZE`].
/// - `blocks` is at most [`MAX_BLOCKS`] and equals `size / block_size`, rounded up.
/// - The index, `4 * blocks` bytes at `index_offset`, ends within the blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    size: u64,
    blocks: u64,
    block_size: u32,
    algorithm: Algorithm,
    crc: bool,
    index_offset: u64,
    index_crc: Option<u32>,
}

impl Geometry {
    /// Reads and checks the header and the trailer. Returns `None` if `blob` doesn't start as a
    /// ZFile does.
    ///
    /// # Errors
    ///
    /// One of the `Zfile` faults or [`Fault::Truncated`], and the errors of reading `blob`.
    pub fn read<B: Blob>(blob: &B, crc32c: Crc32c) -> Result<Option<Self>, B::Error> {
        let mut bytes = [0; 512];
        if blob.size() < HEADER_SIZE {
            return Ok(None);
        }
        blob.read_at(0, &mut bytes)?;
        let Some(header) = RawHeader::parse(&bytes) else {
            return Ok(None);
        };
        let flags_error =
            |fault, at, flags| B::Error::from(Error::new(fault, at + to_u64(field::FLAGS), flags));

        if !header.has(flag::HEADER) {
            return Err(flags_error(Fault::ZfileHeaderFlags, 0, header.flags));
        }
        if !header.digest_ok(&bytes, crc32c) {
            let at = to_u64(field::DIGEST);
            return Err(Error::new(Fault::ZfileHeaderDigest, at, header.digest.into()).into());
        }
        if header.has(flag::OVERWRITTEN) {
            let geometry = Self::check(&header, 0, blob.size())?;
            geometry.check_spare_trailer(blob, crc32c)?;
            return Ok(Some(geometry));
        }

        if !header.has(flag::DATA_FILE) {
            return Err(flags_error(Fault::ZfileHeaderFlags, 0, header.flags));
        }
        let at = blob
            .size()
            .checked_sub(HEADER_SIZE)
            .filter(|&at| at >= HEADER_SIZE)
            .ok_or(Error::new(Fault::Truncated, blob.size(), HEADER_SIZE))?;
        blob.read_at(at, &mut bytes)?;
        let trailer =
            RawHeader::parse(&bytes).ok_or(Error::new(Fault::ZfileTrailerMagic, at, 0))?;
        if trailer.has(flag::HEADER) || !trailer.has(flag::DATA_FILE | flag::SEALED) {
            return Err(flags_error(Fault::ZfileTrailerFlags, at, trailer.flags));
        }
        if !trailer.digest_ok(&bytes, crc32c) {
            let at = at + to_u64(field::DIGEST);
            return Err(Error::new(Fault::ZfileTrailerDigest, at, trailer.digest.into()).into());
        }
        Ok(Some(Self::check(&trailer, at, at)?))
    }

    /// Checks the fields of the header or trailer at byte `at`. The index must end at or before
    /// byte `limit`.
    fn check(raw: &RawHeader, at: u64, limit: u64) -> Result<Self, Error> {
        let error = |fault, field, found| Err(Error::new(fault, at + to_u64(field), found));

        // Older files have no digest: the `DIGEST` flag is clear, and the flags above it may be
        // garbage, so `COMPRESSED_INDEX` counts only together with `DIGEST`.
        let has_digest = raw.has(flag::DIGEST);
        if has_digest && raw.has(flag::COMPRESSED_INDEX) {
            return error(Fault::ZfileCompressedIndex, field::FLAGS, raw.flags);
        }
        let Some(algorithm) = Algorithm::from_id(raw.algorithm) else {
            let id = raw.algorithm.into();
            return error(Fault::ZfileAlgorithm, field::ALGORITHM, id);
        };
        if !raw.block_size.is_power_of_two()
            || !(MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&raw.block_size)
        {
            let size = raw.block_size.into();
            return error(Fault::ZfileBlockSize, field::BLOCK_SIZE, size);
        }
        if raw.dict_size != 0 {
            let size = raw.dict_size.into();
            return error(Fault::ZfileDictionary, field::DICT_SIZE, size);
        }
        if raw.index_count > MAX_BLOCKS {
            return error(Fault::ZfileIndexCount, field::INDEX_COUNT, raw.index_count);
        }
        if raw.index_count != raw.original_size.div_ceil(raw.block_size.into()) {
            return error(Fault::ZfileBlockCount, field::INDEX_COUNT, raw.index_count);
        }
        // No overflow in the product: the count is bounded above.
        let end = raw.index_offset.checked_add(raw.index_count * 4);
        if raw.index_offset < HEADER_SIZE || end.is_none_or(|end| end > limit) {
            return error(
                Fault::ZfileIndexRange,
                field::INDEX_OFFSET,
                raw.index_offset,
            );
        }
        // INVARIANT: All checked above.
        Ok(Self {
            size: raw.original_size,
            blocks: raw.index_count,
            block_size: raw.block_size,
            algorithm,
            crc: raw.verify != 0,
            index_offset: raw.index_offset,
            index_crc: has_digest.then_some(raw.index_crc),
        })
    }

    /// Checks the digest of the trailer of a file whose header has all fields, if there is a
    /// trailer directly after the index.
    fn check_spare_trailer<B: Blob>(&self, blob: &B, crc32c: Crc32c) -> Result<(), B::Error> {
        let at = self.index_offset + self.index_len();
        if blob.size() - at < HEADER_SIZE {
            return Ok(());
        }
        let mut bytes = [0; 512];
        blob.read_at(at, &mut bytes)?;
        match RawHeader::parse(&bytes) {
            Some(raw) if !raw.digest_ok(&bytes, crc32c) => {
                let at = at + to_u64(field::DIGEST);
                Err(Error::new(Fault::ZfileTrailerDigest, at, raw.digest.into()).into())
            }
            _ => Ok(()),
        }
    }

    /// Returns the length of the original file in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Returns the number of blocks.
    pub const fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Returns the block size in bytes.
    pub const fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Returns the binary logarithm of the block size in bytes.
    pub const fn block_shift(&self) -> u32 {
        self.block_size.trailing_zeros()
    }

    /// Returns the compression algorithm.
    pub const fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Returns whether a CRC follows each block.
    pub const fn has_crc(&self) -> bool {
        self.crc
    }

    /// Returns the length of the index in bytes.
    pub const fn index_len(&self) -> u64 {
        self.blocks * 4
    }

    /// Returns how many bytes a stored block of this file may have at most, its CRC included.
    pub const fn stored_max(&self) -> u32 {
        self.algorithm.bound(self.block_size) + if self.crc { CRC_SIZE } else { 0 }
    }

    /// Returns the number of bytes of the original file in block `block`; 0 after the last block.
    pub fn block_len(&self, block: u64) -> u32 {
        let start = block.checked_mul(self.block_size.into());
        let left = start.map_or(0, |start| self.size.saturating_sub(start));
        u32::try_from(left).map_or(self.block_size, |left| left.min(self.block_size))
    }

    /// Returns the lengths of the arrays of this file's jump table.
    pub fn table_shape(&self) -> TableShape {
        // Deltas must fit in 16 bits. A group has as many blocks as that allows, rounded down to a
        // power of two.
        let per_group = u32::from(u16::MAX) / self.stored_max() + 1;
        let group_shift = per_group.ilog2();
        TableShape {
            group_shift,
            bases: to_usize(self.blocks.div_ceil(1 << group_shift)) + 1,
            deltas: if group_shift == 0 {
                0
            } else {
                to_usize(self.blocks)
            },
        }
    }

    /// Reads the index, checks every entry and the CRC of the index, and fills the jump table.
    /// `bases` and `deltas` must have the lengths that [`Geometry::table_shape`] returns.
    ///
    /// # Errors
    ///
    /// [`Fault::ZfileEntry`], [`Fault::ZfileEntryRange`] or [`Fault::ZfileIndexCrc`],
    /// [`Fault::ZfileBlockCount`] if the arrays are too short, and the errors of reading `blob`.
    pub fn read_index<B: Blob>(
        &self,
        blob: &B,
        crc32c: Crc32c,
        bases: &mut [u64],
        deltas: &mut [u16],
    ) -> Result<(), B::Error> {
        let mut records = Records::<4>::new();
        let mut filler = Filler::new(self, bases, deltas);
        let mut crc = 0;
        blob.stream(self.index_offset, self.index_len(), &mut |piece| {
            if self.index_crc.is_some() {
                crc = crc32c(crc, piece);
            }
            Ok(records.feed(piece, |entry| filler.push(u32::from_le_bytes(*entry)))?)
        })?;
        filler.finish()?;
        match self.index_crc {
            Some(wanted) if wanted != crc => {
                Err(Error::new(Fault::ZfileIndexCrc, self.index_offset, crc.into()).into())
            }
            _ => Ok(()),
        }
    }
}

/// The lengths of the two arrays of a [`JumpTable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableShape {
    /// Binary logarithm of the number of blocks in a group.
    group_shift: u32,
    /// Length of the array of bases in elements: one for each group, and one for the end.
    pub bases: usize,
    /// Length of the array of deltas in elements: one for each block, or 0 if each group has one
    /// block.
    pub deltas: usize,
}

/// Fills a jump table, one entry of the index at a time.
struct Filler<'a> {
    geometry: &'a Geometry,
    shape: TableShape,
    bases: &'a mut [u64],
    deltas: &'a mut [u16],
    next: u64,
    /// Byte offset of block `next`.
    offset: u64,
    /// Byte offset of the first block of the group of block `next`.
    base: u64,
}

impl<'a> Filler<'a> {
    fn new(geometry: &'a Geometry, bases: &'a mut [u64], deltas: &'a mut [u16]) -> Self {
        Self {
            geometry,
            shape: geometry.table_shape(),
            bases,
            deltas,
            next: 0,
            offset: HEADER_SIZE,
            base: HEADER_SIZE,
        }
    }

    /// Adds the next block, which has `stored` bytes in the file.
    fn push(&mut self, stored: u32) -> Result<(), Error> {
        let geometry = self.geometry;
        // No overflow: the index is within the blob, and this entry within the index.
        let at = geometry.index_offset + self.next * 4;
        let empty = if geometry.crc { CRC_SIZE } else { 0 };
        let bound = geometry.algorithm.bound(geometry.block_len(self.next)) + empty;
        if stored <= empty || stored > bound {
            return Err(Error::new(Fault::ZfileEntry, at, stored.into()));
        }

        let misfit = self.misfit();
        if self.next & ((1 << self.shape.group_shift) - 1) == 0 {
            let group = to_usize(self.next >> self.shape.group_shift);
            *self.bases.get_mut(group).ok_or(misfit)? = self.offset;
            self.base = self.offset;
        }
        if self.shape.group_shift > 0 {
            // Fits: the last block of a group starts below 2^16 even if the others have their
            // largest length.
            let delta = u16::try_from(self.offset - self.base).map_err(|_| misfit)?;
            *self.deltas.get_mut(to_usize(self.next)).ok_or(misfit)? = delta;
        }

        self.next += 1;
        // No overflow: the offset is at most `index_offset`, which is within the blob.
        self.offset += u64::from(stored);
        if self.offset > geometry.index_offset {
            return Err(Error::new(Fault::ZfileEntryRange, at, stored.into()));
        }
        Ok(())
    }

    /// Writes the end of the last block to the table.
    fn finish(self) -> Result<(), Error> {
        let misfit = self.misfit();
        if self.next != self.geometry.blocks {
            return Err(misfit);
        }
        *self.bases.last_mut().ok_or(misfit)? = self.offset;
        Ok(())
    }

    /// Returns the error for arrays that are too short, and for missing entries.
    fn misfit(&self) -> Error {
        Error::new(
            Fault::ZfileBlockCount,
            self.geometry.index_offset,
            self.next,
        )
    }
}

/// The byte offset of each block in the file.
///
/// Consecutive blocks form groups. The table has a base for each group, the 64-bit offset of its
/// first block, and a delta for each block, the 16-bit distance of the block from the base of its
/// group. This takes 2.5 bytes for each block of 4 KiB, and 8 bytes for each block of 64 KiB, where
/// each group has one block, and there are no deltas.
pub struct JumpTable<B, D> {
    group_shift: u32,
    blocks: u64,
    bases: B,
    deltas: D,
}

impl<B: Deref<Target = [u64]>, D: Deref<Target = [u16]>> JumpTable<B, D> {
    /// Makes a table of arrays that [`Geometry::read_index`] has filled.
    pub fn new(geometry: &Geometry, bases: B, deltas: D) -> Self {
        Self {
            group_shift: geometry.table_shape().group_shift,
            blocks: geometry.blocks,
            bases,
            deltas,
        }
    }

    /// Returns the byte offset of the start of block `block`, or of the end of the last block if
    /// `block` is the number of blocks; `None` if `block` is larger.
    #[inline]
    pub fn offset(&self, block: u64) -> Option<u64> {
        if block >= self.blocks {
            return match block == self.blocks {
                true => self.bases.last().copied(),
                false => None,
            };
        }
        let base = *self.bases.get(to_usize(block >> self.group_shift))?;
        if self.group_shift == 0 {
            return Some(base);
        }
        let delta = *self.deltas.get(to_usize(block))?;
        Some(base + u64::from(delta))
    }

    /// Returns the range of bytes of the blocks `blocks` in the file; `None` if the file doesn't
    /// have all of them.
    #[inline]
    pub fn range(&self, blocks: Range<u64>) -> Option<Range<u64>> {
        Some(self.offset(blocks.start)?..self.offset(blocks.end)?)
    }

    /// Returns the memory of the table in bytes.
    pub fn memory(&self) -> u64 {
        to_u64(self.bases.len()) * 8 + to_u64(self.deltas.len()) * 2
    }
}
