// SPDX-License-Identifier: GPL-2.0

//! A reader of erofs that shares no code with the writer. It panics if it finds what the kernel would refuse.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

/// A file, directory or other object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) mode: u16,
    pub(crate) links: u32,
    /// The content, the target of a symbolic link, or the device number as stored.
    pub(crate) what: Vec<u8>,
    /// The extended attributes, without the fingerprint.
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(crate) fingerprint: Option<Vec<u8>>,
    pub(crate) inode: u64,
    /// The first block of each chunk, or of the content if it has no chunks.
    pub(crate) blocks: Vec<u32>,
}

/// All files by their path. The path of the root directory is empty. In paths, all that is not printable ASCII is
/// escaped.
pub(crate) type Files = BTreeMap<String, Node>;

struct Erofs<'a>(&'a [u8]);

impl Erofs<'_> {
    fn u16(&self, at: u64) -> u16 {
        let at = usize::try_from(at).unwrap();
        u16::from_le_bytes(self.0[at..at + 2].try_into().unwrap())
    }

    fn u32(&self, at: u64) -> u32 {
        u32::from(self.u16(at)) | (u32::from(self.u16(at + 2)) << 16)
    }

    fn u64(&self, at: u64) -> u64 {
        u64::from(self.u32(at)) | (u64::from(self.u32(at + 4)) << 32)
    }

    fn bytes(&self, at: u64, len: u64) -> Vec<u8> {
        let (at, len) = (usize::try_from(at).unwrap(), usize::try_from(len).unwrap());
        self.0[at..at + len].to_vec()
    }

    fn node(&self, nid: u64) -> Node {
        let at = nid * 32;
        let (format, mode, size) = (self.u16(at), self.u16(at + 4), self.u64(at + 8));
        assert_eq!(format & 1, 1);
        let what = self.u32(at + 16);
        let count = u64::from(self.u16(at + 2));
        let xattrs_len = if count == 0 { 0 } else { 12 + 4 * (count - 1) };
        let tail = at + 64 + xattrs_len;
        let mut blocks = Vec::new();
        let content = match (mode & 0o170_000, format >> 1) {
            (0o020_000 | 0o060_000, _) => what.to_le_bytes().to_vec(),
            (0o010_000 | 0o140_000, _) => Vec::new(),
            (_, 4) => {
                let chunk = 4096u64 << (what & 31);
                let mut content = Vec::new();
                for nth in 0..size.div_ceil(chunk) {
                    let len = chunk.min(size - nth * chunk);
                    match self.u32(tail + nth * 4) {
                        u32::MAX => content.resize(content.len() + len as usize, 0),
                        block => {
                            blocks.push(block);
                            content.extend(self.bytes(u64::from(block) * 4096, len));
                        }
                    }
                }
                content
            }
            (_, layout @ (0 | 2)) => {
                let beside = if layout == 2 { size % 4096 } else { 0 };
                if size > beside {
                    blocks.push(what);
                }
                let start = u64::from(what) * 4096;
                if layout == 0 && mode & 0o170_000 == 0o040_000 {
                    // The kernel would take bytes after the content for a part of the last name.
                    let behind = self.bytes(start + size, size.next_multiple_of(4096) - size);
                    assert!(behind.iter().all(|&byte| byte == 0));
                }
                let mut content = self.bytes(start, size - beside);
                content.extend(self.bytes(tail, beside));
                content
            }
            other => unreachable!("{other:?}"),
        };
        let mut xattrs = BTreeMap::new();
        let mut fingerprint = None;
        let (mut entry, end) = (at + 64 + 12, tail);
        while entry < end {
            let [name_len, index] = self.u16(entry).to_le_bytes();
            let (name_len, value_len) = (u64::from(name_len), u64::from(self.u16(entry + 2)));
            if index == 0x80 {
                assert_eq!(name_len, 0);
                fingerprint = Some(self.bytes(entry + 4, value_len));
                entry += (4 + value_len).next_multiple_of(4);
                continue;
            }
            let prefix = [
                "",
                "user.",
                "system.posix_acl_access",
                "system.posix_acl_default",
                "trusted.",
                "",
                "security.",
            ][usize::from(index)];
            let name = [prefix.as_bytes(), &self.bytes(entry + 4, name_len)].concat();
            xattrs.insert(name, self.bytes(entry + 4 + name_len, value_len));
            entry += (4 + name_len + value_len).next_multiple_of(4);
        }
        Node {
            mode,
            links: self.u32(at + 44),
            what: content,
            xattrs,
            fingerprint,
            inode: nid,
            blocks,
        }
    }

    fn walk(&self, path: &str, nid: u64, parent: u64, files: &mut Files) {
        let node = self.node(nid);
        if node.mode & 0o170_000 == 0o040_000 {
            let mut subdirectories = 0;
            let mut last = Vec::new();
            for block in node.what.chunks(4096) {
                let own = Erofs(block);
                let count = u64::from(own.u16(8)) / 12;
                for nth in 0..count {
                    let start = u64::from(own.u16(nth * 12 + 8));
                    let end = match nth + 1 < count {
                        true => u64::from(own.u16(nth * 12 + 20)),
                        false => block.len() as u64,
                    };
                    let name = own.bytes(start, end - start);
                    let name = name.split(|&b| b == 0).next().unwrap().to_vec();
                    // The kernel does a binary search, so the names must be sorted.
                    assert!(name > last, "{path}: {name:?} behind {last:?}");
                    last = name.clone();
                    let child = own.u64(nth * 12);
                    let kind = own.0[nth as usize * 12 + 10];
                    match name.as_slice() {
                        b"." => assert_eq!(child, nid, "{path}"),
                        b".." => assert_eq!(child, parent, "{path}"),
                        name => {
                            let name = format!("{path}/{}", name.escape_ascii());
                            self.walk(&name, child, nid, files);
                            let wanted = match files[&name].mode >> 12 {
                                8 => 1,
                                4 => 2,
                                2 => 3,
                                6 => 4,
                                1 => 5,
                                12 => 6,
                                _ => 7,
                            };
                            assert_eq!(kind, wanted, "{name}");
                            subdirectories += u32::from(wanted == 2);
                        }
                    }
                }
            }
            assert_eq!(node.links, subdirectories + 2, "{path}");
        }
        files.insert(path.to_owned(), node);
    }
}

