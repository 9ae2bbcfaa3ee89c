// SPDX-License-Identifier: GPL-2.0

//! Whole images. The target makes layers, in ZFiles and tars or not, and then changes bytes at any
//! level, with or without correcting the checksums. The content of an unchanged image must equal a
//! model; a changed image must be refused, or reads of parts must equal the read of the whole.

#![no_main]
#![allow(missing_docs, clippy::expect_used, clippy::panic)]

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use overlaybd::codec::Method;
use overlaybd::format::zfile::{field, flag, Algorithm, RawHeader};
use overlaybd::format::Blob;
use overlaybd::lsmt_writer::Run;
use overlaybd::wrap::Wrapping;
use overlaybd::zfile_writer::Options;
use overlaybd::{crc32c, LayerReader, Stack};
use overlaybd_fuzz::common::{self, checksum, put};
use overlaybd_fuzz::{init, memory};

/// Size limit of a layer's runs, in sectors.
const SECTORS: u64 = 96;
/// Largest disk that is read as a whole, in bytes.
const MAX_READ: u64 = 1 << 20;
/// Memory limit in bytes for opening layers and for each read: a piece of an index, 1 MiB, and the
/// tables of files of some ten KiB.
const MAX_MEMORY: usize = 4 << 20;

/// The levels of a layer that a patch can change, innermost first: the LSMT file, the ZFile, the tar.
const LSMT: u8 = 0;
const ZFILE: u8 = 1;
const FILE: u8 = 2;

/// A change of some bytes.
struct Patch {
    layer: u8,
    level: u8,
    /// Byte offset from the start; if negative, from the end.
    at: i16,
    value: Vec<u8>,
}

struct Layer {
    virtual_size: u64,
    runs: Vec<Run>,
    wrapping: Wrapping,
    /// Whether checksums are corrected after a change.
    repair: bool,
}

struct Case {
    layers: Vec<Layer>,
    patches: Vec<Patch>,
    reads: Vec<(u64, u16)>,
}

fn read_layer(input: &mut Unstructured<'_>) -> Result<Layer> {
    let [flags, shift, runs, odd, sectors]: [u8; 5] = input.arbitrary()?;
    let algorithm = match flags & 1 {
        0 => Algorithm::Lz4,
        _ => Algorithm::Zstd,
    };
    let zfile = Options {
        method: Method {
            algorithm,
            level: None,
        },
        block_size: 1 << (9 + shift % 8),
        crc: flags & 2 != 0,
        overwrite_header: flags & 4 != 0,
        whole_sectors: flags & 64 != 0,
    };
    let mut layer = Layer {
        virtual_size: (u64::from(sectors) * 512).saturating_sub(odd.into()),
        runs: Vec::new(),
        wrapping: Wrapping {
            zfile: (flags & 8 != 0).then_some(zfile),
            tar: flags & 16 != 0,
        },
        repair: flags & 32 != 0,
    };
    let mut at = 0;
    for _ in 0..runs % 16 {
        let [gap, length]: [u8; 2] = input.arbitrary()?;
        let run = common::run(
            at + u64::from(gap % 32),
            u64::from(length & 0x1f) + 1,
            length & 0x80 != 0,
        );
        at = run.end();
        if at > SECTORS {
            break;
        }
        layer.runs.push(run);
    }
    Ok(layer)
}

/// Reads the numbers of layers, patches and reads, then the layers, the reads and the patches.
fn read(data: &[u8]) -> Result<Case> {
    let mut input = Unstructured::new(data);
    let [layers, patches, reads]: [u8; 3] = input.arbitrary()?;
    let mut case = Case {
        layers: Vec::new(),
        patches: Vec::new(),
        reads: Vec::new(),
    };
    for _ in 0..=layers % 4 {
        case.layers.push(read_layer(&mut input)?);
    }
    for _ in 0..reads % 8 {
        case.reads.push((input.arbitrary()?, input.arbitrary()?));
    }
    for _ in 0..patches % 16 {
        if input.is_empty() {
            break;
        }
        let [layer, level]: [u8; 2] = input.arbitrary()?;
        let at = input.arbitrary()?;
        let len: u8 = input.arbitrary()?;
        let value = input
            .bytes(input.len().min(usize::from(len % 32) + 1))?
            .to_vec();
        case.patches.push(Patch {
            layer: layer % (case.layers.len() as u8),
            level: level % 3,
            at,
            value,
        });
    }
    Ok(case)
}

