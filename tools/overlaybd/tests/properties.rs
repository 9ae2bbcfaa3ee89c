// SPDX-License-Identifier: GPL-2.0

//! Tests random layers, files and pieces against simple models.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::io::Cursor;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use common::{file, lsmt, lz4, run, wrapped, zfile, Memory};
use overlaybd::codec::Method;
use overlaybd::format::num::Records;
use overlaybd::format::zfile::{flag, Algorithm, Geometry, JumpTable};
use overlaybd::format::{tar, Blob};
use overlaybd::lsmt_writer::{cut, LayerWriter, Run};
use overlaybd::on_disk::zfile::Metadata;
use overlaybd::progress::silent;
use overlaybd::wrap::{self, Wrapping};
use overlaybd::zfile_writer::Options;
use overlaybd::{crc32c, flatten, tar_writer, Error, FileBlob, LayerReader, Payload, Stack};
use proptest::collection::vec;
use proptest::prelude::*;

/// Size limit of random disks, in sectors.
const SECTORS: u64 = 96;

/// Generates a random layer: virtual size in bytes, and runs.
fn layer() -> impl Strategy<Value = (u64, Vec<Run>)> {
    let size = prop_oneof![
        1 => Just(0),
        4 => 1..=SECTORS * 512,
        4 => (1..=SECTORS).prop_map(|sectors| sectors * 512),
    ];
    let runs = vec((0..6u64, 1..8u64, any::<bool>()), 0..12).prop_map(|steps| {
        let mut at = 0;
        let mut runs = Vec::new();
        for (gap, length, zeroed) in steps {
            at += gap;
            runs.push(run(at, length, zeroed));
            at += length;
        }
        runs
    });
    (size, runs)
}

/// Returns the byte that fills sector `sector` of layer `layer`: never 0.
fn fill(layer: usize, sector: u64) -> u8 {
    (layer as u64 * 37 + sector * 11) as u8 | 1
}

