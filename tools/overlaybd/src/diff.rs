// SPDX-License-Identifier: GPL-2.0

//! What of a disk image must go in a layer: all that isn't a hole, or all that differs from the
//! layers below.

use crate::format::num::{to_u64, to_usize};
use crate::format::{Blob, SECTOR_SIZE};
use crate::lsmt_writer::{Run, Runs};
use crate::{FileBlob, Progress, Result, Stack};

/// Bytes that are compared at once. A multiple of every granule.
const PIECE: u64 = 1 << 20;

/// How to compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Bytes that go in a layer or stay out of it together: a power of two from 512 to 1 MiB.
    pub granule: u64,
    /// Whether granules of zeros stay out where there is nothing below.
    pub skip_zeros: bool,
}

/// Finds the runs of sectors of `image` that a layer over `base` needs. What became zero is
/// zeroed, and what reads the same stays out.
///
/// `base` must have been merged with the size of `image`.
///
/// # Errors
///
/// What reading fails with, and what `progress` stops with; that is told the bytes of the image.
pub fn runs(
    image: &FileBlob,
    base: Option<&Stack>,
    options: Options,
    progress: Progress<'_>,
) -> Result<Vec<Run>> {
    let size = image.size();
    let mut runs = Runs::default();
    let (mut new, mut old) = (vec![0; to_usize(PIECE)], vec![0; to_usize(PIECE)]);
    let mut at = 0;
    while at < size {
        let data = image.next_data(at);
        let below = base.and_then(|base| base.next_data(at, size));
        let from_image = data.as_ref().map_or(size, |data| data.start);
        let next = from_image.min(below.unwrap_or(size));
        // Granules are never cut.
        let next = next - next % options.granule;
        if next > at || next >= size {
            progress(next - at)?;
            at = next;
            if data.is_none() && below.is_none() {
                progress(size - at)?;
                break;
            }
            continue;
        }

        let mut end = size.min(at + PIECE);
        if let (None, Some(data)) = (base, &data) {
            // Behind the data is a hole.
            end = end.min(data.end.next_multiple_of(options.granule));
        }
        let len = end - at;
        let new = new.get_mut(..to_usize(len)).unwrap_or_default();
        let old = old.get_mut(..to_usize(len)).unwrap_or_default();
        image.read_at(at, new)?;
        match base {
            Some(base) => base.read_at(at, old)?,
            None => old.fill(0),
        }
        let granule = to_usize(options.granule);
        let mut offset = at;
        for (new, old) in new.chunks(granule).zip(old.chunks(granule)) {
            let sectors = to_u64(new.len()).div_ceil(SECTOR_SIZE);
            let is_zero = || new.iter().all(|&byte| byte == 0);
            match base {
                Some(_) if new == old => {}
                Some(_) => runs.push(offset / SECTOR_SIZE, sectors, is_zero()),
                None if options.skip_zeros && is_zero() => {}
                None => runs.push(offset / SECTOR_SIZE, sectors, false),
            }
            offset += to_u64(new.len());
        }
        progress(len)?;
        at = end;
    }
    Ok(runs.into_vec())
}
