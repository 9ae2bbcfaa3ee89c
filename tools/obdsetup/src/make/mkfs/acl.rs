// SPDX-License-Identifier: GPL-2.0

//! Converts POSIX ACLs from the text in tars to the bytes of the extended attribute.
//!
//! Source: acl(5), Linux `include/uapi/linux/posix_acl_xattr.h`.

use crate::input::archive::brief;

/// Version of the binary format.
const VERSION: u32 = 2;
/// The id in entries that are not for a certain user or group.
const NONE: u32 = u32::MAX;

/// Returns the bytes of an ACL such as `user::rwx,user:1000:r-x,group::r-x,mask::r-x,other::---`.
/// libarchive and star add a fourth part to entries with a name: its number. Returns `None` if an
/// entry has a name without number: the name can have another number on each machine.
pub(super) fn from_text(text: &[u8]) -> Result<Option<Vec<u8>>, String> {
    let text = std::str::from_utf8(text).map_err(|_| "not text".to_owned())?;
    let lines = text
        .split(['\n', ','])
        .map(|line| line.split('#').next().unwrap_or_default());
    let lines = lines.map(str::trim).filter(|line| !line.is_empty());
    let entries = lines.map(entry).collect::<Result<Vec<_>, _>>()?;
    let Some(mut entries) = entries.into_iter().collect::<Option<Vec<_>>>() else {
        return Ok(None);
    };
    // The kernel requires this order.
    entries.sort_unstable_by_key(|&(tag, _, id)| (tag, id));
    let mut bytes = VERSION.to_le_bytes().to_vec();
    for (tag, rights, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(rights.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    Ok(Some(bytes))
}

/// Returns the permissions as a mode if an access ACL has only entries for owner, owning group and
/// others: the kernel stores such an ACL as the mode. GNU tar writes such an ACL for a directory with
/// a default ACL.
pub(super) fn as_mode(acl: &[u8]) -> Option<u32> {
    let entries = acl.strip_prefix(&VERSION.to_le_bytes())?;
    let mut mode = None;
    for entry in entries.chunks(8) {
        let &[tag, 0, rights @ 0..=7, 0, ..] = entry else {
            return None;
        };
        let shift = match tag {
            0x01 => 6,
            0x04 => 3,
            0x20 => 0,
            _ => return None,
        };
        mode = Some(mode.unwrap_or_default() | (u32::from(rights) << shift));
    }
    mode
}

/// Returns tag, permissions and id of an entry; `None` if it names a user or group without a number.
fn entry(line: &str) -> Result<Option<(u16, u16, u32)>, String> {
    let bad = || format!("{:?} is no entry", brief(line.as_bytes()));
    let parts: Vec<&str> = line.split(':').map(str::trim).collect();
    let (kind, who, rights, number) = match *parts.as_slice() {
        [kind @ ("mask" | "m" | "other" | "o"), rights] => (kind, "", rights, None),
        [kind, who, rights] => (kind, who, rights, None),
        [kind, who, rights, number] => (kind, who, rights, Some(number)),
        _ => return Err(bad()),
    };
    let tag = match (kind, who.is_empty()) {
        ("user" | "u", true) => 0x01,
        ("user" | "u", false) => 0x02,
        ("group" | "g", true) => 0x04,
        ("group" | "g", false) => 0x08,
        ("mask" | "m", true) => 0x10,
        ("other" | "o", true) => 0x20,
        _ => return Err(bad()),
    };
    let mut bits = 0;
    for right in rights.chars() {
        bits |= match right {
            'r' => 4,
            'w' => 2,
            'x' => 1,
            '-' => 0,
            _ => return Err(bad()),
        };
    }
    let id = match (who.is_empty(), number) {
        (true, _) => NONE,
        (false, Some(number)) => number.parse().map_err(|_| bad())?,
        (false, None) if who == "root" => 0,
        (false, None) => match who.parse() {
            Ok(id) => id,
            Err(_) => return Ok(None),
        },
    };
    Ok(Some((tag, bits, id)))
}

#[cfg(test)]
mod tests {
    use super::{as_mode, from_text};

    #[test]
    fn modes() -> Result<(), String> {
        for (text, mode) in [
            ("user::rwx,group::r-x,other::--x", Some(0o751)),
            ("user::rwx,group::r-x,mask::r-x,other::r-x", None),
            ("user::rwx,user:7:r--,group::r-x,other::r-x", None),
            ("", None),
        ] {
            let acl = from_text(text.as_bytes())?.unwrap_or_default();
            assert_eq!(as_mode(&acl), mode, "{text}");
        }
        assert_eq!(as_mode(b"\x02\0\0\0\x01\0"), None);
        Ok(())
    }

    #[test]
    fn texts() {
        let wanted = Ok(Some(
            b"\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff\x02\0\x05\0\xe8\x03\0\0\
            \x04\0\x04\0\xff\xff\xff\xff\x10\0\x05\0\xff\xff\xff\xff\x20\0\0\0\xff\xff\xff\xff"
                .to_vec(),
        ));
        let text = b"user::rwx,user:1000:r-x,group::r--,mask::r-x,other::---";
        assert_eq!(from_text(text), wanted);
        let text = b"user::rwx\nother::---\ngroup::r--\nuser:joe:r-x:1000\nmask::r-x\n";
        assert_eq!(from_text(text), wanted);
        let numbers = from_text(b"user:0:r--,group:0:r-x");
        assert_eq!(from_text(b"user:root:r--,group:root:r-x"), numbers);
        assert_eq!(from_text(b"user:joe:r-x,user::rwx"), Ok(None));
        for bad in ["x::r", "user", "user::y", "mask:1:r"] {
            assert!(from_text(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