/// Returns the content of the stack, computed sector by sector.
fn model(layers: &[(u64, Vec<Run>)]) -> Option<Vec<u8>> {
    let size = layers.iter().rev().map(|l| l.0).find(|&size| size != 0)?;
    let mut disk = vec![0; usize::try_from(size.next_multiple_of(512)).unwrap()];
    for (nth, (_, runs)) in layers.iter().enumerate() {
        for run in runs {
            for sector in run.offset..run.end() {
                let at = usize::try_from(sector * 512).unwrap();
                if let Some(bytes) = disk.get_mut(at..at + 512) {
                    bytes.fill(if run.zeroed { 0 } else { fill(nth, sector) });
                }
            }
        }
    }
    disk[usize::try_from(size).unwrap()..].fill(0);
    Some(disk)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn stacks(
        layers in vec(layer(), 1..6),
        compressed in any::<u8>(),
        reads in vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 8),
    ) {
        let files: Vec<_> = layers
            .iter()
            .enumerate()
            .map(|(nth, (size, runs))| {
                let bytes = lsmt(*size, runs, |sector| fill(nth, sector));
                match (compressed >> nth) & 1 {
                    0 => file(&bytes),
                    _ => file(&zfile(&bytes, lz4())),
                }
            })
            .collect();
        let paths: Vec<_> = files.iter().map(|file| file.path()).collect();
        let Some(wanted) = model(&layers) else {
            prop_assert!(Stack::open(&paths).is_err());
            return Ok(());
        };
        let stack = Stack::open(&paths).unwrap();
        prop_assert_eq!(stack.size(), wanted.len() as u64);
        let mut found = vec![0xee; wanted.len()];
        stack.read_at(0, &mut found).unwrap();
        prop_assert_eq!(&found, &wanted);
        for (a, b) in reads {
            let (a, b) = (a.index(wanted.len() + 1), b.index(wanted.len() + 1));
            let (start, end) = (a.min(b), a.max(b));
            let mut found = vec![0xee; end - start];
            stack.read_at(start as u64, &mut found).unwrap();
            prop_assert_eq!(&found, &wanted[start..end]);
        }
        prop_assert!(stack.read_at(stack.size(), &mut [0]).is_err());
        // The merged index has only data, is ascending and within the disk.
        let mut end = 0;
        for segment in stack.merged() {
            prop_assert!(segment.offset() >= end && !segment.zeroed());
            end = segment.end();
        }
        prop_assert!(end <= stack.sectors());
    }

    /// Consecutive layers of a stack, merged into one, read the same in their place and alone.
    #[test]
    fn flattened(
        layers in vec(layer(), 1..7),
        from in any::<prop::sample::Index>(),
        count in any::<prop::sample::Index>(),
    ) {
        let mut files: Vec<_> = layers
            .iter()
            .enumerate()
            .map(|(nth, (size, runs))| file(&lsmt(*size, runs, |sector| fill(nth, sector))))
            .collect();
        let from = from.index(layers.len());
        let to = from + 1 + count.index(layers.len() - from);
        let readers = |files: &[tempfile::NamedTempFile]| -> Vec<LayerReader> {
            let open = |file: &tempfile::NamedTempFile| LayerReader::open(file.path(), None);
            files.iter().map(|file| open(file).unwrap()).collect()
        };
        let one = |stack: &Stack, zeroed| {
            let runs: Vec<Run> = cut(flatten::runs(stack, zeroed), false).collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end() <= pair[1].offset));
            let size = flatten::virtual_size(stack);
            let writer = LayerWriter::new(size, Default::default(), runs).unwrap();
            let mut bytes = Vec::new();
            let read = |offset: u64, buf: &mut [u8]| stack.read_at(offset, buf);
            let sink = &mut |piece: &[u8]| { bytes.extend_from_slice(piece); Ok(()) };
            writer.write(read, sink, &silent).unwrap();
            Ok(file(&bytes))
        };
        let stack = flatten::stack(readers(&files[from..to])).unwrap();
        let (merged, lowest) = (one(&stack, true)?, one(&stack, false)?);
        // The fill byte depends on the number of the layer.
        let none = vec![(0, Vec::new()); from];
        if let Some(wanted) = model(&[none.as_slice(), &layers[from..to]].concat()) {
            for path in [merged.path(), lowest.path()] {
                let stack = Stack::open(&[path]).unwrap();
                prop_assert_eq!(stack.size(), wanted.len() as u64);
                let mut found = vec![0xee; wanted.len()];
                stack.read_at(0, &mut found).unwrap();
                prop_assert_eq!(&found, &wanted);
            }
        }
        files.splice(from..to, [merged]);
        let Some(wanted) = model(&layers) else { return Ok(()) };
        let stack = Stack::new(readers(&files)).unwrap();
        let mut found = vec![0xee; wanted.len()];
        prop_assert_eq!(stack.size(), wanted.len() as u64);
        stack.read_at(0, &mut found).unwrap();
        prop_assert_eq!(&found, &wanted);
    }

    /// A layer rewritten from a reader's segments has the same bytes.
    #[test]
    fn layers_survive((size, runs) in layer()) {
        let bytes = lsmt(size, &runs, |sector| fill(0, sector));
        let file = file(&bytes);
        let layer = LayerReader::open(file.path(), None).unwrap();
        prop_assert_eq!(layer.lsmt().virtual_size(), size);
        let again: Vec<Run> = layer
            .segments()
            .iter()
            .map(|s| run(s.offset(), s.length(), s.zeroed()))
            .collect();
        prop_assert_eq!(lsmt(size, &again, |sector| fill(0, sector)), bytes);
    }

    #[test]
    fn records(bytes in vec(any::<u8>(), 0..100), cuts in vec(0..40usize, 0..20)) {
        let mut records = Records::<7>::new();
        let mut found = Vec::new();
        let mut rest = bytes.as_slice();
        for cut in cuts.into_iter().chain([usize::MAX]) {
            let (piece, next) = rest.split_at(cut.min(rest.len()));
            records
                .feed(piece, |record| {
                    found.push(*record);
                    Ok::<_, ()>(())
                })
                .unwrap();
            rest = next;
        }
        let wanted: Vec<[u8; 7]> = bytes.chunks_exact(7).map(|c| c.try_into().unwrap()).collect();
        prop_assert_eq!(found, wanted);
    }

    /// Parses a pax header with any records, short or long, streamed in pieces of any length.
    #[test]
    fn tar_headers(
        keys in vec(("[a-z.]{1,8}", "[ -~]{0,200}"), 0..20),
        at in any::<prop::sample::Index>(),
        piece in 1..50usize,
        len in 1..3000usize,
    ) {
        let record = |key: &str, value: &str| {
            let body = format!(" {key}={value}\n");
            let mut n = body.len() + 1;
            while n.to_string().len() + body.len() != n {
                n = n.to_string().len() + body.len();
            }
            format!("{n}{body}")
        };
        let mut records: Vec<String> = keys
            .iter()
            .filter(|(key, _)| key != "size")
            .map(|(key, value)| record(key, value))
            .collect();
        records.insert(at.index(records.len() + 1), record("size", &len.to_string()));
        let payload = records.concat();

        let head = tar_writer::head(len as u64);
        let mut bytes = head[..512].to_vec();
        bytes[124..136].copy_from_slice(format!("{:011o} ", payload.len()).as_bytes());
        bytes[148..156].fill(b' ');
        let sum: u32 = bytes.iter().map(|&byte| u32::from(byte)).sum();
        bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        bytes.extend_from_slice(payload.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes.extend_from_slice(&head[1024..]);
        let start = bytes.len() as u64;
        bytes.resize(bytes.len() + len, 7);
        let blob = Memory { bytes, piece };
        let wanted = tar::Payload { start, len: len as u64 };
        prop_assert_eq!(tar::payload(&blob).unwrap(), Some(wanted));
    }

    /// Compares the jump table with sums of the lengths.
    #[test]
    fn jump_tables(
        shift in 9..=16u32,
        crc in any::<bool>(),
        zstd in any::<bool>(),
        lengths in vec(any::<prop::sample::Index>(), 0..300),
        rest in 1..=512u64,
        piece in 1..40usize,
    ) {
        let algorithm = if zstd { Algorithm::Zstd } else { Algorithm::Lz4 };
        let options = Options {
            method: Method { algorithm, level: None },
            block_size: 1 << shift,
            crc,
            overwrite_header: true,
            whole_sectors: false,
        };
        let empty = if crc { 4 } else { 0 };
        // The last block may be short.
        let size = match lengths.len() as u64 {
            0 => 0,
            n => ((n - 1) << shift) + rest,
        };
        let mut offsets = vec![512];
        let mut index = Vec::new();
        for (nth, length) in lengths.iter().enumerate() {
            let last = nth + 1 == lengths.len();
            let block = if last { rest as u32 } else { 1 << shift };
            let stored = empty + 1 + length.index(algorithm.bound(block) as usize) as u32;
            index.extend_from_slice(&stored.to_le_bytes());
            offsets.push(offsets[nth] + u64::from(stored));
        }
        let index_offset = *offsets.last().unwrap();
        let mut bytes = zfile(&[], options);
        bytes.truncate(512);
        let flags = flag::HEADER | flag::DATA_FILE | flag::OVERWRITTEN | flag::DIGEST;
        bytes[32..40].copy_from_slice(&flags.to_le_bytes());
        bytes[40..48].copy_from_slice(&index_offset.to_le_bytes());
        bytes[48..56].copy_from_slice(&(lengths.len() as u64).to_le_bytes());
        bytes[56..64].copy_from_slice(&size.to_le_bytes());
        bytes[64..68].copy_from_slice(&crc32c(0, &index).to_le_bytes());
        common::sign(&mut bytes, 0);
        bytes.resize(usize::try_from(index_offset).unwrap(), 0);
        bytes.extend_from_slice(&index);

        let blob = Memory { bytes, piece };
        let geometry = Geometry::read(&blob, crc32c).unwrap().unwrap();
        let shape = geometry.table_shape();
        let (mut bases, mut deltas) = (vec![0; shape.bases], vec![0; shape.deltas]);
        geometry.read_index(&blob, crc32c, &mut bases, &mut deltas).unwrap();
        let table = JumpTable::new(&geometry, bases, deltas);
        for (block, &offset) in (0..).zip(&offsets) {
            prop_assert_eq!(table.offset(block), Some(offset));
        }
        prop_assert_eq!(table.offset(offsets.len() as u64), None);
        prop_assert_eq!(table.range(0..lengths.len() as u64), Some(512..index_offset));
    }
}

