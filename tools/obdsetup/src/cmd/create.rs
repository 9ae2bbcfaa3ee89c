// SPDX-License-Identifier: GPL-2.0

//! `obdsetup create`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{bail, Context, Result};
use clap::ValueEnum;
use overlaybd::diff::{self, Options};
use overlaybd::format::num::{to_u64, to_usize};
use overlaybd::format::Blob;
use overlaybd::layer::Ident;
use overlaybd::lsmt_writer::{cut, LayerWriter};
use overlaybd::{FileBlob, Stack};
use tempfile::NamedTempFile;
use uuid::Uuid;

use crate::bar::Bar;
use crate::exit::Failure;
use crate::interrupt;
use crate::layer_out;
use crate::layers::{expand, open_layers, paths, LayerArg};
use crate::output::{directory, temp_file, Output};
use crate::size;
use crate::wrap_args::{uuid_text, IdentArgs, WrapArgs};

/// Arguments of `create`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup create --image disk.raw base.obd
  obdsetup create --directory rootfs --fs ext4 --size 1g base.obd
  obdsetup create --directory rootfs --fs erofs --algorithm none base.lsmt
  obdsetup create --base base.obd --image changed.raw app.obd     the difference only

Holes of an image stay out of the layer; --skip-zeros keeps zeros out too. With --base, what
changed is data, and what became zero is marked as zeros (a discard).")]
pub(crate) struct Args {
    /// The file to make
    #[arg(value_name = "OUT")]
    output: PathBuf,

    /// A disk image
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present = "directory",
        conflicts_with = "directory"
    )]
    image: Option<PathBuf>,

    /// A directory, to be put in a file system
    #[arg(long, value_name = "DIR", requires = "fs")]
    directory: Option<PathBuf>,

    /// The file system for --directory
    #[arg(long, value_enum, requires = "directory")]
    fs: Option<FileSystem>,

    /// Size of the file system; ext2, ext3, ext4 and btrfs need it
    #[arg(long, value_name = "SIZE", value_parser = size::parse, requires = "directory")]
    size: Option<u64>,

    /// An option for mkfs (may be given more than once)
    #[arg(
        long,
        value_name = "ARG",
        requires = "directory",
        allow_hyphen_values = true
    )]
    mkfs_arg: Vec<OsString>,

    /// Layers below, lowest first (one after each --base), or a config.v1.json that lists them
    #[arg(long, value_name = "LAYER", conflicts_with = "directory")]
    base: Vec<LayerArg>,

    /// Leave zeros out where nothing is below
    #[arg(long, conflicts_with = "base")]
    skip_zeros: bool,

    /// Compare and skip in units of this: a power of two from 512 to 1m
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = granule)]
    granularity: u64,

    /// Replace a file that exists
    #[arg(short, long)]
    force: bool,

    #[command(flatten)]
    wrap: WrapArgs,

    #[command(flatten)]
    ident: IdentArgs,
}

/// A file system that has a mkfs which fills it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FileSystem {
    Ext2,
    Ext3,
    Ext4,
    Btrfs,
    Erofs,
    Squashfs,
}

fn granule(text: &str) -> Result<u64, String> {
    match size::parse(text)? {
        size if size.is_power_of_two() && (512..=1 << 20).contains(&size) => Ok(size),
        _ => Err("a power of two from 512 to 1m".to_owned()),
    }
}

