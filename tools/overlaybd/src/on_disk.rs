// SPDX-License-Identifier: GPL-2.0

//! The parts of the formats that the kernel module doesn't need: the fields of headers and trailers
//! that it ignores, and writing index entries. Everything else is in [`format`](crate::format).

/// LSMT, besides [`format::lsmt`](crate::format::lsmt).
///
/// Format description: `Documentation/formats/lsmt.rst`.
pub mod lsmt {
    use crate::format::lsmt::Segment;
    use crate::format::num::bytes_at;

    /// Value of the `size` field in bytes.
    pub const STRUCT_SIZE: u32 = 390;
    /// Length of a UUID field in bytes.
    pub const UUID_LEN: usize = 37;
    /// Length of the user tag in bytes.
    pub const USER_TAG_LEN: usize = 256;

    /// Byte offsets of the fields in the header and in the trailer.
    pub mod field {
        /// `u32` size of the structure in bytes, never checked.
        pub const SIZE: usize = 24;
        /// 37 bytes: UUID of the layer as text, or empty.
        pub const UUID: usize = 56;
        /// 37 bytes: UUID of the layer below as text, or empty.
        pub const PARENT: usize = 93;
        /// `u8` version, `u8` sub-version: informative.
        pub const VERSION: usize = 132;
        /// 256 bytes of text from the user.
        pub const USER_TAG: usize = 134;
    }

    /// The fields of a header or trailer that say what the layer is, as they are on disk. None of
    /// them is checked. Texts are filled up with NULs.
    #[derive(Clone, Copy, Debug)]
    pub struct Labels {
        /// UUID of the layer as text.
        pub uuid: [u8; UUID_LEN],
        /// UUID of the layer below as text.
        pub parent: [u8; UUID_LEN],
        /// Version and sub-version.
        pub version: [u8; 2],
        /// Text from the user.
        pub user_tag: [u8; USER_TAG_LEN],
    }

    impl Labels {
        /// Parses the first 512 bytes of a header or trailer.
        pub fn parse(bytes: &[u8; 512]) -> Self {
            Self {
                uuid: bytes_at(bytes, field::UUID),
                parent: bytes_at(bytes, field::PARENT),
                version: bytes_at(bytes, field::VERSION),
                user_tag: bytes_at(bytes, field::USER_TAG),
            }
        }
    }

    /// Number of bits of an entry's offset.
    const OFFSET_BITS: u32 = 50;
    /// Number of bits of an entry's `moffset`.
    const MOFFSET_BITS: u32 = 55;

    /// Returns the index entry of `segment`.
    ///
    /// First word, from the lowest bit: 50 bits of offset, 14 bits of length. Second word: 55 bits
    /// of `moffset`, the zeroed bit, 8 bits of tag. A [`Segment`] has only values that fit.
    pub fn entry(segment: &Segment) -> [u8; 16] {
        let place = segment.offset() | (segment.length() << OFFSET_BITS);
        let zeroed = u64::from(segment.zeroed()) << MOFFSET_BITS;
        let tag = u64::from(segment.tag()) << (MOFFSET_BITS + 1);
        let source = segment.moffset() | zeroed | tag;
        ((u128::from(source) << 64) | u128::from(place)).to_le_bytes()
    }

    /// An index entry that is padding, and no segment: all bits of its offset are set.
    pub const PADDING: [u8; 16] = ((1u128 << OFFSET_BITS) - 1).to_le_bytes();
}

/// ZFile, besides [`format::zfile`](crate::format::zfile).
///
/// Format description: `Documentation/formats/zfile.rst`.
pub mod zfile {
    use crate::format::zfile::{flag, RawHeader, HEADER_SIZE};
    use crate::format::Blob;
    use crate::{Error, Result};

    /// Value of the `size` field in bytes.
    pub const STRUCT_SIZE: u32 = 96;

    /// Byte offsets of the fields in the header and in the trailer.
    pub mod field {
        /// `u32` size of the structure in bytes, never checked.
        pub const SIZE: usize = 24;
        /// `u8` compression level, informative.
        pub const LEVEL: usize = 77;
        /// `u8` whether a dictionary is used, informative.
        pub const USE_DICT: usize = 78;
    }

    /// The header or trailer of a ZFile, whichever has the values that readers use. None of the
    /// fields is checked.
    #[derive(Clone, Copy, Debug)]
    pub struct Metadata {
        /// Whether it is the trailer.
        pub in_trailer: bool,
        /// The fields that a reader needs.
        pub raw: RawHeader,
        /// Compression level, informative.
        pub level: u8,
        /// Whether a dictionary is used, informative.
        pub use_dict: u8,
    }

    impl Metadata {
        /// Reads the header of the ZFile `blob`, or its trailer if the header was not written again
        /// at the end.
        ///
        /// # Errors
        ///
        /// Read errors, and [`Error::Invalid`] if there is no such header or trailer: the file has
        /// changed since it was opened as a ZFile.
        pub fn read<B: Blob<Error = Error>>(blob: &B) -> Result<Self> {
            let changes = || Error::Invalid("the file changes while it is read".to_owned());
            let mut bytes = [0; 512];
            blob.read_at(0, &mut bytes)?;
            let mut raw = RawHeader::parse(&bytes).ok_or_else(changes)?;
            let in_trailer = !raw.has(flag::OVERWRITTEN);
            if in_trailer {
                let at = blob.size().checked_sub(HEADER_SIZE);
                blob.read_at(at.ok_or_else(changes)?, &mut bytes)?;
                raw = RawHeader::parse(&bytes).ok_or_else(changes)?;
            }
            Ok(Self {
                in_trailer,
                raw,
                level: bytes[field::LEVEL],
                use_dict: bytes[field::USE_DICT],
            })
        }
    }
}
