// SPDX-License-Identifier: GPL-2.0

//! Lossless conversions of integers, and loads of little-endian numbers with bounds checks.

const _: () = assert!(usize::BITS == 64, "a 64-bit target is required");

/// Converts a `usize` to `u64`. Lossless: the target is 64-bit.
#[inline]
pub const fn to_u64(n: usize) -> u64 {
    n as u64
}

/// Converts a `u64` to `usize`. Lossless: the target is 64-bit.
#[inline]
pub const fn to_usize(n: u64) -> usize {
    n as usize
}

/// Returns the `N` bytes of `buf` at `at`; zeros if `buf` is too short.
///
/// Callers pass constant offsets, within arrays and chunks of constant size.
#[inline]
pub fn bytes_at<const N: usize>(buf: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(src) = buf.get(at..).and_then(|rest| rest.get(..N)) {
        out.copy_from_slice(src);
    }
    out
}

/// Returns the little-endian `u32` at byte `at` of `buf`; 0 if `buf` is too short.
#[inline]
pub fn le32(buf: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(buf, at))
}

/// Returns the little-endian `u64` at byte `at` of `buf`; 0 if `buf` is too short.
#[inline]
pub fn le64(buf: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(buf, at))
}

/// Splits a stream of bytes, which arrives in pieces of any length, into records of `N` bytes.
pub struct Records<const N: usize> {
    carry: [u8; N],
    held: usize,
}

impl<const N: usize> Records<N> {
    /// Starts a new stream.
    pub const fn new() -> Self {
        Self {
            carry: [0; N],
            held: 0,
        }
    }

    /// Takes the next piece of the stream, and calls `record` with every record that is complete
    /// now.
    ///
    /// # Errors
    ///
    /// The first error of `record`.
    pub fn feed<E>(
        &mut self,
        mut piece: &[u8],
        mut record: impl FnMut(&[u8; N]) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.held > 0 {
            let take = piece.len().min(N - self.held);
            let (head, rest) = piece.split_at(take);
            if let Some(dst) = self.carry.get_mut(self.held..self.held + take) {
                dst.copy_from_slice(head);
            }
            self.held += take;
            piece = rest;
            if self.held < N {
                return Ok(());
            }
            self.held = 0;
            record(&self.carry)?;
        }
        let mut whole = piece.chunks_exact(N);
        for chunk in &mut whole {
            record(&bytes_at(chunk, 0))?;
        }
        let rest = whole.remainder();
        if let Some(dst) = self.carry.get_mut(..rest.len()) {
            dst.copy_from_slice(rest);
            self.held = rest.len();
        }
        Ok(())
    }
}

impl<const N: usize> Default for Records<N> {
    fn default() -> Self {
        Self::new()
    }
}
