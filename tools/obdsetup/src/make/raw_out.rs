// SPDX-License-Identifier: GPL-2.0

//! Writes the content of a disk to a file, with holes if wanted, to a device, or to standard output.

use std::fs::{File, Metadata};
use std::io::{self, IsTerminal, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result};
use overlaybd::format::num::{to_u64, to_usize};
use overlaybd::format::Blob;
use overlaybd::Error;
use rustix::fs::{major, minor, OFlags};

use crate::files::in_use;
use crate::make::output::Output;
use crate::terminal::bar::Bar;
use crate::terminal::exit::{self, Failure};
use crate::terminal::interrupt;

/// Number of bytes that are read at once.
const PIECE: u64 = 1 << 20;
/// Size in bytes of the parts that become holes if all their bytes are zero.
const HOLE: usize = 4096;

/// A disk that can be read.
pub(crate) trait Source {
    /// Reads all of `buf` at byte `offset`.
    fn read(&self, offset: u64, buf: &mut [u8]) -> overlaybd::Result<()>;
    /// Returns the offset of the first byte at or after `offset` and before `end` that isn't known to be zero.
    fn next_data(&self, offset: u64, end: u64) -> Option<u64>;
}

impl Source for overlaybd::Stack {
    fn read(&self, offset: u64, buf: &mut [u8]) -> overlaybd::Result<()> {
        self.read_at(offset, buf)
    }

    fn next_data(&self, offset: u64, end: u64) -> Option<u64> {
        overlaybd::Stack::next_data(self, offset, end)
    }
}

/// The destination of a disk.
pub(crate) struct Dest<'a> {
    /// A file, a device, or `-` for standard output.
    pub(crate) path: &'a Path,
    /// Whether to replace an existing file, or to overwrite a device.
    pub(crate) force: bool,
    /// Whether a file gets holes for zeros.
    pub(crate) sparse: bool,
    /// The files and devices that the disk is read from. `path` must not be one of them.
    pub(crate) inputs: &'a [&'a Path],
}

/// Writes the bytes of `source` from `start` up to, not including, `end`.
pub(crate) fn write(source: &dyn Source, start: u64, end: u64, dest: &Dest<'_>) -> Result<()> {
    if dest.path.as_os_str() == "-" {
        if io::stdout().is_terminal() && !dest.force {
            let message = "a disk is not for a terminal: give a file with --output, or use --force";
            return Err(Failure::usage(message));
        }
        // A signal must end the program even while a write blocks because nobody reads. No file has to be removed.
        interrupt::end_at_once()?;
        let mut out = Stream(io::stdout().lock());
        let done = copy(source, start, end, &mut out, false);
        // Flushed here, because an error at the end of the process would be ignored.
        let done = done.and_then(|()| out.0.flush().map_err(write_error));
        return Ok(done.map_err(|error| error.in_file(Path::new("standard output")))?);
    }
    if let Some(mut file) = open_device(dest, end - start)? {
        // Never skips zeros: the old data of the device would stay there.
        let done = copy(source, start, end, &mut file, false);
        done.map_err(|error| error.in_file(dest.path))?;
        let synced = file.sync_all().or_else(|error| match error.kind() {
            // A device that is no disk can't be synced.
            io::ErrorKind::InvalidInput => Ok(()),
            _ => Err(error),
        });
        return synced.with_context(|| dest.path.display().to_string());
    }
    let mut output = Output::create(dest.path, dest.force, dest.inputs.iter().copied())?;
    write_file(source, start, end, output.file(), dest.sparse)
        .map_err(|error| error.in_file(dest.path))?;
    output.commit()
}

/// Writes the bytes of `source` from `start` up to, not including, `end` to a new file; `sparse` makes holes for
/// zeros.
pub(crate) fn write_file(
    source: &dyn Source,
    start: u64,
    end: u64,
    file: &mut File,
    sparse: bool,
) -> overlaybd::Result<()> {
    copy(source, start, end, file, sparse)?;
    file.set_len(end - start).map_err(write_error)
}

