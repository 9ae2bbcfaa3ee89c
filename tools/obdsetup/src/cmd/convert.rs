// SPDX-License-Identifier: GPL-2.0

//! `obdsetup convert`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Result;
use tempfile::NamedTempFile;

use crate::files::in_use::InUseArgs;
use crate::files::place::{directory, name_full};
use crate::input::archive::{self, Package};
use crate::input::kind::{unpacked, Input, Kind};
use crate::input::layer_name::LayerArg;
use crate::input::layers::open_layers;
use crate::input::qemu;
use crate::make::image_layer::{self, CompareArgs};
use crate::make::layer_args::{IdentArgs, NewLayerArgs};
use crate::make::layer_out::{LayerOut, Source};
use crate::make::made::Made;
use crate::make::mkfs::{self, FileSystem, Files};
use crate::make::output::check_dash;
use crate::oci;
use crate::terminal::exit::Failure;
use crate::terminal::size;

/// Arguments of `convert`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup convert disk.qcow2 base.obd
  obdsetup convert snapshot.qcow2 vm
      with backing files: a layer of each, and vm/config.v1.json
  obdsetup convert rootfs.tar.gz base.obd --fs erofs
  obdsetup convert rootfs base.obd --size 4g
  obdsetup convert layout app && obdsetup open app app/config.v1.json
      a container image
  obdsetup convert saved.tar app --oci     the same for a registry

The type of IN is detected by its content, never by its name; --from overrides it:

  disk          with a partition table or a known file system (ext4, xfs, btrfs,
                FAT, ISO, LVM, LUKS, swap...): its bytes are the disk
  qcow2, vmdk, vhdx, vpc, vdi, qed, parallels
                read by qemu-img, which must be installed
  tar           its files are put in a new file system; see --fs
  directory     likewise
  OCI image layout, or an archive of one (docker save, podman save)
                see below
  gzip, bzip2, xz, lzma, lzip, zstd, lz4
                of a tar or disk: decompressed

OVA, Vagrant boxes, disks in a tar, images of LXD and Incus, zip, cpio, 7-Zip, deb, rpm, Android \
sparse images and others are refused, with advice. Anything else, and a disk whose size is no whole \
number of sectors, needs --from raw. A tar is read to its end first: a damaged or incomplete one is \
refused.

qemu-img also reads the files that an image refers to, such as its backing file: convert only images \
that you trust, and use --from raw for a raw disk that others wrote. OUT is one layer, the lowest of \
a stack, without zeros.

If IN is a qcow2 image with backing files, OUT is a directory with a layer for each file of the \
chain, which has the differences to the files below, and a config.v1.json that lists the layers. \
With --flatten, OUT is one layer.

If IN is a container image, from `skopeo copy docker://... oci:layout` or `docker save`, OUT is a \
directory with a layer for each layer of the image; a config.v1.json that lists them with absolute \
names, which all commands accept in the place of layers; and image.json, the image's description \
with its command, environment and user. The file system is an erofs. Files that a layer of the image \
does not change stay in their place, so each layer of OUT has only the changes, and images that have \
layers in common get identical files for these. With --oci, OUT is an OCI image layout for a \
registry, as containerd's converter makes it; `skopeo copy --preserve-digests` copies it there. \
Layers that are OverlayBD layers already are copied unchanged, and options for layers are refused.

--cache keeps the layers that are made, and reuses those that an earlier run made from the same \
layers with the same options. Nothing is ever removed from the cache. By default, there is none.

To make a layer of the difference to other layers, see `create --base`.")]
pub(crate) struct Args {
    /// A disk image, block device, directory, tar, or container image
    #[arg(value_name = "IN")]
    input: PathBuf,

    /// The file to make, or the directory, for a container image or a qcow2 image with backing files
    #[arg(value_name = "OUT")]
    output: PathBuf,

    /// What IN is
    #[arg(long, value_enum, value_name = "KIND")]
    from: Option<Kind>,

    /// The file system for a directory or tar (ext4 if not given)
    #[arg(long, value_enum, help_heading = "Directories and tars")]
    fs: Option<FileSystem>,

