// SPDX-License-Identifier: GPL-2.0

//! Blocks of a ZFile, some of which are compressed by the target and others the input's own bytes. The
//! target compares reads of any range with the blocks decompressed one by one, and blocks that it has
//! compressed with their content.

#![no_main]
#![allow(missing_docs, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use overlaybd::codec::{Decoder, Encoder, Method};
use overlaybd::format::zfile::{block_crc, field, flag, Algorithm, CRC_SIZE};
use overlaybd::format::Blob;
use overlaybd::zfile_writer::Options;
use overlaybd::{crc32c, Error, FileBlob, Part, ZfileReader};
use overlaybd_fuzz::common::{self, put};
use overlaybd_fuzz::{init, memory};

/// Largest number of blocks in a file.
const MAX_BLOCKS: usize = 40;

struct Case {
    options: Options,
    /// Length of the last block in bytes.
    last: u32,
    /// The stored bytes of each block, without CRC, and its content if known.
    blocks: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    /// Number of the block with a wrong CRC.
    wrong_crc: usize,
    /// Two numbers that select a range.
    range: [u32; 2],
}

/// Returns the first `len` bytes of `text`, repeated.
fn over_and_over(text: &[u8], len: usize) -> Vec<u8> {
    let mut content = text.repeat(len / text.len() + 1);
    content.truncate(len);
    content
}

/// Reads flags and numbers; then for each block its kind and length in two bytes, and that many
/// bytes.
fn read(data: &[u8]) -> Result<Case> {
    let mut input = Unstructured::new(data);
    let flags: u8 = input.arbitrary()?;
    let shift: u8 = input.arbitrary()?;
    let algorithm = match flags & 1 {
        0 => Algorithm::Lz4,
        _ => Algorithm::Zstd,
    };
    let level = match flags & 8 {
        0 => None,
        _ => Some(2 + i32::from(flags >> 4) % 8),
    };
    let method = Method { algorithm, level };
    let block_size = 1 << (9 + shift % 8);
    let last = 1 + u32::from(input.arbitrary::<u16>()?) % block_size;
    let wrong_crc = input.arbitrary::<u8>()?.into();
    let range = input.arbitrary()?;
    let mut blocks = Vec::new();
    while blocks.len() < MAX_BLOCKS && !input.is_empty() {
        let [kind, len]: [u8; 2] = input.arbitrary()?;
        let len = usize::from(u16::from_be_bytes([kind & 7, len]));
        let bytes = input.bytes(len.min(input.len()))?.to_vec();
        blocks.push((kind, bytes));
    }
    let count = blocks.len();
    let mut encoder = Encoder::new(method).expect("a known level");
    let mut block = |(nth, (kind, bytes)): (usize, (u8, Vec<u8>))| {
        let len = if nth + 1 == count { last } else { block_size };
        if kind & 0x80 == 0 {
            return (bytes, None);
        }
        let content = over_and_over(&[&bytes[..], &[0]].concat(), len as usize);
        let mut stored = Vec::new();
        encoder
            .encode(&content, &mut stored)
            .expect("blocks can be compressed");
        assert!(stored.len() <= algorithm.bound(len) as usize);
        (stored, Some(content))
    };
    Ok(Case {
        options: Options {
            method,
            block_size,
            crc: flags & 2 != 0,
            overwrite_header: flags & 4 != 0,
            whole_sectors: false,
        },
        last,
        blocks: blocks.into_iter().enumerate().map(&mut block).collect(),
        wrong_crc,
        range,
    })
}

impl Case {
    fn len_of(&self, nth: usize) -> usize {
        let last = nth + 1 == self.blocks.len();
        (if last {
            self.last
        } else {
            self.options.block_size
        }) as usize
    }

    fn size(&self) -> usize {
        (0..self.blocks.len()).map(|nth| self.len_of(nth)).sum()
    }

    /// Returns the ZFile. Its index is valid except for entries that are out of range.
    fn file(&self) -> Vec<u8> {
        let mut bytes = common::zfile(&[], self.options);
        let trailer = bytes.split_off(512);
        let mut index = Vec::new();
        for (nth, (stored, _)) in self.blocks.iter().enumerate() {
            bytes.extend(stored);
            let mut len = stored.len() as u32;
            if self.options.crc {
                let crc = block_crc(stored, crc32c) ^ u32::from(nth == self.wrong_crc);
                bytes.extend(crc.to_le_bytes());
                len += CRC_SIZE;
            }
            index.extend(len.to_le_bytes());
        }
        let index_offset = bytes.len() as u64;
        bytes.extend(&index);
        bytes.extend(trailer);
        let at = if self.options.overwrite_header {
            0
        } else {
            bytes.len() - 512
        };
        let header = &mut bytes[at..at + 512];
        put(header, field::INDEX_OFFSET, &index_offset.to_le_bytes());
        put(
            header,
            field::INDEX_COUNT,
            &(self.blocks.len() as u64).to_le_bytes(),
        );
        put(
            header,
            field::ORIGINAL_SIZE,
            &(self.size() as u64).to_le_bytes(),
        );
        put(header, field::INDEX_CRC, &crc32c(0, &index).to_le_bytes());
        assert_eq!(u64::from(header[field::FLAGS]) & flag::DIGEST, flag::DIGEST);
        common::sign(&mut bytes, at);
        bytes
    }

