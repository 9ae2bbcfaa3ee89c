// SPDX-License-Identifier: GPL-2.0

//! Stores of changes: files and block devices that keep what is written to a disk of layers.
//!
//! - [`opening`]: what `open --writable` does with one, or makes.
//! - [`closing`]: what `close` does with one.
//! - [`reading`]: what `create --changes` reads.
//! - [`thin`]: what it reads of a thin volume.
//! - [`users`]: who has one open.
//!
//! The format is [`overlaybd::changes`].

pub(crate) mod closing;
pub(crate) mod opening;
pub(crate) mod reading;
pub(crate) mod thin;
mod users;

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use overlaybd::changes::{Head, Origin};
use overlaybd::FileBlob;
use rustix::fs::{Advice, FlockOperation};

use crate::exit::{self, Failure};
use crate::{interrupt, output, size};

/// How long udev and others may have a lock who only look at a device.
const PATIENCE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(20);

/// Opens the store at `path` to read it, and locks it, against others of its kind, or alone. The lock ends
/// with the file and with the programs that are started meanwhile.
fn open(path: &Path, lock: FlockOperation) -> Result<FileBlob> {
    let blob = FileBlob::open(path, None)?;
    let context = || path.display().to_string();
    let end = Instant::now() + PATIENCE;
    loop {
        match rustix::fs::flock(blob.file(), lock) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
            Err(error) => return Err(std::io::Error::from(error)).with_context(context),
        }
        interrupt::check()?;
        if Instant::now() >= end {
            let message = format!("{}: another obdsetup is at work on it", path.display());
            return Err(Failure::error(exit::BUSY, message));
        }
        std::thread::sleep(POLL);
    }
    if is_device(blob.file())? {
        // device-mapper doesn't write through the page cache, which may be old.
        let _ = rustix::fs::fadvise(blob.file(), 0, None, Advice::DontNeed);
    }
    Ok(blob)
}

fn is_device(file: &File) -> Result<bool> {
    Ok(file.metadata()?.file_type().is_block_device())
}

/// Writes the head of a store, to its disk.
fn write_head(file: &File, head: &Head) -> std::io::Result<()> {
    file.write_all_at(&head.to_bytes(), 0)?;
    output::sync(file)
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
