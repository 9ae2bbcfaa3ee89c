// SPDX-License-Identifier: GPL-2.0

//! LSMT header, trailer and index, and the arithmetic of segments. The results are compared with
//! those of a model that uses `u128`.

#![no_main]
#![allow(missing_docs, clippy::expect_used, clippy::panic)]

use libfuzzer_sys::arbitrary::Result;
use libfuzzer_sys::fuzz_target;
use overlaybd::format::lsmt::{
    field, flag, Layer, RawHeader, Segment, DATA_START, HEADER_SIZE, MAGIC, MAX_END, MAX_ENTRIES,
    MAX_LENGTH,
};
use overlaybd::format::{Blob, Error, Fault};
use overlaybd::on_disk;
use overlaybd_fuzz::common::{self, put};
use overlaybd_fuzz::{init, memory, Parts, Sparse};

/// Bits of [`Parts::fixes`].
mod fix {
    pub(super) const MAGIC: u16 = 1 << 0;
    pub(super) const FLAGS: u16 = 1 << 1;
    pub(super) const INDEX_OFFSET: u16 = 1 << 2;
    pub(super) const INDEX_COUNT: u16 = 1 << 3;
    pub(super) const ORDER: u16 = 1 << 4;
    pub(super) const MAPPING: u16 = 1 << 5;
}

fn header(blob: &Sparse, at: u64) -> Option<RawHeader> {
    let mut bytes = [0; 512];
    blob.read_at(at, &mut bytes).ok()?;
    RawHeader::parse(&bytes)
}

fn trailer_at(blob: &Sparse) -> Option<u64> {
    blob.size()
        .checked_sub(HEADER_SIZE)
        .filter(|&at| at >= HEADER_SIZE)
}

/// Corrects the fields that `fixes` selects. The index is at byte `middle`, and has `middle_len`
/// bytes.
fn repair(blob: &mut Sparse, fixes: u16, middle: u64, middle_len: usize) {
    let wants = |bit| fixes & bit != 0;
    let Some(at) = trailer_at(blob) else {
        return;
    };
    let sealed = flag::DATA_FILE | flag::SEALED;
    for (at, flags) in [(0, sealed | flag::HEADER), (at, sealed)] {
        let Some(bytes) = blob.get_mut(at, 512) else {
            continue;
        };
        if wants(fix::MAGIC) {
            put(bytes, 0, &MAGIC);
        }
        if wants(fix::FLAGS) {
            put(bytes, field::FLAGS, &flags.to_le_bytes());
        }
        if wants(fix::INDEX_OFFSET) {
            put(bytes, field::INDEX_OFFSET, &middle.to_le_bytes());
        }
        if wants(fix::INDEX_COUNT) {
            put(
                bytes,
                field::INDEX_COUNT,
                &(middle_len as u64 / 16).to_le_bytes(),
            );
        }
    }
    let Some(index) = blob.get_mut(middle, middle_len) else {
        return;
    };
    let mut end = 0;
    for entry in index.chunks_exact_mut(16) {
        let (mut place, mut source) = words(entry);
        if place << 14 == u64::MAX << 14 {
            continue;
        }
        if wants(fix::ORDER) {
            // The shift makes most gaps short, so that many entries fit on the disk.
            let gap = (place % (1 << 50)) >> (place % 50);
            let length = place >> 50;
            place = ((end + gap) % (1 << 50)) | (length << 50);
            end = (end + gap + length).min(MAX_END);
        }
        if wants(fix::MAPPING) {
            let sectors = (middle / 512).saturating_sub(DATA_START).max(1);
            let moffset = DATA_START + source % sectors;
            source = (source >> 55 << 55) | moffset;
        }
        put(entry, 0, &place.to_le_bytes());
        put(entry, 8, &source.to_le_bytes());
    }
}

fn words(entry: &[u8]) -> (u64, u64) {
    let word = |at| u64::from_le_bytes(entry[at..at + 8].try_into().expect("8 bytes"));
    (word(0), word(8))
}

