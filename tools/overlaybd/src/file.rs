// SPDX-License-Identifier: GPL-2.0

//! Access to files and block devices.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::seek;

use crate::format::blob::check_range;
use crate::format::num::{to_u64, to_usize};
use crate::format::Blob;
use crate::{Error, Result};

/// Largest number of bytes that [`Blob::stream`] reads at once.
const PIECE: u64 = 1 << 20;

/// A file or block device, open for reading, and perhaps for writing.
#[derive(Debug)]
pub struct FileBlob {
    file: File,
    path: PathBuf,
    size: u64,
    /// What [`FileBlob::next_data`] found last.
    found: Mutex<Option<Found>>,
}

/// The result of a look for data in a file.
#[derive(Clone, Debug)]
struct Found {
    /// Byte where the look began.
    from: u64,
    /// The first range of data at or after `from`; `None` if only a hole is left.
    data: Option<Range<u64>>,
}

impl Found {
    /// Returns the first range of data at or after `offset`, if this result says which one that is.
    fn at(&self, offset: u64) -> Option<Option<Range<u64>>> {
        if offset < self.from {
            return None;
        }
        match &self.data {
            None => Some(None),
            Some(data) if offset < data.end => Some(Some(data.start.max(offset)..data.end)),
            Some(_) => None,
        }
    }
}

impl FileBlob {
    /// Opens `path`. `size` limits the blob to that many bytes from the start, for a block device or file
    /// that is longer than the blob.
    ///
    /// # Errors
    ///
    /// [`Error::InFile`] with the system's error; also if `path` has fewer than `size` bytes, or is
    /// neither a file nor a block device.
    pub fn open(path: &Path, size: Option<u64>) -> Result<Self> {
        Self::open_inner(path, File::options().read(true), size)
            .map_err(|error| error.in_file(path))
    }

    /// Opens `path` to read it and to write to it by way of [`FileBlob::file`].
    ///
    /// # Errors
    ///
    /// As [`FileBlob::open`].
    pub fn open_to_write(path: &Path) -> Result<Self> {
        Self::open_inner(path, File::options().read(true).write(true), None)
            .map_err(|error| error.in_file(path))
    }

    /// Returns the blob of `file`, which is open for reading. `path` is its name in messages.
    ///
    /// # Errors
    ///
    /// [`Error::InFile`] with the system's error if the size can't be found.
    pub fn from_file(file: File, path: &Path) -> Result<Self> {
        Self::new(file, path, None).map_err(|error| error.in_file(path))
    }

    fn open_inner(path: &Path, options: &OpenOptions, size: Option<u64>) -> Result<Self> {
        let error = |source| Error::Io {
            what: "open",
            source,
        };
        // Check before opening: opening a FIFO would wait for a writer.
        let kind = path.metadata().map_err(error)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let what = match () {
                () if kind.is_dir() => "is a directory, not a file or block device",
                () if kind.is_fifo() => {
                    "is a pipe, not a file or block device: write its data to a file first"
                }
                () => "not a file or block device",
            };
            return Err(Error::Invalid(what.to_owned()));
        }
        Self::new(options.open(path).map_err(error)?, path, size)
    }

    fn new(mut file: File, path: &Path, size: Option<u64>) -> Result<Self> {
        let there = file.seek(SeekFrom::End(0)).map_err(|source| Error::Io {
            what: "find the size",
            source,
        })?;
        if let Some(wanted) = size.filter(|&wanted| wanted > there) {
            return Err(Error::Invalid(format!(
                "size {wanted} is more than the {there} bytes that are there"
            )));
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            size: size.unwrap_or(there),
            found: Mutex::new(None),
        })
    }

    /// Returns the path given to [`FileBlob::open`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the first range of bytes at or after `offset` that isn't a hole; `None` if only a
    /// hole is left. If the file system doesn't report holes, all bytes count as data.
    ///
    /// The file system walks through the whole range to find its end: tmpfs, for example, looks at
    /// each page. So the last result is kept, and asked first. It stays as it is if holes are
    /// filled or punched later.
    pub fn next_data(&self, offset: u64) -> Option<Range<u64>> {
        if offset >= self.size {
            return None;
        }
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(data) = found.as_ref().and_then(|found| found.at(offset)) {
            return data;
        }
        let data = self.look_for_data(offset);
        *found = Some(Found {
            from: offset,
            data: data.clone(),
        });
        data
    }

    /// Asks the file system for the first range of bytes at or after `offset` that isn't a hole.
    fn look_for_data(&self, offset: u64) -> Option<Range<u64>> {
        let start = match seek(&self.file, rustix::fs::SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return None,
            Err(_) => return Some(offset..self.size),
        };
        let end = seek(&self.file, rustix::fs::SeekFrom::Hole(start)).unwrap_or(self.size);
        Some(start..end.min(self.size)).filter(|data| data.start < self.size)
    }

    /// Returns the open file.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Blob for FileBlob {
    type Error = Error;

    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let len = to_u64(buf.len());
        check_range(self.size, offset, len)?;
        self.file
            .read_exact_at(buf, offset)
            .map_err(|source| Error::Read {
                offset,
                len,
                source,
            })
    }

    fn stream(
        &self,
        offset: u64,
        len: u64,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        stream_pieces(self, offset, len, sink)
    }
}

