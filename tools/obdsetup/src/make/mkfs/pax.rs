// SPDX-License-Identifier: GPL-2.0

//! Writes a tree as a tar in the pax format, as input for mkfs programs. Names, numbers and times are in
//! extended headers, whose values can have any length; modes and device numbers are in the ordinary headers.
//!
//! Source: POSIX.1-2017 `pax`.

use std::collections::BTreeMap;
use std::io::{Seek, SeekFrom, Write};

use anyhow::{bail, Context, Result};
use overlaybd::format::num::to_u64;

use super::tree::{Content, Id, Kind, Name, Node, Tree, ROOT};

/// Size of a block of a tar in bytes.
const BLOCK: u64 = 512;

/// The program that reads the tar.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reader {
    MkfsErofs,
    /// mksquashfs gets the root directory's metadata on its command line.
    Mksquashfs,
}

/// Writes `tree` to `out`: the root directory first if `reader` needs it, then all names in order. `out` must
/// be an empty file: zeros become holes.
pub(super) fn write(tree: &Tree, reader: Reader, mut out: impl Write + Seek) -> Result<()> {
    let mut tar = Pax {
        out: &mut out,
        at: 0,
    };
    if reader == Reader::MkfsErofs {
        tar.member(b"./", tree.node(ROOT)?)?;
    }
    let names = tree.names();
    let mut firsts: BTreeMap<Id, &Name> = BTreeMap::new();
    for name in names.iter() {
        let node = tree.node(name.id)?;
        let path = names.path(name);
        match firsts.get(&name.id) {
            Some(first) => {
                let first = record("linkpath", &names.path(first));
                tar.header(&path, node, b'1', 0, &[first])?;
            }
            None => {
                tar.named(&path, node)?;
                firsts.insert(name.id, name);
            }
        }
    }
    tar.write(&[0; 1024])?;
    out.flush().context(WRITE)
}

const WRITE: &str = "cannot write the tar for mkfs";

struct Pax<W> {
    out: W,
    /// Number of bytes written.
    at: u64,
}

impl<W: Write + Seek> Pax<W> {
    fn named(&mut self, path: &[u8], node: &Node) -> Result<()> {
        match node.kind {
            Kind::Directory(_) => self.member(&[path, b"/"].concat(), node),
            _ => self.member(path, node),
        }
    }

    fn member(&mut self, path: &[u8], node: &Node) -> Result<()> {
        match &node.kind {
            Kind::Directory(_) => self.header(path, node, b'5', 0, &[]),
            Kind::Symlink(target) => {
                self.header(path, node, b'2', 0, &[record("linkpath", target)])
            }
            Kind::CharDevice(_) => self.header(path, node, b'3', 0, &[]),
            Kind::BlockDevice(_) => self.header(path, node, b'4', 0, &[]),
            Kind::Fifo => self.header(path, node, b'6', 0, &[]),
            Kind::File(content) => self.file(path, node, content),
            Kind::Socket => bail!("a tar cannot hold sockets"),
        }
    }

    /// Writes a file with its content. Never as a sparse member: mkfs.erofs doesn't support those, and
    /// mksquashfs 4.6.1 rejects a tar with GNU's sparse format 1.0 as corrupt. The tar file itself has holes
    /// instead.
    fn file(&mut self, path: &[u8], node: &Node, content: &Content) -> Result<()> {
        self.header(path, node, b'0', content.size, &[])?;
        let mut at = 0;
        content.read(|offset, data| {
            self.zeros(offset - at)?;
            at = offset + to_u64(data.len());
            self.write(data)
        })?;
        self.zeros(content.size - at)?;
        self.pad()
    }

