// SPDX-License-Identifier: GPL-2.0

//! Locks: only one obdsetup at a time sets up or takes down a stack. The holder of the lock knows that no
//! other obdsetup is about to complete a half-built stack: one that was killed has left it.
//!
//! A lock can have a note: what the next holder has to remove if this one is killed.
//!
//! Programs that are started inherit the lock. It is held while one of them runs, even if obdsetup itself was
//! killed.

use std::fs::{DirBuilder, File};
use std::io::{ErrorKind, Seek};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fs::FlockOperation;
use rustix::io::FdFlags;

use crate::exit::{self, Failure};
use crate::interrupt;

/// The directory of the locks, which are files that only root can open.
const PLACE: &str = "/run/obdsetup";
/// How long to wait for another obdsetup, which may itself wait for udev.
const PATIENCE: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(20);

/// Returns the directory of the locks.
pub(super) fn place() -> &'static Path {
    Path::new(PLACE)
}

/// The lock for a stack, held until it is dropped.
pub(crate) struct Lock {
    /// `None` if the directory for locks can't be made.
    held: Option<(PathBuf, File)>,
    /// Whether the file existed before.
    left: bool,
}

impl Lock {
    /// Takes the lock for stack `name`.
    pub(crate) fn take(name: &str) -> Result<Self> {
        let path = PathBuf::from(PLACE).join(name);
        let mut end = Instant::now() + PATIENCE;
        let mut holder = None;
        // The name of a lock for a shared device begins with a dot.
        let name = name.trim_start_matches('.');
        loop {
            match Self::try_take(&path) {
                Ok(Some((file, left))) => {
                    let held = Some((path, file));
                    return Ok(Self { held, left });
                }
                Ok(None) => {}
                Err(error) => {
                    if let Some(lock) = Self::without_place(&error) {
                        return Ok(lock);
                    }
                    let context = format!("{}: cannot lock device {name}", path.display());
                    return Err(error).context(context);
                }
            }
            interrupt::check().with_context(|| {
                format!("waited for another obdsetup, which is at work on device {name}")
            })?;
            // Each holder makes a new file. So the time limit applies to each holder, not to all of them
            // together.
            let now = path.metadata().map(|meta| meta.ino()).ok();
            if now != holder {
                holder = now;
                end = Instant::now() + PATIENCE;
            }
            if Instant::now() >= end {
                let message =
                    format!("another obdsetup is at work on device {name}: wait until it ends");
                return Err(Failure::error(exit::BUSY, message));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Takes the lock for `name` without waiting. Returns `None` if another process holds it, or if it cannot
    /// be taken.
    pub(crate) fn try_to_take(name: &str) -> Option<Self> {
        let path = PathBuf::from(PLACE).join(name);
        match Self::try_take(&path) {
            Ok(taken) => taken.map(|(file, left)| Self {
                held: Some((path, file)),
                left,
            }),
            Err(error) => Self::without_place(&error),
        }
    }

    /// Returns a lock that isn't held, if `error` means that there is no place for locks, for example because
    /// only the root file system is mounted.
    fn without_place(error: &std::io::Error) -> Option<Self> {
        let kinds = [ErrorKind::NotFound, ErrorKind::ReadOnlyFilesystem];
        kinds.contains(&error.kind()).then_some(Self {
            held: None,
            left: false,
        })
    }

    /// Removes the files of locks whose names begin with `start` and that no one holds. Processes that were
    /// killed have left them.
    pub(crate) fn clear_left(start: &str) {
        for entry in std::fs::read_dir(PLACE).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if let Some(name) = name.to_str().filter(|name| name.starts_with(start)) {
                drop(Self::try_to_take(name));
            }
        }
    }

    /// Returns whether the previous holder was killed.
    pub(crate) fn was_left(&self) -> bool {
        self.left
    }

    /// Returns whether an obdsetup works on stack `name`, as far as can be seen in this mount namespace.
    pub(crate) fn is_busy(name: &str) -> bool {
        let file = File::open(PathBuf::from(PLACE).join(name));
        file.is_ok_and(|file| {
            let lock = rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared);
            lock.is_err_and(|error| error == rustix::io::Errno::WOULDBLOCK)
        })
    }

    /// Returns whether the lock is really held. If there is no place for locks, it isn't, and another
    /// obdsetup may work on the stack.
    pub(crate) fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// Writes a note, which replaces the previous one.
    pub(crate) fn set_note(&self, text: &str) {
        if let Some((_, file)) = &self.held {
            // Errors are ignored: without the note, a kill leaves a little more.
            let _ = file
                .set_len(0)
                .and_then(|()| file.write_all_at(text.as_bytes(), 0));
        }
    }

    /// Returns a file to which a program can write a note, which replaces the previous one. Returns `None` if
    /// there is no place for locks.
    pub(super) fn note_file(&self) -> Option<File> {
        let (_, file) = self.held.as_ref()?;
        file.set_len(0).ok()?;
        let mut file = file.try_clone().ok()?;
        file.rewind().ok()?;
        Some(file)
    }

    /// Returns the note.
    pub(crate) fn note(&self) -> Option<String> {
        let (path, _) = self.held.as_ref()?;
        std::fs::read_to_string(path).ok()
    }

    /// Takes the lock. Returns its file, and whether the file existed before; `None` if another process holds
    /// the lock.
    fn try_take(path: &Path) -> std::io::Result<Option<(File, bool)>> {
        if let Err(error) = DirBuilder::new().mode(0o700).create(PLACE) {
            if error.kind() != ErrorKind::AlreadyExists {
                return Err(error);
            }
        }
        let file = File::options().create_new(true).write(true).open(path);
        let (file, left) = match file {
            Ok(file) => (file, false),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                match File::options().write(true).open(path) {
                    // Its holder has removed the file meanwhile.
                    Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                    opened => (opened?, true),
                }
            }
            Err(error) => return Err(error),
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        // The previous holder has removed the file, and another process may have made a new one.
        let same = path
            .metadata()
            .is_ok_and(|now| file.metadata().is_ok_and(|ours| ours.ino() == now.ino()));
        if !same {
            return Ok(None);
        }
        rustix::io::fcntl_setfd(&file, FdFlags::empty())?;
        Ok(Some((file, left)))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Some((path, _)) = &self.held {
            // Removed while it is locked: another process that has opened it finds that it was removed, and
            // tries again.
            let _ = std::fs::remove_file(path);
        }
    }
}
