// SPDX-License-Identifier: GPL-2.0

//! Disks that are compressed as a whole, such as `disk.img.xz`.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use overlaybd::format::num::to_u64;
use overlaybd::format::SECTOR_SIZE;
use tempfile::NamedTempFile;

use super::cut_off;
use super::disk::HEAD;
use crate::files::place::temp_file;
use crate::input::archive::{unpack_error, Compression, Unpack};
use crate::terminal::exit::{self, Failure};
use crate::terminal::interrupt;

/// Number of bytes to decompress and write at once. If all of them are zero, they become a hole.
const PIECE: usize = 64 << 10;

/// Decompresses the disk at `path` into a temporary file in the directory `place`, with holes for
/// zeros. Dropping the file deletes it. With `is_raw`, the size must be a multiple of 512 bytes, and not less than the
/// disk's own partition table or file system says.
///
/// # Errors
///
/// If the file at `path` cannot be read, is damaged or ends early, if the temporary file cannot be written, or
/// if the size is not allowed.
pub(crate) fn unpack(
    path: &Path,
    compression: Compression,
    is_raw: bool,
    place: &Path,
) -> Result<NamedTempFile> {
    let name = path.display();
    let cannot_read = || format!("{name}: cannot read");
    let cannot_write = || format!("{}: cannot write the decompressed disk", place.display());
    let file = File::open(path).with_context(cannot_read)?;
    let mut input = Unpack::new(file, Some(compression));
    let mut output = temp_file(place)?;
    let mut piece = vec![0; PIECE];
    let mut size = 0;
    loop {
        interrupt::check()?;
        let read = match fill(&mut input, &mut piece) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.raw_os_error().is_some() => {
                return Err(error).with_context(cannot_read)
            }
            Err(error) => {
                return Err(unpack_error(
                    path,
                    Some(compression),
                    input.position(),
                    &error,
                ))
            }
        };
        let data = piece.get(..read).unwrap_or_default();
        if data.iter().any(|&byte| byte != 0) {
            let written = output.as_file().write_all_at(data, size);
            written.with_context(cannot_write)?;
        }
        size += to_u64(read);
    }
    output.as_file().set_len(size).with_context(cannot_write)?;
    output.flush().with_context(cannot_write)?;
    if !is_raw {
        return Ok(output);
    }
    if size % SECTOR_SIZE != 0 {
        return Err(Failure::error(
            exit::BAD_IMAGE,
            format!(
                "{name}: the {size} bytes of the decompressed disk are no whole number of sectors: \
                 decompress it, then --from raw takes it as it is"
            ),
        ));
    }
    let mut head = Vec::new();
    let read = File::open(output.path()).and_then(|file| {
        let head_len = to_u64(HEAD);
        file.take(head_len).read_to_end(&mut head)
    });
    read.with_context(cannot_read)?;
    match cut_off(path, output.path(), &head, size)? {
        None => Ok(output),
        Some(what) => Err(Failure::error(
            exit::BAD_IMAGE,
            format!(
                "{name}: decompressed, {what}: incomplete download or copy? Decompress it, then --from raw takes it \
                 as it is"
            ),
        )),
    }
}

/// Reads until `buf` is full or `input` ends. Returns the number of bytes read.
fn fill(input: &mut Unpack, buf: &mut [u8]) -> std::io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match input.read(rest)? {
            0 => break,
            read => done += read,
        }
    }
    Ok(done)
}
