// SPDX-License-Identifier: GPL-2.0

//! Tests the arithmetic of the formats with all combinations of small values and values at limits,
//! against models in wider integers. Tests are built with overflow checks.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::convert::Infallible;

use common::sparse::Sparse;
use common::{checksum, lsmt, put, run, sign, zfile};
use overlaybd::codec::Method;
use overlaybd::format::blob::{check_range, Window};
use overlaybd::format::lsmt::{Layer, Segment, MAX_END, MAX_LENGTH};
use overlaybd::format::merge::{merge, sectors, Event, Extent, Index};
use overlaybd::format::num::{bytes_at, le32, le64, Records};
use overlaybd::format::zfile::{field, flag, Algorithm, Geometry, JumpTable, MAX_BLOCKS};
use overlaybd::format::{tar, Blob, Error, Fault};
use overlaybd::zfile_writer::Options;
use overlaybd::{crc32c, tar_writer};

/// Returns the values around each power of two.
fn limits() -> Vec<u64> {
    let around = |shift: u32| (1u64 << shift).saturating_sub(2)..=(1u64 << shift) + 1;
    let mut limits: Vec<u64> = (0..64).flat_map(around).collect();
    limits.extend(u64::MAX - 3..=u64::MAX);
    limits.sort_unstable();
    limits.dedup();
    limits
}

#[test]
fn loads() {
    for len in 0..20 {
        let buf: Vec<u8> = (1..=len).collect();
        for at in (0..24).chain([usize::MAX - 8, usize::MAX - 1, usize::MAX]) {
            let there = |n: usize| at.checked_add(n).is_some_and(|end| end <= buf.len());
            let wanted = |n: usize| -> u128 {
                let bytes = if there(n) { &buf[at..at + n] } else { &[] };
                bytes
                    .iter()
                    .rev()
                    .fold(0, |n, &byte| n * 256 + u128::from(byte))
            };
            assert_eq!(u128::from(le32(&buf, at)), wanted(4));
            assert_eq!(u128::from(le64(&buf, at)), wanted(8));
            assert_eq!(u128::from(bytes_at::<1>(&buf, at)[0]), wanted(1));
        }
    }
}

/// Finds an overlap in lists of one to four places of data, in every order, if and only if there is one.
#[test]
fn overlaps() {
    use overlaybd::format::dax::{overlap, Place};

    let common = |a: &Place, b: &Place| a.start < b.end && b.start < a.end;
    let all: Vec<Place> = (0..4)
        .flat_map(|start| (1..=3).map(move |len| (start, start + len)))
        .map(|(start, end)| Place { start, end })
        .collect();
    let mut lists: Vec<Vec<Place>> = vec![Vec::new()];
    for _ in 0..4 {
        let longer = lists.iter().flat_map(|list| {
            all.iter()
                .map(move |&place| list.iter().copied().chain([place]).collect())
        });
        let longer: Vec<Vec<Place>> = longer.collect();
        for list in &longer {
            let wanted = (0..list.len())
                .any(|nth| list[..nth].iter().any(|other| common(other, &list[nth])));
            let mut changed = list.clone();
            match overlap(&mut changed, || Ok::<_, Infallible>(())).unwrap() {
                None => assert!(!wanted, "{list:?}"),
                Some([a, b]) => assert!(wanted && common(&a, &b), "{list:?}: {a:?} {b:?}"),
            }
        }
        lists = longer;
    }
    // `overlap` stops when its callback returns an error.
    let mut many: Vec<Place> = (0..1 << 17)
        .map(|start| Place {
            start,
            end: start + 1,
        })
        .collect();
    let mut left = 1;
    let stopped = overlap(&mut many, || {
        left -= 1;
        if left < 0 {
            return Err("stopped");
        }
        Ok(())
    });
    assert_eq!(stopped, Err("stopped"));
}

