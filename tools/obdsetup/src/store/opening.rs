// SPDX-License-Identifier: GPL-2.0

//! What `open --writable` does with a store: makes it, or checks that it belongs to the disk.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use overlaybd::changes::{head, Exceptions, Fault, Head, State};
use overlaybd::format::lsmt::MAX_END;
use overlaybd::format::num::to_usize;
use overlaybd::format::{Blob, SECTOR_SIZE};
use overlaybd::{Error, FileBlob, Stack};
use rustix::fs::{FlockOperation, OFlags};
use rustix::io::FdFlags;

use super::users::{self, Signals};
use super::{
    check_origin, drop_cache, host, is_at, is_device, is_missing, lock, open, origin, write_head,
    Access,
};
use crate::dm::backing::Backing;
use crate::dm::lock::Lock;
use crate::dm::plan::writable_uuids;
use crate::dm::share;
use crate::exit::{self, Failure};
use crate::output::{self, Output};
use crate::size;

/// Smallest store that is made.
const SMALLEST: u64 = 1 << 20;
/// Bytes at either end of a device that must be zeros where it becomes a store.
const BLANK: u64 = 1 << 20;
/// Bytes of a store that nothing was written to: the head, the header of dm-snapshot and an area.
const EMPTY: usize = 3 * 4096;

/// What is asked of a store.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wish {
    /// Bytes in all of one that is made, or becomes larger. Without, a file has room for all of the disk.
    pub(crate) bytes: Option<u64>,
    /// Whether one is as good that has more bytes.
    pub(crate) at_least: bool,
    /// Whether one is made where none is there.
    pub(crate) create: bool,
    /// Whether one is opened that counts as open on another machine.
    pub(crate) take_over: bool,
}

/// A store that is about to be opened. Nothing is written to it yet.
pub(crate) struct Found {
    path: PathBuf,
    head: Head,
    /// The store, locked; nothing where the file is still to be made.
    there: Option<FileBlob>,
    before: Before,
}

/// What was there before.
enum Before {
    /// No file.
    Missing,
    /// An empty device.
    Blank,
    /// A store with this head and so many exceptions.
    Store(Head, u64),
}

impl Found {
    /// Looks at the store at `path` for the disk of `stack`.
    pub(crate) fn new(path: &Path, stack: &Stack, wish: &Wish) -> Result<Self> {
        let origin = origin(stack)?;
        let disk = stack.sectors();
        let fresh = |store| Head {
            state: State::Open,
            disk,
            store,
            chunk: head::CHUNK,
            origin: origin.clone(),
            host: host::this(),
        };
        if is_missing(path) {
            if !wish.create {
                let message = format!(
                    "{}: there is no store of changes; `open --create' makes it, if it isn't on a file \
                     system that is not mounted",
                    path.display()
                );
                return Err(Failure::error(exit::DEVICE, message));
            }
            let store = match wish.bytes {
                Some(bytes) => sectors(path, bytes)?,
                None => head::full_size(disk),
            };
            return Ok(Self {
                path: path.to_owned(),
                head: valid(path, fresh(store))?,
                there: None,
                before: Before::Missing,
            });
        }
        let blob = open(path, Access::Write)?;
        users::check(path, &blob.file().metadata()?, Signals::End)?;
        let (head, before) = match Head::read(&blob) {
            Err(Error::Changes(Fault::Magic(_))) if is_device(blob.file())? => {
                check_blank(&blob)?;
                if !wish.create {
                    let message = format!(
                        "{}: the device is empty, and no store of changes; `open --create' makes it one",
                        path.display()
                    );
                    return Err(Failure::error(exit::DEVICE, message));
                }
                let bytes = wish.bytes.unwrap_or(blob.size());
                (fresh(sectors(path, bytes)?), Before::Blank)
            }
            Err(error) => return Err(error.in_file(path).into()),
            Ok(old) => {
                check_origin(path, &old, &origin, disk)?;
                check_chunk(path, &old)?;
                let store = grown(path, &old, wish)?;
                let head = fresh(store);
                let count = check_state(&blob, &old, &head, wish)?;
                (head, Before::Store(old, count))
            }
        };
        if is_device(blob.file())? && blob.size() < end(&head) {
            let message = format!(
                "{}: has {}, which is less than --store-size",
                path.display(),
                size::show(blob.size())
            );
            return Err(Failure::usage(message));
        }
        check_sectors(&blob, disk, &before)?;
        Ok(Self {
            path: path.to_owned(),
            head: valid(path, head)?,
            there: Some(blob),
            before,
        })
    }

    /// Sectors behind the head.
    pub(crate) fn sectors(&self) -> u64 {
        self.head.store
    }

