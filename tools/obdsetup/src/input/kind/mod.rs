// SPDX-License-Identifier: GPL-2.0

//! Detects the type of an input by its content, not by its name.
//!
//! - [`magic`]: the magic numbers of files of other formats.
//! - [`disk`]: recognises disks.
//! - [`unpacked`]: decompresses disks that are compressed as a whole.

mod disk;
mod magic;
pub(crate) mod unpacked;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::ValueEnum;
use overlaybd::format::num::to_u64;
use overlaybd::format::{lsmt, zfile, Blob, SECTOR_SIZE};
use overlaybd::{FileBlob, LayerReader};

use crate::input::archive::{self, is_header, unpack_error, Compression, Unpack, BLOCK};
use crate::terminal;
use crate::terminal::exit::{self, Failure};

/// The types of inputs that a layer can be made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// A raw disk image, or a block device
    Raw,
    /// QEMU's format
    Qcow2,
    /// VMware's format
    Vmdk,
    /// Hyper-V's format
    Vhdx,
    /// Virtual PC's format, also called VHD
    Vpc,
    /// VirtualBox's format
    Vdi,
    /// QEMU's former format
    Qed,
    /// Parallels' format
    Parallels,
    /// A directory, to be put in a file system
    Directory,
    /// A tar, compressed or not, to be put in a file system
    Tar,
    /// An OCI image layout in a directory
    Oci,
}

impl Kind {
    /// Returns qemu-img's name of the format, if qemu-img reads it.
    pub(crate) fn for_qemu(self) -> Option<&'static str> {
        match self {
            Self::Qcow2 => Some("qcow2"),
            Self::Vmdk => Some("vmdk"),
            Self::Vhdx => Some("vhdx"),
            Self::Vpc => Some("vpc"),
            Self::Vdi => Some("vdi"),
            Self::Qed => Some("qed"),
            Self::Parallels => Some("parallels"),
            Self::Raw | Self::Directory | Self::Tar | Self::Oci => None,
        }
    }

    /// Returns whether `format` is qemu-img's name of one of these types.
    pub(crate) fn is_for_qemu(format: &str) -> bool {
        let mut kinds = Self::value_variants().iter();
        kinds.any(|kind| kind.for_qemu() == Some(format))
    }
}

/// An input that a layer can be made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Input {
    pub(crate) kind: Kind,
    /// The compression of the whole file, if it is compressed.
    pub(crate) compression: Option<Compression>,
}

/// What messages about inputs are to advise.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    /// Whether the layer is for DAX.
    dax: bool,
    /// The option that makes the command take any file as a raw disk.
    raw: &'static str,
}

/// The result of examining a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// An input that a layer can be made of.
    Known(Input),
    /// Certainly no such input. The message has the reason and advice.
    Refused(String),
    /// Of no known type, perhaps a disk. The message says that the type is not known.
    Unknown(String),
}

impl Input {
    /// Returns the input at `path`, recognised by its content. A block device of no known type is a raw disk. `dax`
    /// says whether the layer is for DAX.
    ///
    /// # Errors
    ///
    /// If the input cannot be read, if no layer can be made of it, or if it is a file of no known type.
    pub(crate) fn of(path: &Path, dax: bool) -> Result<Self> {
        let raw = "--from raw";
        match look(path, Wanted { dax, raw })? {
            Seen::Known(input) => Ok(input),
            Seen::Unknown(_) if is_block_device(path) => Ok(Self::raw()),
            Seen::Refused(text) | Seen::Unknown(text) => {
                let hint = match may_be_extent(path) {
                    true => EXTENT,
                    false => "",
                };
                Err(Failure::usage(text + hint))
            }
        }
    }

    /// Returns the input at `path`, which is a `kind` according to the user. Detects only the compression.
    ///
    /// # Errors
    ///
    /// If the input cannot be read.
    pub(crate) fn told(path: &Path, kind: Kind) -> Result<Self> {
        if is_dash(path) {
            return Err(Failure::error(exit::DEVICE, DASH));
        }
        let compression = match kind {
            Kind::Raw | Kind::Directory | Kind::Oci => None,
            _ if path.is_dir() => None,
            _ => compression(&ends(path)?.0),
        };
        Ok(Self { kind, compression })
    }

    fn raw() -> Self {
        Self {
            kind: Kind::Raw,
            compression: None,
        }
    }

