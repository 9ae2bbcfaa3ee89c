// SPDX-License-Identifier: GPL-2.0

//! Names and UUIDs of devices, and the keys of layers that are in the UUIDs of shared devices.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use overlaybd::format::Blob;
use overlaybd::Payload;
use sha2::{Digest, Sha256};

use super::control::State;
use super::system::{disk, number_of};

/// The UUIDs of all devices of obdsetup, except partitions, start with this. The type follows, then the name of the
/// stack. `LSMT`, `ZFILE` and `WRITABLE` are disks. The others are inner devices: `IMAGE` and `STORE` are below a
/// writable disk; `LAYER` and `BLOB` have the number of their layer after the name or, if they are shared, the digits
/// of [`Identity::device`] instead of both; `MARK` is the mark of a stack whose partitions do not exist yet. The udev
/// rules use the type. For partitions, see `partition_uuid` in [`super::plan`].
pub(crate) const UUID_PREFIX: &str = "OVERLAYBD-";

/// Numbers of hexadecimal digits in a UUID: for the layer, and for the options.
const LAYER_DIGITS: usize = 32;
const OPTION_DIGITS: usize = 8;
/// Numbers of these digits that are in a device's name.
const NAME_DIGITS: (usize, usize) = (12, 4);
/// Largest number of bytes of a file's name in a device's name.
const LABEL: usize = 40;
/// How many bytes at the beginning and at the end of a blob are hashed for the layer's key. They include the header
/// and the trailer, which for a ZFile has the CRC of the index.
const BEGIN: u64 = 4 << 10;
const END: u64 = 16 << 10;

/// What a layer is stored on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A file, which needs a loop device.
    File,
    /// A block device of the blob's size.
    WholeDevice,
    /// The first bytes of a block device.
    PartOfDevice,
}

/// The kind of a shared device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// A zfile device: a decompressed layer.
    Zfile,
    /// A blob device: the file of a layer.
    Blob,
}

impl Kind {
    fn uuid_type(self) -> &'static str {
        match self {
            Self::Zfile => "LAYER-",
            Self::Blob => "BLOB-",
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::Zfile => "zfile",
            Self::Blob => "blob",
        }
    }
}

/// A layer's key: it identifies the file or block device of the layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// A part of the file's name.
    label: String,
    digits: String,
    /// The options of the loop device over the file.
    loop_options: &'static str,
    /// How the kernel identifies the file or device.
    pub(crate) source: Source,
}

/// How the kernel identifies a file or a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The file system's number and the inode.
    File { dev: u64, ino: u64 },
    /// The number of a block device.
    Device { rdev: u64 },
}

impl Identity {
    /// Returns the key for the file or device of `payload`. `buffered` says whether a loop device over the file uses
    /// the page cache.
    pub(crate) fn of(payload: &Payload, place: Place, buffered: bool) -> Result<Self> {
        let blob = payload.file();
        let path = blob.path();
        let meta = blob.file().metadata();
        let meta = meta.with_context(|| path.display().to_string())?;
        let mut hash = Sha256::new();
        let mut add = |text: String| {
            hash.update(text.len().to_le_bytes());
            hash.update(text);
        };
        let source = match place {
            Place::File => {
                add(format!(
                    "file {} {} {} {}.{} {}.{}",
                    meta.dev(),
                    meta.ino(),
                    meta.size(),
                    meta.mtime(),
                    meta.mtime_nsec(),
                    meta.ctime(),
                    meta.ctime_nsec()
                ));
                Source::File {
                    dev: meta.dev(),
                    ino: meta.ino(),
                }
            }
            Place::WholeDevice | Place::PartOfDevice => {
                let rdev = meta.rdev();
                let (disk, start) = disk(&number_of(rdev));
                add(format!("device {rdev} {disk} {start} {place:?}"));
                Source::Device { rdev }
            }
        };
        let size = blob.size();
        add(size.to_string());
        for (start, len) in [(0, BEGIN), (size.saturating_sub(END), END)] {
            let len = usize::try_from(len.min(size - start))?;
            let mut bytes = vec![0; len];
            blob.read_at(start, &mut bytes)?;
            hash.update(bytes);
        }
        Ok(Self {
            label: label(path),
            digits: hex(&hash.finalize(), LAYER_DIGITS),
            loop_options: match (source, buffered) {
                (Source::File { .. }, false) => "direct",
                _ => "",
            },
            source,
        })
    }

    /// Returns name and UUID of the device for this layer with `options` for its target.
    pub(crate) fn device(&self, kind: Kind, options: &[String]) -> (String, String) {
        let words: Vec<&str> = options.iter().flat_map(|o| o.split_whitespace()).collect();
        let text = format!("{} {}", self.loop_options, words.join(" "));
        let options = hex(&Sha256::digest(text), OPTION_DIGITS);
        let part = |text: &str, len| text.chars().take(len).collect::<String>();
        let (layer, short) = NAME_DIGITS;
        (
            format!(
                "{}-{}{}-{}",
                self.label,
                part(&self.digits, layer),
                part(&options, short),
                kind.suffix()
            ),
            format!("{UUID_PREFIX}{}{}{options}", kind.uuid_type(), self.digits),
        )
    }
}

