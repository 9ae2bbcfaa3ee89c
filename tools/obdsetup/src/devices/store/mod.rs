// SPDX-License-Identifier: GPL-2.0

//! Stores of changes: files and block devices that keep what is written to the disk of a stack.
//!
//! - [`opening`]: what `open --writable` does with a store. It may make one.
//! - [`closing`]: what `close` does with a store.
//! - [`reading`]: reads a store for `create --changes`.
//! - [`thin`]: reads the mappings of a thin volume for `create --changes`.
//! - [`users`]: finds who has a store open.
//! - [`host`]: identifies the machine on which a store is open.
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

use crate::input::chain::{Findings, Part};
use crate::make::output;
use crate::terminal::exit::{self, Failure};
use crate::terminal::interrupt;
use crate::terminal::size;

/// How long to wait for the lock of a store or for a loop device. Another obdsetup, or a program such as
/// udev, may have it for a moment.
const PATIENCE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(20);

/// The purpose for which a store is opened.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    /// To read the store, with a shared lock.
    Read,
    /// To read and write the store, with an exclusive lock.
    Write,
}

/// Opens the store at `path`, and locks it; waits for up to [`PATIENCE`] for the lock. The lock is released when the
/// file is closed.
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
        // The previous holder of the lock may have removed or replaced the file: try again then.
        if is_at(path, blob.file()).with_context(context)? {
            drop_cache(blob.file())?;
            // Get the size again, because the file may have grown.
            let file = blob.file().try_clone().with_context(context)?;
            return Ok(FileBlob::from_file(file, path)?);
        }
        interrupt::check()?;
    }
}

/// Locks a store. Messages call it `what`.
fn lock(file: &File, operation: FlockOperation, what: &str) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        match rustix::fs::flock(file, operation) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
            Err(error) => return Err(std::io::Error::from(error)).with_context(|| what.to_owned()),
        }
        let message = format!("{what}: is locked by another program, such as another obdsetup");
        interrupt::check().with_context(|| message.clone())?;
        if Instant::now() >= end {
            return Err(Failure::error(exit::BUSY, message));
        }
        std::thread::sleep(POLL);
    }
}

/// Returns whether `path` leads to `file`.
fn is_at(path: &Path, file: &File) -> std::io::Result<bool> {
    let meta = file.metadata()?;
    let there = path.metadata();
    Ok(there.is_ok_and(|there| (there.dev(), there.ino()) == (meta.dev(), meta.ino())))
}

/// Drops the page cache of a block device, which is out of date after device-mapper has written to the
/// device.
fn drop_cache(file: &File) -> std::io::Result<()> {
    if is_device(file)? {
        let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
    }
    Ok(())
}

fn is_device(file: &File) -> std::io::Result<bool> {
    Ok(file.metadata()?.file_type().is_block_device())
}

/// Writes the head of a store, and syncs it.
fn write_head(file: &File, head: &Head) -> std::io::Result<()> {
    file.write_all_at(&head.to_bytes(), 0)?;
    output::sync(file)
}

/// Returns what identifies the disk of `stack`.
fn origin(stack: &Stack) -> Result<Origin> {
    // With --ignore-identity, the layers may differ from those from which a UUID was made.
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
        "{}: has the changes of another disk: that disk has {}, and its topmost layer {}; the disk of the \
         layers given has {}, and its topmost layer {}: give the layers that the store was made with",
        path.display(),
        size::show(head.disk.saturating_mul(512)),
        name(&head.origin.uuid),
        size::show(sectors.saturating_mul(512)),
        name(&origin.uuid),
    );
    Err(Failure::error(exit::BAD_IMAGE, message))
}

/// Returns whether nothing exists at `path`.
fn is_missing(path: &Path) -> bool {
    let there = path.symlink_metadata();
    there.is_err_and(|error| error.kind() == ErrorKind::NotFound)
}
