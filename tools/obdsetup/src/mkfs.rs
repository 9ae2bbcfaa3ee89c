// SPDX-License-Identifier: GPL-2.0

//! File systems that hold the files of a directory or a tar, made by their mkfs.

use std::ffi::OsString;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;
use tempfile::{NamedTempFile, TempDir};
use walkdir::WalkDir;

use crate::exit::Failure;
use crate::layers::warn;
use crate::output::temp_file;
use crate::program::{self, Program};
use crate::usage::Usage;

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

    /// Whether its mkfs may take a tar.
    fn takes_tar(self) -> bool {
        matches!(self, Self::Ext2 | Self::Ext3 | Self::Ext4 | Self::Erofs)
    }
}

/// Bytes that an ext3 or ext4 of 4 KiB blocks must have for a journal: 2048 blocks.
const EXT_JOURNAL: u64 = 8 << 20;

/// The file system to be made.
pub(crate) struct Options<'a> {
    pub(crate) fs: FileSystem,
    /// Bytes; estimated where not given.
    pub(crate) size: Option<u64>,
    /// Further arguments for mkfs.
    pub(crate) args: &'a [OsString],
}

/// Files to be put in a file system.
#[derive(Clone, Copy)]
pub(crate) enum Files<'a> {
    Directory(&'a Path),
    /// A tar, compressed or not.
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
    let size = match (fs.overhead(), options.size) {
        (None, Some(_)) => return Err(Failure::usage(format!("{} takes no --size", fs.name()))),
        (None, None) => None,
        (Some(_), Some(size)) => Some(size),
        (Some(overhead), None) => {
            let usage = match files {
                Files::Directory(_) => Usage::of_directory(&from)?,
                Files::Tar(_) => Usage::of_tar(&from)?,
            };
            Some(usage.with_room(overhead))
        }
    };
    let made = match files {
        Files::Directory(_) => run(&from, false, options, size, place),
        Files::Tar(_) => {
            // Only trying tells: it depends on the version, and on how mkfs was built.
            let direct = match fs.takes_tar() {
                true => run(&from, true, options, size, place).ok(),
                false => None,
            };
            crate::interrupt::check()?;
            match direct {
                Some(image) => Ok(image),
                None => {
                    let unpacked = Unpacked::new(&from, place)?;
                    run(&unpacked.root, false, options, size, place)
                }
            }
        }
    };
    made.with_context(|| match (options.size, size) {
        (None, Some(size)) => format!(
            "cannot make a file system of {} (estimated; --size gives another size)",
            crate::size::show(size)
        ),
        _ => "cannot make a file system".to_owned(),
    })
}

/// Runs mkfs over `from`, a directory or a tar.
fn run(
    from: &Path,
    tar: bool,
    options: &Options<'_>,
    size: Option<u64>,
    place: &Path,
) -> Result<NamedTempFile> {
    let image = temp_file(place)?;
    if let Some(size) = size {
        let sized = image.as_file().set_len(size);
        sized.with_context(|| format!("cannot make a file of {}", crate::size::show(size)))?;
    }
    let need = format!("{} file systems", options.fs.name());
    let mut command = Program::new(options.fs.program(), need);
    command.writes(image.path());
    match options.fs {
        FileSystem::Ext2 | FileSystem::Ext3 | FileSystem::Ext4 => {
            command.args(["-q", "-F"]);
            // Below 512 MiB the default is 1 KiB; a page of a file is in up to four places then,
            // and in as many compressed blocks or more.
            if size.is_none_or(|size| size >= EXT_JOURNAL) {
                command.args(["-b", "4096"]);
            }
            command.arg("-d").arg(from);
            command.args(options.args).arg(image.path());
        }
        FileSystem::Btrfs => {
            command.args(["-q", "--rootdir"]).arg(from);
            command.args(options.args).arg(image.path());
        }
        FileSystem::Erofs => {
            if tar {
                command.arg("--tar=f");
            }
            command.args(options.args).arg(image.path()).arg(from);
        }
        FileSystem::Squashfs => {
            command.arg(from).arg(image.path());
            command.args(["-noappend", "-quiet", "-no-progress"]);
            command.args(options.args);
        }
    }
    command.run()?.tell();
    Ok(image)
}

/// What was in a tar, in a directory that is gone when this is dropped.
struct Unpacked {
    /// The directory that has what is in the tar.
    root: PathBuf,
    all: TempDir,
}

impl Unpacked {
    fn new(tar: &Path, place: &Path) -> Result<Self> {
        let all = tempfile::Builder::new()
            .prefix(".obdsetup-")
            .tempdir_in(place);
        let all = all.with_context(|| format!("{}: cannot make a directory", place.display()))?;
        // It becomes the root directory, and the tar may say nothing of that.
        let root = all.path().join("root");
        std::fs::create_dir(&root)?;
        std::fs::set_permissions(&root, Permissions::from_mode(0o755))?;
        let unpacked = Self { root, all };
        let mut command = Program::new("tar", "tars");
        command.args(["--extract", "--preserve-permissions", "--numeric-owner"]);
        match rustix::process::geteuid().is_root() {
            true => {
                command.args(["--same-owner", "--xattrs", "--xattrs-include=*"]);
            }
            false => warn(&[format!(
                "{}: only root can unpack it with its owners: all files will be yours",
                tar.display()
            )]),
        }
        command.arg("--directory").arg(&unpacked.root);
        // Without --force-local, a colon in the name would name another machine.
        command.arg("--force-local").arg("--file").arg(tar);
        command.run()?.tell();
        Ok(unpacked)
    }
}

impl Drop for Unpacked {
    fn drop(&mut self) {
        // In directories that the tar made read-only, nothing could be removed.
        for entry in WalkDir::new(self.all.path()).into_iter().flatten() {
            if entry.file_type().is_dir() {
                let _ = std::fs::set_permissions(entry.path(), Permissions::from_mode(0o700));
            }
        }
    }
}
