// SPDX-License-Identifier: GPL-2.0

//! ZFile header, trailer and index. Which files are accepted, and the jump table, are compared with
//! a model that uses `u128`.

#![no_main]
#![allow(missing_docs, clippy::expect_used, clippy::panic)]

use libfuzzer_sys::arbitrary::Result;
use libfuzzer_sys::fuzz_target;
use overlaybd::codec::Method;
use overlaybd::crc32c;
use overlaybd::format::zfile::{
    field, flag, Algorithm, Geometry, JumpTable, RawHeader, TableShape, HEADER_SIZE, MAGIC,
    MAX_BLOCKS,
};
use overlaybd::format::{Blob, Error, Fault};
use overlaybd::zfile_writer::Options;
use overlaybd_fuzz::common::{self, put};
use overlaybd_fuzz::{init, memory, Parts, Sparse};

/// Bits of [`Parts::fixes`].
mod fix {
    pub(super) const MAGIC: u16 = 1 << 0;
    pub(super) const DIGEST: u16 = 1 << 1;
    pub(super) const INDEX_OFFSET: u16 = 1 << 2;
    pub(super) const BLOCK_COUNT: u16 = 1 << 3;
    pub(super) const ORIGINAL_SIZE: u16 = 1 << 4;
    pub(super) const ENTRIES: u16 = 1 << 5;
    pub(super) const INDEX_CRC: u16 = 1 << 6;
    pub(super) const SPARE_DIGEST: u16 = 1 << 7;
}

/// Longest index that is read, in bytes.
const MAX_INDEX: u64 = 1 << 20;

fn header(blob: &Sparse, at: u64) -> Option<(RawHeader, [u8; 512])> {
    let mut bytes = [0; 512];
    blob.read_at(at, &mut bytes).ok()?;
    Some((RawHeader::parse(&bytes)?, bytes))
}

/// Returns the offset of a possible trailer.
fn trailer_at(blob: &Sparse) -> Option<u64> {
    blob.size()
        .checked_sub(HEADER_SIZE)
        .filter(|&at| at >= HEADER_SIZE)
}

/// Returns the header or trailer with the valid values, its offset, and the offset that the index
/// must not exceed.
fn authority(blob: &Sparse) -> Option<(RawHeader, u64, u64)> {
    let (raw, _) = header(blob, 0)?;
    if raw.has(flag::OVERWRITTEN) {
        return Some((raw, 0, blob.size()));
    }
    let at = trailer_at(blob)?;
    Some((header(blob, at)?.0, at, at))
}

fn set(blob: &mut Sparse, at: u64, field: usize, value: &[u8]) {
    if let Some(bytes) = blob.get_mut(at, 512) {
        put(bytes, field, value);
    }
}

fn sign(blob: &mut Sparse, at: u64) {
    if let Some(bytes) = blob.get_mut(at, 512) {
        common::sign(bytes, 0);
    }
}

/// Corrects the fields that `fixes` selects.
fn repair(blob: &mut Sparse, fixes: u16, middle: u64) {
    let wants = |bit| fixes & bit != 0;
    let places = [Some(0), trailer_at(blob)];
    if wants(fix::MAGIC) {
        for at in places.into_iter().flatten() {
            set(blob, at, 0, &MAGIC);
        }
    }
    if let Some((mut raw, at, _)) = authority(blob) {
        if wants(fix::INDEX_OFFSET) {
            raw.index_offset = middle;
        }
        let block_size = u64::from(raw.block_size).max(1);
        if wants(fix::ORIGINAL_SIZE) {
            let whole = raw.index_count.saturating_mul(block_size);
            raw.original_size = whole.saturating_sub(raw.original_size % block_size);
        }
        if wants(fix::BLOCK_COUNT) {
            raw.index_count = raw.original_size.div_ceil(block_size);
        }
        let len = raw.index_count.saturating_mul(4).min(MAX_INDEX) as usize;
        if let Some(index) = blob.get_mut(raw.index_offset, len) {
            if wants(fix::ENTRIES) {
                for entry in index.chunks_exact_mut(4) {
                    let stored = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
                    let stored = stored % (raw.block_size.saturating_add(80)).max(1);
                    entry.copy_from_slice(&stored.to_le_bytes());
                }
            }
            raw.index_crc = crc32c(0, index);
            if wants(fix::INDEX_CRC) {
                set(blob, at, field::INDEX_CRC, &raw.index_crc.to_le_bytes());
            }
        }
        set(
            blob,
            at,
            field::INDEX_OFFSET,
            &raw.index_offset.to_le_bytes(),
        );
        set(blob, at, field::INDEX_COUNT, &raw.index_count.to_le_bytes());
        set(
            blob,
            at,
            field::ORIGINAL_SIZE,
            &raw.original_size.to_le_bytes(),
        );
        if wants(fix::SPARE_DIGEST) {
            let spare = raw.index_offset.saturating_add(len as u64);
            sign(blob, spare);
        }
    }
    if wants(fix::DIGEST) {
        for at in places.into_iter().flatten() {
            sign(blob, at);
        }
    }
}

