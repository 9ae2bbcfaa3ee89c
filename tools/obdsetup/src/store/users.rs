// SPDX-License-Identifier: GPL-2.0

//! Who has a store open.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::Result;
use rustix::fs::{major, minor};

use crate::dm::backing::{is_over, FileId};
use crate::dm::share;
use crate::dm::stack::part;
use crate::exit::{self, Failure};
use crate::in_use;

/// Where sysfs is mounted.
const SYS: &str = "/sys";

/// Fails where a device is over the store at `path`, a file or block device that is described by `meta`.
pub(super) fn check(path: &Path, meta: &fs::Metadata) -> Result<()> {
    let numbers = match meta.file_type().is_block_device() {
        true => vec![format!("{}:{}", major(meta.rdev()), minor(meta.rdev()))],
        false => loops(meta),
    };
    let what = match numbers.iter().find_map(|number| user(number)) {
        Some(name) => format!("stack {name} has it open: run `obdsetup close {name}' first"),
        None if meta.file_type().is_file() && !numbers.is_empty() => {
            format!("is in use: loop device {} is over it", numbers.join(", "))
        }
        None => return Ok(()),
    };
    let message = format!("{}: {what}", path.display());
    Err(Failure::error(exit::BUSY, message))
}

/// Returns the numbers of the loop devices over a file that can be written to.
fn loops(meta: &fs::Metadata) -> Vec<String> {
    let sys = Path::new(SYS);
    let id = FileId::of(meta);
    let is_same = |other: fs::Metadata| (other.dev(), other.ino()) == (meta.dev(), meta.ino());
    let mut found = in_use::writable_loops(sys);
    // The name may be that of another file by now, or in another mount namespace.
    found.retain(|device| {
        device.file.metadata().is_ok_and(is_same) || is_over(sys, &device.number, &id) == Some(true)
    });
    found.into_iter().map(|device| device.number).collect()
}

/// Returns the stack that has device `number` as its store, or the device that is over it.
fn user(number: &str) -> Option<String> {
    let holder = share::users(number).into_iter().next()?;
    let text = |name: &str| {
        let text = fs::read_to_string(share::system(&holder).join("dm").join(name));
        text.map_or_else(|_| holder.clone(), |text| text.trim_end().to_owned())
    };
    let uuid = text("uuid");
    Some(part(&uuid).map_or_else(|| text("name"), |(_, name)| name.to_owned()))
}
