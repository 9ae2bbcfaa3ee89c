// SPDX-License-Identifier: GPL-2.0

//! Writes btrfs. mkfs.btrfs isn't used: it fills a file system in the order in which a directory is
//! read, writes random UUIDs and the time of day in many places, and loses device numbers and
//! fractions of seconds; no option changes that.
//!
//! The result has one device and one copy of everything, blocks of 4 KiB, nodes of 16 KiB and the
//! default features of mkfs.btrfs. Addresses in the file system equal those on the device.
//!
//! - [`format`]: the bytes of each structure. [`files`]: the items of the tree of files.
//! - [`pack`]: distributes the items of a tree over blocks. [`chunks`]: divides the device into chunks.
//!
//! Source: Linux, `include/uapi/linux/btrfs_tree.h`, and the checks in `fs/btrfs/tree-checker.c`.

mod chunks;
mod files;
mod format;
mod pack;

use std::borrow::Cow;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{bail, Context, Result};
use overlaybd::format::num::{to_u64, to_usize};
use tempfile::NamedTempFile;
use uuid::Uuid;

use self::chunks::NODE;
use self::chunks::{Chunk, Layout};
use self::files::Extent;
use self::format::{key, kind, root, Bytes, Items, SECTOR};
use self::pack::Packed;
use super::tree::{Kind, Tree};
use super::{Options, Stamp};
use crate::files::place::temp_file;
use crate::terminal::bar::Bar;
use crate::terminal::exit::Failure;

/// Largest number of checksums in one item.
const CSUMS: usize = 2048;
/// Addresses of the superblock and its copies.
const SUPERBLOCKS: [u64; 3] = [64 << 10, 64 << 20, 256 << 30];

/// UUIDs in the file system.
struct Ids {
    fs: Uuid,
    device: Uuid,
    chunk_tree: Uuid,
    subvolume: Uuid,
}

/// Makes the file system of `tree` in a file of `size` bytes in `place`.
pub(in crate::make::mkfs) fn make(
    tree: &Tree,
    options: &Options<'_>,
    size: u64,
    stamp: &Stamp,
    place: &Path,
) -> Result<NamedTempFile> {
    if let Some(arg) = options.args.first() {
        return Err(Failure::usage(format!(
            "--mkfs-arg={}: obdsetup writes btrfs itself: make a disk with mkfs.btrfs, and a layer \
             of that with create --image",
            arg.to_string_lossy()
        )));
    }
    let size = size - size % SECTOR;
    let ids = Ids {
        fs: stamp.uuid,
        device: stamp.derived("device"),
        chunk_tree: stamp.derived("chunk tree"),
        subvolume: stamp.derived("subvolume"),
    };
    let image = temp_file(place)?;
    let file = image.as_file();
    file.set_len(size).with_context(|| {
        format!(
            "cannot make a file of {}",
            crate::terminal::size::show(size)
        )
    })?;
    let data = chunks::for_data(tree.data_len(SECTOR)?);
    let files = files::build(tree, &data)?;
    let csums = write_data(tree, &files.extents, file)?;
    let maker = Maker {
        ids: &ids,
        time: stamp.time,
        size,
        extents: &files.extents,
        fs: Packed::new(root::FS, files.items),
        csums: Packed::new(root::CSUM, csums),
        relocation: Packed::new(root::DATA_RELOCATION, relocation_tree()),
    };
    let done = maker.trees(data)?;
    if done.layout.end() > size {
        return Err(Failure::usage(format!(
            "{}: too small for these files, which take {}: give a larger --size",
            crate::terminal::size::show(size),
            crate::terminal::size::show(done.layout.end())
        )));
    }
    done.write(&maker, file)?;
    Ok(image)
}

