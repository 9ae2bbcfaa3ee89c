// SPDX-License-Identifier: GPL-2.0

//! Reads a tar as a tree, as it would be if GNU tar had unpacked it as root: later members replace
//! earlier ones, and relative symbolic links to directories are followed. What the tar doesn't say is
//! owned by root with mode 0755.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use overlaybd::format::num::{to_u64, to_usize};

use super::acl;
use super::limits;
use super::records::{self, Meaning};
use super::stamp::source_date_epoch;
use super::tree::{
    show, Content, ContentMaker, Device, Id, Kind, Meta, Node, Source, Time, Tree, Unread, BLOCK,
    ROOT,
};
use crate::archive::{self, Archive, Member, MemberKind};
use crate::exit::{self, Failure};
use crate::layers::warn;

/// The extended attribute that is the access ACL of a file.
const ACL: &[u8] = b"system.posix_acl_access";
/// Symbolic links that are followed for one name.
const LINKS: u32 = 40;
/// Keys of unknown records of which it is told.
const UNKNOWN: usize = 20;

/// Reads the tar at `path`. Content goes to a temporary file in `place`, without the holes.
pub(super) fn read(path: &Path, place: &Path) -> Result<Tree> {
    let spool = tempfile::tempfile_in(place);
    let spool = spool.with_context(|| format!("{}: cannot make a file", place.display()))?;
    let spool = Arc::new(spool);
    let mut reader = Reader {
        path,
        tree: Tree::new(unsaid()),
        unsaid: HashSet::from([ROOT]),
        spool: BufWriter::with_capacity(1 << 20, Arc::clone(&spool)),
        file: spool,
        end: 0,
        unknown: BTreeMap::new(),
    };
    let mut archive = Archive::again(path)?;
    let mut newest = None;
    while let Some(member) = archive.next()? {
        newest = newest.max(Some(time(&member)));
        reader.member(&member, &mut archive)?;
    }
    reader.spool.flush().context(SPOOL)?;
    reader.tell_of_unknown();
    let mtime = match source_date_epoch()? {
        Some(seconds) => Time {
            seconds,
            nanoseconds: 0,
        },
        None => newest.unwrap_or_default(),
    };
    for id in reader.unsaid {
        reader.tree.node_mut(id)?.meta.mtime = mtime;
    }
    Ok(reader.tree)
}

const SPOOL: &str = "cannot write a temporary file with the content of the tar";

/// What a directory has of which the tar says nothing; the time is set at the end.
fn unsaid() -> Meta {
    Meta {
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime: Time::default(),
        xattrs: BTreeMap::new(),
        unread: Vec::new(),
    }
}

fn time(member: &Member) -> Time {
    Time {
        seconds: member.mtime.seconds,
        nanoseconds: member.mtime.nanoseconds,
    }
}

struct Reader<'a> {
    path: &'a Path,
    tree: Tree,
    /// Directories of which the tar said nothing yet.
    unsaid: HashSet<Id>,
    spool: BufWriter<Arc<File>>,
    file: Arc<File>,
    /// Bytes in the spool.
    end: u64,
    /// Keys of pax records that say what obdsetup doesn't know, and the first members that have them.
    unknown: BTreeMap<String, String>,
}

