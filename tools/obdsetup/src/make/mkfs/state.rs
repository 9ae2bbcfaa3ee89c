// SPDX-License-Identifier: GPL-2.0

//! Files of a directory that are read more than once: recognizes whether another program has changed a file since it
//! was first read, or put another one in its place.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{anyhow, Context, Error, Result};
use rustix::fs::{fcntl_setfl, OFlags};
use rustix::io::Errno;

use crate::terminal::interrupt;

/// How many times to try to open a file on which another program has a lease, and the pause after each time. The
/// kernel takes the lease away after 45 seconds, unless /proc/sys/fs/lease-break-time says otherwise.
const TRIES: u32 = 600;
const PAUSE: Duration = Duration::from_millis(100);

/// What shows whether a file is the same, and unchanged.
///
/// Programs that only read a file may change its ctime: it is the time of the last change of its names, too, and
/// other names may be elsewhere. On some file systems (FAT, some with FUSE), a file may get another inode number. So
/// each of the two counts only if something else is different, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileState {
    /// Device and inode.
    place: (u64, u64),
    pub(super) size: u64,
    /// Seconds and nanoseconds.
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl FileState {
    pub(super) fn of(status: &Metadata) -> Self {
        Self {
            place: (status.dev(), status.ino()),
            size: status.len(),
            mtime: (status.mtime(), status.mtime_nsec()),
            ctime: (status.ctime(), status.ctime_nsec()),
        }
    }

    /// Opens the regular file at `path`. Returns its state, too, which may be another one. If another program has a
    /// lease on the file, waits until it is given back.
    ///
    /// # Errors
    ///
    /// If another file has the name now, of whatever kind. If the file cannot be opened, the error is `failed`.
    pub(super) fn open(
        &self,
        path: &Path,
        failed: impl Fn() -> String,
    ) -> Result<(File, FileState)> {
        let mut tries = 0;
        let file = loop {
            let error = match open_now(path, OFlags::empty()) {
                Ok(file) => break file,
                Err(error) => error,
            };
            match Errno::from_io_error(&error) {
                // A lease.
                Some(Errno::AGAIN) if tries < TRIES => {
                    interrupt::check()?;
                    tries += 1;
                    thread::sleep(PAUSE);
                }
                // A symbolic link; or a socket, or a device without a driver.
                Some(Errno::LOOP | Errno::NXIO) => return Err(replaced(path)),
                _ => return Err(Error::from(error).context(failed())),
            }
        };
        let status = file.metadata().with_context(&failed)?;
        let now = self.compare(path, &status)?;
        // Reads may wait.
        fcntl_setfl(&file, OFlags::empty()).with_context(failed)?;
        Ok((file, now))
    }

    /// As [`Self::open`]. If the file was changed, that is an error.
    pub(super) fn open_again(&self, path: &Path) -> Result<File> {
        let (file, now) = self.open(path, || format!("{}: cannot read", path.display()))?;
        self.same(path, &now)?;
        Ok(file)
    }

    /// Checks that the file at `path` is this one, and was not changed.
    pub(super) fn check(&self, path: &Path) -> Result<()> {
        let status = path.symlink_metadata();
        let status =
            status.with_context(|| format!("{}: cannot read the metadata", path.display()))?;
        let now = self.compare(path, &status)?;
        self.same(path, &now)
    }

    /// Returns the state of the file whose metadata is `status`. If it is another file, that is an error.
    fn compare(&self, path: &Path, status: &Metadata) -> Result<Self> {
        let now = Self::of(status);
        let unchanged = Self {
            place: now.place,
            ..*self
        };
        match status.is_file() && (now.place == self.place || now == unchanged) {
            true => Ok(now),
            false => Err(replaced(path)),
        }
    }

    fn same(&self, path: &Path, now: &Self) -> Result<()> {
        match (now.size, now.mtime) == (self.size, self.mtime) {
            true => Ok(()),
            false => Err(changed(path)),
        }
    }
}

/// Opens the directory at `path`.
pub(super) fn open_directory(path: &Path) -> io::Result<File> {
    open_now(path, OFlags::DIRECTORY)
}

