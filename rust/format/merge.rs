// SPDX-License-Identifier: GPL-2.0

//! Merges the indexes of a stack of layers into one.
//!
//! If layers overlap, the topmost one that has a segment wins; a zeroed segment hides the layers
//! below. Sectors that read as zeros need no segment: the merged index has only segments with data.

use core::num::NonZeroU64;
use core::ops::{Deref, DerefMut};

use super::heap;
use super::lsmt::{Segment, MAX_END};
use super::num::{to_u64, to_usize};
use super::{Error, Fault, SECTOR_SIZE};

/// Largest number of layers in a stack.
pub const MAX_LAYERS: usize = 255;
/// Largest number of segments in a merged index.
pub const MAX_SEGMENTS: u64 = 128_000_000;
/// Number of segments that are processed between two calls of `pause`.
pub const PAUSE: u32 = 1 << 16;

/// Returns the size in bytes of the disk of a stack of layers, whose virtual sizes in bytes are
/// `sizes`, lowest first: that of the topmost layer whose virtual size isn't 0.
///
/// # Errors
///
/// [`Fault::LsmtVirtualSize`] if there is no such layer.
pub fn virtual_size(sizes: impl DoubleEndedIterator<Item = u64>) -> Result<u64, Error> {
    sizes
        .rev()
        .find(|&size| size != 0)
        .ok_or(Error::new(Fault::LsmtVirtualSize, 0, 0))
}

/// Returns the number of sectors of a disk of `bytes` bytes. The last sector may be a partial one.
pub const fn sectors(bytes: u64) -> u64 {
    bytes.div_ceil(SECTOR_SIZE)
}

/// The begin or the end of a segment of a layer. Events are ordered by sector, then by layer.
///
/// Packed in one word, so that one instruction compares two events: the layer in the lowest 8 bits,
/// the sector in 51 bits above.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Event(u64);

impl Event {
    const LAYER_BITS: u32 = 8;

    fn new(sector: u64, layer: u8) -> Self {
        Self(sector << Self::LAYER_BITS | u64::from(layer))
    }

    fn sector(self) -> u64 {
        self.0 >> Self::LAYER_BITS
    }

    fn layer(self) -> u8 {
        (self.0 & 0xff) as u8
    }
}

/// A set of layers, by their numbers.
#[derive(Default)]
struct LayerSet([u64; 4]);

impl LayerSet {
    fn toggle(&mut self, layer: u8) {
        if let Some(word) = self.0.get_mut(usize::from(layer / 64)) {
            *word ^= 1 << (layer % 64);
        }
    }

    fn contains(&self, layer: u8) -> bool {
        self.0
            .get(usize::from(layer / 64))
            .is_some_and(|word| word >> (layer % 64) & 1 != 0)
    }

    fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|&word| word != 0)?;
        let bit = self.0.get(word)?.ilog2();
        u8::try_from(word * 64 + bit as usize).ok()
    }
}

