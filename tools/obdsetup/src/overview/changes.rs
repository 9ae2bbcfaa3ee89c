// SPDX-License-Identifier: GPL-2.0

//! How full the store is of a disk that takes writes.

use std::path::Path;

use serde::Serialize;

use super::{numbers, sysfs};
use crate::dm::backing::loop_file;
use crate::dm::inspect::Device;

/// Of what a store can hold, it is nearly full when it has this part, in per cent.
const NEARLY: u64 = 90;

/// A store of changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Changes {
    /// The file or block device that it is on.
    pub(crate) file: String,
    /// Bytes that are used.
    pub(crate) used: u64,
    /// Bytes that it has.
    pub(crate) size: u64,
    /// Bytes that the file system of the file has free; nothing for a device.
    pub(crate) free: Option<u64>,
    /// Whether writes came for which there was no room.
    pub(crate) overflowed: bool,
    /// Whether a write to it has failed: what was written before is lost, too.
    pub(crate) lost: bool,
}

impl Changes {
    /// Reads the status of the snapshot `top`, which has the device `store`. `sys` is where sysfs is mounted.
    pub(super) fn of(top: &Device, store: &Device, sys: &Path) -> Option<Self> {
        let status = top
            .status
            .first()
            .filter(|line| line.target == "snapshot")?;
        let word = status.params.split_whitespace().next()?;
        let lower = store.table.first().map(numbers)?.into_iter().next()?;
        let size = store.table.last()?.len.saturating_mul(512);
        let used = word.split_once('/').and_then(|(used, _)| used.parse().ok());
        let overflowed = word == "Overflow";
        Some(Self {
            file: sysfs::name(sys, &lower),
            used: match (used, overflowed) {
                (Some(sectors), _) => u64::saturating_mul(sectors, 512),
                (None, true) => size,
                (None, false) => 0,
            },
            size,
            free: loop_file(sys, &lower).and_then(|file| free(Path::new(&file))),
            overflowed,
            lost: word == "Invalid",
        })
    }

    /// How much is used of what it can hold as its file system is now, in per cent, rounded down.
    pub(crate) fn percent(&self) -> u64 {
        let room = self.size.saturating_sub(self.used);
        let room = self.free.map_or(room, |free| free.min(room));
        // No overflow: a device has fewer than 2^63 bytes, and 2^64 times 100 fits in 128 bits.
        let percent =
            u128::from(self.used) * 100 / (u128::from(self.used) + u128::from(room)).max(1);
        u64::try_from(percent).unwrap_or(100)
    }

    /// Whether it is nearly full.
    pub(crate) fn is_nearly_full(&self) -> bool {
        self.percent() >= NEARLY
    }
}

/// Bytes that the file system of a file has free.
fn free(file: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(file).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_full() {
        let changes = |used, size, free| Changes {
            file: "/a".to_owned(),
            used,
            size,
            free,
            overflowed: false,
            lost: false,
        };
        assert_eq!(changes(0, 0, None).percent(), 0);
        assert_eq!(changes(89, 100, None).percent(), 89);
        assert!(!changes(89, 100, None).is_nearly_full());
        assert!(changes(90, 100, None).is_nearly_full());
        // The file system gets full first.
        assert_eq!(changes(90, 1000, Some(10)).percent(), 90);
        assert_eq!(changes(90, 1000, Some(5000)).percent(), 9);
        assert_eq!(changes(u64::MAX, u64::MAX, Some(0)).percent(), 100);
    }
}
