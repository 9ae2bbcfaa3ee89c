// SPDX-License-Identifier: GPL-2.0

//! Reads the tree of an erofs made by [`super::write`] and [`super::grow`], to add a layer: names,
//! directories with their metadata, and the place of each inode. The content of files, and the metadata
//! of all but directories, stay on the disk and are not in the tree.
//!
//! The file system isn't trusted: each place is checked, and memory is limited in proportion to the
//! size of the layers' files.

use std::collections::{BTreeMap, HashMap, VecDeque};

use anyhow::Result;
use overlaybd::format::num::{to_u64, to_usize};

use super::disk::Disk;
use super::write::{
    layout, Out, BLOCK, CHUNKED_FILES, COMPATIBLE, INODE, INODES_AT, KINDS, MAGIC, PREFIXES,
    PREFIXES_AT, PREFIXES_SAID, PRINTS, SLOT, SUPERBLOCK, XATTR_HEADER,
};
use crate::make::mkfs::limits;
use crate::make::mkfs::tree::{Content, Device, Id, Kind, Meta, Node, Time, Tree, ROOT};
use crate::terminal::exit::{self, Failure};

/// Largest size of a directory in bytes. Real directories are smaller.
const DIRECTORY: u64 = 1 << 30;
/// Limit for the bytes of inodes, directories and links: a fixed number, and a number for each byte of the
/// layers' files. Layers may be compressed, and may have the same data in many places of the disk. Maps of
/// chunks, which compress best of all, are not read, and don't count.
const METADATA: (u64, u64) = (4 << 20, 64);
/// Length of the fixed part of a directory entry in bytes.
const ENTRY: usize = 12;

/// The place of a node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed {
    /// Offset of its inode on the disk.
    pub(super) at: u64,
    /// Number of bytes there for the inode, its extended attributes and the data beside it.
    pub(super) room: u64,
    /// First block of a directory's data, and number of blocks; 0 for other nodes.
    pub(super) block: u64,
    pub(super) blocks: u64,
    /// Link count in the inode.
    pub(super) links: u32,
}

/// The tree of a file system, and what is known about its form.
pub(super) struct State {
    pub(super) tree: Tree,
    /// The places of the nodes that are on the disk already.
    pub(super) placed: HashMap<Id, Placed>,
    /// Whether files may be stored in chunks.
    pub(super) chunks: bool,
    /// Whether files may have fingerprints.
    pub(super) prints: bool,
}

/// Reads the file system on `disk`.
///
/// # Errors
///
/// If the disk has no erofs, or one that another program made or that is damaged, or if it cannot be read.
pub(super) fn read(disk: &Disk) -> Result<State> {
    let mut superblock = vec![0; to_usize(SUPERBLOCK.1)];
    disk.read(&mut superblock, SUPERBLOCK.0)?;
    let fields = Fields(&superblock);
    if fields.u32(0) != MAGIC {
        return Err(foreign("there is no erofs in them"));
    }
    let (compatible, incompatible) = (fields.u32(8), fields.u32(80));
    let prints = compatible == COMPATIBLE | PRINTS;
    let mut rest = vec![0; superblock.len()];
    let mut table = vec![0; PREFIXES.len()];
    if prints {
        let (at, said) = PREFIXES_SAID;
        for (to, from) in rest.iter_mut().skip(at).zip(said) {
            *to = from;
        }
        disk.read(&mut table, PREFIXES_AT)?;
    }
    let root = u64::from(fields.u16(14)) * SLOT;
    if !(prints || compatible == COMPATIBLE)
        || prints && table != PREFIXES
        || root < INODES_AT
        || incompatible & !CHUNKED_FILES != 0
        || u32::from(fields.u8(12)) != BLOCK.trailing_zeros()
        || fields.u8(13) != 0
        || fields.u32(40) != 0
        || fields.u32(44) != 0
        || superblock.get(84..) != rest.get(84..)
    {
        return Err(foreign("their erofs is of another kind"));
    }
    let mut reader = Reader {
        disk,
        state: State {
            tree: Tree::new(nothing()),
            placed: HashMap::new(),
            chunks: incompatible & CHUNKED_FILES != 0,
            prints,
        },
        known: HashMap::new(),
        metadata: disk
            .stored()
            .saturating_mul(METADATA.1)
            .saturating_add(METADATA.0)
            .min(disk.blocks() * BLOCK),
        left: VecDeque::new(),
    };
    reader.known.insert(root, ROOT);
    let inode = reader.inode(root)?;
    if !inode.is_directory() {
        return Err(bad(root, "the root is no directory"));
    }
    reader.directory_of(ROOT, &inode)?;
    reader.left.push_back((ROOT, ROOT, 0, inode));
    while let Some((id, parent, len, inode)) = reader.left.pop_front() {
        crate::terminal::interrupt::check()?;
        reader.children(id, parent, len, &inode)?;
    }
    Ok(reader.state)
}

