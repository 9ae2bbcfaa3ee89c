// SPDX-License-Identifier: GPL-2.0

//! What a stack of layers changes, as the runs of one layer that can stand in its place.

use crate::format::lsmt::MAX_END;
use crate::format::SECTOR_SIZE;
use crate::lsmt_writer::{Run, Runs};
use crate::{LayerReader, Result, Stack};

/// Merges `layers`, lowest first, for [`runs`]: up to the last sector that a layer may have, as
/// segments may lie behind the virtual size, and a layer above that is larger shows them.
///
/// # Errors
///
/// [`Fault::LsmtLayerCount`](crate::format::Fault::LsmtLayerCount) and
/// [`Fault::LsmtMergedCount`](crate::format::Fault::LsmtMergedCount).
pub fn stack(layers: Vec<LayerReader>) -> Result<Stack> {
    Stack::with_size(layers, MAX_END * SECTOR_SIZE)
}

/// Virtual size in bytes of the layer: what it gives a stack that it is the topmost layer of, 0
/// where none of the layers has a size.
pub fn virtual_size(stack: &Stack) -> u64 {
    let mut sizes = stack.layers().iter().map(|l| l.lsmt().virtual_size());
    sizes.rfind(|&size| size != 0).unwrap_or(0)
}

/// The runs of sectors, ascending and of any length, of a layer that reads as the layers of `stack`
/// do. Without `zeroed`, it does so as the lowest layer only: nothing hides what would be below.
pub fn runs(stack: &Stack, zeroed: bool) -> Vec<Run> {
    // What shows no data, but has a zeroed segment, shows that one: data above it would show.
    let mut zeros: Vec<(u64, u64)> = Vec::new();
    if zeroed {
        let segments = stack.layers().iter().flat_map(LayerReader::segments);
        zeros.extend(
            segments
                .filter(|s| s.zeroed())
                .map(|s| (s.offset(), s.end())),
        );
        zeros.sort_unstable();
    }
    let mut zeros = zeros.into_iter().peekable();
    let mut runs = Runs::default();
    let mut at = 0;
    let data = stack.merged().iter().map(|s| (s.offset(), s.end()));
    for (start, end) in data.chain([(MAX_END, MAX_END)]) {
        // The gap in front of the data.
        while let Some(&(from, to)) = zeros.peek() {
            let from = from.max(at);
            if from >= start && to > at {
                break;
            }
            let stop = to.min(start);
            if from < stop {
                runs.push(from, stop - from, true);
                at = stop;
            }
            if to > end {
                break;
            }
            zeros.next();
        }
        if start < end {
            runs.push(start, end - start, false);
        }
        at = end;
    }
    runs.into_vec()
}