/// Opens whatever is at `path`, with the additional flags `more`. Does not wait, as it would for a FIFO, and does not
/// follow a symbolic link.
fn open_now(path: &Path, more: OFlags) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | more;
    // The standard library adds O_CLOEXEC.
    File::options()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path)
}

fn replaced(path: &Path) -> Error {
    anyhow!(
        "{}: was replaced while it was read: try again when nobody changes it",
        path.display()
    )
}

/// Returns the error for a file, or the tar that has it, that is not what it was.
pub(super) fn changed(path: &Path) -> Error {
    anyhow!(
        "{}: was changed while it was read: try again when nobody changes it",
        path.display()
    )
}

#[cfg(test)]
mod tests {
    use std::fs::{self, FileTimes};
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::time::SystemTime;

    use rustix::fs::{mknodat, FileType, Mode, CWD};

    use super::{open_directory, FileState};

    /// Returns what the two ways to look at the file again say.
    fn said(first: &FileState, path: &Path) -> [Option<String>; 2] {
        [first.open_again(path).map(drop), first.check(path)]
            .map(|done| done.err().map(|error| error.to_string()))
    }

    #[test]
    fn other_files_of_the_name() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("file");
        fs::write(&path, b"content")?;
        let first = FileState::of(&path.symlink_metadata()?);
        assert_eq!(said(&first, &path), [None, None]);
        // The first file stays, so that no other one gets its inode.
        let kept = dir.path().join("kept");
        fs::rename(&path, &kept)?;
        let none = said(&first, &path);
        let wanted = ["cannot read", "cannot read the metadata"];
        assert_eq!(
            none,
            wanted.map(|text| Some(format!("{}: {text}", path.display())))
        );
        let text = "was replaced while it was read: try again when nobody changes it";
        let wanted = Some(format!("{}: {text}", path.display()));
        let check = |what: &str| {
            assert_eq!(
                said(&first, &path),
                [wanted.clone(), wanted.clone()],
                "{what}"
            );
        };
        fs::write(&path, b"content")?;
        let older = FileTimes::new().set_modified(SystemTime::UNIX_EPOCH);
        fs::File::options()
            .write(true)
            .open(&path)?
            .set_times(older)?;
        check("a file");
        fs::remove_file(&path)?;
        // Nobody writes to it: to open it would take forever.
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        check("a FIFO");
        assert!(open_directory(&path).is_err());
        fs::remove_file(&path)?;
        symlink(&kept, &path)?;
        check("a link to the file");
        fs::remove_file(&path)?;
        let socket = UnixListener::bind(&path)?;
        check("a socket");
        drop(socket);
        fs::remove_file(&path)?;
        fs::create_dir(&path)?;
        check("a directory");
        open_directory(&path)?;
        Ok(())
    }

    #[test]
    fn changes_of_a_file() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("file");
        let text = "was changed while it was read: try again when nobody changes it";
        let wanted = Some(format!("{}: {text}", path.display()));
        fs::write(&path, b"content")?;
        let file = fs::File::options().write(true).open(&path)?;
        let first = FileState::of(&file.metadata()?);
        // The size alone.
        file.set_len(8)?;
        assert_eq!(said(&first, &path), [wanted.clone(), wanted.clone()]);
        // The time alone, however coarse it is.
        let now = FileState::of(&file.metadata()?);
        let mut first = now;
        first.mtime.0 += 1;
        assert_eq!(said(&first, &path), [wanted.clone(), wanted]);
        assert_eq!(said(&now, &path), [None, None]);
        // Another name is made or removed elsewhere.
        first = now;
        first.ctime.1 ^= 1;
        assert_eq!(said(&first, &path), [None, None]);
        // The file system has given it another inode number.
        first = now;
        first.place.1 ^= 1;
        assert_eq!(said(&first, &path), [None, None]);
        first.ctime.1 ^= 1;
        assert!(said(&first, &path).iter().all(Option::is_some));
        Ok(())
    }
}