/// Merges the segments of `layers`, lowest first. Passes the resulting segments with data to
/// `sink`, in ascending order, with the number of their layer as the tag. Segments end at or before
/// sector `limit`.
///
/// The segments of each layer must be in ascending order and must not overlap. `heap` and `cursors`
/// are working memory, with at least one element for each layer. Takes time n · log(layers) for n
/// segments in total. Calls `pause` about every [`PAUSE`] segments.
///
/// # Errors
///
/// [`Fault::LsmtLayerCount`], [`Fault::LsmtMergedCount`], and the first error of `sink` or `pause`.
pub fn merge<L, E>(
    layers: &[L],
    limit: u64,
    heap: &mut [Event],
    cursors: &mut [u32],
    mut sink: impl FnMut(Segment) -> Result<(), E>,
    mut pause: impl FnMut() -> Result<(), E>,
) -> Result<(), E>
where
    L: Deref<Target = [Segment]>,
    E: From<Error>,
{
    let bad_count = Error::new(Fault::LsmtLayerCount, 0, to_u64(layers.len()));
    if layers.is_empty() || layers.len() > MAX_LAYERS {
        return Err(bad_count.into());
    }
    let cursors = cursors.get_mut(..layers.len()).ok_or(bad_count)?;
    let heap = heap.get_mut(..layers.len()).ok_or(bad_count)?;
    let segment = |layer: u8, cursor: u32| -> Option<Segment> {
        layers
            .get(usize::from(layer))?
            .get(cursor as usize)
            .copied()
    };

    cursors.fill(0);
    let mut waiting = 0;
    // `zip` polls the layers first, so it never asks the counter for the number after the last
    // layer's, which may overflow.
    for (_, layer) in layers.iter().zip(0u8..) {
        if let Some(first) = segment(layer, 0) {
            *heap.get_mut(waiting).ok_or(bad_count)? = Event::new(first.offset(), layer);
            waiting += 1;
        }
    }
    let mut heap = heap.get_mut(..waiting).ok_or(bad_count)?;
    heap::make(heap);

    let mut open = LayerSet::default();
    // The visible segment with its layer. It is visible from sector `since` on.
    let mut top: Option<(u8, Segment)> = None;
    let mut since = 0;
    let mut count = 0;
    let mut events: u32 = 0;
    while let Some(&event) = heap.first() {
        events = events.wrapping_add(1);
        if events % (2 * PAUSE) == 0 {
            pause()?;
        }
        let (layer, sector) = (event.layer(), event.sector());
        let cursor = cursors.get_mut(usize::from(layer)).ok_or(bad_count)?;
        let next = if open.contains(layer) {
            *cursor += 1;
            segment(layer, *cursor).map(|next| next.offset())
        } else {
            segment(layer, *cursor).map(|this| this.end())
        };
        open.toggle(layer);
        heap = heap::replace_first(heap, next.map(|sector| Event::new(sector, layer)));

        // Events of layers below the visible one change nothing.
        if top.is_some_and(|(shown, _)| layer < shown) {
            continue;
        }
        let end = sector.min(limit);
        if let Some((tag, shown)) = top.filter(|(_, shown)| !shown.zeroed()) {
            if let Some(part) = shown.part(since, end, tag) {
                count += 1;
                if count > MAX_SEGMENTS {
                    return Err(Error::new(Fault::LsmtMergedCount, 0, count).into());
                }
                sink(part)?;
            }
        }
        if sector >= limit {
            break;
        }
        since = sector;
        top = open.highest().and_then(|layer| {
            let cursor = cursors.get(usize::from(layer))?;
            Some((layer, segment(layer, *cursor)?))
        });
    }
    Ok(())
}

/// The result of looking up a sector: where to read this sector and the sectors after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// The data of `len` sectors is in layer `layer`, from sector `sector` on.
    Data {
        /// Number of the layer; the lowest is 0.
        layer: u8,
        /// First sector of the data, counted as in [`Segment::moffset`].
        sector: u64,
        /// Number of sectors up to the end of the segment.
        len: u64,
    },
    /// `len` sectors read as zeros.
    Zeros {
        /// Number of sectors up to the next segment, or to [`MAX_END`] if there is none.
        len: u64,
    },
}

/// Smallest average number of segments in a run of an [`Index`] with more than [`FEW_SEGMENTS`].
const RUN_SEGMENTS: u64 = 16;

/// Up to this number of segments, an [`Index`] has up to one run for each segment. If the segments
/// are spread evenly, almost nothing is left to search. This takes up to 4 bytes for each segment,
/// which is little memory in total.
const FEW_SEGMENTS: usize = 4096;

/// A merged index for lookups of sectors.
///
/// A search in a large index mostly waits for memory. So the disk is divided into runs of sectors,
/// with several segments on average. An array has the number of segments before each run. Two
/// neighbouring elements of the array bound the few segments that a lookup has to search. If most
/// segments are in few runs, the search may take log(segments) steps, as it would without runs.
pub struct Index<S, R> {
    /// Segments with data, in ascending order and without overlap.
    segments: S,
    /// For each run, and for the end of the last one, the number of segments that begin before it.
    runs: R,
    /// A run has 2^`shift` sectors; `shift` is less than 64.
    shift: u32,
}