    /// Writes the headers of a member with `size` bytes of content, and the records `more`. `kind` is the
    /// type flag of the tar header.
    fn header(
        &mut self,
        path: &[u8],
        node: &Node,
        kind: u8,
        size: u64,
        more: &[Vec<u8>],
    ) -> Result<()> {
        let meta = &node.meta;
        let mut records = vec![
            record("path", path),
            record("uid", meta.uid.to_string().as_bytes()),
            record("gid", meta.gid.to_string().as_bytes()),
            record("mtime", mtime(node).as_bytes()),
            record("size", size.to_string().as_bytes()),
        ];
        records.extend_from_slice(more);
        if kind != b'1' {
            for (name, value) in &meta.xattrs {
                let key = [b"SCHILY.xattr.", name.as_slice()].concat();
                records.push(record_of(&key, value));
            }
        }
        let records = records.concat();
        self.block(b'x', 0o644, to_u64(records.len()), None)?;
        self.write(&records)?;
        self.pad()?;
        let device = node.device().filter(|_| kind != b'1');
        let device = device.map(|device| (device.major, device.minor));
        self.block(kind, meta.mode, size, device)
    }

    /// Writes a header block, without name, owner and time, which are in the extended header before it.
    fn block(&mut self, kind: u8, mode: u32, size: u64, device: Option<(u32, u32)>) -> Result<()> {
        let size = size.min(0o777_7777_7777);
        let (major, minor) = device.unwrap_or_default();
        let header = |checksum: &str| {
            let kind = char::from(kind);
            // name, mode, uid, gid, size, mtime, checksum, type, link, magic and version, user,
            // group, major, minor, prefix
            format!(
                "{:\0<100}{mode:07o}\0{z:07}\0{z:07}\0{size:011o}\0{z:011}\0{checksum}{kind}{:\0<100}\
                 ustar\000{:\0<32}{:\0<32}{major:07o}\0{minor:07o}\0{:\0<167}",
                "pax",
                "",
                "",
                "",
                "",
                z = 0
            )
        };
        let sum: u64 = header("        ").bytes().map(u64::from).sum();
        self.write(header(&format!("{sum:06o}\0 ")).as_bytes())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.at += to_u64(bytes.len());
        self.out.write_all(bytes).context(WRITE)
    }

    /// Leaves a hole of `len` bytes.
    fn zeros(&mut self, len: u64) -> Result<()> {
        self.at += len;
        let len = i64::try_from(len).context(WRITE)?;
        self.out.seek(SeekFrom::Current(len)).context(WRITE)?;
        Ok(())
    }

    /// Pads the tar to a whole block.
    fn pad(&mut self) -> Result<()> {
        self.zeros(self.at.next_multiple_of(BLOCK) - self.at)
    }
}

/// Returns the time as seconds, a point and nine digits, because mkfs.erofs reads the digits as a number of
/// nanoseconds. It adds them to the seconds also before 1970: half a second before 1970 is `-1.500000000`.
fn mtime(node: &Node) -> String {
    let time = node.meta.mtime;
    format!("{}.{:09}", time.seconds, time.nanoseconds)
}

fn record(key: &str, value: &[u8]) -> Vec<u8> {
    record_of(key.as_bytes(), value)
}

/// Returns a record: its own length in decimal, a blank, key, `=`, value, and a newline.
fn record_of(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    let mut record = format!("{len} ").into_bytes();
    record.extend_from_slice(key);
    record.push(b'=');
    record.extend_from_slice(value);
    record.push(b'\n');
    record
}

#[cfg(test)]
mod tests {
    use super::{record, Pax};

    #[test]
    fn headers() -> anyhow::Result<()> {
        let mut out = std::io::Cursor::new(Vec::new());
        let mut pax = Pax {
            out: &mut out,
            at: 0,
        };
        pax.block(b'3', 0o4755, 5 << 40, Some((4095, 1_048_575)))?;
        let out = out.into_inner();
        assert_eq!(out.len(), 512);
        assert_eq!(&out[257..265], b"ustar\x0000");
        assert_eq!(&out[329..345], b"0007777\x003777777\0");
        assert_eq!(&out[124..136], b"77777777777\0");
        Ok(())
    }

    #[test]
    fn lengths() {
        assert_eq!(record("a", b"b"), b"6 a=b\n");
        assert_eq!(record("abc", b"de"), b"9 abc=de\n");
        assert_eq!(record("path", &[b'x'; 89]).len(), 98);
        assert!(record("path", &[b'x'; 89]).starts_with(b"98 path="));
        assert!(record("path", &[b'x'; 91]).starts_with(b"101 path="));
        assert_eq!(record("path", &[b'x'; 91]).len(), 101);
    }
}
