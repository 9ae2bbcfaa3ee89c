// SPDX-License-Identifier: GPL-2.0

//! `obdsetup apply`.

use std::path::PathBuf;

use anyhow::Result;
use overlaybd::identity::Below;
use overlaybd::Stack;

use crate::files::in_use::InUseArgs;
use crate::files::place::directory;
use crate::input::archive::{self, Archive, Package};
use crate::input::chain::{ChainArgs, Part};
use crate::input::layer_name::LayerArg;
use crate::input::layers::{expand, open_layers, paths};
use crate::make::layer_args::NewLayerArgs;
use crate::make::layer_out::{derive, LayerOut};
use crate::make::mkfs;
use crate::terminal::exit::Failure;

/// Arguments of `apply`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup apply layer.tar.gz --base app/config.v1.json next.obd
  obdsetup apply changes.tar --base base.obd --base app.obd next.obd

TAR is a layer of a container image, as in the OCI image specification: its files replace those of \
the layers below; whiteouts (.wh.NAME) and opaque directories (.wh..wh..opq) hide files of the \
layers below. The layers below must make an erofs that obdsetup has made: by `convert' of a \
container image, or by `create' or `convert' with --fs erofs. Nothing is mounted, and no privileges \
are needed.")]
pub(crate) struct Args {
    /// The tar, compressed or not
    #[arg(value_name = "TAR")]
    input: PathBuf,

    /// The file to make
    #[arg(value_name = "OUT")]
    output: PathBuf,

    /// Layers below, lowest first (one after each --base), or a config.v1.json that lists them
    #[arg(long, value_name = "LAYER", required = true)]
    base: Vec<LayerArg>,

    /// Leave out what the file system cannot hold, and only warn
    #[arg(long)]
    allow_loss: bool,

    #[command(flatten)]
    in_use: InUseArgs,

    #[command(flatten)]
    chain: ChainArgs,

    #[command(flatten)]
    new: NewLayerArgs,
}

/// Runs `apply`.
pub(crate) fn run(args: &Args) -> Result<()> {
    if args.new.wrap.dax {
        // Small files have their data beside the inodes, in the layers below, too.
        return Err(Failure::usage(
            "--dax is not for apply, since its layers leave zeros out, and have data beside inodes: unpack the files \
             of all layers to one directory, of which `create --directory --dax' makes a layer",
        ));
    }
    let below = expand(&args.base)?;
    let layers = paths(&[&args.base, &below]);
    let inputs = layers.into_iter().chain([args.input.as_path()]);
    let output = LayerOut::create(&args.output, &args.new, inputs)?;
    let base = open_layers(&below, &args.in_use)?;
    args.chain.check(&base, Part::Whole)?;
    args.in_use.check([args.input.as_path()])?;
    let stack = Stack::new(base)?;
    let uuid = stack.layers().last().map(|top| top.ident().uuid.clone());
    let uuid = uuid.unwrap_or_default();
    // Reads the whole tar, so that damage is found before anything is made of it.
    let input = args.input.display();
    let what = match archive::check(&args.input)?.package {
        Some(Package::Docker | Package::Oci) => {
            Some("an archive of an image, no layer of one: use `obdsetup convert'")
        }
        Some(Package::Ova | Package::Xva) => {
            Some("no layer of an image: `obdsetup convert' says what it is")
        }
        // The other packages are recognised by names of files that a layer may have, too.
        _ => None,
    };
    if let Some(what) = what {
        return Err(Failure::usage(format!("{input}: {what}")));
    }
    let mut archive = Archive::layer(&args.input, &args.input, false)?;
    let delta = mkfs::apply(
        &mut archive,
        &args.input,
        Some(stack),
        &uuid.to_ascii_uppercase(),
        args.allow_loss,
        directory(&args.output),
    )?;
    let ident = args.new.ident.ident(Below::of(&uuid), |below| {
        derive(delta.size, below, &delta.runs, |at, buf| {
            delta.read(at, buf)
        })
    })?;
    delta.write(ident, output)
}
