// SPDX-License-Identifier: GPL-2.0

//! Edits valid images so that each fault of the readers occurs in at least one test.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::HashSet;

use common::{checksum, file, lsmt, lz4, put, run, sign, wrapped, zfile};
use overlaybd::error::{BlockFault, Error};
use overlaybd::format::{lsmt as lsmt_format, zfile as zfile_format, Fault};
use overlaybd::progress::silent;
use overlaybd::wrap::Wrapping;
use overlaybd::zfile_writer::Options;
use overlaybd::{LayerReader, Stack};

/// Faults that no test here causes.
const UNREACHABLE: &[Fault] = &[
    // Only the kernel's zfile target reports this: the reader tested here takes anything but a
    // ZFile as a plain file.
    Fault::ZfileMagic,
    // A case would need 128 million segments, which take 2 GiB.
    Fault::LsmtMergedCount,
];

/// A case: its name, the fault, and the image.
type Case = (&'static str, Fault, Vec<u8>);

fn open(bytes: &[u8]) -> overlaybd::Result<Stack> {
    let file = file(bytes);
    Stack::open(&[file.path()])
}

fn layer() -> Vec<u8> {
    lsmt(
        1 << 20,
        &[run(0, 8, false), run(16, 8, false), run(32, 8, true)],
        |s| s as u8,
    )
}

/// Returns random bytes, so that no block is stored in fewer bytes than it has.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}

/// Returns a ZFile with an edited header at byte 0 and a correct digest.
fn header(edit: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = zfile(&layer(), lz4());
    edit(&mut bytes);
    sign(&mut bytes, 0);
    bytes
}

/// Returns a ZFile whose trailer is used, with an edited trailer and a correct digest.
fn trailer(edit: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let options = Options {
        overwrite_header: false,
        ..lz4()
    };
    let mut bytes = zfile(&layer(), options);
    let at = bytes.len() - 512;
    edit(&mut bytes[at..]);
    sign(&mut bytes, at);
    bytes
}

/// Returns a plain layer of which one part is edited: header, index or trailer.
fn plain(part: Part, edit: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = layer();
    let at = match part {
        Part::Header => 0,
        Part::Index => 4096 + 16 * 512,
        Part::Trailer => bytes.len() - 4096,
    };
    edit(&mut bytes[at..]);
    bytes
}

enum Part {
    Header,
    Index,
    Trailer,
}

fn tar(edit: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = wrapped(
        &layer(),
        Wrapping {
            zfile: None,
            tar: true,
        },
    );
    edit(&mut bytes);
    bytes
}

fn tar_cases() -> Vec<Case> {
    vec![
        (
            "no header after the pax header",
            Fault::TarHeader,
            tar(|b| b[1024] ^= 1),
        ),
        (
            "pax size beyond the end",
            Fault::TarSize,
            tar(|b| b.truncate(4096)),
        ),
        (
            "pax record without a length",
            Fault::TarPax,
            tar(|b| b[512] = b'x'),
        ),
        (
            "pax record longer than its payload",
            Fault::TarPax,
            tar(|b| b[512] = b'9'),
        ),
        (
            "a directory",
            Fault::TarMember,
            tar(|b| {
                b[1024 + 156] = b'5';
                checksum(b, 1024);
            }),
        ),
    ]
}

fn zfile_cases() -> Vec<Case> {
    use zfile_format::field::{
        ALGORITHM, BLOCK_SIZE, DICT_SIZE, DIGEST, FLAGS, INDEX_COUNT, INDEX_CRC, INDEX_OFFSET,
        ORIGINAL_SIZE,
    };
    let index_at = |bytes: &[u8]| {
        usize::try_from(u64::from_le_bytes(
            bytes[INDEX_OFFSET..][..8].try_into().unwrap(),
        ))
        .unwrap()
    };
    // Entries are checked before the CRC of the index.
    let entry = |bytes: &mut [u8], value: u32| {
        let at = index_at(bytes);
        put(bytes, at, &value.to_le_bytes());
    };
    vec![
        (
            "no header bit",
            Fault::ZfileHeaderFlags,
            header(|b| b[FLAGS] &= !1),
        ),
        ("header of an index file", Fault::ZfileHeaderFlags, {
            let mut bytes = trailer(|_| {});
            bytes[FLAGS] &= !2;
            sign(&mut bytes, 0);
            bytes
        }),
        ("header digest", Fault::ZfileHeaderDigest, {
            let mut bytes = zfile(&layer(), lz4());
            bytes[DIGEST] ^= 1;
            bytes
        }),
        (
            "no trailer",
            Fault::ZfileTrailerMagic,
            trailer(|b| b[0] ^= 1),
        ),
        (
            "trailer is a header",
            Fault::ZfileTrailerFlags,
            trailer(|b| b[FLAGS] |= 1),
        ),
        (
            "trailer isn't sealed",
            Fault::ZfileTrailerFlags,
            trailer(|b| b[FLAGS] &= !4),
        ),
        ("trailer digest", Fault::ZfileTrailerDigest, {
            let mut bytes = trailer(|_| {});
            let at = bytes.len() - 512 + DIGEST;
            bytes[at] ^= 1;
            bytes
        }),
        ("digest of a spare trailer", Fault::ZfileTrailerDigest, {
            let mut bytes = zfile(&layer(), lz4());
            let at = bytes.len() - 512 + DIGEST;
            bytes[at] ^= 1;
            bytes
        }),
        (
            "dictionary",
            Fault::ZfileDictionary,
            header(|b| b[DICT_SIZE] = 1),
        ),
        (
            "compressed index",
            Fault::ZfileCompressedIndex,
            header(|b| b[FLAGS] |= 1 << 5),
        ),
        (
            "algorithm 0",
            Fault::ZfileAlgorithm,
            header(|b| b[ALGORITHM] = 0),
        ),
        (
            "algorithm 3",
            Fault::ZfileAlgorithm,
            trailer(|b| b[ALGORITHM] = 3),
        ),
        (
            "block size 0",
            Fault::ZfileBlockSize,
            header(|b| put(b, BLOCK_SIZE, &0u32.to_le_bytes())),
        ),
        (
            "block size 128 KiB",
            Fault::ZfileBlockSize,
            header(|b| put(b, BLOCK_SIZE, &(128u32 << 10).to_le_bytes())),
        ),
        (
            "more than 10^9 blocks",
            Fault::ZfileIndexCount,
            trailer(|b| put(b, INDEX_COUNT, &1_000_000_001u64.to_le_bytes())),
        ),
        (
            "a block too many",
            Fault::ZfileBlockCount,
            header(|b| b[INDEX_COUNT] += 1),
        ),
        (
            "size 2^64 - 1",
            Fault::ZfileBlockCount,
            header(|b| put(b, ORIGINAL_SIZE, &[0xff; 8])),
        ),
        (
            "index beyond the end",
            Fault::ZfileIndexRange,
            header(|b| put(b, INDEX_OFFSET, &(1u64 << 40).to_le_bytes())),
        ),
        (
            "index end wraps",
            Fault::ZfileIndexRange,
            trailer(|b| put(b, INDEX_OFFSET, &(u64::MAX - 3).to_le_bytes())),
        ),
        (
            "index in the header",
            Fault::ZfileIndexRange,
            trailer(|b| put(b, INDEX_OFFSET, &0u64.to_le_bytes())),
        ),
        (
            "index CRC",
            Fault::ZfileIndexCrc,
            header(|b| b[INDEX_CRC] ^= 1),
        ),
        (
            "entry of the CRC's length",
            Fault::ZfileEntry,
            header(|b| entry(b, 4)),
        ),
        (
            "entry above the bound",
            Fault::ZfileEntry,
            header(|b| entry(b, 4096 + 16 + 16 + 5)),
        ),
        ("blocks reach into the index", Fault::ZfileEntryRange, {
            let mut bytes = zfile(&noise(4096), lz4());
            // The ZFile has one block, which ends where the index starts.
            let at = index_at(&bytes);
            let stored = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            entry(&mut bytes, stored + 1);
            bytes
        }),
    ]
}

fn lsmt_cases() -> Vec<Case> {
    use lsmt_format::field::{FLAGS, INDEX_COUNT, INDEX_OFFSET, VIRTUAL_SIZE};
    let entry = |nth: usize, edit: fn(&mut u64, &mut u64)| {
        plain(Part::Index, |b| {
            let word = |b: &[u8], at: usize| u64::from_le_bytes(b[at..at + 8].try_into().unwrap());
            let (mut place, mut source) = (word(b, nth * 16), word(b, nth * 16 + 8));
            edit(&mut place, &mut source);
            put(b, nth * 16, &place.to_le_bytes());
            put(b, nth * 16 + 8, &source.to_le_bytes());
        })
    };
    vec![
        ("header only", Fault::Truncated, layer()[..4096].to_vec()),
        ("empty", Fault::Truncated, Vec::new()),
        (
            "no magic",
            Fault::LsmtMagic,
            plain(Part::Header, |b| b[0] ^= 1),
        ),
        (
            "a ZFile in a ZFile",
            Fault::LsmtIsZfile,
            zfile(&zfile(&layer(), lz4()), lz4()),
        ),
        (
            "no header bit",
            Fault::LsmtHeaderFlags,
            plain(Part::Header, |b| b[FLAGS] &= !1),
        ),
        (
            "index file",
            Fault::LsmtHeaderFlags,
            plain(Part::Header, |b| b[FLAGS] &= !2),
        ),
        (
            "no trailer",
            Fault::LsmtTrailerMagic,
            plain(Part::Trailer, |b| b[0] ^= 1),
        ),
        (
            "trailer isn't sealed",
            Fault::LsmtTrailerFlags,
            plain(Part::Trailer, |b| b[FLAGS] &= !4),
        ),
        (
            "1000001 entries",
            Fault::LsmtIndexCount,
            plain(Part::Trailer, |b| {
                put(b, INDEX_COUNT, &1_000_001u64.to_le_bytes())
            }),
        ),
        (
            "index in the trailer",
            Fault::LsmtIndexRange,
            plain(Part::Trailer, |b| b[INDEX_COUNT] += 1),
        ),
        (
            "index end wraps",
            Fault::LsmtIndexRange,
            plain(Part::Trailer, |b| {
                put(b, INDEX_OFFSET, &(u64::MAX - 15).to_le_bytes())
            }),
        ),
        (
            "entries overlap",
            Fault::LsmtEntryOrder,
            entry(1, |place, _| *place -= 9),
        ),
        (
            "length 0",
            Fault::LsmtEntryLength,
            entry(0, |place, _| *place &= (1 << 50) - 1),
        ),
        (
            "end above 2^50",
            Fault::LsmtEntryLength,
            entry(2, |place, _| *place |= (1 << 50) - 2),
        ),
        (
            "data in the header",
            Fault::LsmtEntryMapping,
            entry(0, |_, source| *source = 7),
        ),
        (
            "data in the index",
            Fault::LsmtEntryMapping,
            entry(1, |_, source| *source += 1),
        ),
        (
            "virtual size above 2^59",
            Fault::LsmtVirtualSizeRange,
            plain(Part::Trailer, |b| {
                put(b, VIRTUAL_SIZE, &((1u64 << 59) + 1).to_le_bytes())
            }),
        ),
        (
            "no virtual size",
            Fault::LsmtVirtualSize,
            plain(Part::Trailer, |b| put(b, VIRTUAL_SIZE, &0u64.to_le_bytes())),
        ),
    ]
}

#[test]
fn every_fault() {
    assert!(open(&layer()).is_ok());
    assert!(open(&header(|_| {})).is_ok());
    assert!(open(&trailer(|_| {})).is_ok());
    assert!(open(&tar(|_| {})).is_ok());

    let mut seen = HashSet::new();
    let cases = [tar_cases(), zfile_cases(), lsmt_cases()].concat();
    for (what, wanted, bytes) in cases {
        let error = open(&bytes).err();
        let found = error.as_ref().and_then(Error::fault);
        assert_eq!(found, Some(wanted), "{what}: {error:?}");
        seen.insert(wanted.field().to_owned() + &wanted.phrase().to_string_lossy());
    }
    for count in [0, 256] {
        let error = Stack::open(&vec![""; count]).err();
        assert_eq!(
            error.as_ref().and_then(Error::fault),
            Some(Fault::LsmtLayerCount)
        );
    }
    for &fault in Fault::ALL {
        let name = fault.field().to_owned() + &fault.phrase().to_string_lossy();
        let covered = seen.contains(&name) || fault == Fault::LsmtLayerCount;
        let reachable = !UNREACHABLE.contains(&fault);
        assert_eq!(
            covered, reachable,
            "{fault:?}: no test causes it, or it is in UNREACHABLE although one does"
        );
    }
}

#[test]
fn messages_tell_field_place_found_and_expected() {
    let text = |bytes: &[u8]| open(bytes).err().map(|error| error.cause().to_string());
    let bytes = header(|b| put(b, zfile_format::field::BLOCK_SIZE, &6000u32.to_le_bytes()));
    assert_eq!(
        text(&bytes).as_deref(),
        Some("zfile block_size at byte 72: found 6000, expected a power of two from 512 to 65536")
    );
    for (what, _, bytes) in [tar_cases(), zfile_cases(), lsmt_cases()].concat() {
        let text = text(&bytes).unwrap_or_default();
        let is_whole = text.len() > 20 || text == "the file is empty";
        assert!(is_whole && !text.contains("Error"), "{what}: {text}");
    }
}

#[test]
fn corrupt_blocks() {
    let content = lsmt(1 << 20, &[run(0, 100, false)], |sector| sector as u8);
    let check = |options: Options, edit: fn(&mut Vec<u8>)| {
        let mut bytes = zfile(&content, options);
        edit(&mut bytes);
        let file = file(&bytes);
        let layer = LayerReader::open(file.path(), None).unwrap();
        let bad = layer.verify(&silent).unwrap();
        assert_eq!(bad.len(), 1, "{bad:?}");
        // Only reads of that block fail.
        let stack = Stack::new(vec![layer]).unwrap();
        let mut buf = vec![0; 512];
        let failed = (0..100)
            .filter(|&sector| {
                overlaybd::format::Blob::read_at(&stack, sector * 512, &mut buf).is_err()
            })
            .count();
        assert!((1..=8).contains(&failed), "{failed}");
        bad[0]
    };
    // Corrupt the second block: opening the layer reads the first one, which has the LSMT header.
    let flip = |bytes: &mut Vec<u8>| {
        let index = usize::try_from(u64::from_le_bytes(bytes[40..48].try_into().unwrap())).unwrap();
        let first = u32::from_le_bytes(bytes[index..index + 4].try_into().unwrap());
        bytes[512 + first as usize] ^= 0xff;
    };
    let bad = check(lz4(), flip);
    assert_eq!(bad.block, 1);
    assert!(matches!(bad.fault, BlockFault::Crc { .. }), "{bad}");
    let no_crc = Options {
        crc: false,
        ..lz4()
    };
    let bad = check(no_crc, flip);
    assert_eq!(bad.block, 1);
    assert!(
        matches!(bad.fault, BlockFault::Data | BlockFault::Length { .. }),
        "{bad}"
    );
}