/// Returns the trailer if the format allows this header and this trailer. Does not look at the
/// entries of the index.
fn allowed(blob: &Sparse) -> Option<RawHeader> {
    let first = header(blob, 0)?;
    let at = trailer_at(blob)?;
    let raw = header(blob, at)?;
    let end = u128::from(raw.index_offset) + 16 * u128::from(raw.index_count);
    let holds = first.flags & 3 == 3
        && raw.flags & 7 == 6
        && raw.index_count <= MAX_ENTRIES
        && u128::from(raw.virtual_size) <= 1 << 59
        && raw.index_offset >= HEADER_SIZE
        && end <= at.into();
    holds.then_some(raw)
}

/// The fields of an entry, as in `Documentation/formats/lsmt.rst`: offset, length, moffset, zeroed,
/// tag.
type Entry = (u128, u128, u128, bool, u8);

/// Returns the entries up to the first fault, without padding, and that fault.
fn model(raw: &RawHeader, blob: &Sparse) -> (Vec<Entry>, Option<Error>) {
    let mut entries = Vec::new();
    let mut previous = 0;
    for nth in 0..raw.index_count {
        let at = raw.index_offset + 16 * nth;
        let mut bytes = [0; 16];
        blob.read_at(at, &mut bytes)
            .expect("the index lies within the blob");
        let bits = u128::from_le_bytes(bytes);
        let cut = |from: u32, len: u32| (bits >> from) & ((1 << len) - 1);
        let (offset, length, moffset) = (cut(0, 50), cut(50, 14), cut(64, 55));
        let (zeroed, tag) = (cut(119, 1) == 1, cut(120, 8) as u8);
        if offset == (1 << 50) - 1 {
            continue;
        }
        let mapped = if zeroed { 0 } else { length };
        let fault = if length == 0 || offset + length > 1 << 50 {
            Some((Fault::LsmtEntryLength, length))
        } else if offset < previous {
            Some((Fault::LsmtEntryOrder, offset))
        } else if moffset < 8 || moffset + mapped > u128::from(raw.index_offset / 512) {
            Some((Fault::LsmtEntryMapping, moffset))
        } else {
            None
        };
        if let Some((fault, found)) = fault {
            return (entries, Some(Error::new(fault, at, found as u64)));
        }
        previous = offset + length;
        entries.push((offset, length, moffset, zeroed, tag));
    }
    (entries, None)
}

fn entry(segment: &Segment) -> Entry {
    (
        segment.offset().into(),
        segment.length().into(),
        segment.moffset().into(),
        segment.zeroed(),
        segment.tag(),
    )
}

/// Checks [`Segment::part`], which cuts a segment to a range of the disk, and [`Segment::shifted`],
/// which adds to its `moffset`.
fn check_segment(segment: &Segment, number: u64) {
    let (offset, length, moffset, zeroed, tag) = entry(segment);
    let end = offset + length;
    assert_eq!(u128::from(segment.end()), end);
    let [low, high] = [number & 0xffff_ffff, number >> 32];
    let around = |n: u64| {
        segment
            .offset()
            .saturating_sub(4)
            .saturating_add(n % (MAX_LENGTH + 8))
    };
    for (from, to) in [
        (low, high),
        (around(low), around(high)),
        (0, number),
        (number, u64::MAX),
    ] {
        let start = offset.max(from.into());
        let stop = end.min(to.into());
        let skipped = if zeroed { 0 } else { start - offset };
        let wanted = (start < stop).then(|| (start, stop - start, moffset + skipped, zeroed, 9));
        // A part whose data would start after the last possible sector doesn't exist.
        let wanted = wanted.filter(|part| part.2 < 1 << 55);
        assert_eq!(segment.part(from, to, 9).as_ref().map(entry), wanted);
    }
    for by in [low, number, 1 << 54, u64::MAX] {
        let shifted = moffset + u128::from(by);
        let wanted = (shifted < 1 << 55).then_some((offset, length, shifted, zeroed, tag));
        assert_eq!(segment.shifted(by).as_ref().map(entry), wanted);
    }
}

