// SPDX-License-Identifier: GPL-2.0

//! Whether file systems can map the pages of a layer: `Documentation/dax.rst`.

use std::fmt;

use crate::format::dax::Place;
use crate::format::lsmt::Segment;
use crate::format::num::to_u64;
use crate::format::{Blob, SECTOR_SIZE};
use crate::{LayerReader, Result};

/// The page sizes that kernels have, in bytes, ascending.
pub const PAGE_SIZES: [u64; 3] = [4 << 10, 16 << 10, 64 << 10];

/// Byte of a new layer at which its data begins: 2 MiB, so that large mappings are aligned. It is after all
/// bytes in which the kernel looks for an info block.
pub const DATA_START: u64 = 2 << 20;

/// Byte offsets at which the kernel's pmem driver looks for an info block (`nd_btt_version`,
/// `nd_pfn_validate`).
const INFO_BLOCKS: [u64; 2] = [0, 4096];

/// How info blocks begin (`drivers/nvdimm/btt.h`, `drivers/nvdimm/pfn.h`).
const SIGNATURES: [[u8; 16]; 3] = [
    *b"BTT_ARENA_INFO\0\0",
    *b"NVDIMM_PFN_INFO\0",
    *b"NVDIMM_DAX_INFO\0",
];

/// Why the pages of a layer cannot be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misfit {
    /// The layer is compressed.
    Zfile,
    /// The layer is in a tar, where data begins within a page.
    Tar,
    /// The disk, of so many bytes, ends within a page.
    Size(u64),
    /// A segment begins or ends within a page of the disk.
    Alignment(Segment),
    /// The data of a segment, which is whole pages of the disk, begins within a page of the layer.
    Stored(Segment),
    /// Two segments with these places in the layer have data in common.
    Overlap([Place; 2]),
    /// At this byte of the layer is what the kernel takes for an info block of the pmem device.
    InfoBlock(u64),
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zfile => write!(f, "is compressed: `commit --dax' unwraps it"),
            Self::Tar => write!(f, "is in a tar: `commit --dax' unwraps it"),
            Self::Size(size) => write!(
                f,
                "has a disk of {size} bytes, which ends within a page: make the disk larger, to a multiple \
                 of 4096 bytes"
            ),
            Self::Alignment(segment) => write!(
                f,
                "{} sectors at sector {} of the disk are not whole pages: write the disk to a file with \
                 `export --no-sparse', of which `create --dax' makes a layer that fits",
                segment.length(),
                segment.offset()
            ),
            Self::Stored(segment) => write!(
                f,
                "{} sectors at sector {} of the disk are stored from sector {} of the layer on, which is \
                 within a page: `commit --dax' writes a layer with them in whole pages",
                segment.length(),
                segment.offset(),
                segment.moffset()
            ),
            Self::Overlap([first, second]) => write!(
                f,
                "two segments have data in common, sectors {} to {} and {} to {} of the layer: `commit \
                 --dax' writes a layer with a copy for each",
                first.start,
                first.end - 1,
                second.start,
                second.end - 1
            ),
            Self::InfoBlock(at) => write!(
                f,
                "byte {at} begins an info block of an NVDIMM, which decides how the kernel uses the whole \
                 device: don't give it to a guest; `commit --dax' writes a layer without it"
            ),
        }
    }
}

/// The misfits of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Misfits {
    /// The first one.
    pub first: Misfit,
    /// How many there are, at least 1.
    pub count: u64,
}

impl fmt::Display for Misfits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        match self.count {
            0 | 1 => Ok(()),
            count => write!(f, " (and {} more of this kind)", count - 1),
        }
    }
}

/// Adds the misfits `all`, which are of one kind, to `found`.
fn add(found: &mut Vec<Misfits>, all: impl IntoIterator<Item = Misfit>) {
    let mut all = all.into_iter();
    if let Some(first) = all.next() {
        let count = 1 + to_u64(all.count());
        found.push(Misfits { first, count });
    }
}

/// Returns whether `segment` is not whole pages of the disk. `mask` is the number of sectors of a page, minus 1.
fn is_odd(segment: &Segment, mask: u64) -> bool {
    (segment.offset() | segment.length()) & mask != 0
}

