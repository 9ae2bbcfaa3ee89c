// SPDX-License-Identifier: GPL-2.0

//! The format of an erofs without compression: the superblock, all inodes with small data beside them,
//! then blocks of data. A block has 4 KiB; all inodes have the extended form.
//!
//! Files have fingerprints of their content, as mkfs.erofs makes them with `--xattr-inode-digest`:
//! with the mount option `inode_share`, images share the page cache of files with the same
//! fingerprint. A fingerprint is an extended attribute with a prefix that Linux doesn't show, so
//! users don't see it. Kernels without support for the feature can read the file system.
//!
//! Source: Linux, `fs/erofs/erofs_fs.h` and `Documentation/filesystems/erofs.rst`.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use overlaybd::format::num::{to_u64, to_usize};
use uuid::Uuid;

use crate::make::mkfs::tree::{show, Content, Id, Kind, Name, Names, Node, Tree, ROOT};
use crate::terminal::bar::Bar;
use crate::terminal::exit::Failure;

pub(super) const BLOCK: u64 = 4096;
/// Offset and length of the superblock.
pub(super) const SUPERBLOCK: (u64, u64) = (1024, 128);
/// The unit of inode numbers, in bytes.
pub(super) const SLOT: u64 = 32;
/// Length of an inode in bytes.
pub(super) const INODE: u64 = 64;
/// Largest number of bytes after the last whole block of a file, directory or link that are stored beside its
/// inode.
const INLINE: u64 = 2048;
/// Largest number of chunks in a file with holes.
const CHUNKS: u64 = 1 << 16;
/// log2 of the number of blocks in the largest chunk: the field has five bits. So the largest files have
/// more than [`CHUNKS`] chunks.
const CHUNK_BITS: u16 = 31;
/// The address of a chunk that is a hole.
const HOLE: u32 = u32::MAX;
/// Length of the header of extended attributes in bytes.
pub(super) const XATTR_HEADER: usize = 12;
/// The table of attribute prefixes, which has one prefix: the length of the rest in 16 bits; 0, because it
/// does not start with a known prefix; its text.
pub(super) const PREFIXES: [u8; 5] = [3, 0, 0, b'f', b'p'];
/// Offset of the table of attribute prefixes in bytes, if there is one.
pub(super) const PREFIXES_AT: u64 = SUPERBLOCK.0 + SUPERBLOCK.1;
/// First offset for inodes: after the table.
pub(super) const INODES_AT: u64 = PREFIXES_AT + 5;
/// The superblock's fields about the table, at byte 91: number of prefixes, and offset of the table in units
/// of 4 bytes. The next field stays 0: fingerprints have the first prefix.
pub(super) const PREFIXES_SAID: (usize, [u8; 5]) = {
    let [a, b, c, d, ..] = (PREFIXES_AT / 4).to_le_bytes();
    (91, [1, a, b, c, d])
};
/// Prefix number of an extended attribute whose whole name is the first prefix.
const FIRST_PREFIX: u8 = 0x80;
/// Start of a fingerprint; the SHA-256 of the content follows.
const DIGEST: &[u8] = b"sha256:";
const DIGEST_LEN: usize = 32;
/// Largest number of bytes of holes that are hashed for fingerprints, in addition to as many as the tree has
/// bytes of data. A small tar can have any number of bytes in holes.
const HASHED_HOLES: u64 = 1 << 30;
pub(super) const WRITE: &str = "cannot write the file system";

/// The magic number of the superblock.
pub(super) const MAGIC: u32 = 0xe0f5_e1e2;
/// Features that a reader need not support: a checksum, and times of modification.
pub(super) const COMPATIBLE: u32 = 3;
/// Further features that a reader need not support: fingerprints, and a table of prefixes with its own offset.
pub(super) const PRINTS: u32 = 0x30;
/// The feature that files may be in chunks, which a reader must support.
pub(super) const CHUNKED_FILES: u32 = 4;
/// Prefixes of extended attributes, and their numbers.
pub(super) const KINDS: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// Layouts of data: all in blocks, the end beside the inode, or in chunks that may be holes.
pub(super) mod layout {
    pub(in super::super) const PLAIN: u16 = 0;
    pub(in super::super) const INLINE: u16 = 2;
    pub(in super::super) const CHUNKS: u16 = 4;
}