/// Returns the byte that fills a sector of a layer: never 0, and hard to compress.
fn fill(layer: usize, sector: u64) -> u8 {
    (layer as u64 * 37 + sector * 11) as u8 | 1
}

/// Corrects the digests and the index CRC of a ZFile, if the bytes still are one.
fn repair_zfile(bytes: &mut [u8]) -> Option<()> {
    let last = bytes.len().checked_sub(512)?;
    let header =
        |bytes: &[u8], at: usize| RawHeader::parse(bytes.get(at..at + 512)?.try_into().ok()?);
    let at = if header(bytes, 0)?.has(flag::OVERWRITTEN) {
        0
    } else {
        last
    };
    let raw = header(bytes, at)?;
    let start = usize::try_from(raw.index_offset).ok()?;
    let len = usize::try_from(raw.index_count.checked_mul(4)?).ok()?;
    if let Some(index) = bytes.get(start..start.checked_add(len)?) {
        let crc = crc32c(0, index);
        put(bytes, at + field::INDEX_CRC, &crc.to_le_bytes());
    }
    common::sign(bytes, 0);
    common::sign(bytes, last);
    Some(())
}

impl Case {
    /// Applies the patches of a level. Returns whether there were any.
    fn patch(&self, layer: usize, level: u8, bytes: &mut [u8]) -> bool {
        let mut any = false;
        for patch in &self.patches {
            if (usize::from(patch.layer), patch.level) != (layer, level) {
                continue;
            }
            let at = match usize::try_from(patch.at) {
                Ok(at) => at,
                Err(_) => bytes.len().saturating_sub(patch.at.unsigned_abs().into()),
            };
            for (byte, &value) in bytes.iter_mut().skip(at).zip(&patch.value) {
                *byte = value;
            }
            any = true;
        }
        any
    }

    /// Returns the file of a layer, and whether any byte of it was changed.
    fn file(&self, nth: usize) -> (Vec<u8>, bool) {
        let layer = &self.layers[nth];
        let mut bytes = common::lsmt(layer.virtual_size, &layer.runs, |sector| fill(nth, sector));
        let mut changed = self.patch(nth, LSMT, &mut bytes);
        let Wrapping { zfile, tar } = layer.wrapping;
        if let Some(options) = zfile {
            bytes = common::zfile(&bytes, options);
            if self.patch(nth, ZFILE, &mut bytes) {
                changed = true;
                if layer.repair {
                    repair_zfile(&mut bytes);
                }
            }
        }
        if tar {
            bytes = common::wrapped(&bytes, Wrapping { zfile: None, tar });
            if self.patch(nth, FILE, &mut bytes) {
                changed = true;
                if layer.repair {
                    checksum(&mut bytes, 0);
                    checksum(&mut bytes, 1024);
                }
            }
        }
        (bytes, changed)
    }

    /// Returns the content of the disk without changes; `None` if no layer has a size.
    fn model(&self) -> Option<Vec<u8>> {
        let sizes = self.layers.iter().map(|layer| layer.virtual_size);
        let size = sizes.rev().find(|&size| size > 0)? as usize;
        let mut disk = vec![0; size.next_multiple_of(512).max(SECTORS as usize * 512)];
        for (nth, layer) in self.layers.iter().enumerate() {
            for run in &layer.runs {
                for sector in run.offset..run.end() {
                    let byte = if run.zeroed { 0 } else { fill(nth, sector) };
                    disk[sector as usize * 512..][..512].fill(byte);
                }
            }
        }
        disk[size..].fill(0);
        disk.truncate(size.next_multiple_of(512));
        Some(disk)
    }
}

