// SPDX-License-Identifier: GPL-2.0

//! Blobs: the sources of the bytes of an image.

use super::{Error, Fault};

/// A function that takes the bytes of a stream, piece by piece.
pub type Sink<'a, E> = &'a mut dyn FnMut(&[u8]) -> Result<(), E>;

/// A read-only sequence of bytes with a known length: a file, a block device, or a part of one.
pub trait Blob {
    /// The error of a failed read. Format errors convert into it.
    type Error: From<Error>;

    /// Returns the length in bytes.
    fn size(&self) -> u64;

    /// Fills all of `buf` with the bytes from byte `offset` on.
    ///
    /// # Errors
    ///
    /// The error of the source, or [`Fault::Truncated`] if the range isn't within the blob.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), Self::Error>;

    /// Reads `len` bytes from byte `offset` on, and passes them to `sink` in order, in pieces of
    /// any length.
    ///
    /// # Errors
    ///
    /// As [`Blob::read_at`], and the first error of `sink`.
    fn stream(&self, offset: u64, len: u64, sink: Sink<'_, Self::Error>)
        -> Result<(), Self::Error>;
}

/// A part of another blob, which is a blob itself.
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
    /// Makes a window on the `len` bytes of `blob` from byte `start` on.
    ///
    /// # Errors
    ///
    /// [`Fault::Truncated`] if these bytes aren't all within `blob`.
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

/// Checks that the `len` bytes from byte `offset` on are within a blob of `size` bytes.
///
/// # Errors
///
/// [`Fault::Truncated`], with `offset` and `len`.
pub fn check_range(size: u64, offset: u64, len: u64) -> Result<(), Error> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::new(Fault::Truncated, offset, len)),
    }
}
