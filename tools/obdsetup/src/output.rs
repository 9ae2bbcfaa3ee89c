// SPDX-License-Identifier: GPL-2.0

//! Files that are there complete or not at all.

use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::NamedTempFile;

use crate::exit::{self, Failure};

/// A file being written beside the place where it is to be. Dropped, it is gone.
pub(crate) struct Output {
    file: NamedTempFile,
    path: PathBuf,
    force: bool,
}

impl Output {
    /// Begins the file `path`. With `force`, one that is there is replaced at the end, if it isn't
    /// one of `inputs`. What isn't a file, say a device's node, is never replaced.
    pub(crate) fn create<'a>(
        path: &Path,
        force: bool,
        inputs: impl IntoIterator<Item = &'a Path>,
    ) -> Result<Self> {
        let place = |path: &Path| path.metadata().ok().map(|meta| (meta.dev(), meta.ino()));
        let there = place(path);
        let mut inputs = inputs.into_iter();
        let refuse = |what| Err(Failure::usage(format!("{}: {what}", path.display())));
        if there.is_some() && inputs.any(|input| place(input) == there) {
            return refuse("is an input as well");
        }
        if there.is_some() && !path.is_file() {
            return refuse("is there, and is no regular file");
        }
        if !force && path.symlink_metadata().is_ok() {
            return Err(exists(path));
        }
        // Of a link, what it leads to is replaced.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let file = temp_file(directory(&path))?;
        // What the umask leaves of this is what a file made by any other tool has.
        let mode = 0o666 & !umask();
        file.as_file()
            .set_permissions(std::fs::Permissions::from_mode(mode))
            .with_context(|| format!("{}: cannot set permissions", path.display()))?;
        Ok(Self { file, path, force })
    }

    /// Where the file is to be.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The file to write to.
    pub(crate) fn file(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    /// Makes the file complete: on disk first, then in its place.
    pub(crate) fn commit(self) -> Result<()> {
        let Self { file, path, force } = self;
        let context = || format!("{}: cannot complete the file", path.display());
        crate::interrupt::check()?;
        file.as_file().sync_all().with_context(context)?;
        let kept = if force {
            file.persist(&path)
        } else {
            file.persist_noclobber(&path)
        };
        kept.map_err(|error| match error.error.kind() {
            std::io::ErrorKind::AlreadyExists => exists(&path),
            _ => anyhow::Error::from(error.error).context(context()),
        })?;
        let directory = directory(&path);
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .with_context(|| format!("{}: cannot sync the directory", directory.display()))
    }
}

/// A temporary file in `directory`, deleted when dropped.
pub(crate) fn temp_file(directory: &Path) -> Result<NamedTempFile> {
    tempfile::Builder::new()
        .prefix(".obdsetup-")
        .tempfile_in(directory)
        .with_context(|| format!("{}: cannot make a file", directory.display()))
}

/// The directory that `path` is in.
pub(crate) fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn exists(path: &Path) -> anyhow::Error {
    Failure::error(
        exit::BUSY,
        format!("{}: exists already; --force replaces it", path.display()),
    )
}

/// The process's umask, put back at once.
pub(crate) fn umask() -> u32 {
    let all = rustix::fs::Mode::from_raw_mode(0o022);
    let mask = rustix::process::umask(all);
    rustix::process::umask(mask);
    mask.as_raw_mode()
}
