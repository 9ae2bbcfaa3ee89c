// SPDX-License-Identifier: GPL-2.0

//! Stores of changes: files and block devices that keep what is written to a disk of layers.
//!
//! - [`opening`]: what `open --writable` does with one, or makes.
//! - [`closing`]: what `close` does with one.
//! - [`reading`]: what `create --changes` reads.
//! - [`thin`]: what it reads of a thin volume.
//! - [`users`]: who has one open.
//! - [`host`]: where it is open.
//!
//! The format is [`overlaybd::changes`].

pub(crate) mod closing;
mod host;
pub(crate) mod opening;
pub(crate) mod reading;
pub(crate) mod thin;
mod users;

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use overlaybd::changes::{Head, Origin};
use overlaybd::{FileBlob, Stack};
use rustix::fs::{Advice, FlockOperation};

use crate::chain::{Findings, Part};
use crate::exit::{self, Failure};
use crate::{interrupt, output, size};

/// How long udev and others may have a lock or a loop device who only look at it.
const PATIENCE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(20);

/// What a store is opened for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    /// To write to it, too: no other obdsetup has it meanwhile.
    Write,
}

/// Opens the store at `path`, and locks it. The lock ends with the file.
fn open(path: &Path, access: Access) -> Result<FileBlob> {
    let context = || path.display().to_string();
    loop {
        let (blob, operation) = match access {
            Access::Read => (
                FileBlob::open(path, None)?,
                FlockOperation::NonBlockingLockShared,
            ),
            Access::Write => (
                FileBlob::open_to_write(path)?,
                FlockOperation::NonBlockingLockExclusive,
            ),
        };
        lock(blob.file(), operation, &context())?;
        // Who had the lock before may have removed it, or another is there.
        if is_at(path, blob.file()).with_context(context)? {
            drop_cache(blob.file())?;
            // It may have become larger.
            let file = blob.file().try_clone().with_context(context)?;
            return Ok(FileBlob::from_file(file, path)?);
        }
        interrupt::check()?;
    }
}

/// Locks a store, `what` in messages.
fn lock(file: &File, operation: FlockOperation, what: &str) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        match rustix::fs::flock(file, operation) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
            Err(error) => return Err(std::io::Error::from(error)).with_context(|| what.to_owned()),
        }
        interrupt::check()?;
        if Instant::now() >= end {
            let message = format!("{what}: another obdsetup is at work on it");
            return Err(Failure::error(exit::BUSY, message));
        }
        std::thread::sleep(POLL);
    }
}

/// Whether `path` leads to `file`.
fn is_at(path: &Path, file: &File) -> std::io::Result<bool> {
    let meta = file.metadata()?;
    let there = path.metadata();
    Ok(there.is_ok_and(|there| (there.dev(), there.ino()) == (meta.dev(), meta.ino())))
}

/// Forgets what the page cache has of a device: device-mapper doesn't write through it.
fn drop_cache(file: &File) -> std::io::Result<()> {
    if is_device(file)? {
        let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
    }
    Ok(())
}

fn is_device(file: &File) -> std::io::Result<bool> {
    Ok(file.metadata()?.file_type().is_block_device())
}

/// Writes the head of a store, to its disk.
fn write_head(file: &File, head: &Head) -> std::io::Result<()> {
    file.write_all_at(&head.to_bytes(), 0)?;
    output::sync(file)
}

/// The identity of the disk of `stack`.
fn origin(stack: &Stack) -> Result<Origin> {
    // With --ignore-identity, the layers may be others than those that a UUID was made of.
    let fits = Findings::of(stack.layers(), Part::Whole).is_empty();
    Ok(Origin::of(stack, fits)?)
}

/// Checks that the store at `path` belongs to the disk `origin` of `sectors` sectors.
fn check_origin(path: &Path, head: &Head, origin: &Origin, sectors: u64) -> Result<()> {
    if head.origin.digest == origin.digest && head.disk == sectors {
        return Ok(());
    }
    let name = |uuid: &str| match uuid {
        "" => "no UUID".to_owned(),
        uuid => format!("UUID {}", uuid.escape_debug()),
    };
    let message = format!(
        "{}: has the changes of another disk: one of {} whose topmost layer has {}, and the layers given \
         are one of {} whose topmost layer has {}: give the layers that it was made with",
        path.display(),
        size::show(head.disk.saturating_mul(512)),
        name(&head.origin.uuid),
        size::show(sectors.saturating_mul(512)),
        name(&origin.uuid),
    );
    Err(Failure::error(exit::BAD_IMAGE, message))
}

/// Whether there is nothing at `path`.
fn is_missing(path: &Path) -> bool {
    let there = path.symlink_metadata();
    there.is_err_and(|error| error.kind() == ErrorKind::NotFound)
}
