// SPDX-License-Identifier: GPL-2.0

//! Recognises disks: by a partition table, a file system, swap, or data of LVM, RAID, LUKS or a similar user of
//! block devices.

use overlaybd::format::num::{bytes_at, le32, le64, to_usize};

/// Number of bytes from the start of a disk that are examined.
pub(super) const HEAD: usize = 72 << 10;

/// Offsets and magic numbers, each at least four bytes long.
const MAGIC: &[(usize, &[u8])] = &[
    // Partition tables: GPT with sectors of 512 and 4096 bytes, Apple, BSD.
    (512, b"EFI PART"),
    (4096, b"EFI PART"),
    (512, b"PM\0\0"),
    (512, b"\x57\x45\x56\x82"),
    // File systems.
    (0, b"XFSB"),
    (65_600, b"_BHRfS_M"),
    (1024, b"\xe2\xe1\xf5\xe0"),
    (0, b"hsqs"),
    (0, b"sqsh"),
    (1024, b"\x10\x20\xf5\xf2"),
    (3, b"NTFS    "),
    (3, b"EXFAT   "),
    (54, b"FAT12   "),
    (54, b"FAT16   "),
    (82, b"FAT32   "),
    (32_769, b"CD001"),
    (32_769, b"BEA01"),
    (32, b"NXSB"),
    (1024, b"H+\0\x04"),
    (1024, b"HX\0\x05"),
    (32_768, b"JFS1"),
    (65_588, b"ReIsEr"),
    (65_536, b"\x01\x16\x19\x70"),
    (2048, b"OCFSV2"),
    (4096, b"OCFSV2"),
    (8192, b"OCFSV2"),
    (1024, b"\x02\0\0\0\0\0\x34\x34"),
    (0, b"\x45\x3d\xcd\x28"),
    (0, b"-rom1fs-"),
    // bcache and bcachefs.
    (4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca"),
    (4120, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9"),
    // LVM, LUKS, RAID, device-mapper targets.
    (24, b"LVM2 001"),
    (536, b"LVM2 001"),
    (1048, b"LVM2 001"),
    (1560, b"LVM2 001"),
    (0, b"LUKS\xba\xbe"),
    (0, b"\xfc\x4e\x2b\xa9"),
    (4096, b"\xfc\x4e\x2b\xa9"),
    (0, b"verity\0\0"),
    (0, b"integrt\0"),
    (0, b"dmvdo001"),
    // Swap with pages of 4 to 64 KiB.
    (4086, b"SWAPSPACE2"),
    (8182, b"SWAPSPACE2"),
    (16_374, b"SWAPSPACE2"),
    (32_758, b"SWAPSPACE2"),
    (65_526, b"SWAPSPACE2"),
];

/// Returns whether `head` certainly is the start of a disk.
pub(super) fn is_disk(head: &[u8]) -> bool {
    let there =
        |&(at, magic): &(usize, &[u8])| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    MAGIC.iter().any(there) || is_ext(head) || has_boot_sector(head)
}

/// Returns whether `head` has the superblock of ext2, ext3 or ext4. The magic number has only two bytes, so the
/// fields near it must be valid, too.
fn is_ext(head: &[u8]) -> bool {
    let Some(superblock) = head.get(1024..1024 + 88) else {
        return false;
    };
    let u32_at = |at: usize| {
        let bytes = superblock.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
    };
    let (inodes, blocks, block_size, revision) = (u32_at(0), u32_at(4), u32_at(24), u32_at(76));
    superblock.get(56..58) == Some(b"\x53\xef")
        && inodes > 0
        && blocks > 0
        && block_size <= 6
        && revision <= 1
}

/// Returns whether `head` begins with a master boot record or a boot sector of FAT. The signature has only two
/// bytes, so there must also be a jump at the start, or a table whose partitions are all marked active or
/// inactive.
fn has_boot_sector(head: &[u8]) -> bool {
    let signed = head.get(510..512) == Some(b"\x55\xaa");
    let jump = matches!(head, [0xeb, _, 0x90, ..] | [0xe9, ..]);
    let table = head.get(446..510).unwrap_or_default();
    let mut partitions = table.chunks_exact(16);
    let active = |partition: &[u8]| matches!(partition, [0 | 0x80, ..]);
    signed && (jump || partitions.all(active))
}

/// Length of the sectors of most disks.
const SECTOR: u64 = 512;
/// Type of a partition that stands for a GUID partition table, and has any length.
const PROTECTIVE: u8 = 0xee;

/// Returns the size that a disk has at least if it begins with `head`, and what says so. The disk may have more;
/// `None` if nothing says how long it is. Where a file system has the whole disk, there is no partition table.
pub(super) fn needed(head: &[u8]) -> Option<(u64, &'static str)> {
    let starts =
        |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    let be32 = |at| u64::from(u32::from_be_bytes(bytes_at(head, at)));
    let blocks_of = |len: u32, blocks: u64| {
        let len = 1_u64.checked_shl(len).unwrap_or(0);
        blocks.saturating_mul(len)
    };
    Some(if starts(0, b"XFSB") {
        let blocks = u64::from_be_bytes(bytes_at(head, 8));
        (blocks.saturating_mul(be32(4)), "XFS")
    } else if starts(65_600, b"_BHRfS_M") {
        // Of this device, if there are several.
        (le64(head, 65_536 + 0xd1), "btrfs")
    } else if is_ext(head) {
        const HAS_64_BITS: u32 = 0x80;
        let high = match le32(head, 1024 + 96) & HAS_64_BITS {
            0 => 0,
            _ => le32(head, 1024 + 336),
        };
        let blocks = (u64::from(high) << 32) | u64::from(le32(head, 1024 + 4));
        (
            blocks_of(10 + le32(head, 1024 + 24), blocks),
            "ext file system",
        )
    } else if starts(0, b"hsqs") {
        (le64(head, 40), "squashfs")
    } else if starts(1024, b"\xe2\xe1\xf5\xe0") {
        let [bits] = bytes_at(head, 1024 + 12);
        (
            blocks_of(bits.into(), le32(head, 1024 + 36).into()),
            "erofs",
        )
    } else if starts(32_768, b"\x01CD001") {
        // Its partition table is one for booting from other media.
        let len = u16::from_le_bytes(bytes_at(head, 32_768 + 128));
        (
            u64::from(le32(head, 32_768 + 80)) * u64::from(len),
            "ISO 9660 file system",
        )
    } else if starts(512, b"EFI PART") {
        (end_of_guid_partitions(head, SECTOR), "partition table")
    } else if starts(4096, b"EFI PART") {
        (end_of_guid_partitions(head, 4096), "partition table")
    } else {
        (end_of_partitions(head)?, "partition table")
    })
}

/// Returns the end of the last partition in a GUID partition table. The table ends with `head`, if not before.
fn end_of_guid_partitions(head: &[u8], sector: u64) -> u64 {
    let at = |place: usize| to_usize(sector) + place;
    let table = le64(head, at(72)).saturating_mul(sector);
    let (count, len) = (
        to_usize(le32(head, at(80)).into()),
        to_usize(le32(head, at(84)).into()),
    );
    let table = usize::try_from(table)
        .ok()
        .and_then(|table| head.get(table..));
    let entries = table.unwrap_or_default().chunks_exact(len.max(128));
    let used = entries
        .take(count)
        .filter(|entry| bytes_at(entry, 0) != [0; 16]);
    let last = used.map(|entry| le64(entry, 40)).max();
    last.map_or(0, |last| last.saturating_add(1).saturating_mul(sector))
}

/// Returns the end of the last partition in a master boot record; `None` if there is none. A sector has 512 bytes
/// at least.
fn end_of_partitions(head: &[u8]) -> Option<u64> {
    let table = head.get(446..510)?;
    let is_table = head.get(510..512) == Some(b"\x55\xaa")
        && table
            .chunks_exact(16)
            .all(|entry| matches!(entry, [0 | 0x80, ..]));
    let entries = table.chunks_exact(16).filter(|_| is_table);
    let used = entries.filter(|entry| !matches!(bytes_at(entry, 4), [0 | PROTECTIVE]));
    used.map(|entry| (u64::from(le32(entry, 8)) + u64::from(le32(entry, 12))) * SECTOR)
        .max()
}

#[cfg(test)]
mod tests {
    use super::{is_disk, needed};

    fn head(parts: &[(usize, &[u8])]) -> Vec<u8> {
        let mut head = vec![0; super::HEAD];
        for (at, bytes) in parts {
            for (to, from) in head.iter_mut().skip(*at).zip(*bytes) {
                *to = *from;
            }
        }
        head
    }

    #[test]
    fn disks() {
        let yes = |parts: &[(usize, &[u8])]| is_disk(&head(parts));
        assert!(!yes(&[]));
        assert!(!is_disk(b""));
        for (at, magic) in super::MAGIC {
            assert!(yes(&[(*at, magic)]), "{at}");
            assert!(!yes(&[(*at + 1, magic)]), "{at}");
        }
        let ext: &[(usize, &[u8])] = &[
            (1024, b"\x10\0\0\0\x40"),
            (1080, b"\x53\xef"),
            (1100, b"\x01"),
        ];
        assert!(yes(ext));
        assert!(!yes(&[(1080, b"\x53\xef")]));
        assert!(yes(&[(510, b"\x55\xaa")]));
        assert!(yes(&[
            (0, b"\xeb\x3c\x90"),
            (446, b"text"),
            (510, b"\x55\xaa")
        ]));
        assert!(!yes(&[(446, b"text"), (510, b"\x55\xaa")]));
    }

    #[test]
    fn sizes() {
        let said = |parts: &[(usize, &[u8])]| needed(&head(parts)).map(|(size, _)| size);
        assert_eq!(said(&[]), None);
        let iso: &[(usize, &[u8])] = &[
            (32_768, b"\x01CD001"),
            (32_848, b"\x03\x02\x01\0\0\x01\x02\x03"),
            (32_896, b"\0\x08\x08\0"),
        ];
        assert_eq!(said(iso), Some(0x010203 * 2048));
        // Tables with one partition, and with that for a GUID partition table.
        let table = |kind: u8| {
            let mut entry = vec![0; 16];
            (entry[4], entry[8], entry[12], entry[15]) = (kind, 63, 100, 1);
            entry
        };
        let size = (63 + 100 + (1 << 24)) * 512;
        assert_eq!(said(&[(462, &table(0x83)), (510, b"\x55\xaa")]), Some(size));
        assert_eq!(said(&[(462, &table(0xee)), (510, b"\x55\xaa")]), None);
        assert_eq!(said(&[(462, &table(0x83)), (510, b"\x55\xab")]), None);
        let entry = table(0x83);
        let partitions: &[(usize, &[u8])] = &[(462, &entry), (510, b"\x55\xaa")];
        let hybrid = [iso, partitions].concat();
        assert_eq!(said(&hybrid), Some(0x010203 * 2048));
        // Values that make no sense.
        for &(at, magic) in super::MAGIC {
            let mut bytes = vec![0xff; super::HEAD];
            bytes[at..at + magic.len()].copy_from_slice(magic);
            for len in [0, at, at + magic.len(), super::HEAD] {
                let _ = needed(&bytes[..len]);
            }
        }
    }
}