    /// Returns how to make a raw disk of the input for a layer for DAX. Returns `None` for a raw disk and for files.
    /// obdsetup would make a temporary copy of the disk, with holes in place of the zeros that the layer must store.
    pub(crate) fn raw_for_dax(self) -> Option<&'static str> {
        match (self.kind.for_qemu(), self.compression) {
            (Some(_), None) => Some("`qemu-img convert -S 0 -O raw' makes one"),
            (Some(_), Some(_)) => {
                Some("decompress this one; then `qemu-img convert -S 0 -O raw' makes one")
            }
            (None, Some(_)) if self.kind == Kind::Raw => Some(
                "decompress this one, and give a copy of that without holes, which `cp --sparse=never' makes",
            ),
            (None, _) => None,
        }
    }
}

/// Advice for a file that [`may_be_extent`].
const EXTENT: &str =
    "; its name is that of an extent of a vmdk, which has a part of the disk: if it is one, give the descriptor, a \
     short text that names all extents";

/// Returns whether `path` has a name that VMware and qemu-img give to an extent, whose bytes may be those of a disk.
/// Only for advice, since names may be wrong.
fn may_be_extent(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().as_bytes();
    let Some(stem) = name.strip_suffix(b".vmdk") else {
        return false;
    };
    let is_part = |part: &[u8]| {
        let digits = part.strip_prefix(b"f").or_else(|| part.strip_prefix(b"s"));
        digits.is_some_and(|digits| digits.len() >= 3 && digits.iter().all(u8::is_ascii_digit))
    };
    let part = stem.rsplit(|&byte| byte == b'-').next().unwrap_or_default();
    part.len() < stem.len() && (part == b"flat" || part == b"sesparse" || is_part(part))
}

fn is_block_device(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|meta| meta.file_type().is_block_device())
}

/// Checks that the file `path`, which is to be read as a raw disk, isn't of another known type. If it is of no
/// known type, its size must be a multiple of 512 bytes. `dax` says whether the layer is for DAX.
///
/// # Errors
///
/// If the file is of another type, has another size, or cannot be read.
pub(crate) fn check_disk(path: &Path, dax: bool) -> Result<()> {
    let raw = "--raw";
    let text = match look(path, Wanted { dax, raw })? {
        Seen::Unknown(_) => {
            let size = FileBlob::open(path, None)?.size();
            if size % SECTOR_SIZE == 0 {
                return Ok(());
            }
            format!(
                "{}: nothing shows what it is, and its {size} bytes are no whole number of sectors: \
                 incomplete download or copy? --raw takes it as it is",
                path.display()
            )
        }
        Seen::Known(input) if input == Input::raw() => return Ok(()),
        Seen::Known(input) => {
            let Input { kind, compression } = input;
            let how = compression.map_or_else(String::new, |compression| {
                format!(", compressed with {}", compression.name())
            });
            let kind = kind.to_possible_value();
            let kind = kind.as_ref().map_or("other", |kind| kind.get_name());
            let advice = match input.raw_for_dax().filter(|_| dax) {
                Some(copy) => format!("--dax needs an uncompressed raw disk: {copy}"),
                None => "`obdsetup convert` reads that".to_owned(),
            };
            format!(
                "{}: no disk image as it is, but {kind}{how}: {advice}; --raw takes it as it is",
                path.display()
            )
        }
        Seen::Refused(text) => text,
    };
    Err(Failure::usage(text))
}

/// Returns whether `path` is the usual word for standard input, and no file has that name.
pub(crate) fn is_dash(path: &Path) -> bool {
    path.as_os_str() == "-" && !path.exists()
}

/// The error for such a word.
pub(crate) const DASH: &str =
    "-: standard input cannot be the input, since places in it are read in any order: give a file";

