// SPDX-License-Identifier: GPL-2.0

//! An image with header, index and trailer, possibly far apart.

use libfuzzer_sys::arbitrary::{Result, Unstructured};

use crate::Sparse;

/// Length of the part of header and trailer that is parsed, in bytes.
const HEAD: usize = 512;

/// The input of the targets `zfile` and `lsmt`: header, middle and trailer, and their offsets.
#[derive(Default)]
pub struct Parts {
    /// Bits that select what is corrected. Each target defines them.
    pub fixes: u16,
    /// Length of the pieces of a stream in bytes, minus one.
    pub step: u8,
    /// Number of bytes cut off at the end.
    pub short: u8,
    /// A number for any use by the target.
    pub number: u64,
    /// Byte offset of the middle.
    pub at: u64,
    /// Number of bytes between middle and trailer.
    pub gap: u64,
    /// The first 512 bytes.
    pub head: Vec<u8>,
    /// The index and the bytes around it.
    pub middle: Vec<u8>,
    /// The first 512 bytes of the trailer.
    pub tail: Vec<u8>,
}

impl Parts {
    /// Parses an input.
    ///
    /// # Errors
    ///
    /// None: missing input counts as 0.
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

    /// Returns the input that [`Parts::read`] parses to these parts.
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

    /// Returns the parts of a valid image with its index at byte `index_offset` and a trailer of
    /// `trailer_len` bytes.
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

    /// Returns the blob made of the parts, with a trailer of `trailer_len` bytes.
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