/// Returns whether the digest is correct. Computes it in another way than the reader.
fn digest_holds(raw: &RawHeader, bytes: &[u8; 512]) -> bool {
    let mut bytes = *bytes;
    bytes[field::DIGEST..field::DIGEST + 4].fill(0);
    !raw.has(flag::DIGEST) || crc32c(0, &bytes) == raw.digest
}

/// Returns whether the format allows this file, apart from the index; `None` if it is no ZFile.
fn allowed(blob: &Sparse) -> Option<bool> {
    let (first, bytes) = header(blob, 0)?;
    if !first.has(flag::HEADER) || !digest_holds(&first, &bytes) {
        return Some(false);
    }
    let overwritten = first.has(flag::OVERWRITTEN);
    let Some((raw, at, limit)) = authority(blob) else {
        return Some(false);
    };
    if !overwritten {
        let Some((_, bytes)) = header(blob, at) else {
            return Some(false);
        };
        let sealed = raw.has(flag::DATA_FILE | flag::SEALED) && !raw.has(flag::HEADER);
        if !first.has(flag::DATA_FILE) || !sealed || !digest_holds(&raw, &bytes) {
            return Some(false);
        }
    }
    let compressed = raw.has(flag::DIGEST | flag::COMPRESSED_INDEX);
    let block_size = u128::from(raw.block_size);
    let sizes: Vec<u128> = (9..=16).map(|shift| 1 << shift).collect();
    let count = u128::from(raw.index_count);
    let end = u128::from(raw.index_offset) + 4 * count;
    let fields = !compressed
        && matches!(raw.algorithm, 1 | 2)
        && sizes.contains(&block_size)
        && raw.dict_size == 0
        && count <= u128::from(MAX_BLOCKS)
        && (count * block_size).checked_sub(raw.original_size.into()) < Some(block_size)
        && count * block_size >= raw.original_size.into()
        && raw.index_offset >= HEADER_SIZE
        && end <= limit.into();
    let spare = match header(blob, end.try_into().unwrap_or(u64::MAX)) {
        Some((raw, bytes)) if overwritten => digest_holds(&raw, &bytes),
        _ => true,
    };
    Some(fields && spare)
}

/// Returns the length of block `block` in the original file, in bytes.
fn block_len(raw: &RawHeader, block: u64) -> u128 {
    let start = u128::from(block) * u128::from(raw.block_size);
    u128::from(raw.original_size)
        .saturating_sub(start)
        .min(raw.block_size.into())
}

/// Returns the offset of each block and the end of the last one, or the fault of the index.
fn offsets(raw: &RawHeader, blob: &Sparse) -> std::result::Result<Vec<u128>, Error> {
    let crc = if raw.verify != 0 { 4 } else { 0 };
    let mut offsets = vec![u128::from(HEADER_SIZE)];
    let mut index_crc = 0;
    for block in 0..raw.index_count {
        let at = raw.index_offset + 4 * block;
        let mut entry = [0; 4];
        blob.read_at(at, &mut entry)
            .expect("the index lies within the blob");
        index_crc = crc32c(index_crc, &entry);
        let stored = u32::from_le_bytes(entry);
        let len = block_len(raw, block);
        let bound = match raw.algorithm {
            1 => len + len / 255 + 16,
            _ => len + len / 256 + 64,
        };
        if stored <= crc || u128::from(stored) > bound + u128::from(crc) {
            return Err(Error::new(Fault::ZfileEntry, at, stored.into()));
        }
        let end = offsets[block as usize] + u128::from(stored);
        if end > raw.index_offset.into() {
            return Err(Error::new(Fault::ZfileEntryRange, at, stored.into()));
        }
        offsets.push(end);
    }
    if raw.has(flag::DIGEST) && index_crc != raw.index_crc {
        let at = raw.index_offset;
        return Err(Error::new(Fault::ZfileIndexCrc, at, index_crc.into()));
    }
    Ok(offsets)
}

/// Returns the memory limit for the jump table in bytes, as documented.
fn documented(raw: &RawHeader) -> u128 {
    let halves = match raw.block_size {
        ..=4096 => 5,
        8192 => 6,
        16384 => 8,
        32768 => 12,
        _ => 16,
    };
    // The number of groups is rounded up, and the end takes an entry.
    u128::from(raw.index_count) * halves / 2 + 16
}

