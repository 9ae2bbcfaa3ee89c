// SPDX-License-Identifier: GPL-2.0

//! Writes a target's status.

use core::fmt::{self, Write};
use core::marker::PhantomData;
use core::ptr::NonNull;

/// The buffer that a status is written to. Text that doesn't fit is cut off. A full buffer tells
/// device-mapper that text is missing.
///
/// # Invariants
///
/// `start` is valid for writes of `size` bytes for `'a`. `at` is below `size`, or both are 0.
pub(crate) struct Emit<'a> {
    start: NonNull<u8>,
    size: usize,
    at: usize,
    /// Number of bytes at the end of the buffer that text must not use: see [`Self::reserve`].
    reserved: usize,
    _buffer: PhantomData<&'a mut [u8]>,
}

impl Emit<'_> {
    /// Wraps the buffer of a status function.
    ///
    /// # Safety
    ///
    /// `start` is valid for writes of `size` bytes as long as the result lives.
    pub(super) unsafe fn new(start: NonNull<u8>, size: usize) -> Self {
        let mut emit = Self {
            start,
            size,
            at: 0,
            reserved: 0,
            _buffer: PhantomData,
        };
        emit.terminate();
        emit
    }

    /// Returns how many bytes of text still fit.
    pub(crate) fn room(&self) -> usize {
        self.size.saturating_sub(self.at + 1 + self.reserved)
    }

    /// Keeps the last `bytes` bytes of the buffer free, for text that must not be cut off. 0 lets
    /// text use them again.
    pub(super) fn reserve(&mut self, bytes: usize) {
        self.reserved = bytes;
    }

    /// Appends formatted text.
    pub(crate) fn put(&mut self, args: fmt::Arguments<'_>) {
        // Text that is cut off isn't an error here.
        let _ = self.write_fmt(args);
    }

    /// Writes the final NUL.
    fn terminate(&mut self) {
        if self.at < self.size {
            // SAFETY: Checked above.
            let end = unsafe { self.start.as_ptr().add(self.at) };
            // SAFETY: By the type invariant this byte may be written.
            unsafe { end.write(0) };
        }
    }
}

impl Write for Emit<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.room();
        let len = text.len().min(room);
        if len > 0 {
            // SAFETY: By the type invariant this is within the buffer.
            let end = unsafe { self.start.as_ptr().add(self.at) };
            // SAFETY: There is room for `len` bytes and the NUL after them.
            unsafe { end.copy_from_nonoverlapping(text.as_ptr(), len) };
            // INVARIANT: `len` is at most `size - at - 1`.
            self.at += len;
        }
        self.terminate();
        Ok(())
    }
}