/// The file or disk that a file system is written to.
pub(super) trait Out {
    /// Writes `bytes` at byte `at`.
    fn write(&self, bytes: &[u8], at: u64) -> Result<()>;
    /// Fills `bytes` from byte `at`.
    fn read(&self, bytes: &mut [u8], at: u64) -> Result<()>;
}

impl Out for File {
    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.write_all_at(bytes, at).context(WRITE)
    }

    fn read(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        Ok(self.read_exact_at(bytes, at)?)
    }
}

/// The form of a node in the file system, and its place, which is set after the form.
pub(super) struct Plan {
    /// Size of the content in bytes.
    pub(super) size: u64,
    pub(super) layout: u16,
    /// log2 of the number of blocks in a chunk.
    chunk_bits: u16,
    pub(super) xattrs: Vec<u8>,
    /// Offset in `xattrs` for the SHA-256 of the content.
    digest: Option<usize>,
    /// Offset of the inode.
    pub(super) at: u64,
    /// The first block of data.
    pub(super) block: u64,
    pub(super) links: u32,
}

impl Plan {
    /// Returns the plan of a node whose inode is at `at` already and isn't written again, except for its link
    /// count.
    pub(super) fn in_place(at: u64, links: u32) -> Self {
        Self {
            size: 0,
            layout: layout::PLAIN,
            chunk_bits: 0,
            xattrs: Vec::new(),
            digest: None,
            at,
            block: 0,
            links,
        }
    }

    /// Returns the number of bytes after inode and extended attributes.
    pub(super) fn beside(&self) -> u64 {
        match self.layout {
            layout::INLINE => self.size % BLOCK,
            layout::CHUNKS => self.chunks() * 4,
            _ => 0,
        }
    }

    /// Returns the size of a chunk in bytes.
    pub(super) fn chunk(&self) -> u64 {
        BLOCK << self.chunk_bits
    }

    /// Returns the number of chunks in the file.
    fn chunks(&self) -> u64 {
        self.size.div_ceil(self.chunk())
    }

    /// Returns the number of bytes of the content that are in blocks, without those beside the inode. For a file in
    /// chunks, and for one that is only in blocks, all are.
    pub(super) fn in_blocks(&self) -> u64 {
        match self.layout {
            layout::INLINE => self.size - self.size % BLOCK,
            _ => self.size,
        }
    }

    /// Returns the offset after inode and extended attributes.
    pub(super) fn tail(&self) -> u64 {
        self.at + INODE + to_u64(self.xattrs.len())
    }
}

/// The values in the superblock.
pub(super) struct Summary {
    /// UUID and time of creation.
    pub(super) stamp: (Uuid, u32),
    pub(super) inodes: u64,
    pub(super) blocks: u64,
    /// Whether any file is in chunks.
    pub(super) chunks: bool,
    /// Whether any file has a fingerprint.
    pub(super) prints: bool,
}

/// The number of names of each node, and the directory that it is in, that of the last name if it has several.
pub(super) struct Relations {
    pub(super) links: HashMap<Id, u32>,
    pub(super) parents: HashMap<Id, Id>,
}

impl Relations {
    pub(super) fn of(names: &[Name]) -> Self {
        let mut links: HashMap<Id, u32> = HashMap::new();
        let mut parents: HashMap<Id, Id> = HashMap::from([(ROOT, ROOT)]);
        for name in names {
            *links.entry(name.id).or_default() += 1;
            parents.insert(name.id, name.parent);
        }
        Self { links, parents }
    }
}

/// Checks that a file system can have `blocks`. `instead` is what the user can do if it cannot.
pub(super) fn check_end(blocks: u64, instead: &str) -> Result<()> {
    match u32::try_from(blocks) {
        Ok(blocks) if blocks < HOLE => Ok(()),
        _ => Err(Failure::usage(format!(
            "erofs cannot hold more than 16 TiB: {instead}"
        ))),
    }
}

