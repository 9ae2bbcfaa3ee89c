// SPDX-License-Identifier: GPL-2.0

//! Progress of long operations, and how to stop them.

use crate::Result;

/// Called with the number of bytes processed since the last call, possibly from several threads. If
/// it returns an error, such as [`Error::Interrupted`](crate::Error::Interrupted), the operation
/// stops.
pub type Progress<'a> = &'a (dyn Fn(u64) -> Result<()> + Sync);

/// Ignores progress and never stops the operation.
pub fn silent(_: u64) -> Result<()> {
    Ok(())
}

/// Called often during long operations, possibly from several threads. If it returns an error, such as
/// [`Error::Interrupted`](crate::Error::Interrupted), the operation stops.
pub type Check<'a> = &'a (dyn Fn() -> Result<()> + Sync);

/// Never stops the operation.
pub fn never() -> Result<()> {
    Ok(())
}
