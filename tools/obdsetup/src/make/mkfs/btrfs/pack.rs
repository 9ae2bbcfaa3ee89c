// SPDX-License-Identifier: GPL-2.0

//! Packs the items of a tree into blocks: leaves with the items, and nodes above with pointers to
//! lower blocks, up to one root.

use anyhow::{Context, Result};
use overlaybd::format::num::to_u64;

use super::format::{Body, Bytes, Items, Key, ITEM_HEADER, POINTERS, ROOM};

/// A tree, and the distribution of its items over blocks. The order of the blocks is: all leaves, then the
/// nodes above the leaves, then those above them, and so on; the root is last.
pub(super) struct Packed {
    owner: u64,
    items: Vec<(Key, Bytes)>,
    /// The index of the first item of each leaf.
    leaves: Vec<usize>,
}

impl Packed {
    pub(super) fn new(owner: u64, items: Items) -> Self {
        let items: Vec<(Key, Bytes)> = items.into_iter().collect();
        let mut leaves = vec![0];
        let mut room = ROOM;
        for (nth, (_, data)) in items.iter().enumerate() {
            let needed = ITEM_HEADER + data.len();
            if needed > room {
                leaves.push(nth);
                room = ROOM;
            }
            room = room.saturating_sub(needed);
        }
        Self {
            owner,
            items,
            leaves,
        }
    }

    pub(super) fn owner(&self) -> u64 {
        self.owner
    }

    /// Returns the number of blocks in each level, the leaves first.
    fn in_levels(&self) -> Vec<usize> {
        let mut levels = vec![self.leaves.len()];
        while let Some(&below @ 2..) = levels.last() {
            levels.push(below.div_ceil(POINTERS));
        }
        levels
    }

    pub(super) fn blocks(&self) -> u64 {
        to_u64(self.in_levels().iter().sum())
    }

    /// Returns the level of the root.
    pub(super) fn level(&self) -> u8 {
        u8::try_from(self.in_levels().len() - 1).unwrap_or(u8::MAX)
    }

    /// Returns the level of each block, in the order of the blocks.
    pub(super) fn levels(&self) -> impl Iterator<Item = u8> {
        let levels = (0u8..).zip(self.in_levels());
        levels.flat_map(|(level, count)| std::iter::repeat_n(level, count))
    }

    /// Passes each block to `each`, with its address from `places`.
    pub(super) fn write(
        &self,
        places: &[u64],
        mut each: impl FnMut(u64, &Body) -> Result<()>,
    ) -> Result<()> {
        let mut places = places.iter().copied();
        let mut place = || places.next().context("a block has no place");
        let mut below: Vec<(Key, u64)> = Vec::new();
        let ends = self
            .leaves
            .iter()
            .copied()
            .skip(1)
            .chain([self.items.len()]);
        for (&start, end) in self.leaves.iter().zip(ends) {
            let items = self.items.get(start..end).unwrap_or_default();
            let address = place()?;
            each(address, &Body::leaf(self.owner, items)?)?;
            below.push((
                items.first().map(|&(key, _)| key).unwrap_or_default(),
                address,
            ));
        }
        for level in 1..=self.level() {
            let mut now = Vec::new();
            for pointers in below.chunks(POINTERS) {
                let address = place()?;
                each(address, &Body::node(self.owner, level, pointers)?)?;
                now.push((
                    pointers.first().map(|&(key, _)| key).unwrap_or_default(),
                    address,
                ));
            }
            below = now;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::format::{key, Items};
    use super::Packed;

    #[test]
    fn levels() -> anyhow::Result<()> {
        let items = |count: u64| {
            (0..count)
                .map(|nth| (key(nth, 1, 0), vec![0; 8000]))
                .collect()
        };
        let packed = Packed::new(5, Items::new());
        assert_eq!((packed.blocks(), packed.level()), (1, 0));
        let packed = Packed::new(5, items(2));
        assert_eq!((packed.blocks(), packed.level()), (1, 0));
        let packed = Packed::new(5, items(3));
        assert_eq!((packed.blocks(), packed.level()), (3, 1));
        let packed = Packed::new(5, items(2 * 493 + 1));
        assert_eq!((packed.blocks(), packed.level()), (494 + 2 + 1, 2));
        let places: Vec<u64> = (1..=packed.blocks()).collect();
        let mut last = 0;
        packed.write(&places, |address, body| {
            last = address;
            assert_eq!(
                Some(body.level()),
                packed.levels().nth(usize::try_from(address)? - 1)
            );
            Ok(())
        })?;
        assert_eq!(last, packed.blocks());
        Ok(())
    }
}