/// Returns text and noise in turn: some blocks compress, others don't.
fn content(len: usize) -> Vec<u8> {
    let mut state = 7u32;
    (0..len)
        .map(|at| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            match at / 5000 % 2 {
                0 => b"to be or not to be "[at % 19],
                _ => (state >> 24) as u8,
            }
        })
        .collect()
}

/// Tests every algorithm, block size, CRC, header, padding and tar option, with contents of many
/// lengths.
#[test]
fn round_trips() {
    for algorithm in [Algorithm::Lz4, Algorithm::Zstd] {
        for level in [None, Some(9)] {
            for shift in 9..=16 {
                for flags in 0..16 {
                    let options = Options {
                        method: Method { algorithm, level },
                        block_size: 1 << shift,
                        crc: flags & 1 != 0,
                        overwrite_header: flags & 2 != 0,
                        whole_sectors: flags & 8 != 0,
                    };
                    round_trip(options, flags & 4 != 0);
                }
            }
        }
    }
}

fn round_trip(options: Options, tar: bool) {
    let block = options.block_size as usize;
    for len in [0, 1, 511, block - 1, block, block + 1, 3 * block + 77] {
        let wanted = content(len);
        let wrapping = Wrapping {
            zfile: Some(options),
            tar,
        };
        let file = file(&wrapped(&wanted, wrapping));
        let blob = Arc::new(FileBlob::open(file.path(), None).unwrap());
        let payload = Payload::open(blob).unwrap();
        if options.whole_sectors {
            assert_eq!(payload.file().size() % 512, 0);
            assert_eq!(payload.blob().size() % 512, 0);
        }
        assert_eq!(payload.in_tar(), tar);
        let zfile = payload.zfile().unwrap();
        let metadata = Metadata::read(zfile.blob()).unwrap();
        assert_eq!(metadata.in_trailer, !options.overwrite_header);
        assert_eq!(zfile.geometry().block_size(), options.block_size);
        assert_eq!(payload.size(), len as u64);
        let mut found = vec![0; len];
        payload.read_at(0, &mut found).unwrap();
        assert!(found == wanted, "{options:?}, {len} bytes");
        // Parts of blocks, some of which are read twice.
        for start in [0, 1, len / 2, len.saturating_sub(700)] {
            let end = (start + 600).min(len);
            if start < end {
                let mut found = vec![0; end - start];
                payload.read_at(start as u64, &mut found).unwrap();
                assert!(found == wanted[start..end], "{options:?}, {start}..{end}");
            }
        }
        assert!(payload.read_at(len as u64, &mut [0]).is_err());
        assert!(zfile
            .verify(&overlaybd::progress::silent)
            .unwrap()
            .is_empty());
    }
}

