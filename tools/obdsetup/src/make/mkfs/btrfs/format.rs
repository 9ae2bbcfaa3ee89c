// SPDX-License-Identifier: GPL-2.0

//! Structures of btrfs as bytes. All numbers are little-endian.

use std::collections::BTreeMap;

use anyhow::{ensure, Context, Result};
use overlaybd::format::num::{to_u64, to_usize};
use uuid::Uuid;

use super::chunks::{Chunk, NODE};

/// The bytes of a structure.
pub(super) type Bytes = Vec<u8>;
/// Key of an item: object, kind, offset.
pub(super) type Key = (u64, u8, u64);
/// The items of a tree.
pub(super) type Items = BTreeMap<Key, Bytes>;

/// Size of a block of data in bytes.
pub(super) const SECTOR: u64 = 4096;
/// Length of the header of a block of a tree.
const HEADER: usize = 101;
/// Space for items in a block of a tree.
pub(super) const ROOM: usize = 16384 - HEADER;
/// Length of an item without its data.
pub(super) const ITEM_HEADER: usize = 25;
/// Largest number of pointers to blocks of the level below in a block.
pub(super) const POINTERS: usize = ROOM / 33;
/// Everything belongs to the first transaction.
const GENERATION: u64 = 1;
/// The stripe length in a chunk's item, in bytes. The kernel accepts only this one.
const STRIPE: u64 = 64 << 10;

/// Numbers of trees, and of other objects in keys.
pub(super) mod root {
    pub(in super::super) const ROOT: u64 = 1;
    pub(in super::super) const EXTENT: u64 = 2;
    pub(in super::super) const CHUNK: u64 = 3;
    pub(in super::super) const DEVICE: u64 = 4;
    pub(in super::super) const FS: u64 = 5;
    pub(in super::super) const ROOT_DIR: u64 = 6;
    pub(in super::super) const CSUM: u64 = 7;
    pub(in super::super) const FREE_SPACE: u64 = 10;
    pub(in super::super) const DATA_RELOCATION: u64 = u64::MAX - 8;
    pub(in super::super) const EXTENT_CSUM: u64 = u64::MAX - 9;
    pub(in super::super) const DEV_ITEMS: u64 = 1;
    /// The first object for users: the root directory of a subvolume; also the object of all
    /// chunks.
    pub(in super::super) const FIRST: u64 = 256;
}

/// Kinds of items.
pub(super) mod kind {
    pub(in super::super) const INODE_ITEM: u8 = 1;
    pub(in super::super) const INODE_REF: u8 = 12;
    pub(in super::super) const INODE_EXTREF: u8 = 13;
    pub(in super::super) const XATTR_ITEM: u8 = 24;
    pub(in super::super) const DIR_ITEM: u8 = 84;
    pub(in super::super) const DIR_INDEX: u8 = 96;
    pub(in super::super) const EXTENT_DATA: u8 = 108;
    pub(in super::super) const EXTENT_CSUM: u8 = 128;
    pub(in super::super) const ROOT_ITEM: u8 = 132;
    pub(in super::super) const EXTENT_ITEM: u8 = 168;
    pub(in super::super) const METADATA_ITEM: u8 = 169;
    pub(super) const TREE_BLOCK_REF: u8 = 176;
    pub(super) const EXTENT_DATA_REF: u8 = 178;
    pub(in super::super) const BLOCK_GROUP_ITEM: u8 = 192;
    pub(in super::super) const FREE_SPACE_INFO: u8 = 198;
    pub(in super::super) const FREE_SPACE_EXTENT: u8 = 199;
    pub(in super::super) const DEV_EXTENT: u8 = 204;
    pub(in super::super) const DEV_ITEM: u8 = 216;
    pub(in super::super) const CHUNK_ITEM: u8 = 228;
}

/// Kinds of files in directories.
pub(super) mod file_type {
    pub(in super::super) const FILE: u8 = 1;
    pub(in super::super) const DIRECTORY: u8 = 2;
    pub(in super::super) const CHAR: u8 = 3;
    pub(in super::super) const BLOCK: u8 = 4;
    pub(in super::super) const FIFO: u8 = 5;
    pub(in super::super) const SOCKET: u8 = 6;
    pub(in super::super) const SYMLINK: u8 = 7;
    pub(in super::super) const XATTR: u8 = 8;
}

