// SPDX-License-Identifier: GPL-2.0

//! Files that get their names only when they are complete.

use std::fs::{File, Metadata, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{
    fchown, fsetxattr, getxattr, renameat_with, Gid, RenameFlags, Uid, XattrFlags, CWD,
};
use rustix::io::Errno;
use tempfile::{NamedTempFile, PersistError};

use crate::files::place::{directory, temp_file};
use crate::terminal::exit::{self, Failure};

/// Largest number of symbolic links that are followed, as in the kernel.
const MAX_LINKS: usize = 40;

/// A file that is written in the directory of its final path, under another name. Dropping this deletes it.
pub(crate) struct Output {
    file: NamedTempFile,
    path: PathBuf,
    force: bool,
    /// The final mode of the file, if it denies the owner reading or writing. The file gets this mode just before
    /// its name. Until then, the owner may read and write it, because a program that writes the file opens it
    /// again.
    mode: Option<u32>,
}

/// The mode bits by which the owner may read and write a file.
const OWNER: u32 = 0o600;

impl Output {
    /// Begins the file `path`. With `force`, an existing file is replaced at the end. An error if the file is one of
    /// `inputs`, or is not a regular file, for example the node of a device: these are never replaced.
    pub(crate) fn create<'a>(
        path: &Path,
        force: bool,
        inputs: impl IntoIterator<Item = &'a Path>,
    ) -> Result<Self> {
        // The mode that programs usually give to a new file.
        Self::with_mode(path, force, inputs, 0o666 & !umask())
    }

    /// As [`Self::create`], with this mode for a new file, which has it as soon as it has its name. A file that
    /// replaces another one gets the mode of that one.
    pub(crate) fn with_mode<'a>(
        path: &Path,
        force: bool,
        inputs: impl IntoIterator<Item = &'a Path>,
        mode: u32,
    ) -> Result<Self> {
        check_dash(path)?;
        let place = |path: &Path| path.metadata().ok().map(|meta| (meta.dev(), meta.ino()));
        let there = place(path);
        let mut inputs = inputs.into_iter();
        let refuse = |what| Err(Failure::usage(format!("{}: {what}", path.display())));
        // Found out only by the last step otherwise.
        let name = path.as_os_str().as_bytes();
        if name.ends_with(b"/") || name.ends_with(b"/.") {
            return refuse("is a name for a directory, and a file is to be made: leave out what follows the name");
        }
        if there.is_some() && inputs.any(|input| place(input) == there) {
            return refuse("is an input as well: give another name");
        }
        if there.is_some() && !path.is_file() {
            return refuse("exists, and is not a regular file: give another name");
        }
        if !force && path.symlink_metadata().is_ok() {
            return Err(exists(path));
        }
        // If it is a symbolic link, its target is replaced.
        let path = target(path);
        let file = temp_file(directory(&path))?;
        let done = match path.metadata() {
            Ok(old) => keep_attributes(file.as_file(), &path, &old),
            Err(_) => set_mode(file.as_file(), mode),
        };
        let context = || format!("{}: cannot set permissions", path.display());
        done.with_context(context)?;
        let mode = file.as_file().metadata().with_context(context)?.mode() & 0o7777;
        let mode = (mode & OWNER != OWNER).then_some(mode);
        if let Some(mode) = mode {
            set_mode(file.as_file(), mode | OWNER).with_context(context)?;
        }
        Ok(Self {
            file,
            path,
            force,
            mode,
        })
    }

    /// Returns the final path of the file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the temporary path of the file, for a program that writes it.
    pub(crate) fn file_path(&self) -> Result<PathBuf> {
        crate::program::path(self.file.path())
    }

    /// Returns the file for writing.
    pub(crate) fn file(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    /// Completes the file: syncs it, then renames it.
    pub(crate) fn commit(self) -> Result<()> {
        self.complete().map(drop)
    }

    /// As [`Self::commit`]. Returns the file, still open.
    pub(crate) fn complete(self) -> Result<File> {
        let Self {
            file,
            path,
            force,
            mode,
        } = self;
        let context = || format!("{}: cannot complete the file", path.display());
        crate::terminal::interrupt::check()?;
        if let Some(mode) = mode {
            set_mode(file.as_file(), mode).with_context(context)?;
        }
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

/// Returns an error if `path` is the usual word for standard output, to which a file or directory with its final name
/// cannot be written.
pub(crate) fn check_dash(path: &Path) -> Result<()> {
    match path.as_os_str() == "-" {
        true => Err(Failure::usage(
            "-: the output is not for standard output: give it a name; ./- is a file of that name",
        )),
        false => Ok(()),
    }
}

/// Renames `file` to `path` if nothing exists there. Tries three ways: each file system supports at least one of
/// them.
fn persist_new(file: NamedTempFile, path: &Path) -> Result<File, PersistError> {
    // The first two ways: this renames without replacing, or makes a hard link.
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

/// Renames the directory `from` to `to` if nothing exists there.
pub(crate) fn rename_new_directory(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE).map_err(io::Error::from) {
        Err(error) if is_unsupported(&error) => rename_over_empty(from, to),
        done => done,
    }
}

/// [`rename_new_directory`] for file systems without an atomic operation for it. Makes an empty directory
/// `to`, which fails if something exists there. Renaming then replaces it.
fn rename_over_empty(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::create_dir(to)?;
    std::fs::rename(from, to).or_else(|_| {
        // Some file systems never replace a directory, not even an empty one.
        std::fs::remove_dir(to)?;
        std::fs::rename(from, to)
    })
}

/// Syncs a file, if the file system supports it.
pub(crate) fn sync(file: &File) -> io::Result<()> {
    file.sync_all()
        .or_else(|error| match is_unsupported(&error) {
            true => Ok(()),
            false => Err(error),
        })
}

/// Syncs a directory, if possible: the user may have no permission to read it.
pub(crate) fn sync_directory(directory: &Path) -> io::Result<()> {
    match File::open(directory) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        opened => sync(&opened?),
    }
}

/// Sets the mode of a file or directory, if the file system has modes.
pub(crate) fn set_mode(file: &File, mode: u32) -> io::Result<()> {
    let done = file.set_permissions(Permissions::from_mode(mode));
    done.or_else(|error| match is_unsupported(&error) {
        true => Ok(()),
        false => Err(error),
    })
}

/// Returns whether the error means that the file system doesn't support an operation, not that it has failed.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP | Errno::PERM)
    )
}