/// A range of bytes of a file. It keeps the file open.
#[derive(Clone, Debug)]
pub struct Part {
    file: Arc<FileBlob>,
    start: u64,
    len: u64,
}

impl Part {
    /// Returns the `len` bytes of `file` from byte `start`.
    ///
    /// # Errors
    ///
    /// [`Fault::Truncated`](crate::format::Fault::Truncated) if the range exceeds the file.
    pub fn new(file: Arc<FileBlob>, start: u64, len: u64) -> Result<Self> {
        check_range(file.size(), start, len)?;
        Ok(Self { file, start, len })
    }

    /// Returns the whole of `file`.
    pub fn whole(file: Arc<FileBlob>) -> Self {
        let len = file.size();
        Self {
            file,
            start: 0,
            len,
        }
    }

    /// Returns the file.
    pub fn file(&self) -> &Arc<FileBlob> {
        &self.file
    }

    /// Returns the offset of the first byte in the file.
    pub fn start(&self) -> u64 {
        self.start
    }
}

impl Blob for Part {
    type Error = Error;

    fn size(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.len, offset, to_u64(buf.len()))?;
        self.file.read_at(self.start + offset, buf)
    }

    fn stream(
        &self,
        offset: u64,
        len: u64,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        check_range(self.len, offset, len)?;
        self.file.stream(self.start + offset, len, sink)
    }
}

/// Implements [`Blob::stream`] by calling [`Blob::read_at`].
pub(crate) fn stream_pieces<B: Blob<Error = Error>>(
    blob: &B,
    offset: u64,
    len: u64,
    sink: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    check_range(blob.size(), offset, len)?;
    let mut piece = vec![0; to_usize(len.min(PIECE))];
    let mut done = 0;
    while done < len {
        let take = (len - done).min(PIECE);
        if let Some(piece) = piece.get_mut(..to_usize(take)) {
            blob.read_at(offset + done, piece)?;
            sink(piece)?;
        }
        done += take;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_range_of_data_is_looked_for_once(
    ) -> std::result::Result<(), Box<dyn std::error::Error>> {
        let file = tempfile::tempfile()?;
        file.set_len(12 * PIECE)?;
        file.write_all_at(&vec![1; to_usize(4 * PIECE)], 4 * PIECE)?;
        let blob = FileBlob::from_file(file, Path::new("disk"))?;
        let data = 4 * PIECE..8 * PIECE;
        if seek(blob.file(), rustix::fs::SeekFrom::Hole(0)) != Ok(0) {
            println!("not tested: this file system reports no holes");
            return Ok(());
        }
        assert_eq!(blob.next_data(0), Some(data.clone()));
        // A second look would see the hole.
        let mode = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(blob.file(), mode, 6 * PIECE, PIECE) {
            Err(rustix::io::Errno::OPNOTSUPP) => {
                println!("not tested: this file system punches no holes");
                return Ok(());
            }
            done => done?,
        }
        for at in [0, PIECE, 4 * PIECE - 1, 4 * PIECE, 6 * PIECE, 8 * PIECE - 1] {
            assert_eq!(
                blob.next_data(at),
                Some(at.max(data.start)..data.end),
                "{at}"
            );
        }
        // What was not part of the last result is looked for: the end of the file, then all from the start.
        assert_eq!(blob.next_data(8 * PIECE), None);
        assert_eq!(blob.next_data(9 * PIECE), None);
        assert_eq!(blob.next_data(12 * PIECE), None);
        assert_eq!(blob.next_data(0), Some(4 * PIECE..6 * PIECE));
        assert_eq!(blob.next_data(6 * PIECE), Some(7 * PIECE..8 * PIECE));
        Ok(())
    }
}
