// SPDX-License-Identifier: GPL-2.0

//! File systems that hold the files of a directory or a tar.
//!
//! - [`tree`]: the files in memory, read by [`from_dir`] and [`from_tar`].
//! - [`fit`]: what a file system cannot hold; [`stamp`]: identity and time of it.
//! - [`ext`], [`erofs`], [`btrfs`], [`squashfs`]: how each is made. [`pax`] and [`stage`] are what their programs
//!   read.

mod acl;
mod btrfs;
mod erofs;
mod ext;
mod fit;
mod from_dir;
mod from_tar;
mod limits;
mod pax;
mod records;
mod squashfs;
mod stage;
mod stamp;
mod tree;
mod usage;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result};
use clap::ValueEnum;
use tempfile::NamedTempFile;

use self::stamp::Stamp;
use self::tree::{Kind, Tree};
use self::usage::Usage;
use crate::exit::Failure;
use crate::layers::warn;
use crate::program;

/// A file system that has a mkfs which fills it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FileSystem {
    Ext2,
    Ext3,
    Ext4,
    Btrfs,
    Erofs,
    Squashfs,
}

impl FileSystem {
    /// Bytes that are needed besides the files, where the size of the file system must be given.
    fn overhead(self) -> Option<u64> {
        match self {
            Self::Ext2 | Self::Ext3 | Self::Ext4 => Some(32 << 20),
            Self::Btrfs => Some(256 << 20),
            Self::Erofs | Self::Squashfs => None,
        }
    }

    fn program(self) -> String {
        match self {
            Self::Squashfs => "mksquashfs".to_owned(),
            other => format!("mkfs.{}", other.name()),
        }
    }

    fn name(self) -> String {
        format!("{self:?}").to_ascii_lowercase()
    }
}

/// The file system to be made.
pub(crate) struct Options<'a> {
    pub(crate) fs: FileSystem,
    /// Bytes; estimated where not given.
    pub(crate) size: Option<u64>,
    /// Further arguments for mkfs.
    pub(crate) args: &'a [OsString],
    /// Whether data that the file system cannot hold may be left out.
    pub(crate) allow_loss: bool,
}

/// Files to be put in a file system.
#[derive(Clone, Copy)]
pub(crate) enum Files<'a> {
    Directory(&'a Path),
    /// A tar, compressed or not, that [`crate::archive::check`] looked through.
    Tar(&'a Path),
}

/// Makes a file system that holds `files`, in a file in directory `place`.
pub(crate) fn make(files: Files<'_>, options: &Options<'_>, place: &Path) -> Result<NamedTempFile> {
    let fs = options.fs;
    let from = match files {
        Files::Directory(path) | Files::Tar(path) => program::path(path)?,
    };
    if matches!(files, Files::Directory(_)) && program::path(place)?.starts_with(&from) {
        return Err(Failure::usage(format!(
            "{}: the output cannot be in the directory that it is made of",
            from.display()
        )));
    }
    if fs.overhead().is_none() && options.size.is_some() {
        return Err(Failure::usage(format!(
            "{} takes no --size: it is as large as its files need",
            fs.name()
        )));
    }
    let (mut tree, directory) = match files {
        Files::Directory(_) => (from_dir::read(&from)?, Some(from.as_path())),
        Files::Tar(_) => (from_tar::read(&from, place)?, None),
    };
    stamp::clamp(&mut tree)?;
    fit::fit(&mut tree, options)?;
    let size = match (options.size, fs.overhead()) {
        (None, Some(overhead)) => Some(Usage::of(&tree)?.with_room(overhead)),
        (given, _) => given,
    };
    let name = fs.name();
    let size_text = size.unwrap_or_default().to_le_bytes();
    let mut more = vec![name.as_bytes(), size_text.as_slice()];
    more.extend(options.args.iter().map(|arg| arg.as_bytes()));
    let stamp = Stamp::of(&tree, &more)?;
    let made = match (fs, size) {
        (FileSystem::Squashfs, _) => squashfs::make(&tree, options, &stamp, place),
        (FileSystem::Erofs, _) => erofs::make(&tree, options, &stamp, place),
        (FileSystem::Btrfs, size) => {
            btrfs::make(&tree, options, size.unwrap_or_default(), &stamp, place)
        }
        (_, size) => ext::make(
            &tree,
            directory,
            options,
            size.unwrap_or_default(),
            &stamp,
            place,
        ),
    };
    made.with_context(|| match (options.size, size) {
        (None, Some(size)) => format!(
            "cannot make a file system of {} (estimated; --size gives another size)",
            crate::size::show(size)
        ),
        _ => "cannot make a file system".to_owned(),
    })
}

/// Holes of which is told before they are read as zeros: a few seconds.
const LONG_HOLES: u64 = 4 << 30;

/// Warns where a program that doesn't know holes has much to read; `cost` is what that takes.
fn tell_of_holes(tree: &Tree, fs: FileSystem, cost: &str) -> Result<()> {
    let mut holes = 0;
    for name in tree.names().iter().filter(|name| name.first) {
        if let Kind::File(content) = &tree.node(name.id)?.kind {
            holes += content.size.saturating_sub(content.data_len());
        }
    }
    if holes >= LONG_HOLES {
        warn(&[format!(
            "holes of {} are read as zeros for {}, which takes {cost}; ext4, btrfs, and erofs \
             without --mkfs-arg need none",
            crate::size::show(holes),
            fs.name()
        )]);
    }
    Ok(())
}
