// SPDX-License-Identifier: GPL-2.0

//! A header block of a tar: v7, ustar, or GNU.
//!
//! Source: POSIX.1-2017 `pax`, "ustar Interchange Format"; GNU tar's manual, "Basic Tar Format".

use std::ops::Range;

use overlaybd::format::num::to_u64;

/// Size of a block in bytes.
pub(crate) const BLOCK: usize = 512;

/// Offsets of the fields.
mod field {
    use std::ops::Range;

    pub(super) const NAME: Range<usize> = 0..100;
    pub(super) const MODE: Range<usize> = 100..108;
    pub(super) const UID: Range<usize> = 108..116;
    pub(super) const GID: Range<usize> = 116..124;
    pub(super) const SIZE: Range<usize> = 124..136;
    pub(super) const MTIME: Range<usize> = 136..148;
    pub(super) const CHECKSUM: Range<usize> = 148..156;
    pub(super) const TYPE: usize = 156;
    pub(super) const LINK: Range<usize> = 157..257;
    pub(super) const MAGIC: Range<usize> = 257..265;
    pub(super) const MAJOR: Range<usize> = 329..337;
    pub(super) const MINOR: Range<usize> = 337..345;
    pub(super) const PREFIX: Range<usize> = 345..500;
    /// GNU: offset and length of the first four extents of a sparse file.
    pub(super) const SPARSE: Range<usize> = 386..482;
    pub(super) const EXTENDED: usize = 482;
    pub(super) const REAL_SIZE: Range<usize> = 483..495;
}

/// Length of an entry in the map of a sparse file, in bytes.
pub(super) const MAP_ENTRY: usize = 24;
/// Offset, in a block that continues the map, of the byte that says whether another block follows.
const CONTINUED: usize = 504;

/// A number that cannot be parsed: the name of the field and its offset in the header.
pub(super) struct BadField(pub(super) &'static str, pub(super) usize);

/// A header block.
pub(super) struct Header<'a>(&'a [u8; BLOCK]);

impl<'a> Header<'a> {
    /// Returns the header in a block if its checksum is right.
    pub(super) fn new(block: &'a [u8; BLOCK]) -> Option<Self> {
        is_header(block).then_some(Self(block))
    }

    fn field(&self, range: Range<usize>) -> &'a [u8] {
        self.0.get(range).unwrap_or_default()
    }

    fn text(&self, range: Range<usize>) -> &'a [u8] {
        let field = self.field(range);
        field.split(|&byte| byte == 0).next().unwrap_or_default()
    }

    fn number(&self, range: Range<usize>, name: &'static str) -> Result<i128, BadField> {
        let start = range.start;
        number(self.field(range)).ok_or(BadField(name, start))
    }

    /// Returns whether this is a POSIX header, which can have the start of a long name in the field
    /// [`field::PREFIX`].
    fn is_ustar(&self) -> bool {
        self.field(field::MAGIC).starts_with(b"ustar\0")
    }

    /// Returns whether this is a header of GNU tar.
    pub(super) fn is_gnu(&self) -> bool {
        self.field(field::MAGIC) == b"ustar  \0"
    }

    /// Returns the type of the member.
    pub(super) fn kind(&self) -> u8 {
        self.0.get(field::TYPE).copied().unwrap_or_default()
    }

    /// Returns the name of the member in this header; an extended header may have another one.
    pub(super) fn name(&self) -> Vec<u8> {
        let name = self.text(field::NAME);
        match self.text(field::PREFIX) {
            prefix if self.is_ustar() && !prefix.is_empty() => [prefix, name].join(&b'/'),
            _ => name.to_vec(),
        }
    }

    pub(super) fn link(&self) -> Vec<u8> {
        self.text(field::LINK).to_vec()
    }

    pub(super) fn mode(&self) -> Result<i128, BadField> {
        self.number(field::MODE, "mode")
    }

    pub(super) fn uid(&self) -> Result<i128, BadField> {
        self.number(field::UID, "uid")
    }

    pub(super) fn gid(&self) -> Result<i128, BadField> {
        self.number(field::GID, "gid")
    }

    pub(super) fn size(&self) -> Result<i128, BadField> {
        self.number(field::SIZE, "size")
    }

    pub(super) fn mtime(&self) -> Result<i128, BadField> {
        self.number(field::MTIME, "mtime")
    }

    pub(super) fn major(&self) -> Result<i128, BadField> {
        self.number(field::MAJOR, "device major number")
    }

    pub(super) fn minor(&self) -> Result<i128, BadField> {
        self.number(field::MINOR, "device minor number")
    }

    /// GNU: returns the size of a sparse file in bytes, holes included.
    pub(super) fn real_size(&self) -> Result<i128, BadField> {
        self.number(field::REAL_SIZE, "real size")
    }

    /// GNU: returns the start of a sparse file's map, and whether blocks follow that continue it.
    pub(super) fn sparse(&self) -> (&'a [u8], bool) {
        let more = self.0.get(field::EXTENDED).is_some_and(|&more| more != 0);
        (self.field(field::SPARSE), more)
    }
}

