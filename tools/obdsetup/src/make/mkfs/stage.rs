// SPDX-License-Identifier: GPL-2.0

//! Writes a tree as files in a directory, for a mkfs that reads only directories. The directory has the
//! right names and content, but fifos in place of devices and sockets, and no other metadata: any user
//! can make these files. The rest is set in the file system.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{symlink, FileExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::{mknodat, FileType, Mode, CWD};
use tempfile::TempDir;

use super::tree::{show, Content, Id, Kind, Name, Node, Tree};

/// The directory. Dropping this deletes it.
pub(super) struct Stage(TempDir);

impl Stage {
    /// Makes the directory in `place`, and writes `tree` to it. Devices and sockets become fifos.
    pub(super) fn new(tree: &Tree, place: &Path) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix(".obdsetup-")
            .tempdir_in(place);
        let directory =
            directory.with_context(|| format!("{}: cannot make a directory", place.display()))?;
        let stage = Self(directory);
        let names = tree.names();
        let mut made: HashMap<Id, &Name> = HashMap::new();
        let path_of = |name: &Name| stage.0.path().join(OsStr::from_bytes(&names.path(name)));
        for name in names.iter() {
            crate::terminal::interrupt::check()?;
            let path = path_of(name);
            let done = match made.get(&name.id) {
                Some(first) => fs::hard_link(path_of(first), &path).map_err(Into::into),
                None => make(&path, tree.node(name.id)?),
            };
            done.with_context(|| {
                format!(
                    "{}: cannot make it in a temporary directory in {}",
                    show(&names.path(name)),
                    place.display()
                )
            })?;
            made.entry(name.id).or_insert(name);
        }
        Ok(stage)
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }
}

fn make(path: &Path, node: &Node) -> Result<()> {
    match &node.kind {
        Kind::Directory(_) => fs::create_dir(path)?,
        Kind::File(content) => write(path, content)?,
        Kind::Symlink(target) => symlink(OsStr::from_bytes(target), path)?,
        Kind::CharDevice(_) | Kind::BlockDevice(_) | Kind::Fifo | Kind::Socket => {
            mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        }
    }
    Ok(())
}

fn write(path: &Path, content: &Content) -> Result<()> {
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.set_len(content.size)?;
    content.read(|offset, data| Ok(file.write_all_at(data, offset)?))
}
