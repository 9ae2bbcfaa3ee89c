// SPDX-License-Identifier: GPL-2.0

//! Recognises disks: by a partition table, a file system, swap, or data of LVM, RAID, LUKS or a similar user of
//! block devices.

use std::collections::BTreeMap;

use overlaybd::format::num::{bytes_at, le32, le64, to_u64, to_usize};
use serde::Deserialize;

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
/// Length of the longest cylinder. isohybrid(1) fills up the partition with an ISO 9660 file system to whole cylinders.
const CYLINDER: u64 = 255 * 63 * SECTOR;

/// What a disk with a partition table has.
pub(super) const TABLE: &str = "partition table";
/// What an encrypted disk has. It says where the data begins, and rarely where it ends.
pub(super) const LUKS: &str = "LUKS header";

/// What the start of a disk says about its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Needed {
    /// The size that the disk has at least.
    pub(super) size: u64,
    /// The structure that says so.
    pub(super) what: &'static str,
    /// The partition that ends last, if this structure is a master boot record. The kernel does not use a GUID
    /// partition table that is for a larger disk.
    pub(super) last: Option<Last>,
}

/// The partition of a disk that ends last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Last {
    /// Its first byte.
    pub(super) start: u64,
    /// Where the last of the other partitions ends.
    pub(super) others: u64,
}

/// The bytes of a partition: the first one, and that behind its end.
type Partition = (u64, u64);

/// Returns the size that a disk has at least if it begins with `head`. The disk may have more; `None` if nothing says
/// how long it is.
///
/// A disk may have structures of an earlier use. fdisk(8) overwrites neither the start of the first sector nor what is
/// behind the table, and mkfs(8) overwrites the table. So a partition table counts more than a file system that has the
/// whole disk. There are two exceptions: an image with an ISO 9660 file system has a partition table for booting from
/// other media; and a boot sector, whose code may look like a partition table.
pub(super) fn needed(head: &[u8]) -> Option<Needed> {
    let (guid, iso) = (guid_table(head), iso(head));
    let is_guid = guid.is_some();
    // An ISO 9660 file system may have a table that was made for a longer file.
    let usable = guid.as_ref().filter(|_| iso.is_none());
    let usable = usable.map_or(0, |guid| guid.usable);
    let mut partitions = guid.map_or_else(|| partitions(head), |guid| guid.partitions);
    if let Some(iso) = iso {
        let of_iso = |&(start, end): &Partition| {
            start < iso.size && end <= iso.size.saturating_add(CYLINDER)
        };
        partitions.retain(|partition| !of_iso(partition));
    }
    let boot = boot_sector(head).filter(|_| !is_guid);
    let table = table(&partitions).map(|table| Needed {
        size: table.size.max(usable),
        last: table.last.filter(|_| !is_guid),
        ..table
    });
    let table = table.or_else(|| (usable != 0).then(|| whole(usable, TABLE)));
    match (table, boot) {
        (Some(table), Some(boot)) if boot.size < table.size => Some(boot),
        (Some(table), _) => Some(table),
        (None, Some(boot)) => Some(boot),
        (None, None) if is_guid => iso,
        (None, None) => file_system(head).or(iso).or_else(|| other(head)),
    }
}

/// Returns the size that a disk has at least if it begins with `head`, and has all of the second copy of its GUID
/// partition table; `None` if it has no such table. The kernel needs only the first copy.
pub(super) fn with_second_table(head: &[u8]) -> Option<u64> {
    let guid = guid_table(head).filter(|_| iso(head).is_none())?;
    Some(guid.second)
}

/// Returns what `size` and `what` say.
fn whole(size: u64, what: &'static str) -> Needed {
    Needed {
        size,
        what,
        last: None,
    }
}

/// Returns what a table with these partitions says; `None` if there are none.
fn table(partitions: &[Partition]) -> Option<Needed> {
    let ends = || partitions.iter().map(|&(_, end)| end).enumerate();
    let (nth, size) = ends().max_by_key(|&(_, end)| end)?;
    let &(start, _) = partitions.get(nth)?;
    let others = ends().filter(|&(other, _)| other != nth);
    let others = others.map(|(_, end)| end).max().unwrap_or(0);
    Some(Needed {
        last: Some(Last { start, others }),
        ..whole(size, TABLE)
    })
}

