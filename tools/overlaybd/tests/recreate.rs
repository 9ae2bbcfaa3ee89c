// SPDX-License-Identifier: GPL-2.0

//! Writes golden images again from their content and compares with upstream's bytes.
//!
//! Other versions of LZ4 can compress differently: the test is valid for the version in
//! `Cargo.lock`.

#![allow(missing_docs, clippy::unwrap_used)]

use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libtest_mimic::{Arguments, Trial};
use overlaybd::codec::Method;
use overlaybd::format::zfile::Algorithm;
use overlaybd::format::Blob;
use overlaybd::lsmt_writer::{LayerWriter, Run};
use overlaybd::progress::{never, silent};
use overlaybd::wrap::{self, Wrapping};
use overlaybd::zfile_writer::Options;
use overlaybd::{FileBlob, LayerReader, Payload, Stack};

fn main() {
    let tests: [(&str, fn()); 6] = [
        ("lz4", lz4),
        ("lz4_of_any_size", lz4_of_any_size),
        ("zstd_incompressible", zstd_incompressible),
        ("zstd_frames", zstd_frames),
        ("committed_layers", committed_layers),
        ("sealed_then_committed", sealed_then_committed),
    ];
    let skip = !golden("MANIFEST.tsv").is_file();
    let why = match skip {
        true => " (skipped: no golden images, see OBD_GOLDENS)",
        false => "",
    };
    let trials = tests
        .map(|(name, test)| {
            let run = move || {
                test();
                Ok(())
            };
            Trial::test(format!("{name}{why}"), run).with_ignored_flag(skip)
        })
        .into();
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(std::env::var_os("OBD_GOLDENS").unwrap_or_default()).join(name)
}

/// Compresses the content of `from`. The result must equal `to`.
fn rewrap(from: &str, to: &str, overwrite_header: bool) {
    let (from, to) = (golden(from), golden(to));
    let source = Payload::open(Arc::new(FileBlob::open(&from, None).unwrap())).unwrap();
    let wanted = Payload::open(Arc::new(FileBlob::open(&to, None).unwrap())).unwrap();
    let wrapping = Wrapping {
        zfile: wanted.zfile().map(|zfile| Options {
            method: Method {
                algorithm: zfile.geometry().algorithm(),
                level: None,
            },
            block_size: zfile.geometry().block_size(),
            crc: zfile.geometry().has_crc(),
            overwrite_header,
            whole_sectors: false,
        }),
        tar: wanted.in_tar(),
    };
    let mut out = Cursor::new(Vec::new());
    let len = wrap::write(&mut out, wrapping, &never, |sink| {
        source.stream(0, source.size(), &mut |piece| sink(piece))
    })
    .unwrap();
    same(&to, &out.into_inner(), len);
}

fn same(path: &Path, found: &[u8], len: u64) {
    assert_eq!(len, found.len() as u64);
    let wanted = std::fs::read(path).unwrap();
    let differs = found.iter().zip(&wanted).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{}: first byte that differs", path.display());
    assert_eq!(found.len(), wanted.len(), "{}: length", path.display());
}

/// Writes a layer again from its merged content. The result must equal `to`.
fn recommit(from: &str, to: &str) {
    let (from, to) = (golden(from), golden(to));
    let layer = LayerReader::open(&from, None).unwrap();
    let wanted = LayerReader::open(&to, None).unwrap();
    let runs: Vec<Run> = layer
        .segments()
        .iter()
        .map(|segment| Run {
            offset: segment.offset(),
            length: segment.length(),
            zeroed: segment.zeroed(),
        })
        .collect();
    let virtual_size = layer.lsmt().virtual_size();
    let writer = LayerWriter::new(virtual_size, wanted.ident().clone(), runs).unwrap();
    let disk = Stack::with_size(vec![layer], 1 << 50).unwrap();
    let mut found = Vec::new();
    writer
        .write(
            |offset, buf| disk.read_at(offset, buf),
            &mut |bytes| {
                found.extend_from_slice(bytes);
                Ok(())
            },
            &silent,
        )
        .unwrap();
    assert_eq!(writer.len(), found.len() as u64);
    let mut lsmt = vec![0; usize::try_from(wanted.payload().size()).unwrap()];
    wanted.payload().read_at(0, &mut lsmt).unwrap();
    let differs = found.iter().zip(&lsmt).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{}: first byte that differs", to.display());
    assert_eq!(found.len(), lsmt.len());
}

