// SPDX-License-Identifier: GPL-2.0

//! How much the files of a directory or tar take, so that a file system can be made large enough.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use walkdir::WalkDir;

use crate::interrupt;
use crate::program::Program;

/// Bytes of a block of a file system.
const BLOCK: u64 = 4096;

/// What files take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Files, directories and all else that has an inode.
    pub(crate) entries: u64,
    /// Bytes of content, in whole blocks.
    pub(crate) bytes: u64,
}

impl Usage {
    fn add(&mut self, bytes: u64) {
        self.entries += 1;
        self.bytes = self.bytes.saturating_add(bytes.next_multiple_of(BLOCK));
    }

    /// Of what is in `directory`. A file with several names counts once.
    pub(crate) fn of_directory(directory: &Path) -> Result<Self> {
        let mut usage = Self::default();
        let mut seen = HashSet::new();
        for entry in WalkDir::new(directory) {
            interrupt::check()?;
            let meta = entry.and_then(|entry| entry.metadata());
            let meta = meta.with_context(|| format!("{}: cannot look", directory.display()))?;
            if meta.nlink() == 1 || meta.is_dir() || seen.insert((meta.dev(), meta.ino())) {
                usage.add(meta.len());
            }
        }
        Ok(usage)
    }

    /// Of what is in the tar `file`, compressed or not.
    pub(crate) fn of_tar(file: &Path) -> Result<Self> {
        let mut usage = Self::default();
        let mut command = Program::new("tar", "tars");
        // Without --force-local, a colon in the name would name another machine.
        command.args(["--list", "--verbose", "--numeric-owner", "--force-local"]);
        let listed = command.arg("--file").arg(file);
        listed
            .each_line(|line| usage.add(size_in_listing(line)))?
            .tell();
        Ok(usage)
    }

    /// Bytes that a file system with inodes and free space needs. Generous: a layer holds only what
    /// mkfs writes, so that free space costs next to nothing.
    pub(crate) fn with_room(self, fixed: u64) -> u64 {
        // mke2fs has an inode for each 16 KiB, or 4 KiB below 512 MiB.
        let inodes = self.entries.saturating_mul(16 << 10);
        let sum = self.bytes.saturating_add(self.bytes / 4);
        let sum = sum.saturating_add(inodes).saturating_add(fixed);
        // Beyond what any file system has, where the sizes in a tar are nonsense.
        sum.min(1 << 60).next_multiple_of(1 << 20)
    }
}

/// The size in a line such as `-rw-r--r-- 0/0  123 2026-08-01 12:00 name`; 0 for what has none.
fn size_in_listing(line: &str) -> u64 {
    let size = line.split_whitespace().nth(2);
    size.and_then(|size| size.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{size_in_listing, Usage};

    #[test]
    fn of_directories() -> std::io::Result<()> {
        let dir = tempfile::tempdir()?;
        std::fs::create_dir(dir.path().join("sub"))?;
        let file = dir.path().join("sub/file");
        std::fs::write(&file, [1; 5000])?;
        let one = Usage::of_directory(dir.path()).ok();
        assert_eq!(one.map(|usage| usage.entries), Some(3));
        std::fs::hard_link(&file, dir.path().join("again"))?;
        assert_eq!(Usage::of_directory(dir.path()).ok(), one);
        assert!(Usage::of_directory(&dir.path().join("none")).is_err());
        Ok(())
    }

    #[test]
    fn listings() {
        let line = "-rw-r--r-- 1000/1000   5000 2026-08-01 12:00 a name";
        assert_eq!(size_in_listing(line), 5000);
        let line = "crw-rw-rw- 0/0             1,3 2026-08-01 12:00 dev/null";
        assert_eq!(size_in_listing(line), 0);
        assert_eq!(size_in_listing(""), 0);
    }

    #[test]
    fn room() {
        let usage = |entries, bytes| Usage { entries, bytes }.with_room(32 << 20);
        assert_eq!(usage(0, 0), 32 << 20);
        assert_eq!(usage(64, 4 << 20), 38 << 20);
        assert_eq!(usage(u64::MAX, u64::MAX), 1 << 60);
    }
}