/// Returns the number of directories in the directory `id`.
pub(super) fn subdirectories(tree: &Tree, id: Id) -> Result<u32> {
    let mut count = 0;
    for (_, child) in tree.children(id) {
        count += u32::from(matches!(tree.node(child)?.kind, Kind::Directory(_)));
    }
    Ok(count)
}

/// Plans one node after the other.
pub(super) struct Planner<'a> {
    tree: &'a Tree,
    /// Bytes of holes that may still be hashed.
    holes: u64,
    /// Whether files must not have data beside their inodes.
    pub(super) dax: bool,
}

impl<'a> Planner<'a> {
    /// Returns a planner for the nodes `all` of a tree. The data of files that are in the file system already
    /// doesn't count for [`HASHED_HOLES`].
    pub(super) fn new(tree: &'a Tree, all: impl Iterator<Item = Id>) -> Result<Self> {
        let mut holes = HASHED_HOLES;
        for id in all {
            if let Kind::File(content) = &tree.node(id)?.kind {
                holes = holes.saturating_add(content.data_len());
            }
        }
        Ok(Self {
            tree,
            holes,
            dax: false,
        })
    }

    /// Returns whether so many bytes of holes may be hashed. If so, fewer are left for other files.
    fn takes(&mut self, holes: u64) -> bool {
        let left = self.holes.checked_sub(holes);
        self.holes = left.unwrap_or(self.holes);
        left.is_some()
    }

    /// Plans a node; returns `None` if erofs cannot store its extended attributes ([`xattrs`]). The order of
    /// the calls decides which files get fingerprints if there are too many holes to hash.
    pub(super) fn plan(&mut self, id: Id) -> Result<Option<Plan>> {
        let node = self.tree.node(id)?;
        let with_digest = match &node.kind {
            Kind::File(content) => {
                content.size > 0 && self.takes(content.size - content.data_len())
            }
            _ => false,
        };
        plan(self.tree, id, with_digest, self.dax)
    }
}

fn plan(tree: &Tree, id: Id, with_digest: bool, dax: bool) -> Result<Option<Plan>> {
    let node = tree.node(id)?;
    let size = match &node.kind {
        Kind::Directory(_) => directory_size(&entries(tree, id, ROOT)),
        Kind::Symlink(target) => to_u64(target.len()),
        Kind::File(content) => content.size,
        _ => 0,
    };
    let mut chunk_bits = 0;
    let layout = match &node.kind {
        Kind::File(content) if has_holes(content) => {
            while chunk_bits < CHUNK_BITS && size.div_ceil(BLOCK << chunk_bits) > CHUNKS {
                chunk_bits += 1;
            }
            layout::CHUNKS
        }
        Kind::File(_) if dax => layout::PLAIN,
        _ if (1..=INLINE).contains(&(size % BLOCK)) => layout::INLINE,
        _ => layout::PLAIN,
    };
    let xattrs = xattrs(&node.meta.xattrs, with_digest)?;
    Ok(xattrs.map(|(xattrs, digest)| Plan {
        size,
        layout,
        chunk_bits,
        xattrs,
        digest,
        at: 0,
        block: 0,
        links: 0,
    }))
}

fn has_holes(content: &Content) -> bool {
    content.data_len() < content.size
}

/// Returns the first possible offset for an inode at or after `end`.
pub(super) fn place_inode(end: u64, plan: &Plan) -> u64 {
    let mut at = end.next_multiple_of(SLOT);
    while !can_be_at(at, plan) {
        at += SLOT;
    }
    at
}

/// Returns whether an inode can be at `at`: neither the inode nor the end of the content beside it may
/// cross the end of a block. Extended attributes and maps of chunks may.
pub(super) fn can_be_at(at: u64, plan: &Plan) -> bool {
    let crosses = |start: u64, len: u64| start % BLOCK + len > BLOCK;
    let tail = at + INODE + to_u64(plan.xattrs.len());
    let inline = plan.layout == layout::INLINE;
    !(crosses(at, INODE) || inline && crosses(tail, plan.beside()))
}

