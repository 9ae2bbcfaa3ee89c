// SPDX-License-Identifier: GPL-2.0

//! Images with one table, or two: qed, vdi, vpc, vhdx, parallels.

use std::ops::RangeInclusive;

use anyhow::Result;
use overlaybd::format::num::{bytes_at, le32, le64};

use super::{Image, SECTOR};

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes_at(bytes, at))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes_at(bytes, at))
}

/// Finds the end of the image, whose disk has `size` bytes, as all of these functions do.
pub(super) fn qed(image: &mut Image<'_>, size: u64) -> Result<()> {
    /// Lengths of a cluster, and numbers of clusters in a table.
    const CLUSTER: RangeInclusive<u64> = 4096..=64 << 20;
    const TABLE: RangeInclusive<u64> = 1..=16;
    let head: [u8; 64] = image.head(0)?;
    let (cluster, table) = (u64::from(le32(&head, 4)), u64::from(le32(&head, 8)));
    if !cluster.is_power_of_two() || !CLUSTER.contains(&cluster) || !TABLE.contains(&table) {
        return Ok(());
    }
    let entries = cluster * table / 8;
    let clusters = size.div_ceil(cluster);
    let tables = clusters.div_ceil(entries).min(entries);
    image.table(le64(&head, 40), tables, 8, |image, nth, entry| {
        let at = le64(entry, 0);
        if at == 0 {
            return Ok(());
        }
        // No overflow: this is less than the number of clusters.
        let count = entries.min(clusters - nth * entries);
        image.table(at, count, 8, |image, _, entry| {
            let at = le64(entry, 0);
            // 1 stands for zeros. qemu-img needs the last cluster as a whole.
            if at > 1 {
                image.has(at, cluster);
            }
            Ok(())
        })
    })
}

pub(super) fn vdi(image: &mut Image<'_>, size: u64) -> Result<()> {
    /// The first of the numbers that stand for blocks without a place.
    const NONE: u32 = 0xffff_fffe;
    let head: [u8; 512] = image.head(0)?;
    let data = u64::from(le32(&head, 344));
    let block = u64::from(le32(&head, 376));
    if block == 0 {
        return Ok(());
    }
    let blocks = size.div_ceil(block).min(le32(&head, 384).into());
    image.table(le32(&head, 340).into(), blocks, 4, |image, nth, entry| {
        let place = le32(entry, 0);
        if place < NONE {
            let at = u64::from(place) * block + data;
            image.has_data(at, block, nth * block, size);
        }
        Ok(())
    })
}

pub(super) fn vpc(image: &mut Image<'_>, size: u64) -> Result<()> {
    /// The number that stands for a block without a place.
    const NONE: u32 = u32::MAX;
    // An image of fixed size has no header. It has all of its data in front of the footer, without which it is
    // none.
    let head: [u8; 512] = image.head(0)?;
    if !head.starts_with(b"conectix") {
        return Ok(());
    }
    let head: [u8; 64] = image.head(be64(&head, 16))?;
    let block = u64::from(be32(&head, 32));
    if !head.starts_with(b"cxsparse") || !block.is_power_of_two() || block < SECTOR {
        return Ok(());
    }
    // A bit for each sector is in front of a block's data.
    let bits = (block / SECTOR).div_ceil(8).next_multiple_of(SECTOR);
    let blocks = size.div_ceil(block).min(be32(&head, 28).into());
    image.table(be64(&head, 16), blocks, 4, |image, nth, entry| {
        let sector = be32(entry, 0);
        if sector != NONE {
            let at = u64::from(sector) * SECTOR + bits;
            image.has_data(at, block, nth * block, size);
        }
        Ok(())
    })
}

pub(super) fn vhdx(image: &mut Image<'_>, size: u64) -> Result<()> {
    /// Places of the two tables of regions.
    const REGIONS: [u64; 2] = [192 << 10, 256 << 10];
    /// Names of the regions with the table of blocks and with the metadata, and of two values there: the length of
    /// blocks and that of the disk's sectors.
    const BLOCKS: u128 = 0x2dc27766_f623_4200_9d64_115e9bfd4a08;
    const METADATA: u128 = 0x8b7ca206_4790_4b9a_b8fe_575f050f886e;
    const BLOCK: u128 = 0xcaa16737_fa36_4d43_b3b6_33f0aa44e76b;
    const SECTOR_SIZE: u128 = 0x8141bf1d_a96f_4709_ba47_f233a8faab5f;
    /// Number of sectors with bits in a block of bits.
    const BITS: u64 = 1 << 23;
    /// States of a block that is in the file, as a whole or in part.
    const PRESENT: [u64; 2] = [6, 7];
    let name = |entry: &[u8]| uuid::Uuid::from_bytes_le(bytes_at(entry, 0)).as_u128();
    let (mut blocks, mut metadata) = (None, None);
    for at in REGIONS {
        let head: [u8; 16] = image.head(at)?;
        if !head.starts_with(b"regi") || blocks.is_some() {
            continue;
        }
        image.table(
            at + 16,
            le32(&head, 8).min(2047).into(),
            32,
            |_, _, entry| {
                match name(entry) {
                    BLOCKS => blocks = Some(le64(entry, 16)),
                    METADATA => metadata = Some(le64(entry, 16)),
                    _ => (),
                }
                Ok(())
            },
        )?;
    }
    let (Some(blocks), Some(metadata)) = (blocks, metadata) else {
        return Ok(());
    };
    let head: [u8; 32] = image.head(metadata)?;
    let count = u16::from_le_bytes(bytes_at(&head, 10)).min(2047);
    let (mut block, mut sector) = (0, 0);
    image.table(
        metadata.saturating_add(32),
        count.into(),
        32,
        |image, _, entry| {
            let value: [u8; 4] = image.head(metadata.saturating_add(le32(entry, 16).into()))?;
            match name(entry) {
                BLOCK => block = u64::from(le32(&value, 0)),
                SECTOR_SIZE => sector = u64::from(le32(&value, 0)),
                _ => (),
            }
            Ok(())
        },
    )?;
    // After so many blocks, the table has a block of bits.
    let Some(group @ 1..) = (BITS * sector).checked_div(block) else {
        return Ok(());
    };
    let count = size.div_ceil(block);
    let entries = count.saturating_add(count.saturating_sub(1) / group);
    image.table(blocks, entries, 8, |image, nth, entry| {
        let (entry, before) = (le64(entry, 0), nth / (group + 1));
        let is_bits = nth % (group + 1) == group;
        if PRESENT.contains(&(entry & 7)) && !is_bits {
            let at = entry & !0xf_ffff;
            image.has_data(at, block, (nth - before) * block, size);
        }
        Ok(())
    })
}

pub(super) fn parallels(image: &mut Image<'_>, size: u64) -> Result<()> {
    let head: [u8; 64] = image.head(0)?;
    let sectors = u64::from(le32(&head, 28));
    let cluster = sectors * SECTOR;
    if cluster == 0 {
        return Ok(());
    }
    // The number of bytes that the table counts in.
    let unit = match head.starts_with(b"WithoutFreeSpace") {
        true => SECTOR,
        false => cluster,
    };
    let clusters = size.div_ceil(cluster).min(le32(&head, 32).into());
    image.table(64, clusters, 4, |image, nth, entry| {
        let place = u64::from(le32(entry, 0));
        if place != 0 {
            image.has_data(place.saturating_mul(unit), cluster, nth * cluster, size);
        }
        Ok(())
    })
}
