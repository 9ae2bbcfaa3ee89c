// SPDX-License-Identifier: GPL-2.0

//! Whether file systems can map the pages of a layer: `Documentation/dax.rst`.

use std::convert::Infallible;
use std::fmt;

use crate::format::dax::{alignment, overlap, Place};
use crate::format::lsmt::Segment;
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
    /// A segment begins or ends within a page, on the disk or in the layer.
    Alignment(Segment),
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
                "is for a disk of {size} bytes, which ends within a page: make a larger one"
            ),
            Self::Alignment(segment) => write!(
                f,
                "{} sectors at sector {} of the disk, stored at sector {} of the layer, are not whole \
                 pages: `create --dax' or `convert --dax' makes a layer of the disk that fits",
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

/// Returns why pages of `page` bytes (a power of two, at least 512) cannot be mapped if an LSMT file has these
/// segments and a disk of `virtual_size` bytes; `None` if they can.
pub fn misfit(segments: &[Segment], virtual_size: u64, page: u64) -> Option<Misfit> {
    if virtual_size % page != 0 {
        return Some(Misfit::Size(virtual_size));
    }
    let mask = page / SECTOR_SIZE - 1;
    let odd = segments.iter().find(|&one| alignment([one]) & mask != 0);
    if let Some(&segment) = odd {
        return Some(Misfit::Alignment(segment));
    }
    let mut places: Vec<Place> = segments.iter().filter_map(Place::of).collect();
    let Ok(found) = overlap(&mut places, || Ok::<_, Infallible>(()));
    found.map(Misfit::Overlap)
}

/// Returns the byte offset of an info block that the kernel finds if `layer` is a pmem device; `None` if it finds
/// none.
fn info_block<B: Blob>(layer: &B) -> Result<Option<u64>, B::Error> {
    for at in INFO_BLOCKS {
        let mut start = [0; 16];
        // A file that is so short is no LSMT file.
        if at + 16 > layer.size() {
            break;
        }
        layer.read_at(at, &mut start)?;
        if SIGNATURES.contains(&start) {
            return Ok(Some(at));
        }
    }
    Ok(None)
}

/// Returns why pages of `page` bytes of a layer cannot be mapped: because of its wrapping, an info block, or
/// [`misfit`]. `None` if they can.
///
/// # Errors
///
/// Read errors.
pub fn layer_misfit(layer: &LayerReader, page: u64) -> Result<Option<Misfit>> {
    let payload = layer.payload();
    Ok(if payload.zfile().is_some() {
        Some(Misfit::Zfile)
    } else if payload.in_tar() {
        Some(Misfit::Tar)
    } else if let Some(at) = info_block(payload)? {
        Some(Misfit::InfoBlock(at))
    } else {
        misfit(layer.segments(), layer.lsmt().virtual_size(), page)
    })
}

/// Returns the largest of [`PAGE_SIZES`] with which the pages of a layer can be mapped, or why they cannot be mapped
/// even with the smallest.
///
/// # Errors
///
/// Read errors.
pub fn page_size(layer: &LayerReader) -> Result<Result<u64, Misfit>> {
    let [mut fits, larger @ ..] = PAGE_SIZES;
    if let Some(misfit) = layer_misfit(layer, fits)? {
        return Ok(Err(misfit));
    }
    for page in larger {
        if layer_misfit(layer, page)?.is_some() {
            break;
        }
        fits = page;
    }
    Ok(Ok(fits))
}
