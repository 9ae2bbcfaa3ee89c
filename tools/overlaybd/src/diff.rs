// SPDX-License-Identifier: GPL-2.0

//! What of a disk image must go in a layer: all that isn't a hole, or all that differs from the
//! layers below.

use std::ops::Range;

use rayon::prelude::*;

use crate::format::num::{to_u64, to_usize};
use crate::format::{Blob, SECTOR_SIZE};
use crate::identity::{Hasher, Pieces, PIECE};
use crate::lsmt_writer::{Run, Runs};
use crate::{FileBlob, Progress, Result, Stack};

/// How to compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Bytes that go in a layer or stay out of it together: a power of two from 512 to 1 MiB.
    pub granule: u64,
    /// Whether granules of zeros stay out where there is nothing below.
    pub skip_zeros: bool,
}

/// What goes in a layer.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Diff {
    /// The runs of sectors, ascending, joined where they touch.
    pub runs: Vec<Run>,
    /// The hashes of their data.
    pub pieces: Pieces,
}

/// Finds what a layer over `base` needs of `image`. What became zero is zeroed, and what reads the
/// same stays out.
///
/// `base` must have been merged with the size of `image`.
///
/// # Errors
///
/// What reading fails with, and what `progress` stops with; that is told the bytes of the image.
pub fn of(
    image: &FileBlob,
    base: Option<&Stack>,
    options: Options,
    progress: Progress<'_>,
) -> Result<Diff> {
    let size = image.size();
    let compare = Compare {
        image,
        base,
        options,
    };
    // Enough for all threads, and few enough to keep what they find in memory.
    let batch = 4 * rayon::current_num_threads();
    let mut runs = Runs::default();
    let mut hashes = Vec::new();
    let mut at = 0;
    while at < size {
        let mut pieces = Vec::new();
        let begin = at;
        while at < size && pieces.len() < batch {
            let start = compare.next(at).map_or(size, |next| next - next % PIECE);
            at = size.min(start + PIECE);
            pieces.extend(Some(start..at).filter(|piece| !piece.is_empty()));
        }
        let found = pieces
            .par_iter()
            .map_init(Buffers::default, |buffers, piece| {
                let found = compare.piece(piece, buffers)?;
                progress(piece.end - piece.start)?;
                Ok(found)
            })
            .collect::<Result<Vec<_>>>()?;
        for (found, hash) in found {
            for Run {
                offset,
                length,
                zeroed,
            } in found
            {
                runs.push(offset, length, zeroed);
            }
            hashes.extend(hash);
        }
        let inside: u64 = pieces.iter().map(|piece| piece.end - piece.start).sum();
        progress(at - begin - inside)?;
    }
    Ok(Diff {
        runs: runs.into_vec(),
        pieces: Pieces::collect(hashes),
    })
}

/// Memory for a piece of the image, and for what is below it.
struct Buffers {
    new: Vec<u8>,
    old: Vec<u8>,
}

impl Default for Buffers {
    fn default() -> Self {
        let buffer = || vec![0; to_usize(PIECE)];
        Self {
            new: buffer(),
            old: buffer(),
        }
    }
}

/// The runs of a piece, and the hash of their data.
type Found = (Vec<Run>, Option<(u64, [u8; 32])>);

/// What is compared.
struct Compare<'a> {
    image: &'a FileBlob,
    base: Option<&'a Stack>,
    options: Options,
}

impl Compare<'_> {
    /// First byte at or behind `at` that isn't in a hole, or has something below.
    fn next(&self, at: u64) -> Option<u64> {
        let data = self.image.next_data(at).map(|data| data.start);
        let below = self
            .base
            .and_then(|base| base.next_data(at, self.image.size()));
        data.into_iter().chain(below).min()
    }

    /// Compares the bytes `piece` of the disk: a multiple of every granule, or the end.
    fn piece(&self, piece: &Range<u64>, buffers: &mut Buffers) -> Result<Found> {
        let granule = self.options.granule;
        let mut runs = Runs::default();
        let mut hasher = Hasher::default();
        let mut at = piece.start;
        while let Some(next) = self.next(at).filter(|&next| next < piece.end) {
            // Granules are never cut.
            at = at.max(next - next % granule);
            let mut end = piece.end;
            if let (None, Some(data)) = (self.base, self.image.next_data(at)) {
                // Behind the data is a hole.
                end = end.min(data.end.next_multiple_of(granule));
            }
            let len = to_usize(end - at);
            let new = buffers.new.get_mut(..len).unwrap_or_default();
            let old = buffers.old.get_mut(..len).unwrap_or_default();
            self.image
                .read_at(at, new)
                .map_err(|error| error.in_file(self.image.path()))?;
            match self.base {
                Some(base) => base.read_at(at, old)?,
                None => old.fill(0),
            }
            let granule = to_usize(granule);
            for (new, old) in new.chunks(granule).zip(old.chunks(granule)) {
                let zero = || new.iter().all(|&byte| byte == 0);
                // Whether it goes in the layer, and there as zeros.
                let zeroed = match self.base {
                    Some(_) => (new != old).then(zero),
                    None => Some(false).filter(|_| !(self.options.skip_zeros && zero())),
                };
                if let Some(zeroed) = zeroed {
                    let sectors = to_u64(new.len()).div_ceil(SECTOR_SIZE);
                    runs.push(at / SECTOR_SIZE, sectors, zeroed);
                    if !zeroed {
                        hasher.add(new);
                    }
                }
                at += to_u64(new.len());
            }
        }
        Ok((runs.into_vec(), hasher.finish(piece.start / PIECE)))
    }
}
