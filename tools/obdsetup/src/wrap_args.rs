// SPDX-License-Identifier: GPL-2.0

//! How a new layer is compressed, wrapped and named.

use clap::{Args, ValueEnum};
use overlaybd::codec::Method;
use overlaybd::format::zfile;
use overlaybd::wrap::Wrapping;
use overlaybd::zfile_writer::Options;

use anyhow::Result;
use uuid::Uuid;

use crate::exit::Failure;
use crate::size;

/// How blocks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Algorithm {
    /// LZ4: fast
    Lz4,
    /// zstd: small
    Zstd,
    /// No compression: a plain LSMT file
    None,
}

/// How a new layer is compressed and wrapped.
#[derive(Args, Debug)]
#[command(next_help_heading = "Wrapping")]
pub(crate) struct WrapArgs {
    /// How to compress
    #[arg(long, value_enum, default_value = "lz4")]
    pub(crate) algorithm: Algorithm,

    /// Compression level: zstd 1 to 22 (3 if not given), LZ4 HC 2 to 12 (LZ4 fast if not given)
    #[arg(long, value_name = "N")]
    pub(crate) level: Option<i32>,

    /// Bytes in a compressed block: 4k, 8k, 16k, 32k or 64k; larger ones are smaller in sum, and
    /// slower to read a little of
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = block_size)]
    pub(crate) block_size: u32,

    /// Leave out the CRC behind each block: corruption may then go unnoticed
    #[arg(long)]
    pub(crate) no_crc: bool,

    /// Put the layer in a tar, as a registry wants it
    #[arg(long)]
    pub(crate) tar: bool,

    /// Threads that compress (all CPUs if not given); the result does not depend on it
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
}

/// Reads a block size.
fn block_size(text: &str) -> Result<u32, String> {
    match size::parse_u32(text)? {
        size @ (4096 | 8192 | 16384 | 32768 | 65536) => Ok(size),
        _ => Err("one of 4k, 8k, 16k, 32k, 64k".to_owned()),
    }
}

impl WrapArgs {
    /// The wrapping that was asked for.
    pub(crate) fn wrapping(&self) -> Result<Wrapping> {
        let (algorithm, levels) = match self.algorithm {
            Algorithm::Lz4 => (Some(zfile::Algorithm::Lz4), 1..=12),
            Algorithm::Zstd => (Some(zfile::Algorithm::Zstd), 1..=22),
            Algorithm::None => (None, 0..=0),
        };
        if let Some(level) = self.level.filter(|level| !levels.contains(level)) {
            return Err(Failure::usage(match algorithm {
                None => "--level needs an algorithm other than `none`".to_owned(),
                Some(_) => format!(
                    "--level {level}: expected {} to {}",
                    levels.start(),
                    levels.end()
                ),
            }));
        }
        if let Some(threads) = self.threads {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build_global()?;
        }
        Ok(Wrapping {
            zfile: algorithm.map(|algorithm| Options {
                method: Method {
                    algorithm,
                    level: self.level,
                },
                block_size: self.block_size,
                crc: !self.no_crc,
                overwrite_header: true,
            }),
            tar: self.tar,
        })
    }
}

/// What a new layer says of itself.
#[derive(Args, Debug)]
#[command(next_help_heading = "Identity")]
pub(crate) struct IdentArgs {
    /// UUID of the layer
    #[arg(long, value_name = "UUID")]
    pub(crate) uuid: Option<Uuid>,

    /// UUID of the layer below
    #[arg(long, value_name = "UUID")]
    pub(crate) parent_uuid: Option<Uuid>,

    /// Text of your own, 256 bytes at most
    #[arg(long, value_name = "TEXT")]
    pub(crate) user_tag: Option<String>,
}

/// A UUID as upstream writes it: upper case; all zeros for none.
pub(crate) fn uuid_text(uuid: Uuid) -> String {
    uuid.as_hyphenated().to_string().to_uppercase()
}
