// SPDX-License-Identifier: GPL-2.0

//! A blob of any size of which only some bytes take memory.

use overlaybd::format::blob::{check_range, Sink};
use overlaybd::format::{Blob, Error};

/// A blob with data in some places and zeros elsewhere.
pub struct Sparse {
    size: u64,
    pieces: Vec<(u64, Vec<u8>)>,
    /// Number of bytes that [`Blob::stream`] passes on at once.
    pub step: usize,
}

impl Sparse {
    /// Largest value of `step`.
    pub const MAX_STEP: usize = 256;

    /// Returns a blob of `size` bytes. Data beyond that size is ignored.
    pub fn new(size: u64, pieces: Vec<(u64, Vec<u8>)>) -> Self {
        Self {
            size,
            pieces,
            step: Self::MAX_STEP,
        }
    }

    /// Returns the `len` bytes from `offset`, if one piece has all of them.
    pub fn get_mut(&mut self, offset: u64, len: usize) -> Option<&mut [u8]> {
        self.pieces.iter_mut().find_map(|(start, bytes)| {
            let at = usize::try_from(offset.checked_sub(*start)?).ok()?;
            bytes.get_mut(at..at.checked_add(len)?)
        })
    }

    /// Returns byte `offset`; 0 if no piece has it.
    pub fn byte(&self, offset: u64) -> u8 {
        let mut byte = [0];
        self.fill(offset, &mut byte);
        byte[0]
    }

    fn fill(&self, offset: u64, buf: &mut [u8]) {
        buf.fill(0);
        let end = offset + buf.len() as u64;
        for (start, bytes) in &self.pieces {
            let from = offset.max(*start);
            let to = end.min(start.saturating_add(bytes.len() as u64));
            if from < to {
                let source = &bytes[(from - start) as usize..(to - start) as usize];
                buf[(from - offset) as usize..(to - offset) as usize].copy_from_slice(source);
            }
        }
    }
}

impl Blob for Sparse {
    type Error = Error;

    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        check_range(self.size, offset, buf.len() as u64)?;
        self.fill(offset, buf);
        Ok(())
    }

    fn stream(&self, offset: u64, len: u64, sink: Sink<'_, Error>) -> Result<(), Error> {
        check_range(self.size, offset, len)?;
        let mut buf = [0; Self::MAX_STEP];
        let step = self.step.clamp(1, buf.len()) as u64;
        let mut done = 0;
        while done < len {
            let take = step.min(len - done);
            let piece = &mut buf[..take as usize];
            self.fill(offset + done, piece);
            sink(piece)?;
            done += take;
        }
        Ok(())
    }
}