/// Returns empty metadata, for nodes whose metadata is not read.
fn nothing() -> Meta {
    Meta {
        mode: 0,
        uid: 0,
        gid: 0,
        mtime: Time::default(),
        xattrs: BTreeMap::new(),
        unread: Vec::new(),
    }
}

fn foreign(what: &str) -> anyhow::Error {
    Failure::usage(format!(
        "the layers below: {what}; a tar can be put only over an erofs that obdsetup made, by \
         `convert' of an image, or by `create' or `convert' with --fs erofs without --mkfs-arg"
    ))
}

fn bad(at: u64, what: &str) -> anyhow::Error {
    let text = format!("the layers below: the erofs in them: inode at byte {at}: {what}");
    Failure::error(exit::BAD_IMAGE, text)
}

/// Little-endian numbers in bytes; 0 after their end.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let bytes = self.0.get(at..).and_then(<[u8]>::first_chunk);
        bytes.copied().unwrap_or([0; N])
    }

    fn u8(&self, at: usize) -> u8 {
        u8::from_le_bytes(self.bytes(at))
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }
}

/// An inode.
struct Inode {
    at: u64,
    layout: u16,
    /// Length of the extended attributes in bytes.
    xattrs: u64,
    mode: u32,
    size: u64,
    /// First block, chunk format or device number.
    what: u32,
    uid: u32,
    gid: u32,
    mtime: Time,
    links: u32,
}

impl Inode {
    fn is_directory(&self) -> bool {
        self.mode & 0o170_000 == 0o040_000
    }

    fn is_file(&self) -> bool {
        self.mode & 0o170_000 == 0o100_000
    }

    /// Returns the number of bytes after inode and extended attributes.
    fn beside(&self) -> u64 {
        match self.layout {
            layout::INLINE => self.size % BLOCK,
            layout::CHUNKS => {
                let bits = self.what & 31;
                self.size.div_ceil(BLOCK << bits) * 4
            }
            _ => 0,
        }
    }

    /// Returns how many of the bytes of [`Self::beside`] are read into memory.
    fn read_beside(&self) -> u64 {
        match self.layout {
            layout::CHUNKS => 0,
            _ => self.beside(),
        }
    }

    /// Returns the offset after inode and extended attributes.
    fn tail(&self) -> u64 {
        self.at + INODE + self.xattrs
    }

    /// Returns the number of consecutive blocks of data.
    fn blocks(&self) -> u64 {
        match self.layout {
            layout::INLINE => self.size / BLOCK,
            _ => self.size.div_ceil(BLOCK),
        }
    }
}

struct Reader<'a> {
    disk: &'a Disk,
    state: State,
    /// Nodes by the offsets of their inodes.
    known: HashMap<u64, Id>,
    /// Number of bytes of inodes, directories and links that may still be read: see [`METADATA`].
    metadata: u64,
    /// Directories whose entries are still to be read: id, parent, and length of the path in bytes.
    left: VecDeque<(Id, Id, usize, Inode)>,
}

