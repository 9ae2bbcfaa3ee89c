// SPDX-License-Identifier: GPL-2.0

//! Stores of changes: random ones against a model, each fault, and hostile ones.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use common::changes::{entry, head, per_area, place, store, Chunk};
use common::{file, lsmt, put, run, Memory};
use overlaybd::changes::exceptions::{full_size, usable};
use overlaybd::changes::head::SIZE;
use overlaybd::changes::{Changed, Exceptions, Fault, Head, Host, Origin, State};
use overlaybd::diff;
use overlaybd::format::Blob;
use overlaybd::progress::silent;
use overlaybd::{Error, FileBlob, Stack};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

/// Returns the fault of the store in `bytes`; `None` if it has none.
fn fault(bytes: &[u8]) -> Option<Fault> {
    let blob = Memory::new(bytes.to_vec());
    let read = Head::read(&blob).and_then(|head| Exceptions::read(&blob, &head));
    match read {
        Ok(_) => None,
        Err(Error::Changes(fault)) => Some(fault),
        Err(other) => unreachable!("{other}"),
    }
}

/// A store of 400 chunks with `count` exceptions, for a disk of 1000 chunks.
fn small(count: u64) -> (Head, Vec<u8>) {
    let head = head(8000, 400, Origin::default());
    let chunks: Vec<Chunk> = (0..count).map(|nth| (999 - nth, vec![1; 4096])).collect();
    let bytes = store(&head, &chunks);
    (head, bytes)
}

/// Returns `bytes` with `value` at byte `at`, and with a correct CRC of the head.
fn with(bytes: &[u8], at: u64, value: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    put(&mut bytes, at as usize, value);
    let crc = overlaybd::crc32c(0, &bytes[..508]);
    put(&mut bytes, 508, &crc.to_le_bytes());
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// The disk with changes reads as it should, and its layer is the one that a comparison of the whole
    /// disk gives.
    #[test]
    fn random_changes(
        sectors in 1..6000u64,
        below in vec((0..700u64, 1..9u64), 0..20),
        changes in btree_map(0..700u64, 0..4u8, 0..600),
        step in 1..40u64,
        granule in prop_oneof![Just(512), Just(4096), Just(65536)],
    ) {
        let mut runs = BTreeMap::new();
        for (at, length) in below {
            if at + length <= sectors && runs.range(at..).next().is_none_or(|(&next, _)| at + length <= next) {
                let free = runs.range(..at).next_back().is_none_or(|(&at0, &len0)| at0 + len0 <= at);
                if free {
                    runs.insert(at, length);
                }
            }
        }
        let runs: Vec<_> = runs.iter().map(|(&at, &length)| run(at, length, false)).collect();
        let layer = file(&lsmt(sectors * 512, &runs, |sector| (sector % 3) as u8));
        let base = Stack::open(&[layer.path()]).unwrap();
        let head = head(sectors, 900, Origin::of(&base, true).unwrap());
        let mut disk = vec![0; base.size() as usize];
        base.read_at(0, &mut disk).unwrap();
        // Exceptions in another order than on the disk.
        let changes: Vec<(u64, u8)> = changes.into_iter().filter(|(at, _)| at * 8 < sectors).collect();
        let mut order: Vec<usize> = (0..changes.len()).collect();
        order.sort_by_key(|&nth| (nth as u64 * step % 41, nth));
        let chunks: Vec<Chunk> = order
            .iter()
            .map(|&nth| {
                let (at, fill) = changes[nth];
                let mut bytes = vec![fill % 3; 4096];
                bytes[0] = fill / 3 * 7;
                (at, bytes)
            })
            .collect();
        for (at, bytes) in &chunks {
            let start = *at as usize * 4096;
            let end = disk.len().min(start + 4096);
            disk[start..end].copy_from_slice(&bytes[..end - start]);
        }
        let store = file(&store(&head, &chunks));
        let store = FileBlob::open(store.path(), None).unwrap();
        prop_assert_eq!(&Head::read(&store).unwrap(), &head);
        let exceptions = Exceptions::read(&store, &head).unwrap();
        prop_assert_eq!(exceptions.len(), chunks.len() as u64);
        let changed = Changed::new(&store, exceptions, &base);
        let mut found = vec![0xee; disk.len()];
        changed.read_at(0, &mut found).unwrap();
        prop_assert!(found == disk);
        let at = disk.len() / 3;
        let mut found = vec![0xee; disk.len() / 2];
        changed.read_at(at as u64, &mut found).unwrap();
        prop_assert!(found == disk[at..at + found.len()]);
        prop_assert!(changed.read_at(changed.size(), &mut [0]).is_err());

        let whole = file(&disk);
        let whole = FileBlob::open(whole.path(), None).unwrap();
        let options = diff::Options { granule, skip_zeros: false, keep_zeros: false };
        let slow = diff::of(&whole, Some(&base), options, &silent).unwrap();
        let fast = diff::of(&changed, Some(&base), options, &silent).unwrap();
        prop_assert_eq!(slow, fast);
    }

    /// Reading ends for any values of exceptions, and accepted exceptions are on the disk.
    #[test]
    fn hostile_exceptions(
        count in 0..300u64,
        edits in vec((any::<prop::sample::Index>(), any::<bool>(), prop_oneof![0..1200u64, any::<u64>()]), 0..6),
    ) {
        let (head, mut bytes) = small(count);
        let is_edited = !edits.is_empty();
        for (nth, is_new, value) in edits {
            let at = entry(&head, nth.index(390) as u64) + 8 * u64::from(is_new);
            put(&mut bytes, at as usize, &value.to_le_bytes());
        }
        let blob = Memory::new(bytes);
        let found = match Exceptions::read(&blob, &head) {
            Ok(found) => found,
            Err(error) => {
                prop_assert!(is_edited && matches!(error, Error::Changes(_)), "{error}");
                return Ok(());
            }
        };
        prop_assert!(found.len() <= 400);
        let (mut at, mut chunks) = (0, 0);
        while let Some(next) = found.next(at) {
            prop_assert!(next.start >= at && next.start < next.end && next.end <= 1000 * 4096);
            chunks += (next.end - next.start) / 4096;
            at = next.end;
        }
        prop_assert_eq!(chunks, found.len());
    }
}

