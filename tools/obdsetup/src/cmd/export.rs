// SPDX-License-Identifier: GPL-2.0

//! `obdsetup export`.

use std::path::PathBuf;

use anyhow::Result;

use crate::chain::ChainArgs;
use crate::layers::{expand, open_stack, paths, LayerArg};
use crate::raw_out::{self, Dest};

/// Arguments of `export`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup export -o disk.raw base.obd app.obd
  obdsetup export -o disk.raw config.v1.json     a stack of containerd's, if its layers are here
  obdsetup export -o - base.obd app.obd | zstd >disk.raw.zst
  obdsetup export --force -o /dev/vg/disk base.obd app.obd

The file has holes where no layer has data and where there are zeros. Every block that is read is
checked. Needs no kernel module. For a part of the disk, or what a ZFile holds, see `dump`.")]
pub(crate) struct Args {
    /// Layers, lowest first, DEVICE:size=BYTES, or a config.v1.json that lists them
    #[arg(required = true, value_name = "LAYER")]
    layers: Vec<LayerArg>,

    /// The file or device to write; `-` is standard output
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// Write zeros, too: all of the file has its place on the disk
    #[arg(long)]
    no_sparse: bool,

    /// Replace a file that exists, or overwrite a device
    #[arg(short, long)]
    force: bool,

    #[command(flatten)]
    chain: ChainArgs,
}

/// Runs `export`.
pub(crate) fn run(args: &Args) -> Result<()> {
    let layers = expand(&args.layers)?;
    let stack = open_stack(&layers, &args.chain)?;
    let dest = Dest {
        path: &args.output,
        force: args.force,
        sparse: !args.no_sparse,
        inputs: &paths(&[&args.layers, &layers]),
    };
    raw_out::write(&stack, 0, stack.virtual_size(), &dest)
}