fn starts(head: &[u8], at: usize, magic: &[u8]) -> bool {
    head.get(at..).is_some_and(|rest| rest.starts_with(magic))
}

fn le16(head: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes_at(head, at))
}

/// Returns what the boot sector of FAT, exFAT or NTFS says.
fn boot_sector(head: &[u8]) -> Option<Needed> {
    if head.get(510..512) != Some(b"\x55\xaa") {
        return None;
    }
    if starts(head, 3, b"EXFAT   ") {
        let [bits] = bytes_at(head, 108);
        let sectors = le64(head, 72);
        return (9..=12)
            .contains(&bits)
            .then(|| whole(sectors.saturating_mul(1 << bits), "exFAT"));
    }
    let sector = le16(head, 11);
    if !(256..=4096).contains(&sector) || !sector.is_power_of_two() {
        return None;
    }
    let of = |sectors: u64| sectors.saturating_mul(sector.into());
    if starts(head, 3, b"NTFS    ") {
        return Some(whole(of(le64(head, 40)), "NTFS"));
    }
    let is_fat = starts(head, 54, b"FAT12   ")
        || starts(head, 54, b"FAT16   ")
        || starts(head, 82, b"FAT32   ");
    let [cluster, _, _, tables] = bytes_at(head, 13);
    let is_valid = cluster.is_power_of_two() && tables != 0 && le16(head, 14) != 0;
    let sectors = match le16(head, 19) {
        0 => le32(head, 32),
        sectors => sectors.into(),
    };
    (is_fat && is_valid).then(|| whole(of(sectors.into()), "FAT file system"))
}

/// Returns what an ISO 9660 file system says.
fn iso(head: &[u8]) -> Option<Needed> {
    let size = u64::from(le32(head, 32_768 + 80)) * u64::from(le16(head, 32_768 + 128));
    starts(head, 32_768, b"\x01CD001").then(|| whole(size, "ISO 9660 file system"))
}

/// Returns what a file system says that has the whole disk, and overwrites a partition table.
fn file_system(head: &[u8]) -> Option<Needed> {
    let blocks_of = |bits: u32, blocks: u64| {
        let len = 1_u64.checked_shl(bits).unwrap_or(0);
        blocks.saturating_mul(len)
    };
    if starts(head, 0, b"XFSB") {
        let blocks = u64::from_be_bytes(bytes_at(head, 8));
        let len = u32::from_be_bytes(bytes_at(head, 4));
        Some(whole(blocks.saturating_mul(len.into()), "XFS"))
    } else if is_ext(head) {
        const HAS_64_BITS: u32 = 0x80;
        let high = match le32(head, 1024 + 96) & HAS_64_BITS {
            0 => 0,
            _ => le32(head, 1024 + 336),
        };
        let blocks = (u64::from(high) << 32) | u64::from(le32(head, 1024 + 4));
        let size = blocks_of(10 + le32(head, 1024 + 24), blocks);
        Some(whole(size, "ext file system"))
    } else if starts(head, 0, b"hsqs") {
        // Versions before 4 have the size elsewhere.
        (le16(head, 28) == 4).then(|| whole(le64(head, 40), "squashfs"))
    } else if starts(head, 1024, b"\xe2\xe1\xf5\xe0") {
        let [bits] = bytes_at(head, 1024 + 12);
        let size = blocks_of(bits.into(), le32(head, 1024 + 36).into());
        Some(whole(size, "erofs"))
    } else {
        None
    }
}