/// Examines the file, directory or block device at `path`. `wanted` is for the messages.
///
/// # Errors
///
/// If it is something else, cannot be read, or has damaged compressed data.
fn look(path: &Path, wanted: Wanted) -> Result<Seen> {
    let raw = wanted.raw;
    let known = |kind| {
        Ok(Seen::Known(Input {
            kind,
            compression: None,
        }))
    };
    let name = path.display();
    if is_dash(path) {
        return Err(Failure::error(exit::DEVICE, DASH));
    }
    if path.is_dir() {
        if path.join("oci-layout").exists() {
            return known(Kind::Oci);
        }
        if path.join("version").is_file() && path.join("manifest.json").is_file() {
            return Ok(Seen::Refused(format!(
                "{name}: an image in a directory (dir:), no tree of files: make an OCI layout of \
                 it, `skopeo copy dir:{name} oci:LAYOUT`; --from directory converts its files"
            )));
        }
        return match archive::check_directory(path)? {
            Some(package) => Ok(Seen::Refused(package.refusal_of_directory(path))),
            None => known(Kind::Directory),
        };
    }
    // Fails if `path` is neither a file nor a block device. Doesn't wait if it is a FIFO.
    let blob = Arc::new(FileBlob::open(path, None)?);
    let size = blob.size();
    if LayerReader::from_file(blob).is_ok() {
        return Ok(Seen::Refused(format!(
            "{name}: is an OverlayBD layer; `obdsetup commit` changes its wrapping"
        )));
    }
    let (head, tail) = ends(path)?;
    if [zfile::MAGIC.as_slice(), &lsmt::MAGIC]
        .iter()
        .any(|magic| head.starts_with(magic))
    {
        return Ok(Seen::Refused(format!(
            "{name}: begins as an OverlayBD file does, but is no layer that can be read (`obdsetup \
             verify` says why); {raw} takes it as it is"
        )));
    }
    let seen = content(path, &head, &tail, wanted);
    if !matches!(seen, Seen::Unknown(_)) {
        return Ok(match seen {
            Seen::Known(input) if input == Input::raw() && size % SECTOR_SIZE != 0 => {
                Seen::Refused(format!(
                    "{name}: a disk, but its {size} bytes are no whole number of sectors: \
                     incomplete download or copy? {raw} takes it as it is"
                ))
            }
            Seen::Known(input) if input == Input::raw() => match cut_off(path, path, &head, size)? {
                Some(what) => Seen::Refused(format!(
                    "{name}: a disk, but {what}: incomplete download or copy? {raw} takes it as it is"
                )),
                None => seen,
            },
            seen => seen,
        });
    }
    match compression(&head) {
        None => Ok(seen),
        Some(compression) => {
            let inside = Unpack::new(File::open(path)?, Some(compression));
            compressed(path, compression, inside, seen, wanted)
        }
    }
}

/// Returns what is wrong with the raw disk at `path`, if it is shorter than its partition table or file system says, or
/// if its size is not a multiple of 512 bytes.
///
/// # Errors
///
/// If the disk cannot be read.
pub(crate) fn fault_of_raw(path: &Path) -> Result<Option<String>> {
    let size = FileBlob::open(path, None)?.size();
    if size % SECTOR_SIZE != 0 {
        let what = format!("its {size} bytes are no whole number of sectors");
        return Ok(Some(what));
    }
    cut_off(path, path, &ends(path)?.0, size)
}

/// As [`cut_off`], for the raw copy at `path` of the disk in the image `name`.
///
/// # Errors
///
/// If the copy cannot be read.
pub(crate) fn fault_of_copy(name: &Path, path: &Path) -> Result<Option<String>> {
    let size = FileBlob::open(path, None)?.size();
    cut_off(name, path, &ends(path)?.0, size)
}

/// Returns what is wrong with a disk of `size` bytes that begins with `head`, if it is shorter than its partition table
/// or file system says.
fn too_short(head: &[u8], size: u64) -> Option<String> {
    let needed = disk::needed(head)?;
    let short = size < needed.size;
    short.then(|| {
        format!(
            "it has {size} bytes, and its {} needs {}",
            needed.what, needed.size
        )
    })
}

/// Returns what [`too_short`] returns for the disk at `path`, which the user knows as `name`. If only the unused end of
/// the last partition is missing, as in images that were not padded, or the second copy of the partition table, prints
/// a warning, and returns `None`.
fn cut_off(name: &Path, path: &Path, head: &[u8], size: u64) -> Result<Option<String>> {
    let Some(what) = too_short(head, size) else {
        if let Some(end) = disk::with_second_table(head).filter(|&end| size < end) {
            terminal::warn(&[format!(
                "{}: the second copy of its partition table, which ends at byte {end}, is missing, as the disk has \
                 {size} bytes: incomplete download or copy? Taken as it is, since the kernel needs only the first copy",
                name.display()
            )]);
        }
        return Ok(None);
    };
    let inside = in_last_partition(path, head, size);
    let inside = inside.with_context(|| format!("{}: cannot read", name.display()))?;
    let Some((kind, end)) = inside else {
        return Ok(Some(what));
    };
    terminal::warn(&[format!(
        "{}: {what}, but the {kind} in the last partition is complete: taken as it is; for `open --partitions', \
         lengthen the disk with `truncate --size={end}' first",
        name.display()
    )]);
    Ok(None)
}

