// SPDX-License-Identifier: GPL-2.0

//! Reads a store that was closed, for `create --changes`.

use std::path::Path;

use anyhow::Result;
use overlaybd::changes::{Changed, Exceptions, Head, State};
use overlaybd::{FileBlob, Stack};

use super::users::{self, Signals};
use super::{check_origin, open, origin, Access};
use crate::terminal::exit::{self, Failure};

/// A locked store whose changes can be read.
pub(crate) struct Closed {
    blob: FileBlob,
    head: Head,
}

impl Closed {
    /// Opens the store at `path`.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let blob = open(path, Access::Read)?;
        users::check(path, &blob.file().metadata()?, Signals::End)?;
        let head = Head::read(&blob).map_err(|error| error.in_file(path))?;
        let what = match head.state {
            State::Closed => return Ok(Self { blob, head }),
            State::Open => {
                "was not closed when it was open last: `obdsetup open --writable' it, let its file system \
                 recover (mount and umount), and `obdsetup close' it"
            }
            State::Overflowed => {
                "was full, and writes to the disk failed: `obdsetup open --writable' it with a larger \
                 --store-size, check the file system, and `obdsetup close' it"
            }
            State::Failed => {
                // This fails if dm-snapshot has marked the store as invalid: opening it again wouldn't help.
                Exceptions::read(&blob, &head).map_err(|error| error.in_file(path))?;
                "a write to it failed when it was open last: `obdsetup open --writable' it, check the file \
                 system, and `obdsetup close' it"
            }
        };
        let message = format!("{}: {what}", path.display());
        Err(Failure::error(exit::BAD_IMAGE, message))
    }

    /// Returns the disk `below` with the changes. Fails if they don't belong to this disk.
    pub(crate) fn over<'a>(&'a self, below: &'a Stack) -> Result<Changed<'a>> {
        let Self { blob, head } = self;
        let path = blob.path();
        check_origin(path, head, &origin(below)?, below.sectors())?;
        let exceptions = Exceptions::read(blob, head).map_err(|error| error.in_file(path))?;
        Ok(Changed::new(blob, exceptions, below))
    }
}