fn check(data: &[u8]) -> Result<()> {
    let parts = Parts::read(data)?;
    let (fixes, middle, number) = (parts.fixes, parts.at, parts.number);
    let middle_len = parts.middle.len();
    let mut blob = parts.into_blob(HEADER_SIZE);
    repair(&mut blob, fixes, middle, middle_len);

    let (result, used) = memory(|| Layer::read(&blob));
    assert_eq!(used, 0, "reading a header allocates nothing");
    let (layer, raw) = match (result, allowed(&blob)) {
        (Ok(layer), Some(raw)) => (layer, raw),
        (Err(_), None) => return Ok(()),
        (result, raw) => panic!("allowed: {raw:?}, found: {result:?}"),
    };
    assert_eq!(layer.virtual_size(), raw.virtual_size);
    assert_eq!(layer.entries(), raw.index_count);
    // Reading stops at once, with the range of the index in the error.
    let nothing = Sparse::new(0, Vec::new());
    let index = Error::new(Fault::Truncated, raw.index_offset, 16 * raw.index_count);
    assert_eq!(layer.read_index(&nothing, |_| Ok(())), Err(index));

    let (wanted, error) = model(&raw, &blob);
    let mut segments = Vec::with_capacity(middle_len / 16 + 1);
    let read = |segment| {
        segments.push(segment);
        Ok(())
    };
    let (result, used) = memory(|| layer.read_index(&blob, read));
    assert_eq!(used, 0, "reading an index allocates nothing");
    assert_eq!(result.err(), error);
    assert!(segments.iter().map(entry).eq(wanted));
    let mut end = 0;
    for segment in &segments {
        assert!(segment.offset() >= end && segment.length() > 0 && segment.end() <= MAX_END);
        end = segment.end();
        check_segment(segment, number);
        let (place, source) = words(&on_disk::lsmt::entry(segment));
        let packed = (u128::from(source) << 64) | u128::from(place);
        let (offset, length, moffset, zeroed, tag) = entry(segment);
        let bits = (u128::from(zeroed) << 119) | (u128::from(tag) << 120);
        assert_eq!(packed, offset | (length << 50) | (moffset << 64) | bits);
    }

    // If the callback returns an error, reading stops with that error.
    if !segments.is_empty() {
        let stop = Error::new(Fault::Truncated, number, 0);
        assert_eq!(layer.read_index(&blob, |_| Err(stop)), Err(stop));
    }
    Ok(())
}

/// Returns valid layers: each one once with only the number of entries corrected, and once with
/// all corrections.
fn seeds() -> Vec<Vec<u8>> {
    let run = common::run;
    let layers = [
        (
            64 * 512,
            vec![run(0, 8, false), run(8, 8, true), run(20, 44, false)],
        ),
        (
            1 << 40,
            vec![run(1 << 20, 16383, true), run(MAX_END - 9, 9, false)],
        ),
        (0, vec![]),
        (
            5000,
            (0..40).map(|nth| run(nth * 3, 2, nth % 3 == 0)).collect(),
        ),
    ];
    let mut seeds = Vec::new();
    for (size, runs) in layers {
        let image = common::lsmt(size, &runs, |_| 7);
        let data: u64 = runs
            .iter()
            .filter(|run| !run.zeroed)
            .map(|run| run.length)
            .sum();
        let mut parts = Parts::of(&image, 4096 + data as usize * 512, 4096);
        // Most of the index is padding: keep two entries of it.
        parts.middle.truncate(16 * runs.len() + 32);
        parts.fixes = fix::INDEX_COUNT;
        seeds.push(parts.to_bytes());
        seeds.push(
            Parts {
                fixes: u16::MAX,
                ..parts
            }
            .to_bytes(),
        );
    }
    seeds
}

fuzz_target!(init: init(seeds), |data: &[u8]| {
    let _ = check(data);
});
