// SPDX-License-Identifier: GPL-2.0

//! `obdsetup create`.

use std::cmp::Ordering;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{bail, Result};
use clap::ArgGroup;
use overlaybd::changes::Mapped;
use overlaybd::format::{merge, Blob};
use overlaybd::{FileBlob, LayerReader, Stack};

use crate::devices::store::reading::Closed;
use crate::devices::store::thin;
use crate::files::in_use::InUseArgs;
use crate::files::place::directory;
use crate::input::chain::{ChainArgs, Part};
use crate::input::kind;
use crate::input::layer_name::LayerArg;
use crate::input::layers::{expand, open_layers, paths};
use crate::make::image_layer::{self, CompareArgs};
use crate::make::layer_args::NewLayerArgs;
use crate::make::layer_out::{LayerOut, Source};
use crate::make::mkfs::{self, FileSystem, Files, New};
use crate::terminal::exit::Failure;
use crate::terminal::size;

// An option that requires one of the inputs is also declared to conflict with the other inputs: clap ignores a
// requirement if the required argument conflicts with one that is given.
/// Arguments of `create`.
#[derive(clap::Args)]
#[command(group(ArgGroup::new("input").args(["image", "changes", "directory"]).required(true)))]
#[command(after_help = "Examples:
  obdsetup create --image disk.raw base.obd
  obdsetup create --directory rootfs --fs ext4 base.obd
  obdsetup create --directory rootfs --fs ext4 --size 1g base.obd
      with room to grow
  obdsetup create --directory rootfs --fs erofs --algorithm none base.lsmt
  obdsetup create --base base.obd --image changed.raw app.obd
      the difference only
  obdsetup create --changes app.changes --base base.obd app.obd
      what was written to a disk

Holes of an image are left out of the layer; with --skip-zeros, other zeros are, too. With --base, \
blocks that changed are data, and blocks that became zero are marked as zeros (a discard). Of a \
store of changes, which `open --writable' makes, only the blocks that were written are read and \
compared; the layer is the same as one made from the whole disk. A file that is certainly no disk, \
such as an archive or a qcow2, is refused, and so is one whose size is no whole number of sectors; \
--raw accepts them. For qcow2, vmdk, tars and OCI images, see `convert`.")]
pub(crate) struct Args {
    /// The file to make
    #[arg(value_name = "OUT")]
    output: PathBuf,

    /// A disk image
    #[arg(long, value_name = "FILE", conflicts_with_all = ["directory", "changes"])]
    image: Option<PathBuf>,

    /// Use the bytes of the image as the disk, even if it is an archive or in another format
    #[arg(long, requires = "image", conflicts_with_all = ["directory", "changes"])]
    raw: bool,

    /// A store that `open --writable' has filled, and that was closed; --base gives the layers that it was
    /// opened with
    #[arg(long, value_name = "STORE", requires = "base", conflicts_with_all = ["directory", "grow"])]
    changes: Option<PathBuf>,

    /// The store is a thin volume whose external origin is the disk of --base; XML is the output of
    /// thin_dump(8) or thin_delta(8) for it
    #[arg(long, value_name = "XML", requires = "changes", conflicts_with_all = ["image", "directory"])]
    thin_map: Option<PathBuf>,

    /// A directory, whose files are put in a new file system
    #[arg(long, value_name = "DIR", requires = "fs")]
    directory: Option<PathBuf>,

    /// The file system for --directory
    #[arg(long, value_enum, requires = "directory", conflicts_with_all = ["image", "changes"])]
    fs: Option<FileSystem>,

    /// Size of the file system: ext2, ext3, ext4 and btrfs have one (estimated if not given)
    #[arg(
        long,
        value_name = "SIZE",
        value_parser = size::parse,
        requires = "directory",
        conflicts_with_all = ["image", "changes"]
    )]
    size: Option<u64>,

    /// An option for mkfs (may be given more than once)
    #[arg(
        long,
        value_name = "ARG",
        requires = "directory",
        conflicts_with_all = ["image", "changes"],
        allow_hyphen_values = true
    )]
    mkfs_arg: Vec<OsString>,

    /// Leave out what the file system cannot hold, such as ACLs, and only warn
    #[arg(long, requires = "directory", conflicts_with_all = ["image", "changes"])]
    allow_loss: bool,

    /// Keep whiteouts (.wh.NAME), with which a layer of an image hides files, as ordinary files
    #[arg(long, requires = "directory", conflicts_with_all = ["image", "changes"])]
    keep_whiteouts: bool,

    /// Layers below, lowest first (one after each --base), or a config.v1.json that lists them
    #[arg(long, value_name = "LAYER", conflicts_with = "directory")]
    base: Vec<LayerArg>,

    /// Accept an image that is larger than the disk of the layers below: the disk grows
    #[arg(long, requires = "base", conflicts_with = "directory")]
    grow: bool,

    /// Leave zeros out of a layer without --base
    #[arg(long, conflicts_with_all = ["base", "dax"])]
    skip_zeros: bool,

    #[command(flatten)]
    compare: CompareArgs,

    #[command(flatten)]
    in_use: InUseArgs,

    #[command(flatten)]
    chain: ChainArgs,

    #[command(flatten)]
    new: NewLayerArgs,
}

