// SPDX-License-Identifier: GPL-2.0

//! Detects file systems that were not unmounted cleanly. On a read-only device, their journals cannot be
//! replayed, and mounting fails without an option that skips the replay.

use overlaybd::format::blob::Window;
use overlaybd::format::num::le32;
use overlaybd::format::{Blob, SECTOR_SIZE};

use crate::input::partitions::Partition;

/// Byte offset of the superblock of ext2, ext3 and ext4.
const EXT_AT: u64 = 1024;
/// Byte offsets in that superblock: the magic, and the incompatible features.
const EXT_MAGIC: usize = 0x38;
const EXT_INCOMPAT: usize = 0x60;
/// Incompatible feature: the journal has changes that must be replayed.
const EXT_RECOVER: u32 = 0x4;

/// Byte offset of the superblock of btrfs.
const BTRFS_AT: u64 = 64 << 10;
/// Byte offsets in that superblock: the magic, and the address of the log tree, which is 0 if there is none.
const BTRFS_MAGIC: usize = 0x40;
const BTRFS_LOG: usize = 0x60;

/// XFS with the log in the file system. All its numbers are big-endian.
mod xfs {
    use overlaybd::format::Blob;

    /// Size in bytes of a sector, the unit of the log.
    const SECTOR: u64 = 512;
    /// Magic of a record, in its first sector. All other sectors of the log begin with the cycle number.
    const RECORD: u32 = 0xfeed_babe;
    /// Largest number of sectors of a record with its headers.
    const LONGEST: u64 = (256 << 10) / SECTOR + 8;
    /// Number of bytes of data for which a record has one header sector.
    const DATA_OF_HEADER: u64 = 32 << 10;
    /// Flag of an operation: the file system was unmounted.
    const UNMOUNT: u8 = 0x20;

    fn be32(bytes: &[u8], at: usize) -> u32 {
        let bytes = bytes.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u32::from_be_bytes(*bytes))
    }

    fn be64(bytes: &[u8], at: usize) -> u64 {
        (u64::from(be32(bytes, at)) << 32) | u64::from(be32(bytes, at + 4))
    }

    /// A log. `start` and `len` are in sectors. Sector numbers start at 0, and wrap around at `len`.
    struct Log<'a, B> {
        disk: &'a B,
        start: u64,
        len: u64,
    }

    impl<B: Blob> Log<'_, B> {
        fn sector(&self, nth: u64) -> Option<[u8; 512]> {
            let mut bytes = [0; 512];
            let at = (self.start + nth % self.len) * SECTOR;
            self.disk.read_at(at, &mut bytes).ok().map(|()| bytes)
        }

        fn cycle(&self, nth: u64) -> Option<u32> {
            let bytes = self.sector(nth)?;
            let first = be32(&bytes, 0);
            Some(match first == RECORD {
                true => be32(&bytes, 4),
                false => first,
            })
        }

        /// Returns the head of the log: the sector after the last record. All sectors before the head have the
        /// same cycle number. The head and all sectors after it have a cycle number that is smaller by one, or
        /// zeros.
        fn head(&self) -> Option<u64> {
            let first = self.cycle(0)?;
            let (mut same, mut other) = (0, self.len);
            while other - same > 1 {
                let middle = same + (other - same) / 2;
                match self.cycle(middle)? == first {
                    true => same = middle,
                    false => other = middle,
                }
            }
            (first != 0).then_some(other)
        }
    }

    /// Returns whether the file system on `disk` was not unmounted: whether the last record of its log isn't
    /// an unmount record. Returns `None` if the file system is no XFS, if its log is on another device, or if
    /// the log cannot be read or is invalid.
    pub(super) fn is_dirty(disk: &impl Blob) -> Option<bool> {
        let mut sb = [0; 512];
        disk.read_at(0, &mut sb).ok()?;
        if sb.first_chunk() != Some(b"XFSB") {
            return None;
        }
        let block = u64::from(be32(&sb, 4)).checked_div(SECTOR)?;
        let start = be64(&sb, 48);
        let per_group = u64::from(be32(&sb, 84));
        // The upper bits of a block number are the allocation group.
        let shift = u32::from(*sb.get(124)?);
        let in_group = start & 1_u64.checked_shl(shift)?.checked_sub(1)?;
        let start_block = start.checked_shr(shift)?.checked_mul(per_group)?;
        let log = Log {
            disk,
            start: start_block.checked_add(in_group)?.checked_mul(block)?,
            len: u64::from(be32(&sb, 96)).checked_mul(block)?,
        };
        let end = log.start.checked_add(log.len)?.checked_mul(SECTOR)?;
        if start == 0 || log.len <= LONGEST || end > disk.size() {
            return None;
        }
        let head = log.head()?;
        for back in 1..=LONGEST {
            let at = head + log.len - back;
            let header = log.sector(at)?;
            if be32(&header, 0) != RECORD {
                continue;
            }
            let headers = match be32(&header, 8) {
                1 => 1,
                2 => u64::from(be32(&header, 320))
                    .div_ceil(DATA_OF_HEADER)
                    .max(1),
                _ => return None,
            };
            let data = u64::from(be32(&header, 12)).div_ceil(SECTOR);
            let operations = be32(&header, 40);
            // The kernel's condition: the record has only the unmount operation, and nothing follows it.
            let flags = *log.sector(at + headers)?.get(9)?;
            let is_last = headers + data == back;
            return Some(!(operations == 1 && flags & UNMOUNT != 0 && is_last));
        }
        None
    }
}

