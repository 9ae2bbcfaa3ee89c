// SPDX-License-Identifier: GPL-2.0

//! Where the bytes of an image come from.

use super::{Error, Fault};

/// What takes a stream, piece by piece.
pub type Sink<'a, E> = &'a mut dyn FnMut(&[u8]) -> Result<(), E>;

/// A read-only run of bytes with a known length: a file, a block device, or a part of one.
pub trait Blob {
    /// What a read may fail with. Format errors convert into it.
    type Error: From<Error>;

    /// Length in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from byte `offset`.
    ///
    /// # Errors
    ///
    /// The lower layer's error, or [`Fault::Truncated`] where the range leaves the blob.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), Self::Error>;

    /// Reads `len` bytes from byte `offset` in order, and hands them to `sink` in pieces of any
    /// length.
    ///
    /// # Errors
    ///
    /// As [`Blob::read_at`], and the first error of `sink`.
    fn stream(&self, offset: u64, len: u64, sink: Sink<'_, Self::Error>)
        -> Result<(), Self::Error>;
}

/// A part of another blob.
///
/// # Invariants
///
/// `start + len` doesn't exceed the size of `blob`.
pub struct Window<'a, B> {
    blob: &'a B,
    start: u64,
    len: u64,
}

impl<'a, B: Blob> Window<'a, B> {
    /// The `len` bytes of `blob` from byte `start`.
    ///
    /// # Errors
    ///
    /// [`Fault::Truncated`] where they leave the blob.
    pub fn new(blob: &'a B, start: u64, len: u64) -> Result<Self, Error> {
        check_range(blob.size(), start, len)?;
        // INVARIANT: Checked above.
        Ok(Self { blob, start, len })
    }
}

impl<B: Blob> Blob for Window<'_, B> {
    type Error = B::Error;

    fn size(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), Self::Error> {
        check_range(self.len, offset, super::num::to_u64(buf.len()))?;
        // No overflow: `offset` is at most `len`, and by the type invariant `start + len` fits.
        self.blob.read_at(self.start + offset, buf)
    }

    fn stream(
        &self,
        offset: u64,
        len: u64,
        sink: Sink<'_, Self::Error>,
    ) -> Result<(), Self::Error> {
        check_range(self.len, offset, len)?;
        // No overflow: as in `read_at`.
        self.blob.stream(self.start + offset, len, sink)
    }
}

/// Checks that `len` bytes from `offset` lie within `size` bytes.
///
/// # Errors
///
/// [`Fault::Truncated`] at `offset`.
pub fn check_range(size: u64, offset: u64, len: u64) -> Result<(), Error> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::new(Fault::Truncated, offset, len)),
    }
}
