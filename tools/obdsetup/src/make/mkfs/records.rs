// SPDX-License-Identifier: GPL-2.0

//! Interprets less common records of pax headers.
//!
//! Source: star(5); libarchive, tar(5), "Pax Interchange Format".

/// Records that don't affect the new file system: times and names of users and groups that obdsetup doesn't
/// use, and properties of the file system that the tar was made from.
const NOTHING: [&[u8]; 19] = [
    b"comment",
    b"charset",
    b"atime",
    b"ctime",
    b"uname",
    b"gname",
    b"SCHILY.dev",
    b"SCHILY.ino",
    b"SCHILY.nlink",
    b"SCHILY.realsize",
    b"SCHILY.filetype",
    b"SCHILY.release",
    b"SCHILY.archtype",
    b"SCHILY.tarfiletype",
    b"SCHILY.offset",
    b"SCHILY.dir",
    b"SCHILY.acl.type",
    b"LIBARCHIVE.creationtime",
    b"LIBARCHIVE.symlinktype",
];

/// The meaning of a record.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// The record has no effect.
    Nothing,
    /// Name and value of an extended attribute.
    Xattr(Vec<u8>, Vec<u8>),
    /// The value is invalid.
    Bad,
    Unknown,
}

/// Returns the meaning of the record `key` with `value`.
pub(super) fn meaning(key: &[u8], value: &[u8]) -> Meaning {
    if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
        return match base64(value) {
            Some(value) => Meaning::Xattr(unquote(name), value),
            None => Meaning::Bad,
        };
    }
    match NOTHING.contains(&key) || key.starts_with(b"GNU.") {
        true => Meaning::Nothing,
        false => Meaning::Unknown,
    }
}

/// Decodes `%HH` in the name of an extended attribute.
fn unquote(name: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&first, tail)) = rest.split_first() {
        let quoted = match rest {
            [b'%', high, low, tail @ ..] => hex(*high)
                .zip(hex(*low))
                .map(|(high, low)| ((high << 4) | low, tail)),
            _ => None,
        };
        let (byte, tail) = quoted.unwrap_or((first, tail));
        plain.push(byte);
        rest = tail;
    }
    plain
}

fn hex(digit: u8) -> Option<u8> {
    let digit = char::from(digit).to_digit(16)?;
    u8::try_from(digit).ok()
}

/// Decodes base64, with or without padding; `None` if `text` isn't base64.
fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let end = text.iter().rposition(|&byte| byte != b'=');
    let digits = text.get(..end.map_or(0, |end| end + 1))?;
    let mut bytes = Vec::with_capacity(digits.len());
    for group in digits.chunks(4) {
        let mut bits = 0;
        for nth in 0..4 {
            let value = match group.get(nth) {
                None => 0,
                Some(digit @ b'A'..=b'Z') => digit - b'A',
                Some(digit @ b'a'..=b'z') => digit - b'a' + 26,
                Some(digit @ b'0'..=b'9') => digit - b'0' + 52,
                Some(b'+') => 62,
                Some(b'/') => 63,
                Some(_) => return None,
            };
            bits = (bits << 6) | u32::from(value);
        }
        let [_, whole @ ..] = bits.to_be_bytes();
        bytes.extend_from_slice(whole.get(..group.len().checked_sub(1).filter(|&len| len > 0)?)?);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::{meaning, Meaning};

    #[test]
    fn meanings() {
        let xattr = |name: &str, value: &[u8]| Meaning::Xattr(name.into(), value.to_vec());
        let of = |key: &str, value: &str| meaning(key.as_bytes(), value.as_bytes());
        assert_eq!(
            of("LIBARCHIVE.xattr.user.a%3Db%", "AP8"),
            xattr("user.a=b%", b"\0\xff")
        );
        assert_eq!(
            of("LIBARCHIVE.xattr.user.a", "Zm9v"),
            xattr("user.a", b"foo")
        );
        assert_eq!(of("LIBARCHIVE.xattr.user.a", "Zg=="), xattr("user.a", b"f"));
        assert_eq!(of("LIBARCHIVE.xattr.user.a", ""), xattr("user.a", b""));
        assert_eq!(of("LIBARCHIVE.xattr.user.a", "Z"), Meaning::Bad);
        assert_eq!(of("LIBARCHIVE.xattr.user.a", "Z%=="), Meaning::Bad);
        assert_eq!(of("SCHILY.ino", "1"), Meaning::Nothing);
        assert_eq!(of("SCHILY.fflags", "immutable"), Meaning::Unknown);
    }
}
