// SPDX-License-Identifier: GPL-2.0

//! Reads the partitions of a disk with partx(8). It uses libblkid, as udev does.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};

use crate::program::Program;
use crate::terminal::exit::{self, Failure};

/// Number of bytes to read from the start of a disk. A partition table begins within them.
const HEAD: u64 = 8192;
/// Types of partitions that only contain others, as partx prints them.
const EXTENDED: [&str; 3] = ["0x5", "0xf", "0x85"];

/// The largest number of partitions of a disk, as in the kernel (`DISK_MAX_PARTS`).
const MOST: usize = 255;

/// A partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Partition {
    /// Its number in the table, from 1.
    pub(crate) number: u32,
    /// Its first sector, in units of 512 bytes.
    pub(crate) start: u64,
    /// Length in units of 512 bytes.
    pub(crate) len: u64,
}

/// Reads the partitions of the disk `name` with `sectors` sectors of 512 bytes and the device node `node`.
/// Leaves out partitions that are empty or only contain others.
///
/// # Errors
///
/// If `node` cannot be read, if the table is damaged, or if it has no partitions.
pub(crate) fn read(name: &str, node: &Path, sectors: u64) -> Result<Vec<Partition>> {
    let mut head = Vec::new();
    File::open(node)
        .and_then(|disk| disk.take(HEAD).read_to_end(&mut head))
        .with_context(|| format!("{}: cannot read", node.display()))?;
    let mut program = Program::new("partx", "partitions");
    program.args(["--raw", "--noheadings"]);
    program.args(["--output", "NR,START,SECTORS,TYPE"]);
    // partx must not use the sector size of the device: that depends on the devices that store the layers.
    let sector_size = match has_large_sectors(&head) {
        true => "4096",
        false => "512",
    };
    program.args(["--sector-size", sector_size]);
    let mut lines = Vec::new();
    let ended = program.arg(node).end(|line| lines.push(line.to_owned()))?;
    // With 1, it has found no partitions. Otherwise it was killed or not started, and may have printed only some.
    if !matches!(ended.status.code(), Some(0 | 1)) {
        let context = format!("device {name}: cannot read what partx prints");
        return Err(ended.into_error().context(context));
    }
    let partitions = lines.iter().map(|line| parse(line));
    let partitions = partitions.collect::<Option<Vec<_>>>();
    let partitions = partitions.with_context(|| {
        let lines = lines.join("; ");
        format!("device {name}: cannot read what partx prints: {lines}")
    })?;
    check(name, sectors, &partitions)?;
    if partitions.len() > MOST {
        let what = format!(
            "the partition table has {} partitions, and the kernel takes {MOST} at most",
            partitions.len()
        );
        return Err(damaged(name, &what));
    }
    let partitions = partitions
        .into_iter()
        .filter(|(_, holds_others)| !holds_others);
    let partitions: Vec<Partition> = partitions.map(|(partition, _)| partition).collect();
    if !partitions.is_empty() {
        ended.said.tell();
        return Ok(partitions);
    }
    if has_gpt(&head) {
        return Err(damaged(
            name,
            "the GUID partition table and its copy at the end of the disk are damaged or missing",
        ));
    }
    let what = match ended.status.success() {
        true => "its partition table has no partitions",
        // partx has printed its own message.
        false => "no partition table was found on the disk",
    };
    Err(Failure::usage(format!(
        "device {name}: {what}: open it without --partitions"
    )))
}

/// Parses a line that partx printed. Returns the partition, and `true` if it only contains others or is empty.
fn parse(line: &str) -> Option<(Partition, bool)> {
    let mut words = line.split_whitespace();
    let partition = Partition {
        number: words.next()?.parse().ok()?,
        start: words.next()?.parse().ok()?,
        len: words.next()?.parse().ok()?,
    };
    let is_extended = words.next().is_some_and(|kind| EXTENDED.contains(&kind));
    Some((partition, is_extended || partition.len == 0))
}

