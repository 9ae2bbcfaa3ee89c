// SPDX-License-Identifier: GPL-2.0

//! Stores of changes. The target compares the reader with a model that reads one exception at a time.

#![no_main]
#![allow(missing_docs, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use overlaybd::changes::head::{SIZE, USED};
use overlaybd::changes::{Exceptions, Fault, Head, Origin};
use overlaybd::format::num::le64;
use overlaybd::format::Blob;
use overlaybd::Error;
use overlaybd_fuzz::common::{changes, put};
use overlaybd_fuzz::{init, memory, Sparse};

/// Memory limit in bytes, besides the exceptions: a buffer for a chunk, and a vector that has just grown.
const BUFFER: usize = (1 << 20) + (1 << 16);

/// The kinds of faults of an exception store.
#[derive(Debug, PartialEq, Eq)]
enum Wrong {
    Header,
    Exception,
    Twice,
    NoEnd,
}

/// The chunks of the disk that were written, each with its chunk of the store; and the chunk of the store that
/// dm-snapshot would use next, or 0 if it has not used the store yet.
type Found = (BTreeMap<u64, u64>, u64);

fn word(blob: &Sparse, at: u64) -> u64 {
    let mut bytes = [0; 8];
    blob.read_at(at, &mut bytes).expect("within the store");
    le64(&bytes, 0)
}

/// Returns the exceptions of the store, or its first fault.
fn model(blob: &Sparse, head: &Head) -> std::result::Result<Found, Wrong> {
    let chunk = u64::from(head.chunk) * 512;
    let (disk, store) = (
        head.disk.div_ceil(head.chunk.into()),
        head.store * 512 / chunk,
    );
    if store == 0 {
        return Err(Wrong::NoEnd);
    }
    let (first, second) = (word(blob, SIZE), word(blob, SIZE + 8));
    let mut found = BTreeMap::new();
    if first as u32 == 0 {
        return Ok((found, 0));
    }
    let right = first as u32 == 0x7041_6e53 && first >> 32 != 0;
    if !right || second != 1 | (u64::from(head.chunk) << 32) {
        return Err(Wrong::Header);
    }
    let per_area = chunk / 16;
    let is_area = |chunk: u64| (chunk - 1) % (per_area + 1) == 0;
    let mut places = BTreeSet::new();
    let mut next = 2;
    let mut twice = false;
    for nth in 0.. {
        let area = 1 + nth / per_area * (per_area + 1);
        if area >= store {
            return Err(Wrong::NoEnd);
        }
        let at = SIZE + area * chunk + nth % per_area * 16;
        let (old, new) = (word(blob, at), word(blob, at + 8));
        if new == 0 {
            break;
        }
        if old >= disk || new >= store || is_area(new) {
            return Err(Wrong::Exception);
        }
        if nth == disk {
            return Err(Wrong::Twice);
        }
        twice |= found.insert(old, new).is_some() | !places.insert(new);
        next = next.max(new + 1);
    }
    match twice {
        true => Err(Wrong::Twice),
        false => Ok((found, next + u64::from(is_area(next)))),
    }
}