/// Splits short streams into pieces in every way, also with an empty first piece.
#[test]
fn records() {
    fn check<const N: usize>() {
        for len in 0..12usize {
            let bytes: Vec<u8> = (0..len as u8).collect();
            for cuts in 0..1u32 << len {
                let mut records = Records::<N>::new();
                let mut found = Vec::new();
                let mut start = 0;
                for end in (0..=len).filter(|&end| end == len || (cuts >> end) & 1 != 0) {
                    records
                        .feed(&bytes[start..end], |record| {
                            found.extend_from_slice(record);
                            Ok::<_, ()>(())
                        })
                        .unwrap();
                    start = end;
                }
                assert_eq!(found, bytes[..len / N * N]);
            }
        }
    }
    check::<1>();
    check::<2>();
    check::<3>();
    check::<4>();
    check::<5>();
    check::<16>();
}

#[test]
fn ranges() {
    let limits = limits();
    for &size in &limits {
        let blob = Sparse::new(size, Vec::new());
        for &offset in &limits {
            for &len in &limits {
                let end = u128::from(offset) + u128::from(len);
                let within = end <= u128::from(size);
                assert_eq!(check_range(size, offset, len).is_ok(), within);
                let window = Window::new(&blob, offset, len);
                assert_eq!(window.is_ok(), within);
                if let Ok(window) = window {
                    let last = window.read_at(len.wrapping_sub(1), &mut [0]);
                    assert_eq!(last.is_ok(), len > 0);
                    assert!(window.read_at(len, &mut [0]).is_err());
                }
            }
        }
        assert_eq!(u128::from(sectors(size)), u128::from(size).div_ceil(512));
    }
}

/// The format's limit for the length of a stored block allows everything that compressors produce.
#[test]
fn bounds() {
    for n in 0..=65536u32 {
        let len = n as usize;
        let lz4 = lz4::block::compress_bound(len).unwrap();
        assert_eq!(Algorithm::Lz4.bound(n) as usize, lz4);
        assert!(Algorithm::Zstd.bound(n) as usize >= zstd::zstd_safe::compress_bound(len));
    }
}

/// Calls `check` for each kind of ZFile, with its options and a header.
fn kinds(mut check: impl FnMut(Options, Vec<u8>)) {
    for algorithm in [Algorithm::Lz4, Algorithm::Zstd] {
        for shift in 9..=16 {
            for crc in [false, true] {
                let options = Options {
                    method: Method {
                        algorithm,
                        level: None,
                    },
                    block_size: 1 << shift,
                    crc,
                    overwrite_header: true,
                    whole_sectors: false,
                };
                let mut header = zfile(&[], options);
                header.truncate(512);
                check(options, header);
            }
        }
    }
}

/// Returns a ZFile of `size` bytes with its index at `index_offset`.
fn geometry(header: &[u8], size: u64, index_offset: u64, index: Vec<u8>) -> (Sparse, Geometry) {
    let mut header = header.to_vec();
    let block_size = u64::from(le32(&header, field::BLOCK_SIZE));
    let flags = flag::HEADER | flag::DATA_FILE | flag::OVERWRITTEN | flag::DIGEST;
    put(&mut header, field::FLAGS, &flags.to_le_bytes());
    put(
        &mut header,
        field::INDEX_OFFSET,
        &index_offset.to_le_bytes(),
    );
    let count = size.div_ceil(block_size);
    put(&mut header, field::INDEX_COUNT, &count.to_le_bytes());
    put(&mut header, field::ORIGINAL_SIZE, &size.to_le_bytes());
    put(
        &mut header,
        field::INDEX_CRC,
        &crc32c(0, &index).to_le_bytes(),
    );
    sign(&mut header, 0);
    let end = index_offset + 4 * count;
    let blob = Sparse::new(end, vec![(0, header), (index_offset, index)]);
    let geometry = Geometry::read(&blob, crc32c).unwrap().unwrap();
    (blob, geometry)
}

