// SPDX-License-Identifier: GPL-2.0

//! What `open --writable` does with a store: makes it, or checks that it belongs to the disk.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use overlaybd::changes::{head, Exceptions, Fault, Head, Origin, State};
use overlaybd::format::num::to_usize;
use overlaybd::format::{Blob, SECTOR_SIZE};
use overlaybd::{Error, FileBlob, Stack};
use rustix::fs::{FlockOperation, OFlags};
use rustix::io::FdFlags;

use super::{check_origin, is_device, is_missing, open, users, write_head};
use crate::dm::backing::Backing;
use crate::dm::lock::Lock;
use crate::exit::{self, Failure};
use crate::output::{self, Output};
use crate::size;

/// Smallest store that is made.
const SMALLEST: u64 = 1 << 20;
/// Bytes at either end of a device that must be zeros where it becomes a store.
const BLANK: u64 = 1 << 20;

/// A store that is about to be opened. Nothing is written to it yet.
pub(crate) struct Found {
    path: PathBuf,
    head: Head,
    /// Nothing where the file is still to be made.
    there: Option<FileBlob>,
    /// The head that is there; nothing where it is a new store.
    old: Option<Head>,
}

impl Found {
    /// Looks at the store at `path` for the disk of `stack`. One that is to be made, or to become larger, has
    /// `bytes` in all; without that, a file has room for all of the disk.
    pub(crate) fn new(path: &Path, stack: &Stack, bytes: Option<u64>) -> Result<Self> {
        let origin = Origin::of(stack);
        let disk = stack.sectors();
        let fresh = |store| Head {
            state: State::Open,
            disk,
            store,
            chunk: head::CHUNK,
            origin: origin.clone(),
        };
        if is_missing(path) {
            let store = match bytes {
                Some(bytes) => sectors(path, bytes)?,
                None => head::full_size(disk),
            };
            return Ok(Self {
                path: path.to_owned(),
                head: fresh(store),
                there: None,
                old: None,
            });
        }
        let blob = open(path, FlockOperation::NonBlockingLockExclusive)?;
        users::check(path, &blob.file().metadata()?)?;
        let there = Head::read(&blob);
        let (head, old) = match there {
            Err(Error::Changes(Fault::Magic(_))) if is_device(blob.file())? => {
                check_blank(&blob)?;
                (fresh(sectors(path, bytes.unwrap_or(blob.size()))?), None)
            }
            Err(error) => return Err(error.in_file(path).into()),
            Ok(old) => {
                check_origin(path, &old, &origin, disk)?;
                let mut head = old.clone();
                if let Some(bytes) = bytes {
                    head.store = grown(path, &old, bytes)?;
                }
                check_room(&blob, &old, &head)?;
                head.state = State::Open;
                (head, Some(old))
            }
        };
        let wanted = head::SIZE + head.store * SECTOR_SIZE;
        if is_device(blob.file())? && blob.size() < wanted {
            let message = format!(
                "{}: has {}, which is less than --store-size",
                path.display(),
                size::show(blob.size())
            );
            return Err(Failure::usage(message));
        }
        Ok(Self {
            path: path.to_owned(),
            head,
            there: Some(blob),
            old,
        })
    }

    /// Sectors behind the head.
    pub(crate) fn sectors(&self) -> u64 {
        self.head.store
    }

    /// Writes the head: from now on, the store is open.
    pub(crate) fn begin(self) -> Result<Opened> {
        let Self {
            path,
            head,
            there,
            old,
        } = self;
        let context = || format!("{}: cannot write", path.display());
        let (blob, undo) = match (there, old) {
            (None, _) => (make(&path, &head)?, Undo::Remove),
            (Some(blob), Some(old)) => (blob, Undo::Head(old)),
            (Some(blob), None) => {
                let old = Head {
                    state: State::Closed,
                    ..head.clone()
                };
                (blob, Undo::Head(old))
            }
        };
        // Its name may lead to another by now.
        let file = || format!("/proc/self/fd/{}", blob.file().as_raw_fd());
        let mut options = File::options();
        options.read(true).write(true);
        if is_device(blob.file())? {
            use std::os::unix::fs::OpenOptionsExt;

            // What has it mounted, or as a part of another device, isn't overwritten.
            let mut alone = options.clone();
            alone.custom_flags(OFlags::EXCL.bits() as i32);
            write_head(&alone.open(file()).with_context(context)?, &head).with_context(context)?;
        }
        let file = options.open(file()).with_context(context)?;
        if !is_device(&file)? {
            let wanted = head::SIZE + head.store * SECTOR_SIZE;
            if blob.size() < wanted {
                file.set_len(wanted).with_context(context)?;
            }
            write_head(&file, &head).with_context(context)?;
        }
        // The lock lasts as long as a program is at work.
        rustix::io::fcntl_setfd(blob.file(), FdFlags::empty()).map_err(std::io::Error::from)?;
        Ok(Opened {
            path,
            file,
            _locked: blob,
            undo: Some(undo),
        })
    }
}