fn check_geometry(geometry: &Geometry, raw: &RawHeader, number: u64) -> TableShape {
    assert_eq!(geometry.size(), raw.original_size);
    assert_eq!(geometry.blocks(), raw.index_count);
    assert_eq!(geometry.block_size(), raw.block_size);
    assert_eq!(1 << geometry.block_shift(), raw.block_size);
    assert_eq!(geometry.algorithm() as u8, raw.algorithm);
    assert_eq!(geometry.has_crc(), raw.verify != 0);
    assert_eq!(geometry.index_len(), 4 * raw.index_count);
    // Reading stops at once, with the range of the index in the error.
    let nothing = Sparse::new(0, Vec::new());
    let index = Error::new(Fault::Truncated, raw.index_offset, 4 * raw.index_count);
    let found = geometry.read_index(&nothing, crc32c, &mut [], &mut []);
    assert_eq!(found, Err(index));
    let last = geometry.blocks().saturating_sub(1);
    for block in [0, 1, last, last + 1, number, u64::MAX] {
        assert_eq!(u128::from(geometry.block_len(block)), block_len(raw, block));
    }
    let shape = geometry.table_shape();
    assert!(shape.bases as u128 * 8 + shape.deltas as u128 * 2 <= documented(raw));
    shape
}

fn check(data: &[u8]) -> Result<()> {
    let parts = Parts::read(data)?;
    let (fixes, middle, number) = (parts.fixes, parts.at, parts.number);
    let mut blob = parts.into_blob(HEADER_SIZE);
    repair(&mut blob, fixes, middle);

    let (result, used) = memory(|| Geometry::read(&blob, crc32c));
    assert_eq!(used, 0, "reading a header allocates nothing");
    match (allowed(&blob), &result) {
        (None, Ok(None)) | (Some(false), Err(_)) | (Some(true), Ok(Some(_))) => {}
        (allowed, _) => panic!("allowed: {allowed:?}, found: {result:?}"),
    }
    let (Ok(Some(geometry)), Some((raw, _, _))) = (result, authority(&blob)) else {
        return Ok(());
    };
    let shape = check_geometry(&geometry, &raw, number);
    if geometry.index_len() > MAX_INDEX {
        return Ok(());
    }

    let wanted = offsets(&raw, &blob);
    let (mut bases, mut deltas) = (vec![0; shape.bases], vec![0; shape.deltas]);
    let (found, used) = memory(|| geometry.read_index(&blob, crc32c, &mut bases, &mut deltas));
    assert_eq!(used, 0, "reading an index allocates nothing");
    let wanted = match (wanted, found) {
        (Ok(wanted), Ok(())) => wanted,
        (wanted, found) => {
            assert_eq!(wanted.map(drop), found);
            return Ok(());
        }
    };
    let table = JumpTable::new(&geometry, bases, deltas);
    assert!(u128::from(table.memory()) <= documented(&raw));
    for (block, &offset) in (0..).zip(&wanted) {
        let found = table.offset(block).map(u128::from);
        assert_eq!(found, Some(offset));
        assert!(offset <= raw.index_offset.into());
    }
    let blocks = geometry.blocks();
    for behind in [
        blocks + 1,
        blocks.saturating_add(number).max(blocks + 1),
        u64::MAX,
    ] {
        assert_eq!(table.offset(behind), None);
    }
    let (a, b) = (number % (blocks + 1), (number >> 32) % (blocks + 1));
    let range = table
        .range(a.min(b)..a.max(b))
        .expect("blocks that are there");
    assert!(range.start <= range.end && range.start >= HEADER_SIZE);

    // Arrays of the wrong size are refused.
    let mut short = vec![0; shape.bases - 1];
    let mut deltas = vec![0; shape.deltas];
    assert!(
        blocks == 0
            || geometry
                .read_index(&blob, crc32c, &mut short[1..], &mut deltas)
                .is_err()
    );
    Ok(())
}

fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for algorithm in [Algorithm::Lz4, Algorithm::Zstd] {
        for (shift, overwrite_header, crc) in [
            (9, true, true),
            (12, true, false),
            (12, false, true),
            (14, true, true),
            (16, false, false),
        ] {
            let options = Options {
                method: Method {
                    algorithm,
                    level: None,
                },
                block_size: 1 << shift,
                crc,
                overwrite_header,
                whole_sectors: false,
            };
            let image = common::zfile(&vec![7; (5 << shift) + 77], options);
            let index_offset = image.len() - 512 - 6 * 4;
            let parts = Parts::of(&image, index_offset, 512);
            seeds.push(parts.to_bytes());
            seeds.push(
                Parts {
                    fixes: u16::MAX,
                    ..parts
                }
                .to_bytes(),
            );
        }
    }
    seeds
}

fuzz_target!(init: init(seeds), |data: &[u8]| {
    let _ = check(data);
});
