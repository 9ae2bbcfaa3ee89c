// SPDX-License-Identifier: GPL-2.0

//! An image with a header, an index and a trailer, far apart if need be.

use libfuzzer_sys::arbitrary::{Result, Unstructured};

use crate::Sparse;

/// Bytes of header and trailer that are looked at.
const HEAD: usize = 512;

/// The input of the `zfile` and `lsmt` targets: header, middle and trailer, and where they lie.
#[derive(Default)]
pub struct Parts {
    /// Bits that say what is to be made right; the target gives them a meaning.
    pub fixes: u16,
    /// Bytes in a piece of a stream, less one.
    pub step: u8,
    /// Bytes that are missing at the end.
    pub short: u8,
    /// A number for the target.
    pub number: u64,
    /// Byte offset of the middle.
    pub at: u64,
    /// Bytes between middle and trailer.
    pub gap: u64,
    /// The first 512 bytes.
    pub head: Vec<u8>,
    /// Index, and whatever is around it.
    pub middle: Vec<u8>,
    /// The first 512 bytes of the trailer.
    pub tail: Vec<u8>,
}

impl Parts {
    /// Takes the parts out of an input.
    ///
    /// # Errors
    ///
    /// None: what is missing is 0.
    pub fn read(data: &[u8]) -> Result<Self> {
        let mut input = Unstructured::new(data);
        let mut parts = Self {
            fixes: input.arbitrary()?,
            step: input.arbitrary()?,
            short: input.arbitrary()?,
            number: input.arbitrary()?,
            at: input.arbitrary()?,
            gap: input.arbitrary()?,
            ..Self::default()
        };
        let mut bytes = input.take_rest().to_vec();
        bytes.resize(bytes.len().max(2 * HEAD), 0);
        parts.tail = bytes.split_off(bytes.len() - HEAD);
        parts.middle = bytes.split_off(HEAD);
        parts.head = bytes;
        Ok(parts)
    }

    /// The input that [`Parts::read`] takes these parts out of.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.fixes.to_le_bytes().to_vec();
        bytes.extend([self.step, self.short]);
        for number in [self.number, self.at, self.gap] {
            bytes.extend(number.to_le_bytes());
        }
        for part in [&self.head, &self.middle, &self.tail] {
            bytes.extend(part);
        }
        bytes
    }

    /// The parts of a valid image, with an index of `index_len` bytes at `index_offset` and a
    /// trailer of `trailer_len` bytes.
    pub fn of(image: &[u8], index_offset: usize, trailer_len: usize) -> Self {
        let trailer = image.len() - trailer_len;
        Self {
            step: u8::MAX,
            at: index_offset as u64,
            head: image[..HEAD].to_vec(),
            middle: image[index_offset..trailer].to_vec(),
            tail: image[trailer..trailer + HEAD].to_vec(),
            ..Self::default()
        }
    }

    /// The blob that the parts make, with a trailer of `trailer_len` bytes.
    pub fn into_blob(self, trailer_len: u64) -> Sparse {
        let trailer = self
            .at
            .saturating_add(self.middle.len() as u64)
            .saturating_add(self.gap);
        let size = trailer.saturating_add(trailer_len);
        let pieces = vec![(0, self.head), (self.at, self.middle), (trailer, self.tail)];
        let mut blob = Sparse::new(size - size.min(self.short.into()), pieces);
        blob.step = usize::from(self.step) + 1;
        blob
    }
}
