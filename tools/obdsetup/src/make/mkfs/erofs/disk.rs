// SPDX-License-Identifier: GPL-2.0

//! A disk that can be changed: written blocks go to a file, the others are read from the layers
//! below.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use overlaybd::format::num::{to_u64, to_usize};
use overlaybd::format::{Blob, SECTOR_SIZE};
use overlaybd::lsmt_writer::Run;
use overlaybd::Stack;

use super::write::{Out, BLOCK, WRITE};

/// Number of bytes read at once from the layers below: inodes are close together, and layers may be
/// compressed in blocks of this size.
const WINDOW: u64 = 64 << 10;
/// Number of windows that are cached.
const WINDOWS: usize = 64;

/// The disk.
pub(super) struct Disk {
    below: Option<Stack>,
    /// Number of blocks in the layers below.
    blocks: u64,
    /// The written blocks, at their offsets.
    file: File,
    written: RefCell<Blocks>,
    /// Cached windows of the layers below, by their offsets.
    windows: RefCell<HashMap<u64, Vec<u8>>>,
}

impl Disk {
    /// Returns the disk of the layers `below`, or an empty one. `file` must be empty, and gets
    /// written blocks.
    pub(super) fn new(below: Option<Stack>, file: File) -> Self {
        let blocks = below
            .as_ref()
            .map_or(0, |stack| stack.size().div_ceil(BLOCK));
        Self {
            below,
            blocks,
            file,
            written: RefCell::default(),
            windows: RefCell::default(),
        }
    }

    /// Returns the number of blocks in the layers below.
    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Returns the sum of the sizes of the layers' files, in bytes.
    pub(super) fn stored(&self) -> u64 {
        let layers = self.below.iter().flat_map(Stack::layers);
        layers.map(|layer| layer.payload().file().size()).sum()
    }

    /// Returns the file with the written blocks, and the written sectors, ascending and disjoint.
    pub(super) fn into_written(self) -> (File, Vec<Run>) {
        let written = self.written.into_inner();
        let sectors = BLOCK / SECTOR_SIZE;
        let runs = written.0.into_iter().map(|(start, end)| Run {
            offset: start * sectors,
            length: (end - start) * sectors,
            zeroed: false,
        });
        (self.file, runs.collect())
    }

    /// Fills `bytes` with the bytes of the disk from `at` on, which must be within one block.
    fn read_in_block(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        if self.written.borrow().contains(at / BLOCK) {
            // If the file ends within the block, the rest of the block is zeros.
            let mut done = 0;
            while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
                match self.file.read_at(rest, at + to_u64(done)).context(WRITE)? {
                    0 => {
                        rest.fill(0);
                        break;
                    }
                    read => done += read,
                }
            }
            return Ok(());
        }
        let mut windows = self.windows.borrow_mut();
        let start = at - at % WINDOW;
        if !windows.contains_key(&start) {
            if windows.len() >= WINDOWS {
                windows.clear();
            }
            windows.insert(start, self.read_below(start)?);
        }
        let window = windows.get(&start).map(Vec::as_slice).unwrap_or_default();
        let from = window.get(to_usize(at - start)..).unwrap_or_default();
        // A window has whole blocks, so it has all of the bytes.
        for (to, from) in bytes.iter_mut().zip(from) {
            *to = *from;
        }
        Ok(())
    }

    /// Reads the window at byte `start` of the layers below, with zeros after their end.
    fn read_below(&self, start: u64) -> Result<Vec<u8>> {
        let mut window = vec![0; to_usize(WINDOW)];
        if let Some(below) = &self.below {
            let inside = to_usize(below.size().saturating_sub(start)).min(window.len());
            let bytes = window.get_mut(..inside).unwrap_or_default();
            if !bytes.is_empty() {
                below.read_at(start, bytes)?;
            }
        }
        Ok(window)
    }

    /// Writes a part of a block of the layers below, if it differs; the rest of the block stays as it is.
    fn write_in_block(&self, bytes: &[u8], at: u64) -> Result<()> {
        let mut old = vec![0; bytes.len()];
        self.read_in_block(&mut old, at)?;
        if old == bytes {
            return Ok(());
        }
        let block = at / BLOCK;
        if !self.written.borrow().contains(block) {
            let mut whole = vec![0; to_usize(BLOCK)];
            self.read_in_block(&mut whole, block * BLOCK)?;
            self.file
                .write_all_at(&whole, block * BLOCK)
                .context(WRITE)?;
            self.written.borrow_mut().insert(block, block + 1);
        }
        self.file.write_all_at(bytes, at).context(WRITE)
    }
}