    /// Size of the file system: ext2, ext3, ext4 and btrfs have one (estimated if not given)
    #[arg(
        long,
        value_name = "SIZE",
        value_parser = size::parse,
        help_heading = "Directories and tars"
    )]
    size: Option<u64>,

    /// An option for mkfs (may be given more than once)
    #[arg(
        long,
        value_name = "ARG",
        allow_hyphen_values = true,
        help_heading = "Directories and tars"
    )]
    mkfs_arg: Vec<OsString>,

    /// Keep whiteouts (.wh.NAME), with which a layer of an image hides files, as ordinary files
    #[arg(long, help_heading = "Directories and tars")]
    keep_whiteouts: bool,

    /// Leave out what the file system cannot hold, such as ACLs, and only warn
    #[arg(long, help_heading = "Directories and tars")]
    allow_loss: bool,

    /// Make one layer of a qcow2 image and its backing files, not a layer of each
    #[arg(long)]
    flatten: bool,

    /// Also read files outside the directory of IN that IN refers to: backing files, extents of a vmdk;
    /// whoever made IN may have named any file of this machine
    #[arg(long)]
    allow_outside: bool,

    #[command(flatten)]
    in_use: InUseArgs,

    #[command(flatten)]
    oci: oci::Choice,

    #[command(flatten)]
    compare: CompareArgs,

    #[command(flatten)]
    new: NewLayerArgs,
}

/// Runs `convert`.
pub(crate) fn run(args: &Args) -> Result<()> {
    // Before a tar is read, which may take long.
    check_dash(&args.output)?;
    let input = match args.from {
        Some(kind) => Input::told(&args.input, kind)?,
        None => Input::of(&args.input, args.new.wrap.dax)?,
    };
    let kind = input.kind;
    let refuse = |what: &str| {
        let message = format!("{}: {what}", args.input.display());
        Err(Failure::usage(message))
    };
    let files = matches!(kind, Kind::Directory | Kind::Tar);
    let for_files = args.fs.is_some()
        || args.size.is_some()
        || args.allow_loss
        || args.keep_whiteouts
        || !args.mkfs_arg.is_empty();
    if kind == Kind::Oci || kind == Kind::Tar && is_image(args)? {
        return convert_image(args);
    }
    if !files && for_files {
        return refuse(
            "is no directory or tar; --fs, --size, --mkfs-arg, --allow-loss and --keep-whiteouts are for those",
        );
    }
    if args.oci != oci::Choice::default() {
        return refuse("is no OCI image; --ref, --platform, --oci and --cache are for those");
    }
    if args.flatten && kind != Kind::Qcow2 {
        return refuse("is no qcow2 image; --flatten is for those with backing files");
    }
    if args.allow_outside && !matches!(kind, Kind::Qcow2 | Kind::Qed | Kind::Vmdk) {
        return refuse(
            "names no other files; --allow-outside is for qcow2, qed and vmdk images, which may",
        );
    }
    if let Some(copy) = input.raw_for_dax().filter(|_| args.new.wrap.dax) {
        let then = match kind.for_qemu() {
            Some(_) => ", of which `convert --from raw --dax' makes the layer",
            None => "",
        };
        return refuse(&format!(
            "--dax needs an uncompressed raw disk: {copy}{then}"
        ));
    }
    let mut link = None;
    if let (Some(format), None) = (kind.for_qemu(), input.compression) {
        let layers = kind == Kind::Qcow2 && !args.flatten;
        let rules = qemu::Rules {
            layers,
            outside: args.allow_outside,
        };
        let mut chain = qemu::chain(&args.input, format, &args.in_use, rules)?;
        if chain.len() > 1 && layers {
            return convert_chain(args, &chain);
        }
        link = chain.pop();
    }
    let output = LayerOut::create(&args.output, &args.new, [args.input.as_path()])?;
    args.in_use.check([args.input.as_path()])?;
    let place = directory(&args.output);
    // This file is deleted when it is dropped.
    let unpacked = match input.compression {
        // The reader of tars decompresses them.
        Some(compression) if kind != Kind::Tar => {
            let is_raw = kind == Kind::Raw;
            Some(unpacked::unpack(&args.input, compression, is_raw, place)?)
        }
        _ => None,
    };
    let disk = path_of(unpacked.as_ref(), &args.input);
    if let (Some(format), Some(_)) = (kind.for_qemu(), &unpacked) {
        qemu::check_alone(disk, &args.input, format)?;
    }
    let options = args.compare.options(true, &args.new)?;
    let ident = &args.new.ident;
    let read = match (kind, kind.for_qemu()) {
        (Kind::Directory, _) => {
            let made = make_fs(args, Files::Directory(&args.input), place)?;
            return made.write(options, ident, output);
        }
        (Kind::Tar, _) => {
            let made = make_fs(args, Files::Tar(&args.input), place)?;
            return made.write(options, ident, output);
        }
        (_, Some(format)) => {
            let files = link.as_ref().map_or_else(|| vec![disk], qemu::Link::files);
            let read = qemu::read(disk, &args.input, format, &files, place);
            Some(read.map_err(|error| name_full(place, error))?)
        }
        (_, None) => None,
    };
    let path = path_of(read.as_ref(), disk);
    let from = Source::Image(&args.input);
    image_layer::write(path, Vec::new(), options, ident, from, output)
}