/// Returns the files of an erofs. Panics if anything in it is inconsistent.
pub(crate) fn read(disk: &[u8]) -> Files {
    let erofs = Erofs(disk);
    assert_eq!(erofs.u32(1024), 0xe0f5_e1e2);
    assert_eq!(u64::from(erofs.u32(1024 + 36)) * 4096, disk.len() as u64);
    let mut block = disk[1024..4096].to_vec();
    block[4..8].fill(0);
    assert_eq!(erofs.u32(1028), !crc32c::crc32c(&block), "checksum");
    let root = u64::from(erofs.u16(1024 + 14));
    let mut files = Files::new();
    erofs.walk("", root, root, &mut files);
    // Each file with content has a fingerprint. If there is one, there is a table of prefixes. There may
    // also be a table without one, because a file of a layer below had one.
    let mut prints = false;
    for (path, node) in &files {
        let wanted = node.mode & 0o170_000 == 0o100_000 && !node.what.is_empty();
        let wanted = wanted.then(|| [b"sha256:", &Sha256::digest(&node.what)[..]].concat());
        assert_eq!(node.fingerprint, wanted, "{path}");
        prints |= wanted.is_some();
    }
    // The number of prefixes, 1, and the offset of the table, 1152, in units of 4 bytes.
    let table = [1, 32, 1, 0, 0];
    let has_table = erofs.u32(1024 + 8) == 0x33;
    assert!(has_table || !prints && erofs.u32(1024 + 8) == 3);
    let said = &disk[1024 + 91..][..5];
    assert_eq!(said, if has_table { table } else { [0; 5] });
    if has_table {
        assert_eq!(&disk[1152..1157], b"\x03\0\0fp");
    }
    // The number of names of each inode.
    let mut names: BTreeMap<u64, u32> = BTreeMap::new();
    for node in files.values() {
        *names.entry(node.inode).or_default() += 1;
    }
    for (path, node) in &files {
        if node.mode & 0o170_000 != 0o040_000 {
            assert_eq!(node.links, names[&node.inode], "{path}");
        }
    }
    assert_eq!(erofs.u64(1024 + 16), names.len() as u64, "inodes");
    files
}
