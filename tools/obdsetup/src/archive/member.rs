// SPDX-License-Identifier: GPL-2.0

//! What a tar says about one of its members.

/// Bytes of a name that messages show.
const LONG: usize = 500;

/// A point in time: seconds since 1970, which may be negative, and nanoseconds after that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Time {
    pub(crate) seconds: i64,
    pub(crate) nanoseconds: u32,
}

/// Number of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

/// What a member is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MemberKind {
    File,
    /// Another name of a member before it. The name is as in [`Member::path`].
    HardLink(Vec<u8>),
    /// What the link says, unchanged.
    Symlink(Vec<u8>),
    CharDevice(Device),
    BlockDevice(Device),
    Directory,
    Fifo,
}

/// A part of a file that has data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// A file, directory or other thing in a tar, with all that the tar says about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    /// The byte of the tar, decompressed, where its first header begins.
    pub(crate) at: u64,
    /// The name without `/` at either end and without `.` and empty parts; never with `..`. Empty
    /// for the root directory.
    pub(crate) path: Vec<u8>,
    pub(crate) kind: MemberKind,
    /// Permissions, setuid, setgid and sticky: 07777 at most.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Time,
    /// Bytes of content of a file, holes included; 0 for all else.
    pub(crate) size: u64,
    /// The parts of a file that are stored, ascending; the rest is holes.
    pub(crate) extents: Vec<Extent>,
    /// Names and values of extended attributes, in the order of the tar.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Keys and values of all other pax records, those of global headers included: ACLs as text
    /// (`SCHILY.acl.access`), SELinux labels (`RHT.security.selinux`), comments...
    pub(crate) records: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Member {
    /// The last part of the name.
    pub(crate) fn file_name(&self) -> &[u8] {
        let slash = self.path.iter().rposition(|&byte| byte == b'/');
        let start = slash.map_or(0, |slash| slash + 1);
        self.path.get(start..).unwrap_or_default()
    }

    /// Whether it lies in the root directory.
    pub(crate) fn is_top_level(&self) -> bool {
        !self.path.is_empty() && !self.path.contains(&b'/')
    }
}

/// A name for messages: of a very long one, its beginning and how long it is.
pub(crate) fn brief(name: &[u8]) -> String {
    match name.get(..LONG) {
        Some(start) if name.len() > LONG => {
            let start = String::from_utf8_lossy(start);
            format!("{start}... ({} bytes)", name.len())
        }
        _ => String::from_utf8_lossy(name).into_owned(),
    }
}

/// The parts of a name that count: `..` is refused with `None`.
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