/// The extended attribute with the access control list of a file. It exists only if the list has more than the
/// mode can express.
const ACL: &str = "system.posix_acl_access";
/// The extended attribute with the SELinux label of a file.
const LABEL: &str = "security.selinux";

/// Gives `file` the attributes of the file at `path`, which it will replace: owner and group if that is
/// allowed, mode, access control list, label. If an attribute cannot be kept, fewer users get access, never more.
fn keep_attributes(file: &File, path: &Path, old: &Metadata) -> io::Result<()> {
    if old.nlink() > 1 {
        crate::terminal::tell(&format!(
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
    // With an access control list, the group bits of the mode are the mask of the list.
    let keeps_acl = acl
        .as_ref()
        .is_none_or(|acl| same_group && fsetxattr(file, ACL, acl, XattrFlags::empty()).is_ok());
    if !same_group || !keeps_acl {
        mode &= !0o2070 | ((mode << 3) & 0o070);
    }
    set_mode(file, mode)?;
    if let Some(label) = attribute(path, LABEL) {
        // An error is ignored: only an administrator may set the label.
        let _ = fsetxattr(file, LABEL, &label, XattrFlags::empty());
    }
    Ok(())
}

/// Returns an extended attribute of a file; `None` if it has none.
fn attribute(path: &Path, name: &str) -> Option<Vec<u8>> {
    // Larger than these attributes can be.
    let mut value = vec![0; 64 << 10];
    let len = getxattr(path, name, &mut value).ok()?;
    value.truncate(len);
    Some(value)
}

/// Follows the symbolic links in `path`, even if the final target doesn't exist.
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

fn exists(path: &Path) -> anyhow::Error {
    Failure::error(
        exit::BUSY,
        format!("{}: exists already; --force replaces it", path.display()),
    )
}

/// Returns the process's umask. The only way to read it is to set another one; this function restores it at once.
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
            // Not even an empty directory is replaced.
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
