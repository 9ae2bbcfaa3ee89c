// SPDX-License-Identifier: GPL-2.0

//! The `lsmt` target: shows a stack of layers as one disk. The `lsmt-dax` target: the same, with
//! DAX.
//!
//! ```text
//! <start> <len> lsmt[-dax] <#layers> {<dev> <blob bytes>}… [<#opt_params> <opt_params>…]
//! ```
//!
//! `<blob bytes>` is the length of the layer's file, or `-` for the length of the device.
//!
//! The indexes of the layers are merged when the table is loaded. The map function looks a read up
//! in the merged index and remaps it, without a lock, an allocation or a worker. With DAX, a page
//! that a file system maps into memory is looked up in the same way.

mod table;

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};

use crate::dm::{Bio, DeviceId, Mapped, Memory};
use crate::format::lsmt::Segment;
use crate::format::merge::{Extent, Index};

/// A second name of the target, for table lines that were written for "dm overlaybd", the targets
/// in C that were proposed for the kernel in May 2023 (an RFC): `lsmt_target {<dev> <bytes>}…`.
pub(crate) const LEGACY_NAME: &CStr = c"lsmt_target";

/// Largest number of sectors that one call of the map function fills with zeros. For the rest of
/// the bio, device-mapper calls the map function again.
const MAX_ZERO: u64 = 2048;

/// An `lsmt` target, or with `DAX` an `lsmt-dax` target.
pub(crate) struct Lsmt<const DAX: bool> {
    /// The merged index. The place of a segment's data, `moffset`, is in sectors from the start of
    /// the layer's lower device: the length of a tar header before the layer is added already.
    index: Index<KVVec<Segment>, KVVec<u32>>,
    /// Size of the virtual disk in bytes.
    size: u64,
    /// The content of the last sector, if `size` is not a multiple of the sector size.
    tail: Option<Tail>,
    /// The `<blob bytes>` of each layer in the table line, which `table` prints; `None` for `-`.
    blob_bytes: KVec<Option<u64>>,
    /// Whether the table line has the form of `lsmt_target`. `table` prints it in the same form.
    legacy: bool,
    /// Number of reads that have failed since the table was loaded.
    failed: Atomic<u64>,
}

/// The sector within which the disk ends: the last bytes of the disk, then zeros.
struct Tail {
    sector: u64,
    bytes: [u8; 512],
}

impl<const DAX: bool> Lsmt<DAX> {
    /// Counts a failed read.
    fn read_failed(&self) {
        self.failed.fetch_add(1, Relaxed);
    }

    /// Remaps a read to the device of the layer that has the data. Ends a read of a hole, or of the
    /// `tail`, immediately.
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

    /// Returns the place of sector `sector` on the device of its layer, and how many sectors are
    /// contiguous there. Adds segments as long as they are contiguous on that device and the result
    /// has fewer than `most` sectors. The last segment is added whole, so the result may have more
    /// than `most` sectors. Returns `None` in a hole.
    ///
    /// The result doesn't go beyond the end of the target, since no segment of the index does. The
    /// loop has at most one turn for each page of `most`: segments of `lsmt-dax` consist of whole
    /// pages, so each segment adds a page or more.
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
