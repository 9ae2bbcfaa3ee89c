// SPDX-License-Identifier: GPL-2.0

//! Finds who has a store open.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::thread::sleep;
use std::time::Instant;

use anyhow::Result;
use rustix::fs::{major, minor};

use super::{PATIENCE, POLL};
use crate::devices::dm::backing::{is_over, loop_file, FileId};
use crate::devices::dm::stack::part;
use crate::devices::dm::system;
use crate::files::in_use;
use crate::terminal::exit::{self, Failure};
use crate::terminal::interrupt;

/// Where sysfs is mounted.
const SYS: &str = "/sys";

/// What a signal does during the wait for a loop device to be detached.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Signals {
    End,
    /// It is ignored. Used when cleaning up after a signal.
    Ignore,
}

/// Returns an error if a mapped device or a loop device is over the store at `path`. `meta` is the metadata of this
/// file or block device. Waits for up to [`PATIENCE`] for a loop device over a file to be detached.
pub(super) fn check(path: &Path, meta: &fs::Metadata, signals: Signals) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let is_device = meta.file_type().is_block_device();
        let numbers = match is_device {
            true => [vec![number(meta)], loops_beside(&number(meta))].concat(),
            false => loops(meta),
        };
        let what = match numbers.iter().find_map(|number| user(number)) {
            Some(name) => format!("stack {name} has it open: run `obdsetup close {name}' first"),
            None if !is_device && !numbers.is_empty() => {
                // The last stack may be closed already, and udev may still have its loop device open.
                if Instant::now() < end {
                    if signals == Signals::End {
                        interrupt::check()?;
                    }
                    sleep(POLL);
                    continue;
                }
                format!("is in use: loop device {} is over it", numbers.join(", "))
            }
            None => return Ok(()),
        };
        let message = format!("{}: {what}", path.display());
        return Err(Failure::error(exit::BUSY, message));
    }
}

/// Returns the number of a block device, `MAJOR:MINOR`.
fn number(meta: &fs::Metadata) -> String {
    format!("{}:{}", major(meta.rdev()), minor(meta.rdev()))
}

/// Returns the size in bytes of a logical block of a block device; `None` for a file.
pub(super) fn sector(meta: &fs::Metadata) -> Option<u64> {
    let system = system::system(&number(meta));
    // For a partition, the queue is that of its disk.
    let mut of = ["queue", "../queue"].into_iter().map(|queue| {
        let size = system.join(queue).join("logical_block_size");
        fs::read_to_string(size).ok()?.trim_end().parse().ok()
    });
    of.find_map(|size| size)
        .filter(|_| meta.file_type().is_block_device())
}

/// If device `number` is a loop device, returns the numbers of all writable loop devices with the same file.
fn loops_beside(number: &str) -> Vec<String> {
    let file = loop_file(Path::new(SYS), number);
    let meta = file.and_then(|file| fs::metadata(file).ok());
    meta.map_or_else(Vec::new, |meta| loops(&meta))
}

/// Returns the numbers of the writable loop devices with this file.
fn loops(meta: &fs::Metadata) -> Vec<String> {
    let sys = Path::new(SYS);
    let id = FileId::of(meta);
    let is_same = |other: fs::Metadata| (other.dev(), other.ino()) == (meta.dev(), meta.ino());
    let mut found = in_use::writable_loops(sys);
    // The name may lead to another file now, or be from another mount namespace.
    found.retain(|device| {
        let named = device.file.metadata();
        let leads_nowhere = named.is_err();
        named.is_ok_and(is_same) || is_over(sys, &device.number, &id).unwrap_or(leads_nowhere)
    });
    found.into_iter().map(|device| device.number).collect()
}

/// Returns the name of a stack that uses device `number`, or of another mapped device that is over it.
fn user(number: &str) -> Option<String> {
    let holder = system::users(number).into_iter().next()?;
    let text = |name: &str| {
        let text = fs::read_to_string(system::system(&holder).join("dm").join(name));
        text.map_or_else(|_| holder.clone(), |text| text.trim_end().to_owned())
    };
    let uuid = text("uuid");
    Some(part(&uuid).map_or_else(|| text("name"), |(_, name)| name.to_owned()))
}