#[test]
fn heads() {
    let (head, bytes) = small(3);
    assert_eq!(fault(&bytes), None);
    for state in [State::Closed, State::Open, State::Overflowed, State::Failed] {
        let head = Head {
            state,
            origin: Origin {
                digest: [7; 32],
                uuid: "6F626431-0000-8000-8000-000000000001".to_owned(),
            },
            host: Host {
                machine: [8; 16],
                boot: [9; 16],
            },
            ..head.clone()
        };
        assert_eq!(Head::from_bytes(&head.to_bytes()), Ok(head));
    }
    let field = |field: &str, value: &[u8], at| {
        let found = fault(&with(&bytes, at, value));
        let right = matches!(&found, Some(Fault::Field { field: name, at: place, .. })
            if *name == field && *place == at);
        assert!(right, "{field}: {found:?}");
    };
    field("head version", &[2], 16);
    field("head state", &[4], 20);
    field("head disk size", &[0; 8], 24);
    field("head disk size", &[0, 0, 0, 0, 0, 0, 5, 0], 24);
    field("head store size", &[0; 8], 32);
    for chunk in [0, 4, 9, 4096] {
        field("head chunk size", &u32::to_le_bytes(chunk), 40);
    }
    let mut damaged = bytes.clone();
    damaged[100] ^= 1;
    assert!(matches!(
        fault(&damaged),
        Some(Fault::Field {
            field: "head CRC",
            ..
        })
    ));
    let other = fault(b"QFI\xfb\0\0\0\x03");
    assert!(matches!(other, Some(Fault::Magic(_))), "{other:?}");
    assert!(matches!(fault(b""), Some(Fault::Magic(_))));
    let there = bytes.len() as u64 - 1;
    let short = Fault::Short {
        there,
        wanted: there + 1,
    };
    assert_eq!(fault(&bytes[..there as usize]), Some(short));
    // The first sector of the head is complete, but the rest of the store is missing.
    assert!(matches!(fault(&bytes[..600]), Some(Fault::Short { .. })));
}

