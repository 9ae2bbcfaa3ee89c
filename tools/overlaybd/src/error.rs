// SPDX-License-Identifier: GPL-2.0

//! Errors. The messages name the file, the field and its place, the value found and the value
//! expected.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::changes;
use crate::format::{self, lsmt, zfile, Fault};

/// Result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image violates the format.
    #[error("{}", Described { error: *.error, size: *.size })]
    Format {
        /// The violation.
        error: format::Error,
        /// Size in bytes of the file or, for an error in the layer in a tar, of that layer. `None` if
        /// the error is in decompressed content.
        size: Option<u64>,
    },

    /// A block of a ZFile is corrupt.
    #[error(transparent)]
    Block(#[from] BlockError),

    /// A store of changes has a fault.
    #[error(transparent)]
    Changes(#[from] changes::Fault),

    /// A read failed.
    #[error("cannot read {len} bytes at byte {offset}: {source}")]
    Read {
        /// Byte offset in the file.
        offset: u64,
        /// Number of bytes to read.
        len: u64,
        /// The system's error.
        source: io::Error,
    },

    /// Another operation failed.
    #[error("cannot {what}: {source}")]
    Io {
        /// The operation, as it follows "cannot" in the message.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },

    /// The layer's segments don't fit in an index.
    #[error("the layer would have {entries} index entries, more than {max}")]
    TooFragmented {
        /// Number of entries, padding included.
        entries: u64,
        /// The format's limit.
        max: u64,
    },

    /// A parameter is out of range.
    #[error("{0}")]
    Invalid(String),

    /// The caller's [`Progress`](crate::Progress) asked to stop.
    #[error("interrupted")]
    Interrupted,

    /// An error, with the file it concerns.
    #[error("{}: {source}", path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// The error.
        source: Box<Error>,
    },
}

impl Error {
    /// Adds the path of the file to the error. Keeps the path of an error that already has one.
    pub fn in_file(self, path: &Path) -> Self {
        match self {
            Self::InFile { .. } | Self::Interrupted => self,
            other => Self::InFile {
                path: path.to_owned(),
                source: Box::new(other),
            },
        }
    }

    /// Adds the size in bytes of the file, or of the layer in a tar. The message uses it to find out
    /// whether bytes are missing.
    pub(crate) fn with_size(self, bytes: u64) -> Self {
        match self {
            Self::Format { error, .. } => Self::Format {
                error,
                size: Some(bytes),
            },
            Self::InFile { path, source } => Self::InFile {
                path,
                source: Box::new(source.with_size(bytes)),
            },
            other => other,
        }
    }

    /// Returns the error without the path of the file.
    pub fn cause(&self) -> &Self {
        match self {
            Self::InFile { source, .. } => source.cause(),
            other => other,
        }
    }

    /// Returns the format's fault if this is a format error.
    pub fn fault(&self) -> Option<Fault> {
        match self.cause() {
            Self::Format { error, .. } => Some(error.fault),
            _ => None,
        }
    }

    /// Returns whether the image causes the error, not the system or the caller.
    pub fn is_bad_image(&self) -> bool {
        matches!(
            self.cause(),
            Self::Format { .. } | Self::Block(_) | Self::Changes(_)
        )
    }

    /// Returns the kind of the system's error, if the system causes the error.
    pub fn io_kind(&self) -> Option<io::ErrorKind> {
        match self.cause() {
            Self::Read { source, .. } | Self::Io { source, .. } => Some(source.kind()),
            _ => None,
        }
    }
}

impl From<format::Error> for Error {
    fn from(error: format::Error) -> Self {
        Self::Format { error, size: None }
    }
}

/// A block of a ZFile that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("zfile block {block} at byte {offset}: {fault}")]
pub struct BlockError {
    /// Number of the block.
    pub block: u64,
    /// Byte offset of its stored bytes in the ZFile.
    pub offset: u64,
    /// The fault.
    pub fault: BlockFault,
}

/// A fault of a block of a ZFile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockFault {
    /// The CRC of the stored data differs from the CRC that follows the data.
    #[error("CRC: found {found:#010x}, expected {expected:#010x}")]
    Crc {
        /// CRC computed from the data.
        found: u32,
        /// CRC stored after the data.
        expected: u32,
    },
    /// The codec rejects the data.
    #[error("the compressed data is corrupt")]
    Data,
    /// The decompressed block has the wrong length.
    #[error("length: found {found} bytes, expected {expected}")]
    Length {
        /// Number of decompressed bytes.
        found: u32,
        /// Length of the block in the original file, in bytes.
        expected: u32,
    },
}

/// No file has so many bytes: this number or a larger one is corrupt.
const MOST: u64 = 1 << 50;

