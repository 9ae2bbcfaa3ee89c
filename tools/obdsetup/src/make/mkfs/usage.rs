// SPDX-License-Identifier: GPL-2.0

//! Estimates the space for the files of a tree, to choose the size of the file system.

use anyhow::Result;
use overlaybd::format::num::to_u64;

use super::tree::{Kind, Node, Tree, ROOT};

/// Size of a block of a file system in bytes.
const BLOCK: u64 = 4096;

/// The space that files need.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    /// Number of inodes: files, directories and all others.
    entries: u64,
    /// Bytes of data, directories, links, maps of extents, and extended attributes, in whole blocks, without holes.
    bytes: u64,
}

impl Usage {
    /// Returns the space for the files in `tree`. A file with several names counts once.
    pub(super) fn of(tree: &Tree) -> Result<Self> {
        let mut usage = Self::default();
        usage.add(tree.node(ROOT)?);
        for name in tree.names().iter().filter(|name| name.first) {
            usage.add(tree.node(name.id)?);
        }
        Ok(usage)
    }

    fn add(&mut self, node: &Node) {
        let (data, map) = match &node.kind {
            // A map with 16 bytes for each extent: with many short extents, it takes much space.
            Kind::File(content) => (content.data_len(), to_u64(content.extents.len()) * 16),
            Kind::Symlink(target) => (to_u64(target.len()), 0),
            Kind::Directory(children) => {
                let names = children.keys().map(|name| to_u64(name.len()) + 12);
                (names.sum::<u64>().max(1), 0)
            }
            _ => (0, 0),
        };
        let xattrs = node.meta.xattrs.iter();
        let xattrs: usize = xattrs.map(|(name, value)| name.len() + value.len()).sum();
        self.entries += 1;
        for bytes in [data, map, to_u64(xattrs)] {
            self.bytes = self.bytes.saturating_add(bytes.next_multiple_of(BLOCK));
        }
    }

    /// Returns the size in bytes of a file system for these files, with free space and `fixed` more
    /// bytes. The size is generous: a layer only has what mkfs writes, so free space costs almost
    /// nothing.
    pub(super) fn with_room(self, fixed: u64) -> u64 {
        // mke2fs makes an inode for each 16 KiB, or for each 4 KiB below 512 MiB.
        let inodes = self.entries.saturating_mul(16 << 10);
        let sum = self.bytes.saturating_add(self.bytes / 4);
        let sum = sum.saturating_add(inodes).saturating_add(fixed);
        // If a tar has absurd sizes, the result is a size that no file system can have.
        sum.min(1 << 60).next_multiple_of(1 << 20)
    }
}

#[cfg(test)]
mod tests {
    use super::Usage;
    use crate::make::mkfs::from_dir;

    #[test]
    fn of_trees() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        std::fs::create_dir(dir.path().join("sub"))?;
        let file = dir.path().join("sub/file");
        std::fs::write(&file, [1; 5000])?;
        let one = Usage::of(&from_dir::read(dir.path(), false)?)?;
        assert_eq!(one.entries, 3);
        std::fs::hard_link(&file, dir.path().join("again"))?;
        assert_eq!(Usage::of(&from_dir::read(dir.path(), false)?)?, one);
        let sparse = std::fs::File::create(dir.path().join("sparse"))?;
        sparse.set_len(1 << 40)?;
        assert_eq!(
            Usage::of(&from_dir::read(dir.path(), false)?)?.bytes,
            one.bytes
        );
        assert!(from_dir::read(&dir.path().join("none"), false).is_err());
        Ok(())
    }

    #[test]
    fn room() {
        let usage = |entries, bytes| Usage { entries, bytes }.with_room(32 << 20);
        assert_eq!(usage(0, 0), 32 << 20);
        assert_eq!(usage(64, 4 << 20), 38 << 20);
        assert_eq!(usage(u64::MAX, u64::MAX), 1 << 60);
    }
}