/// Checks the length of the last block for numbers of blocks up to the limit, and the sizes of the
/// jump table.
#[test]
fn geometries() {
    kinds(|options, header| {
        let block_size = u64::from(options.block_size);
        let counts = limits().into_iter().chain([MAX_BLOCKS - 1, MAX_BLOCKS]);
        for count in counts.filter(|&count| count <= MAX_BLOCKS) {
            for last in [1, 2, block_size / 2, block_size - 1, block_size] {
                let size = (count * block_size).saturating_sub(block_size - last);
                let (_, geometry) = geometry(&header, size, 512, Vec::new());
                assert_eq!(geometry.blocks(), count);
                for block in limits().into_iter().chain([count.saturating_sub(1), count]) {
                    let start = u128::from(block) * u128::from(block_size);
                    let len = u128::from(size).saturating_sub(start);
                    let wanted = len.min(block_size.into());
                    assert_eq!(u128::from(geometry.block_len(block)), wanted);
                }
                // A group has as many blocks as possible with offsets that fit in 16 bits if the
                // blocks have the maximum length.
                let most = u64::from(geometry.stored_max());
                let group = (0..16)
                    .map(|shift| 1 << shift)
                    .filter(|group| (group - 1) * most <= 65535)
                    .max()
                    .unwrap();
                let shape = geometry.table_shape();
                assert_eq!(shape.bases as u64, count.div_ceil(group) + 1);
                let deltas = if group == 1 { 0 } else { count };
                assert_eq!(shape.deltas as u64, deltas);
            }
        }
    });
}

/// Tests jump tables of blocks that are all as long or all as short as possible: no delta
/// overflows.
#[test]
fn longest_blocks() {
    kinds(|options, header| {
        let empty = if options.crc { 4 } else { 0 };
        for count in [1, 2, 63, 64, 65, 130] {
            let size = u64::from(options.block_size) * count;
            let most = options.method.algorithm.bound(options.block_size) + empty;
            for stored in [empty + 1, most] {
                let index = stored.to_le_bytes().repeat(count as usize);
                // The blocks end where the index starts.
                let end = 512 + u64::from(stored) * count;
                let (blob, geometry) = geometry(&header, size, end, index);
                assert_eq!(geometry.stored_max(), most);
                let shape = geometry.table_shape();
                let (mut bases, mut deltas) = (vec![0; shape.bases], vec![0; shape.deltas]);
                geometry
                    .read_index(&blob, crc32c, &mut bases, &mut deltas)
                    .unwrap();
                let table = JumpTable::new(&geometry, bases, deltas);
                for block in 0..=count {
                    let wanted = 512 + u64::from(stored) * block;
                    assert_eq!(table.offset(block), Some(wanted));
                }
            }
            // Lengths just below and above those that an entry allows, and the extremes.
            for stored in [0, empty, most + 1, u32::MAX] {
                let index = stored.to_le_bytes().repeat(count as usize);
                let (blob, geometry) = geometry(&header, size, 1 << 40, index);
                let shape = geometry.table_shape();
                let (mut bases, mut deltas) = (vec![0; shape.bases], vec![0; shape.deltas]);
                let error = geometry
                    .read_index(&blob, crc32c, &mut bases, &mut deltas)
                    .unwrap_err();
                assert_eq!(error, Error::new(Fault::ZfileEntry, 1 << 40, stored.into()));
            }
        }
    });
}

type Parts = (u128, u128, u128, bool, u8);

fn parts(segment: Segment) -> Parts {
    (
        segment.offset().into(),
        segment.length().into(),
        segment.moffset().into(),
        segment.zeroed(),
        segment.tag(),
    )
}

#[test]
fn segments() {
    let offsets = [
        0,
        1,
        2,
        1 << 49,
        MAX_END - MAX_LENGTH - 1,
        MAX_END - 3,
        MAX_END - 1,
        MAX_END,
    ]
    .into_iter()
    .chain([MAX_END + 1, u64::MAX - 1, u64::MAX]);
    let lengths = [
        0,
        1,
        2,
        3,
        8191,
        MAX_LENGTH - 1,
        MAX_LENGTH,
        MAX_LENGTH + 1,
        u64::MAX,
    ];
    let last = (1 << 55) - 1;
    let moffsets = [
        0,
        1,
        8,
        1 << 54,
        last - MAX_LENGTH,
        last - 1,
        last,
        last + 1,
        u64::MAX,
    ];
    for offset in offsets {
        for length in lengths {
            for moffset in moffsets {
                for (zeroed, tag) in [(false, 0), (true, 1), (false, 255), (true, 128)] {
                    segment(offset, length, moffset, zeroed, tag);
                }
            }
        }
    }
}

