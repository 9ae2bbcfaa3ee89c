// SPDX-License-Identifier: GPL-2.0

//! The `lsmt` target: shows a stack of layers as one disk. The `lsmt-dax` target: the same, with
//! DAX.
//!
//! ```text
//! <start> <len> lsmt[-dax] <#layers> {<dev> <blob bytes | ->}… [<#opt_params> <opt_params>…]
//! ```
//!
//! The indexes of the layers are merged when the table is loaded. A read is looked up in the merged
//! index and remapped. This needs no lock, no memory and no worker. With DAX, the same is true for
//! each page of a disk that a file system maps into memory.

mod table;

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};

use crate::dm::{Bio, DeviceId, Mapped, Memory};
use crate::format::lsmt::Segment;
use crate::format::merge::{Extent, Index};

/// The name of the target in table lines of "dm overlaybd", the targets in C that were proposed for
/// the kernel in May 2023 (an RFC): `lsmt_target {<dev> <bytes>}…`.
pub(crate) const LEGACY_NAME: &CStr = c"lsmt_target";

/// Largest number of sectors of one bio that are filled with zeros before the rest is mapped again.
const MAX_ZERO: u64 = 2048;

/// An `lsmt` target, or with `DAX` an `lsmt-dax` target.
pub(crate) struct Lsmt<const DAX: bool> {
    /// The merged index. The place of a segment's data, `moffset`, counts in sectors from the start
    /// of the layer's lower device, so it includes a tar header.
    index: Index<KVVec<Segment>, KVVec<u32>>,
    /// Size of the virtual disk in bytes.
    size: u64,
    /// The last sector, if the disk ends within it.
    tail: Option<Tail>,
    /// The `<blob bytes>` of each layer in the table line; `None` for `-`.
    blob_bytes: KVec<Option<u64>>,
    /// Whether the table line has the form of `lsmt_target`.
    legacy: bool,
    /// Number of failed reads.
    failed: Atomic<u64>,
}

/// A sector whose first bytes belong to the disk. The other bytes read as zeros.
struct Tail {
    sector: u64,
    bytes: [u8; 512],
}

impl<const DAX: bool> Lsmt<DAX> {
    /// Counts a failed read.
    fn read_failed(&self) {
        self.failed.fetch_add(1, Relaxed);
    }

    /// Remaps a read to the device of its layer, or ends it if its data is in memory or zeros.
    fn map_read<'a>(&self, mut bio: Bio<'a, Self>) -> Mapped<'a> {
        let sector = bio.sector();
        if let Some(tail) = &self.tail {
            if sector >= tail.sector {
                let mut pages = bio.pages();
                pages.copy_from(&tail.bytes);
                pages.zero(pages.left());
                return bio.end();
            }
            bio.accept_partial(tail.sector - sector);
        }
        match self.index.lookup(sector) {
            Extent::Data { layer, sector, len } => {
                bio.accept_partial(len);
                bio.remap(DeviceId::nth(layer), sector)
            }
            Extent::Zeros { len } => {
                bio.accept_partial(len.min(MAX_ZERO));
                bio.zero()
            }
        }
    }

    /// Returns the memory of sector `sector`, and of the sectors after it as far as it is
    /// contiguous. Adds one segment after the other until there are `most` sectors; the last
    /// segment may bring more. Returns `None` in a hole.
    ///
    /// The result ends before the end of the target, since the index has no segments after it. The
    /// loop ends soon: segments of `lsmt-dax` consist of whole pages, so each one adds a page or
    /// more.
    fn find_memory(&self, sector: u64, most: u64) -> Option<Memory> {
        let (layer, first, mut sectors) = match self.index.lookup(sector) {
            Extent::Data { layer, sector, len } => (layer, sector, len),
            Extent::Zeros { .. } => return None,
        };
        while sectors < most {
            match self.index.lookup(sector + sectors) {
                Extent::Data {
                    layer: next,
                    sector,
                    len,
                } if next == layer && sector == first + sectors => sectors += len,
                _ => break,
            }
        }
        Some(Memory {
            device: DeviceId::nth(layer),
            sector: first,
            sectors,
        })
    }
}
