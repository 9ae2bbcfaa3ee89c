// SPDX-License-Identifier: GPL-2.0

//! Writes a ZFile: byte for byte as upstream's tools do with the same codecs, or padded so that a
//! loop device shows all of it.
//!
//! Several threads compress the blocks; the output doesn't depend on their number.

use std::io::{self, Seek, SeekFrom, Write};

use rayon::prelude::*;

use crate::codec::{Encoder, Method};
use crate::format::num::{to_u64, to_usize};
use crate::format::zfile::{self, field, flag};
use crate::format::SECTOR_SIZE;
use crate::on_disk::zfile as on_disk;
use crate::progress::Check;
use crate::{crc32c, Error, Result};

/// Approximate number of bytes compressed at once.
const BATCH: usize = 8 << 20;

/// The properties of a new ZFile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Algorithm and level.
    pub method: Method,
    /// Bytes in a block: a power of two from 512 to 65536. Upstream's tools accept 4096 and more.
    pub block_size: u32,
    /// Whether a CRC follows each block.
    pub crc: bool,
    /// Whether the header is written again at the end, so that readers need no trailer.
    pub overwrite_header: bool,
    /// Whether the ZFile is padded to whole sectors, with zeros between the blocks and the index.
    /// Upstream's tools don't do that, but can read such files.
    pub whole_sectors: bool,
}

/// A ZFile that is being written.
pub struct ZfileWriter<'a, W> {
    out: W,
    options: Options,
    check: Check<'a>,
    /// Byte offset of the ZFile in `out`.
    start: u64,
    /// Bytes that aren't compressed yet.
    pending: Vec<u8>,
    /// The index in its format on disk.
    index: Vec<u8>,
    /// Byte offset of the next block in the ZFile; after the last block, offset of the index.
    offset: u64,
    /// Bytes written to the original file so far.
    size: u64,
}

impl<'a, W: Write + Seek> ZfileWriter<'a, W> {
    /// Starts a ZFile at the current position of `out`. `check` is called before each block is compressed: high
    /// levels take seconds for what is compressed at once.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the block size is out of range, and write errors.
    pub fn new(mut out: W, options: Options, check: Check<'a>) -> Result<Self> {
        let size = options.block_size;
        if !size.is_power_of_two()
            || !(zfile::MIN_BLOCK_SIZE..=zfile::MAX_BLOCK_SIZE).contains(&size)
        {
            return Err(Error::Invalid(format!(
                "block size {size} is not a power of two from {} to {}",
                zfile::MIN_BLOCK_SIZE,
                zfile::MAX_BLOCK_SIZE
            )));
        }
        let start = out.stream_position().map_err(write_error)?;
        let mut writer = Self {
            out,
            options,
            check,
            start,
            pending: Vec::new(),
            index: Vec::new(),
            offset: zfile::HEADER_SIZE,
            size: 0,
        };
        let header = writer.header(flag::HEADER | flag::DATA_FILE | flag::DIGEST, false);
        writer.out.write_all(&header).map_err(write_error)?;
        Ok(writer)
    }

    /// Appends `data` to the original file.
    ///
    /// # Errors
    ///
    /// Those of `check`, and errors of compressing or writing.
    pub fn write(&mut self, data: &[u8]) -> Result<()> {
        self.pending.extend_from_slice(data);
        self.size += to_u64(data.len());
        if self.pending.len() >= BATCH {
            // A batch is a multiple of every block size.
            let whole = self.pending.len() / BATCH * BATCH;
            self.compress(whole)?;
        }
        Ok(())
    }