    /// Writes the head: from now on, the store is open in the disk `name`.
    pub(crate) fn begin(self, name: &str) -> Result<Opened> {
        let Self {
            path,
            head,
            there,
            before,
        } = self;
        let locked = match there {
            Some(blob) => blob,
            None => make(&path, &head)?,
        };
        // The lock lasts as long as a program is at work.
        rustix::io::fcntl_setfd(locked.file(), FdFlags::empty()).map_err(std::io::Error::from)?;
        // A loop device keeps its file open, and would keep the lock.
        let file = reopen(locked.file(), OFlags::empty())
            .with_context(|| format!("{}: cannot write", path.display()))?;
        let mut opened = Opened {
            path,
            name: name.to_owned(),
            head,
            file,
            _locked: locked,
            undo: None,
        };
        opened.write(before)?;
        Ok(opened)
    }
}

/// A store that is open. When this is dropped, it is as before, unless [`Self::keep`] was called, or the disk
/// is still there or was written to.
pub(crate) struct Opened {
    path: PathBuf,
    /// The name of the disk.
    name: String,
    head: Head,
    file: File,
    _locked: FileBlob,
    undo: Option<Before>,
}

impl Opened {
    /// Writes the head.
    fn write(&mut self, before: Before) -> Result<()> {
        let path = self.path.clone();
        let context = || format!("{}: cannot write", path.display());
        let blob = self.alone().with_context(context)?;
        let is_same = match &before {
            // The head is there already.
            Before::Missing => {
                crate::tell(&format!(
                    "note: {}: made a new store of changes, of up to {}",
                    path.display(),
                    size::show(end(&self.head))
                ));
                self.undo = Some(before);
                return Ok(());
            }
            Before::Blank => check_blank(&blob).map(|()| true)?,
            Before::Store(old, _) => Head::read(&blob).is_ok_and(|now| now == *old),
        };
        if !is_same {
            let message = format!("{}: another has written to it just now", path.display());
            return Err(Failure::error(exit::BUSY, message));
        }
        self.undo = Some(before);
        if !is_device(blob.file())? && blob.size() < end(&self.head) {
            blob.file().set_len(end(&self.head)).with_context(context)?;
        }
        write_head(blob.file(), &self.head).with_context(context)
    }

    /// Opens the store once more. Fails for a device that is mounted, or a part of another device.
    fn alone(&self) -> Result<FileBlob> {
        let flags = match is_device(&self.file)? {
            true => OFlags::EXCL,
            false => OFlags::empty(),
        };
        let file = reopen(&self.file, flags)?;
        drop_cache(&file)?;
        Ok(FileBlob::from_file(file, &self.path)?)
    }

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

    /// Makes the store as it was `before`, where nobody has it and nothing was written.
    fn put_back(&self, before: &Before) -> Result<()> {
        let uuids = writable_uuids(&self.name);
        if uuids
            .iter()
            .any(|uuid| share::number_of_uuid(uuid).is_some())
        {
            bail!("device {} is still there", self.name);
        }
        users::check(&self.path, &self.file.metadata()?, Signals::Ignore)?;
        let blob = self.alone()?;
        let now = Head::read(&blob)?;
        let count = match before {
            Before::Store(old, _) if now == *old => return Ok(()),
            Before::Store(_, count) => *count,
            Before::Missing | Before::Blank => 0,
        };
        if now != self.head {
            bail!("another has written to it");
        }
        if Exceptions::read(&blob, &now)?.len() != count {
            bail!("device {} was written to", self.name);
        }
        match before {
            Before::Missing if is_at(&self.path, blob.file())? => {
                std::fs::remove_file(&self.path)?;
            }
            Before::Missing => {}
            Before::Blank => {
                blob.file().write_all_at(&[0; EMPTY], 0)?;
                output::sync(blob.file())?;
            }
            Before::Store(old, _) => write_head(blob.file(), old)?,
        }
        Ok(())
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let Some(before) = self.undo.take() else {
            return;
        };
        if let Err(error) = self.put_back(&before) {
            crate::tell(&format!(
                "note: {}: stays, and counts as not closed: {}",
                self.path.display(),
                crate::message(&error)
            ));
        }
    }
}

/// Opens a file once more, to read and to write it. Its name may lead to another by now.
fn reopen(file: &File, flags: OFlags) -> std::io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true);
    options.custom_flags(flags.bits() as i32);
    options.open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Makes a file for a store, locked: the head, and a hole.
fn make(path: &Path, head: &Head) -> Result<FileBlob> {
    // What is written may be secret, whoever may read the layers.
    let mut output = Output::with_mode(path, false, [], 0o600)?;
    let context = || format!("{}: cannot write", path.display());
    let file = output.file();
    // From before another can see it.
    let what = path.display().to_string();
    lock(file, FlockOperation::NonBlockingLockExclusive, &what)?;
    file.set_len(end(head)).with_context(context)?;
    write_head(file, head).with_context(context)?;
    Ok(FileBlob::from_file(output.complete()?, path)?)
}

