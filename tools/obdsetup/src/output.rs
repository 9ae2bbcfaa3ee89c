// SPDX-License-Identifier: GPL-2.0

//! Files that are there complete or not at all.

use std::fs::{File, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{
    fchown, fsetxattr, getxattr, renameat_with, Gid, RenameFlags, Uid, XattrFlags, CWD,
};
use rustix::io::Errno;
use tempfile::{NamedTempFile, PersistError};

use crate::exit::{self, Failure};

/// Links that are followed at most, as the kernel does.
const MAX_LINKS: usize = 40;

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
        // What the umask leaves of this is what a file made by any other tool has.
        Self::with_mode(path, force, inputs, 0o666 & !umask())
    }

    /// As [`Self::create`]. One that isn't there gets this mode, and never had another.
    pub(crate) fn with_mode<'a>(
        path: &Path,
        force: bool,
        inputs: impl IntoIterator<Item = &'a Path>,
        mode: u32,
    ) -> Result<Self> {
        let place = |path: &Path| path.metadata().ok().map(|meta| (meta.dev(), meta.ino()));
        let there = place(path);
        let mut inputs = inputs.into_iter();
        let refuse = |what| Err(Failure::usage(format!("{}: {what}", path.display())));
        if there.is_some() && inputs.any(|input| place(input) == there) {
            return refuse("is an input as well: give another name");
        }
        if there.is_some() && !path.is_file() {
            return refuse("is there, and is no regular file: give another name");
        }
        if !force && path.symlink_metadata().is_ok() {
            return Err(exists(path));
        }
        // Of a link, what it leads to is replaced.
        let path = target(path);
        let file = temp_file(directory(&path))?;
        let done = match path.metadata() {
            Ok(old) => keep_attributes(file.as_file(), &path, &old),
            Err(_) => set_mode(file.as_file(), mode),
        };
        done.with_context(|| format!("{}: cannot set permissions", path.display()))?;
        Ok(Self { file, path, force })
    }

    /// Where the file is to be.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the file is until it is complete, for a program that writes it.
    pub(crate) fn file_path(&self) -> Result<PathBuf> {
        crate::program::path(self.file.path())
    }

    /// The file to write to.
    pub(crate) fn file(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    /// Makes the file complete: on disk first, then in its place.
    pub(crate) fn commit(self) -> Result<()> {
        self.complete().map(drop)
    }

    /// As [`Self::commit`], and returns the file.
    pub(crate) fn complete(self) -> Result<File> {
        let Self { file, path, force } = self;
        let context = || format!("{}: cannot complete the file", path.display());
        crate::interrupt::check()?;
        sync(file.as_file()).with_context(context)?;
        let kept = match force {
            true => file.persist(&path),
            false => persist_new(file, &path),
        };
        let file = kept.map_err(|error| match error.error.kind() {
            io::ErrorKind::AlreadyExists => exists(&path),
            _ => anyhow::Error::from(error.error).context(context()),
        })?;
        let directory = directory(&path);
        sync_directory(directory)
            .with_context(|| format!("{}: cannot sync the directory", directory.display()))?;
        Ok(file)
    }
}

/// Puts `file` at `path` where nothing is there. File systems know one of three ways at least.
fn persist_new(file: NamedTempFile, path: &Path) -> Result<File, PersistError> {
    // Renames so that nothing is replaced, or makes a hard link.
    let error = match file.persist_noclobber(path) {
        Err(error) if is_unsupported(&error.error) => error,
        done => return done,
    };
    match path.symlink_metadata() {
        Ok(_) => Err(PersistError {
            error: io::ErrorKind::AlreadyExists.into(),
            file: error.file,
        }),
        Err(_) => error.file.persist(path),
    }
}

/// Renames the directory `from` to `to` where nothing is there.
pub(crate) fn rename_new_directory(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE).map_err(io::Error::from) {
        Err(error) if is_unsupported(&error) => rename_over_empty(from, to),
        done => done,
    }
}

/// [`rename_new_directory`] for file systems that cannot do it at once. Renaming replaces an empty
/// directory, and making that one fails where something is there.
fn rename_over_empty(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::create_dir(to)?;
    std::fs::rename(from, to).or_else(|_| {
        // Some file systems replace nothing at all.
        std::fs::remove_dir(to)?;
        std::fs::rename(from, to)
    })
}