/// Returns the name of the file system on `disk`, and the mount options that it needs; `None` if the file
/// system is clean or unknown.
pub(crate) fn options(disk: &impl Blob) -> Option<(&'static str, &'static str)> {
    let sector = |at| {
        let mut bytes = [0; 512];
        // Errors are ignored: mounting will report them.
        disk.read_at(at, &mut bytes).ok().map(|()| bytes)
    };
    if let Some(bytes) = sector(EXT_AT) {
        let magic = bytes.get(EXT_MAGIC..EXT_MAGIC + 2);
        if magic == Some(&[0x53, 0xef]) && le32(&bytes, EXT_INCOMPAT) & EXT_RECOVER != 0 {
            return Some(("ext4", "ro,noload"));
        }
    }
    if xfs::is_dirty(disk) == Some(true) {
        return Some(("XFS", "ro,norecovery"));
    }
    let bytes = sector(BTRFS_AT)?;
    let is_btrfs = bytes.get(BTRFS_MAGIC..BTRFS_MAGIC + 8) == Some(b"_BHRfS_M");
    let log = bytes.get(BTRFS_LOG..BTRFS_LOG + 8)?;
    let has_log = log.iter().any(|&byte| byte != 0);
    (is_btrfs && has_log).then_some(("btrfs", "ro,rescue=nologreplay"))
}

/// Returns a note for the user, with the [`options`] to mount the file system on `disk`; `None` if it needs none.
/// `node` is the device node of `disk`.
pub(crate) fn note(disk: &impl Blob, node: &str) -> Option<String> {
    let (kind, options) = options(disk)?;
    Some(format!(
        "note: the {kind} file system on {node} was not unmounted cleanly, and a read-only device \
         cannot replay its journal: mount -o {options} shows it without what is in the journal"
    ))
}

/// As [`note`], for the partition `part` of `disk`. `node` is the device node of the partition.
pub(crate) fn note_of_part(disk: &impl Blob, part: Partition, node: &str) -> Option<String> {
    let bytes = |sectors: u64| sectors.checked_mul(SECTOR_SIZE);
    let (start, len) = (bytes(part.start)?, bytes(part.len)?);
    note(&Window::new(disk, start, len).ok()?, node)
}

#[cfg(test)]
mod tests {
    use overlaybd::format::blob::check_range;
    use overlaybd::format::Error;

    use super::*;

    struct Disk(Vec<u8>);

    impl Blob for Disk {
        type Error = Error;

        fn size(&self) -> u64 {
            self.0.len() as u64
        }

        fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
            check_range(self.size(), offset, buf.len() as u64)?;
            buf.copy_from_slice(&self.0[offset as usize..][..buf.len()]);
            Ok(())
        }

