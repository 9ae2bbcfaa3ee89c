// SPDX-License-Identifier: GPL-2.0

//! qcow2 images.

use std::collections::BTreeSet;
use std::io::Read;

use anyhow::Result;
use flate2::{Decompress, FlushDecompress};
use overlaybd::format::num::{bytes_at, to_u64, to_usize};

use super::{Image, SECTOR};

/// Bits of the header's incompatible features: another type of compression, and entries with parts of a cluster.
const TYPE: u64 = 1 << 3;
const EXTENDED: u64 = 1 << 4;
/// The number of the compression type zstd.
const ZSTD: u8 = 1;
/// Bit of an entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// Bit of an entry: the cluster reads as zeros, even if it has a place.
const ZEROS: u64 = 1;
/// Bits of an entry with the offset of a table or a cluster.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Number of parts of a cluster.
const PARTS: u64 = 32;

/// Finds the end of the image, whose disk has `size` bytes.
pub(super) fn find(image: &mut Image<'_>, size: u64) -> Result<()> {
    let head: [u8; 112] = image.head(0)?;
    let be32 = |at| u32::from_be_bytes(bytes_at(&head, at));
    let be64 = |at| u64::from_be_bytes(bytes_at(&head, at));
    let bits = be32(20);
    if !(9..=21).contains(&bits) {
        return Ok(());
    }
    let features = match be32(4) {
        3.. => be64(72),
        _ => 0,
    };
    let is_extended = features & EXTENDED != 0;
    let cluster = 1_u64 << bits;
    let width = if is_extended { 16 } else { 8 };
    let entries = cluster / to_u64(width);
    let clusters = size.div_ceil(cluster);
    let tables = clusters.div_ceil(entries).min(be32(36).into());
    let mut partial = Partial {
        cluster,
        is_zstd: features & TYPE != 0 && head.get(104) == Some(&ZSTD),
        seen: BTreeSet::new(),
    };
    image.table(be64(40), tables, 8, |image, nth, entry| {
        let at = u64::from_be_bytes(bytes_at(entry, 0)) & OFFSET;
        if at == 0 {
            return Ok(());
        }
        // No overflow: both are less than the number of clusters.
        let first = nth * entries;
        let count = entries.min(clusters - first);
        image.table(at, count, width, |image, nth, entry| {
            let start = (first + nth) * cluster;
            let (entry, parts) = (bytes_at(entry, 0), bytes_at(entry, 8));
            let (entry, parts) = (u64::from_be_bytes(entry), u64::from_be_bytes(parts));
            if entry & COMPRESSED != 0 {
                let shift = 70 - bits;
                let at = entry & ((1 << shift) - 1);
                let sectors = (entry & (COMPRESSED - 1)) >> shift;
                let end = ((at / SECTOR) + sectors + 1) * SECTOR;
                if !partial.is_complete(image, at, end)? {
                    image.has(0, end);
                }
                return Ok(());
            }
            let at = entry & OFFSET;
            let len = match is_extended {
                // The lower half has a bit for each part with data.
                true => cluster / PARTS * u64::from(32 - (parts as u32).leading_zeros()),
                false if entry & ZEROS != 0 => 0,
                false => cluster,
            };
            if at != 0 {
                image.has_data(at, len, start, size);
            }
            Ok(())
        })
    })
}

/// Checks compressed clusters whose last sector is cut off by the end of the file. Entries have the lengths of
/// clusters in sectors only, and the program that wrote the image need not have filled the last sector. So such a
/// cluster is complete if the bytes in the file can be decompressed to it.
struct Partial {
    /// Length of a decompressed cluster in bytes.
    cluster: u64,
    is_zstd: bool,
    /// Offsets of such clusters that were found to be complete.
    seen: BTreeSet<u64>,
}

impl Partial {
    /// Returns whether the file has all of the cluster that is compressed at `at`, in sectors that end at `end`.
    fn is_complete(&mut self, image: &Image<'_>, at: u64, end: u64) -> Result<bool> {
        let is_partial = end > image.size && end - image.size < SECTOR && at < image.size;
        // No cluster is decompressed any more after 512 complete ones, as each has at least one byte in the last
        // sector, or if other data of the image is known to be missing, as the image is refused then.
        let is_known = to_u64(self.seen.len()) == SECTOR || image.end > image.size;
        if !is_partial || is_known {
            return Ok(end <= image.size);
        }
        if !self.seen.contains(&at) {
            // Twice the length of a cluster, at most.
            let mut bytes = vec![0; to_usize(image.size - at)];
            image.read(&mut bytes, at)?;
            if !self.can_decompress(&bytes) {
                return Ok(false);
            }
            self.seen.insert(at);
        }
        Ok(true)
    }

    /// Returns whether `bytes` alone, without more bytes after them, can be decompressed to a whole cluster.
    fn can_decompress(&self, bytes: &[u8]) -> bool {
        let mut cluster = vec![0; to_usize(self.cluster)];
        match self.is_zstd {
            true => zstd::stream::read::Decoder::with_buffer(bytes)
                .and_then(|mut decoder| decoder.read_exact(&mut cluster))
                .is_ok(),
            false => {
                let mut decoder = Decompress::new(false);
                let done = decoder.decompress(bytes, &mut cluster, FlushDecompress::Finish);
                done.is_ok() && decoder.total_out() == self.cluster
            }
        }
    }
}
