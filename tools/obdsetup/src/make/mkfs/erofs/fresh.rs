// SPDX-License-Identifier: GPL-2.0

//! A new erofs of the files of a tree, which is not stored as a whole: its inodes, and what is beside them, are in a
//! temporary file; directories are made, and files are read, when their blocks are read. So the content of files goes
//! from the files to the layer.
//!
//! The inodes, which are in front, have the fingerprints of the files: these are from the first reading of the files,
//! as the tree has them. The files of a directory are read again for their blocks. What is read then must be what the
//! fingerprint says; otherwise, the file was changed in between, and that is an error.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{bail, Context, Result};
use overlaybd::format::num::{to_u64, to_usize};
use overlaybd::format::SECTOR_SIZE;
use overlaybd::lsmt_writer::{Run, Runs};
use overlaybd::{coarsen, diff, is_zero, parallel};
use sha2::{Digest, Sha256};

use super::write::{
    blocks, check_end, layout, place_inode, stored_chunks, subdirectories, too_long, Plan, Planner,
    Relations, Summary, Writer, BLOCK, INODES_AT, WRITE,
};
use crate::make::mkfs::tree::{Content, Extent, Id, Kind, Opened, Tree, FILES_AT_ONCE, ROOT};
use crate::make::mkfs::witness::Witness;
use crate::make::mkfs::Stamp;
use crate::terminal::bar::Bar;
use crate::terminal::interrupt;

/// What the user can do if the file system becomes too large.
const FULL: &str = "use --fs btrfs";
/// Bytes that are read at once to look for zeros.
const LOOK: u64 = 1 << 20;

/// The file system.
pub(crate) struct Fresh {
    tree: Tree,
    plans: HashMap<Id, Plan>,
    parents: HashMap<Id, Id>,
    /// The first bytes of the disk, up to a whole block: superblock, inodes, and what is beside them.
    head: File,
    head_len: u64,
    /// The nodes with content in blocks, and the first byte of these. The first one follows the head, and each one
    /// the one before.
    in_blocks: Vec<(u64, Id)>,
    /// Size of the disk in bytes.
    size: u64,
}

impl Fresh {
    /// Makes the file system of `tree`. Its inodes go to a temporary file in `place`. If it is for DAX (`dax`), files
    /// have no data beside their inodes: such files cannot be mapped.
    pub(super) fn new(tree: Tree, stamp: &Stamp, dax: bool, place: &Path) -> Result<Self> {
        let names = tree.names();
        let mut order = vec![(ROOT, None)];
        let firsts = names.iter().filter(|name| name.first);
        order.extend(firsts.map(|name| (name.id, Some(name))));
        let Relations { links, parents } = Relations::of(&names);
        let mut planner = Planner::new(&tree, order.iter().map(|&(id, _)| id))?;
        planner.dax = dax;
        let mut plans: HashMap<Id, Plan> = HashMap::new();
        let mut end = INODES_AT;
        for &(id, name) in &order {
            let plan = planner.plan(id)?;
            let mut plan = plan.ok_or_else(|| too_long(&names, name, "use --fs squashfs"))?;
            plan.links = match tree.node(id)?.kind {
                Kind::Directory(_) => 2 + subdirectories(&tree, id)?,
                _ => links.get(&id).copied().unwrap_or(1),
            };
            plan.at = place_inode(end, &plan);
            end = plan.tail() + plan.beside();
            plans.insert(id, plan);
        }
        let mut next = end.div_ceil(BLOCK);
        check_end(next, FULL)?;
        let head_len = next * BLOCK;
        let mut in_blocks = Vec::new();
        for (id, _) in &order {
            let plan = plans.get_mut(id).context(LOST)?;
            let blocks = blocks(tree.node(*id)?, plan);
            plan.block = next;
            if blocks > 0 {
                in_blocks.push((next * BLOCK, *id));
            }
            next += blocks;
            check_end(next, FULL)?;
        }
        let head = tempfile::tempfile_in(place);
        let head = head.with_context(|| format!("{}: cannot make a file", place.display()))?;
        head.set_len(head_len).context(WRITE)?;
        let writer = Writer {
            tree: &tree,
            plans: &plans,
            parents: &parents,
            out: &head,
        };
        // No two inodes share a byte of the file, so they can be written in any order.
        let written = parallel::map(
            (1u32..).zip(&order),
            FILES_AT_ONCE,
            || (),
            |(), (number, &(id, _))| {
                interrupt::check()?;
                writer.head(id, number)
            },
        );
        written.collect::<Result<()>>()?;
        writer.superblock(&Summary {
            stamp: (stamp.uuid, stamp.time),
            inodes: to_u64(order.len()),
            blocks: next,
            chunks: writer.has_chunks(),
            prints: writer.has_prints(),
        })?;
        Ok(Self {
            tree,
            plans,
            parents,
            head,
            head_len,
            in_blocks,
            size: next * BLOCK,
        })
    }

