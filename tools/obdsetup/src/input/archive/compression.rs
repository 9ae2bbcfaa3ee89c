// SPDX-License-Identifier: GPL-2.0

//! The compressions that obdsetup can undo, and how to recognise them.

/// The compression of a whole file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    Gzip,
    Bzip2,
    Xz,
    /// The format of `.lzma` files, which is older than xz. It has no magic number.
    Lzma,
    Lzip,
    Zstd,
    Lz4,
    /// The format of `lz4 -l` and of the kernel's images.
    Lz4Legacy,
}

/// The first bytes of compressed files.
const MAGIC: &[(&[u8], Compression)] = &[
    (b"\x1f\x8b\x08", Compression::Gzip),
    (b"\xfd7zXZ\0", Compression::Xz),
    (b"LZIP\x01", Compression::Lzip),
    (b"\x28\xb5\x2f\xfd", Compression::Zstd),
    (b"\x04\x22\x4d\x18", Compression::Lz4),
    (b"\x02\x21\x4c\x18", Compression::Lz4Legacy),
];
/// Length of the header of an `.lzma` file in bytes.
const LZMA_HEADER: usize = 13;

impl Compression {
    /// Number of bytes from the start of a file that [`Self::of`] needs.
    pub(crate) const LOOKS_AT: usize = 16;

    /// Returns the compression of a file that begins with `head`.
    pub(crate) fn of(head: &[u8]) -> Option<Self> {
        let known = MAGIC.iter().find(|(magic, _)| head.starts_with(magic));
        match known {
            Some(&(_, compression)) => Some(compression),
            None if is_bzip2(head) => Some(Self::Bzip2),
            None if is_lzma(head) => Some(Self::Lzma),
            None if is_skippable(head) => Some(Self::Zstd),
            None => None,
        }
    }

    /// Returns the name for messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Lzip => "lzip",
            Self::Zstd => "zstd",
            Self::Lz4 | Self::Lz4Legacy => "lz4",
        }
    }
}

fn is_bzip2(head: &[u8]) -> bool {
    // After the magic number of the file comes that of the first block or, without blocks, that of the end.
    let first = head.get(4..10);
    head.starts_with(b"BZh")
        && matches!(head.get(3), Some(b'1'..=b'9'))
        && (first == Some(b"\x31\x41\x59\x26\x53\x59")
            || first == Some(b"\x17\x72\x45\x38\x50\x90"))
}

/// Returns whether `head` begins with a frame that decoders of zstd and LZ4 skip. Files of pzstd and
/// others begin with one.
fn is_skippable(head: &[u8]) -> bool {
    matches!(head, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

/// Returns whether `head` is a header that xz accepts: properties, a dictionary size that encoders
/// choose, and a length below 256 GiB or none.
fn is_lzma(head: &[u8]) -> bool {
    let Some(&[properties, d0, d1, d2, d3, ref length @ ..]) = head.first_chunk::<LZMA_HEADER>()
    else {
        return false;
    };
    let dictionary = u32::from_le_bytes([d0, d1, d2, d3]);
    let length = u64::from_le_bytes(*length);
    // One bit, or two adjacent bits: 2^n or 2^n + 2^(n - 1).
    let bits = dictionary.count_ones();
    let usual = bits == 1
        || bits == 2 && dictionary.leading_zeros() + dictionary.trailing_zeros() == u32::BITS - 2;
    properties < 225
        && dictionary >= 4096
        && (usual || dictionary == u32::MAX)
        && (length == u64::MAX || length < 1 << 38)
}