impl Out for Disk {
    /// Writes the bytes. A block of the layers below counts as written only if they change it.
    fn write(&self, mut bytes: &[u8], mut at: u64) -> Result<()> {
        while !bytes.is_empty() && at / BLOCK < self.blocks {
            let room = to_usize(BLOCK - at % BLOCK).min(bytes.len());
            let (now, rest) = bytes.split_at(room);
            self.write_in_block(now, at)?;
            bytes = rest;
            at += to_u64(room);
        }
        if bytes.is_empty() {
            return Ok(());
        }
        self.file.write_all_at(bytes, at).context(WRITE)?;
        let end = (at + to_u64(bytes.len())).div_ceil(BLOCK);
        self.written.borrow_mut().insert(at / BLOCK, end);
        Ok(())
    }

    fn read(&self, mut bytes: &mut [u8], mut at: u64) -> Result<()> {
        while !bytes.is_empty() {
            let room = to_usize(BLOCK - at % BLOCK).min(bytes.len());
            let (now, rest) = bytes.split_at_mut(room);
            self.read_in_block(now, at)?;
            bytes = rest;
            at += to_u64(room);
        }
        Ok(())
    }
}

/// Ranges of block numbers: the first block of each range, and the block after its last one. The ranges are
/// disjoint, and not adjacent.
#[derive(Debug, Default)]
struct Blocks(BTreeMap<u64, u64>);

impl Blocks {
    fn contains(&self, block: u64) -> bool {
        let before = self.0.range(..=block).next_back();
        before.is_some_and(|(_, &end)| block < end)
    }

    /// Adds the blocks from `start` up to, not including, `end`.
    fn insert(&mut self, mut start: u64, mut end: u64) {
        if let Some((&before, &before_end)) = self.0.range(..=start).next_back() {
            if before_end >= end {
                return;
            }
            if before_end >= start {
                start = before;
            }
        }
        while let Some((&next, &next_end)) = self.0.range(start..=end).next() {
            end = end.max(next_end);
            self.0.remove(&next);
        }
        self.0.insert(start, end);
    }
}

#[cfg(test)]
mod tests {
    use super::{Blocks, Disk};
    use crate::make::mkfs::erofs::write::Out;

    #[test]
    fn blocks_are_joined() {
        let mut blocks = Blocks::default();
        for (start, end) in [(4, 6), (8, 9), (6, 8), (1, 2), (4, 5), (0, 20), (19, 21)] {
            blocks.insert(start, end);
            assert!(blocks.contains(start) && blocks.contains(end - 1));
        }
        assert_eq!(blocks.0.into_iter().collect::<Vec<_>>(), [(0, 21)]);
        let mut blocks = Blocks::default();
        blocks.insert(2, 3);
        blocks.insert(5, 6);
        assert!(!blocks.contains(3) && !blocks.contains(4) && !blocks.contains(6));
        assert_eq!(blocks.0.len(), 2);
    }

    #[test]
    fn what_is_written_is_read() -> anyhow::Result<()> {
        let disk = Disk::new(None, tempfile::tempfile()?);
        disk.write(b"abc", 4094)?;
        disk.write(b"x", 9000)?;
        let mut bytes = [1; 8];
        disk.read(&mut bytes, 4092)?;
        assert_eq!(&bytes, b"\0\0abc\0\0\0");
        let mut bytes = [1; 3];
        disk.read(&mut bytes, 8999)?;
        assert_eq!(&bytes, b"\0x\0");
        let (_, runs) = disk.into_written();
        let runs: Vec<_> = runs.iter().map(|run| (run.offset, run.length)).collect();
        assert_eq!(runs, [(0, 24)]);
        Ok(())
    }
}
