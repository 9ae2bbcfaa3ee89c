// SPDX-License-Identifier: GPL-2.0

//! The exception store of dm-snapshot, as the kernel's `drivers/md/dm-snap-persistent.c` writes it. An
//! exception is a chunk of the disk that was written, and its place in the store.
//!
//! Chunk 0 is a header. Areas follow: each has a chunk of exceptions, and a chunk of data for each of
//! these. The first exception with chunk 0 of the store ends the list.

use std::ops::Range;

use crate::format::num::{le32, le64, to_u64, to_usize};
use crate::format::{Blob, SECTOR_SIZE};
use crate::{Error, Result};

use super::fault::Fault;
use super::head::{self, Head, CHUNK};

/// `SnAp`.
const MAGIC: u32 = 0x7041_6e53;
const VERSION: u32 = 1;
/// Number of bytes of the header in use: magic, valid, version, size of a chunk in sectors.
const HEADER: usize = 16;
/// Size of an exception in bytes: chunk of the disk, chunk of the store.
const ENTRY: usize = 16;
/// Largest number of written bytes in a range that `next` or `lookup` returns; at least one chunk.
const AHEAD: u64 = 1 << 20;

/// Returns the number of exceptions in an area, for chunks of `chunk` sectors.
fn per_area(chunk: u32) -> u64 {
    u64::from(chunk) * SECTOR_SIZE / to_u64(ENTRY)
}

/// Returns the size in sectors of an exception store that has room for all chunks of a disk of `disk`
/// sectors. `disk` is at most 2^50.
pub fn full_size(disk: u64) -> u64 {
    let chunk = u64::from(CHUNK);
    let chunks = disk.div_ceil(chunk);
    // The header, the areas (dm-snapshot makes the next area when one is full), the data, and a chunk that
    // stays free.
    let areas = chunks / per_area(CHUNK) + 1;
    let all = 1 + areas + chunks + 1;
    (all + u64::from(ends_at_area(all))) * chunk
}

/// Returns the size in sectors of the exception store that fits in `sectors` sectors. It has whole chunks,
/// and doesn't end where an area would begin. When an area is full, dm-snapshot writes the next one without
/// checking for room. If this write fails, the store becomes invalid.
pub fn usable(sectors: u64) -> u64 {
    let chunk = u64::from(CHUNK);
    let chunks = sectors / chunk;
    (chunks - u64::from(ends_at_area(chunks))) * chunk
}

/// Returns whether an area would begin at the end of a store of `chunks` chunks.
fn ends_at_area(chunks: u64) -> bool {
    let step = per_area(CHUNK) + 1;
    chunks % step == 1 && chunks > 1
}

/// An exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Exception {
    /// Chunk of the disk.
    old: u64,
    /// Chunk of the store.
    new: u64,
}

/// All exceptions of a store. Each takes 16 bytes of memory.
#[derive(Debug, PartialEq, Eq)]
pub struct Exceptions {
    /// Ascending by the chunk of the disk, without duplicates.
    all: Vec<Exception>,
    /// Size of a chunk in bytes.
    chunk: u64,
    /// Whether the store has room for one more chunk.
    has_room: bool,
}

