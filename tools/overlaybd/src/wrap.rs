// SPDX-License-Identifier: GPL-2.0

//! Writes a blob: a layer with its wrapping.

use std::io::{Seek, Write};

use crate::progress::Check;
use crate::zfile_writer::{self, seek, write_error, Options, Sink};
use crate::{tar_writer, Result};

/// The wrapping of a new blob.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wrapping {
    /// The options of the ZFile; `None` for no compression.
    pub zfile: Option<Options>,
    /// Whether the blob gets a tar wrapper.
    pub tar: bool,
}

/// Writes a blob to `out`, which must be empty. Returns its length in bytes. `produce` passes the
/// bytes of the content to its sink. `check` is called before each block is compressed.
///
/// # Errors
///
/// Those of `produce` and `check`, and errors of compressing or writing.
pub fn write<W: Write + Seek>(
    mut out: W,
    wrapping: Wrapping,
    check: Check<'_>,
    produce: impl FnOnce(Sink<'_>) -> Result<()>,
) -> Result<u64> {
    let head = if wrapping.tar {
        tar_writer::HEAD_LEN
    } else {
        0
    };
    seek(&mut out, head)?;
    let (mut out, len) = match wrapping.zfile {
        Some(options) => zfile_writer::write(out, options, check, produce)?,
        None => {
            let mut len = 0;
            produce(&mut |bytes| {
                len += crate::format::num::to_u64(bytes.len());
                out.write_all(bytes).map_err(write_error)
            })?;
            (out, len)
        }
    };
    let mut total = len;
    if wrapping.tar {
        let tail = tar_writer::tail(len);
        out.write_all(&tail).map_err(write_error)?;
        seek(&mut out, 0)?;
        // The length of the payload is only known now.
        out.write_all(&tar_writer::head(len)).map_err(write_error)?;
        total += tar_writer::HEAD_LEN + crate::format::num::to_u64(tail.len());
    }
    out.flush().map_err(write_error)?;
    Ok(total)
}
