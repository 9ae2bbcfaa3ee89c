// SPDX-License-Identifier: GPL-2.0

//! Magic numbers of the formats that qemu-img reads, and of formats that obdsetup cannot convert.

use super::{Kind, Wanted};

/// An offset and the bytes there.
type Magic = (usize, &'static [u8]);

/// Formats that qemu-img reads.
const MACHINES: &[(Magic, Kind)] = &[
    ((0, b"QFI\xfb\0\0\0\x02"), Kind::Qcow2),
    ((0, b"QFI\xfb\0\0\0\x03"), Kind::Qcow2),
    ((0, b"KDMV"), Kind::Vmdk),
    ((0, b"COWD"), Kind::Vmdk),
    ((0, b"# Disk DescriptorFile"), Kind::Vmdk),
    ((0, b"vhdxfile"), Kind::Vhdx),
    ((0, b"conectix"), Kind::Vpc),
    ((64, b"\x7f\x10\xda\xbe"), Kind::Vdi),
    ((0, b"QED\0"), Kind::Qed),
    ((0, b"WithoutFreeSpace"), Kind::Parallels),
    ((0, b"WithouFreSpacExt"), Kind::Parallels),
];

/// A format that cannot be converted: its name, and what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stranger {
    pub(super) name: &'static str,
    pub(super) advice: Advice,
}