/// Writes a file back to its disk, where the file system can.
pub(crate) fn sync(file: &File) -> io::Result<()> {
    file.sync_all()
        .or_else(|error| match is_unsupported(&error) {
            true => Ok(()),
            false => Err(error),
        })
}

/// Writes the names in a directory back to its disk, where that can be done: a directory may be
/// there for writing only.
pub(crate) fn sync_directory(directory: &Path) -> io::Result<()> {
    match File::open(directory) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        opened => sync(&opened?),
    }
}

/// Sets the mode of a file or directory, where the file system has modes.
pub(crate) fn set_mode(file: &File, mode: u32) -> io::Result<()> {
    let done = file.set_permissions(Permissions::from_mode(mode));
    done.or_else(|error| match is_unsupported(&error) {
        true => Ok(()),
        false => Err(error),
    })
}

/// Whether a file system says that it cannot do such a thing, not that it went wrong.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP | Errno::PERM)
    )
}

/// The permissions of a file as an extended attribute; there only where they are more than a mode.
const ACL: &str = "system.posix_acl_access";
/// The label of a file for SELinux.
const LABEL: &str = "security.selinux";

/// Gives `file` what the file at `path` has that it replaces: owner and group where that is allowed,
/// mode, access control list, label. What cannot be kept makes it less open, never more.
fn keep_attributes(file: &File, path: &Path, old: &Metadata) -> io::Result<()> {
    if old.nlink() > 1 {
        crate::tell(&format!(
            "warning: {}: has {} names (hard links): only this one gets the new content",
            path.display(),
            old.nlink()
        ));
    }
    let new = file.metadata()?;
    let same_group =
        new.gid() == old.gid() || fchown(file, None, Some(Gid::from_raw(old.gid()))).is_ok();
    let same_owner =
        new.uid() == old.uid() || fchown(file, Some(Uid::from_raw(old.uid())), None).is_ok();
    let acl = attribute(path, ACL);
    let mut mode = old.mode() & 0o7777;
    if !same_owner {
        mode &= !0o4000;
    }
    // The group's part of the mode is the mask of the list, where there is one.
    let keeps_acl = acl
        .as_ref()
        .is_none_or(|acl| same_group && fsetxattr(file, ACL, acl, XattrFlags::empty()).is_ok());
    if !same_group || !keeps_acl {
        mode &= !0o2070 | ((mode << 3) & 0o070);
    }
    set_mode(file, mode)?;
    if let Some(label) = attribute(path, LABEL) {
        // Only an administrator may.
        let _ = fsetxattr(file, LABEL, &label, XattrFlags::empty());
    }
    Ok(())
}

/// An extended attribute of a file, where it has that.
fn attribute(path: &Path, name: &str) -> Option<Vec<u8>> {
    // More than any file system has of these.
    let mut value = vec![0; 64 << 10];
    let len = getxattr(path, name, &mut value).ok()?;
    value.truncate(len);
    Some(value)
}

/// What `path` leads to, perhaps by links, whether or not it is there.
fn target(path: &Path) -> PathBuf {
    if let Ok(path) = path.canonicalize() {
        return path;
    }
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        match path.read_link() {
            Ok(link) => path = directory(&path).join(link),
            Err(_) => break,
        }
    }
    path
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

#[cfg(test)]
mod tests {
    use super::{rename_new_directory, rename_over_empty, sync_directory};
    use std::fs;
    use std::io::{self, ErrorKind};

    #[test]
    fn directories_replace_nothing() -> io::Result<()> {
        for rename in [rename_new_directory, rename_over_empty] {
            let place = tempfile::tempdir()?;
            let (from, to) = (place.path().join("from"), place.path().join("to"));
            fs::create_dir(&from)?;
            fs::write(from.join("file"), "content")?;
            // Not even an empty directory: it is somebody's.
            fs::create_dir(&to)?;
            let refused = rename(&from, &to).map_err(|error| error.kind());
            assert_eq!(refused, Err(ErrorKind::AlreadyExists));
            assert!(from.join("file").exists() && to.exists());
            fs::remove_dir(&to)?;
            rename(&from, &to)?;
            assert_eq!(fs::read(to.join("file"))?, b"content");
            assert!(!from.exists());
            sync_directory(place.path())?;
        }
        Ok(())
    }
}
