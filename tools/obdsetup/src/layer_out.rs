// SPDX-License-Identifier: GPL-2.0

//! Writing a new layer to its file.

use anyhow::Result;
use overlaybd::lsmt_writer::LayerWriter;
use overlaybd::wrap::{self, Wrapping};

use crate::bar::Bar;
use crate::output::Output;

/// Writes a layer and completes its file. `read` reads the disk: byte offset, buffer.
pub(crate) fn write(
    mut output: Output,
    wrapping: Wrapping,
    writer: &LayerWriter,
    what: &'static str,
    read: impl FnMut(u64, &mut [u8]) -> overlaybd::Result<()>,
) -> Result<()> {
    let bar = Bar::new(what, writer.data_len());
    wrap::write(output.file(), wrapping, |sink| {
        writer.write(read, sink, &|bytes| bar.advance(bytes))
    })?;
    drop(bar);
    output.commit()
}
