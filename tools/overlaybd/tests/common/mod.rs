// SPDX-License-Identifier: GPL-2.0

//! Images made for tests.

#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

pub mod changes;
pub mod sparse;

use std::io::{Cursor, Write};

use overlaybd::codec::Method;
use overlaybd::format::blob::check_range;
use overlaybd::format::zfile::{self, Algorithm};
use overlaybd::format::{Blob, Error};
use overlaybd::layer::Ident;
use overlaybd::lsmt_writer::{LayerWriter, Run};
use overlaybd::progress::{never, silent};
use overlaybd::wrap::{self, Wrapping};
use overlaybd::zfile_writer::Options;
use tempfile::NamedTempFile;

/// A blob in memory. `stream` passes it on in pieces of `piece` bytes.
pub struct Memory {
    pub bytes: Vec<u8>,
    pub piece: usize,
}

impl Memory {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, piece: 1000 }
    }
}

impl Blob for Memory {
    type Error = Error;

    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        check_range(self.size(), offset, buf.len() as u64)?;
        let start = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.bytes[start..start + buf.len()]);
        Ok(())
    }

    fn stream(
        &self,
        offset: u64,
        len: u64,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        check_range(self.size(), offset, len)?;
        let start = usize::try_from(offset).unwrap();
        let end = usize::try_from(offset + len).unwrap();
        self.bytes[start..end]
            .chunks(self.piece.max(1))
            .try_for_each(sink)
    }
}

/// Options that upstream uses by default: LZ4, 4 KiB blocks, CRC, header overwritten.
pub fn lz4() -> Options {
    Options {
        method: Method {
            algorithm: Algorithm::Lz4,
            level: None,
        },
        block_size: 4096,
        crc: true,
        overwrite_header: true,
        whole_sectors: false,
    }
}

/// Returns `content` with its wrapping.
pub fn wrapped(content: &[u8], wrapping: Wrapping) -> Vec<u8> {
    let mut out = Cursor::new(Vec::new());
    let len = wrap::write(&mut out, wrapping, &never, |sink| {
        // This size divides neither blocks nor sectors.
        content.chunks(1234).try_for_each(sink)
    })
    .unwrap();
    let bytes = out.into_inner();
    assert_eq!(len, bytes.len() as u64);
    bytes
}

/// Returns a ZFile of `content`.
pub fn zfile(content: &[u8], options: Options) -> Vec<u8> {
    wrapped(
        content,
        Wrapping {
            zfile: Some(options),
            tar: false,
        },
    )
}

/// Returns an LSMT file. `fill` returns the byte that fills a sector.
pub fn lsmt(virtual_size: u64, runs: &[Run], fill: impl Fn(u64) -> u8) -> Vec<u8> {
    let writer = LayerWriter::new(virtual_size, Ident::default(), runs.to_vec()).unwrap();
    let mut bytes = Vec::new();
    writer
        .write(
            |offset, buf| {
                for (nth, sector) in buf.chunks_mut(512).enumerate() {
                    sector.fill(fill(offset / 512 + nth as u64));
                }
                Ok(())
            },
            &mut |piece| {
                bytes.extend_from_slice(piece);
                Ok(())
            },
            &silent,
        )
        .unwrap();
    assert_eq!(writer.len(), bytes.len() as u64);
    bytes
}

pub fn run(offset: u64, length: u64, zeroed: bool) -> Run {
    Run {
        offset,
        length,
        zeroed,
    }
}

/// Returns a temporary file with these bytes. Dropping it deletes the file.
pub fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// Corrects the digest of the ZFile header or trailer at byte `at`.
pub fn sign(bytes: &mut [u8], at: usize) {
    let mut header: [u8; 512] = bytes[at..at + 512].try_into().unwrap();
    let digest = zfile::digest(&header, overlaybd::crc32c);
    header[zfile::field::DIGEST..][..4].copy_from_slice(&digest.to_le_bytes());
    bytes[at..at + 512].copy_from_slice(&header);
}

/// Corrects the checksum of the tar header at byte `at`.
pub fn checksum(bytes: &mut [u8], at: usize) {
    let block = &mut bytes[at..at + 512];
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Copies `value` to byte `at` of `bytes`.
pub fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}
