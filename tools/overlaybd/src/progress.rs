// SPDX-License-Identifier: GPL-2.0

//! How long work tells how far it is, and how it is stopped.

use crate::Result;

/// Called with the bytes done since the last call, perhaps from several threads. An error, say
/// [`Error::Interrupted`](crate::Error::Interrupted), stops the work.
pub type Progress<'a> = &'a (dyn Fn(u64) -> Result<()> + Sync);

/// Tells nobody and never stops.
pub fn silent(_: u64) -> Result<()> {
    Ok(())
}