/// Checks a segment of these values, parts of it, and the segment moved to other places.
fn segment(offset: u64, length: u64, moffset: u64, zeroed: bool, tag: u8) {
    let end = u128::from(offset) + u128::from(length);
    let fits = (1..=MAX_LENGTH).contains(&length) && end <= 1 << 50 && moffset < 1 << 55;
    let found = Segment::new(offset, length, moffset, zeroed, tag);
    assert_eq!(found.is_some(), fits);
    let Some(segment) = found else {
        return;
    };
    let whole = (offset.into(), length.into(), moffset.into(), zeroed, tag);
    assert_eq!(parts(segment), whole);
    assert_eq!(u128::from(segment.end()), end);
    for by in limits() {
        let moved = u128::from(moffset) + u128::from(by);
        let wanted = (moved < 1 << 55).then_some((whole.0, whole.1, moved, zeroed, tag));
        assert_eq!(segment.shifted(by).map(parts), wanted);
    }
    let edges = [offset, offset + length / 2, offset + length];
    let around = |edge: u64| edge.saturating_sub(2)..=edge + 2;
    let edges: Vec<u64> = edges
        .into_iter()
        .flat_map(around)
        .chain([0, u64::MAX])
        .collect();
    for &from in &edges {
        for &to in &edges {
            let (start, stop) = (whole.0.max(from.into()), end.min(to.into()));
            let wanted = (start < stop).then(|| {
                let skipped = if zeroed { 0 } else { start - whole.0 };
                (start, stop - start, whole.2 + skipped, zeroed, 7)
            });
            let wanted = wanted.filter(|part| part.2 < 1 << 55);
            assert_eq!(segment.part(from, to, 7).map(parts), wanted);
        }
    }
}

/// Tests every pair of small index entries and entries at the upper limits.
#[test]
fn entries() {
    // Sectors 8 to 11 have data, and the index starts at sector 12.
    let image = lsmt(4096, &[run(0, 4, false)], |_| 1);
    let trailer = image.len() - 4096;
    let small = (0..4u64).chain([MAX_END - 2, MAX_END - 1]);
    let mut entries = Vec::new();
    for offset in small {
        for length in [0, 1, 2, MAX_LENGTH] {
            for moffset in [0, 7, 8, 10, 11, 12, (1 << 55) - 1] {
                for zeroed in [0, 1u64 << 55] {
                    entries.push((offset | (length << 50), moffset | zeroed));
                }
            }
        }
    }
    // Returns the end of an entry that follows one that ends at `previous`, or its fault and the
    // value found.
    let model = |(place, source): (u64, u64), previous: u64| -> Result<u64, (Fault, u64)> {
        let (offset, length) = (place % (1 << 50), place >> 50);
        let (moffset, zeroed) = (source % (1 << 55), (source >> 55) & 1 == 1);
        let mapped = if zeroed { 0 } else { length };
        if offset == (1 << 50) - 1 {
            Ok(previous)
        } else if length == 0 || offset + length > MAX_END {
            Err((Fault::LsmtEntryLength, length))
        } else if offset < previous {
            Err((Fault::LsmtEntryOrder, offset))
        } else if !(8..=12 - mapped.min(12)).contains(&moffset) {
            Err((Fault::LsmtEntryMapping, moffset))
        } else {
            Ok(offset + length)
        }
    };
    let mut tail = image[trailer..trailer + 512].to_vec();
    put(&mut tail, 40, &2u64.to_le_bytes());
    let size = 12 * 512 + 32 + 4096;
    let head = image[..512].to_vec();
    let index_offset = 12 * 512;
    let mut blob = Sparse::new(
        size,
        vec![(0, head), (index_offset, vec![0; 32]), (size - 4096, tail)],
    );
    for &first in &entries {
        for &second in &entries {
            let index = blob.get_mut(index_offset, 32).unwrap();
            for (at, value) in (0..).step_by(8).zip([first.0, first.1, second.0, second.1]) {
                put(index, at, &value.to_le_bytes());
            }
            let at = |nth: u64| index_offset + 16 * nth;
            let wanted = match model(first, 0) {
                Err((fault, found)) => Err(Error::new(fault, at(0), found)),
                Ok(end) => model(second, end)
                    .map(drop)
                    .map_err(|(fault, found)| Error::new(fault, at(1), found)),
            };
            let layer = Layer::read(&blob).unwrap();
            let found = layer.read_index(&blob, |_| Ok(()));
            assert_eq!(found, wanted, "{first:x?}, {second:x?}");
        }
    }
}

