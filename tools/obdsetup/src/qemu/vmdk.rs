// SPDX-License-Identifier: GPL-2.0

//! Finds the files that a vmdk image names: its descriptor, which is a text, has a line for each file with
//! data. Finds all that qemu-img would open, and perhaps more: qemu-img takes its words apart with sscanf(3),
//! for which a line may end between any two of them.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};

/// Longest descriptor that qemu-img reads, in bytes.
const LONGEST: usize = 1 << 20;
/// Longest name of a file that qemu-img takes. It cuts off the rest.
const NAME: usize = 511;
/// Largest number of files, to end where they name each other.
const FILES: usize = 4096;
/// The magic number of a file with data that has a header.
const MAGIC: &[u8] = b"KDMV";
/// Ends of the words before a name: FLAT, VMFS, SPARSE, VMFSSPARSE, SESPARSE.
const TYPES: [&[u8]; 3] = [b"FLAT", b"VMFS", b"SPARSE"];

/// Returns the paths of the files that the image at the absolute path `path` names, and that those name.
pub(super) fn parts(path: &Path) -> Result<BTreeSet<String>> {
    let mut parts = BTreeSet::new();
    let mut left = vec![path.to_owned()];
    while let Some(image) = left.pop() {
        for name in named(&image)? {
            // A name with a protocol is none of a file, and is refused by the caller.
            let is_whole = name.starts_with('/')
                || name
                    .split('/')
                    .next()
                    .is_some_and(|start| start.contains(':'));
            let part = match is_whole {
                true => name,
                false => {
                    let place = path.parent().unwrap_or(path);
                    place.join(name).to_string_lossy().into_owned()
                }
            };
            let is_file = Path::new(&part).is_file();
            if parts.len() < FILES && parts.insert(part.clone()) && is_file {
                left.push(part.into());
            }
        }
    }
    Ok(parts)
}

/// Returns the names in the descriptor of the file at `path`; none if it has no descriptor that qemu-img would
/// read.
pub(super) fn named(path: &Path) -> Result<Vec<String>> {
    let text = descriptor(path).with_context(|| format!("{}: cannot read", path.display()))?;
    Ok(names(&text))
}

fn descriptor(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let mut head = [0; 36];
    let has_head = read(&file, &mut head, 0)? == head.len();
    if !has_head || !head.starts_with(MAGIC) {
        return read_to_vec(&file, 0);
    }
    let number = |at: usize| {
        let bytes = head.get(at..).and_then(|bytes| bytes.first_chunk());
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    // The capacity, and the sector of the descriptor. With a capacity, the data is in this file.
    match (number(12), number(28)) {
        (0, sector) if sector != 0 => read_to_vec(&file, sector.saturating_mul(512)),
        _ => Ok(Vec::new()),
    }
}

fn read_to_vec(file: &File, at: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; LONGEST];
    let len = read(file, &mut bytes, at)?;
    bytes.truncate(len);
    Ok(bytes)
}

/// Reads at `at` as many bytes as there are. Returns their number.
fn read(file: &File, bytes: &mut [u8], at: u64) -> io::Result<usize> {
    let mut len = 0;
    while let Some(left) = bytes.get_mut(len..).filter(|left| !left.is_empty()) {
        let offset = at.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
        match file.read_at(left, offset) {
            Ok(0) => break,
            Ok(count) => len += count,
            // Behind the largest offset.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => break,
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

/// Returns the names in a descriptor.
fn names(text: &[u8]) -> Vec<String> {
    // For qemu-img, the text ends with the first NUL.
    let text = text.split(|&byte| byte == 0).next().unwrap_or_default();
    let mut names = Vec::new();
    let quotes = text.iter().enumerate().filter(|(_, &byte)| byte == b'"');
    for (at, _) in quotes {
        let (before, after) = text.split_at(at);
        let blanks = |byte: &u8| byte.is_ascii_whitespace() || *byte == 0x0b;
        let end = before.iter().rposition(|byte| !blanks(byte));
        let before = end.and_then(|end| before.get(..=end)).unwrap_or_default();
        if !TYPES.iter().any(|name| before.ends_with(name)) {
            continue;
        }
        let name = after.get(1..).unwrap_or_default();
        let name = name.split(|byte| b"\"\r\n".contains(byte)).next();
        let name = name.unwrap_or_default();
        let name = name.get(..NAME).unwrap_or(name);
        if !name.is_empty() {
            names.push(String::from_utf8_lossy(name).into_owned());
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_descriptors() {
        let usual = b"# Disk DescriptorFile\nversion=1\nCID=f342ec1a\nparentCID=ffffffff\n\
            createType=\"twoGbMaxExtentFlat\"\n\n# Extent description\nRW 2048 FLAT \"a-f001.vmdk\" 0\n\
            RW 2048 SPARSE \"b.vmdk\"\n\n# The Disk Data Base\nddb.adapterType = \"ide\"\n";
        assert_eq!(names(usual), ["a-f001.vmdk", "b.vmdk"]);
        for odd in [
            "RW\n1\n\tFLAT\r\n\x0b\"/x\" 0",
            "x=\"\nRW 1 SPARSE \"/x",
            "RW 1 VMFSSPARSE\"/x\n\" 0",
            "\"\"\" RW 1 VMFS \"/x\"",
        ] {
            assert_eq!(names(odd.as_bytes()), ["/x"], "{odd}");
        }
        assert!(names(b"a=\"FLAT\"\n\0RW 1 FLAT \"/x\" 0").is_empty());
        let long = format!("RW 1 SPARSE \"{}x\"", "/".repeat(NAME));
        assert_eq!(names(long.as_bytes()), ["/".repeat(NAME)]);
    }

    #[test]
    fn of_files() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("a");
        let mut bytes = b"KDMV".to_vec();
        bytes.resize(1024, 0);
        bytes.extend(b"RW 1 SPARSE \"b\"");
        let mut write = |at: usize, value: u64| {
            if let Some(field) = bytes.get_mut(at..at + 8) {
                field.copy_from_slice(&value.to_le_bytes());
            }
            std::fs::write(&path, &bytes)
        };
        write(28, 2)?;
        assert_eq!(named(&path)?, ["b"]);
        // Files that name each other.
        std::fs::write(
            dir.path().join("b"),
            "RW 1 FLAT \"a\" 0\nRW 1 FLAT \"nbd:x\" 0",
        )?;
        let place = dir.path().display().to_string();
        let found: Vec<String> = parts(&path)?.into_iter().collect();
        assert_eq!(
            found,
            [
                format!("{place}/a"),
                format!("{place}/b"),
                "nbd:x".to_owned()
            ]
        );
        write(28, u64::MAX)?;
        assert!(named(&path)?.is_empty());
        write(28, 2)?;
        write(12, 1)?;
        assert!(named(&path)?.is_empty());
        assert!(named(&dir.path().join("none")).is_err());
        Ok(())
    }
}