    /// Returns the content of each block; `Err` if it cannot be decompressed (`false`) or its CRC
    /// is wrong (`true`).
    fn content(&self) -> Vec<std::result::Result<Vec<u8>, bool>> {
        let mut decoder = Decoder::default();
        let content = self
            .blocks
            .iter()
            .enumerate()
            .map(|(nth, (stored, known))| {
                let wrong_crc = self.options.crc && nth == self.wrong_crc;
                let mut out = vec![0xee; self.len_of(nth)];
                let decoded = decoder.decode(self.options.method.algorithm, stored, &mut out);
                if let Some(known) = known {
                    assert!(decoded.is_ok() && out == *known, "not what was compressed");
                }
                match (wrong_crc, decoded) {
                    (false, Ok(())) => Ok(out),
                    _ => Err(wrong_crc),
                }
            });
        content.collect()
    }
}

fn check(data: &[u8]) -> Result<()> {
    let case = read(data)?;
    let bytes = case.file();
    let file = common::file(&bytes);
    let blob = Arc::new(FileBlob::open(file.path(), None).expect("a file"));
    let empty = u32::from(case.options.crc) * CRC_SIZE;
    let algorithm = case.options.method.algorithm;
    let in_range = case.blocks.iter().enumerate().all(|(nth, (stored, _))| {
        !stored.is_empty() && stored.len() <= algorithm.bound(case.len_of(nth) as u32) as usize
    });
    let (opened, used) = memory(|| ZfileReader::open(Part::whole(blob)));
    // A piece of the index, and the jump table; on failure, also the error.
    assert!(
        used <= 16 * (MAX_BLOCKS + 1) + 512 + usize::from(opened.is_err()) * 512,
        "{used}"
    );
    let zfile = match opened {
        Ok(zfile) => zfile.expect("a ZFile"),
        Err(error) => {
            assert!(!in_range, "{error}");
            return Ok(());
        }
    };
    assert!(in_range);
    let stored = bytes.len() as u64 - 1024 - 4 * case.blocks.len() as u64;
    assert_eq!(zfile.stored_len(), stored);
    assert!(stored >= u64::from(empty) * case.blocks.len() as u64);

    let content = case.content();
    let size = case.size();
    assert_eq!(zfile.size(), size as u64);
    let shift = case.options.block_size.trailing_zeros();
    let (a, b) = (
        case.range[0] as usize % (size + 1),
        case.range[1] as usize % (size + 1),
    );
    let (a, b) = (a.min(b), a.max(b));
    for (start, end) in [
        (a, b),
        (0, size),
        (a, size.min(a + 1)),
        (b, size.min(b + 1)),
        (0, b),
    ] {
        let mut found = vec![0xdd; end - start];
        let (result, used) = memory(|| zfile.read_at(start as u64, &mut found));
        // The stored bytes, a block of which only a part is wanted, and the block that the reader keeps for the
        // next read.
        let bound = bytes.len() + 2 * case.options.block_size as usize + 1024;
        assert!(used <= bound, "{used} bytes, at most {bound}");
        let blocks = start >> shift..if start == end {
            start >> shift
        } else {
            ((end - 1) >> shift) + 1
        };
        let first_bad = blocks.clone().find(|&nth| content[nth].is_err());
        match (result, first_bad) {
            (Ok(()), None) => {
                let wanted: Vec<&[u8]> = content[blocks.clone()]
                    .iter()
                    .flatten()
                    .map(Vec::as_slice)
                    .collect();
                let wanted = wanted.concat();
                let skip = start - (blocks.start << shift);
                assert!(found == wanted[skip.min(wanted.len())..][..end - start]);
            }
            (Err(Error::Block(error)), Some(bad)) => assert_eq!(error.block, bad as u64),
            (result, bad) => panic!("{start}..{end}: {result:?}, first bad block {bad:?}"),
        }
    }
    assert!(zfile.read_at(size as u64, &mut [0]).is_err());

    let bad = zfile
        .verify(&overlaybd::progress::silent)
        .expect("the file can be read");
    let bad: Vec<u64> = bad.iter().map(|error| error.block).collect();
    let wanted = (0..).zip(&content).filter(|(_, block)| block.is_err());
    assert!(wanted.map(|(nth, _)| nth).eq(bad));
    Ok(())
}

fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for flags in [0, 1, 2, 3, 4, 5, 0x1e, 0x3f] {
        let mut seed = vec![flags, flags % 4 + 1, 0xff, 0x01, 0xff];
        seed.extend(100u32.to_le_bytes());
        seed.extend(5000u32.to_le_bytes());
        let algorithm = if flags & 1 == 0 {
            Algorithm::Lz4
        } else {
            Algorithm::Zstd
        };
        let mut encoder = Encoder::new(Method {
            algorithm,
            level: None,
        })
        .expect("a known level");
        let block_size = 512usize << (flags % 4 + 1);
        let content = over_and_over(b"to be or not ", block_size);
        let mut stored = Vec::new();
        encoder
            .encode(&content, &mut stored)
            .expect("blocks can be compressed");
        // One block as stored, then three by their content.
        seed.extend([(stored.len() >> 8) as u8, stored.len() as u8]);
        seed.extend(stored);
        for text in [&b"abc"[..], &[7; 200], b""] {
            seed.extend([0x80, text.len() as u8]);
            seed.extend(text);
        }
        seeds.push(seed);
    }
    seeds
}

fuzz_target!(init: init(seeds), |data: &[u8]| {
    let _ = check(data);
});
