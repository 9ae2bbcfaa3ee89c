// SPDX-License-Identifier: GPL-2.0

//! Arguments of all commands that make a layer.

use anyhow::Result;
use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use overlaybd::codec::Method;
use overlaybd::format::zfile;
use overlaybd::identity::Below;
use overlaybd::layer::Ident;
use overlaybd::wrap::Wrapping;
use overlaybd::zfile_writer::Options;
use uuid::Uuid;

use crate::terminal::exit::Failure;
use crate::terminal::size;

/// Largest number of threads: more are not useful, and the system can start so many.
const MAX_THREADS: u64 = 1024;
/// Largest length of a user tag in bytes.
const MAX_TAG: usize = 256;

/// How a new layer is written.
#[derive(Args, Debug, Default, PartialEq, Eq)]
pub(crate) struct NewLayerArgs {
    /// Replace a file that exists
    #[arg(short, long)]
    pub(crate) force: bool,

    #[command(flatten)]
    pub(crate) wrap: WrapArgs,

    #[command(flatten)]
    pub(crate) ident: IdentArgs,
}

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
#[derive(Args, Debug, Default, PartialEq, Eq)]
#[command(next_help_heading = "Wrapping")]
pub(crate) struct WrapArgs {
    /// How to compress (if not given: lz4, or none with --dax)
    #[arg(long, value_enum)]
    algorithm: Option<Algorithm>,

    /// Compression level: zstd 1 to 22 (3 if not given), LZ4 HC 2 to 12 (LZ4 fast if not given)
    #[arg(long, value_name = "N")]
    level: Option<i32>,

    /// Bytes in a block: 4k, 8k, 16k, 32k or 64k (4k if not given); larger blocks make a smaller
    /// layer, and small reads slower
    #[arg(long, value_name = "SIZE", value_parser = block_size)]
    block_size: Option<u32>,

    /// Leave out the CRC after each block: corruption may then go unnoticed
    #[arg(long)]
    no_crc: bool,

    /// Put the layer in a tar, which registries require
    #[arg(long)]
    tar: bool,

    /// Make a layer for `open --dax': not compressed, in whole pages, with zeros stored unless they
    /// are in a hole of the disk
    #[arg(long, conflicts_with = "tar")]
    pub(crate) dax: bool,

    /// Number of threads that read and compress (one for each CPU if not given); the result is always the same
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=MAX_THREADS))]
    threads: Option<usize>,
}

/// Parses a block size.
fn block_size(text: &str) -> Result<u32, String> {
    match size::parse(text).map(u32::try_from)? {
        Ok(size @ (4096 | 8192 | 16384 | 32768 | 65536)) => Ok(size),
        _ => Err("one of 4k, 8k, 16k, 32k, 64k".to_owned()),
    }
}

impl WrapArgs {
    /// Returns the wrapping that the arguments ask for. With `--threads`, starts the threads of the
    /// process that compress, so a second call is an error.
    pub(crate) fn wrapping(&self) -> Result<Wrapping> {
        let zfile = match self.algorithm {
            Some(Algorithm::Lz4 | Algorithm::Zstd) if self.dax => {
                return Err(Failure::usage("--dax: a compressed layer cannot be mapped"));
            }
            None if self.dax => None,
            None | Some(Algorithm::Lz4) => Some(self.zfile(zfile::Algorithm::Lz4, 12)?),
            Some(Algorithm::Zstd) => Some(self.zfile(zfile::Algorithm::Zstd, 22)?),
            Some(Algorithm::None)
                if self.level.is_some() || self.block_size.is_some() || self.no_crc =>
            {
                return Err(Failure::usage(
                    "--level, --block-size and --no-crc need an algorithm other than `none`",
                ));
            }
            Some(Algorithm::None) => None,
        };
        if let Some(threads) = self.threads {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build_global()?;
        }
        Ok(Wrapping {
            zfile,
            tar: self.tar,
        })
    }

    /// Returns the options for compression with `algorithm`, whose highest level is `highest`.
    fn zfile(&self, algorithm: zfile::Algorithm, highest: i32) -> Result<Options> {
        if let Some(level) = self.level.filter(|level| !(1..=highest).contains(level)) {
            let message = format!("--level {level}: expected 1 to {highest}");
            return Err(Failure::usage(message));
        }
        Ok(Options {
            method: Method {
                algorithm,
                level: self.level,
            },
            block_size: self.block_size.unwrap_or(4096),
            crc: !self.no_crc,
            overwrite_header: true,
            whole_sectors: true,
        })
    }
}

/// The identity of a new layer, and its user tag.
#[derive(Args, Debug, Default, PartialEq, Eq)]
#[command(next_help_heading = "Identity")]
pub(crate) struct IdentArgs {
    /// UUID of the layer (made from its content if not given; all zeros for none)
    #[arg(long, value_name = "UUID")]
    pub(crate) uuid: Option<Uuid>,

    /// UUID of the layer below, to record in this layer (if not given: the one that the layer below has)
    #[arg(long, value_name = "UUID")]
    pub(crate) parent_uuid: Option<Uuid>,

    /// Any text to store in the layer, at most 256 bytes
    #[arg(long, value_name = "TEXT", value_parser = user_tag)]
    pub(crate) user_tag: Option<String>,
}

impl IdentArgs {
    /// Returns the identity of a layer that is made over `below`, with the UUIDs and the tag from the
    /// arguments. `--parent-uuid` replaces `below`. Without `--uuid`, calls `uuid` with what is below the
    /// layer to make the UUID.
    pub(crate) fn ident(
        &self,
        below: Below<'_>,
        uuid: impl FnOnce(Below<'_>) -> Result<String>,
    ) -> Result<Ident> {
        let parent = self.parent_uuid.map(uuid_text);
        let below = parent.as_deref().map_or(below, Below::of);
        Ok(Ident {
            uuid: self
                .uuid
                .map_or_else(|| uuid(below), |uuid| Ok(uuid_text(uuid)))?,
            parent: match below {
                Below::Layer(uuid) => uuid.to_owned(),
                Below::Nothing | Below::Unknown => uuid_text(Uuid::nil()),
            },
            user_tag: self.user_tag.clone().unwrap_or_default().into_bytes(),
        })
    }
}

fn user_tag(text: &str) -> Result<String, String> {
    match text.len() {
        0..=MAX_TAG => Ok(text.to_owned()),
        len => Err(format!("{len} bytes, more than {MAX_TAG}")),
    }
}

/// Returns a UUID in upstream's form: upper case; all zeros for none.
pub(crate) fn uuid_text(uuid: Uuid) -> String {
    uuid.as_hyphenated().to_string().to_uppercase()
}