    /// Returns the size of the disk in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    fn plan(&self, id: Id) -> Result<&Plan> {
        self.plans.get(&id).context(LOST)
    }

    /// Returns the content of a directory or symbolic link.
    fn bytes(&self, id: Id) -> Result<Vec<u8>> {
        match &self.tree.node(id)?.kind {
            Kind::Symlink(target) => Ok(target.clone()),
            _ => {
                let writer = Writer {
                    tree: &self.tree,
                    plans: &self.plans,
                    parents: &self.parents,
                    out: &self.head,
                };
                writer.directory(id)
            }
        }
    }

    /// Returns a hash of all that the bytes of the disk depend on: the head, the content of directories and links that
    /// have blocks, and the hash of each file that has.
    pub(crate) fn content(&self) -> Result<[u8; 32]> {
        let mut hash = Sha256::new();
        self.read_head(|piece, _| hash.update(piece))?;
        for &(_, id) in &self.in_blocks {
            interrupt::check()?;
            match &self.tree.node(id)?.kind {
                Kind::File(content) => content.identify(&mut hash),
                _ => {
                    let bytes = self.bytes(id)?;
                    hash.update(to_u64(bytes.len()).to_le_bytes());
                    hash.update(bytes);
                }
            }
        }
        Ok(hash.finalize().into())
    }

    /// Passes the bytes of the head to `each`, with their offset.
    fn read_head(&self, mut each: impl FnMut(&[u8], u64)) -> Result<()> {
        let mut buffer = vec![0; to_usize(LOOK.min(self.head_len))];
        let mut at = 0;
        while at < self.head_len {
            let len = to_usize((self.head_len - at).min(LOOK));
            let piece = buffer.get_mut(..len).unwrap_or_default();
            self.head.read_exact_at(piece, at).context(READ)?;
            each(piece, at);
            interrupt::check()?;
            at += to_u64(len);
        }
        Ok(())
    }

    /// Returns the runs of sectors that a layer of the disk has, ascending, and joined where they are adjacent.
    pub(crate) fn runs(&self, options: diff::Options) -> Result<Vec<Run>> {
        let mut runs = Runs::default();
        let mut push = |start: u64, end: u64| {
            runs.push(start / SECTOR_SIZE, (end - start) / SECTOR_SIZE, false);
        };
        self.read_head(|piece, at| {
            for (block, at) in piece.chunks(to_usize(BLOCK)).zip((at..).step_by(4096)) {
                if !(options.skip_zeros && is_zero(block)) {
                    push(at, at + BLOCK);
                }
            }
        })?;
        for &(start, id) in &self.in_blocks {
            let plan = self.plan(id)?;
            let node = self.tree.node(id)?;
            match &node.kind {
                // DAX can map each block that a file has: also one of zeros, in a chunk with data.
                Kind::File(_) if options.keep_zeros => {
                    push(start, start + blocks(node, plan) * BLOCK);
                }
                Kind::File(content) => {
                    for part in parts(plan, content)? {
                        let end = (part.at + part.len).next_multiple_of(BLOCK);
                        push(start + part.at, start + end);
                    }
                }
                _ => push(start, start + plan.in_blocks().next_multiple_of(BLOCK)),
            }
        }
        let runs = runs.into_vec();
        match options.granule < BLOCK {
            true => self.without_zeros(&runs, options.granule),
            false => {
                let unit = options.granule / SECTOR_SIZE;
                Ok(coarsen::units(&runs, unit, self.size / SECTOR_SIZE))
            }
        }
    }

    /// Returns `runs` without zeros in units of `granule` bytes. Reads all of them.
    ///
    /// Whether [`diff::Options::skip_zeros`] is set does not matter: only layers for DAX have zeros as data, and these
    /// have no units smaller than a block.
    fn without_zeros(&self, runs: &[Run], granule: u64) -> Result<Vec<Run>> {
        let mut reader = self.reader();
        let mut buffer = vec![0; to_usize(LOOK)];
        let mut found = Runs::default();
        let sectors: u64 = runs.iter().map(|run| run.length).sum();
        let bar = Bar::new("comparing", sectors * SECTOR_SIZE);
        for run in runs {
            let (mut at, end) = (run.offset * SECTOR_SIZE, run.end() * SECTOR_SIZE);
            while at < end {
                let piece = to_usize((end - at).min(LOOK));
                let piece = buffer.get_mut(..piece).unwrap_or_default();
                reader.read(at, piece)?;
                for (unit, at) in piece
                    .chunks(to_usize(granule))
                    .zip((at..).step_by(to_usize(granule)))
                {
                    if !is_zero(unit) {
                        found.push(at / SECTOR_SIZE, granule / SECTOR_SIZE, false);
                    }
                }
                at += to_u64(piece.len());
                // This also looks for a signal.
                bar.advance(to_u64(piece.len()))?;
            }
        }
        reader.finish()?;
        Ok(found.into_vec())
    }

    /// Returns a reader of the disk.
    pub(crate) fn reader(&self) -> Reader<'_> {
        Reader {
            disk: self,
            current: None,
        }
    }
}