/// Opens the output if it is a device; returns `None` otherwise. A device is overwritten in place, unlike a file,
/// and must not be one of the inputs. A block device must have at least `len` bytes and must not be in use, and
/// `force` must be set.
fn open_device(dest: &Dest<'_>, len: u64) -> Result<Option<File>> {
    let context = || dest.path.display().to_string();
    let Ok(meta) = std::fs::metadata(dest.path) else {
        return Ok(None);
    };
    let is_disk = meta.file_type().is_block_device();
    if !is_disk && !meta.file_type().is_char_device() {
        return Ok(None);
    }
    let mut options = File::options();
    options.write(true);
    if is_disk {
        if !dest.force {
            return Err(Failure::usage(format!(
                "{}: a disk is overwritten with --force only",
                dest.path.display()
            )));
        }
        options.custom_flags(OFlags::EXCL.bits() as i32);
    }
    let mut file = options
        .open(dest.path)
        .map_err(|error| not_opened(dest.path, &meta, error))?;
    if is_disk {
        let there = file.seek(SeekFrom::End(0)).with_context(context)?;
        if there < len {
            let message = format!(
                "{}: has {there} bytes, and {len} are to be written: give a larger device",
                dest.path.display()
            );
            return Err(Failure::usage(message));
        }
        file.rewind().with_context(context)?;
    }
    let opened = file.metadata().with_context(context)?;
    for layer in dest.inputs {
        let input = std::fs::metadata(layer).with_context(|| layer.display().to_string())?;
        if input.file_type().is_block_device() && input.rdev() == opened.rdev() {
            let message = format!(
                "{}: is the output as well: give another output",
                layer.display()
            );
            return Err(Failure::usage(message));
        }
    }
    Ok(Some(file))
}

/// Returns the error that says why a device cannot be written to.
fn not_opened(path: &Path, meta: &Metadata, error: io::Error) -> anyhow::Error {
    if error.kind() != io::ErrorKind::ResourceBusy {
        return anyhow::Error::from(error).context(path.display().to_string());
    }
    let rdev = meta.rdev();
    let number = format!("{}:{}", major(rdev), minor(rdev));
    let why = match in_use::mounted_on(&number) {
        Some(place) => format!("is mounted on {place}: unmount it first"),
        None => {
            "is in use, as a part of another device or by a program: lsblk shows which".to_owned()
        }
    };
    let message = format!("{}: cannot be overwritten: it {why}", path.display());
    Failure::error(exit::BUSY, message)
}

/// A destination for bytes.
trait Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Skips `len` bytes, which read as zeros then.
    fn skip(&mut self, len: u64) -> io::Result<()>;
}

impl Out for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn skip(&mut self, len: u64) -> io::Result<()> {
        let by = i64::try_from(len).map_err(|_| io::ErrorKind::FileTooLarge)?;
        self.seek(SeekFrom::Current(by)).map(|_| ())
    }
}

/// A destination that cannot seek.
struct Stream<W>(W);

impl<W: Write> Out for Stream<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn skip(&mut self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

fn write_error(source: io::Error) -> Error {
    Error::Io {
        what: "write",
        source,
    }
}

fn copy(
    source: &dyn Source,
    start: u64,
    end: u64,
    out: &mut dyn Out,
    sparse: bool,
) -> overlaybd::Result<()> {
    let wrote = |result: io::Result<()>| result.map_err(write_error);
    let bar = Bar::new("reading", end - start);
    let mut buffer = vec![0; to_usize(PIECE)];
    let mut at = start;
    while at < end {
        if sparse {
            let next = source.next_data(at, end).unwrap_or(end);
            if next > at {
                wrote(out.skip(next - at))?;
                bar.advance(next - at)?;
                at = next;
                continue;
            }
        }
        let take = (end - at).min(PIECE);
        let piece = buffer.get_mut(..to_usize(take)).unwrap_or_default();
        source.read(at, piece)?;
        if sparse {
            for chunk in piece.chunks(HOLE) {
                wrote(match chunk.iter().all(|&byte| byte == 0) {
                    true => out.skip(to_u64(chunk.len())),
                    false => out.write(chunk),
                })?;
            }
        } else {
            wrote(out.write(piece))?;
        }
        bar.advance(take)?;
        at += take;
    }
    Ok(())
}