/// Returns the number of blocks of a node's data.
pub(super) fn blocks(node: &Node, plan: &Plan) -> u64 {
    match (plan.layout, &node.kind) {
        (layout::INLINE, _) => plan.size / BLOCK,
        (layout::CHUNKS, Kind::File(content)) => {
            let chunks = stored_chunks(content, plan);
            chunks.values().map(|&(_, blocks)| blocks).sum()
        }
        _ => plan.size.div_ceil(BLOCK),
    }
}

/// Returns the chunks of a file that have data, by their numbers: the first block of a chunk, counted from
/// the file's first block, and its number of blocks.
pub(super) fn stored_chunks(content: &Content, plan: &Plan) -> BTreeMap<u64, (u64, u64)> {
    let mut chunks = BTreeMap::new();
    let mut next = 0;
    for extent in &content.extents {
        let first = extent.offset / plan.chunk();
        let last = (extent.offset + extent.len - 1) / plan.chunk();
        for nth in first..=last {
            let len = (content.size - nth * plan.chunk()).min(plan.chunk());
            chunks.entry(nth).or_insert_with(|| {
                let at = next;
                next += len.div_ceil(BLOCK);
                (at, len.div_ceil(BLOCK))
            });
        }
    }
    chunks
}

/// Returns the extended attributes of an inode as bytes, and the offset in them for the digest of the content;
/// `None` if the name or value of one of them, or all of them together, are longer than erofs can store. If the
/// digest does not fit, leaves it out.
fn xattrs(
    all: &BTreeMap<Vec<u8>, Vec<u8>>,
    with_digest: bool,
) -> Result<Option<(Vec<u8>, Option<usize>)>> {
    if all.is_empty() && !with_digest {
        return Ok(Some((Vec::new(), None)));
    }
    let mut bytes = vec![0; XATTR_HEADER];
    let mut digest = None;
    if with_digest {
        bytes.extend([0, FIRST_PREFIX]);
        bytes.extend(u16::try_from(DIGEST.len() + DIGEST_LEN)?.to_le_bytes());
        bytes.extend_from_slice(DIGEST);
        digest = Some(bytes.len());
        bytes.resize((bytes.len() + DIGEST_LEN).next_multiple_of(4), 0);
    }
    for (name, value) in all {
        let prefix = KINDS.iter().find(|(prefix, _)| name.starts_with(prefix));
        let &(prefix, index) = prefix.context("an extended attribute of an unknown kind")?;
        let rest = name.get(prefix.len()..).unwrap_or_default();
        let (Ok(name_len), Ok(value_len)) = (u8::try_from(rest.len()), u16::try_from(value.len()))
        else {
            return Ok(None);
        };
        bytes.extend([name_len, index]);
        bytes.extend(value_len.to_le_bytes());
        bytes.extend_from_slice(rest);
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    match xattr_count(bytes.len()) {
        Some(_) => Ok(Some((bytes, digest))),
        // Without the digest, the extended attributes may fit.
        None if with_digest => xattrs(all, false),
        None => Ok(None),
    }
}

/// Returns the error for a file whose extended attributes erofs cannot store ([`xattrs`]); for the root directory,
/// `name` is `None`. The error ends with `instead`, which tells the user what to do.
pub(super) fn too_long(names: &Names, name: Option<&Name>, instead: &str) -> anyhow::Error {
    let path = show(&name.map(|name| names.path(name)).unwrap_or_default());
    Failure::usage(format!(
        "{path}: more extended attributes than erofs can hold: {instead}"
    ))
}

/// Returns the length of extended attributes as an inode has it; `None` if they are too long.
fn xattr_count(len: usize) -> Option<u16> {
    match len.checked_sub(XATTR_HEADER) {
        None => Some(0),
        Some(rest) => u16::try_from(rest / 4 + 1).ok(),
    }
}

/// A name in a directory, and its node.
type DirEntry<'a> = (&'a [u8], Id);