/// Makes a directory from a qcow2 image and its backing files, with a layer for each of them.
fn convert_chain(args: &Args, chain: &[qemu::Link]) -> Result<()> {
    if args.new.force || args.new.ident != IdentArgs::default() {
        return Err(Failure::usage(format!(
            "{}: has backing files, each of which becomes a layer in a directory: no --force and no identity is \
             for it; --flatten makes one layer of all",
            args.input.display()
        )));
    }
    let mut made = Made::new(&args.output)?;
    let wrapping = args.new.wrap.wrapping()?;
    for (nth, link) in chain.iter().enumerate() {
        // This file is deleted when it is dropped.
        let raw = link.read(made.path());
        let raw = raw.map_err(|error| name_full(directory(&args.output), error))?;
        let below: Vec<LayerArg> = made
            .layers()
            .into_iter()
            .map(|path| LayerArg { path, size: None })
            .collect();
        let output = LayerOut::with(&made.next_layer(), wrapping)?;
        let options = args.compare.options(nth == 0, &args.new)?;
        let path = path_of(raw.as_ref(), &link.path);
        image_layer::write(
            path,
            open_layers(&below, &args.in_use)?,
            options,
            &args.new.ident,
            Source::Image(&link.path),
            output,
        )?;
        made.add(None);
        // The backing file may be any file of this machine.
        if args.allow_outside {
            crate::terminal::tell(&format!("layer {nth}: of {}", link.path.display()));
        }
    }
    made.finish_config()
}

fn path_of<'a>(file: Option<&'a NamedTempFile>, otherwise: &'a Path) -> &'a Path {
    file.map_or(otherwise, NamedTempFile::path)
}

/// Checks that the tar is complete. Returns whether it is an archive of an image, and not a tree of files.
fn is_image(args: &Args) -> Result<bool> {
    let findings = archive::check(&args.input)?;
    let input = args.input.display();
    if let Some(package) = findings.package.filter(|_| args.from.is_none()) {
        return match package {
            Package::Docker | Package::Oci => Ok(true),
            other => Err(Failure::usage(other.refusal(&args.input))),
        };
    }
    match findings.whiteout {
        Some(name) if !args.keep_whiteouts => Err(Failure::usage(format!(
            "{input}: a layer of a container image: {name:?} hides a file of the layers below, which are not in this \
             tar: convert the whole image, put this tar over them with `obdsetup apply', or take such names for \
             files with --keep-whiteouts"
        ))),
        _ => Ok(false),
    }
}

/// Makes a directory from a container image.
fn convert_image(args: &Args) -> Result<()> {
    args.in_use.check([args.input.as_path()])?;
    let refuse = |what: &str| {
        let message = format!("{}: is a container image: {what}", args.input.display());
        Err(Failure::usage(message))
    };
    if args.fs.is_some_and(|fs| fs != FileSystem::Erofs)
        || args.size.is_some()
        || !args.mkfs_arg.is_empty()
        || args.keep_whiteouts
    {
        return refuse(
            "its layers become an erofs in which unchanged files stay in their place: no other --fs, no \
             --size, no --mkfs-arg and no --keep-whiteouts is for it",
        );
    }
    if args.new.wrap.dax {
        return refuse("--dax is not for it, since its layers leave zeros out: unpack it and convert the directory");
    }
    if args.new.force
        || args.new.ident != IdentArgs::default()
        || args.compare != CompareArgs::default()
    {
        return refuse("no --force, no --granularity and no identity is for it");
    }
    oci::convert(&oci::Job {
        input: &args.input,
        choice: &args.oci,
        new: &args.new,
        shapes_layers: args.new != NewLayerArgs::default() || args.allow_loss || args.fs.is_some(),
        allow_loss: args.allow_loss,
        out: &args.output,
    })
}

fn make_fs(args: &Args, files: Files<'_>, place: &Path) -> Result<mkfs::New> {
    let options = mkfs::Options {
        fs: args.fs.unwrap_or(FileSystem::Ext4),
        size: args.size,
        args: &args.mkfs_arg,
        allow_loss: args.allow_loss,
        keep_whiteouts: args.keep_whiteouts,
        dax: args.new.wrap.dax,
    };
    mkfs::make(files, &options, place)
}
