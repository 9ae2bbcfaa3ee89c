// SPDX-License-Identifier: GPL-2.0

//! Finds the files that a vmdk image names. The descriptor of the image is a text with a line for each file with
//! data. Finds all files that qemu-img would open, and perhaps more: qemu-img parses the descriptor with sscanf(3),
//! which accepts a line end between any two words.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::OFlags;

use crate::files::json::bad;
use crate::files::place::directory;
use crate::terminal::exit::Failure;
use crate::terminal::interrupt;

/// Longest descriptor that qemu-img reads, in bytes.
const LONGEST: usize = (1 << 20) - 1;
/// Longest name of a file in bytes. qemu-img cuts off the rest of a longer name.
pub(super) const NAME: usize = 511;
/// Largest number of files.
const FILES: usize = 4096;
/// Largest number of names in all descriptors together. A file may have several names, and each of them may be
/// there several times.
const NAMES: usize = 65_536;
/// The magic number at the start of a header, which a file with sparse data has.
pub(super) const MAGIC: &[u8] = b"KDMV";
/// Ends of the words before a name: FLAT, VMFS, SPARSE, VMFSSPARSE, SESPARSE.
const TYPES: [&[u8]; 3] = [b"FLAT", b"VMFS", SPARSE];
/// End of the words before the name of a file that may have a descriptor itself.
const SPARSE: &[u8] = b"SPARSE";
/// A type that ends with [`SPARSE`], too. Such a file has no descriptor.
const SESPARSE: &[u8] = b"SESPARSE";
/// Length in bytes of the part of a header that is read.
const HEAD: usize = 36;

/// A file that a descriptor names.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Named {
    /// Any bytes except NUL, as in names of files.
    pub(super) name: OsString,
    /// Whether it may have a descriptor itself.
    is_sparse: bool,
}

/// Calls `check` with the path of each file that the image at the absolute path `path` names, and of each file
/// that those files name. A file is opened after `check` has accepted it, and only if qemu-img would look for a
/// descriptor in it.
pub(super) fn each_part(path: &Path, mut check: impl FnMut(&Path) -> Result<()>) -> Result<()> {
    let mut parts = BTreeSet::new();
    // Device and inode numbers. A file is opened once, even if it has several names.
    let mut opened = BTreeSet::new();
    let mut left = Vec::new();
    let mut count = 0_usize;
    let mut found = named(path)?;
    loop {
        interrupt::check()?;
        count = count.saturating_add(found.len());
        if count > NAMES {
            return Err(bad(path, &format!("names files more than {NAMES} times")));
        }
        for Named { name, is_sparse } in found {
            interrupt::check()?;
            let part = part(path, &name);
            if !parts.contains(&part) {
                if parts.len() == FILES {
                    let what = format!("names more than {FILES} files");
                    return Err(bad(path, &what));
                }
                check(&part)?;
                parts.insert(part.clone());
            }
            if is_sparse {
                let meta = part.metadata();
                let meta = meta.with_context(|| format!("{}: cannot read", part.display()))?;
                if opened.insert((meta.dev(), meta.ino())) {
                    left.push(part);
                }
            }
        }
        let Some(next) = left.pop() else {
            return Ok(());
        };
        found = names_at(&next, Place::Sparse)?;
    }
}

/// Returns the path of a file that the image at the absolute path `image` names, in its own descriptor or in that of
/// another file with its data: in both, a relative name is relative to the directory of the image. A colon has no
/// special meaning. An absolute name replaces the directory.
pub(super) fn part(image: &Path, name: &OsStr) -> PathBuf {
    directory(image).join(name)
}

/// Returns an error if the file at `path`, which messages call `name`, is an extent alone, without a descriptor that
/// says what belongs to the disk. qemu-img says "Invalid argument" of such a file.
pub(super) fn check_descriptor(path: &Path, name: &Path) -> Result<()> {
    let is_extent = is_extent(path).with_context(|| format!("{}: cannot read", name.display()))?;
    if !is_extent {
        return Ok(());
    }
    let what = "is an extent of a vmdk, which has a part of the disk: give the descriptor, a short text that names all \
                extents; its name usually has no -s001, -delta or the like";
    Err(Failure::usage(format!("{}: {what}", name.display())))
}

