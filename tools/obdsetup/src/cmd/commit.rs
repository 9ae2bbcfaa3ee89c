// SPDX-License-Identifier: GPL-2.0

//! `obdsetup commit`.

use std::path::PathBuf;

use anyhow::Result;
use overlaybd::format::num::to_u64;
use overlaybd::format::Blob;
use overlaybd::lsmt_writer::{LayerWriter, Run};
use overlaybd::wrap::{self, Wrapping};
use overlaybd::{flatten, LayerReader};

use crate::bar::Bar;
use crate::layer_out;
use crate::layers::LayerArg;
use crate::output::Output;
use crate::wrap_args::{uuid_text, IdentArgs, WrapArgs};

/// Arguments of `commit`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup commit layer.lsmt layer.obd                               LZ4, 4k blocks
  obdsetup commit --algorithm zstd --block-size 64k --tar in.obd out.obd
  obdsetup commit --algorithm none layer.obd layer.lsmt              unwrap

The LSMT file inside stays as it is, byte for byte. With --compact, or where an identity is given,
it is written anew: data dense and in order, dead blocks left out.")]
pub(crate) struct Args {
    /// The layer, wrapped or not, or DEVICE:BYTES
    #[arg(value_name = "IN")]
    input: LayerArg,

    /// The file to make
    #[arg(value_name = "OUT")]
    output: PathBuf,

    /// Write the LSMT file anew, without dead blocks
    #[arg(long)]
    compact: bool,

    /// Replace a file that exists
    #[arg(short, long)]
    force: bool,

    #[command(flatten)]
    wrap: WrapArgs,

    #[command(flatten)]
    ident: IdentArgs,
}

/// Runs `commit`.
pub(crate) fn run(args: &Args) -> Result<()> {
    let wrapping = args.wrap.wrapping()?;
    let layer = args.input.open_layer()?;
    let mut output = Output::create(&args.output, args.force, [args.input.path.as_path()])?;
    let IdentArgs {
        uuid,
        parent_uuid,
        user_tag,
    } = &args.ident;
    if args.compact || uuid.is_some() || parent_uuid.is_some() || user_tag.is_some() {
        return compact(args, layer, output, wrapping);
    }
    let payload = layer.payload();
    let bar = Bar::new("committing", payload.size());
    wrap::write(output.file(), wrapping, |sink| {
        payload
            .stream(0, payload.size(), &mut |piece| {
                sink(piece)?;
                bar.advance(to_u64(piece.len()))
            })
            .map_err(|error| error.in_file(&args.input.path))
    })?;
    drop(bar);
    output.commit()
}

/// Writes the layer anew.
fn compact(args: &Args, layer: LayerReader, output: Output, wrapping: Wrapping) -> Result<()> {
    let mut ident = layer.ident().clone();
    if let Some(uuid) = args.ident.uuid {
        ident.uuid = uuid_text(uuid);
    }
    if let Some(uuid) = args.ident.parent_uuid {
        ident.parent = uuid_text(uuid);
    }
    if let Some(tag) = &args.ident.user_tag {
        ident.user_tag = tag.clone().into_bytes();
    }
    let runs = layer.segments().iter().map(|segment| Run {
        offset: segment.offset(),
        length: segment.length(),
        zeroed: segment.zeroed(),
    });
    let writer = LayerWriter::new(layer.lsmt().virtual_size(), ident, runs)?;
    let disk = flatten::stack(vec![layer])?;
    let read = |offset: u64, buf: &mut [u8]| disk.read_at(offset, buf);
    layer_out::write(output, wrapping, &writer, "committing", read)
}
