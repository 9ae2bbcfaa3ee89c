// SPDX-License-Identifier: GPL-2.0

//! Checks whether file systems can map the pages of a layer: see `Documentation/dax.rst`.

use super::heap;
use super::lsmt::Segment;
use super::merge::PAUSE;

/// The sectors of a layer that hold the data of a segment. Places are ordered by their start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// First sector.
    pub start: u64,
    /// First sector after the data.
    pub end: u64,
}

impl Place {
    /// Returns the place of the data of `segment`, `None` if it is zeroed.
    pub fn of(segment: &Segment) -> Option<Self> {
        // No overflow: 55 bits and 14 bits.
        (!segment.zeroed()).then(|| Self {
            start: segment.moffset(),
            end: segment.moffset() + segment.length(),
        })
    }
}

/// Returns two of `places` that have a sector in common, `None` if there are none. Reorders
/// `places`.
///
/// Takes time n · log(n), and allocates nothing. `pause` is called every [`PAUSE`] places.
///
/// # Errors
///
/// The first error of `pause`.
pub fn overlap<E>(
    places: &mut [Place],
    mut pause: impl FnMut() -> Result<(), E>,
) -> Result<Option<[Place; 2]>, E> {
    heap::make(places);
    let mut heap = places;
    let mut before: Option<Place> = None;
    let mut count: u32 = 0;
    while let Some(&place) = heap.first() {
        if let Some(before) = before.filter(|before| place.start < before.end) {
            return Ok(Some([before, place]));
        }
        before = Some(place);
        heap = heap::replace_first(heap, None);
        count = count.wrapping_add(1);
        if count % PAUSE == 0 {
            pause()?;
        }
    }
    Ok(None)
}

/// Returns the bitwise or of the offsets, the lengths and the starts of the data of `segments`, in
/// sectors: a power of two divides all of them if and only if it divides the result.
pub fn alignment<'a>(segments: impl IntoIterator<Item = &'a Segment>) -> u64 {
    segments.into_iter().fold(0, |all, segment| {
        let start = Place::of(segment).map_or(0, |place| place.start);
        all | segment.offset() | segment.length() | start
    })
}
