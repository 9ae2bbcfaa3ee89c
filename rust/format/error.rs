// SPDX-License-Identifier: GPL-2.0

//! The faults for which an image is refused.

use core::ffi::CStr;

/// Declares [`Fault`]: for each fault, its phrase, field and expected value.
macro_rules! faults {
    ($($(#[$doc:meta])* $name:ident: $phrase:literal, $field:literal, $expected:literal;)*) => {
        /// The reason why an image is refused.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Fault {
            $(#[doc = $expected] $(#[$doc])* $name,)*
        }

        impl Fault {
            /// Every fault, in the order of declaration.
            #[allow(dead_code, reason = "only the tests of the tools go through all faults")]
            pub const ALL: &'static [Fault] = &[$(Fault::$name,)*];

            /// Returns a short phrase for the fault: the target's `ti->error`.
            pub const fn phrase(self) -> &'static CStr {
                match self {
                    $(Fault::$name => $phrase,)*
                }
            }

            /// Returns the name of the on-disk field or structure that has the fault.
            pub const fn field(self) -> &'static str {
                match self {
                    $(Fault::$name => $field,)*
                }
            }

            /// Returns a description of the values that are accepted there.
            pub const fn expected(self) -> &'static str {
                match self {
                    $(Fault::$name => $expected,)*
                }
            }
        }
    };
}

faults! {
    Truncated: c"Image is truncated", "size", "the range within the blob";

    TarHeader: c"Invalid tar header", "tar header", "a ustar header with a right checksum";
    TarSize: c"Invalid tar member size", "tar size", "a size that ends within the blob";
    TarPax: c"Invalid tar pax record", "tar pax record", "records `LENGTH KEY=VALUE`, 1 MiB at most";
    TarMember: c"Tar member is not a regular file", "tar typeflag", "a regular file";

    ZfileMagic: c"Not a ZFile", "zfile magic", "the ZFile magic";
    ZfileHeaderFlags: c"Invalid ZFile header flags", "zfile header flags",
        "header bit set, and data-file bit set where the trailer is used";
    ZfileHeaderDigest: c"ZFile header digest mismatch", "zfile header digest",
        "the CRC-32C of the header";
    ZfileTrailerMagic: c"Invalid ZFile trailer magic", "zfile trailer magic", "the ZFile magic";
    ZfileTrailerFlags: c"Invalid ZFile trailer flags", "zfile trailer flags",
        "header bit clear, data-file and sealed bits set";
    ZfileTrailerDigest: c"ZFile trailer digest mismatch", "zfile trailer digest",
        "the CRC-32C of the trailer";
    ZfileDictionary: c"ZFile dictionaries are not supported", "zfile dict_size", "0";
    ZfileCompressedIndex: c"ZFile compressed index is not supported", "zfile flags",
        "index-compressed bit clear";
    ZfileAlgorithm: c"Unknown ZFile algorithm", "zfile algo", "1 (LZ4) or 2 (zstd)";
    ZfileBlockSize: c"Invalid ZFile block size", "zfile block_size",
        "a power of two from 512 to 65536";
    ZfileIndexCount: c"Too many ZFile index entries", "zfile index_size", "1000000000 at most";
    ZfileBlockCount: c"ZFile index size does not match the file size", "zfile index_size",
        "original_file_size / block_size, rounded up";
    ZfileIndexRange: c"ZFile index out of range", "zfile index_offset",
        "an index behind the header and within the file";
    ZfileIndexCrc: c"ZFile index CRC mismatch", "zfile index_crc", "the CRC-32C of the index";
    ZfileEntry: c"Invalid ZFile index entry", "zfile index entry",
        "a stored length above 0 and within the bound of the algorithm";
    ZfileEntryRange: c"ZFile blocks overlap the index", "zfile index entry",
        "blocks that end before the index";

    LsmtMagic: c"Not an LSMT layer", "lsmt magic", "the LSMT magic";
    LsmtIsZfile: c"Layer is a ZFile, put a zfile device below", "lsmt magic", "the LSMT magic";
    LsmtHeaderFlags: c"Invalid LSMT header flags", "lsmt header flags",
        "header and data-file bits set";
    LsmtTrailerMagic: c"Invalid LSMT trailer magic", "lsmt trailer magic", "the LSMT magic";
    LsmtTrailerFlags: c"Invalid LSMT trailer flags", "lsmt trailer flags",
        "header bit clear, data-file and sealed bits set";
    LsmtIndexCount: c"Too many LSMT index entries", "lsmt index_size", "1000000 at most";
    LsmtIndexRange: c"LSMT index out of range", "lsmt index_offset",
        "an index behind the header and before the trailer";
    LsmtEntryOrder: c"LSMT index entries out of order", "lsmt entry offset",
        "an offset at or behind the end of the entry before";
    LsmtEntryLength: c"Invalid LSMT entry length", "lsmt entry length",
        "above 0, ending at or below sector 2^50";
    LsmtEntryMapping: c"LSMT entry maps outside of the data", "lsmt entry moffset",
        "sectors from 8 up to the index";
    LsmtVirtualSizeRange: c"LSMT virtual size is too large", "lsmt virtual_size",
        "2^59 bytes at most";
    LsmtVirtualSize: c"No layer has a virtual size", "lsmt virtual_size",
        "above 0 in one layer at least";
    LsmtLayerCount: c"Invalid number of layers", "layers", "1 to 255";
    LsmtMergedCount: c"Too many segments in the merged index", "layers", "128000000 at most";
}

/// A fault, its place, and the value that was found there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error {
    /// The fault.
    pub fault: Fault,
    /// Byte offset of the field, from the start of the tar, ZFile or LSMT file that contains it.
    pub offset: u64,
    /// The value that was found there.
    pub found: u64,
}

impl Error {
    /// Makes an error from its parts.
    pub const fn new(fault: Fault, offset: u64, found: u64) -> Self {
        Self {
            fault,
            offset,
            found,
        }
    }
}
