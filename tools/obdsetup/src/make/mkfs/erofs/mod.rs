// SPDX-License-Identifier: GPL-2.0

//! Makes erofs. Without options for mkfs.erofs, obdsetup writes the file system itself ([`write`]):
//! mkfs.erofs stores holes as zeros; from a directory, it writes files in the order in which the directory
//! is read; from a tar, it loses sockets and some device numbers. With options, such as for compression,
//! mkfs.erofs makes the file system ([`program`]).
//!
//! For a directory or a tar, what [`write`] makes is not stored as a whole: the layer is made from the
//! files ([`fresh`]).
//!
//! A layer of a container image is added to the file system on the disk of the layers below, which is read
//! first ([`read`]), so that little of the disk changes ([`grow`]). The lowest layer is added to an empty
//! file system. For each layer, a temporary file gets the blocks that are written ([`disk`]).

mod disk;
mod fresh;
mod grow;
mod program;
mod read;
mod write;

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result};
use overlaybd::Stack;
use uuid::Uuid;

use self::disk::Disk;
pub(crate) use self::fresh::Fresh;
use self::read::State;
use self::write::BLOCK;
use super::tree::Tree;
use super::{Delta, New, Options, Stamp};

/// Makes the file system of `tree`, with temporary files in `place`.
pub(super) fn make(tree: Tree, options: &Options<'_>, stamp: &Stamp, place: &Path) -> Result<New> {
    match options.args.is_empty() {
        true => Fresh::new(tree, stamp, options.dax, place).map(|fresh| New::Erofs(fresh.into())),
        false => program::make(&tree, options, stamp, place).map(New::File),
    }
}

/// The file system on the disk of the layers below, while a layer is added to it.
pub(super) struct Growing {
    disk: Disk,
    state: State,
}

impl Growing {
    /// Reads the file system on the disk of `below`, or starts a new one with the tree `empty`. All blocks
    /// that are written go to a temporary file in `place`.
    pub(super) fn open(below: Option<Stack>, empty: Tree, place: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(place);
        let file = file.with_context(|| format!("{}: cannot make a file", place.display()))?;
        let is_new = below.is_none();
        let disk = Disk::new(below, file);
        let state = match is_new {
            true => State {
                tree: empty,
                placed: HashMap::new(),
                chunks: false,
                prints: false,
            },
            false => read::read(&disk)?,
        };
        Ok(Self { disk, state })
    }

    /// Returns the tree, to change it.
    pub(super) fn tree(&mut self) -> &mut Tree {
        &mut self.state.tree
    }

    /// Writes the changes. `stamp` is the UUID and the time of creation of the file system. Returns what
    /// has changed on the disk.
    pub(super) fn finish(self, stamp: (Uuid, u32)) -> Result<Delta> {
        let blocks = grow::write(&self.state, &self.disk, stamp)?;
        let (file, runs) = self.disk.into_written();
        // `file` may end within the last block that was written, but `Delta::read` reads whole blocks: zeros
        // are added up to the end of the disk.
        file.set_len(blocks * BLOCK).context(write::WRITE)?;
        Ok(Delta {
            size: blocks * BLOCK,
            file,
            runs,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