const READ: &str = "cannot read the temporary file";
/// A bug.
const LOST: &str = "a file without a place";

/// A part of the data of a file: where it is in the file's blocks, and in which extent.
struct Part {
    /// Offset in the blocks of the file.
    at: u64,
    extent: Extent,
    /// Offset in the extent.
    skip: u64,
    len: u64,
}

impl Part {
    fn advance(&mut self, len: u64) {
        self.at += len;
        self.skip += len;
        self.len -= len;
    }
}

/// Returns where the data of a file is in its blocks, ascending.
fn parts(plan: &Plan, content: &Content) -> Result<VecDeque<Part>> {
    let chunks = match plan.layout {
        layout::CHUNKS => Some(stored_chunks(content, plan)),
        _ => None,
    };
    let mut parts: VecDeque<Part> = VecDeque::new();
    for &extent in &content.extents {
        let mut skip = 0;
        while skip < extent.len {
            let offset = extent.offset + skip;
            let (at, room) = match &chunks {
                Some(chunks) => {
                    let inside = offset % plan.chunk();
                    let chunk = chunks.get(&(offset / plan.chunk()));
                    let (at, _) = chunk.context(LOST)?;
                    (at * BLOCK + inside, plan.chunk() - inside)
                }
                None => (offset, plan.in_blocks().saturating_sub(offset)),
            };
            let len = room.min(extent.len - skip);
            if len == 0 {
                // The rest is beside the inode.
                break;
            }
            match parts.back_mut() {
                Some(last) if last.extent == extent && last.at + last.len == at => last.len += len,
                _ => parts.push_back(Part {
                    at,
                    extent,
                    skip,
                    len,
                }),
            }
            skip += len;
        }
    }
    Ok(parts)
}

/// Reads the disk from its start to its end. What it need not read is zeros: what is in none of [`Fresh::runs`].
pub(crate) struct Reader<'a> {
    disk: &'a Fresh,
    /// The node that was read last, by its index in [`Fresh::in_blocks`].
    current: Option<(usize, Current<'a>)>,
}

/// The content of the node that was read last.
enum Current<'a> {
    /// A directory or symbolic link.
    Bytes(Vec<u8>),
    File(Box<Reading<'a>>),
}