/// Writes the content of all files at the addresses in `extents`. Returns the items of the tree of checksums.
fn write_data(tree: &Tree, extents: &[Extent], file: &File) -> Result<Items> {
    let mut sums: Vec<(u64, u32)> = Vec::new();
    let bar = Bar::new("writing", extents.iter().map(|extent| extent.len).sum());
    let mut of_file = extents.iter().peekable();
    while let Some(first) = of_file.next() {
        let mut own = vec![first];
        while let Some(next) = of_file.next_if(|next| next.id == first.id) {
            own.push(next);
        }
        let Kind::File(content) = &tree.node(first.id)?.kind else {
            bail!("content of what is no file");
        };
        let mut at = own.iter().copied().peekable();
        content.read(|offset, piece| {
            let (mut offset, mut rest) = (offset, piece);
            while !rest.is_empty() {
                while at
                    .next_if(|extent| extent.offset + extent.len <= offset)
                    .is_some()
                {}
                let extent = at.peek().context("data without a place")?;
                let room = (extent.offset + extent.len - offset).min(to_u64(rest.len()));
                let (here, after) = rest.split_at(to_usize(room));
                let address = extent.address + (offset - extent.offset);
                let mut whole = Cow::Borrowed(here);
                if here.len() % to_usize(SECTOR) != 0 {
                    whole
                        .to_mut()
                        .resize(here.len().next_multiple_of(to_usize(SECTOR)), 0);
                }
                let sectors = whole.chunks(to_usize(SECTOR)).map(crc32c::crc32c);
                sums.extend((address..).step_by(4096).zip(sectors));
                file.write_all_at(&whole, address)
                    .context("cannot write the file system")?;
                offset += room;
                rest = after;
            }
            bar.advance(to_u64(piece.len()))?;
            Ok(())
        })?;
    }
    let mut items = Items::new();
    let mut last: Option<(u64, usize)> = None;
    let mut start = 0;
    for (address, sum) in sums {
        crate::terminal::interrupt::check()?;
        let count = match last {
            Some((before, count)) if before + SECTOR == address && count < CSUMS => count + 1,
            _ => {
                start = address;
                1
            }
        };
        last = Some((address, count));
        let item = items.entry(key(root::EXTENT_CSUM, kind::EXTENT_CSUM, start));
        item.or_default().extend_from_slice(&sum.to_le_bytes());
    }
    Ok(items)
}

/// Returns the items of the data relocation tree, which the kernel needs to move data.
fn relocation_tree() -> Items {
    let mut items = Items::new();
    let directory = format::Inode {
        nbytes: NODE,
        nlink: 1,
        mode: 0o040_755,
        ..Default::default()
    };
    items.insert(key(root::FIRST, kind::INODE_ITEM, 0), directory.bytes());
    items.insert(
        key(root::FIRST, kind::INODE_REF, root::FIRST),
        format::inode_ref(0, b".."),
    );
    items
}

/// The input for the trees.
struct Maker<'a> {
    ids: &'a Ids,
    time: u32,
    size: u64,
    extents: &'a [Extent],
    fs: Packed,
    csums: Packed,
    relocation: Packed,
}

/// All trees, and their places.
struct Done {
    layout: Layout,
    device: Packed,
    free: Packed,
    extent: Packed,
    root: Packed,
    chunk: Packed,
    /// Addresses of the blocks of each tree, in the order of [`Done::packed`], and of the chunk tree at the end.
    places: Vec<Vec<u64>>,
    /// Number of bytes of data and of blocks of trees.
    used: u64,
}