/// The output doesn't depend on the number of compressing threads.
#[test]
fn threads_do_not_matter() {
    let content = content(20 << 20);
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(|| zfile(&content, lz4()))
    };
    assert!(with(1) == with(4));
}

/// The hashes don't depend on the number of threads, and every input changes the UUID.
#[test]
fn identity_of_many_pieces() {
    use overlaybd::diff::{self, Options};
    use overlaybd::identity::{is_placed, uuid, Below, Pieces, PIECE};

    let mut image = vec![0; 9 * PIECE as usize + 5000];
    for (nth, byte) in image.iter_mut().enumerate() {
        *byte = (nth / 4096 % 7) as u8;
    }
    let image = file(&image);
    let image = FileBlob::open(image.path(), None).unwrap();
    let options = Options {
        granule: 4096,
        skip_zeros: true,
        keep_zeros: false,
    };
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let pool = pool.build().unwrap();
        pool.install(|| diff::of(&image, None, options, &silent).unwrap())
    };
    let found = with(1);
    assert_eq!(with(3), found);
    let read = |offset: u64, buf: &mut [u8]| {
        let inside = (image.size() - offset).min(buf.len() as u64) as usize;
        buf[inside..].fill(0);
        image.read_at(offset, &mut buf[..inside])
    };
    assert_eq!(
        Pieces::of(&found.runs, read, &silent).unwrap(),
        found.pieces
    );

    let of = |size, below| uuid(size, below, &found.runs, &found.pieces);
    let (alone, unknown) = (of(1, Below::Nothing), of(1, Below::Unknown));
    let uuids = [
        alone.clone(),
        unknown.clone(),
        of(2, Below::Nothing),
        of(1, Below::Layer("C02FB491-B4D4-4904-8684-A014D032AF78")),
        uuid(1, Below::Nothing, &found.runs[1..], &found.pieces),
        uuid(1, Below::Nothing, &found.runs, &Pieces::default()),
    ];
    for (nth, one) in uuids.iter().enumerate() {
        assert!(!uuids[..nth].contains(one), "{uuids:?}");
    }
    assert!(is_placed(&alone) && is_placed(&alone.to_lowercase()));
    for other in [
        &unknown,
        "",
        "6F626431",
        "6F626431-1111-4222-8333-444455556666",
    ] {
        assert!(!is_placed(other), "{other}");
    }
}

