// SPDX-License-Identifier: GPL-2.0

//! Computes how coarse a comparison must be for the layer's index to stay within its limit.

use crate::format::num::to_u64;
use crate::format::SECTOR_SIZE;
use crate::lsmt_writer::{cut, padded, Run, Runs};

/// The coarsest granule of a comparison, in bytes.
pub const MAX_GRANULE: u64 = 1 << 20;

/// Returns the smallest granule, a power of two of at least `granule` bytes, with which the layer of
/// `runs` has at most `max` index entries. Returns `None` if even [`MAX_GRANULE`] gives more.
///
/// The result is exact for a lowest layer. For a layer over others, a granule that was zeroed in
/// part can become data as a whole, which can join or split runs: the caller compares again and
/// calls this again.
pub fn granule(runs: &[Run], granule: u64, max: u64) -> Option<u64> {
    let sizes = std::iter::successors(Some(granule), |size| size.checked_mul(2));
    let mut sizes = sizes.take_while(|&size| size <= MAX_GRANULE);
    sizes.find(|size| entries(runs, size / SECTOR_SIZE) <= max)
}

/// Returns the number of index entries, padding included, of `runs` in units of `unit` sectors.
fn entries(runs: &[Run], unit: u64) -> u64 {
    // A layer for DAX has a few entries more than others.
    padded(to_u64(cut(units(runs, unit, u64::MAX), true).count()))
}

/// Returns `runs`, which are ascending, in units of `unit` sectors: each unit that has a part of a run goes in as a
/// whole, up to sector `size` of the disk. Adjacent runs of the same kind are joined.
pub fn units(runs: &[Run], unit: u64, size: u64) -> Vec<Run> {
    let mut coarse = Runs::default();
    // First sector after the units so far.
    let mut end = 0;
    for run in runs {
        let start = (run.offset - run.offset % unit).max(end);
        let behind = run.end().next_multiple_of(unit).min(size);
        if start < behind {
            coarse.push(start, behind - start, run.zeroed);
            end = behind;
        }
    }
    coarse.into_vec()
}

#[cfg(test)]
mod tests {
    use super::{granule, units};
    use crate::lsmt_writer::Run;

    fn run(offset: u64, length: u64) -> Run {
        Run {
            offset,
            length,
            zeroed: false,
        }
    }

    #[test]
    fn units_end_with_the_disk() {
        let runs = [run(8, 8), run(24, 8), run(40, 8), run(96, 4)];
        assert_eq!(units(&runs, 8, 100), runs);
        assert_eq!(units(&runs, 16, 100), [run(0, 48), run(96, 4)]);
        assert_eq!(units(&runs, 64, 100), [run(0, 100)]);
        assert_eq!(units(&[], 8, 100), []);
    }

    #[test]
    fn as_coarse_as_needed() {
        // 4 KiB of data alternate with 4 KiB of zeros.
        let mut runs: Vec<Run> = (0..1000).map(|at| run(at * 16, 8)).collect();
        assert_eq!(granule(&runs, 4096, 1024), Some(4096));
        assert_eq!(granule(&runs, 4096, 1023), Some(8192));
        // In units of 8 KiB, everything is one run.
        assert_eq!(granule(&runs, 4096, 256), Some(8192));
        assert_eq!(granule(&runs, 4096, 255), None);
        // One run in each MiB: no unit joins them.
        runs = (0..1000).map(|at| run(at * 4096, 8)).collect();
        assert_eq!(granule(&runs, 512, 1023), None);
        assert_eq!(granule(&[], 512, 0), Some(512));
    }
}