fn lz4() {
    let plain = "lsmt/mixA-plain.lsmt";
    for size in ["4k", "8k", "16k", "32k"] {
        rewrap(plain, &format!("zfile-lsmt/lz4-{size}.obd"), true);
    }
    rewrap("zfile-lsmt/lz4-64k.obd", "zfile-lsmt/lz4-64k.obd", true);
    rewrap(plain, "zfile-lsmt/lz4-4k-tar.obd", true);
    rewrap(plain, "zfile-lsmt/lz4-4k-trailer-tar.obd", false);
    rewrap(plain, "zfile/lsmt-blob.zf", false);
    let noverify = "zfile-lsmt/lz4-64k-noverify.obd";
    rewrap(noverify, noverify, true);
}

fn lz4_of_any_size() {
    for name in ["0", "511", "512", "4095", "4097", "8191", "65535", "65536"] {
        let name = format!("zfile/text-{name}.zf");
        rewrap(&name, &name, false);
    }
    let incompressible = "zfile/rand-200000-64k-lz4.zf";
    rewrap(incompressible, incompressible, false);
}

fn zstd_incompressible() {
    let name = "zfile/rand-131072-zstd-4k.zf";
    rewrap(name, name, false);
}

/// Versions of zstd compress differently, but frames must be of the same kind and have the same
/// content.
fn zstd_frames() {
    for size in ["4k", "8k", "16k", "64k"] {
        let path = golden(&format!("zfile-lsmt/zstd-{size}.obd"));
        let wanted = Payload::open(Arc::new(FileBlob::open(&path, None).unwrap())).unwrap();
        let geometry = *wanted.zfile().unwrap().geometry();
        let options = Options {
            method: Method {
                algorithm: Algorithm::Zstd,
                level: None,
            },
            block_size: geometry.block_size(),
            crc: geometry.has_crc(),
            overwrite_header: true,
            whole_sectors: false,
        };
        let wrapping = Wrapping {
            zfile: Some(options),
            tar: false,
        };
        let mut out = Cursor::new(Vec::new());
        wrap::write(&mut out, wrapping, &never, |sink| {
            wanted.stream(0, wanted.size(), &mut |piece| sink(piece))
        })
        .unwrap();
        let mut made = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut made, out.get_ref()).unwrap();
        let found = Payload::open(Arc::new(FileBlob::open(made.path(), None).unwrap())).unwrap();
        assert_eq!(found.size(), wanted.size());
        let first = |payload: &Payload| {
            let mut bytes = [0; 9];
            payload.blob().read_at(512, &mut bytes).unwrap();
            bytes
        };
        // Magic number, descriptor and content size of the first frame.
        assert_eq!(first(&found)[..7], first(&wanted)[..7], "{size}");
        let mut contents = [(); 2].map(|()| vec![0; usize::try_from(wanted.size()).unwrap()]);
        found.read_at(0, &mut contents[0]).unwrap();
        wanted.read_at(0, &mut contents[1]).unwrap();
        assert!(contents[0] == contents[1], "{size}");
    }
}

fn committed_layers() {
    for name in [
        "lsmt/empty.lsmt",
        "lsmt/ext4-plain.lsmt",
        "lsmt/idx255.lsmt",
        "lsmt/mixA-plain.lsmt",
        "lsmt/only-discard.lsmt",
        "lsmt/vsize-512-tail.lsmt",
        "special/big-4t.lsmt",
    ] {
        recommit(name, name);
    }
}

fn sealed_then_committed() {
    recommit(
        "sealed/mixA-sealed.lsmt",
        "sealed/mixA-sealed-then-commit.obd",
    );
}
