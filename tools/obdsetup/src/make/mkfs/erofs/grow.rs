// SPDX-License-Identifier: GPL-2.0

//! Puts a layer of an image over an erofs. Existing data keeps its place, and new data is written after
//! the end of the disk. So the OverlayBD layer has only new content, and the inodes and directories that
//! change.
//!
//! - The inodes of files, links and devices never change, except for their link counts: a layer that
//!   changes a file replaces it by a new one.
//! - The inode of a directory stays where it is while it fits there. Entries that don't fit beside
//!   the inode any more are moved to blocks after the end of the disk.
//! - The superblock has only 16 bits for the place of the root directory's inode, so this inode never
//!   moves. Its entries are always in blocks. In a new file system, the next inode is in the next block,
//!   which leaves room for more extended attributes of the root directory.
//!
//! The result depends only on the disk below, the tree, and the UUID and time that the caller gives.

use std::collections::HashMap;

use anyhow::{Context, Result};
use overlaybd::format::num::to_u64;
use uuid::Uuid;

use super::disk::Disk;
use super::read::{Placed, State};
use super::write::{
    blocks, can_be_at, check_end, layout, place_inode, subdirectories, too_long, Out, Plan,
    Planner, Relations, Summary, Writer, BLOCK, INODE, INODES_AT, SLOT,
};
use crate::make::mkfs::tree::{Id, Kind, ROOT};
use crate::terminal::bar::Bar;
use crate::terminal::exit::Failure;

/// What the user can do if the file system becomes too large.
const FULL: &str = "make one layer of the image's files, with --fs btrfs";
/// What the user can do if erofs cannot store a file's extended attributes.
const TOO_LONG: &str = "make one layer of the image's files, with --fs squashfs";
/// Offset of the link count in an inode, in bytes.
const LINKS_AT: u64 = 44;

/// Writes the tree of `state` to `disk`, which has parts of it already. `stamp` is the UUID and the time of
/// creation. Returns the new number of blocks of the file system.
pub(super) fn write(state: &State, disk: &Disk, stamp: (Uuid, u32)) -> Result<u64> {
    let (tree, placed) = (&state.tree, &state.placed);
    let names = tree.names();
    let Relations { links, parents } = Relations::of(&names);
    let mut order = vec![(ROOT, None)];
    let firsts = names.iter().filter(|name| name.first);
    order.extend(firsts.map(|name| (name.id, Some(name))));

    let mut planner = Planner::new(tree, order.iter().map(|&(id, _)| id))?;
    let mut plans: HashMap<Id, Plan> = HashMap::new();
    let mut to_write = Vec::new();
    let mut end = match disk.blocks() {
        0 => INODES_AT,
        blocks => blocks * BLOCK,
    };
    let root_room = root_room(placed);
    for &(id, name) in &order {
        let directory = matches!(tree.node(id)?.kind, Kind::Directory(_));
        let links = match directory {
            true => 2 + subdirectories(tree, id)?,
            false => links.get(&id).copied().unwrap_or(1),
        };
        let there = placed.get(&id);
        let plan = match there {
            Some(there) if !directory => Plan::in_place(there.at, links),
            _ => {
                to_write.push(id);
                let plan = planner.plan(id)?;
                let mut plan = plan.ok_or_else(|| too_long(&names, name, TOO_LONG))?;
                plan.links = links;
                let room = match id {
                    ROOT => {
                        plan.layout = layout::PLAIN;
                        root_room
                    }
                    _ => there.map(|there| there.room),
                };
                plan.at = match there.filter(|there| stays(&mut plan, there.at, room)) {
                    Some(there) => there.at,
                    None if id == ROOT && there.is_some() => {
                        return Err(Failure::usage(
                            "the root directory gets more extended attributes than there is room \
                             for: make one layer of the image, with `convert' of a tar of its files",
                        ));
                    }
                    None => {
                        let at = place_inode(end, &plan);
                        end = at + INODE + to_u64(plan.xattrs.len()) + plan.beside();
                        if id == ROOT {
                            end = end.next_multiple_of(BLOCK);
                        }
                        at
                    }
                };
                plan
            }
        };
        plans.insert(id, plan);
    }
    let mut next = end.div_ceil(BLOCK);
    for &id in &to_write {
        let plan = plans.get_mut(&id).context("no plan")?;
        let blocks = blocks(tree.node(id)?, plan);
        match placed.get(&id) {
            Some(there) if there.blocks >= blocks => plan.block = there.block,
            _ => {
                plan.block = next;
                next += blocks;
                check_end(next, FULL)?;
            }
        }
    }
    check_end(next, FULL)?;

    let data: u64 = to_write
        .iter()
        .filter_map(|&id| match tree.node(id).map(|node| &node.kind) {
            Ok(Kind::File(content)) => Some(content.data_len()),
            _ => None,
        })
        .sum();
    let bar = Bar::new("writing", data);
    let writer = Writer {
        tree,
        plans: &plans,
        parents: &parents,
        out: disk,
    };
    for &id in &to_write {
        let at = writer.plans.get(&id).context("no plan")?.at;
        let [a, b, c, d, ..] = (at / SLOT).to_le_bytes();
        writer.node(id, u32::from_le_bytes([a, b, c, d]), &bar)?;
    }
    for (id, there) in placed {
        // A node without a name has no plan. A node that has moved was written above, with its link count.
        let plan = writer.plans.get(id).filter(|plan| plan.at == there.at);
        if let Some(plan) = plan.filter(|plan| plan.links != there.links) {
            disk.write(&plan.links.to_le_bytes(), there.at + LINKS_AT)?;
        }
    }
    writer.superblock(&Summary {
        stamp,
        inodes: to_u64(order.len()),
        blocks: next,
        chunks: state.chunks || writer.has_chunks(),
        prints: state.prints || writer.has_prints(),
    })?;
    Ok(next)
}

/// Returns whether the inode of a directory can stay at `at`, where there are `room` bytes for the inode and the
/// data beside it. Changes the plan to have the entries in blocks if they cannot be beside the inode.
fn stays(plan: &mut Plan, at: u64, room: Option<u64>) -> bool {
    let room = room.unwrap_or_default();
    let needed = |plan: &Plan| INODE + to_u64(plan.xattrs.len()) + plan.beside();
    if plan.layout == layout::INLINE && (needed(plan) > room || !can_be_at(at, plan)) {
        plan.layout = layout::PLAIN;
    }
    needed(plan) <= room
}

/// Returns the number of bytes for the inode of the root directory at its place: up to the next inode or the
/// end of the block. Data is only in later blocks.
fn root_room(placed: &HashMap<Id, Placed>) -> Option<u64> {
    let root = placed.get(&ROOT)?;
    let others = placed.values().map(|other| other.at);
    let next = others.filter(|&at| at > root.at).min();
    let end = (root.at / BLOCK + 1) * BLOCK;
    let end = next.unwrap_or(end).min(end);
    Some(root.room.max(end - root.at))
}