/// Returns what btrfs, LVM, LUKS or swap says. mkfs(8) may have left their traces in the other file systems.
fn other(head: &[u8]) -> Option<Needed> {
    if let Some(size) = luks(head) {
        return Some(whole(size, LUKS));
    }
    if starts(head, 65_600, b"_BHRfS_M") {
        // Of this device, if there are several.
        return Some(whole(le64(head, 65_536 + 0xd1), "btrfs"));
    }
    let labels = (0..4).map(|sector| sector * to_usize(SECTOR));
    let mut labels = labels.filter(|&label| starts(head, label, b"LABELONE"));
    if let Some(label) = labels.find(|&label| starts(head, label + 24, b"LVM2 001")) {
        // Behind the UUID, with which the header of the physical volume begins.
        let at = to_usize(le32(head, label + 20).into()) + 32;
        return Some(whole(le64(head, label + at), "LVM physical volume"));
    }
    let page = (12..=16)
        .map(|bits| 1_usize << bits)
        .find(|page| starts(head, page - 10, b"SWAPSPACE2"))?;
    let pages = u64::from(le32(head, 1028)) + 1;
    (le32(head, 1024) == 1).then(|| whole(pages * to_u64(page), "swap area"))
}

/// Returns the end of what the header of LUKS describes: that of the data, or the start of the data if this ends with the
/// disk.
fn luks(head: &[u8]) -> Option<u64> {
    /// Length of the header of version 2 in front of the text.
    const BINARY: usize = 4096;
    if !starts(head, 0, b"LUKS\xba\xbe") {
        return None;
    }
    match u16::from_be_bytes(bytes_at(head, 6)) {
        1 => {
            let sectors = u32::from_be_bytes(bytes_at(head, 104));
            Some(u64::from(sectors) * SECTOR)
        }
        2 => {
            let end = usize::try_from(u64::from_be_bytes(bytes_at(head, 8))).ok()?;
            let text = head.get(BINARY..end.min(head.len()))?;
            let text = text.split(|&byte| byte == 0).next()?;
            let Luks { segments } = serde_json::from_slice(text).ok()?;
            let end = |Segment { offset, size }: &Segment| {
                let offset: u64 = offset.parse().ok()?;
                // Otherwise "dynamic".
                let size: u64 = size.parse().unwrap_or(0);
                offset.checked_add(size)
            };
            segments.values().filter_map(end).max()
        }
        _ => None,
    }
}

/// The text in the header of LUKS, version 2.
#[derive(Deserialize)]
struct Luks {
    segments: BTreeMap<String, Segment>,
}

/// Where the encrypted data is, in bytes.
#[derive(Deserialize)]
struct Segment {
    offset: String,
    size: String,
}

/// A GUID partition table.
struct Guid {
    partitions: Vec<Partition>,
    /// The end of the space for partitions. If the disk ends before, the kernel does not use the table.
    usable: u64,
    /// The end of the second copy of the table.
    second: u64,
}

/// Returns the GUID partition table; `None` if there is no such table. As the specification says, it counts only with a
/// protective partition in the master boot record. The table ends with `head`, if not before.
fn guid_table(head: &[u8]) -> Option<Guid> {
    let entries = head.get(446..510)?.chunks_exact(16);
    let is_protected = head.get(510..512) == Some(b"\x55\xaa")
        && entries
            .map(|entry| bytes_at(entry, 4))
            .any(|kind| kind == [PROTECTIVE]);
    let mut sectors = [SECTOR, 4096].into_iter().filter(|_| is_protected);
    let sector = sectors.find(|&sector| starts(head, to_usize(sector), b"EFI PART"))?;
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
    let partition = |entry: &[u8]| {
        let (first, last) = (le64(entry, 32), le64(entry, 40));
        (
            first.saturating_mul(sector),
            last.saturating_add(1).saturating_mul(sector),
        )
    };
    // Both are the numbers of a last sector.
    let end = |place: usize| match le64(head, at(place)) {
        0 => 0,
        last => last.saturating_add(1).saturating_mul(sector),
    };
    Some(Guid {
        partitions: used.map(partition).collect(),
        usable: end(48),
        second: end(32),
    })
}

