// SPDX-License-Identifier: GPL-2.0

//! vmdk images, whose data may be in several files.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use overlaybd::format::num::{le32, le64};

use super::super::vmdk::{descriptor, part, Place, MAGIC, NAME};
use super::{Image, SECTOR};
use crate::terminal::interrupt;

/// The magic number of a file of an ESX server.
const COWD: &[u8] = b"COWD";
/// The offset of the first table if it is in the footer.
const IN_FOOTER: u64 = u64::MAX;
/// Bits of a header's flags: a place of 1 stands for zeros; a compressed block has its length in front.
const ZERO_BLOCKS: u32 = 1 << 2;
const MARKERS: u32 = 1 << 17;
/// Number of entries in the tables of a [`COWD`] file.
const COWD_ENTRIES: u64 = 4096;

/// A line of a descriptor.
#[derive(Debug, PartialEq, Eq)]
struct Extent<'a> {
    kind: &'a [u8],
    name: &'a [u8],
    sectors: u64,
    /// The sector of the file with which its data begins.
    start: u64,
}

/// Checks that the image at `image` and all files with its data are complete. Messages call the image `name`. All
/// files that it names were checked by the caller.
pub(super) fn check(image: &Path, name: &Path) -> Result<()> {
    // By device and inode, so that files that name each other come to an end.
    let mut seen = BTreeSet::new();
    let mut left = vec![(image.to_owned(), name.to_owned(), Place::First)];
    while let Some((path, name, place)) = left.pop() {
        interrupt::check()?;
        let cannot_read = || format!("{}: cannot read", name.display());
        let meta = path.metadata().with_context(cannot_read)?;
        if !seen.insert((meta.dev(), meta.ino())) {
            continue;
        }
        let mut file = Image::open(&path, &name)?;
        find(&mut file)?;
        file.finish()?;
        let text = descriptor(&path, place).with_context(cannot_read)?;
        for extent in extents(&text.unwrap_or_default()) {
            let part = part(image, OsStr::from_bytes(extent.name));
            match extent.kind {
                b"FLAT" | b"VMFS" => flat(&part, &extent)?,
                b"SPARSE" | b"VMFSSPARSE" => left.push((part.clone(), part, Place::Sparse)),
                b"SESPARSE" => {
                    let mut file = Image::open(&part, &part)?;
                    find_of_vsphere(&mut file)?;
                    file.finish()?;
                }
                _ => (),
            }
        }
    }
    Ok(())
}

/// Checks that a file has all data of an extent without tables.
fn flat(path: &Path, extent: &Extent<'_>) -> Result<()> {
    let mut image = Image::open(path, path)?;
    let start = extent.start.saturating_mul(SECTOR);
    image.has(start, extent.sectors.saturating_mul(SECTOR));
    image.finish()
}

/// Finds the end of a file with tables. Finds nothing in any other file.
fn find(image: &mut Image<'_>) -> Result<()> {
    let mut head: [u8; 80] = image.head(0)?;
    if head.starts_with(COWD) {
        let (sectors, block) = (le32(&head, 12).into(), le32(&head, 16).into());
        let tables = Tables {
            at: le32(&head, 20).into(),
            sectors,
            block,
            entries: COWD_ENTRIES,
            has_zero_blocks: false,
            compressed: None,
        };
        return tables.find(image);
    }
    if !head.starts_with(MAGIC) {
        return Ok(());
    }
    if le64(&head, 56) == IN_FOOTER {
        // Before the last sector, which marks the end.
        let Some(footer) = image.size.checked_sub(2 * SECTOR) else {
            return Ok(());
        };
        head = image.head(footer)?;
        if !head.starts_with(MAGIC) {
            // qemu-img refuses it.
            return Ok(());
        }
    }
    let flags = le32(&head, 8);
    let is_compressed = head.get(77..79) == Some(&[1, 0]);
    let tables = Tables {
        at: le64(&head, 56),
        sectors: le64(&head, 12),
        block: le64(&head, 20),
        entries: le32(&head, 44).into(),
        has_zero_blocks: flags & ZERO_BLOCKS != 0,
        compressed: is_compressed.then_some(flags & MARKERS != 0),
    };
    tables.find(image)
}

