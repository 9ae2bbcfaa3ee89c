// SPDX-License-Identifier: GPL-2.0

//! Parses the words that name a layer: `PATH`, or `PATH:size=BYTES` if the blob is shorter than its device or file.
//!
//! The meaning of a word depends only on the word, never on which files exist: a line of overlaybdtab must
//! mean the same at boot, when a disk may still be missing, and later. In `/dev/disk` and elsewhere, names
//! of devices may end with `:0` and the like. So the short form `DEVICE:BYTES` is allowed only for names that
//! cannot have a colon: see [`has_short_form`].

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use clap::builder::{OsStringValueParser, TryMapValueParser, TypedValueParser, ValueParserFactory};
use overlaybd::format::num::{to_u64, to_usize};
use overlaybd::format::{lsmt, zfile, Blob, Fault};
use overlaybd::{FileBlob, LayerReader, Payload};

use crate::input::kind::{is_dash, is_tar_at, DASH};
use crate::terminal::exit::{self, Failure};
use crate::terminal::{interrupt, size};

/// Separates a path from the size of its blob.
const SIZE: &[u8] = b":size=";
/// The size that means the whole file or device. Needed if the end of a name looks like a size.
const ALL: &[u8] = b"-";

/// Bytes that are read at once to find the end of a layer in front of zeros.
const PIECE: u64 = 1 << 20;
/// Largest number of zeros, in bytes, in front of which the end of a layer is looked for.
const PADDING: u64 = 1 << 30;

/// Directories in `/dev` that belong to no volume group, and whose entries may have a colon.
const NO_GROUPS: &[&str] = &[
    "block", "bsg", "bus", "char", "disk", "fd", "mapper", "md", "mqueue", "pts", "shm",
];

/// What a command needs layers for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To read them. A size is taken for any file.
    Read,
    /// To plan devices for them. A loop device has all of its file.
    Devices,
}

/// A layer as it is named on the command line. It is not open yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LayerArg {
    /// The file or block device.
    pub(crate) path: PathBuf,
    /// Size of the blob in bytes, if given.
    pub(crate) size: Option<u64>,
}

impl TryFrom<OsString> for LayerArg {
    type Error = String;

    fn try_from(word: OsString) -> Result<Self, String> {
        let (path, size) = parse(word)?;
        Ok(Self { path, size })
    }
}

/// A parser for [`clap`] that calls a function.
type FnParser<T> = TryMapValueParser<OsStringValueParser, fn(OsString) -> Result<T, String>>;

impl ValueParserFactory for LayerArg {
    type Parser = FnParser<Self>;

    fn value_parser() -> FnParser<Self> {
        OsStringValueParser::new().try_map(Self::try_from)
    }
}

impl fmt::Display for LayerArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

impl LayerArg {
    /// Opens the file or device.
    pub(crate) fn open(&self) -> Result<Arc<FileBlob>> {
        interrupt::check()?;
        if self.path.is_dir() {
            return Err(Failure::usage(format!("{self}: {}", directory(&self.path))));
        }
        let file = FileBlob::open(&self.path, self.size).map_err(|error| self.explain(error))?;
        Ok(Arc::new(file))
    }

    /// Returns an error if a size was given for something that is no block device. For commands that plan devices: a
    /// loop device has all of its file.
    pub(crate) fn check_size(&self) -> Result<()> {
        if self.size.is_none() || self.is_device() || !self.path.exists() {
            return Ok(());
        }
        let message = format!(
            "{self}: `open' and `table' use all of a file, so only a block device takes :size=BYTES: cut a copy of the \
             file to these bytes with truncate(1)"
        );
        Err(Failure::usage(message))
    }

