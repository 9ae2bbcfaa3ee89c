// SPDX-License-Identifier: GPL-2.0

//! Recognises disks: by a partition table, a file system, swap, or data of LVM, RAID, LUKS or a similar user of
//! block devices.

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

#[cfg(test)]
mod tests {
    use super::is_disk;

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
}