/// Returns, for an index of `segments`, the binary logarithm of the length of a run in sectors, and
/// the length of the array of runs: their number, and one for the end.
fn run_shape(segments: &[Segment]) -> (u32, usize) {
    let last = segments.last().map_or(0, Segment::offset);
    let count = to_u64(segments.len());
    let runs = match segments.len() <= FEW_SEGMENTS {
        true => count,
        false => count / RUN_SEGMENTS,
    };
    let most = NonZeroU64::new(runs).unwrap_or(NonZeroU64::MIN);
    // So `last` is less than `most * 2^shift`.
    let shift = (last / most).checked_ilog2().map_or(0, |log| log + 1);
    (shift, to_usize(last.wrapping_shr(shift)) + 2)
}

impl<S, R> Index<S, R>
where
    S: Deref<Target = [Segment]>,
    R: Deref<Target = [u32]>,
{
    /// Makes an index of `segments`, which [`merge`] has made; at most [`MAX_SEGMENTS`].
    /// `allocate(n)` must return an array of `n` elements; `n` is at most the number of segments
    /// plus 2. `pause` is called every [`PAUSE`] segments.
    ///
    /// # Errors
    ///
    /// The first error of `allocate` or `pause`.
    pub fn new<E>(
        segments: S,
        allocate: impl FnOnce(usize) -> Result<R, E>,
        mut pause: impl FnMut() -> Result<(), E>,
    ) -> Result<Self, E>
    where
        R: DerefMut,
    {
        let (shift, slots) = run_shape(&segments);
        let mut runs = allocate(slots)?;
        let mut slots = runs.iter_mut();
        let mut filled = 0;
        for (segment, nth) in segments.iter().zip(0u32..) {
            if nth % PAUSE == 0 {
                pause()?;
            }
            // For each run after that of the previous segment, up to the run of this one: `nth`
            // segments begin before it.
            while filled <= segment.offset().wrapping_shr(shift) {
                if let Some(slot) = slots.next() {
                    *slot = nth;
                }
                filled += 1;
            }
        }
        for slot in slots {
            *slot = segments.len() as u32;
        }
        Ok(Self {
            segments,
            runs,
            shift,
        })
    }

    /// Returns the segments.
    pub fn segments(&self) -> &S {
        &self.segments
    }

    /// Returns the memory of the index in bytes.
    pub fn memory(&self) -> usize {
        size_of_val(&*self.segments) + size_of_val(&*self.runs)
    }

    /// Looks up sector `sector` of the disk.
    #[inline]
    pub fn lookup(&self, sector: u64) -> Extent {
        let run = to_usize(sector.wrapping_shr(self.shift));
        // If a run is not in the array, the search has no bound on that side.
        let before = |run, unknown| {
            self.runs
                .get(run)
                .map_or(unknown, |&before| before as usize)
        };
        let start = before(run, 0);
        let end = before(run.saturating_add(1), self.segments.len());
        let next = start + begun(self.segments.get(start..end).unwrap_or(&[]), sector);
        let last = next.checked_sub(1).and_then(|last| self.segments.get(last));
        match last {
            Some(segment) if sector < segment.end() => Extent::Data {
                layer: segment.tag(),
                sector: segment.moffset() + (sector - segment.offset()),
                len: segment.end() - sector,
            },
            _ => Extent::Zeros {
                len: self
                    .segments
                    .get(next)
                    .map_or(MAX_END, Segment::offset)
                    .saturating_sub(sector),
            },
        }
    }
}

/// Returns the number of `segments` that begin at or before sector `sector`.
///
/// Unlike [`slice::partition_point`], this uses branches: a CPU that predicts them requests the
/// next segment from memory while it waits for this one.
fn begun(segments: &[Segment], sector: u64) -> usize {
    let (mut start, mut end) = (0, segments.len());
    while start < end {
        let middle = start + (end - start) / 2;
        match segments.get(middle) {
            Some(segment) if segment.offset() <= sector => start = middle + 1,
            _ => end = middle,
        }
    }
    start
}