impl Reader<'_> {
    /// Fills `buf` with the bytes of the disk from byte `at` on, which is not before the end of what was read last.
    ///
    /// # Errors
    ///
    /// If a file cannot be read, or was changed since it was read for the tree. A change is found when the file is
    /// opened, or when its last data was read.
    pub(crate) fn read(&mut self, mut at: u64, mut buf: &mut [u8]) -> Result<()> {
        let disk = self.disk;
        while !buf.is_empty() {
            let (start, end, nth) = match at < disk.head_len {
                true => (0, disk.head_len, None),
                false => {
                    let after = disk.in_blocks.partition_point(|&(start, _)| start <= at);
                    let nth = after.checked_sub(1).context(LOST)?;
                    let &(start, _) = disk.in_blocks.get(nth).context(LOST)?;
                    let next = disk.in_blocks.get(after);
                    (start, next.map_or(disk.size, |&(next, _)| next), Some(nth))
                }
            };
            let len = end.saturating_sub(at).min(to_u64(buf.len()));
            if len == 0 {
                bail!(LOST);
            }
            let (now, rest) = buf.split_at_mut(to_usize(len));
            match nth {
                None => disk.head.read_exact_at(now, at).context(READ)?,
                Some(nth) => self.node(nth, at - start, now)?,
            }
            at += len;
            buf = rest;
        }
        Ok(())
    }

    /// Fills `buf` with the bytes of a node's blocks from byte `offset` of them on.
    fn node(&mut self, nth: usize, offset: u64, buf: &mut [u8]) -> Result<()> {
        let is_current = |(current, _): &(usize, _)| *current == nth;
        if !self.current.as_ref().is_some_and(is_current) {
            self.finish()?;
            let &(_, id) = self.disk.in_blocks.get(nth).context(LOST)?;
            let next = match &self.disk.tree.node(id)?.kind {
                Kind::File(content) => {
                    let reading = Reading::new(self.disk, self.disk.plan(id)?, content)?;
                    Current::File(Box::new(reading))
                }
                _ => Current::Bytes(self.disk.bytes(id)?),
            };
            self.current = Some((nth, next));
        }
        match &mut self.current {
            Some((_, Current::File(reading))) => reading.read(offset, buf),
            Some((_, Current::Bytes(bytes))) => {
                let there = bytes.get(to_usize(offset)..).unwrap_or_default();
                let (now, after) = buf.split_at_mut(there.len().min(buf.len()));
                now.copy_from_slice(there.get(..now.len()).unwrap_or_default());
                after.fill(0);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Ends the reading of the last file: to be called at the end of the disk, too.
    ///
    /// # Errors
    ///
    /// If the file was changed, as [`Self::read`].
    pub(crate) fn finish(&mut self) -> Result<()> {
        match self.current.take() {
            Some((_, Current::File(mut reading))) => {
                reading.skip(u64::MAX);
                reading.check()
            }
            _ => Ok(()),
        }
    }
}

/// A file that is being read.
struct Reading<'a> {
    disk: &'a Fresh,
    plan: &'a Plan,
    content: &'a Content,
    opened: Opened,
    /// The parts still to be read.
    parts: VecDeque<Part>,
    /// The hash of what was read; `None` if nobody else can change the content, and after the check.
    again: Option<Witness>,
}

impl<'a> Reading<'a> {
    fn new(disk: &'a Fresh, plan: &'a Plan, content: &'a Content) -> Result<Self> {
        Ok(Self {
            disk,
            plan,
            content,
            opened: content.open()?,
            parts: parts(plan, content)?,
            again: content.witness()?,
        })
    }

    /// Fills `buf` with the bytes of the file's blocks from byte `offset` of them on.
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.skip(offset);
        let mut rest = buf;
        let mut at = offset;
        while let Some(part) = self.parts.front_mut() {
            let gap = part.at - at;
            if gap >= to_u64(rest.len()) {
                break;
            }
            let (zeros, after) = rest.split_at_mut(to_usize(gap));
            zeros.fill(0);
            let len = part.len.min(to_u64(after.len()));
            let (data, after) = after.split_at_mut(to_usize(len));
            self.opened.fill(&part.extent, part.skip, data)?;
            if let Some(again) = &mut self.again {
                again.add(data);
            }
            part.advance(len);
            at += gap + len;
            rest = after;
            if part.len == 0 {
                self.parts.pop_front();
            }
        }
        rest.fill(0);
        match self.parts.is_empty() {
            true => self.check(),
            false => Ok(()),
        }
    }

    /// Leaves out the bytes up to `offset`, which the layer has as zeros.
    fn skip(&mut self, offset: u64) {
        while let Some(part) = self.parts.front_mut().filter(|part| part.at < offset) {
            let len = part.len.min(offset - part.at).min(LOOK);
            if let Some(again) = &mut self.again {
                again.add(&vec![0; to_usize(len)]);
            }
            part.advance(len);
            if part.len == 0 {
                self.parts.pop_front();
            }
        }
    }

    /// Checks, once, that what was read is what is in the tree.
    fn check(&mut self) -> Result<()> {
        let Some(mut again) = self.again.take() else {
            return Ok(());
        };
        // The end of the file, beside the inode, was read for the head.
        let mut beside = vec![0; to_usize(self.content.size - self.plan.in_blocks())];
        if !beside.is_empty() {
            let read = self.disk.head.read_exact_at(&mut beside, self.plan.tail());
            read.context(READ)?;
            again.add(&beside);
        }
        self.content.check(Some(again))
    }
}