/// Returns the names and nodes of a directory, with `.` and `..`, sorted.
fn entries(tree: &Tree, id: Id, parent: Id) -> Vec<DirEntry<'_>> {
    let dots = [(b".".as_slice(), id), (b"..".as_slice(), parent)];
    let mut entries: Vec<_> = tree.children(id).chain(dots).collect();
    entries.sort_unstable();
    entries
}

/// Returns the entries of each block, and the length of each in bytes.
fn directory_blocks<'a>(entries: &'a [DirEntry<'a>]) -> Vec<(&'a [DirEntry<'a>], u64)> {
    let mut blocks = Vec::new();
    let (mut start, mut used) = (0, 0);
    for (nth, (name, _)) in entries.iter().enumerate() {
        let needed = 12 + to_u64(name.len());
        if used + needed > BLOCK {
            blocks.push((entries.get(start..nth).unwrap_or_default(), used));
            (start, used) = (nth, 0);
        }
        used += needed;
    }
    blocks.push((entries.get(start..).unwrap_or_default(), used));
    blocks
}

fn directory_size(entries: &[(&[u8], Id)]) -> u64 {
    let blocks = directory_blocks(entries);
    let last = blocks.last().map_or(0, |&(_, used)| used);
    to_u64(blocks.len().saturating_sub(1)) * BLOCK + last
}

/// Writes to `O`.
pub(super) struct Writer<'a, O> {
    pub(super) tree: &'a Tree,
    pub(super) plans: &'a HashMap<Id, Plan>,
    pub(super) parents: &'a HashMap<Id, Id>,
    pub(super) out: &'a O,
}

