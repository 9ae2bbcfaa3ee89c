// SPDX-License-Identifier: GPL-2.0

//! LSMT, the format of a layer: data, and an index of its segments.
//!
//! ```text
//! header (4096 bytes) | data | index: 16-byte entries, ascending | padding | trailer (4096 bytes)
//! ```
//!
//! The offset and size of the index and the virtual size are taken from the trailer. The header
//! only shows the type of the file.
//!
//! Format description: `Documentation/formats/lsmt.rst`.

use super::num::{bytes_at, le32, le64, to_u64, Records};
use super::{zfile, Blob, Error, Fault, SECTOR_SIZE};

/// Length of the header, and of the trailer, in bytes.
pub const HEADER_SIZE: u64 = 4096;
/// The first bytes of an LSMT file.
pub const MAGIC: [u8; 24] = [
    0x4c, 0x53, 0x4d, 0x54, 0x00, 0x01, 0x02, 0x00, 0x65, 0x7e, 0x63, 0xd2, 0x94, 0x44, 0x08, 0x4c,
    0xa2, 0xd2, 0xc8, 0xec, 0x4f, 0xcf, 0xae, 0x8a,
];
/// Length of an index entry in bytes.
pub const ENTRY_SIZE: u64 = 16;
/// Largest number of index entries in a layer, padding included.
pub const MAX_ENTRIES: u64 = 1_000_000;
/// Largest length of an entry in sectors.
pub const MAX_LENGTH: u64 = (1 << 14) - 1;
/// Largest end of an entry: the first sector after it.
pub const MAX_END: u64 = 1 << 50;
/// First sector of an LSMT file after the header.
pub const DATA_START: u64 = HEADER_SIZE / SECTOR_SIZE;

/// Bits of the `flags` field.
pub mod flag {
    /// Set in the header, clear in the trailer.
    pub const HEADER: u32 = 1 << 0;
    /// The file has data, and not only an index.
    pub const DATA_FILE: u32 = 1 << 1;
    /// The layer is complete.
    pub const SEALED: u32 = 1 << 2;
}

/// Byte offsets of the fields that a reader needs, in the header and in the trailer.
pub mod field {
    /// `u32` flag bits.
    pub const FLAGS: usize = 28;
    /// `u64` byte offset of the index.
    pub const INDEX_OFFSET: usize = 32;
    /// `u64` number of index entries, padding included.
    pub const INDEX_COUNT: usize = 40;
    /// `u64` size of the virtual disk in bytes.
    pub const VIRTUAL_SIZE: usize = 48;
}

/// The fields of a header or trailer that a reader needs, as they are on disk. None of them is
/// checked.
#[derive(Clone, Copy, Debug)]
pub struct RawHeader {
    /// Flag bits.
    pub flags: u32,
    /// Byte offset of the index.
    pub index_offset: u64,
    /// Number of index entries, padding included.
    pub index_count: u64,
    /// Size of the virtual disk in bytes.
    pub virtual_size: u64,
}

impl RawHeader {
    /// Parses the first 512 bytes of a header or trailer. Returns `None` if the magic is missing.
    pub fn parse(bytes: &[u8; 512]) -> Option<Self> {
        if bytes_at(bytes, 0) != MAGIC {
            return None;
        }
        Some(Self {
            flags: le32(bytes, field::FLAGS),
            index_offset: le64(bytes, field::INDEX_OFFSET),
            index_count: le64(bytes, field::INDEX_COUNT),
            virtual_size: le64(bytes, field::VIRTUAL_SIZE),
        })
    }

    /// Returns whether all of the flag bits `bits` are set.
    pub const fn has(&self, bits: u32) -> bool {
        self.flags & bits == bits
    }
}

/// Consecutive sectors of the disk, and the place of their data, packed as in an index entry.
///
/// First word, from the lowest bit: 50 bits of offset, 14 bits of length. Second word: 55 bits of
/// `moffset`, the zeroed bit, 8 bits of tag. Offsets and lengths are in sectors of 512 bytes.
///
/// # Invariants
///
/// The length is above 0, and the end is at most [`MAX_END`].
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Segment {
    place: u64,
    source: u64,
}

impl Segment {
    const OFFSET_BITS: u32 = 50;
    const MOFFSET_BITS: u32 = 55;
    const OFFSET_MASK: u64 = (1 << Self::OFFSET_BITS) - 1;
    const MOFFSET_MASK: u64 = (1 << Self::MOFFSET_BITS) - 1;
    const ZEROED: u64 = 1 << Self::MOFFSET_BITS;

