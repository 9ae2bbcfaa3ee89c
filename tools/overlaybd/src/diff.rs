// SPDX-License-Identifier: GPL-2.0

//! Finds the sectors of a disk image that a layer must have: all that aren't in a hole, or all that
//! differ from the layers below.

use std::ops::Range;
use std::path::Path;

use crate::format::num::{to_u64, to_usize};
use crate::format::{Blob, SECTOR_SIZE};
use crate::identity::{Hasher, Pieces, PIECE};
use crate::lsmt_writer::{Run, Runs};
use crate::{is_zero, parallel, Error, FileBlob, Progress, Result, Stack};

/// How to compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Size in bytes of the unit that is compared and goes in the layer as a whole: a power of two
    /// from 512 to 1 MiB.
    pub granule: u64,
    /// Whether the lowest layer leaves out granules of zeros.
    pub skip_zeros: bool,
    /// Whether the layer has data for pages of zeros that aren't in a hole of the image, even if the
    /// layers below have no data there and read as zeros, too. File systems can map such pages. Without
    /// layers below, this has no effect, except that [`Diff::zeros`] is counted.
    pub keep_zeros: bool,
}

/// Size in bytes of the units for [`Options::keep_zeros`].
const PAGE: u64 = 4096;

/// What the layer has.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Diff {
    /// The runs of sectors, ascending; adjacent runs of the same kind are joined.
    pub runs: Vec<Run>,
    /// The hash of the layer's data in each piece of the disk that has data.
    pub pieces: Pieces,
    /// With [`Options::keep_zeros`]: bytes of granules of zeros that the layer has as data, although the disk below
    /// reads as zeros, too.
    pub zeros: u64,
}

/// A disk to make a layer of.
pub trait Image: Blob<Error = Error> + Sync {
    /// Returns the first range of bytes at or after `offset` that isn't in a hole; `None` if a hole reaches to the
    /// end. The range need not reach to the next hole: another range of data may follow it directly.
    fn next_data(&self, offset: u64) -> Option<Range<u64>>;

    /// Returns whether holes read like the layers below. Otherwise they read as zeros.
    fn shows_below(&self) -> bool;

    /// Returns the path for messages about read errors.
    fn path(&self) -> &Path;
}

impl Image for FileBlob {
    fn next_data(&self, offset: u64) -> Option<Range<u64>> {
        Self::next_data(self, offset)
    }

    fn shows_below(&self) -> bool {
        false
    }

    fn path(&self) -> &Path {
        Self::path(self)
    }
}

/// Returns what a layer over `base`, or a lowest layer, needs so that the stack reads like `image`.
/// Over `base`, granules that became zero are zeroed runs, and granules that read the same are left
/// out. A lowest layer has no zeroed runs.
///
/// The caller must have merged `base` with the size of `image`, see [`Stack::with_size`].
///
/// # Errors
///
/// Read errors, and the error that `progress` returns. `progress` counts bytes of the image.
pub fn of(
    image: &dyn Image,
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
    // Number of pieces that are compared at once: enough for all threads, few enough to keep their
    // results in memory.
    let batch = 4 * rayon::current_num_threads();
    let mut runs = Runs::default();
    let mut hashes = Vec::new();
    let mut zeros = 0;
    let mut at = 0;
    while at < size {
        let mut pieces = Vec::new();
        let begin = at;
        while at < size && pieces.len() < batch {
            let start = compare.next(at).map_or(size, |next| next - next % PIECE);
            at = size.min(start + PIECE);
            pieces.extend(Some(start..at).filter(|piece| !piece.is_empty()));
        }
        let found = parallel::map(
            pieces.iter(),
            usize::MAX,
            Buffers::default,
            |buffers, piece| {
                let found = compare.piece(piece, buffers)?;
                progress(piece.end - piece.start)?;
                Ok::<_, Error>(found)
            },
        );
        let found = found.collect::<Result<Vec<_>>>()?;
        for (found, hash, zeros_there) in found {
            zeros += zeros_there;
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
        zeros,
    })
}

/// Buffers for one piece of the image and of the layers below.
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

/// The runs of a piece; the number of the piece, and the hash of its data if it has data; [`Diff::zeros`] of the piece.
type Found = (Vec<Run>, Option<(u64, [u8; 32])>, u64);

/// The inputs of a comparison.
struct Compare<'a> {
    image: &'a dyn Image,
    base: Option<&'a Stack>,
    options: Options,
}

impl Compare<'_> {
    /// Returns the first byte at or after `at` that isn't in a hole of the image, or for which a
    /// layer below has data.
    fn next(&self, at: u64) -> Option<u64> {
        let data = self.image.next_data(at).map(|data| data.start);
        let below = self
            .base
            .filter(|_| !self.image.shows_below())
            .and_then(|base| base.next_data(at, self.image.size()));
        data.into_iter().chain(below).min()
    }

    /// Returns whether byte `at` isn't in a hole of the image.
    fn has_data(&self, at: u64) -> bool {
        self.image
            .next_data(at)
            .is_some_and(|data| data.start == at)
    }

    /// Compares the bytes `piece` of the disk. The piece begins at a multiple of [`PIECE`], and so of
    /// the granule. It ends at the next multiple, or at the end of the image.
    fn piece(&self, piece: &Range<u64>, buffers: &mut Buffers) -> Result<Found> {
        let granule = self.options.granule;
        let mut runs = Runs::default();
        let mut hasher = Hasher::default();
        let mut zeros = 0;
        let mut at = piece.start;
        while let Some(next) = self.next(at).filter(|&next| next < piece.end) {
            // A granule is compared as a whole.
            at = at.max(next - next % granule);
            let mut end = piece.end;
            if self.base.is_none() || self.image.shows_below() {
                // A hole may follow the range; other data is found in the next round.
                let data = self.image.next_data(at).map(|data| data.end);
                end = data.map_or(end, |data| end.min(data.next_multiple_of(granule)));
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
                let zero = || is_zero(new);
                // `None` leaves the granule out of the layer; `Some(true)` makes it zeroed.
                let zeroed = match self.base {
                    Some(base) if self.options.keep_zeros => {
                        let end = at + to_u64(new.len());
                        let pages = (at..end).step_by(to_usize(PAGE));
                        let mut with_data = pages.filter(|&page| self.has_data(page)).peekable();
                        // No page that has data in the image may be without data in the layer.
                        let any = with_data.peek().is_some();
                        match with_data.any(|page| !base.has_data(page)) {
                            true => Some(false),
                            false => (new != old).then(|| zero() && !any),
                        }
                    }
                    Some(_) => (new != old).then(zero),
                    None => Some(false).filter(|_| !(self.options.skip_zeros && zero())),
                };
                if let Some(zeroed) = zeroed {
                    let sectors = to_u64(new.len()).div_ceil(SECTOR_SIZE);
                    runs.push(at / SECTOR_SIZE, sectors, zeroed);
                    if !zeroed {
                        hasher.add(new);
                        if self.options.keep_zeros && new == old && zero() {
                            zeros += to_u64(new.len());
                        }
                    }
                }
                at += to_u64(new.len());
            }
        }
        let hash = hasher.finish(piece.start / PIECE);
        Ok((runs.into_vec(), hash, zeros))
    }
}
