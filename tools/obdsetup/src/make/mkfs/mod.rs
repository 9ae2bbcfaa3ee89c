// SPDX-License-Identifier: GPL-2.0

//! Makes file systems from the files of a directory or a tar.
//!
//! - [`tree`]: the tree of files in memory. [`from_dir`] and [`from_tar`] read it. [`state`]: whether a file changed
//!   meanwhile.
//! - [`fit`]: handles what a file system cannot store. [`stamp`]: UUIDs and time of a file system.
//! - [`ext`], [`erofs`], [`btrfs`], [`squashfs`]: make each file system. [`pax`] and [`stage`]
//!   write the input of their mkfs.
//! - [`dax`]: checks file systems for DAX.
//! - [`apply`]: puts a layer of an image over the layers below. [`whiteouts`] hide files of the layers
//!   below.

mod acl;
mod btrfs;
mod dax;
pub(crate) mod erofs;
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
mod state;
mod tree;
mod usage;
mod whiteouts;
mod witness;

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use clap::ValueEnum;
use overlaybd::layer::Ident;
use overlaybd::lsmt_writer::{cut, Run};
use overlaybd::{diff, Stack};
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;
use uuid::Builder;

use self::stamp::Stamp;
use self::tree::{Kind, Tree};
use self::usage::Usage;
use crate::files::place::name_full;
use crate::input::archive::Archive;
use crate::make::image_layer;
use crate::make::layer_args::IdentArgs;
use crate::make::layer_out::{plan, LayerOut, Source};
use crate::program;
use crate::terminal::exit::{is_full, Failure};
use crate::terminal::warn;

/// A file system that obdsetup can make and fill.
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
    /// Returns the number of bytes to add to the estimate for the files; `None` for a file system that
    /// is as large as its files need, and takes no size.
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

/// Options of a new file system.
pub(crate) struct Options<'a> {
    pub(crate) fs: FileSystem,
    /// Size in bytes; estimated if not given.
    pub(crate) size: Option<u64>,
    /// Additional arguments for mkfs.
    pub(crate) args: &'a [OsString],
    /// Whether data that the file system cannot store may be left out.
    pub(crate) allow_loss: bool,
    /// Whether files of a directory may have the names of whiteouts. Otherwise, such a name is an error.
    pub(crate) keep_whiteouts: bool,
    /// Whether all of the files must be such that DAX can map them: with blocks of 4 KiB, and without data beside
    /// inodes.
    pub(crate) dax: bool,
}

