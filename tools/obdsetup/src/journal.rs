// SPDX-License-Identifier: GPL-2.0

//! File systems that were not unmounted cleanly: a read-only device cannot replay their journals,
//! and mounting fails unless an option says to do without.

use overlaybd::format::num::le32;
use overlaybd::format::Blob;

/// Byte offset of the superblock of ext2, ext3 and ext4.
const EXT_AT: u64 = 1024;
/// Byte offsets in that superblock: the magic, and the features without which it can't be mounted.
const EXT_MAGIC: usize = 0x38;
const EXT_INCOMPAT: usize = 0x60;
/// The journal has changes that must be replayed.
const EXT_RECOVER: u32 = 0x4;

/// Byte offset of the superblock of btrfs.
const BTRFS_AT: u64 = 64 << 10;
/// Byte offsets in that superblock: the magic, and where the tree with the log is, or 0.
const BTRFS_MAGIC: usize = 0x40;
const BTRFS_LOG: usize = 0x60;

/// The mount options that the file system on `disk` needs, and the file system's name; `None` where
/// the file system is clean, or another one. XFS keeps its state in the log itself.
pub(crate) fn options(disk: &impl Blob) -> Option<(&'static str, &'static str)> {
    let sector = |at| {
        let mut bytes = [0; 512];
        // Whoever mounts it will hear of an error.
        disk.read_at(at, &mut bytes).ok().map(|()| bytes)
    };
    if let Some(bytes) = sector(EXT_AT) {
        let magic = bytes.get(EXT_MAGIC..EXT_MAGIC + 2);
        if magic == Some(&[0x53, 0xef]) && le32(&bytes, EXT_INCOMPAT) & EXT_RECOVER != 0 {
            return Some(("ext4", "ro,noload"));
        }
    }
    let bytes = sector(BTRFS_AT)?;
    let is_btrfs = bytes.get(BTRFS_MAGIC..BTRFS_MAGIC + 8) == Some(b"_BHRfS_M");
    let log = bytes.get(BTRFS_LOG..BTRFS_LOG + 8)?;
    let has_log = log.iter().any(|&byte| byte != 0);
    (is_btrfs && has_log).then_some(("btrfs", "ro,rescue=nologreplay"))
}

/// What to tell of [`options`].
pub(crate) fn note(disk: &impl Blob, node: &str) -> Option<String> {
    let (kind, options) = options(disk)?;
    Some(format!(
        "note: the {kind} file system on {node} was not unmounted cleanly, and a read-only device \
         cannot replay its journal: mount -o {options} shows it without what is in the journal"
    ))
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
}
