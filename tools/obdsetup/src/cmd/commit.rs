// SPDX-License-Identifier: GPL-2.0

//! `obdsetup commit`.

use std::path::PathBuf;

use anyhow::Result;
use overlaybd::format::num::to_u64;
use overlaybd::format::Blob;
use overlaybd::lsmt_writer::{LayerWriter, Run};
use overlaybd::{flatten, LayerReader};

use crate::bar::Bar;
use crate::layer_args::{uuid_text, IdentArgs, NewLayerArgs};
use crate::layer_out::LayerOut;
use crate::layers::LayerArg;

/// Arguments of `commit`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup commit layer.lsmt layer.obd                               LZ4, 4k blocks
  obdsetup commit --algorithm zstd --block-size 64k --tar in.obd out.obd
  obdsetup commit --algorithm none layer.obd layer.lsmt              unwrap

The LSMT file inside stays as it is, byte for byte. With --compact, or where an identity is given,
it is written anew: data dense and in order, dead blocks left out.")]
pub(crate) struct Args {
    /// The layer, wrapped or not, or DEVICE:size=BYTES
    #[arg(value_name = "IN")]
    input: LayerArg,

    /// The file to make
    #[arg(value_name = "OUT")]
    output: PathBuf,

    /// Write the LSMT file anew, without dead blocks
    #[arg(long)]
    compact: bool,

    #[command(flatten)]
    new: NewLayerArgs,
}

/// Runs `commit`.
pub(crate) fn run(args: &Args) -> Result<()> {
    let layer = args.input.open_layer()?;
    let output = LayerOut::create(&args.output, &args.new, [args.input.path.as_path()])?;
    if args.compact || args.new.ident != IdentArgs::default() {
        return compact(&args.new.ident, layer, output);
    }
    let payload = layer.payload();
    let bar = Bar::new("committing", payload.size());
    output.wrap(|sink| {
        payload
            .stream(0, payload.size(), &mut |piece| {
                sink(piece)?;
                bar.advance(to_u64(piece.len()))
            })
            .map_err(|error| error.in_file(&args.input.path))
    })
}

/// Writes the layer anew.
fn compact(new: &IdentArgs, layer: LayerReader, output: LayerOut) -> Result<()> {
    let mut ident = layer.ident().clone();
    if let Some(uuid) = new.uuid {
        ident.uuid = uuid_text(uuid);
    }
    if let Some(uuid) = new.parent_uuid {
        ident.parent = uuid_text(uuid);
    }
    if let Some(tag) = &new.user_tag {
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
    output.write(&writer, "committing", read)
}
