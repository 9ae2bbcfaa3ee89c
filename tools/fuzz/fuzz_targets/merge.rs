// SPDX-License-Identifier: GPL-2.0

//! Merges layers and looks sectors up in the merged index. The target compares the results with a
//! model that assigns sectors one by one.

#![no_main]
#![allow(missing_docs, clippy::expect_used, clippy::panic)]

use std::convert::Infallible;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use overlaybd::format::lsmt::{Segment, MAX_END};
use overlaybd::format::merge::{merge, Event, Extent, Index, MAX_LAYERS};
use overlaybd::format::{Error, Fault};
use overlaybd_fuzz::{init, memory};

/// Number of sectors in the model.
const SECTORS: u64 = 256;
/// Distance between the data of two segments, in sectors, so that no two are adjacent in a file.
const STRIDE: u64 = 256;

struct Case {
    layers: Vec<Vec<Segment>>,
    /// First sector of the model on the disk.
    base: u64,
    limit: u64,
    /// Number of the merged segment for which the callback returns an error.
    refused: usize,
    /// Number of slots by which the working memory is too small.
    missing: usize,
}

/// Reads the parameters; then three bytes for each segment: layer, gap with a bit for zeroed,
/// length.
fn read(data: &[u8]) -> Result<Case> {
    let mut input = Unstructured::new(data);
    let count = usize::from(input.arbitrary::<u8>()?) + usize::from(input.arbitrary::<bool>()?);
    let mut case = Case {
        layers: vec![Vec::new(); count],
        base: input.arbitrary::<u64>()? % (MAX_END - SECTORS + 1),
        limit: input.arbitrary::<u16>()?.into(),
        refused: input.arbitrary::<u16>()?.into(),
        missing: usize::from(input.arbitrary::<u8>()? == 1),
    };
    case.limit += case.base.saturating_sub(SECTORS / 2);
    // The largest possible offsets, for segments at the end of the largest file.
    let first = match input.arbitrary::<bool>()? {
        true => (1 << 55) - 1 - STRIDE * (data.len() as u64 / 3 + 1),
        false => 8,
    };
    let mut ends = vec![0; count];
    let mut nth = 0;
    while count > 0 && !input.is_empty() {
        let [layer, gap, length]: [u8; 3] = input.arbitrary()?;
        let layer = usize::from(layer) % count;
        let (zeroed, gap) = (gap & 0x80 != 0, u64::from(gap & 0x7f));
        let start = ends[layer] + gap;
        let length = u64::from(length & 0x7f) + 1;
        if start + length > SECTORS {
            continue;
        }
        let moffset = first + STRIDE * nth;
        nth += 1;
        let segment = Segment::new(case.base + start, length, moffset, zeroed, 0);
        case.layers[layer].push(segment.expect("within range"));
        ends[layer] = start + length;
    }
    Ok(case)
}

/// Returns, for each sector of the disk, the layer that has its data, and the sector of the layer's file;
/// `None` if it reads as zeros.
fn model(case: &Case) -> Vec<Option<(u8, u64)>> {
    let mut disk = vec![None; SECTORS as usize];
    for (segments, layer) in case.layers.iter().zip(0..) {
        for segment in segments {
            for nth in 0..segment.length() {
                let sector = segment.offset() + nth;
                if sector < case.limit {
                    disk[(sector - case.base) as usize] =
                        (!segment.zeroed()).then(|| (layer, segment.moffset() + nth));
                }
            }
        }
    }
    disk
}

fn run(case: &Case, refused: usize, out: &mut Vec<Segment>) -> std::result::Result<(), Error> {
    let slots = case.layers.len().saturating_sub(case.missing);
    let mut heap = vec![Event::default(); slots];
    let mut cursors = vec![0; slots];
    let (result, used) = memory(|| {
        merge(
            &case.layers,
            case.limit,
            &mut heap,
            &mut cursors,
            |segment| {
                if out.len() == refused {
                    return Err(Error::new(Fault::Truncated, 1, 2));
                }
                out.push(segment);
                Ok(())
            },
            || Ok(()),
        )
    });
    assert_eq!(used, 0, "merging allocates nothing");
    result
}