/// Runs `create`.
pub(crate) fn run(args: &Args) -> Result<()> {
    let below = expand(&args.base)?;
    let layers = paths(&[&args.base, &below]);
    let read = args.image.as_deref().or(args.changes.as_deref());
    let inputs = layers.into_iter().chain(read);
    if let Some(image) = args.image.as_deref().filter(|_| !args.raw) {
        kind::check_disk(image, args.new.wrap.dax)?;
    }
    let output = LayerOut::create(&args.output, &args.new, inputs)?;
    if let Some(store) = &args.changes {
        return of_changes(args, store, &below, output);
    }
    args.in_use.check(args.image.as_deref())?;

    // Zeros are left out of the layer of a new file system, too.
    let skip_zeros = args.skip_zeros || args.directory.is_some();
    let options = args.compare.options(skip_zeros, &args.new)?;
    let path = match (&args.directory, args.fs, &args.image) {
        (Some(from), Some(fs), _) => {
            return make_fs(args, from, fs)?.write(options, &args.new.ident, output);
        }
        (_, _, Some(image)) => image.as_path(),
        _ => bail!("neither --image nor --directory"),
    };
    let base = open_layers(&below, &args.in_use)?;
    args.chain.check(&base, Part::Whole)?;
    check_size(path, &base, args.grow)?;
    let from = Source::Image(path);
    image_layer::write(path, base, options, &args.new.ident, from, output)
}

/// Makes a layer from a store of changes or a thin volume, over the layers `below`.
fn of_changes(args: &Args, store: &Path, below: &[LayerArg], output: LayerOut) -> Result<()> {
    if let Some(map) = &args.thin_map {
        return of_thin(args, store, map, below, output);
    }
    let from = Source::Image(store);
    let store = Closed::open(store)?;
    let base = open_layers(below, &args.in_use)?;
    args.chain.check(&base, Part::Whole)?;
    let base = Stack::new(base)?;
    let disk = store.over(&base)?;
    let options = args.compare.options(false, &args.new)?;
    let names = &args.new.ident;
    image_layer::write_image(&disk, Some(&base), options, names, from, output)
}

/// Makes a layer from the mapped blocks of a thin volume, over the layers `below`, whose disk is its external
/// origin. `map` is the output of thin_dump(8) or thin_delta(8).
fn of_thin(
    args: &Args,
    volume: &Path,
    map: &Path,
    below: &[LayerArg],
    output: LayerOut,
) -> Result<()> {
    args.in_use.check([volume])?;
    let map = thin::Map::read(map)?;
    map.check(volume)?;
    let base = open_layers(below, &args.in_use)?;
    args.chain.check(&base, Part::Whole)?;
    check_size(volume, &base, false)?;
    let from = Source::Image(volume);
    let volume = FileBlob::open(volume, None)?;
    let base = Stack::with_size(base, volume.size())?;
    let disk = Mapped::new(&volume, map.ranges);
    let options = args.compare.options(false, &args.new)?;
    let names = &args.new.ident;
    image_layer::write_image(&disk, Some(&base), options, names, from, output)
}

/// Checks that the image at `path` is as large as the disk below it. If it isn't, it is most likely an image
/// of something else.
fn check_size(path: &Path, base: &[LayerReader], grow: bool) -> Result<()> {
    if base.is_empty() {
        return Ok(());
    }
    let below = merge::virtual_size(base.iter().map(|layer| layer.lsmt().virtual_size()))
        .map_err(overlaybd::Error::from)?;
    let size = FileBlob::open(path, None)?.size();
    let what = match merge::sectors(size).cmp(&merge::sectors(below)) {
        Ordering::Equal => return Ok(()),
        Ordering::Greater if grow => return Ok(()),
        Ordering::Greater => "--grow makes a larger disk of it",
        Ordering::Less => "its end would be cut off: give a disk as large as that",
    };
    Err(Failure::usage(format!(
        "{}: has {size} bytes, but the layers below are a disk of {below} bytes: {what}",
        path.display()
    )))
}

/// Makes a file system from a directory, with temporary files next to the output.
fn make_fs(args: &Args, from: &Path, fs: FileSystem) -> Result<New> {
    if !from.is_dir() {
        return Err(Failure::usage(format!(
            "{}: not a directory: `obdsetup convert' takes tars and disk images",
            from.display()
        )));
    }
    let options = mkfs::Options {
        fs,
        size: args.size,
        args: &args.mkfs_arg,
        allow_loss: args.allow_loss,
        keep_whiteouts: args.keep_whiteouts,
        dax: args.new.wrap.dax,
    };
    mkfs::make(Files::Directory(from), &options, directory(&args.output))
}