impl Maker<'_> {
    /// Builds the trees that record the places of all blocks, including the blocks of these trees. `data` are the
    /// chunks for data.
    fn trees(&self, data: Vec<Chunk>) -> Result<Done> {
        // More blocks need more items in the trees, which need more blocks.
        let mut blocks = 1;
        loop {
            let layout = Layout::new(data.clone(), blocks);
            let done = self.trees_in(layout)?;
            let needed: u64 = done.packed(self).iter().map(|packed| packed.blocks()).sum();
            if needed <= blocks {
                return Ok(done);
            }
            blocks = needed;
            if blocks > 1 << 40 {
                bail!("the metadata does not fit in anything");
            }
        }
    }

    /// Builds the trees for these chunks, which may have too few blocks.
    fn trees_in(&self, layout: Layout) -> Result<Done> {
        let device = Packed::new(root::DEVICE, self.device_tree(&layout));
        let chunk = Packed::new(root::CHUNK, self.chunk_tree(&layout));
        // Until the places of all blocks are known, only the lengths of these items are right.
        let mut done = Done {
            layout,
            device,
            chunk,
            free: Packed::new(root::FREE_SPACE, Items::new()),
            extent: Packed::new(root::EXTENT, Items::new()),
            root: Packed::new(root::ROOT, Items::new()),
            places: Vec::new(),
            used: 0,
        };
        // Repeated until the numbers of blocks stay the same: the first pass doesn't know them.
        let mut own = (0, 0, 0);
        loop {
            done.place(self)?;
            done.free = Packed::new(root::FREE_SPACE, done.free_space_tree(self)?);
            done.extent = Packed::new(root::EXTENT, done.extent_tree(self)?);
            done.root = Packed::new(root::ROOT, done.root_tree(self)?);
            let now = (done.free.blocks(), done.extent.blocks(), done.root.blocks());
            if now == own {
                return Ok(done);
            }
            own = now;
        }
    }

    fn device_item(&self, layout: &Layout) -> Bytes {
        format::device_item(self.size, layout.allocated(), self.ids.device, self.ids.fs)
    }

    fn chunk_tree(&self, layout: &Layout) -> Items {
        let mut items = Items::new();
        items.insert(
            key(root::DEV_ITEMS, kind::DEV_ITEM, 1),
            self.device_item(layout),
        );
        for chunk in layout.chunks() {
            items.insert(
                key(root::FIRST, kind::CHUNK_ITEM, chunk.start),
                format::chunk_item(chunk, self.ids.device),
            );
        }
        items
    }

    fn device_tree(&self, layout: &Layout) -> Items {
        let extents = layout.chunks().map(|chunk| {
            (
                key(1, kind::DEV_EXTENT, chunk.start),
                format::device_extent(chunk, self.ids.chunk_tree),
            )
        });
        extents.collect()
    }
}

