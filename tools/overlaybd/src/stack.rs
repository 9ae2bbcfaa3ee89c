// SPDX-License-Identifier: GPL-2.0

//! A stack of layers, and the disk that they make.

use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use crate::format::blob::check_range;
use crate::format::lsmt::{Segment, MAX_END};
use crate::format::merge::{self, Event, Extent, Index};
use crate::format::num::{to_u64, to_usize};
use crate::format::{Blob, Error as FormatError, Fault, SECTOR_SIZE};
use crate::{Error, LayerReader, Result};

/// A stack of layers, merged.
pub struct Stack {
    layers: Vec<LayerReader>,
    merged: Index<Vec<Segment>, Vec<u32>>,
    virtual_size: u64,
}

impl Stack {
    /// Opens the layers at `paths`, lowest first, and merges them.
    ///
    /// # Errors
    ///
    /// As [`LayerReader::open`] and [`Stack::new`].
    pub fn open<P: AsRef<Path>>(paths: &[P]) -> Result<Self> {
        check_layers(paths.len())?;
        let layers = paths
            .iter()
            .map(|path| LayerReader::open(path.as_ref(), None))
            .collect::<Result<_>>()?;
        Self::new(layers)
    }

    /// Merges `layers`, lowest first.
    ///
    /// # Errors
    ///
    /// [`Fault::LsmtLayerCount`] if there are none or too many, [`Fault::LsmtVirtualSize`] if none
    /// has a virtual size, [`Fault::LsmtMergedCount`] if the merged index has too many segments.
    pub fn new(layers: Vec<LayerReader>) -> Result<Self> {
        check_layers(layers.len())?;
        let sizes = layers.iter().map(|layer| layer.lsmt().virtual_size());
        let virtual_size = merge::virtual_size(sizes)?;
        Self::with_size(layers, virtual_size)
    }

    /// Merges `layers`, lowest first, into a disk of `virtual_size` bytes, as if a layer of that
    /// size and without entries were on top. A writer uses this for the layers below a new one.
    ///
    /// # Errors
    ///
    /// [`Fault::LsmtLayerCount`] and [`Fault::LsmtMergedCount`], as [`Stack::new`].
    pub fn with_size(layers: Vec<LayerReader>, virtual_size: u64) -> Result<Self> {
        check_layers(layers.len())?;
        let indexes: Vec<Segments> = layers
            .iter()
            .map(|layer| Segments(layer.share_segments()))
            .collect();
        let mut heap = vec![Event::default(); indexes.len()];
        let mut cursors = vec![0; indexes.len()];
        let mut merged = Vec::new();
        let limit = merge::sectors(virtual_size);
        merge::merge(
            &indexes,
            limit,
            &mut heap,
            &mut cursors,
            |segment| {
                merged.push(segment);
                Ok::<_, Error>(())
            },
            || Ok(()),
        )?;
        Ok(Self {
            layers,
            merged: Index::new(merged, |count| Ok::<_, Error>(vec![0; count]), || Ok(()))?,
            virtual_size,
        })
    }

    /// Returns the layers, lowest first.
    pub fn layers(&self) -> &[LayerReader] {
        &self.layers
    }

    /// Returns the merged index, which has only segments with data.
    pub fn merged(&self) -> &[Segment] {
        self.merged.segments()
    }

    /// Returns the virtual size in bytes, which need not be a whole number of sectors.
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// Returns the number of sectors of the disk, rounded up: the virtual size can end within the
    /// last one.
    pub fn sectors(&self) -> u64 {
        merge::sectors(self.virtual_size)
    }

    /// Returns the offset of the first byte from `offset` up to, not including, `end` that is in a
    /// segment with data.
    pub fn next_data(&self, offset: u64, end: u64) -> Option<u64> {
        if offset >= end {
            return None;
        }
        let next = match self.merged.lookup(offset / SECTOR_SIZE) {
            Extent::Data { .. } => return Some(offset),
            Extent::Zeros { len } => offset / SECTOR_SIZE + len,
        };
        Some(next)
            .filter(|&next| next < MAX_END)
            // Doesn't overflow: a sector number is below `MAX_END`, 2^50.
            .map(|next| next * SECTOR_SIZE)
            .filter(|&next| next < end)
    }

    /// Returns whether byte `offset` is in a segment with data, and not in a hole or a zeroed segment.
    pub fn has_data(&self, offset: u64) -> bool {
        matches!(
            self.merged.lookup(offset / SECTOR_SIZE),
            Extent::Data { .. }
        )
    }

    /// Fills `buf` with zeros, or with data of the layer from byte `within` of the extent's first
    /// sector.
    fn read_extent(&self, extent: Extent, within: u64, buf: &mut [u8]) -> Result<()> {
        match extent {
            Extent::Zeros { .. } => {
                buf.fill(0);
                Ok(())
            }
            Extent::Data { layer, sector, .. } => {
                let layer = self.layers.get(usize::from(layer)).ok_or_else(|| {
                    FormatError::new(Fault::LsmtLayerCount, 0, to_u64(self.layers.len()))
                })?;
                layer
                    .payload()
                    .read_at(sector * SECTOR_SIZE + within, buf)
                    .map_err(|error| error.in_file(&layer.path()))
            }
        }
    }
}

impl Blob for Stack {
    type Error = Error;

    /// Returns the size of the disk in bytes, rounded up to a whole number of sectors.
    fn size(&self) -> u64 {
        self.sectors() * SECTOR_SIZE
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.size(), offset, to_u64(buf.len()))?;
        let inside = to_usize(self.virtual_size.saturating_sub(offset)).min(buf.len());
        let (mut rest, tail) = buf.split_at_mut(inside);
        // The part of the last sector beyond the virtual size reads as zeros.
        tail.fill(0);
        let mut at = offset;
        while !rest.is_empty() {
            let extent = self.merged.lookup(at / SECTOR_SIZE);
            let within = at % SECTOR_SIZE;
            let (Extent::Data { len, .. } | Extent::Zeros { len }) = extent;
            let take = to_usize(len * SECTOR_SIZE - within).min(rest.len());
            let (piece, next) = rest.split_at_mut(take);
            self.read_extent(extent, within, piece)?;
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
        crate::file::stream_pieces(self, offset, len, sink)
    }
}

/// Checks the number of layers.
fn check_layers(layers: usize) -> Result<()> {
    if layers == 0 || layers > merge::MAX_LAYERS {
        return Err(FormatError::new(Fault::LsmtLayerCount, 0, to_u64(layers)).into());
    }
    Ok(())
}

/// A layer's index, in the form that [`merge::merge`] takes.
struct Segments(Arc<Vec<Segment>>);

impl Deref for Segments {
    type Target = [Segment];

    fn deref(&self) -> &[Segment] {
        &self.0
    }
}
