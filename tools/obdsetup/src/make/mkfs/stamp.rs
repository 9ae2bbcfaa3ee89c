// SPDX-License-Identifier: GPL-2.0

//! The UUIDs and the time of creation of a file system. They depend on the files, on the type, size and
//! options of the file system, and on `SOURCE_DATE_EPOCH`, but not on the clock or on chance: so the
//! same input makes the same bytes.

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use uuid::{Builder, Uuid};

use super::tree::{Id, Time, Tree, ROOT};
use crate::program::Program;
use crate::terminal::exit::Failure;

/// The UUIDs and the time of creation of a file system.
pub(super) struct Stamp {
    pub(super) uuid: Uuid,
    /// A second UUID: ext2, ext3 and ext4 use it as the hash seed, and [`Self::derived`] makes more
    /// UUIDs from it.
    pub(super) seed: Uuid,
    /// The time of creation in seconds since 1970: `SOURCE_DATE_EPOCH`, or 1 if that is not set. It
    /// is never 0, which file systems use for an unknown time. It is not the newest time of the
    /// files, which might be in the future: fsck reports a future time as an error.
    pub(super) time: u32,
}

impl Stamp {
    /// Returns the stamp of a file system with `tree`. `more` is other data that the file system
    /// depends on.
    pub(super) fn of(tree: &Tree, more: &[&[u8]]) -> Result<Self> {
        let hash = tree.hash(more)?;
        let half = |at: usize| {
            let bytes = hash.get(at..at + 16).and_then(|half| half.try_into().ok());
            bytes.map(|bytes| Builder::from_custom_bytes(bytes).into_uuid())
        };
        Ok(Self {
            uuid: half(0).context("hash too short")?,
            seed: half(16).context("hash too short")?,
            time: time()?,
        })
    }

    /// Returns another UUID, for `what`.
    pub(super) fn derived(&self, what: &str) -> Uuid {
        let hash = Sha256::new()
            .chain_update(self.seed.as_bytes())
            .chain_update(what)
            .finalize();
        let mut bytes = [0; 16];
        for (to, from) in bytes.iter_mut().zip(hash) {
            *to = from;
        }
        Builder::from_custom_bytes(bytes).into_uuid()
    }

    /// Makes a program of e2fsprogs use [`Self::time`] as the present time, and its built-in configuration
    /// instead of the machine's: the file `none` doesn't exist.
    pub(super) fn give_to_e2fsprogs(&self, command: &mut Program, work: &TempDir) {
        command.env("E2FSPROGS_FAKE_TIME", self.time.to_string());
        command.env("MKE2FS_CONFIG", work.path().join("none"));
    }
}

/// Returns the time of creation for a file system: see [`Stamp::time`].
pub(super) fn time() -> Result<u32> {
    let time = source_date_epoch()?.unwrap_or_default();
    Ok(u32::try_from(time.max(1)).unwrap_or(u32::MAX))
}

/// Returns `SOURCE_DATE_EPOCH`, the limit for all times in a file system, if it is set.
pub(super) fn source_date_epoch() -> Result<Option<i64>> {
    const NAME: &str = "SOURCE_DATE_EPOCH";
    let Some(text) = std::env::var_os(NAME) else {
        return Ok(None);
    };
    let time = text.to_str().and_then(|text| text.parse::<u32>().ok());
    match time {
        Some(time) => Ok(Some(time.into())),
        None => Err(Failure::usage(format!(
            "{NAME}={}: not a number of seconds since 1970: correct or unset it",
            text.to_string_lossy()
        ))),
    }
}

/// Sets times that are newer than `SOURCE_DATE_EPOCH` to that time.
pub(super) fn clamp(tree: &mut Tree) -> Result<()> {
    let Some(seconds) = source_date_epoch()? else {
        return Ok(());
    };
    let most = Time {
        seconds,
        nanoseconds: 0,
    };
    let ids: Vec<Id> = tree.names().iter().map(|name| name.id).collect();
    for id in ids.into_iter().chain([ROOT]) {
        let meta = &mut tree.node_mut(id)?.meta;
        meta.mtime = meta.mtime.min(most);
    }
    Ok(())
}