/// Returns the misfits of a disk of `virtual_size` bytes and of the places of `segments` on it, for pages of `page`
/// bytes (a power of two, at least 512). [`LayerWriter`](crate::lsmt_writer::LayerWriter) cannot change them: a new
/// layer with the same segments has them, too.
pub fn disk_misfits(segments: &[Segment], virtual_size: u64, page: u64) -> Vec<Misfits> {
    let mut found = Vec::new();
    let odd_size = virtual_size % page != 0;
    add(&mut found, odd_size.then_some(Misfit::Size(virtual_size)));
    let mask = page / SECTOR_SIZE - 1;
    let odd = segments.iter().filter(|one| is_odd(one, mask));
    add(&mut found, odd.copied().map(Misfit::Alignment));
    found
}

/// Returns the misfits of the places of the data of `segments` in an LSMT file, for pages of `page` bytes.
fn file_misfits(segments: &[Segment], page: u64) -> Vec<Misfits> {
    let mut found = Vec::new();
    let mask = page / SECTOR_SIZE - 1;
    let is_within = |one: &&Segment| Place::of(one).is_some_and(|place| place.start & mask != 0);
    // Those that are odd on the disk are counted there.
    let stored = segments.iter().filter(|one| !is_odd(one, mask));
    add(
        &mut found,
        stored.filter(is_within).copied().map(Misfit::Stored),
    );
    let mut places: Vec<Place> = segments.iter().filter_map(Place::of).collect();
    places.sort_unstable();
    // The place that ends last, of those before.
    let mut last: Option<Place> = None;
    let overlaps = places.into_iter().filter_map(|place| {
        let before = last.filter(|last| place.start < last.end);
        if last.is_none_or(|last| last.end < place.end) {
            last = Some(place);
        }
        before.map(|before| Misfit::Overlap([before, place]))
    });
    add(&mut found, overlaps);
    found
}

/// Returns the byte offsets of the info blocks that the kernel finds if `layer` is a pmem device.
fn info_blocks<B: Blob>(layer: &B) -> Result<Vec<u64>, B::Error> {
    let mut found = Vec::new();
    for at in INFO_BLOCKS {
        let mut start = [0; 16];
        // A file that is so short is no LSMT file.
        if at + 16 > layer.size() {
            break;
        }
        layer.read_at(at, &mut start)?;
        if SIGNATURES.contains(&start) {
            found.push(at);
        }
    }
    Ok(found)
}

/// Returns why pages of `page` bytes (a power of two, at least 512) of a layer cannot be mapped, by kind: its wrapping,
/// info blocks, the disk, and the places of the data. If the layer is wrapped, the other kinds are only those that it
/// has when it is unwrapped, too.
///
/// # Errors
///
/// Read errors.
pub fn layer_misfits(layer: &LayerReader, page: u64) -> Result<Vec<Misfits>> {
    let payload = layer.payload();
    let wrapping = match payload.zfile() {
        Some(_) => Some(Misfit::Zfile),
        None => payload.in_tar().then_some(Misfit::Tar),
    };
    let mut found = Vec::new();
    add(&mut found, wrapping);
    if wrapping.is_none() {
        let blocks = info_blocks(payload)?;
        add(&mut found, blocks.into_iter().map(Misfit::InfoBlock));
    }
    let size = layer.lsmt().virtual_size();
    found.extend(disk_misfits(layer.segments(), size, page));
    if wrapping.is_none() {
        found.extend(file_misfits(layer.segments(), page));
    }
    Ok(found)
}

/// Returns the largest of [`PAGE_SIZES`] with which the pages of a layer can be mapped, or the first reason why they
/// cannot be mapped even with the smallest.
///
/// # Errors
///
/// Read errors.
pub fn page_size(layer: &LayerReader) -> Result<Result<u64, Misfit>> {
    let [mut fits, larger @ ..] = PAGE_SIZES;
    if let Some(misfits) = layer_misfits(layer, fits)?.first() {
        return Ok(Err(misfits.first));
    }
    for page in larger {
        if !layer_misfits(layer, page)?.is_empty() {
            break;
        }
        fits = page;
    }
    Ok(Ok(fits))
}