fn is_extent(path: &Path) -> io::Result<bool> {
    /// The magic number of an extent of an ESX server.
    const COWD: &[u8] = b"COWD";
    let file = open(path)?;
    let mut head = [0; HEAD];
    read(&file, &mut head, 0)?;
    let has_data = head.starts_with(MAGIC) && head.get(12..20) != Some(&[0; 8]);
    if !has_data && !head.starts_with(COWD) {
        return Ok(false);
    }
    // As qemu-img does. In a shorter file, something else is wrong.
    let mut text = vec![0; 20 * 512];
    let len = read(&file, &mut text, 512)?;
    Ok(len == text.len() && !text.windows(4).any(|word| word == b"CID="))
}

/// Returns what the descriptor of the image at `path` names; nothing if it has no descriptor that qemu-img
/// would read.
pub(super) fn named(path: &Path) -> Result<Vec<Named>> {
    names_at(path, Place::First)
}

/// The role of a file in an image.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// The file that was given to qemu-img. The whole file may be a descriptor.
    First,
    /// Another file, with sparse data. Only a file with a header can have a descriptor.
    Sparse,
}

fn names_at(path: &Path, place: Place) -> Result<Vec<Named>> {
    match descriptor(path, place).with_context(|| format!("{}: cannot read", path.display()))? {
        Some(text) => Ok(names(&text)),
        None => Err(bad(path, "the offset of its descriptor is too large")),
    }
}

/// Returns the descriptor, which may be empty; `None` if its offset is too large.
pub(super) fn descriptor(path: &Path, place: Place) -> io::Result<Option<Vec<u8>>> {
    let file = open(path)?;
    // Behind the end of the file, qemu-img reads zeros.
    let mut head = [0; HEAD];
    read(&file, &mut head, 0)?;
    if !head.starts_with(MAGIC) {
        return match place {
            Place::First => read_to_vec(&file, 0).map(Some),
            Place::Sparse => Ok(Some(Vec::new())),
        };
    }
    let number = |at: usize| {
        let bytes = head.get(at..).and_then(|bytes| bytes.first_chunk());
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    // The capacity, and the sector of the descriptor. If the capacity is not 0, the data is in this file.
    match (number(12), number(28)) {
        // The offset in bytes has more than 64 bits. qemu-img would cut off the highest bits.
        (0, sector) if sector > u64::MAX >> 9 => Ok(None),
        (0, sector) if sector != 0 => read_to_vec(&file, sector << 9).map(Some),
        _ => Ok(Some(Vec::new())),
    }
}

/// Opens a file or block device. If `path` is anything else, such as a FIFO, fails without waiting.
pub(super) fn open(path: &Path) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits() as i32)
        .open(path)?;
    let kind = file.metadata()?.file_type();
    match kind.is_file() || kind.is_block_device() {
        true => Ok(file),
        false => Err(io::Error::other("neither a file nor a block device")),
    }
}

fn read_to_vec(file: &File, at: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; LONGEST];
    let len = read(file, &mut bytes, at)?;
    bytes.truncate(len);
    Ok(bytes)
}