/// Returns the part of a map in a block that continues it, and whether another block follows.
pub(super) fn sparse_continued(block: &[u8; BLOCK]) -> (&[u8], bool) {
    let (map, rest) = block.split_at(CONTINUED);
    (map, rest.first().is_some_and(|&more| more != 0))
}

/// Returns whether `block` has the checksum of a header.
pub(crate) fn is_header(block: &[u8; BLOCK]) -> bool {
    let Some(wanted) = block.get(field::CHECKSUM).and_then(number) else {
        return false;
    };
    // Old writers add up signed characters.
    let (mut unsigned, mut signed) = (0i128, 0i128);
    for (at, &byte) in block.iter().enumerate() {
        let byte = match field::CHECKSUM.contains(&at) {
            true => b' ',
            false => byte,
        };
        unsigned += i128::from(byte);
        signed += i128::from(i8::from_ne_bytes([byte]));
    }
    wanted == unsigned || wanted == signed
}

/// Parses a number: octal with blanks or NULs around it, or GNU's signed base-256 form. A field
/// with nothing else than blanks or NULs is 0.
pub(super) fn number(field: &[u8]) -> Option<i128> {
    if let Some((&first @ 0x80.., rest)) = field.split_first() {
        // The first bit marks the form; the others are a two's complement number.
        let high = match first & 0x40 {
            0 => i128::from(first & 0x3f),
            _ => i128::from(first & 0x3f) - 0x40,
        };
        return rest.iter().try_fold(high, |n, &byte| {
            n.checked_mul(256)?.checked_add(byte.into())
        });
    }
    let start = field.iter().position(|&byte| byte != b' ' && byte != 0);
    let digits = field.get(start.unwrap_or(field.len())..)?;
    let end = digits.iter().position(|&byte| byte == b' ' || byte == 0);
    let digits = digits.get(..end.unwrap_or(digits.len()))?;
    digits.iter().try_fold(0i128, |n, &byte| match byte {
        b'0'..=b'7' => n.checked_mul(8)?.checked_add((byte - b'0').into()),
        _ => None,
    })
}

/// Returns the number of bytes of padding after `size` bytes of content.
pub(super) fn pad(size: u64) -> u64 {
    size.wrapping_neg() % to_u64(BLOCK)
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn numbers() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"        "), Some(0));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(number(b"0000648\0"), None);
        assert_eq!(number(b"-000644\0"), None);
        assert_eq!(number(b"\x80\0\0\x02\0\0\0\0"), Some(2 << 32));
        assert_eq!(number(b"\xff\xff\xff\xff\xff\xff\xff\xfe"), Some(-2));
        assert_eq!(
            number(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe"),
            Some(-2)
        );
    }
}