/// Tests numbers in tar headers, as octal digits and in base 256.
#[test]
fn tar_sizes() {
    let read = |size: &[u8], blob_size| {
        let mut header = tar_writer::head(0)[1024..].to_vec();
        put(&mut header, 124, size);
        checksum(&mut header, 0);
        tar::payload(&Sparse::new(blob_size, vec![(0, header)]))
    };
    let wanted = |len| Ok(Some(tar::Payload { start: 512, len }));
    for len in (0..5000).chain(limits()).filter(|&len| len < 1 << 33) {
        for text in [
            format!("{len:011o} "),
            format!("{len:>11o} "),
            format!("{len:011o}\0"),
        ] {
            assert_eq!(read(text.as_bytes(), 512 + len), wanted(len));
            assert_ne!(read(text.as_bytes(), 511 + len), wanted(len));
        }
    }
    for len in limits() {
        let mut field = [0; 12];
        put(&mut field, 4, &len.to_be_bytes());
        field[0] = 0x80;
        let fits = len.checked_add(512);
        assert_eq!(read(&field, u64::MAX).is_ok(), fits.is_some());
        if let Some(size) = fits {
            assert_eq!(read(&field, size), wanted(len));
            assert_ne!(read(&field, size - 1), wanted(len));
        }
        // One bit more than fits.
        field[3] = 1;
        assert!(read(&field, u64::MAX).is_err());
    }
}

/// Returns every layer on a disk of `sectors` sectors from `base`. Each sector has no segment, one
/// of data or a zeroed one; each segment is new or continues that of the sector before.
fn layers(sectors: u64, base: u64) -> Vec<Vec<Segment>> {
    let mut layers: Vec<Vec<(u64, u64, bool)>> = vec![Vec::new()];
    for sector in 0..sectors {
        let mut longer = Vec::new();
        for layer in layers {
            for zeroed in [false, true] {
                let mut with = layer.clone();
                with.push((sector, 1, zeroed));
                longer.push(with);
            }
            if let Some(&(offset, length, zeroed)) = layer.last() {
                if offset + length == sector {
                    let mut with = layer.clone();
                    *with.last_mut().unwrap() = (offset, length + 1, zeroed);
                    longer.push(with);
                }
            }
            longer.push(layer);
        }
        layers = longer;
    }
    let segment = |(nth, (offset, length, zeroed)): (usize, (u64, u64, bool))| {
        Segment::new(base + offset, length, 8 + 100 * nth as u64, zeroed, 0).unwrap()
    };
    let pack = |layer: Vec<_>| layer.into_iter().enumerate().map(segment).collect();
    layers.into_iter().map(pack).collect()
}

