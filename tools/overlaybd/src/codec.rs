// SPDX-License-Identifier: GPL-2.0

//! Compresses and decompresses single blocks: raw LZ4 blocks and zstd frames.

use std::io;

use lz4::block::CompressionMode;

use crate::error::BlockFault;
use crate::format::zfile::Algorithm;

/// The zstd level if the caller gives none.
pub const DEFAULT_ZSTD_LEVEL: i32 = 3;

/// Decompresses blocks, one at a time.
#[derive(Default)]
pub struct Decoder {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Decoder {
    /// Decompresses `stored` into `out`. The result must fill `out` exactly.
    ///
    /// # Errors
    ///
    /// [`BlockFault::Data`] or [`BlockFault::Length`].
    pub fn decode(
        &mut self,
        algorithm: Algorithm,
        stored: &[u8],
        out: &mut [u8],
    ) -> Result<(), BlockFault> {
        let expected = u32::try_from(out.len()).map_err(|_| BlockFault::Data)?;
        let found = match algorithm {
            Algorithm::Lz4 => {
                let len = i32::try_from(expected).map_err(|_| BlockFault::Data)?;
                lz4::block::decompress_to_buffer(stored, Some(len), out)
            }
            Algorithm::Zstd => self.zstd(stored, out),
        }
        .map_err(|_| BlockFault::Data)?;
        let found = u32::try_from(found).map_err(|_| BlockFault::Data)?;
        if found != expected {
            return Err(BlockFault::Length { found, expected });
        }
        Ok(())
    }

    fn zstd(&mut self, stored: &[u8], out: &mut [u8]) -> io::Result<usize> {
        let decompressor = match &mut self.zstd {
            Some(decompressor) => decompressor,
            empty => empty.insert(zstd::bulk::Decompressor::new()?),
        };
        decompressor.decompress_to_buffer(stored, out)
    }
}

/// How to compress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    /// The algorithm.
    pub algorithm: Algorithm,
    /// The level; `None` for the level of upstream's tools: LZ4 fast, zstd 3. LZ4 with a level of 2
    /// or more is LZ4 HC.
    pub level: Option<i32>,
}

/// Compresses blocks, one at a time.
pub struct Encoder {
    kind: Kind,
}

enum Kind {
    Lz4(CompressionMode),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Encoder {
    /// Makes a compressor.
    ///
    /// # Errors
    ///
    /// If zstd doesn't know the level or cannot allocate memory.
    pub fn new(method: Method) -> io::Result<Self> {
        let kind = match (method.algorithm, method.level) {
            (Algorithm::Lz4, None | Some(..=1)) => Kind::Lz4(CompressionMode::DEFAULT),
            (Algorithm::Lz4, Some(level)) => Kind::Lz4(CompressionMode::HIGHCOMPRESSION(level)),
            (Algorithm::Zstd, level) => Kind::Zstd(zstd::bulk::Compressor::new(
                level.unwrap_or(DEFAULT_ZSTD_LEVEL),
            )?),
        };
        Ok(Self { kind })
    }

    /// Appends the compressed form of `block` to `out`. Returns its length in bytes.
    ///
    /// # Errors
    ///
    /// If `block` has 4 GiB or more, or the codec fails. The codec gets enough room for any block.
    pub fn encode(&mut self, block: &[u8], out: &mut Vec<u8>) -> io::Result<usize> {
        let start = out.len();
        out.resize(start + self.bound(block)?, 0);
        let room = out.get_mut(start..).unwrap_or_default();
        let stored = self.encode_to(block, room)?;
        out.truncate(start + stored);
        Ok(stored)
    }

    /// Writes the compressed form of `block` to the start of `room`. Returns its length in bytes.
    ///
    /// # Errors
    ///
    /// If `block` has 4 GiB or more, if `room` is shorter than [`Algorithm::bound`] of the block, or if the codec
    /// fails.
    pub fn encode_to(&mut self, block: &[u8], room: &mut [u8]) -> io::Result<usize> {
        let room = room.get_mut(..self.bound(block)?).ok_or_else(unfit)?;
        match &mut self.kind {
            Kind::Lz4(mode) => lz4::block::compress_to_buffer(block, Some(*mode), false, room),
            Kind::Zstd(compressor) => compressor.compress_to_buffer(block, room),
        }
    }

    /// Returns the largest length of the compressed form of `block`.
    fn bound(&self, block: &[u8]) -> io::Result<usize> {
        let len = u32::try_from(block.len()).map_err(|_| unfit())?;
        let algorithm = match &self.kind {
            Kind::Lz4(_) => Algorithm::Lz4,
            Kind::Zstd(_) => Algorithm::Zstd,
        };
        usize::try_from(algorithm.bound(len)).map_err(|_| unfit())
    }
}

/// The error for a block that is too long, or for too little room.
fn unfit() -> io::Error {
    io::ErrorKind::InvalidInput.into()
}
