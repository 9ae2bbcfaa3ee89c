// SPDX-License-Identifier: GPL-2.0

//! What a file system says of itself, besides its files: identity and time. Both come from the files,
//! so that the same files make the same bytes, whenever and wherever that is.

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use uuid::{Builder, Uuid};

use super::tree::{Id, Time, Tree, ROOT};
use crate::exit::Failure;
use crate::program::Program;

/// Identity and time of a file system.
pub(super) struct Stamp {
    pub(super) uuid: Uuid,
    /// For whatever needs a second one.
    pub(super) seed: Uuid,
    /// When it was made, as it says: `SOURCE_DATE_EPOCH`, or 1970. The newest time of the files may
    /// be in the future, which alarms checkers; and 0 means that nothing is known.
    pub(super) time: u32,
}

impl Stamp {
    /// The stamp of a file system that holds `tree`; `more` is what it depends on besides.
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

    /// A further identity.
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

    /// Has a program of e2fsprogs take this time for now, and its built-in configuration for that of
    /// the machine.
    pub(super) fn give_to_e2fsprogs(&self, command: &mut Program, work: &TempDir) {
        command.env("E2FSPROGS_FAKE_TIME", self.time.to_string());
        command.env("MKE2FS_CONFIG", work.path().join("none"));
    }
}

/// When a file system was made, as it says: see [`Stamp::time`].
pub(super) fn time() -> Result<u32> {
    let time = source_date_epoch()?.unwrap_or_default();
    Ok(u32::try_from(time.max(1)).unwrap_or(u32::MAX))
}

/// The time that nothing in a file system may be newer than, where the user gave one.
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

/// Sets times that are newer than `SOURCE_DATE_EPOCH` to that.
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
