// SPDX-License-Identifier: GPL-2.0

//! Recognizes whether content that is read twice was changed in between, much faster than a SHA-256.
//!
//! Each block is hashed with NH, the hash function of UMAC, with words of 64 bits: the sum of the products of pairs of
//! words, to each of which a word of the key is added. For two different blocks and a random key, the chance of the
//! same hash is at most 2^-64, whoever chose the blocks, as long as the choice does not depend on the key. The key is
//! made for each run of the program, and neither it nor a hash leaves the program. A SHA-256 puts the hashes of the
//! blocks together.
//!
//! Source: J. Black, S. Halevi, H. Krawczyk, T. Krovetz, P. Rogaway, "UMAC: Fast and Secure Message Authentication",
//! CRYPTO 1999, section 4.

use std::sync::OnceLock;

use anyhow::{Context, Result};
use overlaybd::format::num::to_usize;
use rustix::io::retry_on_intr;
use rustix::rand::{getrandom, GetRandomFlags};
use sha2::{Digest, Sha256};

/// Size in bytes of a block of content, which is hashed as a whole. Elsewhere, blocks of zeros are holes.
pub(super) const BLOCK: u64 = 4096;
/// The same, for arrays.
const LEN: usize = to_usize(BLOCK);
/// Length of two words in bytes.
const PAIR: usize = 16;

/// A pair of words of the key for each pair of words of a block.
type Key = [[u64; 2]; LEN / PAIR];

/// Returns the key of this process.
fn key() -> Result<&'static Key> {
    static KEY: OnceLock<Key> = OnceLock::new();
    if let Some(key) = KEY.get() {
        return Ok(key);
    }
    let mut random = [0; LEN];
    let mut left = random.as_mut_slice();
    while !left.is_empty() {
        let done = retry_on_intr(|| getrandom(&mut *left, GetRandomFlags::empty()));
        let done = done.context("no random numbers")?;
        left = left.get_mut(done..).unwrap_or_default();
    }
    let mut new = [[0; 2]; LEN / PAIR];
    for (key, random) in new.iter_mut().zip(random.chunks_exact(PAIR)) {
        *key = words(random);
    }
    Ok(KEY.get_or_init(|| new))
}

/// Returns the two words in `pair`.
fn words(pair: &[u8]) -> [u64; 2] {
    let word = |bytes: Option<&[u8; 8]>| bytes.copied().map_or(0, u64::from_le_bytes);
    [word(pair.first_chunk()), word(pair.last_chunk())]
}

/// Hashes content, block by block.
pub(super) struct Witness {
    key: &'static Key,
    /// The hash of the bytes of the block so far, and their number.
    sum: u128,
    at: usize,
    blocks: Sha256,
}

/// What a [`Witness`] has seen.
pub(super) type Seen = [u8; 32];

impl Witness {
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            key: key()?,
            sum: 0,
            at: 0,
            blocks: Sha256::new(),
        })
    }

    /// Adds data. All pieces but the last one must have a multiple of 16 bytes.
    pub(super) fn add(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            let (now, rest) = data.split_at(data.len().min(LEN - self.at));
            let key = self.key.get(self.at / PAIR..).unwrap_or_default();
            self.sum = self.sum.wrapping_add(nh(now, key));
            self.at += now.len().next_multiple_of(PAIR);
            if self.at >= LEN {
                self.end_block();
            }
            data = rest;
        }
    }

    fn end_block(&mut self) {
        self.blocks.update(self.sum.to_le_bytes());
        (self.sum, self.at) = (0, 0);
    }

    pub(super) fn finish(mut self) -> Seen {
        if self.at > 0 {
            self.end_block();
        }
        self.blocks.finalize().into()
    }
}

/// Returns the NH of `data`, which zeros fill up to whole pairs of words.
fn nh(data: &[u8], key: &[[u64; 2]]) -> u128 {
    let product = |[a, b]: [u64; 2], &[c, d]: &[u64; 2]| {
        u128::from(a.wrapping_add(c)) * u128::from(b.wrapping_add(d))
    };
    let pairs = data.chunks_exact(PAIR);
    let rest = pairs.remainder();
    let mut sum = 0_u128;
    for (pair, key) in pairs.zip(key) {
        sum = sum.wrapping_add(product(words(pair), key));
    }
    if let (false, Some(key)) = (rest.is_empty(), key.get(data.len() / PAIR)) {
        let mut pair = [0; PAIR];
        for (to, from) in pair.iter_mut().zip(rest) {
            *to = *from;
        }
        sum = sum.wrapping_add(product(words(&pair), key));
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::{key, nh, Seen, Witness, LEN};

    fn seen(data: &[u8], piece: usize) -> anyhow::Result<Seen> {
        let mut witness = Witness::new()?;
        data.chunks(piece).for_each(|piece| witness.add(piece));
        Ok(witness.finish())
    }

    #[test]
    fn known_sums() {
        // (1 + 3) * (2 + 5) + (2^64 - 1 + 2) * (0 + 9), the first sum of the second product modulo 2^64.
        let data = [1_u64, 2, u64::MAX, 0].map(u64::to_le_bytes).concat();
        let key = [[3, 5], [2, 9]];
        assert_eq!(nh(&data, &key), 4 * 7 + 9);
        // Zeros fill up the last pair.
        assert_eq!(nh(&data[..24], &key), 4 * 7 + 9);
        assert_eq!(nh(&[1], &key), 4 * 5);
        assert_eq!(nh(&[], &key), 0);
        let large = [[u64::MAX; 2]; 3];
        let square = u128::from(u64::MAX) * u128::from(u64::MAX);
        assert_eq!(nh(&[0; 48], &large), square.wrapping_mul(3));
    }

    #[test]
    fn each_bit_and_each_place_counts() -> anyhow::Result<()> {
        let data = (0..=u8::MAX).cycle().step_by(7).zip(0_u8..=96);
        let data: Vec<u8> = data.map(|(a, b)| a ^ b).collect();
        let data = data.repeat(128)[..3 * LEN + 100].to_vec();
        let wanted = seen(&data, data.len())?;
        for piece in [16, 512, LEN, LEN + 16, 2 * LEN] {
            assert_eq!(seen(&data, piece)?, wanted, "{piece}");
        }
        for at in (0..data.len()).step_by(61).chain([data.len() - 1]) {
            let mut other = data.clone();
            other[at] ^= 1 << (at % 8);
            assert_ne!(seen(&other, 512)?, wanted, "{at}");
        }
        // Blocks that change places, and pairs of words that do.
        let swapped = [&data[LEN..2 * LEN], &data[..LEN], &data[2 * LEN..]].concat();
        assert_ne!(seen(&swapped, LEN)?, wanted);
        let swapped = [&data[16..32], &data[..16], &data[32..]].concat();
        assert_ne!(seen(&swapped, LEN)?, wanted);
        assert_ne!(seen(&data[..LEN], LEN)?, wanted);
        Ok(())
    }

    #[test]
    fn the_key_is_random() -> anyhow::Result<()> {
        let mut words = key()?.as_flattened().to_vec();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), LEN / 8);
        Ok(())
    }
}
