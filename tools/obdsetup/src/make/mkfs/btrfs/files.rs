// SPDX-License-Identifier: GPL-2.0

//! The tree of files: inodes, names, extended attributes, and the places of content.

use std::collections::HashMap;

use anyhow::{Context, Result};
use overlaybd::format::num::to_u64;

use super::chunks::Chunk;
use super::format::{self, file_type, key, kind, root, Inode, Items, ITEM_HEADER, ROOM, SECTOR};
use crate::make::mkfs::tree::{show, Content, Id, Kind, Name, Node, Tree, ROOT};
use crate::terminal::exit::Failure;

/// Largest size in bytes of content that is stored in the tree: the kernel's default.
const INLINE: u64 = 2048;
/// Largest size of an extent in bytes.
const LONGEST: u64 = 128 << 20;
/// Largest size in bytes of an item with the names of a file in one directory. Each further name gets an item of its own.
const REFS: usize = 4096;
/// The first index in a directory.
const FIRST_INDEX: u64 = 2;
/// Largest size in bytes of name and value of an extended attribute together: the item then fills a block.
const XATTR: usize = ROOM - ITEM_HEADER - 30;

/// A range of a file whose content is outside of the tree.
pub(super) struct Extent {
    pub(super) id: Id,
    pub(super) inode: u64,
    /// Offset in the file.
    pub(super) offset: u64,
    /// Address on the device.
    pub(super) address: u64,
    /// Length, in whole blocks.
    pub(super) len: u64,
}

/// The items of the tree of files, and the extents of all content outside of the tree.
pub(super) struct Files {
    pub(super) items: Items,
    /// The extents of one file after the other, those of a file in order.
    pub(super) extents: Vec<Extent>,
}

/// Returns whether content is stored in the tree: it is short, and has no holes.
fn is_inline(content: &Content) -> bool {
    content.size <= INLINE && content.data_len() == content.size
}

impl Tree {
    /// Returns the length of all content outside of the tree, in whole blocks of `sector` bytes.
    pub(super) fn data_len(&self, sector: u64) -> Result<u64> {
        let mut sum = 0;
        for name in self.names().iter().filter(|name| name.first) {
            if let Kind::File(content) = &self.node(name.id)?.kind {
                if !is_inline(content) {
                    sum += content.data_len().next_multiple_of(sector);
                }
            }
        }
        Ok(sum)
    }
}

/// Builds the tree of files. The content is in the chunks `data`.
pub(super) fn build(tree: &Tree, data: &[Chunk]) -> Result<Files> {
    let names = tree.names();
    let mut builder = Builder {
        tree,
        files: Files {
            items: Items::new(),
            extents: Vec::new(),
        },
        links: HashMap::new(),
        inodes: HashMap::from([(ROOT, root::FIRST)]),
        space: Space {
            chunks: data,
            used: 0,
        },
    };
    for name in names.iter() {
        *builder.links.entry(name.id).or_default() += 1;
        let next = root::FIRST + to_u64(builder.inodes.len());
        builder.inodes.entry(name.id).or_insert(next);
    }
    builder.node(ROOT, b"")?;
    builder.add(
        key(root::FIRST, kind::INODE_REF, root::FIRST),
        &format::inode_ref(0, b".."),
    );
    let mut indices: HashMap<Id, u64> = HashMap::new();
    for name in names.iter() {
        crate::terminal::interrupt::check()?;
        let index = indices.entry(name.parent).or_insert(FIRST_INDEX);
        builder
            .name(name, *index)
            .with_context(|| show(&names.path(name)))?;
        *index += 1;
        if name.first {
            builder.node(name.id, &names.path(name))?;
        }
    }
    Ok(builder.files)
}

struct Builder<'a> {
    tree: &'a Tree,
    files: Files,
    /// Number of names of each node.
    links: HashMap<Id, u32>,
    inodes: HashMap<Id, u64>,
    space: Space<'a>,
}

