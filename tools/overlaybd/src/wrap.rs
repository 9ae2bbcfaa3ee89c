// SPDX-License-Identifier: GPL-2.0

//! Writing a blob: what a layer is wrapped in.

use std::io::{Seek, Write};

use crate::zfile_writer::{seek, write_error, Options, ZfileWriter};
use crate::{tar_writer, Result};

/// What a new blob is wrapped in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wrapping {
    /// How it is compressed, if at all.
    pub zfile: Option<Options>,
    /// Whether it is in a tar.
    pub tar: bool,
}

/// Takes the next bytes of a file.
pub type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

/// Writes a blob to `out`, which is empty, and gives its length in bytes. `produce` hands over the
/// bytes of what is to be wrapped.
///
/// # Errors
///
/// The error of `produce`, and what compressing or writing fails with.
pub fn write<W: Write + Seek>(
    mut out: W,
    wrapping: Wrapping,
    produce: impl FnOnce(Sink<'_>) -> Result<()>,
) -> Result<u64> {
    let head = if wrapping.tar {
        tar_writer::HEAD_LEN
    } else {
        0
    };
    seek(&mut out, head)?;
    let (mut out, len) = match wrapping.zfile {
        Some(options) => {
            let mut zfile = ZfileWriter::new(out, options)?;
            produce(&mut |bytes| zfile.write(bytes))?;
            zfile.finish()?
        }
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
        // The size of what is in it is known only now.
        out.write_all(&tar_writer::head(len)).map_err(write_error)?;
        total += tar_writer::HEAD_LEN + crate::format::num::to_u64(tail.len());
    }
    out.flush().map_err(write_error)?;
    Ok(total)
}
