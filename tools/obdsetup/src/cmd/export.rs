// SPDX-License-Identifier: GPL-2.0

//! `obdsetup export`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::ValueEnum;
use overlaybd::Stack;
use tempfile::NamedTempFile;

use crate::files::in_use::InUseArgs;
use crate::files::place::{directory, name_full, temp_file};
use crate::input::chain::ChainArgs;
use crate::input::layer_name::LayerArg;
use crate::input::layers::{expand, open_layers, open_stack, paths};
use crate::input::qemu;
use crate::make::made::NewDirectory;
use crate::make::output::Output;
use crate::make::raw_out::{self, Dest};
use crate::program;
use crate::terminal::exit::Failure;

/// Formats of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// The bytes of the disk
    Raw,
    /// QEMU's format, by qemu-img, which must be installed
    Qcow2,
}

/// Arguments of `export`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup export -o disk.raw base.obd app.obd
  obdsetup export -o disk.raw config.v1.json
      a stack of containerd's, if its layers are on this machine
  obdsetup export -o - base.obd app.obd | zstd >disk.raw.zst
  obdsetup export --force -o /dev/vg/disk base.obd app.obd
  obdsetup export --to qcow2 -o disk.qcow2 base.obd app.obd
  obdsetup export --to qcow2 --chain -o vm base.obd app.obd
      vm/layer0.qcow2 below vm/layer1.qcow2

The file has holes where no layer has data and where there are zeros. Every block that is read is \
checked. Needs no kernel module. A qcow2 image is made from a raw image with holes, a temporary file \
in the same directory. For a part of the disk, or the content of a ZFile, see `dump`.")]
pub(crate) struct Args {
    /// Layers, lowest first: files or block devices; NAME:size=BYTES if the blob is shorter than the
    /// device, or than the padded file; or a config.v1.json that lists layers
    #[arg(required = true, value_name = "LAYER")]
    layers: Vec<LayerArg>,

    /// The file or device to write, or the new directory with --chain; `-` is standard output
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// Format of the disk image (raw if not given)
    #[arg(long, value_enum, value_name = "FORMAT")]
    to: Option<Format>,

    /// Make a directory with a qcow2 image of each layer: layerN.qcow2, N from 0. The backing file of an image
    /// is the image of the layer below
    #[arg(long = "chain", conflicts_with_all = ["no_sparse", "force"])]
    files: bool,

    /// Write zeros to the file, too, so that it has no holes; to a device, zeros are always written
    #[arg(long)]
    no_sparse: bool,

    /// Replace a file that exists, or overwrite a device
    #[arg(short, long)]
    force: bool,

    #[command(flatten)]
    in_use: InUseArgs,

    #[command(flatten)]
    chain: ChainArgs,
}

/// Runs `export`.
pub(crate) fn run(args: &Args) -> Result<()> {
    let layers = expand(&args.layers)?;
    let inputs = paths(&[&args.layers, &layers]);
    match args.to.unwrap_or(Format::Raw) {
        Format::Raw if args.files => Err(Failure::usage(
            "--chain makes qcow2 images: give --to qcow2, too",
        )),
        Format::Raw => {
            let stack = open_stack(&layers, &args.chain, &args.in_use)?;
            let dest = Dest {
                path: &args.output,
                force: args.force,
                sparse: !args.no_sparse,
                inputs: &inputs,
            };
            raw_out::write(&stack, 0, stack.virtual_size(), &dest)
        }
        Format::Qcow2 if args.no_sparse => Err(Failure::usage(
            "--no-sparse is for raw images: a qcow2 image never stores zeros",
        )),
        Format::Qcow2 if args.output.as_os_str() == "-" => Err(Failure::usage(
            "a qcow2 image is not for standard output: give a file with --output",
        )),
        Format::Qcow2 if args.files => {
            // Check all layers before the directory is made.
            drop(open_stack(&layers, &args.chain, &args.in_use)?);
            export_chain(&layers, &args.in_use, &args.output)
                .map_err(|error| name_full(directory(&args.output), error))
        }
        Format::Qcow2 => {
            let stack = open_stack(&layers, &args.chain, &args.in_use)?;
            let output = Output::create(&args.output, args.force, inputs)?;
            let place = directory(output.path()).to_owned();
            export_qcow2(&stack, output).map_err(|error| name_full(&place, error))
        }
    }
}

/// Makes a qcow2 image of the disk of `stack`.
fn export_qcow2(stack: &Stack, output: Output) -> Result<()> {
    let place = directory(output.path());
    let raw = raw(stack, place, place)?;
    qemu::write(&program::path(raw.path())?, &output.file_path()?)?;
    output.commit()
}

/// Makes a directory with a qcow2 image of each layer.
fn export_chain(layers: &[LayerArg], in_use: &InUseArgs, out: &Path) -> Result<()> {
    let made = NewDirectory::new(out)?;
    let place = program::path(made.path())?;
    let mut below: Option<OsString> = None;
    for nth in 0..layers.len() {
        let upto = layers.get(..=nth).unwrap_or_default();
        let stack = Stack::new(open_layers(upto, in_use)?)?;
        let raw = raw(&stack, &place, out)?;
        let name = format!("layer{nth}.qcow2");
        // Made here, so that it gets the permissions from the umask. qemu-img keeps them.
        made.write(&name, b"")?;
        let to = place.join(&name);
        match &below {
            None => qemu::write(raw.path(), &to)?,
            Some(below) => qemu::write_over(raw.path(), below, &to)?,
        }
        made.sync(&name)?;
        below = Some(name.into());
    }
    made.finish()
}

/// Makes a raw image of the disk of `stack`, with holes, in the directory `place`. Messages name the directory
/// `shown` instead: `place` may be a temporary directory that is renamed to `shown` at the end.
fn raw(stack: &Stack, place: &Path, shown: &Path) -> Result<NamedTempFile> {
    let mut raw = temp_file(place)?;
    raw_out::write_file(stack, 0, stack.virtual_size(), raw.as_file_mut(), true)
        .map_err(|error| error.in_file(shown))?;
    Ok(raw)
}
