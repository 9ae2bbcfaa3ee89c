// SPDX-License-Identifier: GPL-2.0

//! `obdsetup dump`.

use std::path::PathBuf;

use anyhow::Result;
use overlaybd::format::num::{to_u64, to_usize};
use overlaybd::format::Blob;
use overlaybd::Payload;

use crate::files::in_use::InUseArgs;
use crate::input::chain::ChainArgs;
use crate::input::layer_name::{LayerArg, Purpose};
use crate::input::layers::{expand, open_stack, paths};
use crate::make::raw_out::{self, Dest, Source};
use crate::terminal::exit::Failure;
use crate::terminal::size;

/// Arguments of `dump`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup dump base.obd app.obd -o disk.raw --sparse
  obdsetup dump layer.obd --offset 1m --length 4k | xxd
  obdsetup dump --zfile compressed.zf -o original

The bytes are those of the block device that `open' makes, but no kernel module is needed. Every \
block that is read is checked.")]
pub(crate) struct Args {
    /// Layers, lowest first: files or block devices; NAME:size=BYTES if the blob is shorter than the
    /// device, or than the padded file; or a config.v1.json that lists layers
    #[arg(required = true, value_name = "LAYER")]
    layers: Vec<LayerArg>,

    /// Where to write; `-` is standard output
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    output: PathBuf,

    /// First byte
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    offset: u64,

    /// Number of bytes (up to the end if not given)
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    length: Option<u64>,

    /// Leave holes where there are zeros
    #[arg(long)]
    sparse: bool,

    /// LAYER is a ZFile: write its content, of any format
    #[arg(long)]
    zfile: bool,

    /// Fill up the last sector with zeros, as the block device does
    #[arg(long)]
    whole_sectors: bool,

    /// Replace a file that exists
    #[arg(short, long)]
    force: bool,

    #[command(flatten)]
    in_use: InUseArgs,

    #[command(flatten)]
    chain: ChainArgs,
}

/// The content of a ZFile, with zeros after its end up to a whole sector.
struct Content(Payload);

impl Source for Content {
    fn read(&self, offset: u64, buf: &mut [u8]) -> overlaybd::Result<()> {
        let inside = self.0.size().saturating_sub(offset).min(to_u64(buf.len()));
        let (data, tail) = buf.split_at_mut(to_usize(inside));
        tail.fill(0);
        self.0.read_at(offset, data)
    }

    fn next_data(&self, offset: u64, end: u64) -> Option<u64> {
        Some(offset).filter(|&offset| offset < end)
    }
}

/// Runs `dump`.
pub(crate) fn run(args: &Args) -> Result<()> {
    if args.sparse && args.output.as_os_str() == "-" {
        return Err(Failure::usage(
            "--sparse needs --output FILE: standard output cannot have holes, even if redirected",
        ));
    }
    let layers = match args.zfile {
        true => args.layers.clone(),
        false => expand(&args.layers)?,
    };
    let (source, size): (Box<dyn Source>, u64) = if args.zfile {
        let [layer] = layers.as_slice() else {
            return Err(Failure::usage("--zfile takes one file"));
        };
        let payload = Payload::open(layer.open()?);
        let payload = payload.map_err(|error| layer.no_layer(error, Purpose::Read))?;
        if payload.zfile().is_none() {
            return Err(Failure::error(
                crate::terminal::exit::BAD_IMAGE,
                format!("{layer}: not a ZFile"),
            ));
        }
        args.in_use.check([layer.path.as_path()])?;
        let size = payload.size();
        (Box::new(Content(payload)), size)
    } else {
        let stack = open_stack(&layers, &args.chain, &args.in_use)?;
        let size = stack.virtual_size();
        (Box::new(stack), size)
    };
    let size = if args.whole_sectors {
        size.next_multiple_of(512)
    } else {
        size
    };
    let length = args.length.unwrap_or(size.saturating_sub(args.offset));
    let end = args.offset.checked_add(length).filter(|&end| end <= size);
    let end = end.ok_or_else(|| {
        Failure::usage(format!(
            "--offset {} and --length {length} reach beyond the end at {size}",
            args.offset
        ))
    })?;

    let dest = Dest {
        path: &args.output,
        force: args.force,
        sparse: args.sparse,
        inputs: &paths(&[&args.layers, &layers]),
    };
    raw_out::write(source.as_ref(), args.offset, end, &dest)
}
