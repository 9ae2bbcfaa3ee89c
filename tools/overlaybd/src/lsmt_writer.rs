// SPDX-License-Identifier: GPL-2.0

//! Writes an LSMT layer as upstream's `overlaybd-commit` does: the data is contiguous and in the
//! order of the index, without unused sectors. A layer for DAX has unused sectors before its data.

use crate::format::lsmt::{self, field, flag, Segment};
use crate::format::num::{to_u64, to_usize};
use crate::format::SECTOR_SIZE;
use crate::layer::Ident;
use crate::on_disk::lsmt::{self as on_disk, USER_TAG_LEN};
use crate::zfile_writer::put;
use crate::{Error, Progress, Result};

/// Adjacent runs are joined if the result is shorter than this, in sectors.
const JOIN_LIMIT: u64 = lsmt::MAX_LENGTH;
/// Longest entry that a long run of data is split into, in sectors: a multiple of 64 (32 KiB).
const DATA_PIECE: u64 = 16320;
/// Longest entry that a long run of zeros, or any long run of a layer for DAX, is split into, in sectors: whole pages
/// of all [sizes](crate::dax::PAGE_SIZES).
const PAGES_PIECE: u64 = 16256;
/// The index is padded to a multiple of this many entries.
const PAD_TO: u64 = 256;
/// Bytes of data copied at once: few enough to stay in the cache of a CPU.
const COPY: u64 = 128 << 10;

/// A run of sectors that the layer changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First sector in the virtual disk.
    pub offset: u64,
    /// Length in sectors, at least 1.
    pub length: u64,
    /// Whether the run is zeroed: it has no data and reads as zeros.
    pub zeroed: bool,
}

impl Run {
    /// Returns the first sector after the run.
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }
}

/// Ascending runs. Adjacent runs of the same kind are joined.
#[derive(Default)]
pub struct Runs(Vec<Run>);

impl Runs {
    /// Appends `length` sectors at sector `offset`.
    pub fn push(&mut self, offset: u64, length: u64, zeroed: bool) {
        match self.0.last_mut() {
            Some(last) if last.end() == offset && last.zeroed == zeroed => last.length += length,
            _ => self.0.push(Run {
                offset,
                length,
                zeroed,
            }),
        }
    }

    /// Returns the runs.
    pub fn into_vec(self) -> Vec<Run> {
        self.0
    }
}

/// Joins adjacent runs of the same kind. The runs must be ascending.
pub fn join(runs: &[Run]) -> Vec<Run> {
    let mut joined = Runs::default();
    for run in runs {
        joined.push(run.offset, run.length, run.zeroed);
    }
    joined.into_vec()
}

/// Splits runs of any length into runs that fit in an index entry. `dax` says whether the layer is for DAX: then runs
/// of whole pages are split between pages.
pub fn cut(runs: impl IntoIterator<Item = Run>, dax: bool) -> impl Iterator<Item = Run> {
    runs.into_iter().flat_map(move |run| {
        let piece = match run.zeroed || dax {
            true => PAGES_PIECE,
            false => DATA_PIECE,
        };
        (run.offset..run.end())
            .step_by(to_usize(piece))
            .map(move |offset| Run {
                offset,
                length: piece.min(run.end() - offset),
                zeroed: run.zeroed,
            })
    })
}

/// Returns the number of entries after padding.
pub(crate) fn padded(entries: u64) -> u64 {
    entries.next_multiple_of(PAD_TO)
}

/// A layer to be written.
pub struct LayerWriter {
    virtual_size: u64,
    ident: Ident,
    entries: Vec<Segment>,
    /// Number of sectors of zeros between the header and the data.
    gap: u64,
    /// Number of sectors of data.
    data: u64,
}

impl LayerWriter {
    /// Plans a layer of `runs`. They must be ascending, must not overlap, and each must fit in an
    /// entry. Adjacent runs are joined as upstream does.
    ///
    /// # Errors
    ///
    /// [`Error::TooFragmented`]; [`Error::Invalid`] if a run or the user tag is too long.
    pub fn new(
        virtual_size: u64,
        ident: Ident,
        runs: impl IntoIterator<Item = Run>,
    ) -> Result<Self> {
        if ident.user_tag.len() > USER_TAG_LEN {
            return Err(Error::Invalid(format!(
                "the user tag has {} bytes, more than {USER_TAG_LEN}",
                ident.user_tag.len()
            )));
        }
        let mut joined: Vec<Run> = Vec::new();
        for run in runs {
            match joined.last_mut() {
                Some(last)
                    if last.end() == run.offset
                        && last.zeroed == run.zeroed
                        && last.length + run.length < JOIN_LIMIT =>
                {
                    last.length += run.length;
                }
                _ => joined.push(run),
            }
        }

        let mut data = 0;
        let mut entries = Vec::with_capacity(joined.len());
        for run in joined {
            // A zeroed entry has no data; like upstream, it gets the position of the next data.
            let moffset = lsmt::DATA_START + data;
            let entry = Segment::new(run.offset, run.length, moffset, run.zeroed, 0);
            entries.push(entry.ok_or_else(|| {
                let Run { offset, length, .. } = run;
                Error::Invalid(format!(
                    "{length} sectors at sector {offset} do not fit in an index entry"
                ))
            })?);
            if !run.zeroed {
                data += run.length;
            }
        }
        let writer = Self {
            virtual_size,
            ident,
            entries,
            gap: 0,
            data,
        };
        if writer.padded_entries() > lsmt::MAX_ENTRIES {
            return Err(Error::TooFragmented {
                entries: writer.padded_entries(),
                max: lsmt::MAX_ENTRIES,
            });
        }
        Ok(writer)
    }