impl Builder<'_> {
    /// Adds an item. If there is an item with that key, appends the bytes to it.
    fn add(&mut self, key: format::Key, bytes: &[u8]) {
        let item = self.files.items.entry(key).or_default();
        item.extend_from_slice(bytes);
    }

    /// As [`Self::add`], for a key that has the hash of a name. Names with the same hash share an item, which must fit in
    /// a block.
    fn add_hashed(&mut self, key: format::Key, bytes: &[u8]) -> Result<()> {
        self.add(key, bytes);
        let len = self.files.items.get(&key).map_or(0, Vec::len);
        match ITEM_HEADER + len > ROOM {
            true => Err(Failure::usage(
                "more names with the same hash (crc32c) are in one place than btrfs can hold: use --fs erofs",
            )),
            false => Ok(()),
        }
    }

    fn inode(&self, id: Id) -> Result<u64> {
        self.inodes
            .get(&id)
            .copied()
            .context("a file without inode")
    }

    /// Adds the items of a name: the entry in its directory, and the reference from its inode.
    fn name(&mut self, name: &Name, index: u64) -> Result<()> {
        let (parent, inode) = (self.inode(name.parent)?, self.inode(name.id)?);
        let last = name.last();
        let kind = match self.tree.node(name.id)?.kind {
            Kind::File(_) => file_type::FILE,
            Kind::Directory(_) => file_type::DIRECTORY,
            Kind::CharDevice(_) => file_type::CHAR,
            Kind::BlockDevice(_) => file_type::BLOCK,
            Kind::Fifo => file_type::FIFO,
            Kind::Socket => file_type::SOCKET,
            Kind::Symlink(_) => file_type::SYMLINK,
        };
        let to = key(inode, kind::INODE_ITEM, 0);
        let entry = format::dir_item(&to, kind, last, b"");
        self.add_hashed(key(parent, kind::DIR_ITEM, format::name_hash(last)), &entry)?;
        self.add(key(parent, kind::DIR_INDEX, index), &entry);
        let reference = key(inode, kind::INODE_REF, parent);
        let there = self.files.items.get(&reference).map_or(0, Vec::len);
        if there + last.len() <= REFS {
            self.add(reference, &format::inode_ref(index, last));
        } else {
            let reference = key(inode, kind::INODE_EXTREF, format::extref_hash(parent, last));
            self.add_hashed(reference, &format::inode_extref(parent, index, last))?;
        }
        Ok(())
    }

    /// Adds the items of a node, its extended attributes and its content. `path` is for messages.
    fn node(&mut self, id: Id, path: &[u8]) -> Result<()> {
        let node = self.tree.node(id)?;
        let inode = self.inode(id)?;
        let meta = &node.meta;
        for (name, value) in &meta.xattrs {
            if name.len() + value.len() > XATTR {
                return Err(Failure::usage(format!(
                    "{}: extended attribute {}: {} bytes are more than btrfs can hold: \
                     use --fs erofs",
                    show(path),
                    String::from_utf8_lossy(name),
                    value.len()
                )));
            }
            let nothing = key(0, 0, 0);
            let item = format::dir_item(&nothing, file_type::XATTR, name, value);
            let key = key(inode, kind::XATTR_ITEM, format::name_hash(name));
            self.add_hashed(key, &item).with_context(|| show(path))?;
        }
        let (size, nbytes) = self.content(id, inode, node)?;
        let device = node.device().map_or(0, |device| {
            (u64::from(device.major) << 20) | u64::from(device.minor)
        });
        let links = self.links.get(&id).copied();
        let item = Inode {
            size,
            nbytes,
            nlink: match node.kind {
                Kind::Directory(_) => 1,
                _ => links.unwrap_or(1),
            },
            uid: meta.uid,
            gid: meta.gid,
            mode: node.st_mode(),
            device,
            time: (meta.mtime.seconds, meta.mtime.nanoseconds),
            ..Default::default()
        };
        self.add(key(inode, kind::INODE_ITEM, 0), &item.bytes());
        Ok(())
    }

    /// Adds the items of a node's content. Returns the size of the node, and the bytes that the content occupies.
    fn content(&mut self, id: Id, inode: u64, node: &Node) -> Result<(u64, u64)> {
        let at = |offset| key(inode, kind::EXTENT_DATA, offset);
        match &node.kind {
            Kind::Directory(children) => {
                // The size of a directory has each name twice: for DIR_ITEM and DIR_INDEX.
                let names = children.keys().map(|name| to_u64(name.len()));
                Ok((names.sum::<u64>() * 2, 0))
            }
            Kind::Symlink(target) => {
                self.add(at(0), &format::inline_extent(target));
                Ok((to_u64(target.len()), to_u64(target.len())))
            }
            Kind::File(content) if is_inline(content) => {
                let mut data = Vec::new();
                content.read(|_, piece| {
                    data.extend_from_slice(piece);
                    Ok(())
                })?;
                if !data.is_empty() {
                    self.add(at(0), &format::inline_extent(&data));
                }
                Ok((content.size, to_u64(data.len())))
            }
            Kind::File(content) => {
                let mut nbytes = 0;
                for extent in &content.extents {
                    let (mut offset, mut left) =
                        (extent.offset, extent.len.next_multiple_of(SECTOR));
                    while left > 0 {
                        let (address, len) = self.space.take(left.min(LONGEST))?;
                        self.add(at(offset), &format::file_extent(address, len));
                        self.files.extents.push(Extent {
                            id,
                            inode,
                            offset,
                            address,
                            len,
                        });
                        offset += len;
                        left -= len;
                        nbytes += len;
                    }
                }
                Ok((content.size, nbytes))
            }
            _ => Ok((0, 0)),
        }
    }
}

/// The chunks for data, filled from the start.
struct Space<'a> {
    chunks: &'a [Chunk],
    /// Number of used bytes in the first chunk.
    used: u64,
}

impl Space<'_> {
    /// Allocates at most `len` bytes: fewer if the chunk has no more. Returns their address and number.
    fn take(&mut self, len: u64) -> Result<(u64, u64)> {
        while let Some((first, rest)) = self.chunks.split_first() {
            if self.used < first.len {
                let start = first.start + self.used;
                let len = len.min(first.len - self.used);
                self.used += len;
                return Ok((start, len));
            }
            self.chunks = rest;
            self.used = 0;
        }
        anyhow::bail!("no room for data")
    }
}
