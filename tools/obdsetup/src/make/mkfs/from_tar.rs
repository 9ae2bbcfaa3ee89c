// SPDX-License-Identifier: GPL-2.0

//! Reads a tar as a tree, with the result that GNU tar run by root would have: later members
//! replace earlier ones, and relative symbolic links to directories are followed. Directories that
//! the tar doesn't have are owned by root and have mode 0755.
//!
//! [`apply`] puts a layer of an image over the tree of the layers below.

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
    show, Content, ContentMaker, Device, Id, Kind, Meta, Node, Source, Time, Tree, Unread, ROOT,
};
use super::whiteouts::{Own, Special};
use super::witness::BLOCK;
use crate::input::archive::{self, Archive, Member, MemberKind};
use crate::terminal::exit::{self, Failure};
use crate::terminal::warn;

/// Name of the extended attribute with the access ACL of a file.
const ACL: &[u8] = b"system.posix_acl_access";
/// The name of the only member of a tar with an OverlayBD layer.
const PACKED: &[u8] = b"overlaybd.commit";
/// Largest number of bytes in the names and values of the extended attributes of all members. A global header
/// gives the same attributes to each member, without taking more bytes of the tar.
const XATTRS: usize = 256 << 20;
/// Largest number of symbolic links that are followed for one path.
const LINKS: u32 = 40;
/// Largest number of unknown record keys that are reported.
const UNKNOWN: usize = 20;

/// Reads the tar at `path`. The content of files that the tar does not have as they are goes to one temporary file in
/// `place`, without holes.
pub(super) fn read(path: &Path, place: &Path) -> Result<Tree> {
    let mut tree = empty();
    let unsaid = HashSet::from([ROOT]);
    let reader = Reader::new(path, &mut tree, unsaid, place)?;
    reader.all(&mut Archive::again(path)?)?;
    Ok(tree)
}

/// Puts a layer of an image over `tree`, following the OCI image specification:
///
/// - Whiteouts, in any place of the tar, hide names of the layers below, and never names of the
///   layer itself.
/// - A member that is no directory replaces whatever has its name.
/// - Paths follow symbolic links as if the tree were the root directory: nothing leads out of it.
///
/// `is_new` is whether there is no layer below, so that no layer has set the root directory's
/// metadata. Messages call the tar `name`. Temporary files are in `place`, as with [`read`].
pub(super) fn apply(
    archive: &mut Archive,
    name: &Path,
    tree: &mut Tree,
    is_new: bool,
    place: &Path,
) -> Result<()> {
    let unsaid = is_new.then_some(ROOT).into_iter().collect();
    let mut reader = Reader::new(name, tree, unsaid, place)?;
    reader.layer = Some(Layer::default());
    reader.all(archive)
}

/// Returns a tree with only a root directory that has default metadata.
pub(super) fn empty() -> Tree {
    Tree::new(unsaid())
}

const SPOOL: &str = "cannot write a temporary file with the content of the tar";

/// Returns the metadata of a directory that the tar doesn't have. [`Reader::all`] sets the time at the end.
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

/// What is recorded about a layer while it is read.
#[derive(Default)]
struct Layer {
    /// The names that the layer has set and hidden.
    own: Own,
    /// Number of extended attributes of overlayfs that were left out, and the first file with one.
    overlay: Option<(u64, String)>,
}

/// Prefixes of extended attributes that overlayfs uses internally: files of a lower directory of overlayfs
/// must not have them.
const OVERLAY: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];

struct Reader<'a> {
    /// The tar in messages.
    path: &'a Path,
    name: Arc<Path>,
    tree: &'a mut Tree,
    /// Directories that still have the metadata of [`unsaid`]: this tar has made or reset them, or it is the first
    /// one and has the root directory, and no member of the tar has set their metadata yet.
    unsaid: HashSet<Id>,
    /// The temporary file with the content of files, for writing.
    spool: BufWriter<Arc<File>>,
    /// The same file, for the tree.
    file: Arc<File>,
    /// Length of the spool in bytes.
    end: u64,
    /// Keys of pax records that obdsetup doesn't know, and the first members with them.
    unknown: BTreeMap<String, String>,
    /// Number of bytes in the extended attributes of all members so far.
    xattrs: usize,
    /// `Some` if the tar is a layer of an image.
    layer: Option<Layer>,
}

impl<'a> Reader<'a> {
    fn new(path: &'a Path, tree: &'a mut Tree, unsaid: HashSet<Id>, place: &Path) -> Result<Self> {
        let spool = tempfile::tempfile_in(place);
        let spool = spool.with_context(|| format!("{}: cannot make a file", place.display()))?;
        let spool = Arc::new(spool);
        Ok(Self {
            path,
            name: Arc::from(path),
            tree,
            unsaid,
            spool: BufWriter::with_capacity(1 << 20, Arc::clone(&spool)),
            file: spool,
            end: 0,
            unknown: BTreeMap::new(),
            xattrs: 0,
            layer: None,
        })
    }