fn check(data: &[u8]) -> Result<()> {
    let mut input = Unstructured::new(data);
    let fixes: u8 = input.arbitrary()?;
    let area: u8 = input.arbitrary()?;
    let short: u8 = input.arbitrary()?;
    let mut bytes = input.take_rest().to_vec();
    bytes.resize(bytes.len().max(USED + 16), 0);
    let mut list = bytes.split_off(USED + 16);
    let header = bytes.split_off(USED);
    let mut head = bytes;
    if fixes & 1 != 0 {
        put(&mut head, 0, b"obdsetup changes\x01\0\0\0");
        // Make the state, the sizes and the chunk size valid more often.
        head[21..24].fill(0);
        head[27..32].fill(0);
        head[35..40].fill(0);
        let chunk = 8u32 << (head[40] % 9);
        put(&mut head, 40, &chunk.to_le_bytes());
        let crc = overlaybd::crc32c(0, &head[..508]);
        put(&mut head, 508, &crc.to_le_bytes());
    }
    let first: [u8; USED] = head.clone().try_into().expect("its length");
    let parsed = Head::from_bytes(&first);
    let Ok(wanted) = parsed else {
        let blob = Sparse::new(1 << 20, vec![(0, head)]);
        let found = Head::read(&blob);
        assert!(matches!(found, Err(Error::Changes(fault)) if Err(fault) == parsed));
        return Ok(());
    };
    let chunk = u64::from(wanted.chunk) * 512;
    let step = chunk / 16 + 1;
    let size = SIZE + wanted.store * 512;
    let mut pieces = vec![(0, head), (SIZE, header)];
    if fixes & 2 != 0 {
        let header = [0x7041_6e53, 1, 1, wanted.chunk].map(u32::to_le_bytes);
        pieces[1].1 = header.concat();
    }
    // Put full areas before the list, up to 2000 exceptions.
    let areas = u64::from(area % 3);
    if fixes & 4 != 0 {
        for nth in 0..areas * (step - 1) {
            let entry = [nth, 2 + nth + nth / (step - 1)].map(u64::to_le_bytes);
            let at = SIZE + (1 + nth / (step - 1) * step) * chunk + nth % (step - 1) * 16;
            pieces.push((at, entry.concat()));
            if nth > 2000 {
                break;
            }
        }
    }
    list.truncate(usize::try_from(chunk).expect("a megabyte"));
    pieces.push((SIZE + (1 + areas * step) * chunk, list));
    let blob = Sparse::new(size - size.min(short.into()), pieces);

    let found = Head::read(&blob);
    if short != 0 {
        assert!(matches!(found, Err(Error::Changes(Fault::Short { .. }))));
        return Ok(());
    }
    assert_eq!(found.expect("the same head"), wanted);
    let (found, used) = memory(|| Exceptions::read(&blob, &wanted));
    match (found, model(&blob, &wanted)) {
        (Ok(found), Ok((model, next))) => {
            assert_eq!(found.len(), model.len() as u64);
            assert!(found.len() <= wanted.disk_chunks());
            assert!(used <= BUFFER + model.len() * 48, "{used} bytes");
            assert_eq!(found.has_room(), next < wanted.store_chunks());
            let mut all = BTreeSet::new();
            let mut at = 0;
            while let Some(bytes) = found.next(at) {
                assert!(bytes.start % chunk == 0 && bytes.end > bytes.start);
                all.extend(
                    (bytes.start..bytes.end)
                        .step_by(chunk as usize)
                        .map(|b| b / chunk),
                );
                at = bytes.end;
            }
            assert!(all.iter().eq(model.keys()));
        }
        (Err(Error::Changes(fault)), Err(wrong)) => {
            let kind = match fault {
                Fault::Field { .. } | Fault::Invalid => Wrong::Header,
                Fault::Chunk { .. } => Wrong::Exception,
                Fault::Twice { .. } => Wrong::Twice,
                Fault::NoEnd { .. } => Wrong::NoEnd,
                Fault::Magic(_) | Fault::Short { .. } => panic!("{fault}"),
            };
            assert_eq!(kind, wrong, "{fault}");
        }
        (found, model) => panic!("{found:?}, and the model says {model:?}"),
    }
    Ok(())
}

fn seeds() -> Vec<Vec<u8>> {
    let head = changes::head(8000, 1200, Origin::default());
    let list = |entries: &[(u64, u64)]| {
        let words = entries.iter().flat_map(|&(old, new)| [old, new]);
        words.flat_map(u64::to_le_bytes).collect::<Vec<u8>>()
    };
    let seed = |fixes: u8, area: u8, short: u8, list: Vec<u8>| {
        let header = [0x7041_6e53, 1, 1, 8].map(u32::to_le_bytes).concat();
        [
            vec![fixes, area, short],
            head.to_bytes().to_vec(),
            header,
            list,
        ]
        .concat()
    };
    vec![
        seed(0, 0, 0, list(&[(7, 2), (8, 3), (6, 4)])),
        seed(7, 1, 0, list(&[(900, 300), (901, 301)])),
        seed(7, 2, 0, list(&[(999, 600)])),
        seed(3, 0, 0, list(&[(7, 2), (7, 3)])),
        seed(3, 0, 1, list(&[])),
    ]
}

fuzz_target!(init: init(seeds), |data: &[u8]| {
    let _ = check(data);
});