#[test]
fn what_the_kernel_says() {
    let (_, bytes) = small(3);
    assert_eq!(fault(&with(&bytes, SIZE + 4, &[0])), Some(Fault::Invalid));
    for (field, at) in [
        ("snapshot magic", 0),
        ("snapshot version", 8),
        ("snapshot chunk size", 12),
    ] {
        let found = fault(&with(&bytes, SIZE + at, &[0xff]));
        let right = matches!(found, Some(Fault::Field { field: name, .. }) if name == field);
        assert!(right, "{field}: {found:?}");
    }
    // dm-snapshot has not used this store yet.
    let new = with(&bytes, SIZE, &[0; 4]);
    let blob = Memory::new(new);
    let head = Head::read(&blob).unwrap();
    let found = Exceptions::read(&blob, &head).unwrap();
    assert!(found.is_empty() && found.has_room() && found.next(0).is_none());
}

#[test]
fn wrong_exceptions() {
    let (head, bytes) = small(3);
    let edit =
        |nth, at, value: u64| fault(&with(&bytes, entry(&head, nth) + at, &value.to_le_bytes()));
    for (at, value) in [
        (0, 1000),
        (0, u64::MAX),
        (8, 400),
        (8, u64::MAX),
        // Chunks of the store that have exceptions.
        (8, 1),
        (8, 258),
    ] {
        let found = edit(1, at, value);
        let place = entry(&head, 1) + at;
        let right = matches!(found, Some(Fault::Chunk { nth: 1, at, chunk, .. })
            if at == place && chunk == value);
        assert!(right, "{at} {value}: {found:?}");
    }
    let twice = |of, chunk| Some(Fault::Twice { of, chunk });
    assert_eq!(edit(1, 0, 999), twice("disk", 999));
    assert_eq!(edit(1, 8, 2), twice("store", 2));
    // The list has no end: all areas are full, and the last one is cut off.
    let full = place(&head, 2 * per_area(&head) - 1) + 1;
    let cut = Head {
        store: 8 * full,
        ..head.clone()
    };
    let chunks: Vec<Chunk> = (0..2 * per_area(&head)).map(|nth| (nth, vec![1])).collect();
    let bytes = store(&cut, &chunks);
    let count = 2 * per_area(&head);
    assert_eq!(fault(&bytes), Some(Fault::NoEnd { count }));
    let none = Head { store: 7, ..head };
    let bytes = store(
        &Head {
            store: 64,
            ..none.clone()
        },
        &[],
    );
    let blob = Memory::new(bytes);
    let found = Exceptions::read(&blob, &none);
    assert!(matches!(
        found,
        Err(Error::Changes(Fault::NoEnd { count: 0 }))
    ));
}

/// More exceptions than the disk has chunks: reading fails before it has all of them in memory.
#[test]
fn more_exceptions_than_chunks() {
    let head = head(80, 400, Origin::default());
    let chunks: Vec<Chunk> = (0..200).map(|nth| (nth % 10, vec![1])).collect();
    let twice = fault(&store(&head, &chunks));
    assert!(
        matches!(twice, Some(Fault::Twice { of: "disk", .. })),
        "{twice:?}"
    );
}