/// Reads from byte `at` until `bytes` is full or the file ends. Returns the number of bytes read.
pub(super) fn read(file: &File, bytes: &mut [u8], at: u64) -> io::Result<usize> {
    let mut len = 0;
    while let Some(left) = bytes.get_mut(len..).filter(|left| !left.is_empty()) {
        let offset = at.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
        match file.read_at(left, offset) {
            Ok(0) => break,
            Ok(count) => len += count,
            // The offset is larger than any file offset.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => break,
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

/// Returns what a descriptor names.
pub(super) fn names(text: &[u8]) -> Vec<Named> {
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
            names.push(Named {
                name: OsStr::from_bytes(name).to_owned(),
                is_sparse: before.ends_with(SPARSE) && !before.ends_with(SESPARSE),
            });
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat_and_sparse(text: &[u8]) -> Vec<(String, bool)> {
        let names = names(text).into_iter();
        names
            .map(|named| {
                let name = named.name.into_string();
                (name.unwrap_or_else(|_| unreachable!()), named.is_sparse)
            })
            .collect()
    }

    #[test]
    fn of_descriptors() {
        let usual = b"# Disk DescriptorFile\nversion=1\nCID=f342ec1a\nparentCID=ffffffff\n\
            createType=\"twoGbMaxExtentFlat\"\n\n# Extent description\nRW 2048 FLAT \"a-f001.vmdk\" 0\n\
            RW 2048 SPARSE \"b.vmdk\"\n\n# The Disk Data Base\nddb.adapterType = \"ide\"\n";
        let found = flat_and_sparse(usual);
        assert_eq!(
            found,
            [
                ("a-f001.vmdk".to_owned(), false),
                ("b.vmdk".to_owned(), true)
            ]
        );
        for (odd, is_sparse) in [
            ("RW\n1\n\tFLAT\r\n\x0b\"/x\" 0", false),
            ("x=\"\nRW 1 SPARSE \"/x", true),
            ("RW 1SPARSE \"/x", true),
            ("RW 1 VMFSSPARSE\"/x\n\" 0", true),
            ("RW 1 SESPARSE \"/x\"", false),
            ("\"\"\" RW 1 VMFS \"/x\"", false),
        ] {
            let found = flat_and_sparse(odd.as_bytes());
            assert_eq!(found, [("/x".to_owned(), is_sparse)], "{odd}");
        }
        assert!(names(b"a=\"FLAT\"\n\0RW 1 FLAT \"/x\" 0").is_empty());
        let long = format!("RW 1 SPARSE \"{}x\"", "/".repeat(NAME));
        assert_eq!(flat_and_sparse(long.as_bytes()), [("/".repeat(NAME), true)]);
    }

    #[test]
    fn of_bytes_that_are_no_text() {
        let found = names(b"RW 1 FLAT \"x\xff\" 0");
        let found: Vec<&[u8]> = found.iter().map(|named| named.name.as_bytes()).collect();
        assert_eq!(found, [b"x\xff"]);
    }

    /// The paths that [`each_part`] finds, relative to the directory of the image.
    fn parts(path: &Path) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        each_part(path, |part| {
            let part = part.strip_prefix(directory(path)).unwrap_or(part);
            found.push(part.to_owned());
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn of_files() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("a");
        let head = |sector: u64, capacity: u64, descriptor: &str| {
            let mut bytes = MAGIC.to_vec();
            bytes.resize(12, 0);
            bytes.extend(capacity.to_le_bytes());
            bytes.resize(28, 0);
            bytes.extend(sector.to_le_bytes());
            bytes.resize(1024, 0);
            bytes.extend(descriptor.as_bytes());
            bytes
        };
        let write = |name: &str, bytes: Vec<u8>| std::fs::write(dir.path().join(name), bytes);
        write("a", head(2, 0, "RW 1 SPARSE \"b\""))?;
        // Files that name each other.
        let names = "RW 1 SPARSE \"a\"\nRW 1 FLAT \"nbd:x\" 0\nRW 1 FLAT \"/dev/none\" 0";
        write("b", head(2, 0, names))?;
        let found = parts(&path)?;
        assert_eq!(found, ["b", "a", "nbd:x", "/dev/none"].map(PathBuf::from));
        // A descriptor without a header counts in the first file only.
        write("b", b"RW 1 SPARSE \"c\"".to_vec())?;
        assert_eq!(parts(&path)?, [PathBuf::from("b")]);
        write("a", b"RW 1 SPARSE \"b\"".to_vec())?;
        assert_eq!(parts(&path)?, [PathBuf::from("b")]);
        // In a flat file, a descriptor behind a header doesn't count, either.
        write("b", head(2, 0, "RW 1 SPARSE \"c\""))?;
        for (kind, count) in [("FLAT", 1), ("VMFS", 1), ("SESPARSE", 1), ("SPARSE", 2)] {
            write("a", format!("RW 1 {kind} \"b\"").into_bytes())?;
            write("c", Vec::new())?;
            assert_eq!(parts(&path)?.len(), count, "{kind}");
        }

        write("a", head(2, 1, "RW 1 SPARSE \"b\""))?;
        assert!(named(&path)?.is_empty());
        // Descriptors behind the largest file offset, and at offsets whose highest bits qemu-img would cut off.
        write("a", head(u64::MAX >> 9, 0, "RW 1 SPARSE \"b\""))?;
        assert!(named(&path)?.is_empty());
        for sector in [u64::MAX, (1 << 55) + 2] {
            write("a", head(sector, 0, "RW 1 SPARSE \"b\""))?;
            let error = named(&path).err().map(|error| error.to_string());
            assert!(error.is_some_and(|error| error.contains("too large")));
        }
        // The file ends within the header: the rest of the header is zeros.
        write("a", MAGIC.to_vec())?;
        assert!(named(&path)?.is_empty());
        assert!(named(&dir.path().join("none")).is_err());
        Ok(())
    }

    #[test]
    fn nothing_is_opened_before_it_is_checked() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("a");
        // The named file doesn't exist: opening it would fail.
        std::fs::write(&path, "RW 1 SPARSE \"none\"")?;
        let done = each_part(&path, |_| anyhow::bail!("refused"));
        assert!(done.is_err_and(|error| error.to_string() == "refused"));
        // A FIFO is never waited for.
        let pipe = dir.path().join("pipe");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0)?;
        assert!(named(&pipe).is_err());
        std::fs::write(&path, "RW 1 SPARSE \"pipe\"")?;
        assert!(each_part(&path, |_| Ok(())).is_err());
        std::fs::write(&path, "RW 1 FLAT \"pipe\" 0")?;
        each_part(&path, |_| Ok(()))
    }

    #[test]
    fn too_many() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("a");
        let lines = |count: usize| {
            let lines = (0..count).map(|nth| format!("RW 1 FLAT \"{nth}\" 0\n"));
            lines.collect::<String>()
        };
        std::fs::write(&path, lines(FILES) + "RW 1 FLAT \"0\" 0\n")?;
        assert_eq!(parts(&path)?.len(), FILES);
        std::fs::write(&path, lines(FILES + 1))?;
        let error = parts(&path).err().map(|error| error.to_string());
        assert!(error.is_some_and(|error| error.ends_with("a: names more than 4096 files")));
        std::fs::write(&path, "FLAT\"0\"\n".repeat(NAMES))?;
        assert_eq!(parts(&path)?.len(), 1);
        std::fs::write(&path, "FLAT\"0\"\n".repeat(NAMES + 1))?;
        let error = parts(&path).err().map(|error| error.to_string());
        assert!(error.is_some_and(|error| error.ends_with("a: names files more than 65536 times")));
        Ok(())
    }

    /// A file with several names is read once. If it were read for each name, the limit [`NAMES`] would be exceeded.
    #[test]
    fn many_names_of_a_file() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("a");
        for name in ["c", "d"] {
            std::fs::create_dir(dir.path().join(name))?;
        }
        let names = (0..512).map(|nth| {
            let way = (0..9).map(|bit| ["c/../", "d/../"][(nth >> bit) & 1]);
            format!("RW 1 SPARSE \"{}b\"\n", way.collect::<String>())
        });
        let names = names.collect::<String>();
        std::fs::write(&path, &names)?;
        // The descriptor is in sector 2.
        let mut bytes = MAGIC.to_vec();
        bytes.resize(28, 0);
        bytes.extend(2_u64.to_le_bytes());
        bytes.resize(1024, 0);
        bytes.extend(names.as_bytes());
        std::fs::write(dir.path().join("b"), bytes)?;
        assert_eq!(parts(&path)?.len(), 512);
        Ok(())
    }
}