    /// Reads all members, and sets the times of directories that the tar doesn't have.
    fn all(mut self, archive: &mut Archive) -> Result<()> {
        let mut newest = None;
        while let Some(member) = archive.next()? {
            newest = newest.max(Some(time(&member)));
            self.member(&member, archive)?;
        }
        self.spool.flush().context(SPOOL)?;
        self.tell();
        let mtime = match source_date_epoch()? {
            Some(seconds) => Time {
                seconds,
                nanoseconds: 0,
            },
            None => newest.unwrap_or_default(),
        };
        for id in self.unsaid {
            self.tree.node_mut(id)?.meta.mtime = mtime;
        }
        Ok(())
    }
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
        if self.layer.is_some() {
            match Special::of(&member.path) {
                Ok(None) => {}
                Ok(Some(special)) => {
                    // Checks the hidden path, not that of the whiteout, whose name may be longer than Linux
                    // allows.
                    possible(limits::path(&special.path()))?;
                    return self.special(&special, member);
                }
                Err(what) => return Err(self.bad(member, what)),
            }
            if member.path == PACKED {
                let what = match archive.compression() {
                    Some(_) => {
                        "an OverlayBD layer, which was compressed: copy the image again, with \
                         `skopeo copy --preserve-digests'"
                    }
                    None => {
                        "an OverlayBD layer, no tar of files: use it unchanged, and only over other \
                         OverlayBD layers"
                    }
                };
                return Err(self.bad(member, what));
            }
        }
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
        if let Some(layer) = &mut self.layer {
            layer.own.add(parent, &name);
        }
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

    /// Checks that a member may replace the node `there`, if any.
    fn clear(&self, there: Option<Id>, member: &Member) -> Result<()> {
        // A layer of an image may replace a directory that is not empty.
        if self.layer.is_some() {
            return Ok(());
        }
        let used = there.is_some_and(|id| self.tree.children(id).next().is_some());
        match used {
            true => Err(self.bad(member, "replaces a directory that is not empty")),
            false => Ok(()),
        }
    }

    fn child(&self, parent: Id, name: &[u8]) -> Option<Id> {
        self.tree.child(parent, name)
    }