    /// Writes the remaining blocks, the index, the trailer and the header. Returns `out`,
    /// positioned at the end of the ZFile, and the length of the ZFile in bytes.
    ///
    /// # Errors
    ///
    /// Those of `check`, and errors of compressing or writing.
    pub fn finish(mut self) -> Result<(W, u64)> {
        self.compress(self.pending.len())?;
        if self.options.whole_sectors {
            // The header and the trailer have one sector each.
            let len = self.offset + to_u64(self.index.len());
            let gap = len.next_multiple_of(SECTOR_SIZE) - len;
            let zeros = vec![0; to_usize(gap)];
            self.out.write_all(&zeros).map_err(write_error)?;
            self.offset += gap;
        }
        self.out.write_all(&self.index).map_err(write_error)?;
        let trailer = self.header(flag::DATA_FILE | flag::SEALED | flag::DIGEST, true);
        self.out.write_all(&trailer).map_err(write_error)?;
        let len = self.offset + to_u64(self.index.len()) + zfile::HEADER_SIZE;
        if self.options.overwrite_header {
            let flags = flag::HEADER | flag::DATA_FILE | flag::OVERWRITTEN | flag::DIGEST;
            let header = self.header(flags, true);
            seek(&mut self.out, self.start)?;
            self.out.write_all(&header).map_err(write_error)?;
            seek(&mut self.out, self.start + len)?;
        }
        Ok((self.out, len))
    }

    /// Compresses and writes the first `len` pending bytes.
    fn compress(&mut self, len: usize) -> Result<()> {
        let rest = self.pending.split_off(len);
        let data = std::mem::replace(&mut self.pending, rest);
        let Options { method, crc, .. } = self.options;
        let check = self.check;
        let blocks: Vec<Vec<u8>> = data
            .par_chunks(to_usize(self.options.block_size.into()))
            .with_min_len(16)
            .map_init(
                || Encoder::new(method),
                |encoder, block| {
                    check()?;
                    let encoder = encoder.as_mut().map_err(|error| {
                        Error::Invalid(format!(
                            "cannot set up {}: {error}",
                            method.algorithm.name()
                        ))
                    })?;
                    let mut stored = Vec::new();
                    encoder
                        .encode(block, &mut stored)
                        .map_err(|source| Error::Io {
                            what: "compress",
                            source,
                        })?;
                    if crc {
                        let crc = zfile::block_crc(&stored, crc32c);
                        stored.extend_from_slice(&crc.to_le_bytes());
                    }
                    Ok(stored)
                },
            )
            .collect::<Result<_>>()?;
        for stored in &blocks {
            self.out.write_all(stored).map_err(write_error)?;
            let len = u32::try_from(stored.len())
                .map_err(|_| Error::Invalid("a block became too long".to_owned()))?;
            self.index.extend_from_slice(&len.to_le_bytes());
            self.offset += u64::from(len);
        }
        Ok(())
    }

    /// Returns a header or trailer. `complete` adds the fields that are only known at the end.
    fn header(&self, flags: u64, complete: bool) -> [u8; 512] {
        let Options { method, crc, .. } = self.options;
        let mut bytes = [0; 512];
        put(&mut bytes, 0, &zfile::MAGIC);
        let size = on_disk::STRUCT_SIZE.to_le_bytes();
        put(&mut bytes, on_disk::field::SIZE, &size);
        put(&mut bytes, field::FLAGS, &flags.to_le_bytes());
        if complete {
            let index_crc = crc32c(0, &self.index);
            let count = to_u64(self.index.len() / 4);
            put(&mut bytes, field::INDEX_OFFSET, &self.offset.to_le_bytes());
            put(&mut bytes, field::INDEX_COUNT, &count.to_le_bytes());
            put(&mut bytes, field::ORIGINAL_SIZE, &self.size.to_le_bytes());
            put(&mut bytes, field::INDEX_CRC, &index_crc.to_le_bytes());
        }
        let block_size = self.options.block_size;
        put(&mut bytes, field::BLOCK_SIZE, &block_size.to_le_bytes());
        put(&mut bytes, field::ALGORITHM, &[method.algorithm as u8]);
        put(&mut bytes, field::VERIFY, &[u8::from(crc)]);
        let digest = zfile::digest(&bytes, crc32c);
        put(&mut bytes, field::DIGEST, &digest.to_le_bytes());
        bytes
    }
}

/// Copies `value` to byte `at` of `bytes`, up to the end of `bytes`.
pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    for (byte, &source) in bytes.iter_mut().skip(at).zip(value) {
        *byte = source;
    }
}

pub(crate) fn write_error(source: io::Error) -> Error {
    Error::Io {
        what: "write",
        source,
    }
}

pub(crate) fn seek<W: Seek>(out: &mut W, at: u64) -> Result<()> {
    out.seek(SeekFrom::Start(at)).map_err(write_error)?;
    Ok(())
}