fn check(data: &[u8]) -> Result<()> {
    let case = read(data)?;
    let segments: usize = case.layers.iter().map(Vec::len).sum();
    let mut merged = Vec::with_capacity(2 * segments + 1);
    let result = run(&case, usize::MAX, &mut merged);
    if case.layers.is_empty() || case.layers.len() > MAX_LAYERS || case.missing > 0 {
        let error = result.expect_err("a number of layers that is not allowed");
        assert_eq!(error.fault, Fault::LsmtLayerCount);
        return Ok(());
    }
    result.expect("valid layers merge");
    assert!(merged.len() <= 2 * segments);

    let disk = model(&case);
    let mut painted = vec![None; disk.len()];
    let mut previous: Option<Segment> = None;
    for segment in &merged {
        assert!(!segment.zeroed() && segment.end() <= case.limit);
        if let Some(previous) = previous {
            assert!(previous.end() <= segment.offset(), "out of order");
            let split = previous.end() == segment.offset()
                && previous.tag() == segment.tag()
                && previous.moffset() + previous.length() == segment.moffset();
            assert!(!split, "cut where nothing begins or ends");
        }
        for nth in 0..segment.length() {
            painted[(segment.offset() - case.base + nth) as usize] =
                Some((segment.tag(), segment.moffset() + nth));
        }
        previous = Some(*segment);
    }
    assert!(painted == disk, "not what the model has");

    let runs = |count| Ok::<_, Infallible>(vec![0; count]);
    let Ok(index) = Index::new(merged.as_slice(), runs, || Ok(()));
    let mut zeros_end = MAX_END;
    let mut data_end = 0;
    for (nth, wanted) in disk.iter().enumerate().rev() {
        let sector = case.base + nth as u64;
        match (index.lookup(sector), *wanted) {
            (Extent::Zeros { len }, None) => assert_eq!(sector + len, zeros_end),
            (
                Extent::Data {
                    layer,
                    sector: at,
                    len,
                },
                Some(found),
            ) => {
                assert_eq!((layer, at), found);
                // The segment ends where the next sector doesn't continue it.
                let next = disk.get(nth + 1).copied().flatten();
                if next != Some((layer, at + 1)) {
                    data_end = sector + 1;
                }
                assert_eq!(sector + len, data_end);
                zeros_end = sector;
            }
            (found, wanted) => panic!("sector {sector}: {found:?}, wanted {wanted:?}"),
        }
    }

    // If the callback returns an error, the merge stops with that error.
    if case.refused < merged.len() {
        let mut begun = Vec::with_capacity(merged.len());
        let result = run(&case, case.refused, &mut begun);
        assert_eq!(result, Err(Error::new(Fault::Truncated, 1, 2)));
        assert!(begun[..] == merged[..case.refused]);
    }
    Ok(())
}

fn seeds() -> Vec<Vec<u8>> {
    let seed = |layers: u8, base: u64, limit: u16, segments: &[[u8; 3]]| {
        let mut bytes = vec![layers, 0];
        bytes.extend(base.to_le_bytes());
        bytes.extend(limit.to_le_bytes());
        bytes.extend([0xff, 0xff, 0, 0]);
        bytes.extend(segments.as_flattened());
        bytes
    };
    let crossed = [[0, 0, 99], [1, 10, 9], [1, 20, 9], [2, 0x8f, 9], [0, 5, 50]];
    let many: Vec<_> = (0..255).map(|nth| [nth, nth / 4, 3]).collect();
    vec![
        seed(3, 0, SECTORS as u16, &crossed),
        seed(3, MAX_END - SECTORS, 1500, &crossed),
        seed(255, 0, 100, &many),
        seed(
            2,
            0,
            1000,
            &[[0, 1, 0], [0, 1, 0], [0, 1, 0], [1, 0x80, 255]],
        ),
    ]
}

fuzz_target!(init: init(seeds), |data: &[u8]| {
    let _ = check(data);
});