impl<O: Out> Writer<'_, O> {
    fn plan(&self, id: Id) -> Result<&Plan> {
        self.plans.get(&id).context("a file without a place")
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.out.write(bytes, at)
    }

    /// Returns whether any file is in chunks.
    pub(super) fn has_chunks(&self) -> bool {
        let mut plans = self.plans.values();
        plans.any(|plan| plan.layout == layout::CHUNKS)
    }

    /// Returns whether any file has a fingerprint.
    pub(super) fn has_prints(&self) -> bool {
        self.plans.values().any(|plan| plan.digest.is_some())
    }

    /// Writes the inode of a node and its content. `number` is the inode's number for 32-bit stat calls.
    pub(super) fn node(&self, id: Id, number: u32, bar: &Bar) -> Result<()> {
        let plan = self.plan(id)?;
        match &self.tree.node(id)?.kind {
            Kind::Directory(_) => self.data(plan, 0, &self.directory(id)?)?,
            Kind::Symlink(target) => self.data(plan, 0, target)?,
            Kind::File(content) => self.file(plan, content, bar)?,
            _ => {}
        }
        self.inode(id, number)
    }

    /// As [`Self::node`], without the blocks of its content: writes only the inode and what is beside it.
    pub(super) fn head(&self, id: Id, number: u32) -> Result<()> {
        let plan = self.plan(id)?;
        let start = plan.in_blocks();
        let beside = |bytes: &[u8]| {
            let bytes = bytes.get(to_usize(start)..).unwrap_or_default();
            self.write(bytes, plan.tail())
        };
        match &self.tree.node(id)?.kind {
            Kind::File(content) if plan.layout == layout::CHUNKS => {
                self.chunk_map(plan, content)?;
            }
            _ if plan.layout != layout::INLINE => {}
            Kind::Directory(_) => beside(&self.directory(id)?)?,
            Kind::Symlink(target) => beside(target)?,
            Kind::File(content) => {
                let write =
                    |offset, piece: &[u8]| self.write(piece, plan.tail() + (offset - start));
                match start {
                    0 => content.read(write)?,
                    // Who reads the blocks checks all of the content.
                    _ => content.read_from(start, write)?,
                }
            }
            _ => {}
        }
        self.inode(id, number)
    }

    /// Writes the inode of a node, with its extended attributes.
    fn inode(&self, id: Id, number: u32) -> Result<()> {
        let node = self.tree.node(id)?;
        let plan = self.plan(id)?;
        let what = match (plan.layout, node.device()) {
            (_, Some(device)) => {
                (device.minor & 0xff) | (device.major << 8) | ((device.minor & !0xff) << 12)
            }
            (layout::CHUNKS, _) => plan.chunk_bits.into(),
            _ => u32::try_from(plan.block)?,
        };
        let meta = &node.meta;
        let mut inode = Vec::with_capacity(to_usize(INODE) + plan.xattrs.len());
        inode.extend((1 | (plan.layout << 1)).to_le_bytes());
        let count = xattr_count(plan.xattrs.len())
            .context("more extended attributes than erofs can hold: use --fs squashfs")?;
        inode.extend(count.to_le_bytes());
        inode.extend(u16::try_from(node.st_mode())?.to_le_bytes());
        inode.extend([0; 2]);
        inode.extend(plan.size.to_le_bytes());
        inode.extend(what.to_le_bytes());
        inode.extend(number.to_le_bytes());
        inode.extend(meta.uid.to_le_bytes());
        inode.extend(meta.gid.to_le_bytes());
        inode.extend(meta.mtime.seconds.to_le_bytes());
        inode.extend(meta.mtime.nanoseconds.to_le_bytes());
        inode.extend(plan.links.to_le_bytes());
        inode.resize(to_usize(INODE), 0);
        inode.extend_from_slice(&plan.xattrs);
        if let (Some(at), Kind::File(content)) = (plan.digest, &node.kind) {
            let at = to_usize(INODE) + at;
            let place = inode.get_mut(at..at + DIGEST_LEN);
            let place = place.context("no place for a fingerprint")?;
            place.copy_from_slice(&content.sha256()?);
        }
        self.write(&inode, plan.at)
    }

    /// Writes the content of a file.
    fn file(&self, plan: &Plan, content: &Content, bar: &Bar) -> Result<()> {
        let chunks = match plan.layout {
            layout::CHUNKS => Some(self.chunk_map(plan, content)?),
            _ => None,
        };
        content.read(|offset, piece| {
            bar.advance(to_u64(piece.len()))?;
            match &chunks {
                Some(chunks) => self.chunks(plan, chunks, offset, piece),
                None => self.data(plan, offset, piece),
            }
        })
    }

    /// Writes the part of a node's content that is at `offset` in it, in blocks and beside the inode.
    fn data(&self, plan: &Plan, offset: u64, bytes: &[u8]) -> Result<()> {
        let in_blocks = match plan.layout {
            layout::INLINE => plan.in_blocks(),
            _ => u64::MAX,
        };
        let first = to_usize(in_blocks.saturating_sub(offset)).min(bytes.len());
        let (first, beside) = bytes.split_at(first);
        self.write(first, plan.block * BLOCK + offset)?;
        if beside.is_empty() {
            return Ok(());
        }
        let start = offset + to_u64(first.len()) - in_blocks;
        self.write(beside, plan.tail() + start)
    }

    /// Writes the map of a file's chunks. Returns the chunks that have data.
    fn chunk_map(&self, plan: &Plan, content: &Content) -> Result<BTreeMap<u64, (u64, u64)>> {
        let chunks = stored_chunks(content, plan);
        let mut map = Vec::new();
        for nth in 0..plan.chunks() {
            let address = match chunks.get(&nth) {
                Some((at, _)) => u32::try_from(plan.block + at)?,
                None => HOLE,
            };
            map.extend(address.to_le_bytes());
        }
        self.write(&map, plan.tail())?;
        Ok(chunks)
    }

    /// Writes a part of the content of a file in chunks.
    fn chunks(
        &self,
        plan: &Plan,
        chunks: &BTreeMap<u64, (u64, u64)>,
        mut offset: u64,
        mut piece: &[u8],
    ) -> Result<()> {
        while !piece.is_empty() {
            let nth = offset / plan.chunk();
            let inside = offset % plan.chunk();
            let (at, _) = chunks.get(&nth).context("data without a place")?;
            let start = at * BLOCK + inside;
            // Chunks that are adjacent in the file mostly are so on the disk, too: one call writes them.
            let mut room = plan.chunk() - inside;
            for next in nth + 1.. {
                let adjacent = chunks
                    .get(&next)
                    .is_some_and(|(at, _)| at * BLOCK == start + room);
                if !adjacent || room >= to_u64(piece.len()) {
                    break;
                }
                room += plan.chunk();
            }
            let (now, rest) = piece.split_at(to_usize(room.min(to_u64(piece.len()))));
            self.write(now, plan.block * BLOCK + start)?;
            offset += to_u64(now.len());
            piece = rest;
        }
        Ok(())
    }

    /// Returns the content of a directory, with zeros up to the end of the last block if all of it is in blocks.
    pub(super) fn directory(&self, id: Id) -> Result<Vec<u8>> {
        let parent = self.parents.get(&id).copied().unwrap_or(ROOT);
        let entries = entries(self.tree, id, parent);
        let mut bytes = Vec::new();
        for (block, _) in directory_blocks(&entries) {
            bytes.resize(bytes.len().next_multiple_of(to_usize(BLOCK)), 0);
            let mut name_at = u16::try_from(block.len() * 12)?;
            for (name, child) in block {
                let number = self.plan(*child)?.at / SLOT;
                let kind = match self.tree.node(*child)?.kind {
                    Kind::File(_) => 1,
                    Kind::Directory(_) => 2,
                    Kind::CharDevice(_) => 3,
                    Kind::BlockDevice(_) => 4,
                    Kind::Fifo => 5,
                    Kind::Socket => 6,
                    Kind::Symlink(_) => 7,
                };
                bytes.extend(number.to_le_bytes());
                bytes.extend(name_at.to_le_bytes());
                bytes.extend([kind, 0]);
                name_at += u16::try_from(name.len())?;
            }
            block
                .iter()
                .for_each(|(name, _)| bytes.extend_from_slice(name));
        }
        if self.plan(id)?.layout == layout::PLAIN {
            // The kernel takes the last name to end at a NUL or at the end of the block, and a longer name may have
            // been there before.
            bytes.resize(bytes.len().next_multiple_of(to_usize(BLOCK)), 0);
        }
        Ok(bytes)
    }

    /// Writes the superblock, and the table of prefixes if files have fingerprints.
    pub(super) fn superblock(&self, summary: &Summary) -> Result<()> {
        let (uuid, time) = summary.stamp;
        let root = self.plan(ROOT)?.at / SLOT;
        let mut bytes = Vec::new();
        bytes.extend(MAGIC.to_le_bytes());
        bytes.extend([0; 4]);
        let prints = if summary.prints { PRINTS } else { 0 };
        bytes.extend((COMPATIBLE | prints).to_le_bytes());
        bytes.extend([12, 0]);
        bytes.extend(u16::try_from(root)?.to_le_bytes());
        bytes.extend(summary.inodes.to_le_bytes());
        bytes.extend(u64::from(time).to_le_bytes());
        bytes.extend(0_u32.to_le_bytes());
        bytes.extend(u32::try_from(summary.blocks)?.to_le_bytes());
        // Inode numbers count from the start of the disk; there are no shared extended attributes.
        bytes.extend([0; 8]);
        bytes.extend_from_slice(uuid.as_bytes());
        bytes.extend([0; 16]);
        let incompatible = if summary.chunks { CHUNKED_FILES } else { 0 };
        bytes.extend(incompatible.to_le_bytes());
        if summary.prints {
            let (at, said) = PREFIXES_SAID;
            bytes.resize(at, 0);
            bytes.extend(said);
            self.write(&PREFIXES, PREFIXES_AT)?;
        }
        bytes.resize(to_usize(SUPERBLOCK.1), 0);
        self.write(&bytes, SUPERBLOCK.0)?;
        // The checksum covers the block from the superblock on.
        let mut covered = vec![0; to_usize(BLOCK - SUPERBLOCK.0)];
        self.out.read(&mut covered, SUPERBLOCK.0)?;
        let sum = !crc32c::crc32c(&covered);
        self.write(&sum.to_le_bytes(), SUPERBLOCK.0 + 4)
    }
}