/// Returns the last component of a path, with only the characters that a device's name may have, and
/// shortened.
fn label(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let plain = |c: char| match c.is_ascii_alphanumeric() || "#+-.:=@_".contains(c) {
        true => c,
        false => '_',
    };
    let name: String = name.chars().map(plain).take(LABEL).collect();
    match name.strip_prefix(['.', '-']) {
        Some(rest) => format!("_{rest}"),
        None if name.is_empty() => "layer".to_owned(),
        None => name,
    }
}

fn hex(bytes: &[u8], digits: usize) -> String {
    let halves = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    let all = halves.filter_map(|half| char::from_digit(half.into(), 16));
    all.take(digits).collect()
}

/// Returns the kind of the shared device with `uuid`, and its layer's key; `None` for other devices.
pub(crate) fn parse(uuid: &str) -> Option<(Kind, &str)> {
    let rest = uuid.strip_prefix(UUID_PREFIX)?;
    let kinds = [Kind::Zfile, Kind::Blob].into_iter();
    let (kind, digits) = kinds
        .filter_map(|kind| Some((kind, rest.strip_prefix(kind.uuid_type())?)))
        .next()?;
    let is_digit = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    let right = digits.len() == LAYER_DIGITS + OPTION_DIGITS && digits.chars().all(is_digit);
    Some((kind, digits.get(..LAYER_DIGITS)?)).filter(|_| right)
}

/// Returns whether `uuid` is the UUID of a shared device.
pub(crate) fn is_shared(uuid: &str) -> bool {
    parse(uuid).is_some()
}

/// Returns the name of a device for the same layer as that with `uuid`, but with other options.
pub(crate) fn with_other_options<'a>(all: &'a [State], uuid: &str) -> Option<&'a str> {
    let wanted = parse(uuid)?;
    let other = |state: &&State| parse(&state.uuid) == Some(wanted) && state.uuid != uuid;
    all.iter().find(other).map(|state| state.name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(digits: char) -> Identity {
        Identity {
            label: "base.obd".to_owned(),
            digits: std::iter::repeat_n(digits, LAYER_DIGITS).collect(),
            loop_options: "direct",
            source: Source::Device { rdev: 0 },
        }
    }

    #[test]
    fn names_and_uuids() {
        let options = |words: &[&str]| {
            words
                .iter()
                .map(|&word| word.to_owned())
                .collect::<Vec<_>>()
        };
        let (name, uuid) = identity('a').device(Kind::Zfile, &[]);
        assert_eq!(parse(&uuid), Some((Kind::Zfile, &*"a".repeat(32))));
        // Documentation/names.rst says which digits.
        let digits = uuid.get(uuid.len() - 40..).unwrap_or_default();
        let (file, with_options) = (digits.get(..12), digits.get(32..36));
        let expected = [Some("base.obd-"), file, with_options, Some("-zfile")];
        assert_eq!(Some(name.clone()), expected.into_iter().collect());
        assert!(crate::devices::dm::plan::check_name(&name).is_ok());
        // Only the words matter, not how they are split over the options.
        let (_, one) = identity('a').device(Kind::Zfile, &options(&["cache_blocks 64"]));
        let (_, two) = identity('a').device(Kind::Zfile, &options(&["cache_blocks", "64"]));
        assert_eq!(one, two);
        assert_ne!(one, uuid);
        let (_, blob) = identity('a').device(Kind::Blob, &[]);
        assert!(blob != uuid && is_shared(&blob));
        let state = |uuid: &str| State {
            name: uuid.to_owned(),
            uuid: uuid.to_owned(),
            ..State::default()
        };
        let all = [state(&blob), state(&uuid), state(&one)];
        assert_eq!(with_other_options(&all, &one), Some(&*uuid));
        assert_eq!(with_other_options(&all[..2], &uuid), None);
        let (_, other) = identity('b').device(Kind::Zfile, &[]);
        assert_eq!(with_other_options(&all, &other), None);
    }

    #[test]
    fn other_uuids() {
        let digits = "0123456789abcdef0123456789abcdef01234567";
        assert!(is_shared(&format!("OVERLAYBD-BLOB-{digits}")));
        for uuid in [
            "",
            "OVERLAYBD-LAYER-base",
            "OVERLAYBD-LAYER-app-0",
            "OVERLAYBD-LSMT-0123456789abcdef0123456789abcdef01234567",
            "OVERLAYBD-LAYER-0123456789ABCDEF0123456789ABCDEF01234567",
            "OVERLAYBD-LAYER-0123456789abcdef0123456789abcdef0123456",
            "OVERLAYBD-LAYER-0123456789abcdef0123456789abcdef0123456\u{e9}",
        ] {
            assert!(!is_shared(uuid), "{uuid}");
        }
    }

    #[test]
    fn labels() {
        for (path, wanted) in [
            ("/srv/base.obd", "base.obd"),
            ("/srv/.hidden", "_hidden"),
            ("/srv/-x", "_x"),
            ("/srv/a b;c,\\\u{e9}", "a_b_c___"),
            ("/", "layer"),
        ] {
            assert_eq!(label(Path::new(path)), wanted);
        }
        let long = format!("/{}", "x".repeat(300));
        assert_eq!(label(Path::new(&long)).len(), LABEL);
    }
}