/// Runs `create`.
pub(crate) fn run(args: &Args) -> Result<()> {
    let wrapping = args.wrap.wrapping()?;
    let below = expand(&args.base)?;
    let layers = paths(&[&args.base, &below]);
    let inputs = layers.into_iter().chain(args.image.as_deref());
    let output = Output::create(&args.output, args.force, inputs)?;

    // Deleted when dropped.
    let made = match (&args.directory, args.fs) {
        (Some(from), Some(fs)) => Some(make_fs(args, from, fs)?),
        _ => None,
    };
    let path = match (&made, &args.image) {
        (Some(made), _) => made.path(),
        (None, Some(image)) => image.as_path(),
        (None, None) => bail!("neither --image nor --directory"),
    };
    let image = FileBlob::open(path, None)?;
    if image.size() == 0 {
        return Err(Failure::usage(format!("{}: empty", path.display())));
    }

    let base = match below.as_slice() {
        [] => None,
        base => Some(Stack::with_size(open_layers(base)?, image.size())?),
    };
    let options = Options {
        granule: args.granularity,
        // Nothing is in a new file system but what mkfs wrote.
        skip_zeros: args.skip_zeros || made.is_some(),
    };
    let runs = {
        let bar = Bar::new("comparing", image.size());
        diff::runs(&image, base.as_ref(), options, &|bytes| bar.advance(bytes))
            .map_err(|error| error.in_file(path))?
    };
    let writer = LayerWriter::new(image.size(), ident(args, base.as_ref()), cut(runs))
        .with_context(|| format!("{}: cannot make the layer", args.output.display()))?;
    let read = |offset: u64, buf: &mut [u8]| {
        // Behind the end of the image, its last sector is filled up with zeros.
        let inside = image.size().saturating_sub(offset).min(to_u64(buf.len()));
        let (data, tail) = buf.split_at_mut(to_usize(inside));
        tail.fill(0);
        image
            .read_at(offset, data)
            .map_err(|error| error.in_file(path))
    };
    layer_out::write(output, wrapping, &writer, "writing", read)
}

/// What the layer says of itself: what is asked for; the parent is the layer below.
fn ident(args: &Args, base: Option<&Stack>) -> Ident {
    let below = base.and_then(|base| base.layers().last());
    let parent = below.map(|below| below.ident().uuid.clone());
    let parent = parent.filter(|uuid| Ident::is_known(uuid));
    let none = || uuid_text(Uuid::nil());
    Ident {
        uuid: args.ident.uuid.map_or_else(none, uuid_text),
        parent: match args.ident.parent_uuid {
            Some(uuid) => uuid_text(uuid),
            None => parent.unwrap_or_else(none),
        },
        user_tag: args.ident.user_tag.clone().unwrap_or_default().into_bytes(),
    }
}

/// Makes a file system that holds the files of `from`, in a file beside the output.
fn make_fs(args: &Args, from: &Path, fs: FileSystem) -> Result<NamedTempFile> {
    if !from.is_dir() {
        return Err(Failure::usage(format!(
            "{}: not a directory",
            from.display()
        )));
    }
    let image = temp_file(directory(&args.output))?;
    let sized = !matches!(fs, FileSystem::Erofs | FileSystem::Squashfs);
    match args.size {
        Some(size) if sized => image.as_file().set_len(size)?,
        None if sized => return Err(Failure::usage(format!("{fs:?} needs --size"))),
        Some(_) => return Err(Failure::usage(format!("{fs:?} takes no --size"))),
        None => {}
    }
    let name = format!("{fs:?}").to_ascii_lowercase();
    let program = match fs {
        FileSystem::Squashfs => "mksquashfs".to_owned(),
        _ => format!("mkfs.{name}"),
    };
    let mut command = Command::new(&program);
    match fs {
        FileSystem::Ext2 | FileSystem::Ext3 | FileSystem::Ext4 => {
            command.args(["-q", "-F", "-d"]).arg(from);
            command.args(&args.mkfs_arg).arg(image.path());
        }
        FileSystem::Btrfs => {
            command.args(["-q", "--rootdir"]).arg(from);
            command.args(&args.mkfs_arg).arg(image.path());
        }
        FileSystem::Erofs => {
            command.args(&args.mkfs_arg).arg(image.path()).arg(from);
        }
        FileSystem::Squashfs => {
            command.arg(from).arg(image.path());
            command.args(["-noappend", "-quiet", "-no-progress"]);
            command.args(&args.mkfs_arg);
        }
    }
    let done = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    // A signal from the terminal stops mkfs too.
    interrupt::check()?;
    if !done.status.success() {
        let text = String::from_utf8_lossy(&done.stderr);
        bail!("{program} failed ({}): {}", done.status, text.trim());
    }
    Ok(image)
}