/// Returns the partitions in a master boot record. A sector has 512 bytes at least.
fn partitions(head: &[u8]) -> Vec<Partition> {
    let table = head.get(446..510).unwrap_or_default();
    let is_table = head.get(510..512) == Some(b"\x55\xaa")
        && table
            .chunks_exact(16)
            .all(|entry| matches!(entry, [0 | 0x80, ..]));
    let entries = table.chunks_exact(16).filter(|_| is_table);
    let used = entries
        .filter(|entry| !matches!(bytes_at(entry, 4), [0 | PROTECTIVE]) && le32(entry, 12) != 0);
    let partition = |entry: &[u8]| {
        let start = u64::from(le32(entry, 8));
        let end = start + u64::from(le32(entry, 12));
        (start * SECTOR, end * SECTOR)
    };
    used.map(partition).collect()
}

#[cfg(test)]
mod tests {
    use super::{is_disk, needed, with_second_table};

    /// The end of a boot sector.
    const SIGNED: (usize, &[u8]) = (510, b"\x55\xaa");
    const ISO: &[(usize, &[u8])] = &[
        (32_768, b"\x01CD001"),
        (32_848, b"\x03\x02\x01\0\0\x01\x02\x03"),
        (32_896, b"\0\x08\x08\0"),
    ];
    const ISO_SIZE: u64 = 0x010203 * 2048;

    /// Returns an entry of a master boot record.
    fn entry(kind: u8, start: u32, len: u32) -> Vec<u8> {
        let mut entry = vec![0, 0, 0, 0, kind, 0, 0, 0];
        entry.extend(start.to_le_bytes());
        entry.extend(len.to_le_bytes());
        entry
    }