/// Tests every stack of `count` layers on a disk of `sectors` sectors from `base`, cut off at each
/// sector.
fn stacks(count: u32, sectors: u64, base: u64) {
    let all = layers(sectors, base);
    let mut merged = Vec::new();
    for nth in 0..all.len().pow(count) {
        let stack: Vec<&[Segment]> = (0..count)
            .map(|layer| all[nth / all.len().pow(layer) % all.len()].as_slice())
            .collect();
        let mut whole = vec![None; sectors as usize];
        for (layer, segments) in (0..).zip(&stack) {
            for segment in segments.iter() {
                for nth in 0..segment.length() {
                    let data = (layer, segment.moffset() + nth);
                    whole[(segment.offset() - base + nth) as usize] =
                        (!segment.zeroed()).then_some(data);
                }
            }
        }
        for limit in 0..=sectors + 1 {
            merged.clear();
            let (mut heap, mut cursors) = ([Event::default(); 8], [0; 8]);
            let sink = |segment| {
                merged.push(segment);
                Ok::<_, Error>(())
            };
            merge(&stack, base + limit, &mut heap, &mut cursors, sink, || {
                Ok(())
            })
            .unwrap();
            let runs = |count| Ok::<_, Infallible>(vec![0; count]);
            let Ok(index) = Index::new(merged.as_slice(), runs, || Ok(()));
            for (sector, wanted) in (0..).zip(&whole) {
                let wanted = wanted.filter(|_| sector < limit);
                let found = match index.lookup(base + sector) {
                    Extent::Data { layer, sector, len } => {
                        assert!(len > 0);
                        Some((layer, sector))
                    }
                    Extent::Zeros { len } => {
                        assert!(len > 0);
                        None
                    }
                };
                assert_eq!(found, wanted, "{stack:?}, cut at {limit}");
            }
            let ends = merged.iter().map(Segment::end);
            let starts = merged.iter().map(Segment::offset).skip(1);
            assert!(ends.zip(starts).all(|(end, next)| end <= next));
        }
    }
}

/// Looks up every sector in an index of two-sector segments that start at `places`.
fn look_everywhere(places: &[u64], sectors: impl Iterator<Item = u64>) {
    let segments: Vec<_> = (0..)
        .zip(places)
        .map(|(nth, &place)| Segment::new(place, 2, nth * 2, false, 7).unwrap())
        .collect();
    let runs = |count| {
        let per_run = if places.len() <= 4096 { 1 } else { 16 };
        assert!(count <= places.len() / per_run + 2);
        Ok::<_, Infallible>(vec![0; count])
    };
    let Ok(index) = Index::new(segments, runs, || Ok(()));
    for sector in sectors {
        let next = places.partition_point(|&place| place + 2 <= sector);
        let wanted = match places.get(next).map(|&place| (next as u64, place)) {
            Some((nth, place)) if place <= sector => Extent::Data {
                layer: 7,
                sector: nth * 2 + sector - place,
                len: place + 2 - sector,
            },
            Some((_, place)) => Extent::Zeros {
                len: place - sector,
            },
            None => Extent::Zeros {
                len: MAX_END - sector,
            },
        };
        let found = index.lookup(sector);
        assert_eq!(found, wanted, "{} segments, {sector}", places.len());
    }
}

#[test]
fn every_length_of_index() {
    // Some lengths have one run per segment, others one run per 16 segments.
    for count in (0..200u64).chain(4090..4130) {
        // Gaps of 0 and 3 sectors.
        let even: Vec<_> = (0..count).map(|nth| nth * 4 + nth % 3).collect();
        look_everywhere(&even, 0..count * 4 + 5);
        // Many segments close together and one far away: most runs are empty.
        for far in [0, 1, 1000, MAX_END - 20000] {
            let mut crowd = even.clone();
            crowd.push(count * 4 + far);
            let end = count * 4 + far;
            let sectors = (0..count * 4 + 5).chain(end.saturating_sub(100)..end + 5);
            look_everywhere(&crowd, sectors);
        }
    }
}

#[test]
fn every_small_stack() {
    for base in [0, MAX_END - 6] {
        stacks(1, 6, base);
        stacks(2, 4, base);
        stacks(3, 3, base);
        stacks(4, 2, base);
        stacks(5, 1, base);
    }
}