/// Finds the end of a file of vSphere, of the type SESPARSE. Its format is known from qemu-img, which refuses other
/// versions, and other lengths of tables and blocks.
fn find_of_vsphere(image: &mut Image<'_>) -> Result<()> {
    /// Lengths of a table of the second level and of a block in sectors, and number of entries in such a table.
    const TABLE: u64 = 64;
    const BLOCK: u64 = 8;
    const ENTRIES: u64 = 4096;
    /// The highest bits of an entry say what it is.
    const KIND: u64 = 0xf << 60;
    const TABLE_IS_THERE: u64 = 1 << 60;
    const BLOCK_IS_THERE: u64 = 3 << 60;
    let head: [u8; 256] = image.head(0)?;
    let sectors = le64(&head, 16);
    if le64(&head, 0) != 0xcafe_babe || sectors > u64::MAX / SECTOR {
        return Ok(());
    }
    let at = |place: usize| le64(&head, place).saturating_mul(SECTOR);
    let (first, tables, data) = (at(128), at(144), at(192));
    let blocks = sectors.div_ceil(BLOCK);
    // The header has the length of the first table, too.
    let count = blocks.div_ceil(ENTRIES).min(at(136) / 8);
    image.table(first, count, 8, |image, nth, entry| {
        let place = le64(entry, 0);
        if place & KIND != TABLE_IS_THERE {
            return Ok(());
        }
        // No overflow: a place has 32 bits, and both are less than the number of blocks.
        let at = tables.saturating_add(u64::from(place as u32) * TABLE * SECTOR);
        let first = nth * ENTRIES;
        let count = ENTRIES.min(blocks - first);
        image.table(at, count, 8, |image, nth, entry| {
            let place = le64(entry, 0);
            if place & KIND == BLOCK_IS_THERE {
                // The lowest 12 bits of the number are in front of the others.
                let number = ((place >> 48) & 0xfff) | ((place & 0xffff_ffff_ffff) << 12);
                let at = number.saturating_mul(BLOCK * SECTOR);
                let start = (first + nth) * BLOCK * SECTOR;
                let at = data.saturating_add(at);
                image.has_data(at, BLOCK * SECTOR, start, sectors * SECTOR);
            }
            Ok(())
        })
    })
}

/// Where the data of a file is. Places and lengths are in sectors.
struct Tables {
    at: u64,
    /// Length of the disk's part that is in this file.
    sectors: u64,
    block: u64,
    /// Number of entries in a table of the second level.
    entries: u64,
    has_zero_blocks: bool,
    /// If the blocks are compressed: whether each has its length in front.
    compressed: Option<bool>,
}

impl Tables {
    fn find(&self, image: &mut Image<'_>) -> Result<()> {
        /// Largest block that qemu-img takes.
        const MOST: u64 = 1 << 21;
        if !(1..=MOST).contains(&self.block)
            || !(1..=COWD_ENTRIES).contains(&self.entries)
            || self.sectors > u64::MAX / SECTOR
        {
            return Ok(());
        }
        let size = self.sectors * SECTOR;
        let block = self.block * SECTOR;
        let blocks = self.sectors.div_ceil(self.block);
        let tables = blocks.div_ceil(self.entries);
        let at = self.at.saturating_mul(SECTOR);
        image.table(at, tables, 4, |image, nth, entry| {
            let at = u64::from(le32(entry, 0)) * SECTOR;
            if at == 0 {
                return Ok(());
            }
            // No overflow: both are less than the number of blocks.
            let first = nth * self.entries;
            let count = self.entries.min(blocks - first);
            image.table(at, count, 4, |image, nth, entry| {
                let place = u64::from(le32(entry, 0));
                let at = place * SECTOR;
                if place == 0 || place == 1 && self.has_zero_blocks {
                    return Ok(());
                }
                match self.compressed {
                    None => image.has_data(at, block, (first + nth) * block, size),
                    Some(false) => image.has(at, 1),
                    Some(true) => {
                        // A sector of the disk, then the length. Each block begins in a sector of its own.
                        let len = SECTOR.min(image.size.saturating_sub(at));
                        let marker: [u8; 12] = match len {
                            0 => [0; 12],
                            _ => {
                                image.claim(len)?;
                                image.head(at)?
                            }
                        };
                        image.has(at, 12 + u64::from(le32(&marker, 8)));
                    }
                }
                Ok(())
            })
        })
    }
}

/// Takes a descriptor apart, as qemu-img does with sscanf(3).
fn extents(text: &[u8]) -> Vec<Extent<'_>> {
    // For qemu-img, the text ends with the first NUL.
    let text = text.split(|&byte| byte == 0).next().unwrap_or_default();
    let mut found = Vec::new();
    let mut rest = text;
    loop {
        let end = rest.iter().position(|&byte| byte == b'\n');
        let line = end.and_then(|end| rest.get(..end)).unwrap_or(rest);
        // Any number of lines may be blank: each of them is skipped once.
        if after_blanks(line).starts_with(b"RW") {
            found.extend(extent(rest));
        }
        let Some(end) = end else {
            return found;
        };
        rest = rest.get(end + 1..).unwrap_or_default();
    }
}

