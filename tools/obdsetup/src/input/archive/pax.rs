// SPDX-License-Identifier: GPL-2.0

//! The records of extended headers: `LENGTH KEY=VALUE\n`, where a value may have any bytes.
//!
//! Source: POSIX.1-2017 `pax`, "pax Interchange Format"; GNU tar's manual, "Storing Sparse Files"
//! and "Extended attributes".

use std::collections::HashSet;

use super::member::{Extent, Time};

/// Prefix of keys with which GNU tar describes a sparse file.
const SPARSE: &[u8] = b"GNU.sparse.";
/// Prefix of keys of extended attributes.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// Records in their order in the tar. If several have the same key, the last one counts.
#[derive(Clone, Debug, Default)]
pub(super) struct Records(List);

/// Keys, or names of extended attributes, and values.
type List = Vec<(Vec<u8>, Vec<u8>)>;

/// The key of a record with an invalid value.
pub(super) struct BadRecord(pub(super) &'static str);

/// The content of the extended headers before a member: pax records, and GNU's long names.
#[derive(Default)]
pub(super) struct Extended {
    pub(super) pax: Records,
    pub(super) name: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
}

impl Records {
    /// Appends the records in the payload of an extended header. Returns `None` if the payload is
    /// malformed.
    pub(super) fn parse(&mut self, mut bytes: &[u8]) -> Option<()> {
        while !bytes.is_empty() {
            // Some writers pad with zeros.
            if bytes.iter().all(|&byte| byte == 0) {
                break;
            }
            let blank = bytes.iter().take(20).position(|&byte| byte == b' ')?;
            let len = std::str::from_utf8(bytes.get(..blank)?).ok()?;
            let len: usize = len.parse().ok()?;
            let record = bytes.get(blank + 1..len)?.strip_suffix(b"\n")?;
            let equals = record.iter().position(|&byte| byte == b'=')?;
            let (key, value) = record.split_at(equals);
            self.0.push((key.to_vec(), value.get(1..)?.to_vec()));
            bytes = bytes.get(len..)?;
        }
        Some(())
    }

    /// Removes the records that later ones with the same key replace.
    pub(super) fn merge(&mut self) {
        let mut seen = HashSet::new();
        self.0.reverse();
        self.0.retain(|(key, _)| seen.insert(key.clone()));
        self.0.reverse();
    }

    /// Returns the number of records.
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// Returns whether a record is about a sparse file.
    pub(super) fn has_sparse(&self) -> bool {
        self.0.iter().any(|(key, _)| key.starts_with(SPARSE))
    }

    /// Returns the records of the global headers, followed by those of `self`.
    pub(super) fn over(&self, global: &Self) -> Self {
        Self(global.0.iter().chain(&self.0).cloned().collect())
    }

    /// Returns the value of `key`; `None` if there is no such record, or if the last one has an empty
    /// value, which cancels the earlier ones.
    pub(super) fn get(&self, key: &[u8]) -> Option<&[u8]> {
        let found = self.0.iter().rev().find(|(name, _)| name == key);
        found
            .map(|(_, value)| value.as_slice())
            .filter(|value| !value.is_empty())
    }

    /// Returns the value of `key` as a number.
    pub(super) fn number(&self, key: &'static str) -> Result<Option<i128>, BadRecord> {
        self.get(key.as_bytes())
            .map(|value| decimal(value).ok_or(BadRecord(key)))
            .transpose()
    }

    /// Returns the value of `key` as a time.
    pub(super) fn time(&self, key: &'static str) -> Result<Option<Time>, BadRecord> {
        self.get(key.as_bytes())
            .map(|value| time(value).ok_or(BadRecord(key)))
            .transpose()
    }

    /// Returns the map of a sparse file in the formats that store it in records, 0.0 and 0.1.
    pub(super) fn map(&self) -> Result<Option<Vec<Extent>>, BadRecord> {
        let bad = BadRecord("GNU.sparse.map");
        let mut numbers = Vec::new();
        if let Some(map) = self.get(b"GNU.sparse.map") {
            for number in map.split(|&byte| byte == b',') {
                numbers.push(number);
            }
        } else {
            let keys: [&[u8]; 2] = [b"GNU.sparse.offset", b"GNU.sparse.numbytes"];
            let records = self
                .0
                .iter()
                .filter(|(key, _)| keys.contains(&key.as_slice()));
            for (at, (key, value)) in records.enumerate() {
                // The two keys alternate.
                if Some(&key.as_slice()) != keys.get(at % 2) {
                    return Err(bad);
                }
                numbers.push(value);
            }
            if numbers.is_empty() && self.get(b"GNU.sparse.numblocks").is_none() {
                return Ok(None);
            }
        }
        let number = |text: &[u8]| decimal(text).and_then(|number| u64::try_from(number).ok());
        let extents = numbers.chunks(2).map(|pair| match *pair {
            [offset, len] => Some(Extent {
                offset: number(offset)?,
                len: number(len)?,
            }),
            _ => None,
        });
        extents.collect::<Option<_>>().map(Some).ok_or(bad)
    }

    /// Returns the extended attributes, and all other records that the reader doesn't interpret.
    pub(super) fn rest(self) -> (List, List) {
        const KNOWN: [&[u8]; 9] = [
            b"path",
            b"linkpath",
            b"size",
            b"uid",
            b"gid",
            b"mtime",
            b"hdrcharset",
            b"SCHILY.devmajor",
            b"SCHILY.devminor",
        ];
        let (mut xattrs, mut rest): (List, List) = Default::default();
        let mut seen = HashSet::new();
        for (key, value) in self.0.into_iter().rev() {
            if KNOWN.contains(&key.as_slice()) || key.starts_with(SPARSE) {
                continue;
            }
            if !seen.insert(key.clone()) {
                continue;
            }
            match key.strip_prefix(XATTR) {
                Some(name) => xattrs.push((unescape(name), value)),
                None => rest.push((key, value)),
            }
        }
        xattrs.reverse();
        rest.reverse();
        (xattrs, rest)
    }
}

/// Undoes GNU tar's escaping of `=` and `%` in names of extended attributes.
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&first, tail)) = rest.split_first() {
        let (byte, tail) = match rest {
            [b'%', b'3', b'D', tail @ ..] => (b'=', tail),
            [b'%', b'2', b'5', tail @ ..] => (b'%', tail),
            _ => (first, tail),
        };
        plain.push(byte);
        rest = tail;
    }
    plain
}

