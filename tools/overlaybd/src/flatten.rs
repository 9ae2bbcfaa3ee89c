// SPDX-License-Identifier: GPL-2.0

//! Computes the runs of one layer that can replace several consecutive layers of a stack.

use crate::format::lsmt::MAX_END;
use crate::format::SECTOR_SIZE;
use crate::lsmt_writer::{Run, Runs};
use crate::{LayerReader, Result, Stack};

/// Merges `layers`, lowest first, for [`runs`]. The merged disk reaches to the last sector that a
/// layer can have: segments can be beyond the virtual size, and a larger layer above makes them
/// visible.
///
/// # Errors
///
/// [`Fault::LsmtLayerCount`](crate::format::Fault::LsmtLayerCount) and
/// [`Fault::LsmtMergedCount`](crate::format::Fault::LsmtMergedCount).
pub fn stack(layers: Vec<LayerReader>) -> Result<Stack> {
    Stack::with_size(layers, MAX_END * SECTOR_SIZE)
}

/// Returns the virtual size of the new layer in bytes: the size of a stack with this layer on top,
/// or 0 if none of the layers has a size.
pub fn virtual_size(stack: &Stack) -> u64 {
    let mut sizes = stack.layers().iter().map(|l| l.lsmt().virtual_size());
    sizes.rfind(|&size| size != 0).unwrap_or(0)
}

/// Returns the runs of sectors, ascending and of any length, of a layer that replaces the layers of
/// `stack`. Without `zeroed`, it can replace them only as the lowest layer, because it doesn't hide
/// data of layers below.
pub fn runs(stack: &Stack, zeroed: bool) -> Vec<Run> {
    // Sectors with a zeroed segment but no data in the merged index stay zeroed: in the merged
    // index, data of a higher layer replaces the zeroed segment.
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
        // The gap before the data.
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
