// SPDX-License-Identifier: GPL-2.0

//! A disk, and a list of the ranges that were written.

use std::ops::Range;
use std::path::Path;

use crate::diff::Image;
use crate::format::Blob;
use crate::{Error, FileBlob, Result};

/// A disk that differs from the disk below only in some ranges.
pub struct Mapped<'a> {
    disk: &'a FileBlob,
    /// Ascending; none is empty, none are adjacent.
    ranges: Vec<Range<u64>>,
}

impl<'a> Mapped<'a> {
    /// Returns `disk`, of which `ranges`, in bytes, were written. They may be in any order and overlap. Parts
    /// after the end of the disk are ignored.
    pub fn new(disk: &'a FileBlob, mut ranges: Vec<Range<u64>>) -> Self {
        ranges.sort_unstable_by_key(|range| range.start);
        let mut joined: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            let range = range.start..range.end.min(disk.size());
            match joined.last_mut() {
                _ if range.is_empty() => {}
                Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
                _ => joined.push(range),
            }
        }
        Self {
            disk,
            ranges: joined,
        }
    }
}

impl Blob for Mapped<'_> {
    type Error = Error;

    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.disk.read_at(offset, buf)
    }

    fn stream(
        &self,
        offset: u64,
        len: u64,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        self.disk.stream(offset, len, sink)
    }
}

impl Image for Mapped<'_> {
    fn next_data(&self, offset: u64) -> Option<Range<u64>> {
        let nth = self.ranges.partition_point(|range| range.end <= offset);
        let range = self.ranges.get(nth)?;
        Some(range.start.max(offset)..range.end)
    }

    fn shows_below(&self) -> bool {
        true
    }

    fn path(&self) -> &Path {
        self.disk.path()
    }
}
