// SPDX-License-Identifier: GPL-2.0

//! Conversions that cannot lose bits, and bounded little-endian loads.

const _: () = assert!(usize::BITS == 64, "a 64-bit target is required");

/// Widens a `usize` to `u64`. Lossless: the target is 64-bit.
#[inline]
pub const fn to_u64(n: usize) -> u64 {
    n as u64
}

/// Turns a `u64` into a `usize`. Lossless: the target is 64-bit.
#[inline]
pub const fn to_usize(n: u64) -> usize {
    n as usize
}

/// Loads `N` bytes at `at`; zeros where `buf` is too short.
///
/// Callers pass offsets that are constants inside arrays of fixed size.
#[inline]
pub fn bytes_at<const N: usize>(buf: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(src) = buf.get(at..).and_then(|rest| rest.get(..N)) {
        out.copy_from_slice(src);
    }
    out
}

/// Loads a little-endian `u32` at byte `at`.
#[inline]
pub fn le32(buf: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(buf, at))
}

/// Loads a little-endian `u64` at byte `at`.
#[inline]
pub fn le64(buf: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(buf, at))
}

/// Cuts a byte stream that arrives in pieces of any length into records of `N` bytes.
pub struct Records<const N: usize> {
    carry: [u8; N],
    held: usize,
}

impl<const N: usize> Records<N> {
    /// An empty stream.
    pub const fn new() -> Self {
        Self {
            carry: [0; N],
            held: 0,
        }
    }

    /// Feeds `piece`; calls `record` for every record that is complete now.
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
