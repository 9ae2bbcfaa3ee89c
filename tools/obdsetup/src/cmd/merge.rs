// SPDX-License-Identifier: GPL-2.0

//! `obdsetup merge`.

use std::path::PathBuf;

use anyhow::Result;
use overlaybd::format::Blob;
use overlaybd::identity::{is_placed, Below};
use overlaybd::layer::Ident;
use overlaybd::lsmt_writer::cut;
use overlaybd::{flatten, LayerReader, Stack};

use crate::files::in_use::InUseArgs;
use crate::input::chain::{ChainArgs, Part};
use crate::input::layer_name::LayerArg;
use crate::input::layers::{expand, open_layers, paths};
use crate::make::layer_args::NewLayerArgs;
use crate::make::layer_out::{derive, plan, LayerOut, Source};
use crate::terminal::warn;

/// Arguments of `merge`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup merge -o app.obd base.obd lib.obd app-1.obd
  obdsetup merge -o updates.obd monday.obd tuesday.obd
      two layers in the middle of a stack
  obdsetup merge --lowest --algorithm zstd -o all.obd base.obd app.obd

The new layer can replace the layers, alone or in a larger stack: sectors that they set to zero \
still hide the layers below. With --lowest, it can replace them only as the lowest layer. \
If none are given, it takes the UUID of the topmost layer and the parent UUID of the lowest one: so \
layers above them can be used on it, and it can be used on the layers below them. If the topmost \
layer has no UUID, or one that obdsetup made, but the UUID of the layer below the lowest one is not \
known, the new layer gets a UUID made from its content.")]
pub(crate) struct Args {
    /// Layers, lowest first: files or block devices; NAME:size=BYTES if the blob is shorter than the
    /// device, or than the padded file; or a config.v1.json that lists layers
    #[arg(required = true, value_name = "LAYER")]
    layers: Vec<LayerArg>,

    /// The file to make
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// The new layer will be the lowest: leave out zeros that only hide layers below
    #[arg(long)]
    lowest: bool,

    #[command(flatten)]
    in_use: InUseArgs,

    #[command(flatten)]
    chain: ChainArgs,

    #[command(flatten)]
    new: NewLayerArgs,
}

/// Runs `merge`.
pub(crate) fn run(args: &Args) -> Result<()> {
    let named = expand(&args.layers)?;
    let layers = open_layers(&named, &args.in_use)?;
    let output = LayerOut::create(&args.output, &args.new, paths(&[&args.layers, &named]))?;
    let part = match args.lowest {
        true => Part::Whole,
        false => Part::Middle,
    };
    args.chain.check(&layers, part)?;
    let stack = flatten::stack(layers)?;
    let runs = flatten::runs(&stack, !args.lowest);
    let size = flatten::virtual_size(&stack);
    let ident = args.new.ident.ident(below(args, &stack), |below| {
        // The new layer takes the place of the layers, so it keeps the UUID of the topmost one: layers above
        // refer to it.
        let top = stack.layers().last();
        if let Some(top) = top.filter(|top| Ident::is_known(&top.ident().uuid)) {
            let uuid = &top.ident().uuid;
            // A layer with such a UUID and without a parent would count as the lowest one.
            if below != Below::Unknown || !is_placed(uuid) {
                return Ok(uuid.clone());
            }
            warn(&[format!(
                "{}: does not keep UUID {uuid}, since the UUID of the layer below is not known: \
                 layers that were made over {} can be used on it only with --ignore-identity; with \
                 --parent-uuid it keeps the UUID",
                args.output.display(),
                top.path().display()
            )]);
        }
        let read = |offset: u64, buf: &mut [u8]| stack.read_at(offset, buf);
        derive(size, below, &runs, read)
    })?;
    let way_out =
        "merge fewer layers, or `obdsetup export` the disk of all layers and `obdsetup create` a \
                   layer from it: create compares in larger units if there are too many entries";
    let runs = cut(runs, args.new.wrap.dax);
    let writer = plan(output.path(), size, ident, runs, way_out)?;
    let read = |offset: u64, buf: &mut [u8]| stack.read_at(offset, buf);
    output.write(writer, "merging", Source::Layers(stack.layers()), read)
}

/// Returns what is below the new layer.
fn below<'a>(args: &Args, stack: &'a Stack) -> Below<'a> {
    match stack.layers().first().map(LayerReader::ident) {
        Some(Ident { parent, .. }) if !args.lowest && Ident::is_known(parent) => {
            Below::Layer(parent)
        }
        Some(Ident { uuid, .. }) if !args.lowest && !is_placed(uuid) => Below::Unknown,
        _ => Below::Nothing,
    }
}