        fn stream(
            &self,
            offset: u64,
            len: u64,
            sink: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
        ) -> Result<(), Error> {
            sink(&self.0[offset as usize..][..len as usize])
        }
    }

    #[test]
    fn dirty_and_clean() {
        let mut disk = Disk(vec![0; 128 << 10]);
        assert_eq!(options(&Disk(Vec::new())), None);
        assert_eq!(options(&disk), None);
        disk.0[1024 + 0x38..][..2].copy_from_slice(&[0x53, 0xef]);
        disk.0[1024 + 0x60] = 0x42;
        assert_eq!(options(&disk), None);
        disk.0[1024 + 0x60] |= 4;
        assert_eq!(options(&disk), Some(("ext4", "ro,noload")));
        disk.0[1024 + 0x38] = 0;
        disk.0[(64 << 10) + 0x40..][..8].copy_from_slice(b"_BHRfS_M");
        assert_eq!(options(&disk), None);
        disk.0[(64 << 10) + 0x65] = 1;
        assert_eq!(options(&disk), Some(("btrfs", "ro,rescue=nologreplay")));
    }

    #[test]
    fn partitions() {
        let mut disk = Disk(vec![0; 128 << 10]);
        let at = 1 << 16;
        disk.0[at + 1024 + 0x38..][..2].copy_from_slice(&[0x53, 0xef]);
        disk.0[at + 1024 + 0x60] = 4;
        let note = |start, len| {
            let part = Partition {
                number: 1,
                start,
                len,
            };
            note_of_part(&disk, part, "/dev/x")
        };
        assert_eq!(options(&disk), None);
        assert!(note(128, 128).is_some_and(|note| note.contains("ext4 file system on /dev/x")));
        for (start, len) in [(0, 256), (128, 2), (128, 129), (u64::MAX, 1), (1, u64::MAX)] {
            assert_eq!(note(start, len), None, "{start} {len}");
        }
    }

    /// Length and start of the log of [`xfs_disk`], in sectors. The log is in the third group of 1000 blocks.
    const LOG: usize = 8000;
    const LOG_AT: usize = (2 * 1000 + 10) * 8;

    fn xfs_disk() -> Disk {
        let mut disk = Disk(vec![0; (LOG_AT + LOG) * 512]);
        for (at, bytes) in [
            (0, b"XFSB".as_slice()),
            (4, &4096_u32.to_be_bytes()),
            (48, &((2_u64 << 10) | 10).to_be_bytes()),
            (84, &1000_u32.to_be_bytes()),
            (96, &1000_u32.to_be_bytes()),
            (124, &[10]),
        ] {
            disk.0[at..][..bytes.len()].copy_from_slice(bytes);
        }
        disk
    }

    /// Writes the cycle number `cycle` to `sectors` of the log.
    fn cycle(disk: &mut Disk, sectors: std::ops::Range<usize>, cycle: u32) {
        for sector in sectors {
            let at = (LOG_AT + sector % LOG) * 512;
            disk.0[at..][..4].copy_from_slice(&cycle.to_be_bytes());
        }
    }

    /// Writes a record of one operation with these flags.
    fn record(disk: &mut Disk, sector: usize, cycle: u32, flags: u8) {
        let at = (LOG_AT + sector) * 512;
        for (field, number) in [
            (0, 0xfeed_babe),
            (4, cycle),
            (8, 2),
            (12, 512),
            (40, 1),
            (320, 32 << 10),
        ] {
            disk.0[at + field..][..4].copy_from_slice(&u32::to_be_bytes(number));
        }
        disk.0[(LOG_AT + (sector + 1) % LOG) * 512 + 9] = flags;
    }

    #[test]
    fn logs_of_xfs() {
        const UNMOUNT: u8 = 0x20;
        let dirty = Some(("XFS", "ro,norecovery"));
        // If the state is unknown, there is no note.
        let mut disk = xfs_disk();
        assert_eq!(options(&disk), None);
        // Logs in their first cycle, with zeros after the head; in a later cycle; with a last record that wraps
        // around the end of the log; and with one that ends there.
        for (head, now, before) in [(2, 1, 0), (100, 1, 0), (100, 7, 6), (1, 7, 6), (LOG, 7, 6)] {
            disk = xfs_disk();
            let at = (head + LOG - 2) % LOG;
            cycle(&mut disk, 0..head, now);
            cycle(&mut disk, head..LOG, before);
            if head > 1 {
                cycle(&mut disk, head - 2..head, now);
            } else {
                // The last sector of the log, where the record begins, is from the previous cycle.
                cycle(&mut disk, LOG - 1..LOG, before);
            }
            record(&mut disk, at, if head == 1 { before } else { now }, UNMOUNT);
            assert_eq!(options(&disk), None, "{head}");
            // The same record with another operation.
            record(&mut disk, at, if head == 1 { before } else { now }, 0x8);
            assert_eq!(options(&disk), dirty, "{head}");
        }
        // The log goes on after the unmount record.
        disk = xfs_disk();
        cycle(&mut disk, 0..100, 7);
        cycle(&mut disk, 100..LOG, 6);
        record(&mut disk, 50, 7, UNMOUNT);
        assert_eq!(options(&disk), dirty);
        // The disk is cut off.
        disk.0.truncate(disk.0.len() - 512);
        assert_eq!(options(&disk), None);
        // The log is on another device.
        disk = xfs_disk();
        disk.0[48..56].fill(0);
        assert_eq!(options(&disk), None);
    }
}
