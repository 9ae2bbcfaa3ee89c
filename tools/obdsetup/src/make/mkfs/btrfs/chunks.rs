// SPDX-License-Identifier: GPL-2.0

//! Divides the device into chunks: one for the chunk tree, then those for data, then those for metadata. No
//! chunk covers a copy of the superblock.

/// Size of a block of a tree in bytes.
pub(super) const NODE: u64 = 16384;

/// The purpose of a chunk.
pub(super) mod kind {
    pub(in super::super) const DATA: u64 = 1;
    pub(in super::super) const SYSTEM: u64 = 2;
    pub(in super::super) const METADATA: u64 = 4;
}

/// Chunks start and end at multiples of this.
const UNIT: u64 = 1 << 20;
/// The first MiB is for boot loaders and the superblock.
const FIRST: u64 = UNIT;
const SYSTEM_LEN: u64 = 4 << 20;
/// Longest chunk, as in the kernel.
const LONGEST: u64 = 1 << 30;
/// Addresses of the superblock's copies. 64 KiB are reserved for each; here, chunks leave out the whole MiB.
const COPIES: [u64; 2] = [64 << 20, 256 << 30];

/// A range of the device with one purpose, in bytes.
#[derive(Clone, Debug)]
pub(super) struct Chunk {
    pub(super) start: u64,
    pub(super) len: u64,
    /// One of the constants in the module [`kind`].
    pub(super) kind: u64,
}

impl Chunk {
    pub(super) fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// Returns chunks with room for `len` bytes, from byte `start` of the device on.
fn place(mut start: u64, len: u64, kind: u64) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    let mut left = len.next_multiple_of(UNIT);
    while left > 0 {
        if COPIES.contains(&start) {
            start += UNIT;
        }
        let copy = COPIES.into_iter().find(|&copy| copy > start);
        let room = copy.map_or(u64::MAX, |copy| copy - start);
        let len = left.min(LONGEST).min(room);
        chunks.push(Chunk { start, len, kind });
        start += len;
        left -= len;
    }
    chunks
}

/// Returns chunks with room for `len` bytes of data, after the chunk of the chunk tree.
pub(super) fn for_data(len: u64) -> Vec<Chunk> {
    place(FIRST + SYSTEM_LEN, len, kind::DATA)
}

/// All chunks.
pub(super) struct Layout {
    system: Chunk,
    data: Vec<Chunk>,
    metadata: Vec<Chunk>,
}

impl Layout {
    /// Returns the chunks `data`, the one for the chunk tree, and chunks with room for `blocks` blocks of
    /// metadata.
    pub(super) fn new(data: Vec<Chunk>, blocks: u64) -> Self {
        let system = Chunk {
            start: FIRST,
            len: SYSTEM_LEN,
            kind: kind::SYSTEM,
        };
        let start = data.last().unwrap_or(&system).end();
        // Some free space, so that small changes need no new chunks.
        let len = blocks * NODE;
        let metadata = place(start, len + len / 4 + (8 << 20), kind::METADATA);
        Self {
            system,
            data,
            metadata,
        }
    }

    pub(super) fn system(&self) -> Chunk {
        self.system.clone()
    }

    /// Returns all chunks in order.
    pub(super) fn chunks(&self) -> impl Iterator<Item = &Chunk> {
        [&self.system]
            .into_iter()
            .chain(&self.data)
            .chain(&self.metadata)
    }

    /// Returns the length of all chunks in bytes.
    pub(super) fn allocated(&self) -> u64 {
        self.chunks().map(|chunk| chunk.len).sum()
    }

    /// Returns the end of the last chunk.
    pub(super) fn end(&self) -> u64 {
        self.chunks().map(Chunk::end).max().unwrap_or_default()
    }

    /// Returns addresses for blocks of the chunk tree.
    pub(super) fn system_blocks(&self) -> impl Iterator<Item = u64> {
        blocks(&self.system)
    }

    /// Returns addresses for blocks of all other trees.
    pub(super) fn metadata_blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.metadata.iter().flat_map(blocks)
    }
}

fn blocks(chunk: &Chunk) -> impl Iterator<Item = u64> {
    let start = chunk.start;
    (0..chunk.len / NODE).map(move |nth| start + nth * NODE)
}

#[cfg(test)]
mod tests {
    use super::{for_data, COPIES};

    #[test]
    fn superblocks_stay_free() {
        let chunks = for_data(300 << 30);
        assert_eq!(chunks.iter().map(|chunk| chunk.len).sum::<u64>(), 300 << 30);
        for pair in chunks.windows(2) {
            assert!(pair[0].end() <= pair[1].start);
        }
        for copy in COPIES {
            assert!(!chunks
                .iter()
                .any(|chunk| (chunk.start..chunk.end()).contains(&copy)));
        }
    }
}