    /// Returns the error for a failed open, with a hint if the user may have meant the end of the name as a
    /// size.
    fn explain(&self, error: overlaybd::Error) -> anyhow::Error {
        let missing = error.io_kind() == Some(ErrorKind::NotFound) && self.size.is_none();
        if missing && is_dash(&self.path) {
            return Failure::error(exit::DEVICE, DASH);
        }
        match suggest(&self.path).filter(|_| missing) {
            Some(word) => {
                let message = format!("{error}; if the end is a size, write {word}");
                Failure::error(exit::DEVICE, message)
            }
            None => error.into(),
        }
    }

    /// Opens the layer.
    pub(super) fn open_layer(&self, purpose: Purpose) -> Result<LayerReader> {
        LayerReader::from_file(self.open()?).map_err(|error| self.no_layer(error, purpose))
    }

    /// Returns the error for a file that cannot be read as a layer. A tar of other files is named as such. If the layer
    /// may be shorter than the device or file, the message says how to give its size, or what else to do.
    pub(crate) fn no_layer(&self, error: overlaybd::Error, purpose: Purpose) -> anyhow::Error {
        let other = match error.fault() {
            Some(Fault::LsmtMagic | Fault::TarMember) => is_tar_at(&self.path, false),
            // The first file has only a few bytes, or the tar is incomplete.
            Some(Fault::Truncated) => is_tar_at(&self.path, true),
            _ => false,
        };
        if other {
            // The tests that compare with the kernel look for the fault.
            let message = format!(
                "{self}: a tar, but the first file in it is no OverlayBD layer: `obdsetup convert' makes a layer of \
                 the files in a tar ({})",
                error.cause()
            );
            return Failure::error(exit::BAD_IMAGE, message);
        }
        match self.size_hint(&error, purpose) {
            Ok(Some(hint)) => Failure::error(exit::BAD_IMAGE, format!("{error}; {hint}")),
            Err(stop @ overlaybd::Error::Interrupted) => stop.into(),
            // If the file cannot be read again, `error` says more.
            Ok(None) | Err(_) => error.into(),
        }
    }

    /// Returns how to give the size of the layer, or what else to do, if its absence may be the reason for `error`.
    fn size_hint(
        &self,
        error: &overlaybd::Error,
        purpose: Purpose,
    ) -> overlaybd::Result<Option<String>> {
        let fault = error
            .fault()
            .filter(|fault| matches!(fault, Fault::LsmtTrailerMagic | Fault::ZfileTrailerMagic));
        let Some(fault) = fault.filter(|_| self.size.is_none()) else {
            return Ok(None);
        };
        let is_device = self.is_device();
        Ok(match padded(&self.path, fault)? {
            Some(size) if purpose == Purpose::Devices && !is_device => Some(format!(
                "zeros follow a layer of {size} bytes, and `open' and `table' use all of a file: cut a copy of it with \
                 `truncate -s {size}'"
            )),
            Some(size) => Some(format!(
                "zeros follow a layer of {size} bytes: give {self}:size={size}"
            )),
            None => is_device.then(|| {
                format!("if the layer is shorter than the device, give its size: {self}:size=BYTES")
            }),
        })
    }

    /// Returns whether the path leads to a block device.
    pub(crate) fn is_device(&self) -> bool {
        std::fs::metadata(&self.path).is_ok_and(|meta| meta.file_type().is_block_device())
    }
}

/// Returns the size in bytes of the layer, or of the ZFile, at the start of the file or device `path`, if only zeros
/// follow it, at most [`PADDING`] bytes. `fault` says which trailer is not at the end. Returns `None` if there is none
/// in front of the zeros.
fn padded(path: &Path, fault: Fault) -> overlaybd::Result<Option<u64>> {
    let is_zfile = fault == Fault::ZfileTrailerMagic;
    // A trailer ends with zeros, and begins with its magic number. Layers of other makers have any length.
    let (magic, len) = match is_zfile {
        true => (&zfile::MAGIC, zfile::HEADER_SIZE),
        false => (&lsmt::MAGIC, lsmt::HEADER_SIZE),
    };
    let file = FileBlob::open(path, None)?;
    let Some(end) = end_before_zeros(&file)? else {
        return Ok(None);
    };
    let start = end.saturating_sub(len);
    let mut bytes = vec![0; to_usize(end - start)];
    file.read_at(start, &mut bytes)?;
    let size = last(&bytes, magic).map(|at| start + to_u64(at) + len);
    let Some(size) = size.filter(|&size| size <= file.size()) else {
        return Ok(None);
    };
    let payload = Payload::open(Arc::new(FileBlob::open(path, Some(size))?));
    let is_whole = match is_zfile {
        // The content may be something else.
        true => payload.is_ok(),
        false => payload.and_then(LayerReader::from_payload).is_ok(),
    };
    Ok(is_whole.then_some(size))
}

