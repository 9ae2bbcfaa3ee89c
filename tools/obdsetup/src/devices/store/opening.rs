// SPDX-License-Identifier: GPL-2.0

//! What `open --writable` does with a store: it makes the store, or checks that it belongs to the disk.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use overlaybd::changes::{exceptions, head, Exceptions, Fault, Head, State};
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
use crate::devices::dm::backing::Backing;
use crate::devices::dm::lock::Lock;
use crate::devices::dm::plan::writable_uuids;
use crate::devices::dm::system;
use crate::make::output::{self, Output};
use crate::terminal::exit::{self, Failure};
use crate::terminal::size;

/// Size in bytes of the smallest store that is made.
const SMALLEST: u64 = 1 << 20;
/// Number of bytes at each end of a device that must be zeros before it becomes a store.
const BLANK: u64 = 1 << 20;
/// Length in bytes of a store without changes: the head, the header of dm-snapshot, and an area.
const EMPTY: usize = 3 * 4096;

/// What the user wants of a store.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wish {
    /// Size in bytes for a store that is made or grown. If `None`, a file gets room for all of the disk.
    pub(crate) bytes: Option<u64>,
    /// Whether an existing store may be larger than `bytes`.
    pub(crate) at_least: bool,
    /// Whether to make a store if there is none.
    pub(crate) create: bool,
    /// Whether to open a store that is marked as open on another machine.
    pub(crate) take_over: bool,
}

/// A store that is about to be opened. Nothing was written to it yet.
pub(crate) struct Found {
    path: PathBuf,
    head: Head,
    /// The locked store; `None` if the file has to be made.
    there: Option<FileBlob>,
    before: Before,
}

/// The previous content.
enum Before {
    /// No file.
    Missing,
    /// An empty device.
    Blank,
    /// A store with this head and this number of exceptions.
    Store(Head, u64),
}

impl Found {
    /// Checks the store at `path` for the disk of `stack`.
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
                    "{}: there is no store of changes; `open --create' makes it; or is its file system not \
                     mounted?",
                    path.display()
                );
                return Err(Failure::error(exit::DEVICE, message));
            }
            let store = match wish.bytes {
                Some(bytes) => sectors(path, bytes)?,
                None => exceptions::full_size(disk),
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

    /// Returns the number of sectors after the head.
    pub(crate) fn sectors(&self) -> u64 {
        self.head.store
    }

    /// Writes the head, which marks the store as open. `name` is the name of the disk.
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
        // Programs that are started inherit the lock, so it is held while one of them runs.
        rustix::io::fcntl_setfd(locked.file(), FdFlags::empty()).map_err(std::io::Error::from)?;
        // Opened separately, without the lock: a loop device keeps its file open, and would keep the lock
        // held.
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

/// A store that is open. Dropping this restores the previous content, unless [`Self::keep`] was called, or
/// the disk still exists or was written to.
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
            // The head was written when the file was made.
            Before::Missing => {
                crate::terminal::tell(&format!(
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
            let message = format!("{}: another program has just written to it", path.display());
            return Err(Failure::error(exit::BUSY, message));
        }
        self.undo = Some(before);
        if !is_device(blob.file())? && blob.size() < end(&self.head) {
            blob.file().set_len(end(&self.head)).with_context(context)?;
        }
        write_head(blob.file(), &self.head).with_context(context)
    }

    /// Opens the store again. Fails if the store is a device that is mounted or that is below another device.
    fn alone(&self) -> Result<FileBlob> {
        let flags = match is_device(&self.file)? {
            true => OFlags::EXCL,
            false => OFlags::empty(),
        };
        let file = reopen(&self.file, flags)?;
        drop_cache(&file)?;
        Ok(FileBlob::from_file(file, &self.path)?)
    }

    /// Returns the block device that a table may name. With `direct`, I/O to a file bypasses the page cache.
    pub(crate) fn backing(&self, direct: bool, lock: &Lock) -> Result<Backing> {
        match is_device(&self.file)? {
            true => Ok(Backing::device(&self.file.metadata()?)),
            false => Backing::writable(&self.file, direct, lock),
        }
    }

    /// Keeps the store open.
    pub(crate) fn keep(mut self) {
        self.undo = None;
    }

    /// Restores the content from `before`. Fails if the store is in use or was written to.
    fn put_back(&self, before: &Before) -> Result<()> {
        let uuids = writable_uuids(&self.name);
        if uuids
            .iter()
            .any(|uuid| system::number_of_uuid(uuid).is_some())
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
            bail!("another program has written to it");
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
            let before = format!(
                "note: {}: is kept, and counts as not closed: ",
                self.path.display()
            );
            crate::terminal::tell_error(&before, &error);
        }
    }
}