impl Exceptions {
    /// Reads the exceptions of the store at the start of `blob`. `head` is its head.
    ///
    /// # Errors
    ///
    /// Every [`Fault`] except [`Fault::Magic`] and [`Fault::Short`]; read errors.
    pub fn read<B: Blob>(blob: &B, head: &Head) -> Result<Self>
    where
        Error: From<B::Error>,
    {
        let chunk = head.chunk_bytes();
        let mut found = Self {
            all: Vec::new(),
            chunk,
            has_room: true,
        };
        if !has_header(blob, head)? {
            return Ok(found);
        }
        let step = per_area(head.chunk) + 1;
        let (disk, store) = (head.disk_chunks(), head.store_chunks());
        let mut buffer = vec![0; to_usize(chunk)];
        // The first chunk of the store after those in use.
        let mut behind = 2;
        let mut area = 1;
        'areas: loop {
            if area >= store {
                let count = to_u64(found.all.len());
                return Err(Fault::NoEnd { count }.into());
            }
            // No overflow: the store ends below 2^60.
            let start = head::SIZE + area * chunk;
            blob.read_at(start, &mut buffer)?;
            for (nth, entry) in (0..).zip(buffer.chunks_exact(ENTRY)) {
                let (old, new) = (le64(entry, 0), le64(entry, 8));
                if new == 0 {
                    break 'areas;
                }
                let wrong = |at, chunk, expected| Fault::Chunk {
                    nth: to_u64(found.all.len()),
                    at: start + nth * to_u64(ENTRY) + at,
                    chunk,
                    expected,
                };
                if old >= disk {
                    return Err(wrong(0, old, "one of the disk").into());
                }
                if new >= store || new % step == 1 {
                    return Err(wrong(8, new, "one of data in the store").into());
                }
                if to_u64(found.all.len()) == disk {
                    let of = "disk";
                    return Err(Fault::Twice { of, chunk: old }.into());
                }
                behind = behind.max(new + 1);
                found.all.push(Exception { old, new });
            }
            area += step;
        }
        if behind % step == 1 {
            behind += 1;
        }
        found.has_room = behind < store;
        found.sort()?;
        Ok(found)
    }

    /// Sorts the exceptions by the chunk of the disk, and checks that there are no duplicates.
    fn sort(&mut self) -> Result<(), Fault> {
        for (of, key) in [
            ("store", (|e| e.new) as fn(&Exception) -> u64),
            ("disk", |e| e.old),
        ] {
            self.all.sort_unstable_by_key(key);
            let mut pairs = self.all.windows(2);
            let twice = pairs.find_map(|pair| match pair {
                [a, b] if key(a) == key(b) => Some(key(a)),
                _ => None,
            });
            if let Some(chunk) = twice {
                return Err(Fault::Twice { of, chunk });
            }
        }
        Ok(())
    }

    /// Returns the number of chunks that were written.
    pub fn len(&self) -> u64 {
        to_u64(self.all.len())
    }

    /// Returns whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Returns whether the store has room for one more chunk.
    pub fn has_room(&self) -> bool {
        self.has_room
    }

    /// Returns the first range of bytes of the disk at or after `offset` that was written. The bytes after the
    /// range may have been written, too.
    pub fn next(&self, offset: u64) -> Option<Range<u64>> {
        let wanted = offset / self.chunk;
        let first = self.all.partition_point(|e| e.old < wanted);
        let mut rest = self.all.get(first..)?.iter();
        let start = rest.next()?.old;
        let most = (AHEAD / self.chunk).max(1);
        let mut end = start + 1;
        while end - start < most && rest.next().is_some_and(|e| e.old == end) {
            end += 1;
        }
        Some(offset.max(start * self.chunk)..end * self.chunk)
    }

    /// Returns the byte offset in the file or device of byte `offset` of the disk, or `None` if this byte was not
    /// written. Also returns the number of bytes from `offset` that are stored consecutively, or that were not
    /// written.
    pub(super) fn lookup(&self, offset: u64) -> (Option<u64>, u64) {
        let (wanted, within) = (offset / self.chunk, offset % self.chunk);
        let first = self.all.partition_point(|e| e.old < wanted);
        let mut rest = self.all.get(first..).unwrap_or_default().iter();
        match rest.next() {
            Some(e) if e.old == wanted => {
                let most = (AHEAD / self.chunk).max(1);
                let follows = |(nth, next): (u64, &Exception)| {
                    nth < most && next.old == e.old + nth && next.new == e.new + nth
                };
                let more = to_u64((1..).zip(rest).take_while(|&pair| follows(pair)).count());
                let place = head::SIZE + e.new * self.chunk + within;
                (Some(place), (1 + more) * self.chunk - within)
            }
            Some(next) => (None, next.old * self.chunk - offset),
            None => (None, u64::MAX),
        }
    }
}

/// Checks dm-snapshot's header. Returns false if the store was never used.
fn has_header<B: Blob>(blob: &B, head: &Head) -> Result<bool>
where
    Error: From<B::Error>,
{
    let mut header = [0; HEADER];
    if head.store < u64::from(head.chunk) {
        let count = 0;
        return Err(Fault::NoEnd { count }.into());
    }
    blob.read_at(head::SIZE, &mut header)?;
    let check = |right, field, at: u64, found: u32, expected| match right {
        true => Ok(()),
        false => Err(Fault::Field {
            field,
            at: head::SIZE + at,
            found: found.into(),
            expected,
        }),
    };
    let (magic, valid) = (le32(&header, 0), le32(&header, 4));
    let (version, chunk) = (le32(&header, 8), le32(&header, 12));
    if magic == 0 {
        return Ok(false);
    }
    check(magic == MAGIC, "snapshot magic", 0, magic, "\"SnAp\"")?;
    if valid == 0 {
        return Err(Fault::Invalid.into());
    }
    check(version == VERSION, "snapshot version", 8, version, "1")?;
    let right = chunk == head.chunk;
    check(right, "snapshot chunk size", 12, chunk, "that of the head")?;
    Ok(true)
}