    /// Packs a segment of `length` sectors at sector `offset` of the disk, with data at sector
    /// `moffset` of the LSMT file. Returns `None` if a value is out of range.
    pub const fn new(
        offset: u64,
        length: u64,
        moffset: u64,
        zeroed: bool,
        tag: u8,
    ) -> Option<Self> {
        if length == 0
            || length > MAX_LENGTH
            || offset > MAX_END - length
            || moffset > Self::MOFFSET_MASK
        {
            return None;
        }
        let zeroed = if zeroed { Self::ZEROED } else { 0 };
        // INVARIANT: Checked above.
        Some(Self {
            place: offset | length << Self::OFFSET_BITS,
            source: moffset | zeroed | (tag as u64) << (Self::MOFFSET_BITS + 1),
        })
    }

    /// Returns the first sector on the virtual disk.
    #[inline]
    pub const fn offset(&self) -> u64 {
        self.place & Self::OFFSET_MASK
    }

    /// Returns the length in sectors.
    #[inline]
    pub const fn length(&self) -> u64 {
        self.place >> Self::OFFSET_BITS
    }

    /// Returns the first sector after the segment on the virtual disk.
    #[inline]
    pub const fn end(&self) -> u64 {
        self.offset() + self.length()
    }

    /// Returns the first sector of the data in the LSMT file; in the merged index of a target, on
    /// the layer's lower device.
    #[inline]
    pub const fn moffset(&self) -> u64 {
        self.source & Self::MOFFSET_MASK
    }

    /// Returns whether the segment reads as zeros and hides the layers below.
    #[inline]
    pub const fn zeroed(&self) -> bool {
        self.source & Self::ZEROED != 0
    }

    /// Returns the tag: in a merged index, the number of the layer; the lowest is 0.
    #[inline]
    pub const fn tag(&self) -> u8 {
        (self.source >> (Self::MOFFSET_BITS + 1)) as u8
    }

    /// Returns the part of the segment from sector `from` up to sector `to` of the disk, not
    /// included, with the tag `tag`; `None` if it is empty.
    pub fn part(&self, from: u64, to: u64, tag: u8) -> Option<Self> {
        let from = from.max(self.offset());
        let length = to.min(self.end()).checked_sub(from)?;
        let skipped = if self.zeroed() {
            0
        } else {
            from - self.offset()
        };
        Self::new(
            from,
            length,
            self.moffset().checked_add(skipped)?,
            self.zeroed(),
            tag,
        )
    }

    /// Returns the segment with its data `sectors` sectors further on in the file; `None` if that
    /// is out of range.
    pub const fn shifted(&self, sectors: u64) -> Option<Self> {
        match self.moffset().checked_add(sectors) {
            Some(moffset) => Self::new(
                self.offset(),
                self.length(),
                moffset,
                self.zeroed(),
                self.tag(),
            ),
            None => None,
        }
    }
}

impl core::fmt::Debug for Segment {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Segment")
            .field("offset", &self.offset())
            .field("length", &self.length())
            .field("moffset", &self.moffset())
            .field("zeroed", &self.zeroed())
            .field("tag", &self.tag())
            .finish()
    }
}

/// The values of a layer's trailer that a reader needs, checked.
///
/// # Invariants
///
/// - `virtual_size` is at most [`MAX_END`] sectors, and `entries` at most [`MAX_ENTRIES`].
/// - The index, `16 * entries` bytes at `index_offset`, is after the header and before the trailer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    virtual_size: u64,
    index_offset: u64,
    entries: u64,
}