/// Where a store ends, in bytes.
fn end(head: &Head) -> u64 {
    // A valid head's is below 2^60.
    head::SIZE.saturating_add(head.store.saturating_mul(SECTOR_SIZE))
}

/// Returns `head` if it can be read again.
fn valid(path: &Path, head: Head) -> Result<Head> {
    match Head::from_bytes(&head.to_bytes()) {
        Ok(_) => Ok(head),
        Err(fault) => Err(Error::from(fault).in_file(path).into()),
    }
}

/// The sectors behind the head of a store of `bytes`.
fn sectors(path: &Path, bytes: u64) -> Result<u64> {
    let largest = MAX_END * SECTOR_SIZE;
    let (what, limit) = match bytes {
        0..SMALLEST => ("small: give it", SMALLEST),
        _ if bytes > largest => ("large: give it no more than", largest),
        _ => return Ok(head::usable((bytes - head::SIZE) / SECTOR_SIZE)),
    };
    let message = format!(
        "{}: a store of {} is too {what} {}",
        path.display(),
        size::show(bytes),
        size::show(limit)
    );
    Err(Failure::usage(message))
}

/// The sectors behind the head `old` of the store at `path`, as large as is wished.
fn grown(path: &Path, old: &Head, wish: &Wish) -> Result<u64> {
    match wish.bytes {
        Some(bytes) if bytes > end(old) => Ok(sectors(path, bytes)?.max(old.store)),
        Some(bytes) if bytes < end(old) && !wish.at_least => {
            let message = format!(
                "{}: has {} already, and a store cannot become smaller",
                path.display(),
                size::show(end(old))
            );
            Err(Failure::usage(message))
        }
        _ => Ok(old.store),
    }
}

/// Checks that a table of dm-snapshot can have the chunks of the store at `path`.
fn check_chunk(path: &Path, old: &Head) -> Result<()> {
    if old.chunk == head::CHUNK {
        return Ok(());
    }
    let message = format!(
        "{}: has chunks of {} sectors, and only those of {} can be written",
        path.display(),
        old.chunk,
        head::CHUNK
    );
    Err(Failure::error(exit::BAD_IMAGE, message))
}

/// Checks that the store with the head `old`, which is to get `new`, can be written to. Says where it was
/// not closed. Returns the number of its exceptions.
fn check_state(blob: &FileBlob, old: &Head, new: &Head, wish: &Wish) -> Result<u64> {
    let path = blob.path();
    if old.state == State::Open && old.host.is_other(&new.host) && !wish.take_over {
        let message = format!(
            "{}: is open on another machine, or was not closed there; its machine-id is {}; if nobody has it \
             open there, `open --take-over' opens it",
            path.display(),
            host::show(old.host.machine)
        );
        return Err(Failure::error(exit::BUSY, message));
    }
    let exceptions = Exceptions::read(blob, old).map_err(|error| error.in_file(path))?;
    let was_full = match old.state {
        State::Overflowed => true,
        // Nobody has seen whether writes have failed.
        State::Open | State::Failed => !exceptions.has_room(),
        State::Closed => false,
    };
    if was_full && new.store <= old.store {
        let message = format!(
            "{}: was full, and writes to the disk failed: open it with a larger --store-size than {}, and \
             check the file system",
            path.display(),
            size::show(end(old))
        );
        return Err(Failure::error(exit::BAD_IMAGE, message));
    }
    let note = match old.state {
        _ if was_full => "was full, and writes to the disk failed: check the file system (fsck)",
        State::Failed => {
            "a write to it failed when it was open last, and what came later may be missing: check the file \
             system (fsck)"
        }
        State::Open if !exceptions.is_empty() => {
            "was not closed when it was open last: the file system may have to recover"
        }
        _ => return Ok(exceptions.len()),
    };
    crate::tell(&format!("note: {}: {note}", path.display()));
    Ok(exceptions.len())
}

/// Checks that a disk of `disk` sectors ends with a sector of the device. Says what large ones mean, where it
/// becomes a store.
fn check_sectors(device: &FileBlob, disk: u64, before: &Before) -> Result<()> {
    let len = users::sector(&device.file().metadata()?).unwrap_or(SECTOR_SIZE);
    if len <= SECTOR_SIZE {
        return Ok(());
    }
    let path = device.path().display();
    let bytes = disk.saturating_mul(SECTOR_SIZE);
    if bytes % len != 0 {
        let message = format!(
            "{path}: has sectors of {len} bytes, and the disk, of {bytes} bytes, does not end with one: give a \
             file, or a device with smaller sectors"
        );
        return Err(Failure::error(exit::DEVICE, message));
    }
    if matches!(before, Before::Blank) {
        crate::tell(&format!(
            "note: {path}: has sectors of {len} bytes, and so has the disk with it: a file system that has \
             smaller blocks cannot be mounted"
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