/// What to do with a file that cannot be converted. In texts, `FILE` stands for the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Advice {
    /// This.
    Do(&'static str),
    /// To make a disk of the file with this command, and to convert the disk.
    Command(&'static str),
    /// To let qemu-img make a qcow2 image.
    Qcow2,
    /// To let qemu-img make a raw disk.
    Raw,
    /// Perhaps to take the bytes of the file as a disk.
    NoDisk,
}

impl Advice {
    /// Returns the advice for the file `name`.
    pub(super) fn text(self, name: &str, wanted: Wanted) -> String {
        // In copies for DAX, zeros must not become holes.
        const RAW_WITH_ZEROS: &str = "qemu-img convert -S 0 -O raw FILE disk.raw";
        let command = match self {
            Self::Do(text) => return text.replace("FILE", name),
            Self::NoDisk => return format!("it is no disk; {} takes it as it is", wanted.raw),
            Self::Qcow2 | Self::Raw if wanted.dax => RAW_WITH_ZEROS,
            Self::Qcow2 => "qemu-img convert -O qcow2 FILE disk.qcow2",
            Self::Raw => "qemu-img convert -O raw FILE disk.raw",
            Self::Command(command) => command,
        };
        let with = if wanted.dax { " with --dax" } else { "" };
        let command = command.replace("FILE", name);
        format!("`{command}`, then convert that{with}")
    }
}

const UNPACK: Advice = Advice::Do("unpack it, then `obdsetup convert DIRECTORY`");
const DECOMPRESS: Advice = Advice::Do("decompress it first");

/// Formats that cannot be converted: magic number, name, advice. The first match counts.
const STRANGERS: &[(Magic, &str, Advice)] = &[
    ((0, b"PK\x03\x04"), "a zip archive", UNPACK),
    ((0, b"PK\x05\x06"), "an empty zip archive", UNPACK),
    ((0, b"PK\x07\x08"), "a zip archive", UNPACK),
    ((0, b"070701"), "a cpio archive", CPIO),
    ((0, b"070702"), "a cpio archive", CPIO),
    ((0, b"070707"), "a cpio archive", CPIO),
    ((0, b"7z\xbc\xaf\x27\x1c"), "a 7-Zip archive", UNPACK),
    ((0, b"Rar!\x1a\x07"), "a RAR archive", UNPACK),
    ((0, b"MSCF\0\0\0\0"), "a cabinet file", UNPACK),
    ((0, b"xar!"), "a xar archive", UNPACK),
    ((0, b"MSWIM\0\0\0"), "a Windows image (WIM)", UNPACK),
    (
        (0, b"!<arch>\ndebian-binary"),
        "a Debian package",
        Advice::Do("`dpkg-deb --fsys-tarfile FILE` writes the tar that is in it"),
    ),
    ((0, b"!<arch>\n"), "an ar archive", UNPACK),
    (
        (0, b"\xed\xab\xee\xdb"),
        "an RPM package",
        Advice::Do("`rpm2archive FILE` makes a tar of it"),
    ),
    (
        (0, b"\x3a\xff\x26\xed"),
        "an Android sparse image",
        Advice::Command("simg2img FILE disk.raw"),
    ),
    ((0, b"ANDROID!"), "an Android boot image", Advice::NoDisk),
    ((0, b"\x1f\x9d"), "compressed by compress(1)", DECOMPRESS),
    ((0, b"\x1f\xa0"), "compressed by SCO compress", DECOMPRESS),
    ((0, b"\x1f\x1e"), "compressed by pack(1)", DECOMPRESS),
    (
        (0, b"\x89LZO\0\r\n\x1a\n"),
        "compressed by lzop",
        DECOMPRESS,
    ),
    ((0, b"LRZI"), "compressed by lrzip", DECOMPRESS),
    (
        (0, b"QFI\xfb"),
        "a qcow image of another version",
        Advice::Qcow2,
    ),
    ((0, b"Bochs Virtual HD Image"), "a Bochs image", Advice::Raw),
    (
        (0, b"#!/bin/sh\n#V2.0 Format\n"),
        "a cloop image",
        Advice::Raw,
    ),
    (
        (0, b"EVF\x09\x0d\x0a\xff\0"),
        "an Expert Witness image",
        Advice::Do("`ewfexport` makes a raw disk of it"),
    ),
    (
        (0, b"partclone-image"),
        "a Partclone image",
        Advice::Do("`partclone.restore` makes a raw disk of it"),
    ),
    (
        (0, b"VMA\0\0\0\0\x01"),
        "a backup of Proxmox VE (VMA)",
        Advice::Do("`vma extract FILE DIRECTORY` makes raw disks of it"),
    ),
    (
        (32, b"SIF_MAGIC"),
        "a Singularity image (SIF)",
        Advice::Do("`apptainer build --sandbox DIRECTORY FILE` unpacks it"),
    ),
    (
        (8, b"AI\x02"),
        "an AppImage",
        Advice::Do("a program that unpacks itself with `--appimage-extract`: only if you trust it"),
    ),
    ((0, b"\x7fELF"), "a program (ELF)", Advice::NoDisk),
    ((0, b"<!DOCTYPE "), "a web page", PAGE),
    ((0, b"<!doctype "), "a web page", PAGE),
    ((0, b"<html"), "a web page", PAGE),
    (
        (0, b"version https://git-lfs"),
        "a pointer of git-lfs",
        Advice::Do("`git lfs pull` fetches the file that it stands for"),
    ),
];

const CPIO: Advice = Advice::Do(
    "unpack it, `cpio -i -d <FILE` in an empty directory, then `obdsetup convert DIRECTORY`",
);
const PAGE: Advice = Advice::Do("the download went wrong");

/// Start of the last 512 bytes of a VHD. A VHD of fixed size has the disk itself before them, and no header.
const VHD_FOOTER: &[u8] = b"conectix";
/// Start of the last 512 bytes of a disk image of macOS.
const DMG_FOOTER: &[u8] = b"koly\0\0\0\x04";

fn matches(bytes: &[u8], &(at, magic): &Magic) -> bool {
    bytes.get(at..).is_some_and(|rest| rest.starts_with(magic))
}

/// Returns the format of a virtual machine's disk that begins with `head` and has `tail` as its
/// last 512 bytes.
pub(super) fn machine(head: &[u8], tail: &[u8]) -> Option<Kind> {
    if tail.starts_with(VHD_FOOTER) {
        return Some(Kind::Vpc);
    }
    let found = MACHINES.iter().find(|(magic, _)| matches(head, magic));
    found.map(|&(_, kind)| kind)
}

/// Returns the unsupported format of a file that begins with `head` and has `tail` as its last 512
/// bytes.
pub(super) fn stranger(head: &[u8], tail: &[u8]) -> Option<Stranger> {
    if tail.starts_with(DMG_FOOTER) {
        return Some(Stranger {
            name: "a disk image of macOS (DMG)",
            advice: Advice::Raw,
        });
    }
    if is_old_cpio(head) {
        return Some(Stranger {
            name: "a cpio archive",
            advice: CPIO,
        });
    }
    let found = STRANGERS.iter().find(|(magic, ..)| matches(head, magic));
    found.map(|&(_, name, advice)| Stranger { name, advice })
}

/// Returns whether `head` begins with a cpio archive with binary headers, of either byte order. The magic
/// number has only two bytes, so the name after the header must be valid, too.
fn is_old_cpio(head: &[u8]) -> bool {
    let number = |at: usize| {
        let pair = head.get(at..at + 2)?.first_chunk()?;
        match head {
            [0xc7, 0x71, ..] => Some(u16::from_le_bytes(*pair)),
            [0x71, 0xc7, ..] => Some(u16::from_be_bytes(*pair)),
            _ => None,
        }
    };
    let Some(len @ 2..=4096) = number(20).map(usize::from) else {
        return false;
    };
    let name = head.get(26..26 + len);
    name.and_then(|name| name.split_last())
        .is_some_and(|(&end, name)| end == 0 && !name.contains(&0))
}
