// SPDX-License-Identifier: GPL-2.0

//! The `lsmt` target: shows a stack of layers as one disk. The `lsmt-dax` target: the same, with
//! DAX.
//!
//! ```text
//! <start> <len> lsmt[-dax] <#layers> {<dev> <blob bytes | ->}… [<#opt_params> <opt_params>…]
//! ```
//!
//! The indexes of the layers are merged when the table is loaded. A read is looked up in the merged
//! index and remapped. This needs no lock, no memory and no worker. The same is true for a page
//! that a file system maps.

mod table;

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};

use crate::dm::{Bio, DeviceId, Mapped, Memory};
use crate::format::lsmt::Segment;
use crate::format::merge::{Extent, Index};

/// The name of the target in table lines of the 2023 prototype: `lsmt_target {<dev> <bytes>}…`.
pub(crate) const LEGACY_NAME: &CStr = c"lsmt_target";

/// Largest number of sectors of one bio that are filled with zeros at once.
const MAX_ZERO: u64 = 2048;

/// An `lsmt` target, or with `DAX` an `lsmt-dax` target.
pub(crate) struct Lsmt<const DAX: bool> {
    /// The merged index; `moffset` counts from the start of the device.
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
    /// contiguous. Looks no further than the end of the segment in which the last of `most` sectors
    /// is. Returns `None` in a hole.
    ///
    /// The index has no segments after the end of the target, so the result doesn't reach further.
    /// Each round except the last adds at least one page.
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
