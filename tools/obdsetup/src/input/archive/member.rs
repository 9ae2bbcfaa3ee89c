// SPDX-License-Identifier: GPL-2.0

//! A member of a tar.

/// Longest part of a name in messages, in bytes.
const LONG: usize = 500;

/// A point in time: seconds since 1970, which may be negative, and nanoseconds after that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Time {
    pub(crate) seconds: i64,
    pub(crate) nanoseconds: u32,
}

/// A device number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

/// The kind of a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MemberKind {
    File,
    /// The path of the earlier member of which this is another name, in the form of [`Member::path`].
    HardLink(Vec<u8>),
    /// The target, unchanged.
    Symlink(Vec<u8>),
    CharDevice(Device),
    BlockDevice(Device),
    Directory,
    Fifo,
}

/// A range of a file that has data, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// A file, directory or other object in a tar, with all its metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    /// Offset of its first header in the decompressed tar.
    pub(crate) at: u64,
    /// The name without `/` at either end, and without `.` and empty parts. It never has `..`.
    /// Empty for the root directory.
    pub(crate) path: Vec<u8>,
    pub(crate) kind: MemberKind,
    /// Permissions, setuid, setgid and sticky: 07777 at most.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Time,
    /// Size of a file in bytes, holes included; 0 for other kinds.
    pub(crate) size: u64,
    /// The ranges of a file that have data, ascending; the rest are holes.
    pub(crate) extents: Vec<Extent>,
    /// Names and values of extended attributes, in the order of the tar.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Keys and values of all other pax records, those of global headers included: ACLs as text
    /// (`SCHILY.acl.access`), SELinux labels (`RHT.security.selinux`), comments...
    pub(crate) records: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Member {
    /// Returns the last part of the name.
    pub(crate) fn file_name(&self) -> &[u8] {
        let slash = self.path.iter().rposition(|&byte| byte == b'/');
        let start = slash.map_or(0, |slash| slash + 1);
        self.path.get(start..).unwrap_or_default()
    }
}

/// Returns a name for messages. A name of more than [`LONG`] bytes is cut off, and its length is added.
pub(crate) fn brief(name: &[u8]) -> String {
    match name.get(..LONG) {
        Some(start) if name.len() > LONG => {
            let start = String::from_utf8_lossy(start);
            format!("{start}... ({} bytes)", name.len())
        }
        _ => String::from_utf8_lossy(name).into_owned(),
    }
}

/// Removes `.` and empty parts from a name. Returns `None` if the name has a part `..`.
pub(super) fn normal(name: &[u8]) -> Option<Vec<u8>> {
    let mut path = Vec::with_capacity(name.len());
    for part in name.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return None,
            part => {
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(part);
            }
        }
    }
    Some(path)
}