    /// Returns the node to which a hard link leads. An error if it is a directory, or doesn't exist yet.
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
                    "a hard link to {}, but no file before it has this name",
                    show(target)
                ),
            )),
        }
    }

    /// Returns the directory `path` for a member whose name in it is `last`. Creates missing directories.
    fn directory(&mut self, path: &[u8], last: &[u8], member: &Member) -> Result<Id> {
        let walked = self.walk(path, last, member, true)?;
        walked.context("a directory was not made")
    }

    /// Returns the directory `path`, following symbolic links. If a part is missing, creates it or, without
    /// `make`, returns `None`. `last` is the name of the member in the directory: it counts for the limit of
    /// the path's length.
    fn walk(
        &mut self,
        path: &[u8],
        last: &[u8],
        member: &Member,
        make: bool,
    ) -> Result<Option<Id>> {
        let mut left: VecDeque<Vec<u8>> = parts(path);
        // The directories from the root, each with the length of its path in bytes, with links
        // followed.
        let mut way = vec![(ROOT, 0)];
        let mut followed = 0;
        while let Some(name) = left.pop_front() {
            let &(at, len) = way.last().unwrap_or(&(ROOT, 0));
            if name == b".." {
                // Only targets of links have `..`, and such links are followed only in layers. The root
                // directory is its own parent.
                if way.len() > 1 {
                    way.pop();
                }
                continue;
            }
            let deeper = len + name.len() + 1;
            if deeper + last.len() > limits::PATH {
                let what = format!(
                    "with links followed, a path of more than {} bytes",
                    limits::PATH
                );
                return Err(self.bad(member, &what));
            }
            let Some(id) = self.child(at, &name) else {
                if !make {
                    return Ok(None);
                }
                let id = self.tree.add(Node {
                    meta: unsaid(),
                    kind: Kind::Directory(BTreeMap::new()),
                });
                if let Some(layer) = &mut self.layer {
                    layer.own.add(at, &name);
                }
                self.tree.link(at, name, id)?;
                self.unsaid.insert(id);
                way.push((id, deeper));
                continue;
            };
            match &self.tree.node(id)?.kind {
                Kind::Directory(_) => way.push((id, deeper)),
                Kind::Symlink(target) => {
                    followed += 1;
                    let target_parts = parts(target);
                    let is_absolute = target.starts_with(b"/");
                    let outside = self.layer.is_none()
                        && (is_absolute || target_parts.iter().any(|part| part == b".."));
                    if outside {
                        let what = format!(
                            "goes through the symbolic link {}, whose target {} is absolute or has \
                             \"..\"",
                            show(&name),
                            archive::brief(target)
                        );
                        return Err(self.bad(member, &what));
                    }
                    if followed > LINKS {
                        let what = format!(
                            "goes through more than {LINKS} symbolic links; the last one is {}, with the \
                             target {}",
                            show(&name),
                            archive::brief(target)
                        );
                        return Err(self.bad(member, &what));
                    }
                    if is_absolute {
                        way.truncate(1);
                    }
                    for part in target_parts.into_iter().rev() {
                        left.push_front(part);
                    }
                }
                // A whiteout below something that is no directory hides nothing.
                _ if !make => return Ok(None),
                _ => {
                    let what = format!("is below {}, which is no directory", show(&name));
                    return Err(self.bad(member, &what));
                }
            }
        }
        Ok(way.last().map(|&(id, _)| id))
    }

    /// Hides the names that the whiteout `special` hides.
    fn special(&mut self, special: &Special<'_>, member: &Member) -> Result<()> {
        let (directory, name) = match *special {
            Special::Nothing => return Ok(()),
            Special::Whiteout(directory, name) => (directory, Some(name)),
            Special::Opaque(directory) => (directory, None),
        };
        let found = self.walk(directory, name.unwrap_or_default(), member, false)?;
        let (Some(directory), Some(layer)) = (found, &mut self.layer) else {
            return Ok(());
        };
        let reset = match name {
            Some(name) => layer.own.hide(self.tree, directory, name)?,
            None => layer.own.hide_all(self.tree, directory)?,
        };
        // The layer has members in these directories, but not the directories themselves, whose old metadata is
        // hidden.
        for id in reset {
            self.tree.node_mut(id)?.meta = unsaid();
            self.unsaid.insert(id);
        }
        Ok(())
    }

    /// Warns about what was left out.
    fn tell(&self) {
        let path = self.path.display();
        for (key, member) in &self.unknown {
            warn(&[format!(
                "{path}: the pax records {key:?} are ignored: obdsetup doesn't know what they mean; \
                 the first one is that of {member}"
            )]);
        }
        if let Some((count, first)) = self.layer.as_ref().and_then(|layer| layer.overlay.as_ref()) {
            warn(&[format!(
                "{path}: extended attributes of overlayfs are left out: {count}; the first one is \
                 that of {first}"
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
        if let Some(layer) = &mut self.layer {
            let count = xattrs.len();
            xattrs.retain(|name: &Vec<u8>, _| !OVERLAY.iter().any(|own| name.starts_with(own)));
            if xattrs.len() < count {
                let first = || (0, show(&member.path));
                layer.overlay.get_or_insert_with(first).0 += to_u64(count - xattrs.len());
            }
        }
        let permissions = xattrs.get(ACL).and_then(|list| acl::as_mode(list));
        let mode = match (&member.kind, permissions) {
            // This mode has no effect, and some writers store another one.
            (MemberKind::Symlink(_), _) => 0o777,
            (_, Some(permissions)) => (member.mode & !0o777) | permissions,
            (_, None) => member.mode,
        };
        if permissions.is_some() {
            xattrs.remove(ACL);
        }
        let bytes: usize = xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        self.xattrs = self.xattrs.saturating_add(bytes);
        if self.xattrs > XATTRS {
            let what = format!(
                "its extended attributes and those of the members before it have more than {XATTRS} bytes"
            );
            return Err(self.bad(member, &what));
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

    /// Reads the content of a file. If the tar is not compressed, and has all bytes of the file, they stay there;
    /// otherwise, copies them to the spool, without blocks of zeros.
    fn content(&mut self, member: &Member, archive: &mut Archive) -> Result<Content> {
        let is_whole = |extents: &[archive::Extent]| match extents {
            [one] => one.offset == 0 && one.len == member.size,
            _ => false,
        };
        if let Some((file, from)) = archive.in_file().filter(|_| is_whole(&member.extents)) {
            return self.content_in_tar(member, archive, file, from);
        }
        let mut maker = ContentMaker::default();
        let mut block = Vec::with_capacity(to_usize(BLOCK));
        let mut start = 0;
        let size = member.size;
        let mut finish = |block: &mut Vec<u8>, start: u64| -> Result<()> {
            // The data may end before the block or file does: a hole follows.
            let len = (size - start).min(BLOCK);
            block.resize(to_usize(len), 0);
            if maker.block(start, block, self.end)? {
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
        maker.finish(size, Source::Shared(Arc::clone(&self.file)))
    }

    /// Reads the content of a file that is at byte `from` of the tar `file`.
    fn content_in_tar(
        &self,
        member: &Member,
        archive: &mut Archive,
        file: Arc<File>,
        from: u64,
    ) -> Result<Content> {
        let mut maker = ContentMaker::of_others()?;
        archive.content(member, |offset, piece| {
            for (block, offset) in piece.chunks(to_usize(BLOCK)).zip((offset..).step_by(4096)) {
                maker.block(offset, block, from + offset)?;
            }
            Ok(())
        })?;
        maker.finish(member.size, Source::Tar(file, Arc::clone(&self.name)))
    }
}

/// Returns the parts of a path, without empty ones and `.`.
fn parts(path: &[u8]) -> VecDeque<Vec<u8>> {
    let parts = path.split(|&byte| byte == b'/');
    let parts = parts.filter(|part| !part.is_empty() && *part != b".");
    parts.map(<[u8]>::to_vec).collect()
}