/// What is done where the disk cannot be set up.
enum Undo {
    /// The file is removed, which was made for it.
    Remove,
    /// The head is as it was.
    Head(Head),
}

/// A store that is open. When this is dropped, it is as before, unless [`Self::keep`] was called.
pub(crate) struct Opened {
    path: PathBuf,
    file: File,
    _locked: FileBlob,
    undo: Option<Undo>,
}

impl Opened {
    /// What a table may name. With `direct`, a file is read and written past the page cache.
    pub(crate) fn backing(&self, direct: bool, lock: &Lock) -> Result<Backing> {
        match is_device(&self.file)? {
            true => Ok(Backing::device(&self.file.metadata()?)),
            false => Backing::writable(&self.file, direct, lock),
        }
    }

    /// Leaves it open.
    pub(crate) fn keep(mut self) {
        self.undo = None;
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let done = match self.undo.take() {
            None => return,
            Some(Undo::Remove) => std::fs::remove_file(&self.path),
            Some(Undo::Head(head)) => write_head(&self.file, &head),
        };
        if let Err(error) = done {
            crate::tell(&format!("warning: {}: {error}", self.path.display()));
        }
    }
}

/// Makes a file for a store: the head, and a hole.
fn make(path: &Path, head: &Head) -> Result<FileBlob> {
    let mut output = Output::create(path, false, [])?;
    let context = || format!("{}: cannot write", path.display());
    let file = output.file();
    // What is written may be secret, whoever may read the layers.
    output::set_mode(file, 0o600).with_context(context)?;
    file.set_len(head::SIZE + head.store * SECTOR_SIZE)
        .with_context(context)?;
    write_head(file, head).with_context(context)?;
    output.commit()?;
    open(path, FlockOperation::NonBlockingLockExclusive)
}

/// The sectors behind the head of a store of `bytes`.
fn sectors(path: &Path, bytes: u64) -> Result<u64> {
    if bytes < SMALLEST {
        let message = format!(
            "{}: a store of {} is too small: give it {} or more",
            path.display(),
            size::show(bytes),
            size::show(SMALLEST)
        );
        return Err(Failure::usage(message));
    }
    Ok(head::usable((bytes - head::SIZE) / SECTOR_SIZE))
}

/// The sectors behind the head `old` of the store at `path`, which is to have `bytes`.
fn grown(path: &Path, old: &Head, bytes: u64) -> Result<u64> {
    let store = sectors(path, bytes)?;
    if store < old.store {
        let message = format!(
            "{}: has {} already, and a store cannot become smaller",
            path.display(),
            size::show(head::SIZE + old.store * SECTOR_SIZE)
        );
        return Err(Failure::usage(message));
    }
    Ok(store)
}

/// Checks that the store with the head `old`, which is to get `new`, can be written to. Says where it was
/// not closed.
fn check_room(blob: &FileBlob, old: &Head, new: &Head) -> Result<()> {
    let path = blob.path();
    let exceptions = Exceptions::read(blob, old).map_err(|error| error.in_file(path))?;
    let was_full = match old.state {
        State::Overflowed => true,
        // Nobody has seen whether writes have failed.
        State::Open => !exceptions.has_room(),
        State::Closed => false,
    };
    if was_full && new.store <= old.store {
        let message = format!(
            "{}: was full, and writes to the disk failed: open it with a larger --store-size than {}, and \
             check the file system",
            path.display(),
            size::show(head::SIZE + old.store * SECTOR_SIZE)
        );
        return Err(Failure::error(exit::BAD_IMAGE, message));
    }
    if was_full {
        crate::tell(&format!(
            "note: {}: was full, and writes to the disk failed: check the file system (fsck)",
            path.display()
        ));
    } else if old.state == State::Open && !exceptions.is_empty() {
        crate::tell(&format!(
            "note: {}: was not closed when it was open last: the file system may have to recover",
            path.display()
        ));
    }
    Ok(())
}

/// Checks that a device has nothing on it, as far as that can be seen.
fn check_blank(device: &FileBlob) -> Result<()> {
    let size = device.size();
    let len = BLANK.min(size);
    let mut bytes = vec![0; to_usize(len)];
    for start in [0, size - len] {
        device.read_at(start, &mut bytes)?;
        if bytes.iter().any(|&byte| byte != 0) {
            let message = format!(
                "{}: is no store of changes, and not empty: if nothing on it is needed, make it empty with \
                 `blkdiscard --zeroout'",
                device.path().display()
            );
            return Err(Failure::error(exit::BUSY, message));
        }
    }
    Ok(())
}