/// Features that readers must support: mixed back references, large metadata, extended inode
/// references, skinny metadata, no holes.
const INCOMPATIBLE: u64 = 1 | (1 << 5) | (1 << 6) | (1 << 8) | (1 << 9);
/// Features that writers must support: the free space tree, and that it is valid.
const COMPATIBLE_READ_ONLY: u64 = 1 | (1 << 1);

pub(super) fn key(object: u64, kind: u8, offset: u64) -> Key {
    (object, kind, offset)
}

/// Appends numbers and bytes.
#[derive(Default)]
struct Put(Bytes);

impl Put {
    fn u8(mut self, number: u8) -> Self {
        self.0.push(number);
        self
    }

    fn u16(self, number: u16) -> Self {
        self.bytes(&number.to_le_bytes())
    }

    fn u32(self, number: u32) -> Self {
        self.bytes(&number.to_le_bytes())
    }

    fn u64(self, number: u64) -> Self {
        self.bytes(&number.to_le_bytes())
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn uuid(self, uuid: Uuid) -> Self {
        self.bytes(uuid.as_bytes())
    }

    fn key(self, &(object, kind, offset): &Key) -> Self {
        self.u64(object).u8(kind).u64(offset)
    }

    fn time(self, (seconds, nanoseconds): (i64, u32)) -> Self {
        self.bytes(&seconds.to_le_bytes()).u32(nanoseconds)
    }

    fn zeros(mut self, count: usize) -> Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    /// Pads with zeros to `len` bytes.
    fn up_to(mut self, len: usize) -> Self {
        self.0.resize(len, 0);
        self
    }
}

/// The kernel's `crc32c()`, without inversion before or after.
fn raw_crc32c(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

/// Returns the hash of the name of a directory entry or extended attribute, which is the offset in its key.
pub(super) fn name_hash(name: &[u8]) -> u64 {
    raw_crc32c(!1, name).into()
}

/// Returns the hash that is the offset in the key of an extended reference, for a name in the directory `parent`.
pub(super) fn extref_hash(parent: u64, name: &[u8]) -> u64 {
    let [a, b, c, d, ..] = parent.to_le_bytes();
    raw_crc32c(u32::from_le_bytes([a, b, c, d]), name).into()
}

/// Returns a length as 16 bits. Larger lengths were refused before.
fn len16(bytes: &[u8]) -> u16 {
    u16::try_from(bytes.len()).unwrap_or(u16::MAX)
}

/// The inode of a file.
#[derive(Default)]
pub(super) struct Inode {
    pub(super) size: u64,
    pub(super) nbytes: u64,
    pub(super) nlink: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mode: u32,
    pub(super) device: u64,
    pub(super) time: (i64, u32),
    pub(super) flags: u64,
}

impl Inode {
    pub(super) fn bytes(&self) -> Bytes {
        let put = Put::default()
            .u64(GENERATION)
            .u64(GENERATION)
            .u64(self.size)
            .u64(self.nbytes)
            .u64(0)
            .u32(self.nlink)
            .u32(self.uid)
            .u32(self.gid)
            .u32(self.mode)
            .u64(self.device)
            .u64(self.flags)
            .zeros(8 + 32);
        // Access, change, modification, birth.
        (0..4).fold(put, |put, _| put.time(self.time)).0
    }
}

pub(super) fn inode_ref(index: u64, name: &[u8]) -> Bytes {
    Put::default().u64(index).u16(len16(name)).bytes(name).0
}

pub(super) fn inode_extref(parent: u64, index: u64, name: &[u8]) -> Bytes {
    let put = Put::default().u64(parent).u64(index);
    put.u16(len16(name)).bytes(name).0
}

/// Returns an entry of a directory, which has no `value`, or an extended attribute.
pub(super) fn dir_item(to: &Key, kind: u8, name: &[u8], value: &[u8]) -> Bytes {
    let put = Put::default().key(to).u64(GENERATION);
    let put = put.u16(len16(value)).u16(len16(name)).u8(kind);
    put.bytes(name).bytes(value).0
}

/// Returns a file's extent whose content is in the tree.
pub(super) fn inline_extent(data: &[u8]) -> Bytes {
    let put = Put::default().u64(GENERATION).u64(to_u64(data.len()));
    put.u32(0).u8(0).bytes(data).0
}

/// Returns a file's extent of `len` bytes whose content is at `address` on the device.
pub(super) fn file_extent(address: u64, len: u64) -> Bytes {
    let put = Put::default().u64(GENERATION).u64(len).u32(0).u8(1);
    put.u64(address).u64(len).u64(0).u64(len).0
}

/// Returns the extent tree's item for an extent of data, which the file `inode` has at `offset`.
pub(super) fn data_extent(inode: u64, offset: u64) -> Bytes {
    let put = Put::default().u64(1).u64(GENERATION).u64(1);
    let put = put.u8(kind::EXTENT_DATA_REF).u64(root::FS);
    put.u64(inode).u64(offset).u32(1).0
}

/// Returns the extent tree's item for a block of the tree `owner`.
pub(super) fn metadata_extent(owner: u64) -> Bytes {
    let put = Put::default().u64(1).u64(GENERATION).u64(2);
    put.u8(kind::TREE_BLOCK_REF).u64(owner).0
}

pub(super) fn block_group(used: u64, kind: u64) -> Bytes {
    Put::default().u64(used).u64(root::FIRST).u64(kind).0
}

pub(super) fn free_space_info(extents: u32) -> Bytes {
    Put::default().u32(extents).u32(0).0
}

pub(super) fn device_item(size: u64, used: u64, device: Uuid, fs: Uuid) -> Bytes {
    let put = Put::default().u64(1).u64(size).u64(used);
    let put = put.u32(4096).u32(4096).u32(4096).zeros(8 + 8 + 8 + 4 + 2);
    put.uuid(device).uuid(fs).0
}

pub(super) fn chunk_item(chunk: &Chunk, device: Uuid) -> Bytes {
    let put = Put::default().u64(chunk.len).u64(root::EXTENT).u64(STRIPE);
    let put = put.u64(chunk.kind).u32(64 << 10).u32(64 << 10).u32(4096);
    // Numbers of stripes and sub-stripes: the chunk is on one device, once.
    let put = put.u16(1).u16(1);
    put.u64(1).u64(chunk.start).uuid(device).0
}

pub(super) fn device_extent(chunk: &Chunk, chunk_tree: Uuid) -> Bytes {
    let put = Put::default().u64(root::CHUNK).u64(root::FIRST);
    put.u64(chunk.start).u64(chunk.len).uuid(chunk_tree).0
}

/// The reference to a tree.
pub(super) struct Root {
    pub(super) address: u64,
    pub(super) level: u8,
    /// The UUID of a subvolume.
    pub(super) subvolume: Option<Uuid>,
    /// The inode number of the root directory; 0 if the tree has none.
    pub(super) directory: u64,
    pub(super) time: u32,
}

impl Root {
    pub(super) fn bytes(&self) -> Bytes {
        let inode = Inode {
            size: 3,
            nbytes: NODE,
            nlink: 1,
            mode: 0o040_755,
            // Says that the fields that the original format doesn't have are initialized.
            flags: 1 << 31,
            ..Default::default()
        };
        let time = match self.subvolume {
            Some(_) => (i64::from(self.time), 0),
            None => (0, 0),
        };
        let put = Put::default().bytes(&inode.bytes()).u64(GENERATION);
        let put = put.u64(self.directory).u64(self.address).u64(0).u64(NODE);
        // Last snapshot and flags; number of references; progress of the tree's deletion.
        let put = put.zeros(8 + 8).u32(1).zeros(17 + 1).u8(self.level);
        let put = put.u64(GENERATION).uuid(self.subvolume.unwrap_or_default());
        // UUIDs of the parent and of the received subvolume, four transactions; times of change and creation.
        put.zeros(16 + 16 + 32).time(time).time(time).up_to(439).0
    }
}

/// The superblock.
pub(super) struct Superblock {
    pub(super) root: u64,
    pub(super) root_level: u8,
    pub(super) chunk_root: u64,
    pub(super) chunk_root_level: u8,
    pub(super) size: u64,
    pub(super) used: u64,
    pub(super) device: Bytes,
    pub(super) system_chunk: Bytes,
    pub(super) system_start: u64,
    pub(super) fs: Uuid,
}

impl Superblock {
    /// Returns the bytes of the superblock at `address`.
    pub(super) fn bytes(&self, address: u64) -> Bytes {
        let put = Put::default().zeros(32).uuid(self.fs).u64(address).u64(1);
        let put = put.bytes(b"_BHRfS_M").u64(GENERATION);
        let put = put.u64(self.root).u64(self.chunk_root).u64(0).u64(0);
        let put = put.u64(self.size).u64(self.used).u64(root::ROOT_DIR).u64(1);
        let put = put.u32(4096).u32(16384).u32(16384).u32(4096);
        let system = key(root::FIRST, kind::CHUNK_ITEM, self.system_start);
        let system = Put::default().key(&system).bytes(&self.system_chunk).0;
        let len = u32::try_from(system.len()).unwrap_or_default();
        let put = put.u32(len).u64(GENERATION);
        let put = put.u64(0).u64(COMPATIBLE_READ_ONLY).u64(INCOMPATIBLE);
        // CRC-32C; no log.
        let put = put
            .u16(0)
            .u8(self.root_level)
            .u8(self.chunk_root_level)
            .u8(0);
        let put = put.bytes(&self.device).up_to(811).bytes(&system);
        seal(put.up_to(to_usize(SECTOR)).0)
    }
}

/// Sets the checksum, which is at the start of the block and covers everything after its field.
fn seal(mut block: Bytes) -> Bytes {
    let (sum, rest) = block.split_at_mut(32);
    let crc = crc32c::crc32c(rest);
    for (to, from) in sum.iter_mut().zip(crc.to_le_bytes()) {
        *to = from;
    }
    block
}

/// The content of a block of a tree.
pub(super) struct Body {
    owner: u64,
    level: u8,
    count: u32,
    bytes: Bytes,
}

impl Body {
    /// Returns a leaf: headers of the items from the front, their data from the back.
    pub(super) fn leaf(owner: u64, items: &[(Key, Bytes)]) -> Result<Self> {
        let mut bytes = vec![0; ROOM];
        let mut end = ROOM;
        let mut at = 0;
        for (key, data) in items {
            let start = end.checked_sub(data.len());
            let start = start.context("an item does not fit in a block")?;
            let header = Put::default()
                .key(key)
                .u32(u32::try_from(start)?)
                .u32(u32::try_from(data.len())?);
            ensure!(at + header.0.len() <= start, "too many items in a block");
            fill(&mut bytes, at, &header.0);
            fill(&mut bytes, start, data);
            at += header.0.len();
            end = start;
        }
        Ok(Self {
            owner,
            level: 0,
            count: u32::try_from(items.len())?,
            bytes,
        })
    }

    /// Returns a node above the blocks at these addresses, with the first key of each.
    pub(super) fn node(owner: u64, level: u8, pointers: &[(Key, u64)]) -> Result<Self> {
        let put = pointers.iter().fold(Put::default(), |put, (key, address)| {
            put.key(key).u64(*address).u64(GENERATION)
        });
        ensure!(put.0.len() <= ROOM, "too many pointers in a block");
        Ok(Self {
            owner,
            level,
            count: u32::try_from(pointers.len())?,
            bytes: put.up_to(ROOM).0,
        })
    }

    #[cfg(test)]
    pub(super) fn level(&self) -> u8 {
        self.level
    }
}

fn fill(bytes: &mut [u8], at: usize, from: &[u8]) {
    let place = bytes.get_mut(at..).unwrap_or_default();
    for (to, from) in place.iter_mut().zip(from) {
        *to = *from;
    }
}

/// Returns the block of a tree at `address`.
pub(super) fn block(address: u64, body: &Body, fs: Uuid, chunk_tree: Uuid) -> Bytes {
    // Written, with mixed back references.
    let flags = 1 | (1 << 56);
    let put = Put::default().zeros(32).uuid(fs).u64(address).u64(flags);
    let put = put.uuid(chunk_tree).u64(GENERATION).u64(body.owner);
    seal(put.u32(body.count).u8(body.level).bytes(&body.bytes).0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths() {
        assert_eq!(Inode::default().bytes().len(), 160);
        let root = Root {
            address: 0,
            level: 0,
            subvolume: None,
            directory: 0,
            time: 0,
        };
        assert_eq!(root.bytes().len(), 439);
        let device = device_item(0, 0, Uuid::nil(), Uuid::nil());
        assert_eq!(device.len(), 98);
        let chunk = Chunk {
            start: 0,
            len: 0,
            kind: 0,
        };
        assert_eq!(chunk_item(&chunk, Uuid::nil()).len(), 80);
        assert_eq!(device_extent(&chunk, Uuid::nil()).len(), 48);
        assert_eq!(file_extent(0, 0).len(), 53);
        assert_eq!(data_extent(0, 0).len(), 53);
        assert_eq!(metadata_extent(0).len(), 33);
        assert_eq!(block_group(0, 0).len(), 24);
    }

    #[test]
    fn hashes() {
        // The hash in every btrfs for its default subvolume.
        assert_eq!(name_hash(b"default"), 2_378_154_706);
    }
}
