// SPDX-License-Identifier: GPL-2.0

//! A file that is read once from start to end, with its position.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

use overlaybd::format::num::to_u64;

/// Number of bytes read at once.
const BUFFER: usize = 128 << 10;

/// A buffered file with its position.
pub(super) struct Source {
    file: BufReader<File>,
    at: u64,
}

impl Source {
    /// Reads `file`, whose position must be 0.
    pub(super) fn new(file: File) -> Self {
        Self {
            file: BufReader::with_capacity(BUFFER, file),
            at: 0,
        }
    }

    /// Skips up to `len` bytes, none of them after the end of the file. Returns their number.
    pub(super) fn skip(&mut self, len: u64) -> io::Result<u64> {
        let size = self.file.get_ref().metadata()?.len();
        let len = len.min(size.saturating_sub(self.at));
        self.file
            .seek_relative(i64::try_from(len).unwrap_or_default())?;
        self.at += len;
        Ok(len)
    }

    /// Returns the offset of the next byte.
    pub(super) fn position(&self) -> u64 {
        self.at
    }
}

impl Read for Source {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buf)?;
        self.at += to_u64(read);
        Ok(read)
    }
}

impl BufRead for Source {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.file.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        self.file.consume(amount);
        self.at += to_u64(amount);
    }
}