#[test]
fn sizes() {
    // With 255 chunks, an area would begin after the chunk that stays free.
    for disk in [
        1,
        8,
        9,
        8 * 255,
        2047,
        2048,
        2049,
        8 * 511,
        8 * 256 * 3,
        8 * 256 * 3 + 1,
    ] {
        let store = full_size(disk);
        let chunks = disk.div_ceil(8);
        let head = Head {
            disk,
            ..head(disk, store / 8, Origin::default())
        };
        assert_eq!(usable(store), store, "{disk}");
        // There is room for all chunks of the disk, and for the area after them.
        assert!(place(&head, chunks) <= store / 8, "{disk}");
        let all: Vec<Chunk> = (0..chunks).map(|nth| (nth, vec![1])).collect();
        let bytes = common::changes::store(&head, &all);
        let found = Exceptions::read(&Memory::new(bytes), &head).unwrap();
        assert!(found.len() == chunks && found.has_room(), "{disk}");
    }
    // The exception store doesn't end where its second area would begin.
    assert_eq!(usable(258 * 8), 257 * 8);
    assert_eq!(usable(259 * 8 + 7), 259 * 8);
    let (head, bytes) = small(389);
    let found = Exceptions::read(&Memory::new(bytes), &head).unwrap();
    assert!(found.has_room());
    let full = Head {
        store: 8 * (place(&head, 388) + 1),
        ..head
    };
    let bytes = store(
        &full,
        &(0..389).map(|nth| (nth, vec![1])).collect::<Vec<Chunk>>(),
    );
    let found = Exceptions::read(&Memory::new(bytes), &full).unwrap();
    assert!(!found.has_room());
}

#[test]
fn hosts() {
    let host = |machine, boot| Host {
        machine: [machine; 16],
        boot: [boot; 16],
    };
    let here = host(1, 1);
    // The same machine; after a reboot; a container on it; with an unknown machine or boot ID.
    for other in [here, host(1, 2), host(2, 1), host(0, 2), host(0, 0)] {
        assert!(
            !here.is_other(&other) && !other.is_other(&here),
            "{other:?}"
        );
    }
    for other in [host(2, 2), host(2, 0)] {
        assert!(here.is_other(&other) && other.is_other(&here), "{other:?}");
    }
    assert!(host(1, 0).is_other(&host(2, 0)));
}

#[test]
fn origins() {
    let uuid = "6F626431-AAAA-8AAA-8AAA-AAAAAAAAAAAA";
    let layer = |size: u64, runs: &[_]| file(&lsmt(size, runs, |_| 1));
    let stack = |file: &tempfile::NamedTempFile| Stack::open(&[file.path()]).unwrap();
    let of = |file: &tempfile::NamedTempFile| Origin::of(&stack(file), true).unwrap();
    let a = of(&layer(4096, &[run(0, 1, false)]));
    assert_eq!(a, of(&layer(4096, &[run(0, 1, false)])));
    assert_ne!(a, of(&layer(4608, &[run(0, 1, false)])));
    assert_ne!(a, of(&layer(4096, &[run(1, 1, false)])));
    // Layers without UUID, with the same index and other data, all of it or only the end.
    let long = |fill: u8| file(&lsmt(1 << 20, &[run(0, 2048, false)], |_| fill));
    assert_ne!(of(&long(1)), of(&long(2)));
    let end = |fill: u8| {
        let runs = [run(0, 2048, false)];
        file(&lsmt(1 << 20, &runs, |sector| match sector > 2040 {
            true => fill,
            false => 1,
        }))
    };
    assert_eq!(of(&end(2)), of(&end(2)));
    assert_ne!(of(&end(1)), of(&end(2)));
    assert_eq!(a.uuid, "");
    // A UUID that is made from the content of all layers: the index is not hashed, only the size of the disk.
    let placed = |size: u64, runs: &[overlaybd::lsmt_writer::Run]| {
        let mut bytes = lsmt(size, runs, |_| 1);
        let trailer = bytes.len() - 4096;
        for at in [0, trailer] {
            put(
                &mut bytes,
                at + overlaybd::on_disk::lsmt::field::UUID,
                uuid.as_bytes(),
            );
        }
        file(&bytes)
    };
    let b = of(&placed(4096, &[run(0, 1, false)]));
    assert_eq!(b, of(&placed(4096, &[run(1, 1, false)])));
    assert_ne!(b, of(&placed(4608, &[run(0, 1, false)])));
    assert_eq!(b.uuid, uuid);
    // Nobody has checked that the UUID was made from these layers: the index is hashed, too.
    let unchecked = |file| Origin::of(&stack(&file), false).unwrap();
    let c = unchecked(placed(4096, &[run(0, 1, false)]));
    assert_ne!(b, c);
    assert_ne!(c, unchecked(placed(4096, &[run(1, 1, false)])));
    assert_eq!(c.uuid, uuid);
}
