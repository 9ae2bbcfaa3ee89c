// SPDX-License-Identifier: GPL-2.0

//! `obdsetup merge`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use overlaybd::flatten;
use overlaybd::format::Blob;
use overlaybd::layer::Ident;
use overlaybd::lsmt_writer::{cut, LayerWriter};
use uuid::Uuid;

use crate::layer_args::{uuid_text, IdentArgs, NewLayerArgs};
use crate::layer_out::LayerOut;
use crate::layers::{expand, open_layers, order_warnings, paths, warn, LayerArg};

/// Arguments of `merge`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup merge -o app.obd base.obd lib.obd app-1.obd
  obdsetup merge -o updates.obd monday.obd tuesday.obd     two layers in the middle of a stack
  obdsetup merge --lowest --algorithm zstd -o all.obd base.obd app.obd

The new layer reads as the layers did together, alone and in their place in a larger stack: what
they set to zero still hides what is below. With --lowest, it does so as the lowest layer only.
It takes the UUID of the topmost layer and the parent UUID of the lowest one, if none are given.")]
pub(crate) struct Args {
    /// Layers, lowest first, DEVICE:size=BYTES, or a config.v1.json that lists them
    #[arg(required = true, value_name = "LAYER")]
    layers: Vec<LayerArg>,

    /// The file to make
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// Nothing will be below: leave out what only hides it
    #[arg(long)]
    lowest: bool,

    #[command(flatten)]
    new: NewLayerArgs,
}

/// Runs `merge`.
pub(crate) fn run(args: &Args) -> Result<()> {
    let named = expand(&args.layers)?;
    let layers = open_layers(&named)?;
    let output = LayerOut::create(&args.output, &args.new, paths(&[&args.layers, &named]))?;
    warn(&order_warnings(&layers));
    let stack = flatten::stack(layers)?;
    let runs = flatten::runs(&stack, !args.lowest);
    let ident = ident(&args.new.ident, stack.layers());
    let writer = LayerWriter::new(flatten::virtual_size(&stack), ident, cut(runs))
        .with_context(|| format!("{}: cannot make the layer", args.output.display()))?;
    let read = |offset: u64, buf: &mut [u8]| stack.read_at(offset, buf);
    output.write(&writer, "merging", read)
}

/// What the layer says of itself: what is asked for, or what fits where the layers were.
fn ident(args: &IdentArgs, layers: &[overlaybd::LayerReader]) -> Ident {
    let known = |uuid: Option<&String>| {
        let uuid = uuid.filter(|uuid| Ident::is_known(uuid));
        uuid.map_or_else(|| uuid_text(Uuid::nil()), String::clone)
    };
    let top = layers.last().map(|layer| &layer.ident().uuid);
    let below = layers.first().map(|layer| &layer.ident().parent);
    Ident {
        uuid: args.uuid.map_or_else(|| known(top), uuid_text),
        parent: args.parent_uuid.map_or_else(|| known(below), uuid_text),
        user_tag: args.user_tag.clone().unwrap_or_default().into_bytes(),
    }
}