/// Checks that all partitions are within the disk of `sectors` sectors, and that no two have the same number.
fn check(name: &str, sectors: u64, partitions: &[(Partition, bool)]) -> Result<()> {
    let mut numbers = BTreeSet::new();
    for (Partition { number, start, len }, _) in partitions {
        let end = start.checked_add(*len);
        if end.is_none_or(|end| end > sectors) {
            let what = format!(
                "partition {number} begins at sector {start} and has {len} sectors, but the disk has {sectors} \
                 sectors only: is the image complete?"
            );
            return Err(damaged(name, &what));
        }
        if !numbers.insert(number) {
            let what = format!("the partition table has partition {number} twice");
            return Err(damaged(name, &what));
        }
    }
    Ok(())
}

fn damaged(name: &str, what: &str) -> anyhow::Error {
    let message =
        format!("device {name}: {what}; without --partitions the disk can be opened as it is");
    Failure::error(exit::BAD_IMAGE, message)
}

/// Returns whether the header of a GUID partition table begins at byte `at`.
fn has_gpt_at(head: &[u8], at: usize) -> bool {
    let head = head.get(at..);
    head.is_some_and(|head| head.starts_with(b"EFI PART"))
}

/// Returns whether the disk has a GUID partition table for sectors of 4096 bytes, and none for 512 bytes.
fn has_large_sectors(head: &[u8]) -> bool {
    has_gpt_at(head, 4096) && !has_gpt_at(head, 512)
}

/// Returns whether the disk has a GUID partition table, or the protective MBR that belongs to such a table.
fn has_gpt(head: &[u8]) -> bool {
    let signed = head.get(510..512) == Some(b"\x55\xaa");
    let table = head.get(446..510).unwrap_or_default();
    let mut kinds = table.chunks_exact(16).filter_map(|entry| entry.get(4));
    let is_protected = signed && kinds.any(|&kind| kind == 0xee);
    is_protected || has_gpt_at(head, 512) || has_gpt_at(head, 4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_partx_prints() {
        let partition = |number, start, len| Partition { number, start, len };
        assert_eq!(
            parse("1 2048 4096 0x83"),
            Some((partition(1, 2048, 4096), false))
        );
        assert_eq!(parse(" 12 8 1"), Some((partition(12, 8, 1), false)));
        for none in ["2 6144 16384 0x5", "2 6144 16384 0xf", "3 8 0 0x83"] {
            assert!(
                parse(none).is_some_and(|(_, holds_others)| holds_others),
                "{none}"
            );
        }
        for wrong in ["", "NR START SECTORS", "1 -2048 4096", "1 2048"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn partitions_that_are_not_there() {
        let said = |partitions: &[(u32, u64, u64)]| {
            let partitions: Vec<(Partition, bool)> = partitions
                .iter()
                .map(|&(number, start, len)| (Partition { number, start, len }, false))
                .collect();
            let error = check("a", 100, &partitions).err();
            error.map_or_else(String::new, |error| error.to_string())
        };
        assert_eq!(said(&[(1, 0, 50), (2, 50, 50)]), "");
        let text = said(&[(1, 0, 50), (2, 50, 51)]);
        assert!(text.starts_with("device a: partition 2 begins at sector 50 and has 51"));
        assert!(said(&[(1, u64::MAX, 2)]).contains("partition 1 begins"));
        assert!(said(&[(1, 0, 1), (1, 1, 1)]).contains("has partition 1 twice"));
    }

    #[test]
    fn tables() {
        let head = |parts: &[(usize, &[u8])]| {
            let mut head = vec![0; 8192];
            for (at, bytes) in parts {
                head[*at..*at + bytes.len()].copy_from_slice(bytes);
            }
            head
        };
        let gpt: &[u8] = b"EFI PART";
        assert!(has_gpt(&head(&[(512, gpt)])) && has_gpt(&head(&[(4096, gpt)])));
        assert!(has_large_sectors(&head(&[(4096, gpt)])));
        assert!(!has_large_sectors(&head(&[(512, gpt), (4096, gpt)])));
        let protected = |kind: u8| head(&[(450 + 16, &[kind]), (510, b"\x55\xaa")]);
        assert!(has_gpt(&protected(0xee)) && !has_gpt(&protected(0x83)));
        assert!(!has_gpt(b"") && !has_large_sectors(b"short"));
    }
}
