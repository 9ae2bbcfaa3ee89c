// SPDX-License-Identifier: GPL-2.0

//! How full the store of a writable disk is.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use overlaybd::changes::exceptions::full_size;
use serde::Serialize;

use super::fields::numbers;
use super::sysfs;
use crate::devices::dm::backing::loop_file;
use crate::devices::dm::inspect::Device;

/// A store is nearly full if at least this part of what it can hold is used, in per cent.
const NEARLY: u64 = 90;

/// A store of changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Changes {
    /// The file or block device of the store.
    pub(crate) file: String,
    /// Number of used bytes, without the head.
    pub(crate) used: u64,
    /// Size in bytes, without the head.
    pub(crate) size: u64,
    /// Number of free bytes in the file system of the file; `None` for a device, or if unknown.
    pub(crate) free: Option<u64>,
    /// Number of allocated bytes of the file; `None` for a device, or if unknown.
    pub(crate) allocated: Option<u64>,
    /// Whether the store has room for all of the disk.
    pub(crate) holds_all: bool,
    /// Whether the store had no room for a write.
    pub(crate) overflowed: bool,
    /// Whether a write to the store has failed. All changes are lost then, also earlier ones.
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
        let disk = top.table.last().map_or(0, |line| line.len);
        let file = loop_file(sys, &lower).and_then(|file| file_system(Path::new(&file), size));
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
            free: file.map(|(free, _)| free),
            allocated: file.map(|(_, allocated)| allocated),
            holds_all: size >= full_size(disk).saturating_mul(512),
            overflowed,
            lost: word == "Invalid",
        })
    }

    /// Returns how much is used of what the store can hold with the present free space of its file system, in
    /// per cent, rounded down.
    pub(crate) fn percent(&self) -> u64 {
        let room = self.room();
        // No overflow: a device has fewer than 2^63 bytes, and 2^64 times 100 fits in 128 bits.
        let percent =
            u128::from(self.used) * 100 / (u128::from(self.used) + u128::from(room)).max(1);
        u64::try_from(percent).unwrap_or(100)
    }

    /// Returns the number of bytes that can still be written.
    fn room(&self) -> u64 {
        self.limit()
            .map_or(self.left(), |limit| limit.min(self.left()))
    }

    /// Returns the number of bytes of the store that are not used.
    fn left(&self) -> u64 {
        self.size.saturating_sub(self.used)
    }

    /// Returns the number of bytes that the file system has for the rest of the store, allocated or free; `None`
    /// if that isn't known, or if all of the store is allocated already.
    fn limit(&self) -> Option<u64> {
        let (free, allocated) = self.free.zip(self.allocated)?;
        let ready = allocated.saturating_sub(self.used);
        (allocated < self.size).then(|| free.saturating_add(ready))
    }

    /// Returns whether the store is nearly full. If it has room for all of the disk, it gets full only if its
    /// file system does.
    pub(crate) fn is_nearly_full(&self) -> bool {
        let gets_full = !self.holds_all || self.limit().is_some_and(|limit| limit < self.left());
        gets_full && self.percent() >= NEARLY
    }
}

/// Returns the number of free bytes in the file system of a store's file, and the number of allocated bytes of the
/// file. Returns `None` if the name no longer leads to a file that is larger than `size`, the size without the head.
fn file_system(file: &Path, size: u64) -> Option<(u64, u64)> {
    let meta = file.metadata().ok().filter(|meta| meta.len() > size)?;
    let stat = rustix::fs::statvfs(file).ok()?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    Some((free, meta.blocks().saturating_mul(512)))
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
            allocated: free.map(|_| used),
            holds_all: false,
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
        // The store has room for all of the disk, and its file system has room for the store.
        let all = |used, free, allocated| Changes {
            holds_all: true,
            allocated,
            ..changes(used, 1000, free)
        };
        for (used, free, allocated) in [
            (950, None, None),
            (990, Some(5000), Some(990)),
            // Nothing is free, and nothing is needed.
            (990, Some(0), Some(1000)),
            (500, Some(0), Some(1000)),
        ] {
            assert!(!all(used, free, allocated).is_nearly_full(), "{used}");
        }
        assert!(all(500, Some(10), Some(500)).is_nearly_full());
        assert_eq!(all(500, Some(0), Some(1000)).percent(), 50);
    }
}