/// Returns the type of the file system in the last partition, and the end of this partition, if the disk at `path`
/// has all of this file system and of the other partitions.
fn in_last_partition(
    path: &Path,
    head: &[u8],
    size: u64,
) -> io::Result<Option<(&'static str, u64)>> {
    let Some((needed, last)) =
        disk::needed(head).and_then(|needed| needed.last.map(|last| (needed, last)))
    else {
        return Ok(None);
    };
    if last.others > size || last.start >= size {
        return Ok(None);
    }
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(last.start))?;
    let mut head = Vec::new();
    file.take(to_u64(disk::HEAD)).read_to_end(&mut head)?;
    let inside = disk::needed(&head).filter(|inside| {
        let is_there = (1..=size - last.start).contains(&inside.size);
        ![disk::TABLE, disk::LUKS].contains(&inside.what) && is_there
    });
    Ok(inside.map(|inside| (inside.what, needed.size)))
}

/// Examines the content of a compressed file; `inside` decompresses it. A file that looks like a `.lzma` file,
/// which has no magic number, may be something else: if it cannot be decompressed, or its content isn't
/// recognised, the result is `otherwise`.
fn compressed(
    path: &Path,
    compression: Compression,
    mut inside: Unpack,
    otherwise: Seen,
    wanted: Wanted,
) -> Result<Seen> {
    let raw = wanted.raw;
    let (name, how) = (path.display(), compression.name());
    let certain = compression != Compression::Lzma;
    let mut head = Vec::new();
    let read = (&mut inside)
        .take(to_u64(disk::HEAD))
        .read_to_end(&mut head);
    if let Err(error) = read {
        return match (error.raw_os_error(), certain) {
            (Some(_), _) => Err(error).with_context(|| format!("{name}: cannot read")),
            (None, true) => Err(unpack_error(
                path,
                Some(compression),
                inside.position(),
                &error,
            )),
            (None, false) => Ok(otherwise),
        };
    }
    Ok(match content(path, &head, &[], wanted) {
        Seen::Known(input) => Seen::Known(Input {
            compression: Some(compression),
            ..input
        }),
        Seen::Refused(_) if magic::stranger(&head, &[]).is_some() => {
            let stranger = magic::stranger(&head, &[]).map_or("", |stranger| stranger.name);
            Seen::Refused(format!(
                "{name}: {stranger}, compressed with {how}: decompress it; then `obdsetup convert` \
                 says more"
            ))
        }
        _ if !certain => otherwise,
        _ => Seen::Refused(format!(
            "{name}: compressed with {how}, but what is in it is no tar and no disk that obdsetup \
             knows: decompress it, then {raw} takes it"
        )),
    })
}

/// Examines uncompressed content by its start `head` and its last 512 bytes `tail`. If `tail` is empty, footers
/// are not looked for.
fn content(path: &Path, head: &[u8], tail: &[u8], wanted: Wanted) -> Seen {
    let raw = wanted.raw;
    let name = path.display();
    let known = |kind| {
        Seen::Known(Input {
            kind,
            compression: None,
        })
    };
    // A tar begins with a name, which may look like the magic number of another format.
    let start = match is_signed(head) {
        true => &[],
        false => head,
    };
    if let Some(kind) = magic::machine(start, tail) {
        return known(kind);
    }
    if is_tar(head) {
        return known(Kind::Tar);
    }
    if let Some(stranger) = magic::stranger(head, tail) {
        let advice = stranger.advice.text(&name.to_string(), wanted);
        return Seen::Refused(format!("{name}: {}: {advice}", stranger.name));
    }
    if disk::is_disk(head) {
        return known(Kind::Raw);
    }
    Seen::Unknown(match head.iter().all(|&byte| byte == 0) {
        true if head.is_empty() => format!("{name}: empty"),
        true => format!(
            "{name}: begins with zeros only, nothing shows what it is: {raw} for a disk, \
             --from tar for an empty archive"
        ),
        false => format!(
            "{name}: no partition table, file system, archive or other format that obdsetup knows: \
             {raw} for a disk"
        ),
    })
}

/// Returns whether an uncompressed tar is at `path`; with `whole`, one that ends with zeros, as a complete one does.
pub(crate) fn is_tar_at(path: &Path, whole: bool) -> bool {
    ends(path).is_ok_and(|(head, tail)| {
        is_signed(&head) && (!whole || tail.iter().all(|&byte| byte == 0))
    })
}