impl Done {
    /// Returns all trees except the chunk tree, which has its own chunk.
    fn packed<'a>(&'a self, maker: &'a Maker<'_>) -> [&'a Packed; 7] {
        [
            &maker.fs,
            &maker.csums,
            &maker.relocation,
            &self.device,
            &self.free,
            &self.extent,
            &self.root,
        ]
    }

    /// Assigns a place to each block of each tree.
    fn place(&mut self, maker: &Maker<'_>) -> Result<()> {
        let mut free = self.layout.metadata_blocks();
        let mut places = Vec::new();
        for packed in self.packed(maker) {
            let own = free.by_ref().take(to_usize(packed.blocks()));
            places.push(own.collect());
        }
        let system = self.layout.system_blocks();
        places.push(system.take(to_usize(self.chunk.blocks())).collect());
        let metadata = places.iter().flatten().count();
        let data: u64 = maker.extents.iter().map(|extent| extent.len).sum();
        self.used = to_u64(metadata) * NODE + data;
        self.places = places;
        Ok(())
    }

    /// Returns the address of the root of the tree at `nth` in [`Self::places`].
    fn root_of(&self, nth: usize) -> Result<u64> {
        let last = self.places.get(nth).and_then(|blocks| blocks.last());
        // In the first pass, a tree may have no place yet.
        Ok(last.copied().unwrap_or_default())
    }

    /// Returns the number of used bytes in a chunk. All used bytes are at the start of the chunk.
    fn used_in(&self, chunk: &Chunk, maker: &Maker<'_>) -> u64 {
        let inside = |address: u64| (chunk.start..chunk.end()).contains(&address);
        let blocks = self.places.iter().flatten();
        let blocks = blocks.filter(|&&block| inside(block)).count();
        let data = maker.extents.iter().filter(|extent| inside(extent.address));
        to_u64(blocks) * NODE + data.map(|extent| extent.len).sum::<u64>()
    }

    fn free_space_tree(&self, maker: &Maker<'_>) -> Result<Items> {
        let mut items = Items::new();
        for chunk in self.layout.chunks() {
            crate::terminal::interrupt::check()?;
            let used = self.used_in(chunk, maker);
            let free = chunk.len.saturating_sub(used);
            items.insert(
                key(chunk.start, kind::FREE_SPACE_INFO, chunk.len),
                format::free_space_info(u32::from(free > 0)),
            );
            if free > 0 {
                items.insert(
                    key(chunk.start + used, kind::FREE_SPACE_EXTENT, free),
                    Bytes::new(),
                );
            }
        }
        Ok(items)
    }

    fn extent_tree(&self, maker: &Maker<'_>) -> Result<Items> {
        let mut items = Items::new();
        for chunk in self.layout.chunks() {
            crate::terminal::interrupt::check()?;
            items.insert(
                key(chunk.start, kind::BLOCK_GROUP_ITEM, chunk.len),
                format::block_group(self.used_in(chunk, maker), chunk.kind),
            );
        }
        for extent in maker.extents {
            crate::terminal::interrupt::check()?;
            items.insert(
                key(extent.address, kind::EXTENT_ITEM, extent.len),
                format::data_extent(extent.inode, extent.offset),
            );
        }
        let trees = self.packed(maker).into_iter().chain([&self.chunk]);
        for (packed, places) in trees.zip(&self.places) {
            for (&address, level) in places.iter().zip(packed.levels()) {
                crate::terminal::interrupt::check()?;
                items.insert(
                    key(address, kind::METADATA_ITEM, level.into()),
                    format::metadata_extent(packed.owner()),
                );
            }
        }
        Ok(items)
    }

    fn root_tree(&self, maker: &Maker<'_>) -> Result<Items> {
        let mut items = Items::new();
        // All except the root tree itself and the chunk tree, to which the superblock points.
        for (nth, packed) in self.packed(maker).into_iter().enumerate().take(6) {
            let tree = format::Root {
                address: self.root_of(nth)?,
                level: packed.level(),
                subvolume: (packed.owner() == root::FS).then_some(maker.ids.subvolume),
                directory: match packed.owner() {
                    root::FS | root::DATA_RELOCATION => root::FIRST,
                    _ => 0,
                },
                time: maker.time,
            };
            items.insert(key(packed.owner(), kind::ROOT_ITEM, 0), tree.bytes());
        }
        // A directory in the root tree has one entry, `default`: the default subvolume.
        let directory = format::Inode {
            size: 0,
            nbytes: NODE,
            nlink: 1,
            mode: 0o040_755,
            time: (maker.time.into(), 0),
            ..Default::default()
        };
        items.insert(key(root::ROOT_DIR, kind::INODE_ITEM, 0), directory.bytes());
        items.insert(
            key(root::ROOT_DIR, kind::INODE_REF, root::ROOT_DIR),
            format::inode_ref(0, b".."),
        );
        items.insert(
            key(root::FS, kind::INODE_REF, root::ROOT_DIR),
            format::inode_ref(0, b"default"),
        );
        items.insert(
            key(
                root::ROOT_DIR,
                kind::DIR_ITEM,
                format::name_hash(b"default"),
            ),
            format::dir_item(
                &key(root::FS, kind::ROOT_ITEM, u64::MAX),
                format::file_type::DIRECTORY,
                b"default",
                b"",
            ),
        );
        Ok(items)
    }

    /// Writes all blocks of all trees, then the superblocks.
    fn write(&self, maker: &Maker<'_>, file: &File) -> Result<()> {
        let context = "cannot write the file system";
        let trees = self.packed(maker).into_iter().chain([&self.chunk]);
        for (packed, places) in trees.zip(&self.places) {
            packed.write(places, |address, body| {
                let block = format::block(address, body, maker.ids.fs, maker.ids.chunk_tree);
                crate::terminal::interrupt::check()?;
                file.write_all_at(&block, address).context(context)
            })?;
        }
        let system = self.layout.system();
        let superblock = format::Superblock {
            root: self.root_of(6)?,
            root_level: self.root.level(),
            chunk_root: self.root_of(7)?,
            chunk_root_level: self.chunk.level(),
            size: maker.size,
            used: self.used,
            device: maker.device_item(&self.layout),
            system_chunk: format::chunk_item(&system, maker.ids.device),
            system_start: system.start,
            fs: maker.ids.fs,
        };
        for address in SUPERBLOCKS {
            if address + SECTOR <= maker.size {
                file.write_all_at(&superblock.bytes(address), address)
                    .context(context)?;
            }
        }
        Ok(())
    }
}
