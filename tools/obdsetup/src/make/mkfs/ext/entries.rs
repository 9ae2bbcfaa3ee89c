// SPDX-License-Identifier: GPL-2.0

//! Changes directory entries of ext2, ext3 or ext4 in place: the inode number and the file type in
//! the entry of a given name. debugfs could remove an entry and add it again, but not if the name has a
//! newline.
//!
//! Source: Linux, `Documentation/filesystems/ext4/directory.rst` and `checksums.rst`.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{bail, Context, Result};
use overlaybd::format::num::to_usize;

/// Offset and length of the superblock in bytes.
const SUPERBLOCK: (u64, usize) = (1024, 1024);
/// Length in bytes of the last entry in a directory block, which holds the checksum of the block.
const TAIL: usize = 12;

/// The inode number and the file type that a directory entry gets.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    pub(super) inode: u32,
    /// The file type, as in `st_mode`.
    pub(super) mode: u32,
}

impl Entry {
    fn kind(self) -> u8 {
        match self.mode & 0o170_000 {
            0o100_000 => 1,
            0o040_000 => 2,
            0o020_000 => 3,
            0o060_000 => 4,
            0o010_000 => 5,
            0o140_000 => 6,
            0o120_000 => 7,
            _ => 0,
        }
    }
}

/// Fields of the superblock that are needed here.
pub(super) struct Geometry {
    /// Size of a block in bytes.
    block: u64,
    /// Size of an inode in bytes.
    inode_size: u16,
    /// Whether a directory entry has a field for the file type (the feature `filetype`).
    kinds: bool,
    /// The start value of checksums; `None` if the file system has no checksums of metadata.
    seed: Option<u32>,
}

impl Geometry {
    pub(super) fn read(image: &File) -> Result<Self> {
        let (at, len) = SUPERBLOCK;
        let mut block = vec![0; len];
        let read = image.read_exact_at(&mut block, at);
        read.context("cannot read the superblock that mke2fs wrote")?;
        let number = |at: usize| {
            let bytes = block
                .get(at..at + 4)
                .and_then(|bytes| bytes.try_into().ok());
            bytes.map(u32::from_le_bytes).unwrap_or_default()
        };
        let (incompatible, read_only) = (number(96), number(100));
        let seed = match incompatible & 0x2000 {
            0 => raw_crc32c(!0, block.get(104..120).unwrap_or_default()),
            _ => number(624),
        };
        Ok(Self {
            block: 1024 << number(24).min(6),
            inode_size: u16::try_from(number(88) & 0xffff)?,
            kinds: incompatible & 2 != 0,
            seed: (read_only & 0x400 != 0).then_some(seed),
        })
    }

    /// Returns the size of a block in bytes.
    pub(super) fn block(&self) -> u64 {
        self.block
    }

    pub(super) fn inode_size(&self) -> u16 {
        self.inode_size
    }

    /// Changes entries of the directory `inode`, whose blocks are `blocks`: the entry of each name
    /// in `names` gets the inode number and the file type in `names`. Other entries stay as they
    /// are.
    pub(super) fn change(
        &self,
        image: &File,
        inode: u32,
        blocks: &[u64],
        names: &HashMap<&[u8], Entry>,
    ) -> Result<()> {
        let mut left = names.len();
        for &number in blocks {
            let mut block = vec![0; to_usize(self.block)];
            image.read_exact_at(&mut block, number * self.block)?;
            let sum = self.seed.map(|seed| checksum(seed, inode, &block));
            let stored = block.get(block.len() - 4..).unwrap_or_default();
            if sum.is_some_and(|sum| stored != sum.to_le_bytes()) {
                bail!("a block of the directory with inode {inode} has a wrong checksum");
            }
            let changed = self.change_block(&mut block, names)?;
            if changed == 0 {
                continue;
            }
            left = left.saturating_sub(changed);
            if let Some(seed) = self.seed {
                let sum = checksum(seed, inode, &block).to_le_bytes();
                let at = block.len() - sum.len();
                block.splice(at.., sum);
            }
            image.write_all_at(&block, number * self.block)?;
        }
        match left {
            0 => Ok(()),
            _ => bail!("{left} names are missing in the directory with inode {inode}"),
        }
    }

    /// Changes the entries in one block. Returns the number of changed entries.
    fn change_block(&self, block: &mut [u8], names: &HashMap<&[u8], Entry>) -> Result<usize> {
        let mut changed = 0;
        let mut rest = block;
        // Inode number, length of the entry, length of the name, file type, name.
        while let Some((&mut [_, _, _, _, len0, len1, name_len, _], _)) =
            rest.split_first_chunk_mut()
        {
            let len = match u16::from_le_bytes([len0, len1]) {
                // The entry fills a block of 64 KiB: 65536 does not fit in 16 bits.
                0 | u16::MAX => rest.len(),
                len => len.into(),
            };
            if len < 8 || len > rest.len() {
                bail!("a directory that mke2fs wrote is malformed");
            }
            let (entry, next) = rest.split_at_mut(len);
            let (head, name) = entry.split_at_mut(8);
            let name = name.get(..name_len.into()).unwrap_or_default();
            if let Some(wanted) = names.get(name) {
                let number = wanted.inode.to_le_bytes();
                let kind = self.kinds.then(|| wanted.kind());
                let places = head.iter_mut().zip(number);
                places.for_each(|(to, from)| *to = from);
                if let (Some(to), Some(kind)) = (head.last_mut(), kind) {
                    *to = kind;
                }
                changed += 1;
            }
            rest = next;
        }
        Ok(changed)
    }
}

/// Returns the checksum of a block of the directory `inode`. It covers the inode number, the
/// generation of the inode, which mke2fs sets to 0, and the block without its last entry.
fn checksum(seed: u32, inode: u32, block: &[u8]) -> u32 {
    let seed = raw_crc32c(seed, &inode.to_le_bytes());
    let seed = raw_crc32c(seed, &[0; 4]);
    let covered = block.len().saturating_sub(TAIL);
    raw_crc32c(seed, block.get(..covered).unwrap_or_default())
}

/// Returns the CRC-32C, without the usual inversion of the start value and of the result.
fn raw_crc32c(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}
