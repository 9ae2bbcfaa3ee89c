// SPDX-License-Identifier: GPL-2.0

//! What a layer can be made of, and how to tell.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::ValueEnum;
use overlaybd::format::{lsmt, zfile};
use overlaybd::{FileBlob, LayerReader};

use crate::exit::Failure;

/// What a layer can be made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// A disk image as it is, or a block device
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
    /// An OCI image layout whose layers are OverlayBD layers
    Oci,
}

/// What files begin with, and at which byte.
const MAGIC: &[(usize, &[u8], Kind)] = &[
    (0, b"QFI\xfb", Kind::Qcow2),
    (0, b"KDMV", Kind::Vmdk),
    (0, b"COWD", Kind::Vmdk),
    (0, b"# Disk DescriptorFile", Kind::Vmdk),
    (0, b"vhdxfile", Kind::Vhdx),
    (0, b"conectix", Kind::Vpc),
    (64, b"\x7f\x10\xda\xbe", Kind::Vdi),
    (0, b"QED\0", Kind::Qed),
    (0, b"WithoutFreeSpace", Kind::Parallels),
    (0, b"WithouFreSpacExt", Kind::Parallels),
    (257, b"ustar", Kind::Tar),
];
/// What compressed files begin with.
const COMPRESSED: &[&[u8]] = &[b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"BZh"];
/// What the last 512 bytes of a VHD of fixed size begin with; the disk itself is in front of them.
const VHD_FOOTER: &[u8] = b"conectix";

impl Kind {
    /// The name that qemu-img has for it, where that is what reads it.
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

    /// Looks at what is at `path`.
    ///
    /// # Errors
    ///
    /// Where reading fails, where it is a layer already, and where it is compressed, but doesn't have
    /// the name of a tar.
    pub(crate) fn of(path: &Path) -> Result<Self> {
        let context = || format!("{}: cannot read", path.display());
        if path.is_dir() {
            return Ok(match path.join("oci-layout").exists() {
                true => Self::Oci,
                false => Self::Directory,
            });
        }
        // It says what is no file, and a FIFO doesn't make it wait.
        let blob = Arc::new(FileBlob::open(path, None)?);
        if LayerReader::from_file(blob).is_ok() {
            return Err(Failure::usage(format!(
                "{}: is an OverlayBD layer; `obdsetup commit` wraps it otherwise",
                path.display()
            )));
        }
        let mut file = File::open(path).with_context(context)?;
        let mut head = Vec::new();
        let mut start = (&mut file).take(512);
        start.read_to_end(&mut head).with_context(context)?;
        if [zfile::MAGIC.as_slice(), &lsmt::MAGIC]
            .iter()
            .any(|magic| head.starts_with(magic))
        {
            return Err(Failure::usage(format!(
                "{}: begins as an OverlayBD file does, but is no layer that can be read (`obdsetup \
                 verify` says why); --from raw takes it as it is",
                path.display()
            )));
        }
        let mut tail = [0; VHD_FOOTER.len()];
        // Too short for a footer is no error.
        let has_footer = file.seek(SeekFrom::End(-512)).is_ok()
            && file.read_exact(&mut tail).is_ok()
            && tail == VHD_FOOTER;
        if has_footer {
            return Ok(Self::Vpc);
        }
        if COMPRESSED.iter().any(|magic| head.starts_with(magic)) {
            return match names_a_tar(path) {
                true => Ok(Self::Tar),
                false => Err(Failure::usage(format!(
                    "{}: is compressed; --from tar or --from raw tells what it is",
                    path.display()
                ))),
            };
        }
        let known = MAGIC
            .iter()
            .find(|(at, magic, _)| head.get(*at..at + magic.len()) == Some(*magic));
        Ok(known.map_or(Self::Raw, |&(_, _, kind)| kind))
    }
}

/// Whether a compressed file has a name such as `rootfs.tar.gz` or `rootfs.tgz`.
fn names_a_tar(path: &Path) -> bool {
    let extension = |path: &Path| path.extension().map(|text| text.to_ascii_lowercase());
    let inner = path.file_stem().and_then(|stem| extension(Path::new(stem)));
    let short = ["tgz", "txz", "tzst", "tbz", "tbz2"];
    extension(path).is_some_and(|text| short.iter().any(|short| text == *short))
        || inner.is_some_and(|text| text == "tar")
}

#[cfg(test)]
mod tests {
    use super::{names_a_tar, Kind};
    use std::path::Path;

    #[test]
    fn kinds() -> std::io::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("file.tgz");
        let kind = |bytes: &[u8]| {
            std::fs::write(&path, bytes)?;
            Ok::<_, std::io::Error>(Kind::of(&path).ok())
        };
        assert_eq!(kind(b"")?, Some(Kind::Raw));
        assert_eq!(kind(&[0; 5000])?, Some(Kind::Raw));
        assert_eq!(kind(b"QFI\xfb\0\0\0\x03")?, Some(Kind::Qcow2));
        assert_eq!(kind(b"\x1f\x8b\x08")?, Some(Kind::Tar));
        let mut bytes = vec![0; 5120];
        for (to, from) in bytes.iter_mut().skip(64).zip([0x7f, 0x10, 0xda, 0xbe]) {
            *to = from;
        }
        assert_eq!(kind(&bytes)?, Some(Kind::Vdi));
        let mut bytes = vec![0; 5120];
        for (to, from) in bytes.iter_mut().skip(5120 - 512).zip(*b"conectix") {
            *to = from;
        }
        assert_eq!(kind(&bytes)?, Some(Kind::Vpc));
        assert_eq!(Kind::of(dir.path()).ok(), Some(Kind::Directory));
        std::fs::write(dir.path().join("oci-layout"), "{}")?;
        assert_eq!(Kind::of(dir.path()).ok(), Some(Kind::Oci));
        assert!(Kind::of(&dir.path().join("none")).is_err());
        Ok(())
    }

    #[test]
    fn tar_names() {
        for name in ["a.tar.gz", "a.TGZ", "a.b.tar.zst", "dir/a.tar.xz"] {
            assert!(names_a_tar(Path::new(name)), "{name}");
        }
        for name in ["a.gz", "tar", "tar.gz", "a.tar/b.gz", "disk.img.zst"] {
            assert!(!names_a_tar(Path::new(name)), "{name}");
        }
    }
}