/// Long runs are cut between pages, of any size that kernels have, if the layer is for DAX.
#[test]
fn long_runs_are_cut_between_pages() {
    for zeroed in [false, true] {
        let long = run(128, 1 << 20, zeroed);
        let pieces: Vec<Run> = cut([long], true).collect();
        assert!(pieces
            .iter()
            .all(|piece| (piece.offset | piece.length) % 128 == 0));
        assert_eq!(overlaybd::lsmt_writer::join(&pieces), [long]);
        let writer = LayerWriter::new(1 << 30, Default::default(), pieces).unwrap();
        let found = overlaybd::dax::disk_misfits(writer.entries(), 1 << 30, 65_536);
        assert!(found.is_empty(), "{found:?}");
        // Zeros are cut in the same way in other layers, which commit --dax may copy.
        let pieces: Vec<Run> = cut([long], false).collect();
        assert_eq!(overlaybd::lsmt_writer::join(&pieces), [long]);
        assert!(pieces.iter().all(|piece| piece.offset % 64 == 0));
    }
}

/// A layer gets exactly the sectors that differ from the layers below.
#[test]
fn differences() {
    use overlaybd::diff::{self, Options};
    use overlaybd::identity::{uuid, Below, Pieces};

    let base = lsmt(64 * 512, &[run(0, 32, false), run(40, 8, false)], |_| 1);
    let base = file(&base);
    let layer = LayerReader::open(base.path(), None).unwrap();
    let mut image = vec![0; 80 * 512 + 100];
    image[..32 * 512].fill(1);
    // Change a sector, zero a sector, and append one.
    image[3 * 512 + 5] = 9;
    image[5 * 512..6 * 512].fill(0);
    image[80 * 512..].fill(4);
    let stack = Stack::with_size(vec![layer], image.len() as u64).unwrap();
    let image = file(&image);
    let image = FileBlob::open(image.path(), None).unwrap();
    let options = Options {
        granule: 512,
        skip_zeros: false,
        keep_zeros: false,
    };
    let found = diff::of(&image, Some(&stack), options, &silent).unwrap();
    let wanted = [
        run(3, 1, false),
        run(5, 1, true),
        run(40, 8, true),
        run(80, 1, false),
    ];
    assert_eq!(found.runs, wanted);

    // With `keep_zeros`, zeros that aren't in a hole of the image are data where the layer below has no
    // data, or other data.
    let mut zeros = options;
    (zeros.keep_zeros, zeros.granule) = (true, 4096);
    let found_zeros = diff::of(&image, Some(&stack), zeros, &silent).unwrap();
    let wanted_zeros = [run(0, 8, false), run(32, 49, false)];
    assert_eq!(found_zeros.runs, wanted_zeros);
    // Sectors 32 to 39 and 48 to 79 are zeros where no layer has data. The layer below has data in sectors 40 to 47.
    assert_eq!(found_zeros.zeros, 40 * 512);

    // `diff::of` computes the same hashes as `Pieces::of`.
    let read = |offset: u64, buf: &mut [u8]| {
        let inside = (image.size() - offset).min(buf.len() as u64) as usize;
        buf[inside..].fill(0);
        image.read_at(offset, &mut buf[..inside])
    };
    assert_eq!(found.pieces, Pieces::of(&wanted, read, &silent).unwrap());
    // The expected UUID was computed from the format's description, without this code.
    let size = image.size();
    let of = |below| uuid(size, below, &found.runs, &found.pieces);
    assert_eq!(of(Below::Nothing), "6F626431-342C-800A-8964-B1472934FFD9");
}

/// Compressing what is written at once takes many seconds with high levels.
#[test]
fn compressing_stops_after_a_few_blocks() {
    let method = Method {
        algorithm: Algorithm::Zstd,
        level: Some(22),
    };
    let options = Options {
        method,
        block_size: 65_536,
        crc: true,
        overwrite_header: true,
        whole_sectors: true,
    };
    let wrapping = Wrapping {
        zfile: Some(options),
        tar: false,
    };
    let asked = AtomicUsize::new(0);
    let check = || match asked.fetch_add(1, Ordering::Relaxed) {
        0..3 => Ok(()),
        _ => Err(Error::Interrupted),
    };
    // Not empty blocks, and many of them.
    let data: Vec<u8> = (0..8 << 20).map(|at: u32| (at >> 3) as u8).collect();
    let done = wrap::write(Cursor::new(Vec::new()), wrapping, &check, |sink| {
        sink(&data)
    });
    assert!(matches!(done, Err(Error::Interrupted)), "{done:?}");
    let blocks = data.len() / 65_536;
    let asked = asked.into_inner();
    assert!((4..blocks / 2).contains(&asked), "{asked} of {blocks}");
}