impl Reader<'_> {
    fn bad(&self, member: &Member, what: &str) -> anyhow::Error {
        let text = format!(
            "{}: member {} at byte {}: {what}",
            self.path.display(),
            show(&member.path),
            member.at
        );
        Failure::error(exit::BAD_IMAGE, text)
    }

    fn member(&mut self, member: &Member, archive: &mut Archive) -> Result<()> {
        let possible = |result: Result<(), String>| result.map_err(|what| self.bad(member, &what));
        possible(limits::path(&member.path))?;
        if let MemberKind::HardLink(target) = &member.kind {
            possible(limits::path(target))?;
        }
        let meta = self.meta(member)?;
        limits::xattrs(&meta).map_err(|what| self.bad(member, &what))?;
        let (parent, name) = match member.path.iter().rposition(|&byte| byte == b'/') {
            _ if member.path.is_empty() => return self.root(member, meta),
            Some(slash) => {
                let (parent, name) = member.path.split_at(slash);
                let name = name.get(1..).unwrap_or_default();
                (self.directory(parent, name, member)?, name)
            }
            None => (ROOT, member.path.as_slice()),
        };
        let name = name.to_vec();
        let there = self.child(parent, &name);
        let device = |device: archive::Device| Device {
            major: device.major,
            minor: device.minor,
        };
        let kind = match &member.kind {
            MemberKind::HardLink(target) => {
                let id = self.linked(target, member)?;
                if there != Some(id) {
                    self.clear(there, member)?;
                }
                return self.tree.link(parent, name, id);
            }
            MemberKind::Directory => {
                let old = match there {
                    Some(id) => Some((id, self.tree.node_mut(id)?)),
                    None => None,
                };
                if let Some((
                    id,
                    Node {
                        meta: old,
                        kind: Kind::Directory(_),
                    },
                )) = old
                {
                    *old = meta;
                    self.unsaid.remove(&id);
                    return Ok(());
                }
                Kind::Directory(BTreeMap::new())
            }
            MemberKind::File => Kind::File(self.content(member, archive)?),
            MemberKind::Symlink(target) => Kind::Symlink(target.clone()),
            MemberKind::CharDevice(number) => Kind::CharDevice(device(*number)),
            MemberKind::BlockDevice(number) => Kind::BlockDevice(device(*number)),
            MemberKind::Fifo => Kind::Fifo,
        };
        self.clear(there, member)?;
        let node = Node { meta, kind };
        limits::node(&node).map_err(|what| self.bad(member, &what))?;
        let id = self.tree.add(node);
        self.tree.link(parent, name, id)
    }

    fn root(&mut self, member: &Member, meta: Meta) -> Result<()> {
        if member.kind != MemberKind::Directory {
            return Err(self.bad(member, "the root of the tree is no directory"));
        }
        self.tree.node_mut(ROOT)?.meta = meta;
        self.unsaid.remove(&ROOT);
        Ok(())
    }

    /// Checks that what has a name may lose it.
    fn clear(&self, there: Option<Id>, member: &Member) -> Result<()> {
        let used = there.is_some_and(|id| self.tree.children(id).next().is_some());
        match used {
            true => Err(self.bad(member, "replaces a directory that is not empty")),
            false => Ok(()),
        }
    }

    fn child(&self, parent: Id, name: &[u8]) -> Option<Id> {
        self.tree.child(parent, name)
    }

    /// What a hard link leads to.
    fn linked(&mut self, target: &[u8], member: &Member) -> Result<Id> {
        let (parent, name) = match target.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => {
                let (parent, name) = target.split_at(slash);
                let name = name.get(1..).unwrap_or_default();
                (self.directory(parent, name, member)?, name)
            }
            None => (ROOT, target),
        };
        let found = self.child(parent, name);
        let node = found.map(|id| self.tree.node(id)).transpose()?;
        match (found, node.map(|node| &node.kind)) {
            (Some(id), Some(kind)) if !matches!(kind, Kind::Directory(_)) => Ok(id),
            _ => Err(self.bad(
                member,
                &format!(
                    "a hard link to {}, which is no file before it",
                    show(target)
                ),
            )),
        }
    }

    /// The directory `path`, made where it is missing, for what is called `last` there.
    fn directory(&mut self, path: &[u8], last: &[u8], member: &Member) -> Result<Id> {
        let mut left: VecDeque<Vec<u8>> = parts(path);
        let mut at = ROOT;
        let mut followed = 0;
        // Bytes of the path to `at`, with links followed.
        let mut len = 0;
        while let Some(name) = left.pop_front() {
            let deeper = len + name.len() + 1;
            if deeper + last.len() > limits::PATH {
                let what = format!(
                    "with links followed, a path of more than {} bytes",
                    limits::PATH
                );
                return Err(self.bad(member, &what));
            }
            let Some(id) = self.child(at, &name) else {
                let id = self.tree.add(Node {
                    meta: unsaid(),
                    kind: Kind::Directory(BTreeMap::new()),
                });
                self.tree.link(at, name, id)?;
                self.unsaid.insert(id);
                (at, len) = (id, deeper);
                continue;
            };
            match &self.tree.node(id)?.kind {
                Kind::Directory(_) => (at, len) = (id, deeper),
                Kind::Symlink(target) => {
                    followed += 1;
                    let target_parts = parts(target);
                    let outside =
                        target.starts_with(b"/") || target_parts.iter().any(|part| part == b"..");
                    if outside || followed > LINKS {
                        let what = format!(
                            "goes through the symbolic link {}, which leads to {}",
                            show(&name),
                            archive::brief(target)
                        );
                        return Err(self.bad(member, &what));
                    }
                    for part in target_parts.into_iter().rev() {
                        left.push_front(part);
                    }
                }
                _ => {
                    let what = format!("is below {}, which is no directory", show(&name));
                    return Err(self.bad(member, &what));
                }
            }
        }
        Ok(at)
    }

    /// Warns of records that say what obdsetup doesn't know.
    fn tell_of_unknown(&self) {
        let path = self.path.display();
        for (key, member) in &self.unknown {
            warn(&[format!(
                "{path}: the pax records {key:?} are ignored: obdsetup doesn't know what they mean; \
                 the first one is that of {member}"
            )]);
        }
    }

    fn meta(&mut self, member: &Member) -> Result<Meta> {
        let mut xattrs = BTreeMap::new();
        let mut unread = Vec::new();
        for (key, value) in &member.records {
            let (name, value): (&[u8], _) = match key.as_slice() {
                b"SCHILY.acl.access" | b"SCHILY.acl.default" => {
                    let name = match key.ends_with(b"access") {
                        true => ACL,
                        false => b"system.posix_acl_default",
                    };
                    let acl = acl::from_text(value)
                        .map_err(|what| self.bad(member, &format!("POSIX ACL: {what}")))?;
                    let Some(acl) = acl else {
                        unread.push(Unread::AclNames);
                        continue;
                    };
                    (name, acl)
                }
                b"RHT.security.selinux" => {
                    (b"security.selinux", [value.as_slice(), b"\0"].concat())
                }
                b"SCHILY.acl.ace" => {
                    unread.push(Unread::NfsAcl);
                    continue;
                }
                key => {
                    match records::meaning(key, value) {
                        Meaning::Nothing => {}
                        Meaning::Xattr(name, value) => {
                            xattrs.insert(name, value);
                        }
                        Meaning::Bad => {
                            let what = format!("the value of {} is wrong", archive::brief(key));
                            return Err(self.bad(member, &what));
                        }
                        Meaning::Unknown if self.unknown.len() < UNKNOWN => {
                            let key = archive::brief(key);
                            let first = || show(&member.path);
                            self.unknown.entry(key).or_insert_with(first);
                        }
                        Meaning::Unknown => {}
                    }
                    continue;
                }
            };
            xattrs.insert(name.to_vec(), value);
        }
        xattrs.extend(member.xattrs.iter().cloned());
        let permissions = xattrs.get(ACL).and_then(|list| acl::as_mode(list));
        let mode = match (&member.kind, permissions) {
            // Nobody looks at it, and some writers have another one.
            (MemberKind::Symlink(_), _) => 0o777,
            (_, Some(permissions)) => (member.mode & !0o777) | permissions,
            (_, None) => member.mode,
        };
        if permissions.is_some() {
            xattrs.remove(ACL);
        }
        Ok(Meta {
            mode,
            uid: member.uid,
            gid: member.gid,
            mtime: time(member),
            xattrs,
            unread,
        })
    }

    /// Copies the content of a file to the spool.
    fn content(&mut self, member: &Member, archive: &mut Archive) -> Result<Content> {
        let mut maker = ContentMaker::new();
        let mut block = Vec::with_capacity(to_usize(BLOCK));
        let mut start = 0;
        let size = member.size;
        let mut finish = |block: &mut Vec<u8>, start: u64| -> Result<()> {
            // A hole may follow, up to the end of the block or file.
            let len = (size - start).min(BLOCK);
            block.resize(to_usize(len), 0);
            if maker.block(start, block, self.end) {
                self.spool.write_all(block).context(SPOOL)?;
                self.end += len;
            }
            block.clear();
            Ok(())
        };
        archive.content(member, |mut offset, mut piece| {
            while !piece.is_empty() {
                let own = offset - offset % BLOCK;
                if own != start {
                    if !block.is_empty() {
                        finish(&mut block, start)?;
                    }
                    start = own;
                }
                let inside = to_usize(offset - own);
                block.resize(inside, 0);
                let room = to_usize(BLOCK) - inside;
                let (now, rest) = piece.split_at(piece.len().min(room));
                block.extend_from_slice(now);
                offset += to_u64(now.len());
                piece = rest;
            }
            Ok(())
        })?;
        if !block.is_empty() {
            finish(&mut block, start)?;
        }
        Ok(maker.finish(size, Source::Shared(Arc::clone(&self.file))))
    }
}

/// The parts of a path.
fn parts(path: &[u8]) -> VecDeque<Vec<u8>> {
    let parts = path.split(|&byte| byte == b'/');
    let parts = parts.filter(|part| !part.is_empty() && *part != b".");
    parts.map(<[u8]>::to_vec).collect()
}