impl Reader<'_> {
    /// Counts bytes that are read into memory for the inode at `at`. An error if there are too many in all,
    /// because then inodes share them.
    fn count(&mut self, at: u64, bytes: u64) -> Result<()> {
        let left = self.metadata.checked_sub(bytes);
        self.metadata = left.ok_or_else(|| bad(at, "shares its bytes with others"))?;
        Ok(())
    }

    /// Reads and checks the inode at byte `at`.
    fn inode(&mut self, at: u64) -> Result<Inode> {
        let end = self.disk.blocks() * BLOCK;
        if at < INODES_AT || at % BLOCK + INODE > BLOCK || at >= end {
            return Err(bad(at, "no inode can be there"));
        }
        let mut bytes = vec![0; to_usize(INODE)];
        self.disk.read(&mut bytes, at)?;
        let fields = Fields(&bytes);
        let format = fields.u16(0);
        let xattrs = match fields.u16(2) {
            0 => 0,
            count => to_u64(XATTR_HEADER) + 4 * (u64::from(count) - 1),
        };
        let inode = Inode {
            at,
            layout: format >> 1,
            xattrs,
            mode: u32::from(fields.u16(4)),
            size: fields.u64(8),
            what: fields.u32(16),
            uid: fields.u32(24),
            gid: fields.u32(28),
            mtime: Time {
                seconds: i64::from_le_bytes(fields.bytes(32)),
                nanoseconds: fields.u32(40),
            },
            links: fields.u32(44),
        };
        let known = match inode.layout {
            layout::PLAIN | layout::INLINE => true,
            layout::CHUNKS => inode.is_file() && self.state.chunks && inode.what & !31 == 0,
            _ => false,
        };
        if format & 1 == 0 || !known {
            return Err(bad(at, "of a form that obdsetup does not write"));
        }
        if i64::try_from(inode.size).is_err() {
            return Err(bad(at, "its size is more than any file has"));
        }
        self.count(at, INODE + inode.xattrs + inode.read_beside())?;
        if inode.tail() + inode.beside() > end {
            return Err(bad(at, "goes behind the end of the disk"));
        }
        Ok(inode)
    }

    /// Reads the metadata of the directory `id`, but not its entries.
    fn directory_of(&mut self, id: Id, inode: &Inode) -> Result<()> {
        let xattrs = self.xattrs(inode)?;
        let meta = &mut self.state.tree.node_mut(id)?.meta;
        *meta = Meta {
            mode: inode.mode & 0o7777,
            uid: inode.uid,
            gid: inode.gid,
            mtime: inode.mtime,
            xattrs,
            unread: Vec::new(),
        };
        self.place(id, inode);
        Ok(())
    }

    fn place(&mut self, id: Id, inode: &Inode) {
        let directory = inode.is_directory();
        let placed = Placed {
            at: inode.at,
            room: (INODE + inode.xattrs + inode.beside()).next_multiple_of(SLOT),
            block: if directory { inode.what.into() } else { 0 },
            blocks: if directory { inode.blocks() } else { 0 },
            links: inode.links,
        };
        self.state.placed.insert(id, placed);
    }

    fn xattrs(&self, inode: &Inode) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
        let mut found = BTreeMap::new();
        if inode.xattrs == 0 {
            return Ok(found);
        }
        let wrong = || bad(inode.at, "its extended attributes are malformed");
        let mut bytes = vec![0; to_usize(inode.xattrs)];
        self.disk.read(&mut bytes, inode.at + INODE)?;
        let header = bytes.get(..XATTR_HEADER).unwrap_or_default();
        // The header has a filter of names and the number of shared attributes: obdsetup writes neither.
        if header.iter().any(|&byte| byte != 0) {
            return Err(wrong());
        }
        let mut rest = bytes.get(XATTR_HEADER..).unwrap_or_default();
        while let Some((&[name_len, index, v0, v1], after)) = rest.split_first_chunk() {
            let name_len = usize::from(name_len);
            let value_len = usize::from(u16::from_le_bytes([v0, v1]));
            let prefix = KINDS.iter().find(|(_, number)| *number == index);
            let (Some(name), Some(&(prefix, _))) = (after.get(..name_len), prefix) else {
                return Err(wrong());
            };
            let value = after
                .get(name_len..name_len + value_len)
                .ok_or_else(wrong)?;
            found.insert([prefix, name].concat(), value.to_vec());
            let len = (4 + name_len + value_len).next_multiple_of(4);
            rest = rest.get(len..).ok_or_else(wrong)?;
        }
        Ok(found)
    }

    /// Reads the content of a directory or link.
    fn content(&mut self, inode: &Inode) -> Result<Vec<u8>> {
        let in_blocks = match inode.layout {
            layout::INLINE => inode.size - inode.size % BLOCK,
            _ => inode.size,
        };
        let start = u64::from(inode.what) * BLOCK;
        if inode.size > DIRECTORY || start + in_blocks > self.disk.blocks() * BLOCK {
            return Err(bad(inode.at, "its content goes behind the end of the disk"));
        }
        self.count(inode.at, in_blocks)?;
        let mut bytes = vec![0; to_usize(inode.size)];
        let (blocks, tail) = bytes.split_at_mut(to_usize(in_blocks));
        self.disk.read(blocks, start)?;
        self.disk.read(tail, inode.tail())?;
        Ok(bytes)
    }

    /// Reads the entries of the directory `id`, whose parent is `parent` and whose path has `len` bytes.
    fn children(&mut self, id: Id, parent: Id, len: usize, inode: &Inode) -> Result<()> {
        let content = self.content(inode)?;
        let (mut own, mut above) = (None, None);
        for block in content.chunks(to_usize(BLOCK)) {
            for (name, at) in entries(block)
                .ok_or_else(|| bad(inode.at, "an entry of the directory is malformed"))?
            {
                match name {
                    b"." => own = Some(at),
                    b".." => above = Some(at),
                    name => self.child(id, name, len, at)?,
                }
            }
        }
        let place = |id: Id| self.state.placed.get(&id).map(|placed| placed.at);
        match own == place(id) && above == place(parent) {
            true => Ok(()),
            false => Err(bad(inode.at, "\".\" or \"..\" leads to another directory")),
        }
    }

    /// Adds the entry `name` of the directory `parent`, whose path has `len` bytes. The inode is at byte `at`.
    fn child(&mut self, parent: Id, name: &[u8], len: usize, at: u64) -> Result<()> {
        let len = len + name.len() + 1;
        let is_name = !name.is_empty()
            && name.len() <= limits::NAME
            && !name.iter().any(|byte| matches!(byte, 0 | b'/'));
        if !is_name || len > limits::PATH + 1 || self.state.tree.child(parent, name).is_some() {
            return Err(bad(
                at,
                "an entry for it has an invalid name, too long a path, or a name that is used twice",
            ));
        }
        if let Some(&id) = self.known.get(&at) {
            if matches!(self.state.tree.node(id)?.kind, Kind::Directory(_)) {
                return Err(bad(at, "a directory with two names"));
            }
            return self.state.tree.link(parent, name.to_vec(), id);
        }
        let inode = self.inode(at)?;
        let kind = match inode.mode & 0o170_000 {
            0o040_000 => Kind::Directory(BTreeMap::new()),
            0o100_000 => Kind::File(Content::in_place(inode.size)),
            0o120_000 => Kind::Symlink(self.link(&inode)?),
            0o020_000 => Kind::CharDevice(device(inode.what)),
            0o060_000 => Kind::BlockDevice(device(inode.what)),
            0o010_000 => Kind::Fifo,
            0o140_000 => Kind::Socket,
            _ => return Err(bad(at, "of a kind that no file has")),
        };
        let id = self.state.tree.add(Node {
            meta: nothing(),
            kind,
        });
        self.known.insert(at, id);
        self.state.tree.link(parent, name.to_vec(), id)?;
        if inode.is_directory() {
            self.directory_of(id, &inode)?;
            self.left.push_back((id, parent, len, inode));
        } else {
            self.place(id, &inode);
        }
        Ok(())
    }

    /// Reads the target of a symbolic link.
    fn link(&mut self, inode: &Inode) -> Result<Vec<u8>> {
        if !(1..=to_u64(limits::PATH)).contains(&inode.size) {
            return Err(bad(
                inode.at,
                "a symbolic link whose target is empty or too long",
            ));
        }
        self.content(inode)
    }
}

