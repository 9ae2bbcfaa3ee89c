// SPDX-License-Identifier: GPL-2.0

//! The disk of a stack with the changes of a store.

use std::ops::Range;
use std::path::Path;

use crate::diff::Image;
use crate::format::blob::check_range;
use crate::format::num::{to_u64, to_usize};
use crate::format::Blob;
use crate::{Error, FileBlob, Result, Stack};

use super::exceptions::Exceptions;

/// The disk of a stack with the changes of a store.
pub struct Changed<'a> {
    store: &'a FileBlob,
    exceptions: Exceptions,
    below: &'a Stack,
}

impl<'a> Changed<'a> {
    /// Returns the disk `below` with the `exceptions` of `store`. The caller has checked that the store
    /// belongs to this disk.
    pub fn new(store: &'a FileBlob, exceptions: Exceptions, below: &'a Stack) -> Self {
        Self {
            store,
            exceptions,
            below,
        }
    }
}

impl Blob for Changed<'_> {
    type Error = Error;

    fn size(&self) -> u64 {
        self.below.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.size(), offset, to_u64(buf.len()))?;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let (place, len) = self.exceptions.lookup(at);
            let take = len.min(to_u64(rest.len()));
            let (piece, next) = rest.split_at_mut(to_usize(take));
            match place {
                Some(place) => self
                    .store
                    .read_at(place, piece)
                    .map_err(|error| error.in_file(self.store.path()))?,
                None => self.below.read_at(at, piece)?,
            }
            rest = next;
            at += take;
        }
        Ok(())
    }

    fn stream(
        &self,
        offset: u64,
        len: u64,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        crate::file::stream_pieces(self, offset, len, sink)
    }
}

impl Image for Changed<'_> {
    fn next_data(&self, offset: u64) -> Option<Range<u64>> {
        let next = self.exceptions.next(offset)?;
        // The last chunk may reach beyond the end of the disk.
        Some(next.start..next.end.min(self.size()))
    }

    fn shows_below(&self) -> bool {
        true
    }

    fn path(&self) -> &Path {
        self.store.path()
    }
}