/// Returns the extent with which `text` begins: `RW`, the number of sectors, the kind, the name in quotes, and the
/// sector with which its data begins. Any blanks may be between them, even line breaks.
fn extent(text: &[u8]) -> Option<Extent<'_>> {
    let (access, text) = word(text, |byte| !is_blank(byte));
    let (sectors, text) = word(text, |byte| byte.is_ascii_digit());
    let (kind, text) = word(text, |byte| !is_blank(byte) && byte != b'"');
    let text = after_blanks(text).strip_prefix(b"\"")?;
    let len = text.iter().position(|byte| b"\"\r\n".contains(byte));
    let (name, text) = text.split_at(len.unwrap_or(text.len()).min(NAME));
    let (start, _) = word(text.strip_prefix(b"\"")?, |byte| byte.is_ascii_digit());
    let number = |digits: &[u8]| std::str::from_utf8(digits).ok()?.parse::<u64>().ok();
    let extent = Extent {
        kind,
        name,
        sectors: number(sectors)?,
        start: number(start).unwrap_or(0),
    };
    (access == b"RW" && !name.is_empty()).then_some(extent)
}

/// As isspace(3) in the C locale.
fn is_blank(byte: u8) -> bool {
    byte.is_ascii_whitespace() || byte == 0x0b
}

/// Returns `text` without the blanks at its start.
fn after_blanks(text: &[u8]) -> &[u8] {
    let start = text.iter().position(|&byte| !is_blank(byte));
    text.get(start.unwrap_or(text.len())..).unwrap_or_default()
}

/// Returns the bytes after blanks that are `part` of a word, and what comes after them.
fn word(text: &[u8], part: impl Fn(u8) -> bool) -> (&[u8], &[u8]) {
    let text = after_blanks(text);
    let end = text.iter().position(|&byte| !part(byte));
    text.split_at(end.unwrap_or(text.len()))
}

#[cfg(test)]
mod tests {
    use super::super::super::vmdk::names;
    use super::*;

    #[test]
    fn of_descriptors() {
        let text = b"# Disk DescriptorFile\ncreateType=\"twoGbMaxExtentFlat\"\n\nRW 2048 FLAT \"a b.vmdk\" 7\n\
            RW\n1\tSPARSE\r\n\x0b\"c\"\nRDONLY 2 FLAT \"d\" 0\nRW x FLAT \"e\" 0\n\
            \x0bRW 3 VMFS \"f\"\n\0RW 1 FLAT \"g\" 0\n";
        let extent = |kind, name, sectors, start| Extent {
            kind,
            name,
            sectors,
            start,
        };
        let wanted: [Extent<'_>; 3] = [
            extent(b"FLAT", b"a b.vmdk", 2048, 7),
            extent(b"SPARSE", b"c", 1, 0),
            extent(b"VMFS", b"f", 3, 0),
        ];
        assert_eq!(extents(text), wanted);
        for odd in ["", "RW", "RW 1 FLAT", "RW 1 FLAT \"a", "RW 1 FLAT \"\" 0"] {
            assert!(extents(odd.as_bytes()).is_empty(), "{odd}");
        }
        // If each line were skipped again and again, this would take minutes.
        let long = "\n".repeat(1 << 20) + " RW 1 VMFS \"a\"";
        assert_eq!(extents(long.as_bytes()), [extent(b"VMFS", b"a", 1, 0)]);
    }

    /// What is opened here was checked: it is among what [`names`] finds.
    #[test]
    fn any_extent_is_checked_before() {
        const WORDS: [&str; 16] = [
            "RW", " ", " ", "\t", "\x0b", "\r", "\n", "1", "FLAT", "SPARSE", "VMFS", "SE", "\"",
            "\"", "a", "\0",
        ];
        let mut state = 1_u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as usize
        };
        let mut found = 0;
        for _ in 0..20_000 {
            let mut text = "RW 1 ".to_owned();
            for _ in 0..random() % 24 {
                text += WORDS[random() % WORDS.len()];
            }
            let names = names(text.as_bytes());
            for extent in extents(text.as_bytes()) {
                let is_read = [&b"FLAT"[..], b"VMFS", b"SPARSE", b"VMFSSPARSE", b"SESPARSE"];
                if is_read.contains(&extent.kind) {
                    found += 1;
                    let name = OsStr::from_bytes(extent.name);
                    assert!(names.iter().any(|named| named.name == name), "{text:?}");
                }
            }
        }
        assert!(found > 10, "{found}");
    }
}