/// Returns the first byte from which on `file` has only zeros; `None` if more than [`PADDING`] bytes at its end are
/// zeros, or all.
fn end_before_zeros(file: &FileBlob) -> overlaybd::Result<Option<u64>> {
    let lowest = file.size().saturating_sub(PADDING);
    let mut piece = vec![0_u8; to_usize(PIECE)];
    let mut end = file.size();
    loop {
        interrupt::check()?;
        let start = end.saturating_sub(PIECE);
        let part = piece.get_mut(..to_usize(end - start)).unwrap_or_default();
        file.read_at(start, part)?;
        match part.iter().rposition(|&byte| byte != 0) {
            Some(at) => return Ok(Some(start + to_u64(at) + 1)),
            None if start <= lowest => return Ok(None),
            None => end = start,
        }
    }
}

/// Returns the error for a directory that was given for a layer.
fn directory(path: &Path) -> String {
    let shown = path.display();
    let is_in = |name: &str| path.join(name).is_file();
    match () {
        () if is_in("config.v1.json") => format!(
            "is a directory, not a file or block device: give {}, which lists the layers in it",
            path.join("config.v1.json").display()
        ),
        () if is_in("oci-layout") => format!(
            "is a directory, an OCI image layout: `obdsetup convert {shown} OUT' makes layers of an image in it"
        ),
        () => "is a directory, not a file or block device".to_owned(),
    }
}

/// Returns the path, and the size of the blob if the word has one.
///
/// # Errors
///
/// If the text after `:size=` is no size.
fn parse(word: OsString) -> Result<(PathBuf, Option<u64>), String> {
    let bytes = word.as_bytes();
    if let Some(at) = last(bytes, SIZE) {
        let (path, tail) = bytes.split_at(at);
        let tail = tail.get(SIZE.len()..).unwrap_or_default();
        // If a slash follows, `:size=` is a part of a name.
        if !tail.contains(&b'/') {
            let size = match tail {
                ALL => None,
                _ => Some(size::parse(&String::from_utf8_lossy(tail))?),
            };
            return Ok((OsStr::from_bytes(path).into(), size));
        }
    }
    match short_form(bytes) {
        Some((path, size)) => Ok((OsStr::from_bytes(path).into(), Some(size))),
        None => Ok((PathBuf::from(OsString::from_vec(word.into_vec())), None)),
    }
}

/// Returns the word to write instead of `path`, if the end of `path` may have been meant as a size.
fn suggest(path: &Path) -> Option<String> {
    let (device, size) = split_number(path.as_os_str().as_bytes())?;
    let device = String::from_utf8_lossy(device);
    Some(format!("{device}:size={size}"))
}

/// Splits `DEVICE:BYTES`, where `DEVICE` is a name that cannot have a colon.
fn short_form(word: &[u8]) -> Option<(&[u8], u64)> {
    split_number(word).filter(|(path, _)| has_short_form(path))
}

/// Splits a word that ends with `:` and a size.
fn split_number(word: &[u8]) -> Option<(&[u8], u64)> {
    let colon = word.iter().rposition(|&byte| byte == b':')?;
    let (path, tail) = word.split_at(colon);
    let size = size::parse(std::str::from_utf8(tail.get(1..)?).ok()?).ok()?;
    Some((path, size))
}