/// Opens a file again for reading and writing. Doesn't use its name, which may lead to another file now.
fn reopen(file: &File, flags: OFlags) -> std::io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true);
    options.custom_flags(flags.bits() as i32);
    options.open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Makes and locks the file of a store: the head, and a hole.
fn make(path: &Path, head: &Head) -> Result<FileBlob> {
    // Changes may be secret, even if everyone may read the layers.
    let mut output = Output::with_mode(path, false, [], 0o600)?;
    let context = || format!("{}: cannot write", path.display());
    let file = output.file();
    // Locked before the file gets its name.
    let what = path.display().to_string();
    lock(file, FlockOperation::NonBlockingLockExclusive, &what)?;
    file.set_len(end(head)).with_context(context)?;
    write_head(file, head).with_context(context)?;
    Ok(FileBlob::from_file(output.complete()?, path)?)
}

/// Returns the end of a store in bytes.
fn end(head: &Head) -> u64 {
    // Doesn't saturate for a valid head: the end is below 2^60.
    head::SIZE.saturating_add(head.store.saturating_mul(SECTOR_SIZE))
}

/// Returns `head`, if it will be accepted when it is read again.
fn valid(path: &Path, head: Head) -> Result<Head> {
    match Head::from_bytes(&head.to_bytes()) {
        Ok(_) => Ok(head),
        Err(fault) => Err(Error::from(fault).in_file(path).into()),
    }
}

/// Returns the number of sectors after the head of a store of `bytes` bytes.
fn sectors(path: &Path, bytes: u64) -> Result<u64> {
    let largest = MAX_END * SECTOR_SIZE;
    let (what, limit) = match bytes {
        0..SMALLEST => ("small: give it", SMALLEST),
        _ if bytes > largest => ("large: give it no more than", largest),
        _ => return Ok(exceptions::usable((bytes - head::SIZE) / SECTOR_SIZE)),
    };
    let message = format!(
        "{}: a store of {} is too {what} {}",
        path.display(),
        size::show(bytes),
        size::show(limit)
    );
    Err(Failure::usage(message))
}

/// Returns the number of sectors after the head of the store at `path`, with the size that `wish` has. `old`
/// is the current head.
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

/// Checks that a table of dm-snapshot can use the chunk size of the store at `path`.
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

/// Checks that a store can be opened for writing. `old` is its head, and `new` will replace it. Reports if
/// the store was not closed or was full. Returns the number of its exceptions.
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
        // It is unknown whether writes have failed because the store was full.
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
    crate::terminal::tell(&format!("note: {}: {note}", path.display()));
    Ok(exceptions.len())
}

/// Checks that a disk of `disk` sectors is a whole number of logical blocks of the device. If the device
/// becomes a store and its logical blocks are larger than a sector, reports what follows from that.
fn check_sectors(device: &FileBlob, disk: u64, before: &Before) -> Result<()> {
    let len = users::sector(&device.file().metadata()?).unwrap_or(SECTOR_SIZE);
    if len <= SECTOR_SIZE {
        return Ok(());
    }
    let path = device.path().display();
    let bytes = disk.saturating_mul(SECTOR_SIZE);
    if bytes % len != 0 {
        let message = format!(
            "{path}: has logical blocks of {len} bytes, and the size of the disk, {bytes} bytes, is no \
             multiple of that: give a file, or a device with smaller logical blocks"
        );
        return Err(Failure::error(exit::DEVICE, message));
    }
    if matches!(before, Before::Blank) {
        crate::terminal::tell(&format!(
            "note: {path}: has logical blocks of {len} bytes, and so has the disk with it: a file system \
             that has smaller blocks cannot be mounted"
        ));
    }
    Ok(())
}

/// Checks that a device is empty: that the bytes at both of its ends are zeros.
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