/// Parses a decimal number, which may be negative.
pub(super) fn decimal(text: &[u8]) -> Option<i128> {
    // parse() would accept "+".
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let all = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(text).ok().filter(|_| all)?;
    text.parse().ok()
}

/// Parses a decimal number of seconds. Of its fraction, nine digits are used.
fn time(text: &[u8]) -> Option<Time> {
    let mut parts = text.splitn(2, |&byte| byte == b'.');
    let (whole, fraction) = (parts.next()?, parts.next().unwrap_or_default());
    let negative = whole.starts_with(b"-");
    let seconds = i64::try_from(decimal(whole)?).ok()?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction.iter().chain(std::iter::repeat(&b'0')).take(9);
    let nanoseconds = digits.fold(0u32, |n, &digit| n * 10 + u32::from(digit - b'0'));
    Some(match (negative, nanoseconds) {
        // Nanoseconds count forward: -1.5 is half a second after -2.
        (true, 1..) => Time {
            seconds: seconds.checked_sub(1)?,
            nanoseconds: 1_000_000_000 - nanoseconds,
        },
        _ => Time {
            seconds,
            nanoseconds,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::{time, Records, Time};

    #[test]
    fn records() {
        let mut records = Records::default();
        let text = b"12 path=a/b\n23 SCHILY.xattr.x=\n\n\0=\n";
        assert!(records.parse(text).is_some());
        assert_eq!(records.get(b"path"), Some(b"a/b".as_slice()));
        let (xattrs, rest) = records.rest();
        assert_eq!(xattrs, [(b"x".to_vec(), b"\n\n\0=".to_vec())]);
        assert_eq!(rest, []);
        // The last record of each key stays, in its place among the others.
        let mut records = Records::default();
        let text = b"7 a=12\n6 b=3\n6 a=4\n6 c=5\n";
        assert!(records.parse(text).is_some());
        let before = records.clone();
        records.merge();
        assert_eq!((before.count(), records.count()), (4, 3));
        assert_eq!(records.get(b"a"), Some(b"4".as_slice()));
        assert_eq!(records.rest(), before.rest());
        for bad in [
            b"12 path=a/b".as_slice(),
            b"13 path=a/b\n",
            b"11 path=a/b\n",
            b"x path=a/b\n",
            b"9 patha/b\n",
            b"0 \n",
            b"99999999999999999999999 a=b\n",
            b" 12 path=a/b\n",
        ] {
            assert!(Records::default().parse(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn times() {
        let check = |text: &str, seconds, nanoseconds| {
            let wanted = Time {
                seconds,
                nanoseconds,
            };
            assert_eq!(time(text.as_bytes()), Some(wanted), "{text}");
        };
        check("0", 0, 0);
        check("1700000000.25", 1_700_000_000, 250_000_000);
        check("1.1234567891", 1, 123_456_789);
        check("-1.5", -2, 500_000_000);
        check("-0.5", -1, 500_000_000);
        check("4102444800.", 4_102_444_800, 0);
        for bad in ["", "-", "+1", "1.x", "1e3", "99999999999999999999"] {
            assert_eq!(time(bad.as_bytes()), None, "{bad}");
        }
    }
}
