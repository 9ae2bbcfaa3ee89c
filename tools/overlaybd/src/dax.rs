// SPDX-License-Identifier: GPL-2.0

//! Whether file systems can map the pages of a layer: `Documentation/dax.rst`.

use std::convert::Infallible;
use std::fmt;

use crate::format::dax::{alignment, overlap, Place};
use crate::format::lsmt::Segment;
use crate::format::SECTOR_SIZE;
use crate::LayerReader;

/// The page sizes that kernels have, in bytes, ascending.
pub const PAGE_SIZES: [u64; 3] = [4 << 10, 16 << 10, 64 << 10];

/// Why the pages of a layer cannot be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misfit {
    /// It is compressed.
    Zfile,
    /// It is in a tar, where data begins within a page.
    Tar,
    /// The disk, of so many bytes, ends within a page.
    Size(u64),
    /// A segment begins or ends within a page, on the disk or in the layer.
    Alignment(Segment),
    /// Two segments have data in common.
    Overlap([Place; 2]),
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
                "two extents have data in common, sectors {} to {} and {} to {} of the layer: `commit \
                 --dax --compact' writes a layer that has it twice",
                first.start,
                first.end - 1,
                second.start,
                second.end - 1
            ),
        }
    }
}

/// Why pages of `page` bytes, a power of two, cannot be mapped of an LSMT file with these segments;
/// `None` where they can.
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

/// [`misfit`] of a layer, with what it is wrapped in.
pub fn layer_misfit(layer: &LayerReader, page: u64) -> Option<Misfit> {
    if layer.payload().zfile().is_some() {
        return Some(Misfit::Zfile);
    }
    if layer.payload().in_tar() {
        return Some(Misfit::Tar);
    }
    misfit(layer.segments(), layer.lsmt().virtual_size(), page)
}

/// The largest page size of kernels that a layer fits, in bytes.
///
/// # Errors
///
/// Why it fits none.
pub fn page_size(layer: &LayerReader) -> Result<u64, Misfit> {
    let [least, ..] = PAGE_SIZES;
    match layer_misfit(layer, least) {
        Some(misfit) => Err(misfit),
        None => Ok(PAGE_SIZES
            .into_iter()
            .rfind(|&page| layer_misfit(layer, page).is_none())
            .unwrap_or(least)),
    }
}
