// SPDX-License-Identifier: GPL-2.0

//! Stores of changes, written as dm-snapshot does.

#![allow(dead_code, missing_docs, unreachable_pub)]

use overlaybd::changes::head::SIZE;
use overlaybd::changes::{Head, Host, Origin, State};

/// A chunk of the disk, and what is in it.
pub type Chunk = (u64, Vec<u8>);

/// The head of a store with `chunks` chunks of 4 KiB, for a disk of `sectors` sectors.
pub fn head(sectors: u64, chunks: u64, origin: Origin) -> Head {
    Head {
        state: State::Closed,
        disk: sectors,
        store: chunks * 8,
        chunk: 8,
        origin,
        host: Host::default(),
    }
}

/// Number of exceptions in an area of a store with this head.
pub fn per_area(head: &Head) -> u64 {
    u64::from(head.chunk) * 512 / 16
}

/// The chunk of the store that gets the data of exception `nth`.
pub fn place(head: &Head, nth: u64) -> u64 {
    2 + nth + nth / per_area(head)
}

/// Byte offset of exception `nth`.
pub fn entry(head: &Head, nth: u64) -> u64 {
    let area = 1 + nth / per_area(head) * (per_area(head) + 1);
    SIZE + area * head.chunk_bytes() + nth % per_area(head) * 16
}

/// The bytes of the store that are not zeros, with their offsets, after `chunks` were written in this order.
pub fn pieces(head: &Head, chunks: &[Chunk]) -> Vec<(u64, Vec<u8>)> {
    let header = [0x7041_6e53, 1, 1, head.chunk].map(u32::to_le_bytes);
    let mut pieces = vec![(0, head.to_bytes().to_vec()), (SIZE, header.concat())];
    for (nth, (old, bytes)) in (0..).zip(chunks) {
        let new = place(head, nth);
        let exception = [*old, new].map(u64::to_le_bytes);
        pieces.push((entry(head, nth), exception.concat()));
        pieces.push((SIZE + new * head.chunk_bytes(), bytes.clone()));
    }
    pieces
}

/// The whole store after `chunks` were written in this order.
pub fn store(head: &Head, chunks: &[Chunk]) -> Vec<u8> {
    let mut bytes = vec![0; (SIZE + head.store * 512) as usize];
    for (at, piece) in pieces(head, chunks) {
        bytes[at as usize..][..piece.len()].copy_from_slice(&piece);
    }
    bytes
}