/// Displays a format error.
struct Described {
    error: format::Error,
    size: Option<u64>,
}

impl Described {
    /// Describes missing bytes, if they are the likely cause of the error.
    fn short(&self) -> Option<String> {
        let (found, size) = (self.error.found, self.size?);
        let offset = self.error.offset;
        let what = match self.error.fault {
            _ if size == 0 => return Some("the file is empty".to_owned()),
            Fault::Truncated => format!("{found} bytes are wanted at byte {offset}"),
            Fault::ZfileIndexRange if found >= zfile::HEADER_SIZE => {
                format!("the index is at byte {found}")
            }
            Fault::LsmtIndexRange if found >= lsmt::HEADER_SIZE => {
                format!("the index is at byte {found}")
            }
            Fault::TarSize if found > 0 => {
                format!("the tar member at byte {offset} has {found} bytes")
            }
            Fault::ZfileTrailerMagic | Fault::LsmtTrailerMagic => {
                return Some(format!(
                    "the trailer is not at the end of the {size} bytes: incomplete copy, or bytes \
                     were added"
                ))
            }
            _ => return None,
        };
        let is_index = matches!(
            self.error.fault,
            Fault::ZfileIndexRange | Fault::LsmtIndexRange
        );
        // The index is near the end of a complete file, so a truncated file doesn't have it. If the
        // offset is in the first half of the bytes, or larger than any file, it is corrupt instead.
        if is_index && found < size / 2 || found >= MOST {
            return None;
        }
        Some(format!(
            "too short: it has {size} bytes, {what}: incomplete copy?"
        ))
    }
}

impl fmt::Display for Described {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(text) = self.short() else {
            return self.field(f);
        };
        f.write_str(&text)?;
        // The text about a truncated or empty file is complete.
        if self.size == Some(0) || self.error.fault == Fault::Truncated {
            return Ok(());
        }
        f.write_str(" (")?;
        self.field(f)?;
        f.write_str(")")
    }
}

impl Described {
    /// Writes the field, its offset, the value found and the value expected.
    fn field(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let format::Error {
            fault,
            offset,
            found,
        } = self.error;
        let (field, expected) = (fault.field(), fault.expected());
        match fault {
            Fault::Truncated => write!(
                f,
                "image is truncated: {found} bytes wanted at byte {offset} are not all there"
            ),
            Fault::LsmtIsZfile => write!(f, "a ZFile in a ZFile: one level only is read"),
            Fault::TarHeader | Fault::ZfileTrailerMagic => {
                write!(
                    f,
                    "{field} at byte {offset}: not found, expected {expected}"
                )
            }
            Fault::LsmtMagic => {
                let magic = found.to_le_bytes();
                write!(
                    f,
                    "not an OverlayBD layer: begins with \"{}\", not with a tar, ZFile or LSMT header",
                    magic.escape_ascii()
                )
            }
            Fault::LsmtTrailerMagic => {
                let magic = found.to_le_bytes();
                write!(
                    f,
                    "{field} at byte {offset}: found \"{}\", expected {expected}",
                    magic.escape_ascii()
                )
            }
            Fault::LsmtLayerCount | Fault::LsmtMergedCount => {
                write!(f, "number of {field}: found {found}, expected {expected}")
            }
            Fault::LsmtVirtualSize => write!(f, "{field}: found {found}, expected {expected}"),
            Fault::ZfileHeaderFlags
            | Fault::ZfileTrailerFlags
            | Fault::ZfileCompressedIndex
            | Fault::ZfileHeaderDigest
            | Fault::ZfileTrailerDigest
            | Fault::ZfileIndexCrc
            | Fault::LsmtHeaderFlags
            | Fault::LsmtTrailerFlags => write!(
                f,
                "{field} at byte {offset}: found {found:#x}, expected {expected}"
            ),
            _ => write!(
                f,
                "{field} at byte {offset}: found {found}, expected {expected}"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{format, Described, Fault};

    #[test]
    fn only_what_is_missing_is_an_incomplete_copy() {
        let short = |fault, offset, found| {
            let error = format::Error {
                fault,
                offset,
                found,
            };
            let size = Some(100_000);
            Described { error, size }.short().is_some()
        };
        assert!(short(Fault::ZfileIndexRange, 40, 200_000));
        assert!(short(Fault::Truncated, 99_999, 2));
        assert!(short(Fault::TarSize, 512, 99_999));
        assert!(short(Fault::ZfileIndexRange, 40, 99_900));
        assert!(!short(Fault::ZfileIndexRange, 40, 40_000));
        assert!(!short(Fault::LsmtIndexRange, 40, u64::MAX - 7));
        assert!(!short(Fault::TarSize, 512, 1 << 60));
    }
}