/// The files for a file system.
#[derive(Clone, Copy)]
pub(crate) enum Files<'a> {
    Directory(&'a Path),
    /// A tar, compressed or not, that [`crate::input::archive::check`] has checked.
    Tar(&'a Path),
}

/// A new file system.
pub(crate) enum New {
    /// In a temporary file, which is deleted when this is dropped.
    File(NamedTempFile),
    /// An erofs that is not stored as a whole: its layer is made from the files.
    Erofs(Box<erofs::Fresh>),
}

impl New {
    /// Writes a layer with the file system.
    pub(crate) fn write(
        &self,
        options: diff::Options,
        names: &IdentArgs,
        output: LayerOut,
    ) -> Result<()> {
        match self {
            Self::File(file) => {
                let path = file.path();
                image_layer::write(path, Vec::new(), options, names, Source::Files, output)
            }
            Self::Erofs(fresh) => image_layer::write_fresh(fresh, options, names, output),
        }
    }
}

/// Makes a file system with `files`. Temporary files are in the directory `place`.
pub(crate) fn make(files: Files<'_>, options: &Options<'_>, place: &Path) -> Result<New> {
    make_in(files, options, place).map_err(|error| name_full(place, error))
}

fn make_in(files: Files<'_>, options: &Options<'_>, place: &Path) -> Result<New> {
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
    if options.dax && !matches!(fs, FileSystem::Ext4 | FileSystem::Erofs) {
        return Err(Failure::usage(format!(
            "{} has no DAX: --dax needs --fs ext4 or --fs erofs",
            fs.name()
        )));
    }
    let (mut tree, directory) = match files {
        Files::Directory(_) => (
            from_dir::read(&from, options.keep_whiteouts)?,
            Some(from.as_path()),
        ),
        Files::Tar(_) => (from_tar::read(&from, place)?, None),
    };
    stamp::clamp(&mut tree)?;
    let instead = "use another file system, or --allow-loss to make the layer without them";
    fit::fit(&mut tree, options, instead)?;
    let size = match (options.size, fs.overhead()) {
        (None, Some(overhead)) => Some(Usage::of(&tree)?.with_room(overhead)),
        (given, _) => given,
    };
    let name = fs.name();
    let size_text = size.unwrap_or_default().to_le_bytes();
    let mut more = vec![name.as_bytes(), size_text.as_slice()];
    more.extend(options.args.iter().map(|arg| arg.as_bytes()));
    more.extend(options.dax.then_some(b"dax".as_slice()));
    let stamp = Stamp::of(&tree, &more)?;
    let made = match (fs, size) {
        (FileSystem::Squashfs, _) => squashfs::make(&tree, options, &stamp, place).map(New::File),
        (FileSystem::Erofs, _) => erofs::make(tree, options, &stamp, place),
        (FileSystem::Btrfs, size) => {
            let size = size.unwrap_or_default();
            btrfs::make(&tree, options, size, &stamp, place).map(New::File)
        }
        (_, size) => ext::make(
            &tree,
            directory,
            options,
            size.unwrap_or_default(),
            &stamp,
            place,
        )
        .map(New::File),
    };
    let made = made.map_err(|error| match (options.size, size) {
        // Another size would not help.
        _ if is_full(&error) => error,
        // A failure of obdsetup's own has another cause, or says itself that the size is too small.
        (None, Some(size)) if !error.is::<Failure>() => error.context(format!(
            "cannot make a file system of {} (estimated; --size gives another size)",
            crate::terminal::size::show(size)
        )),
        _ => error.context("cannot make a file system"),
    })?;
    // An erofs that is made here has DAX.
    if let (true, New::File(file)) = (options.dax, &made) {
        dax::check(fs, file.as_file())?;
    }
    Ok(made)
}

/// A layer of an image: what it changes on the disk of the layers below.
pub(crate) struct Delta {
    /// Size of the disk with this layer, in bytes.
    pub(crate) size: u64,
    /// The written data, at its offsets on the disk.
    pub(crate) file: File,
    /// The written sectors, ascending and disjoint.
    pub(crate) runs: Vec<Run>,
}

impl Delta {
    /// Fills `buf` with the bytes of the layer from byte `at` of the disk on, which must be in [`Self::runs`].
    pub(crate) fn read(&self, at: u64, buf: &mut [u8]) -> overlaybd::Result<()> {
        let read = self.file.read_exact_at(buf, at);
        read.map_err(|source| overlaybd::Error::Io {
            what: "read the temporary file",
            source,
        })
    }

    /// Writes the layer to `output`, and completes that file.
    pub(crate) fn write(&self, ident: Ident, output: LayerOut) -> Result<()> {
        let way_out =
            "unpack the files of all layers to one directory, or export them to one tar: `obdsetup \
                       convert` makes one layer from that";
        let runs = cut(self.runs.clone(), false);
        let writer = plan(output.path(), self.size, ident, runs, way_out)?;
        output.write(writer, "writing", Source::Files, |at, buf| {
            self.read(at, buf)
        })
    }
}

/// Applies a tar, which is a layer of an image, to the erofs on the disk of the layers `below`;
/// makes an erofs if there are none. `name` is the tar's name in messages. The UUID of the file
/// system is made from the content of the tar and `seed`, which must depend on the layers below.
/// Temporary files go to `place`.
///
/// Reads the archive to its end. The caller must check its digest.
pub(crate) fn apply(
    archive: &mut Archive,
    name: &Path,
    below: Option<Stack>,
    seed: &str,
    allow_loss: bool,
    place: &Path,
) -> Result<Delta> {
    let is_new = below.is_none();
    let mut growing = erofs::Growing::open(below, from_tar::empty(), place)?;
    from_tar::apply(archive, name, growing.tree(), is_new, place)?;
    stamp::clamp(growing.tree())?;
    let options = Options {
        fs: FileSystem::Erofs,
        size: None,
        args: &[],
        allow_loss,
        keep_whiteouts: false,
        dax: false,
    };
    let instead = "--allow-loss makes the layer without them";
    fit::fit(growing.tree(), &options, instead).with_context(|| name.display().to_string())?;
    let hash: [u8; 32] = Sha256::new()
        .chain_update(seed)
        .chain_update(archive.diff_id())
        .finalize()
        .into();
    let id = hash.first_chunk().copied().unwrap_or_default();
    let uuid = Builder::from_custom_bytes(id).into_uuid();
    growing.finish((uuid, stamp::time()?))
}

/// Number of bytes of holes from which on there is a warning. Reading so many as zeros takes a few seconds.
const LONG_HOLES: u64 = 4 << 30;

/// Warns if the program that makes `fs` must read many bytes of holes as zeros. `cost` is what that takes.
fn tell_of_holes(tree: &Tree, fs: FileSystem, cost: &str) -> Result<()> {
    warn(holes(tree, fs, cost)?.as_slice());
    Ok(())
}

/// Returns the warning of [`tell_of_holes`], if there is one.
fn holes(tree: &Tree, fs: FileSystem, cost: &str) -> Result<Option<String>> {
    let mut holes = 0;
    for name in tree.names().iter().filter(|name| name.first) {
        if let Kind::File(content) = &tree.node(name.id)?.kind {
            holes += content.size.saturating_sub(content.data_len());
        }
    }
    let text = format!(
        "the files have holes of {} in all, which {} reads as zeros: this takes {cost}; with --fs ext4 or btrfs, or \
         erofs without --mkfs-arg, holes are skipped",
        crate::terminal::size::show(holes),
        fs.program()
    );
    Ok((holes >= LONG_HOLES).then_some(text))
}

#[cfg(test)]
mod tests {
    use super::{from_dir, holes, FileSystem, LONG_HOLES};

    #[test]
    fn large_holes_are_told_of() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let file = std::fs::File::create(dir.path().join("file"))?;
        let said = |size| -> Result<Option<String>, Box<dyn std::error::Error>> {
            file.set_len(size)?;
            let tree = from_dir::read(dir.path(), false)?;
            Ok(holes(&tree, FileSystem::Squashfs, "long")?)
        };
        assert_eq!(said(LONG_HOLES - 1)?, None);
        let text = said(LONG_HOLES)?.unwrap_or_default();
        let start = "the files have holes of 4294967296 bytes (4.00 GiB) in all, which mksquashfs reads as \
                     zeros: this takes long";
        assert!(text.starts_with(start), "{text}");
        // The holes count once, not for each hard link.
        std::fs::hard_link(dir.path().join("file"), dir.path().join("link"))?;
        assert_eq!(said(LONG_HOLES - 1)?, None);
        Ok(())
    }
}