/// Opens `files` as a stack.
fn open(files: &[tempfile::NamedTempFile]) -> overlaybd::Result<Stack> {
    let layers = files
        .iter()
        .map(|file| LayerReader::open(file.path(), None))
        .collect::<overlaybd::Result<_>>()?;
    Stack::new(layers)
}

/// Reads parts of the disk and compares them with `whole`, if that could be read.
fn check_reads(stack: &Stack, reads: &[(u64, u16)], whole: Option<&[u8]>) {
    let size = stack.size();
    let mut buf = vec![0; 1 << 16];
    for &(offset, len) in reads {
        let offset = if size == 0 { 0 } else { offset % size };
        let len = u64::from(len).min(size - offset) as usize;
        let (result, used) = memory(|| stack.read_at(offset, &mut buf[..len]));
        assert!(used <= MAX_MEMORY, "{used} bytes for a read");
        if let Some(whole) = whole {
            assert!(result.is_ok(), "{result:?}");
            assert!(buf[..len] == whole[offset as usize..][..len]);
        }
        let next = stack.next_data(offset, size);
        assert!(next.is_none_or(|next| (offset..size).contains(&next)));
        if result.is_ok() {
            let zeros = next
                .map_or(len as u64, |next| next - offset)
                .min(len as u64);
            assert!(buf[..zeros as usize].iter().all(|&byte| byte == 0));
        }
    }
    assert!(stack.read_at(size, &mut [0]).is_err());
}

fn check(data: &[u8]) -> Result<()> {
    let case = read(data)?;
    let (files, changed): (Vec<_>, Vec<_>) =
        (0..case.layers.len()).map(|nth| case.file(nth)).unzip();
    let files: Vec<_> = files.iter().map(|bytes| common::file(bytes)).collect();
    let (opened, used) = memory(|| open(&files));
    assert!(used <= MAX_MEMORY, "{used} bytes for opening");
    let changed = changed.contains(&true);
    let model = if changed { None } else { case.model() };
    let stack = match opened {
        Ok(stack) => stack,
        Err(error) => {
            assert!(model.is_none(), "{error}");
            assert!(error.is_bad_image(), "{error}");
            return Ok(());
        }
    };
    assert!(changed || model.is_some());

    let mut end = 0;
    for segment in stack.merged() {
        assert!(segment.offset() >= end && !segment.zeroed());
        assert!(usize::from(segment.tag()) < case.layers.len());
        end = segment.end();
    }
    assert!(end <= stack.sectors());

    if stack.size() > MAX_READ {
        check_reads(&stack, &case.reads, None);
        return Ok(());
    }
    let mut whole = vec![0xee; stack.size() as usize];
    match stack.read_at(0, &mut whole) {
        Ok(()) => {
            assert!(
                model.is_none_or(|model| model == whole),
                "not what was written"
            );
            check_reads(&stack, &case.reads, Some(&whole));
        }
        Err(error) => {
            assert!(model.is_none() && error.is_bad_image(), "{error}");
            check_reads(&stack, &case.reads, None);
        }
    }
    Ok(())
}

fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for flags in [0u8, 8, 9, 0x0e, 0x0f, 0x1a, 0x10, 0x1f] {
        for patch in [
            &[][..],
            &[0, LSMT, 0, 16, 7, 1],
            &[1, ZFILE, 0, 2, 0, 9],
            &[0, FILE, 0xf0, 0xff, 3, 1, 2, 3],
        ] {
            let mut seed = vec![1, 15, 2];
            seed.extend([flags | 96, 3, 4, 0, 90, 0, 15, 2, 0x87, 1, 31, 9, 3]);
            seed.extend([flags ^ 1, 5, 2, 77, 96, 4, 3, 20, 31]);
            seed.extend([5000u64.to_le_bytes(), 1u64.to_le_bytes()].concat());
            seed.extend([0xff, 0x0f, 0, 0]);
            seed.extend(patch);
            seeds.push(seed);
        }
    }
    seeds
}

fuzz_target!(init: init(seeds), |data: &[u8]| {
    let _ = check(data);
});