impl Layer {
    /// Reads and checks the header and the trailer.
    ///
    /// # Errors
    ///
    /// One of the `Lsmt` faults or [`Fault::Truncated`], and the errors of reading `blob`.
    pub fn read<B: Blob>(blob: &B) -> Result<Self, B::Error> {
        let mut bytes = [0; 512];
        blob.read_at(0, &mut bytes)?;
        let Some(header) = RawHeader::parse(&bytes) else {
            let fault = match zfile::RawHeader::parse(&bytes) {
                Some(_) => Fault::LsmtIsZfile,
                None => Fault::LsmtMagic,
            };
            return Err(Error::new(fault, 0, le64(&bytes, 0)).into());
        };
        if !header.has(flag::HEADER | flag::DATA_FILE) {
            let at = to_u64(field::FLAGS);
            return Err(Error::new(Fault::LsmtHeaderFlags, at, header.flags.into()).into());
        }

        let at = blob
            .size()
            .checked_sub(HEADER_SIZE)
            .filter(|&at| at >= HEADER_SIZE)
            .ok_or(Error::new(Fault::Truncated, blob.size(), HEADER_SIZE))?;
        blob.read_at(at, &mut bytes)?;
        let trailer = RawHeader::parse(&bytes).ok_or(Error::new(
            Fault::LsmtTrailerMagic,
            at,
            le64(&bytes, 0),
        ))?;
        let error =
            |fault, field, found| Err(B::Error::from(Error::new(fault, at + to_u64(field), found)));
        if trailer.has(flag::HEADER) || !trailer.has(flag::DATA_FILE | flag::SEALED) {
            return error(Fault::LsmtTrailerFlags, field::FLAGS, trailer.flags.into());
        }
        if trailer.index_count > MAX_ENTRIES {
            let count = trailer.index_count;
            return error(Fault::LsmtIndexCount, field::INDEX_COUNT, count);
        }
        if trailer.virtual_size > MAX_END * SECTOR_SIZE {
            let size = trailer.virtual_size;
            return error(Fault::LsmtVirtualSizeRange, field::VIRTUAL_SIZE, size);
        }
        // No overflow in the product: the count is bounded above.
        let end = trailer
            .index_offset
            .checked_add(trailer.index_count * ENTRY_SIZE);
        if trailer.index_offset < HEADER_SIZE || end.is_none_or(|end| end > at) {
            let offset = trailer.index_offset;
            return error(Fault::LsmtIndexRange, field::INDEX_OFFSET, offset);
        }
        // INVARIANT: All checked above.
        Ok(Self {
            virtual_size: trailer.virtual_size,
            index_offset: trailer.index_offset,
            entries: trailer.index_count,
        })
    }

    /// Returns the size of the virtual disk in bytes; 0 if the layer has none.
    pub const fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// Returns the number of index entries, padding included.
    pub const fn entries(&self) -> u64 {
        self.entries
    }

    /// Reads the index, checks every entry, and passes the segments to `sink` in ascending order,
    /// without the padding.
    ///
    /// # Errors
    ///
    /// One of the `LsmtEntry` faults, the errors of reading `blob`, and the first error of `sink`.
    pub fn read_index<B: Blob>(
        &self,
        blob: &B,
        mut sink: impl FnMut(Segment) -> Result<(), B::Error>,
    ) -> Result<(), B::Error> {
        let mut records = Records::<16>::new();
        let mut at = self.index_offset;
        let mut previous_end = 0;
        let len = self.entries * ENTRY_SIZE;
        blob.stream(self.index_offset, len, &mut |piece| {
            records.feed(piece, |entry| {
                if let Some(segment) = self.parse_entry(entry, at, previous_end)? {
                    previous_end = segment.end();
                    sink(segment)?;
                }
                at += ENTRY_SIZE;
                Ok(())
            })
        })
    }

    /// Checks the index entry at byte `at`. Its segment must not begin before sector `previous_end`
    /// of the disk. Returns `None` for padding.
    fn parse_entry(
        &self,
        entry: &[u8; 16],
        at: u64,
        previous_end: u64,
    ) -> Result<Option<Segment>, Error> {
        let raw = Segment {
            place: le64(entry, 0),
            source: le64(entry, 8),
        };
        if raw.offset() == Segment::OFFSET_MASK {
            return Ok(None);
        }
        let error = |fault, found| Err(Error::new(fault, at, found));
        if raw.length() == 0 || raw.end() > MAX_END {
            return error(Fault::LsmtEntryLength, raw.length());
        }
        if raw.offset() < previous_end {
            return error(Fault::LsmtEntryOrder, raw.offset());
        }
        // The data of a zeroed entry is never read.
        let mapped = if raw.zeroed() { 0 } else { raw.length() };
        let index_start = self.index_offset / SECTOR_SIZE;
        // No overflow: the numbers have 55 and 14 bits.
        if raw.moffset() < DATA_START || raw.moffset() + mapped > index_start {
            return error(Fault::LsmtEntryMapping, raw.moffset());
        }
        // INVARIANT: Checked above.
        Ok(Some(raw))
    }
}