fn device(number: u32) -> Device {
    Device {
        major: (number >> 8) & 0xfff,
        minor: (number & 0xff) | ((number >> 12) & 0xfff00),
    }
}

/// Returns the names in a block of a directory, and the offsets of their inodes; `None` if the block is
/// malformed.
fn entries(block: &[u8]) -> Option<Vec<(&[u8], u64)>> {
    let first = usize::from(Fields(block).u16(8));
    if first == 0 || first % ENTRY != 0 || first > block.len() {
        return None;
    }
    let heads: Vec<&[u8]> = block.get(..first)?.chunks(ENTRY).collect();
    let starts = heads.iter().map(|head| usize::from(Fields(head).u16(8)));
    let starts: Vec<usize> = starts.collect();
    let mut found = Vec::new();
    for (nth, head) in heads.iter().enumerate() {
        let start = *starts.get(nth)?;
        let mut name = match starts.get(nth + 1) {
            Some(&end) => block.get(start..end)?,
            None => block.get(start..)?,
        };
        if nth + 1 == starts.len() {
            // The last name in a block that isn't full ends with a NUL.
            name = name.split(|&byte| byte == 0).next()?;
        }
        found.push((name, Fields(head).u64(0).checked_mul(SLOT)?));
    }
    Some(found)
}