/// Returns whether `head` is the start of a tar: whether it has the magic number, or a name and the right checksum
/// as headers of v7 do, which have no magic number.
fn is_tar(head: &[u8]) -> bool {
    head.get(257..262) == Some(b"ustar") || is_signed(head)
}

/// Returns whether `head` begins with the header of a member, with a name and the right checksum.
fn is_signed(head: &[u8]) -> bool {
    // A header begins with a name. Without this condition, a disk could match by chance.
    let named = head.first().is_some_and(|&byte| byte != 0);
    named && head.first_chunk::<BLOCK>().is_some_and(is_header)
}

/// Returns the compression of a file that begins with `head`; `None` for a tar, even if the name of its first
/// member looks like the magic number of a compression.
fn compression(head: &[u8]) -> Option<Compression> {
    match is_tar(head) {
        true => None,
        false => Compression::of(head),
    }
}

/// Returns the start of a file, at most [`disk::HEAD`] bytes, and its last 512 bytes. If the file has fewer, the
/// second part is empty.
fn ends(path: &Path) -> Result<(Vec<u8>, Vec<u8>)> {
    let read = || -> io::Result<_> {
        let mut file = File::open(path)?;
        let mut head = Vec::new();
        (&mut file)
            .take(to_u64(disk::HEAD))
            .read_to_end(&mut head)?;
        let mut tail = Vec::new();
        // A file that is too short for a footer is no error.
        if file.seek(SeekFrom::End(-512)).is_ok() {
            file.take(512).read_to_end(&mut tail)?;
        }
        Ok((head, tail))
    };
    read().with_context(|| format!("{}: cannot read", path.display()))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{may_be_extent, Input, Kind, Seen, Wanted};

    fn look(path: &Path) -> anyhow::Result<Seen> {
        let raw = "--from raw";
        super::look(path, Wanted { dax: false, raw })
    }

    #[test]
    fn names_of_extents() {
        for (name, wanted) in [
            ("x-flat.vmdk", true),
            ("/a/x-s001.vmdk", true),
            ("x-1-f1234.vmdk", true),
            ("x-000001-sesparse.vmdk", true),
            ("x.vmdk", false),
            ("flat.vmdk", false),
            ("x-flat", false),
            ("x-s1.vmdk", false),
            ("x-s00a.vmdk", false),
        ] {
            assert_eq!(may_be_extent(Path::new(name)), wanted, "{name}");
        }
    }

    #[test]
    fn kinds() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("file.tgz");
        let kind = |bytes: &[u8]| -> Result<Option<Kind>, Box<dyn std::error::Error>> {
            std::fs::write(&path, bytes)?;
            Ok(match look(&path)? {
                Seen::Known(Input { kind, .. }) => Some(kind),
                Seen::Refused(_) | Seen::Unknown(_) => None,
            })
        };
        assert_eq!(kind(b"")?, None);
        assert_eq!(kind(&[0; 5120])?, None);
        assert_eq!(kind(b"QFI\xfb\0\0\0\x03")?, Some(Kind::Qcow2));
        assert_eq!(kind(b"QFI\xfb\0\0\0\x01")?, None);
        let at = |size: usize, at: usize, magic: &[u8]| {
            let mut bytes = vec![0; size];
            for (to, from) in bytes.iter_mut().skip(at).zip(magic) {
                *to = *from;
            }
            bytes
        };
        assert_eq!(kind(&at(5120, 64, b"\x7f\x10\xda\xbe"))?, Some(Kind::Vdi));
        assert_eq!(kind(&at(5120, 5120 - 512, b"conectix"))?, Some(Kind::Vpc));
        assert_eq!(kind(&at(5120, 0, b"XFSB"))?, Some(Kind::Raw));
        assert_eq!(kind(&at(5121, 0, b"XFSB"))?, None);
        assert_eq!(kind(&at(5120, 257, b"ustar"))?, Some(Kind::Tar));
        let known = |kind| {
            Seen::Known(Input {
                kind,
                compression: None,
            })
        };
        assert_eq!(look(dir.path())?, known(Kind::Directory));
        std::fs::write(dir.path().join("oci-layout"), "{}")?;
        assert_eq!(look(dir.path())?, known(Kind::Oci));
        assert!(look(&dir.path().join("none")).is_err());
        Ok(())
    }
}