    /// Returns an entry of a GUID partition table.
    fn guid_entry(first: u64, last: u64) -> Vec<u8> {
        let mut entry = vec![7; 32];
        entry.extend(first.to_le_bytes());
        entry.extend(last.to_le_bytes());
        entry
    }

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
        let said = |parts: &[(usize, &[u8])]| needed(&head(parts)).map(|needed| needed.size);
        assert_eq!(said(&[]), None);
        assert_eq!(said(ISO), Some(ISO_SIZE));
        // Tables with one partition, and with that for a GUID partition table.
        let table = |kind: u8, signature: &[u8]| {
            let entry = entry(kind, 63, 100 + (1 << 24));
            said(&[(462, &entry), (510, signature)])
        };
        let size = (63 + 100 + (1 << 24)) * 512;
        assert_eq!(table(0x83, b"\x55\xaa"), Some(size));
        assert_eq!(table(0xee, b"\x55\xaa"), None);
        assert_eq!(table(0x83, b"\x55\xab"), None);
        // Values that make no sense.
        for &(at, magic) in super::MAGIC {
            let mut bytes = vec![0xff; super::HEAD];
            bytes[at..at + magic.len()].copy_from_slice(magic);
            for len in [0, at, at + magic.len(), super::HEAD] {
                let _ = needed(&bytes[..len]);
            }
        }
    }

    /// The fields of file systems and others as their own programs write them.
    #[test]
    fn sizes_of_file_systems() {
        let said = |parts: &[(usize, &[u8])]| {
            needed(&head(parts)).map(|needed| (needed.size, needed.what))
        };
        let boot = |parts: &[(usize, &[u8])]| said(&[parts, &[SIGNED]].concat());
        let sectors_512: (usize, &[u8]) = (11, b"\0\x02");
        // One sector in a cluster, one reserved sector, two tables.
        let fat: &[(usize, &[u8])] = &[sectors_512, (13, b"\x01\x01\0\x02")];
        let old: &[(usize, &[u8])] = &[(19, b"\0\x20"), (54, b"FAT12   ")];
        let large: (usize, &[u8]) = (32, b"\0\0\x02");
        let name: (usize, &[u8]) = (82, b"FAT32   ");
        assert_eq!(
            boot(&[fat, old].concat()),
            Some((4 << 20, "FAT file system"))
        );
        let new = [fat, &[large, name]].concat();
        assert_eq!(boot(&new), Some((64 << 20, "FAT file system")));
        assert_eq!(said(&new), None);
        assert_eq!(boot(&[sectors_512, large, name]), None);
        assert_eq!(boot(&[fat, &[large]].concat()), None);
        let ntfs: &[(usize, &[u8])] = &[(3, b"NTFS    "), sectors_512, (40, b"\xff\x7f")];
        assert_eq!(boot(ntfs), Some((0x7fff * 512, "NTFS")));
        let exfat: &[(usize, &[u8])] = &[(3, b"EXFAT   "), (72, b"\0\x80"), (108, b"\x09")];
        assert_eq!(boot(exfat), Some((16 << 20, "exFAT")));
        assert_eq!(boot(&[exfat[0], exfat[1], (108, b"\xff")]), None);

        let squashfs: &[(usize, &[u8])] = &[(0, b"hsqs"), (40, b"\x39\x30")];
        assert_eq!(
            said(&[squashfs, &[(28, b"\x04")]].concat()),
            Some((12345, "squashfs"))
        );
        assert_eq!(said(&[squashfs, &[(28, b"\x03")]].concat()), None);

        let label: &[(usize, &[u8])] = &[
            (512, b"LABELONE"),
            (512 + 20, b"\x20"),
            (512 + 24, b"LVM2 001"),
            (512 + 64, b"\0\0\0\x02"),
        ];
        assert_eq!(said(label), Some((32 << 20, "LVM physical volume")));
        let swap: &[(usize, &[u8])] = &[(1024, b"\x01\0\0\0\xff\x0f")];
        for page in [4096, 8192, 16_384, 32_768, 65_536] {
            let swap = [swap, &[(page - 10, b"SWAPSPACE2")]].concat();
            assert_eq!(said(&swap), Some((4096 * page as u64, "swap area")));
        }
        assert_eq!(said(&[(4086, b"SWAPSPACE2"), (1028, b"\xff\x0f")]), None);
    }

    #[test]
    fn sizes_of_encrypted_disks() {
        let said = |parts: &[(usize, &[u8])]| {
            needed(&head(parts)).map(|needed| (needed.size, needed.what))
        };
        let luks = |size: u64| Some((size, "LUKS header"));
        let magic: (usize, &[u8]) = (0, b"LUKS\xba\xbe\0\x01");
        assert_eq!(said(&[magic, (104, b"\0\0\x10")]), luks(2 << 20));
        let magic: (usize, &[u8]) = (0, b"LUKS\xba\xbe\0\x02\0\0\0\0\0\0\x40");
        let text = |size: &str| {
            format!(
                r#"{{"keyslots":{{}},"segments":{{"0":{{"type":"crypt","offset":"16777216","size":"{size}"}}}}}}"#
            )
        };
        for (size, wanted) in [
            ("dynamic", luks(16 << 20)),
            ("1048576", luks(17 << 20)),
            ("18446744073709551615", None),
        ] {
            assert_eq!(said(&[magic, (4096, text(size).as_bytes())]), wanted);
        }
        for text in ["", "{", "{\"segments\":{}}", "{\"segments\":[]}"] {
            assert_eq!(said(&[magic, (4096, text.as_bytes())]), None, "{text}");
        }
    }

    /// Structures of an earlier use of the disk don't count.
    #[test]
    fn traces() {
        let said = |parts: &[&[(usize, &[u8])]]| {
            needed(&head(&parts.concat())).map(|needed| (needed.size, needed.what))
        };
        let table = |size: u64| Some((size, "partition table"));
        let (used, protective) = (entry(0x83, 2048, 6144), entry(0xee, 1, u32::MAX));
        let dos: &[(usize, &[u8])] = &[(446, &used), SIGNED];
        let protected: &[(usize, &[u8])] = &[(446, &protective), SIGNED];
        let ext: &[(usize, &[u8])] = &[
            (1024, b"\x10\0\0\0\0\0\x10"),
            (1080, b"\x53\xef"),
            (1100, b"\x01"),
        ];
        assert_eq!(said(&[ext]), Some((1 << 30, "ext file system")));
        assert_eq!(said(&[ext, dos]), table(4 << 20));
        assert_eq!(said(&[&[(0, b"XFSB\0\0\x10\0\xff")], dos]), table(4 << 20));
        let btrfs: &[(usize, &[u8])] = &[(65_600, b"_BHRfS_M"), (65_745, b"\0\0\0\x40")];
        assert_eq!(said(&[btrfs]), Some((1 << 30, "btrfs")));
        assert_eq!(said(&[btrfs, dos]), table(4 << 20));
        assert_eq!(said(&[btrfs, ext]), said(&[ext]));

        // A GUID partition table, with and without the partition that protects it.
        let [small, large] = [8191_u64, (1 << 20) - 1].map(|last| guid_entry(2048, last));
        let [small, large] = [&small, &large].map(|entry| {
            let parts: [(usize, &[u8]); 5] = [
                (512, b"EFI PART"),
                (512 + 72, b"\x02"),
                (512 + 80, b"\x80"),
                (512 + 84, b"\x80"),
                (1024, entry),
            ];
            parts
        });
        assert_eq!(said(&[&large, protected]), table(512 << 20));
        // The space for partitions, even if there is none.
        let usable: &[(usize, &[u8])] = &[(512 + 48, b"\xde\xff\x1f"), (512 + 32, b"\xff\xff\x1f")];
        let all = (1 << 30) - 33 * 512;
        assert_eq!(said(&[&large, usable, protected]), table(all));
        assert_eq!(said(&[&large[..4], usable, protected]), table(all));
        assert_eq!(said(&[ISO, &small, usable, protected]), said(&[ISO]));
        let second = |parts: &[&[(usize, &[u8])]]| with_second_table(&head(&parts.concat()));
        assert_eq!(second(&[&large, usable, protected]), Some(1 << 30));
        assert_eq!(second(&[&large, usable]), None);
        assert_eq!(second(&[ISO, &small, usable, protected]), None);
        let guid = needed(&head(&[large.as_slice(), protected].concat()));
        assert_eq!(guid.map(|guid| guid.last), Some(None));
        assert_eq!(said(&[&large]), None);
        assert_eq!(said(&[&large, dos]), table(4 << 20));
        assert_eq!(said(&[&small, protected, btrfs]), table(4 << 20));

        // An image with an ISO 9660 file system has tables of which the last partition may be filled up.
        let sectors = (ISO_SIZE / 512) as u32;
        let iso = Some((ISO_SIZE, "ISO 9660 file system"));
        let of_iso = entry(0x17, 64, sectors);
        assert_eq!(said(&[ISO, &[(446, &of_iso), SIGNED]]), iso);
        assert_eq!(said(&[ISO, &small, protected]), iso);
        assert_eq!(said(&[ISO, &large, protected]), table(512 << 20));
        let behind = entry(0xef, sectors, 2880);
        let both: &[(usize, &[u8])] = &[(446, &of_iso), (462, &behind), SIGNED];
        assert_eq!(said(&[ISO, both]), table(ISO_SIZE + 2880 * 512));

        // The smaller size, if a boot sector has code that looks like a table, or has been overwritten by a table.
        let fat: &[(usize, &[u8])] = &[
            (11, b"\0\x02\x01\x01\0\x02\0\0\0\x20"),
            (54, b"FAT12   "),
            SIGNED,
        ];
        assert_eq!(said(&[fat, dos]), table(4 << 20));
        let used = entry(0x83, 2048, 6145);
        let large_dos: &[(usize, &[u8])] = &[(446, &used), SIGNED];
        assert_eq!(said(&[fat, large_dos]), Some((4 << 20, "FAT file system")));
        assert_eq!(said(&[fat, &large, protected]), table(512 << 20));
    }

    #[test]
    fn the_last_partition() {
        let (first, last) = (entry(0x83, 2048, 2048), entry(0x83, 8192, 2048));
        for (places, others) in [([446, 462], 4096), ([494, 446], 4096), ([446, 446], 0)] {
            let needed = needed(&head(&[(places[0], &first), (places[1], &last), SIGNED]));
            let last = needed.and_then(|needed| needed.last);
            let (start, others) = (8192 * 512, others * 512);
            assert_eq!(last, Some(super::Last { start, others }));
        }
        assert_eq!(needed(&head(ISO)).and_then(|needed| needed.last), None);
    }
}