/// Returns whether `path` has the form of the kernel's own name of a device, or of the name of a logical
/// volume. Neither can have a colon.
fn has_short_form(path: &[u8]) -> bool {
    let Some(name) = path.strip_prefix(b"/dev/") else {
        return false;
    };
    let parts: Vec<&[u8]> = name.split(|&byte| byte == b'/').collect();
    let all = |part: &[u8], more: &[u8]| {
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || more.contains(byte);
        !part.is_empty() && part.iter().all(plain) && !part.starts_with(b".")
    };
    match parts[..] {
        [name] => all(name, b"-_"),
        [group, volume] => {
            let is_group = !NO_GROUPS.iter().any(|name| name.as_bytes() == group);
            is_group && all(group, b"+_.-") && all(volume, b"+_.-")
        }
        _ => false,
    }
}

/// Returns the position of the last `what` in `bytes`.
fn last(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).rposition(|part| part == what)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(word: &str) -> (String, Option<u64>) {
        let (path, size) = parse(word.into()).unwrap_or_else(|error| (error.into(), Some(0)));
        (path.display().to_string(), size)
    }

    #[test]
    fn sizes() {
        for (word, path, size) in [
            ("/dev/vdb:size=4096", "/dev/vdb", 4096),
            ("/dev/disk/by-id/x:0:size=64k", "/dev/disk/by-id/x:0", 65536),
            ("a:size=1:size=2", "a:size=1", 2),
            ("/dev/vdb:4096", "/dev/vdb", 4096),
            ("/dev/loop0p1:1m", "/dev/loop0p1", 1 << 20),
            ("/dev/dm-3:512", "/dev/dm-3", 512),
            ("/dev/vg/base:9754721", "/dev/vg/base", 9_754_721),
        ] {
            assert_eq!(parsed(word), (path.to_owned(), Some(size)), "{word}");
        }
        assert_eq!(
            parsed("/srv/a:size=4k:size=-"),
            ("/srv/a:size=4k".to_owned(), None)
        );
        for word in [
            "/dev/vdb:size=",
            "/dev/vdb:size=x",
            "/dev/vdb:size=-1",
            "/dev/vdb:size=1:2",
        ] {
            assert!(parse(word.into()).is_err(), "{word}");
        }
    }

    /// Names that udev, device-mapper, md and users give. None is split at a colon.
    #[test]
    fn names_with_colons() {
        for word in [
            "/dev/disk/by-id/usb-Kingston_DT_1-0:0",
            "/dev/disk/by-path/pci-0000:00:1f.2",
            "/dev/disk/by-path/ip-10.0.0.1:3260-iscsi-iqn.2001-04.com.example:disk-lun-1",
            "/dev/disk/by-label/x:4096",
            "/dev/mapper/a:4096",
            "/dev/md/host:0",
            "/dev/block/254:4096",
            "/dev/zvol/tank/a/b:4096",
            "/dev/./vdb:4096",
            "/dev/../vdb:4096",
            "/srv/app.obd:4096",
            "app:4096",
            "a:size=4k/b",
        ] {
            assert_eq!(parsed(word), (word.to_owned(), None), "{word}");
        }
        let suggested = suggest(Path::new("/dev/mapper/a:4k"));
        assert_eq!(suggested.as_deref(), Some("/dev/mapper/a:size=4096"));
        assert_eq!(suggest(Path::new("/dev/mapper/a")), None);
    }

    proptest! {
        /// For any name, there is a word with that name and a size, and one without a size.
        #[test]
        fn any_name(name in "[ -~]{0,12}(:size=|:|)[0-9k-]{0,4}", size: u64) {
            let all = parse(format!("{name}:size=-").into());
            prop_assert_eq!(all, Ok((PathBuf::from(&name), None)));
            let sized = parse(format!("{name}:size={size}").into());
            prop_assert_eq!(sized, Ok((PathBuf::from(&name), Some(size))));
        }
    }
}