    /// Moves the data to byte `start` of the file, a multiple of the sector size after the header.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if an index entry cannot hold the new place of its data.
    pub fn with_data_at(mut self, start: u64) -> Result<Self> {
        self.gap = (start / SECTOR_SIZE).saturating_sub(lsmt::DATA_START);
        for entry in &mut self.entries {
            let moved = entry.shifted(self.gap);
            *entry = moved.ok_or_else(|| Error::Invalid("the layer is too large".to_owned()))?;
        }
        Ok(self)
    }

    /// Returns the length of the LSMT file in bytes.
    pub fn len(&self) -> u64 {
        self.index_offset() + self.padded_entries() * lsmt::ENTRY_SIZE + lsmt::HEADER_SIZE
    }

    /// Returns whether the layer changes nothing.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns the size in bytes of the virtual disk.
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// Returns the byte of the disk after its last data.
    pub fn end(&self) -> u64 {
        let data = self.entries.iter().filter(|entry| !entry.zeroed());
        data.map(Segment::end).max().unwrap_or_default() * SECTOR_SIZE
    }

    /// Returns the index entries, without padding.
    pub fn entries(&self) -> &[Segment] {
        &self.entries
    }

    /// Passes the bytes of the LSMT file to `sink`, in order. `read` reads the disk at a byte
    /// offset, whole sectors of one entry, into a buffer.
    ///
    /// # Errors
    ///
    /// The first error of `read`, `sink` or `progress`.
    pub fn write(
        &self,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
        progress: Progress<'_>,
    ) -> Result<()> {
        sink(&self.header(flag::HEADER | flag::DATA_FILE | flag::SEALED, 0, 0))?;
        sink(&vec![0; to_usize(self.gap * SECTOR_SIZE)])?;
        let mut buffer = vec![0; to_usize(COPY.min(self.data_len()))];
        for entry in self.entries.iter().filter(|entry| !entry.zeroed()) {
            let (mut at, end) = (entry.offset() * SECTOR_SIZE, entry.end() * SECTOR_SIZE);
            while at < end {
                let take = (end - at).min(COPY);
                let piece = buffer.get_mut(..to_usize(take)).unwrap_or_default();
                read(at, piece)?;
                sink(piece)?;
                progress(take)?;
                at += take;
            }
        }
        let count = self.padded_entries();
        let mut index = Vec::with_capacity(to_usize(count * lsmt::ENTRY_SIZE));
        for entry in &self.entries {
            index.extend_from_slice(&on_disk::entry(entry));
        }
        for _ in to_u64(self.entries.len())..count {
            index.extend_from_slice(&on_disk::PADDING);
        }
        sink(&index)?;
        sink(&self.header(flag::DATA_FILE | flag::SEALED, self.index_offset(), count))
    }

    /// Returns the length of the data in bytes, which is also the sum passed to `progress`.
    pub fn data_len(&self) -> u64 {
        self.data * SECTOR_SIZE
    }

    fn index_offset(&self) -> u64 {
        lsmt::HEADER_SIZE + self.gap * SECTOR_SIZE + self.data_len()
    }

    fn padded_entries(&self) -> u64 {
        padded(to_u64(self.entries.len()))
    }

    fn header(&self, flags: u32, index_offset: u64, index_count: u64) -> Vec<u8> {
        let mut bytes = vec![0; to_usize(lsmt::HEADER_SIZE)];
        put(&mut bytes, 0, &lsmt::MAGIC);
        let size = on_disk::STRUCT_SIZE.to_le_bytes();
        put(&mut bytes, on_disk::field::SIZE, &size);
        put(&mut bytes, field::FLAGS, &flags.to_le_bytes());
        put(&mut bytes, field::INDEX_OFFSET, &index_offset.to_le_bytes());
        put(&mut bytes, field::INDEX_COUNT, &index_count.to_le_bytes());
        let virtual_size = self.virtual_size.to_le_bytes();
        put(&mut bytes, field::VIRTUAL_SIZE, &virtual_size);
        let uuid = |text: &str| text.bytes().take(36).collect::<Vec<u8>>();
        put(&mut bytes, on_disk::field::UUID, &uuid(&self.ident.uuid));
        let parent = uuid(&self.ident.parent);
        put(&mut bytes, on_disk::field::PARENT, &parent);
        put(&mut bytes, on_disk::field::VERSION, &[1, 1]);
        put(&mut bytes, on_disk::field::USER_TAG, &self.ident.user_tag);
        bytes
    }
}
