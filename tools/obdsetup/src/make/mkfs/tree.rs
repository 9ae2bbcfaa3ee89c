// SPDX-License-Identifier: GPL-2.0

//! A tree of files in memory, without their content, from which a file system is made. The order of files
//! depends only on their names, not on the source of the tree.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{bail, Context, Result};
use overlaybd::format::num::{to_u64, to_usize};
use overlaybd::is_zero;
use rustix::fs::IFlags;
use sha2::{Digest, Sha256};

use super::state::{self, FileState};
use super::witness::{Seen, Witness};
use crate::terminal::interrupt;

/// Largest number of threads that read files at once. Each of them has a file open, and a buffer of up to 1 MiB.
pub(super) const FILES_AT_ONCE: usize = 64;

/// Index of a node in its tree.
pub(super) type Id = usize;

/// A point in time: seconds since 1970, which may be negative, and nanoseconds after that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Time {
    pub(super) seconds: i64,
    pub(super) nanoseconds: u32,
}

/// A device number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) major: u32,
    pub(super) minor: u32,
}

/// Metadata of the source that the tree cannot store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unread {
    /// POSIX ACLs with names instead of numbers.
    AclNames,
    /// ACLs of NFS.
    NfsAcl,
    /// Flags of a file, as FS_IOC_GETFLAGS returns them.
    Flags(IFlags),
}

/// Metadata of all kinds of files.
#[derive(Clone, Debug, Default)]
pub(super) struct Meta {
    /// The bits of the permissions, setuid, setgid and sticky: `st_mode` without the kind of the file.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Time,
    /// Names, such as `user.name`, and values of the extended attributes.
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Metadata that is lost; [`super::fit`] reports it.
    pub(super) unread: Vec<Unread>,
}

/// The kind of a file.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// The names in the directory, and their nodes.
    Directory(BTreeMap<Vec<u8>, Id>),
    File(Content),
    /// The target of the link.
    Symlink(Vec<u8>),
    CharDevice(Device),
    BlockDevice(Device),
    Fifo,
    Socket,
}

/// A file of any kind, which can have several names.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) meta: Meta,
    pub(super) kind: Kind,
}

impl Node {
    /// Returns the mode as in `st_mode`: the kind of the file, and the bits of [`Meta::mode`].
    pub(super) fn st_mode(&self) -> u32 {
        let kind = match self.kind {
            Kind::Directory(_) => 0o040_000,
            Kind::File(_) => 0o100_000,
            Kind::Symlink(_) => 0o120_000,
            Kind::CharDevice(_) => 0o020_000,
            Kind::BlockDevice(_) => 0o060_000,
            Kind::Fifo => 0o010_000,
            Kind::Socket => 0o140_000,
        };
        kind | self.meta.mode
    }

    /// Returns the device number; `None` if the node is no device.
    pub(super) fn device(&self) -> Option<Device> {
        match self.kind {
            Kind::CharDevice(device) | Kind::BlockDevice(device) => Some(device),
            _ => None,
        }
    }
}

/// A range of a file that has data: whole blocks, except at the end of the file. In bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Offset of the data in the source.
    from: u64,
}

/// The source of content.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// The file with this path, and its state before it was first read.
    Path(PathBuf, Box<FileState>),
    /// A tar, with its name in messages.
    Tar(Arc<File>, Arc<Path>),
    /// A temporary file with the content of several files.
    Shared(Arc<File>),
    /// The content is in the file system already and isn't read.
    InPlace,
}

/// The content of a file.
#[derive(Clone, Debug)]
pub(super) struct Content {
    pub(super) size: u64,
    /// The ranges with data: ascending, not empty, disjoint. All other bytes of the file are zeros.
    pub(super) extents: Vec<Extent>,
    source: Source,
    digest: ContentHash,
    /// What was read, if others can change it.
    seen: Option<Seen>,
}

/// The hash of a file's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ContentHash {
    sha256: [u8; 32],
    /// Whether the hash covers all bytes of the file, and not only its data and some of its holes.
    is_whole: bool,
}

impl Content {
    /// Returns the content of a file that is in the file system already.
    pub(super) fn in_place(size: u64) -> Self {
        Self {
            size,
            extents: Vec::new(),
            source: Source::InPlace,
            digest: ContentHash {
                sha256: [0; 32],
                is_whole: false,
            },
            seen: None,
        }
    }

    /// Returns the number of bytes of data.
    pub(super) fn data_len(&self) -> u64 {
        self.extents.iter().map(|extent| extent.len).sum()
    }

    /// Passes the data of each extent to `each`, with its offset in the file, at most 1 MiB at a time. An error if it
    /// is not the data that was read first.
    pub(super) fn read(&self, mut each: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let mut again = self.witness()?;
        self.read_from(0, |offset, piece| {
            if let Some(again) = &mut again {
                again.add(piece);
            }
            each(offset, piece)
        })?;
        self.check(again)
    }

    /// As [`Self::read`], without the data before byte `start`, and unchecked.
    pub(super) fn read_from(
        &self,
        start: u64,
        mut each: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let opened = self.open()?;
        let left = self.extents.iter().map(|extent| {
            let skipped = start.saturating_sub(extent.offset).min(extent.len);
            (extent, skipped)
        });
        let most = self.data_len().min(self.size.saturating_sub(start));
        let mut buffer = vec![0; to_usize(most.min(1 << 20))];
        for (extent, skipped) in left {
            let mut done = skipped;
            while done < extent.len {
                let take = (extent.len - done).min(to_u64(buffer.len()));
                let piece = buffer.get_mut(..to_usize(take)).unwrap_or_default();
                opened.fill(extent, done, piece)?;
                each(extent.offset + done, piece)?;
                interrupt::check()?;
                done += take;
            }
        }
        Ok(())
    }

    /// Opens the source to read parts of the content. If it is a file of a directory that was replaced or changed
    /// since it was first read, that is an error.
    pub(super) fn open(&self) -> Result<Opened> {
        let file = match &self.source {
            Source::Shared(file) | Source::Tar(file, _) => Some(Arc::clone(file)),
            Source::InPlace => None,
            Source::Path(path, first) => Some(Arc::new(first.open_again(path)?)),
        };
        Ok(Opened {
            file,
            source: self.source.clone(),
        })
    }

    /// Returns a hash for what is read again, for [`Self::check`]; `None` if nobody else can change the content.
    pub(super) fn witness(&self) -> Result<Option<Witness>> {
        self.seen.map(|_| Witness::new()).transpose()
    }

    /// Checks that what was read again, all data of the content, is what was read first.
    pub(super) fn check(&self, again: Option<Witness>) -> Result<()> {
        if again.map(Witness::finish) == self.seen {
            return Ok(());
        }
        let path = match &self.source {
            Source::Path(path, _) => path,
            Source::Tar(_, path) => path.as_ref(),
            Source::Shared(_) | Source::InPlace => Path::new("the temporary file"),
        };
        Err(state::changed(path))
    }

    /// Checks that a file of a directory was neither replaced nor changed since it was first read.
    pub(super) fn check_source(&self) -> Result<()> {
        match &self.source {
            Source::Path(path, first) => first.check(path),
            _ => Ok(()),
        }
    }

    /// Returns the SHA-256 of all bytes of the file. Reads them only if they have many more bytes in holes than data.
    pub(super) fn sha256(&self) -> Result<[u8; 32]> {
        if self.digest.is_whole {
            return Ok(self.digest.sha256);
        }
        let mut whole = Digester::with_all_holes();
        self.read(|offset, piece| whole.add(offset, piece))?;
        Ok(whole.finish(self.size)?.sha256)
    }

    /// Adds size, extents and digest of the content to a hash. These do not depend on the source.
    pub(super) fn identify(&self, hash: &mut Sha256) {
        // Adjacent extents may be apart in one source, and not in another one.
        let mut joined: Vec<(u64, u64)> = Vec::new();
        for extent in &self.extents {
            let end = extent.offset + extent.len;
            match joined.last_mut() {
                Some((_, last)) if *last == extent.offset => *last = end,
                _ => joined.push((extent.offset, end)),
            }
        }
        hash.update(self.size.to_le_bytes());
        hash.update(to_u64(joined.len()).to_le_bytes());
        for (start, end) in joined {
            hash.update(start.to_le_bytes());
            hash.update(end.to_le_bytes());
        }
        hash.update(self.digest.sha256);
    }
}

/// Content whose source is open.
pub(super) struct Opened {
    /// `None` if nothing is to be read.
    file: Option<Arc<File>>,
    source: Source,
}

impl Opened {
    /// Fills `piece` with the data of an extent, from byte `skip` of the extent on.
    pub(super) fn fill(&self, extent: &Extent, skip: u64, piece: &mut [u8]) -> Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let read = file.read_exact_at(piece, extent.from + skip);
        let shorter =
            |path: &Path| format!("{}: cannot read, or it became shorter", path.display());
        read.with_context(|| match &self.source {
            Source::Path(path, _) => shorter(path),
            Source::Tar(_, path) => shorter(path),
            Source::Shared(_) | Source::InPlace => "cannot read the temporary file".to_owned(),
        })
    }
}

/// Largest number of bytes of holes that are hashed with a file's data, in addition to as many as the file has bytes
/// of data before: a file can have any number of bytes in holes.
const FREE_HOLES: u64 = 1 << 20;

/// Hashes the content of a file, whose data is added in order. Holes are hashed as zeros until there are too many of
/// them; which ones does not depend on the pieces in which the data is added.
struct Digester {
    hash: Sha256,
    /// The hash has all bytes before this offset, if it is whole.
    end: u64,
    data: u64,
    holes: u64,
    /// Bytes of holes that are hashed in any case.
    free: u64,
    is_whole: bool,
}

impl Default for Digester {
    fn default() -> Self {
        Self {
            hash: Sha256::new(),
            end: 0,
            data: 0,
            holes: 0,
            free: FREE_HOLES,
            is_whole: true,
        }
    }
}

impl Digester {
    /// Returns one that hashes all holes.
    fn with_all_holes() -> Self {
        Self {
            free: u64::MAX,
            ..Self::default()
        }
    }

    /// Adds the data at `offset`. An error only if a signal asks to stop.
    fn add(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.hole(offset)?;
        self.hash.update(data);
        self.end = offset + to_u64(data.len());
        self.data += to_u64(data.len());
        Ok(())
    }

    /// Adds zeros up to the offset `end`. These can take long: an error if a signal asks to stop.
    fn hole(&mut self, end: u64) -> Result<()> {
        const ZEROS: &[u8] = &[0; 64 << 10];
        let mut left = end.saturating_sub(self.end);
        self.holes += left;
        if left == 0 || !self.is_whole {
            return Ok(());
        }
        if self.holes > self.data.saturating_add(self.free) {
            self.is_whole = false;
            return Ok(());
        }
        while left > 0 {
            interrupt::check()?;
            let len = left.min(to_u64(ZEROS.len()));
            self.hash
                .update(ZEROS.get(..to_usize(len)).unwrap_or_default());
            left -= len;
        }
        Ok(())
    }

    fn finish(mut self, size: u64) -> Result<ContentHash> {
        self.hole(size)?;
        Ok(ContentHash {
            sha256: self.hash.finalize().into(),
            is_whole: self.is_whole,
        })
    }
}

/// Collects the content of a file, whose blocks are added in order. The file gets a hole for each block of zeros,
/// whether or not the source has a hole there.
#[derive(Default)]
pub(super) struct ContentMaker {
    extents: Vec<Extent>,
    digester: Digester,
    witness: Option<Witness>,
}

impl ContentMaker {
    /// Begins content that is read again later, and that others can change until then.
    pub(super) fn of_others() -> Result<Self> {
        Ok(Self {
            witness: Some(Witness::new()?),
            ..Self::default()
        })
    }

    /// Adds the block at `offset`, a multiple of the block size; only the last block may be
    /// shorter. Its data is at byte `from` of the source. Returns `false` for a block of zeros, which is not
    /// added. An error only if a signal asks to stop.
    pub(super) fn block(&mut self, offset: u64, data: &[u8], from: u64) -> Result<bool> {
        if is_zero(data) {
            return Ok(false);
        }
        self.digester.add(offset, data)?;
        if let Some(witness) = &mut self.witness {
            witness.add(data);
        }
        let len = to_u64(data.len());
        match self.extents.last_mut() {
            Some(last) if last.offset + last.len == offset && last.from + last.len == from => {
                last.len += len;
            }
            _ => self.extents.push(Extent { offset, len, from }),
        }
        Ok(true)
    }

    /// Returns the content of a file of `size` bytes, whose data is in `source`. An error only if a signal asks to
    /// stop.
    pub(super) fn finish(self, size: u64, source: Source) -> Result<Content> {
        Ok(Content {
            size,
            extents: self.extents,
            source,
            digest: self.digester.finish(size)?,
            seen: self.witness.map(Witness::finish),
        })
    }
}

/// A name in a tree.
pub(super) struct Name {
    last: Vec<u8>,
    /// The index in [`Names`] of the name of the directory that the name is in; `None` for the root directory.
    above: Option<usize>,
    /// The directory that the name is in.
    pub(super) parent: Id,
    /// The node with the name.
    pub(super) id: Id,
    /// Whether this is the first name of its node.
    pub(super) first: bool,
}

impl Name {
    /// Returns the last part of the path.
    pub(super) fn last(&self) -> &[u8] {
        &self.last
    }
}

/// All names of a tree. Paths are made only when they are needed, to save memory: a short name may have a path of
/// 4095 bytes.
pub(super) struct Names(Vec<Name>);

impl Names {
    /// Returns the path of a name, from the root directory, without a slash at either end.
    pub(super) fn path(&self, name: &Name) -> Vec<u8> {
        let mut parts = vec![name.last()];
        let mut above = name.above;
        while let Some(directory) = above.and_then(|nth| self.0.get(nth)) {
            parts.push(directory.last());
            above = directory.above;
        }
        parts.reverse();
        parts.join(&b'/')
    }
}

impl std::ops::Deref for Names {
    type Target = [Name];

    fn deref(&self) -> &[Name] {
        &self.0
    }
}

/// Returns a path relative to the root directory of a tree, for messages: with `./` in front, and
/// shortened if it is long.
pub(super) fn show(path: &[u8]) -> String {
    format!("./{}", crate::input::archive::brief(path))
}

/// A tree of files.
pub(super) struct Tree {
    /// The root directory first, the others in any order. Nodes whose name was removed or replaced stay.
    nodes: Vec<Node>,
}

/// The root directory.
pub(super) const ROOT: Id = 0;

impl Tree {
    /// Returns a tree with only a root directory.
    pub(super) fn new(root: Meta) -> Self {
        Self {
            nodes: vec![Node {
                meta: root,
                kind: Kind::Directory(BTreeMap::new()),
            }],
        }
    }

    /// Adds a node that has no name yet. Returns its index.
    pub(super) fn add(&mut self, node: Node) -> Id {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    /// Gives `id` a name in the directory `parent`. A node that had this name loses it. An error if `parent`
    /// is no directory.
    pub(super) fn link(&mut self, parent: Id, name: Vec<u8>, id: Id) -> Result<()> {
        self.children_mut(parent)?.insert(name, id);
        Ok(())
    }

    /// Removes a name from the directory `parent`. An error if `parent` is no directory.
    pub(super) fn unlink(&mut self, parent: Id, name: &[u8]) -> Result<()> {
        self.children_mut(parent)?.remove(name);
        Ok(())
    }

    fn children_mut(&mut self, id: Id) -> Result<&mut BTreeMap<Vec<u8>, Id>> {
        match self.nodes.get_mut(id).map(|node| &mut node.kind) {
            Some(Kind::Directory(children)) => Ok(children),
            _ => bail!("node {id} is no directory"),
        }
    }

    pub(super) fn node(&self, id: Id) -> Result<&Node> {
        self.nodes.get(id).context("no such node")
    }

    pub(super) fn node_mut(&mut self, id: Id) -> Result<&mut Node> {
        self.nodes.get_mut(id).context("no such node")
    }

    /// Returns the names and nodes in the directory `id`; none if it is no directory.
    pub(super) fn children(&self, id: Id) -> impl Iterator<Item = (&[u8], Id)> {
        let children = match self.nodes.get(id).map(|node| &node.kind) {
            Some(Kind::Directory(children)) => Some(children),
            _ => None,
        };
        let children = children.into_iter().flatten();
        children.map(|(name, &id)| (name.as_slice(), id))
    }

    /// Returns the node with the name `name` in the directory `parent`.
    pub(super) fn child(&self, parent: Id, name: &[u8]) -> Option<Id> {
        match self.nodes.get(parent).map(|node| &node.kind) {
            Some(Kind::Directory(children)) => children.get(name).copied(),
            _ => None,
        }
    }

    /// Returns all names but that of the root directory. The names in a directory are sorted by their bytes;
    /// a directory is followed by everything in it.
    pub(super) fn names(&self) -> Names {
        let mut names: Vec<Name> = Vec::new();
        let mut seen = vec![false; self.nodes.len()];
        // Parent, index of the parent's name, name and node of all names still to be visited, the next one last.
        let mut left: Vec<(Id, Option<usize>, &[u8], Id)> = Vec::new();
        let push = |left: &mut Vec<_>, parent: Id, above: Option<usize>| {
            let at = left.len();
            let children = self.children(parent);
            left.extend(children.map(|(name, id)| (parent, above, name, id)));
            if let Some(new) = left.get_mut(at..) {
                new.reverse();
            }
        };
        push(&mut left, ROOT, None);
        while let Some((parent, above, last, id)) = left.pop() {
            push(&mut left, id, Some(names.len()));
            let first = seen
                .get_mut(id)
                .is_some_and(|seen| !std::mem::replace(seen, true));
            names.push(Name {
                last: last.to_vec(),
                above,
                parent,
                id,
                first,
            });
        }
        Names(names)
    }

    /// Returns a hash of the root directory, of everything that has a name in the tree, and of `more`.
    pub(super) fn hash(&self, more: &[&[u8]]) -> Result<[u8; 32]> {
        let mut hash = Sha256::new();
        for bytes in more {
            part(&mut hash, bytes);
        }
        let mut firsts: BTreeMap<Id, u64> = BTreeMap::new();
        hash_node(&mut hash, self.node(ROOT)?);
        let names = self.names();
        for (nth, name) in names.iter().enumerate() {
            part(&mut hash, &names.path(name));
            if name.first {
                firsts.insert(name.id, to_u64(nth));
                hash_node(&mut hash, self.node(name.id)?);
            } else {
                let first = firsts.get(&name.id).copied().unwrap_or_default();
                part(&mut hash, &first.to_le_bytes());
            }
        }
        Ok(hash.finalize().into())
    }
}

/// Adds bytes with their length to the hash.
fn part(hash: &mut Sha256, bytes: &[u8]) {
    hash.update(to_u64(bytes.len()).to_le_bytes());
    hash.update(bytes);
}

fn hash_node(hash: &mut Sha256, node: &Node) {
    let meta = &node.meta;
    for number in [node.st_mode(), meta.uid, meta.gid, meta.mtime.nanoseconds] {
        hash.update(number.to_le_bytes());
    }
    hash.update(meta.mtime.seconds.to_le_bytes());
    hash.update(to_u64(meta.xattrs.len()).to_le_bytes());
    for (name, value) in &meta.xattrs {
        part(hash, name);
        part(hash, value);
    }
    match &node.kind {
        Kind::File(content) => content.identify(hash),
        Kind::Symlink(target) => part(hash, target),
        Kind::CharDevice(device) | Kind::BlockDevice(device) => {
            hash.update(device.major.to_le_bytes());
            hash.update(device.minor.to_le_bytes());
        }
        Kind::Directory(_) | Kind::Fifo | Kind::Socket => {}
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use sha2::{Digest, Sha256};

    use super::{Kind, Node, ROOT};
    use crate::make::mkfs::{from_dir, from_tar};

    /// The fingerprint is the SHA-256 of all bytes, and holes that cost too much are not hashed for the UUID.
    #[test]
    fn hashes_of_holes() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let mib = 1 << 20;
        // Bytes of data at the start, size, another byte of data, and whether all is hashed at once.
        let files = [
            (0, 0, None, true),
            (5000, 5000, None, true),
            (0, mib, None, true),
            (0, mib + 1, None, false),
            (4096, mib + 8192, None, true),
            (4096, mib + 8193, None, false),
            (4096, 3 * mib, Some(mib - 1), false),
            (mib, 3 * mib + 5000, Some(3 * mib + 100), true),
            (mib, 4 * mib, Some(3 * mib + 100), false),
        ];
        let mut seen = Vec::new();
        for (data, size, more, is_whole) in files {
            let mut bytes = vec![0; size];
            bytes[..data].fill(1);
            if let Some(at) = more {
                bytes[at] = 2;
            }
            let what = (data, size, more);
            std::fs::write(dir.path().join("file"), &bytes)?;
            let tree = from_dir::read(dir.path(), false)?;
            let id = tree.child(ROOT, b"file").unwrap_or_default();
            let Kind::File(content) = &tree.node(id)?.kind else {
                anyhow::bail!("no file");
            };
            assert_eq!(content.digest.is_whole, is_whole, "{what:?}");
            let wanted: [u8; 32] = Sha256::digest(&bytes).into();
            assert_eq!(content.sha256()?, wanted, "{what:?}");
            let mut hash = Sha256::new();
            content.identify(&mut hash);
            let hash = hash.finalize();
            assert!(!seen.contains(&hash), "{what:?}");
            seen.push(hash);
        }
        Ok(())
    }

    #[test]
    fn names_and_paths() -> anyhow::Result<()> {
        let mut tree = from_tar::empty();
        let meta = tree.node(ROOT)?.meta.clone();
        let node = |kind| Node {
            meta: meta.clone(),
            kind,
        };
        let file = tree.add(node(Kind::Fifo));
        let mut at = ROOT;
        for _ in 0..1000 {
            let next = tree.add(node(Kind::Directory(BTreeMap::new())));
            tree.link(at, b"d".to_vec(), next)?;
            tree.link(at, b"d.x".to_vec(), file)?;
            at = next;
        }
        let names = tree.names();
        assert_eq!(names.len(), 2000);
        // Each name is stored alone, without its path.
        let kept: usize = names.iter().map(|name| name.last.capacity()).sum();
        assert!(kept <= 2000 * 3);
        let mut firsts = names.iter().filter(|name| name.first && name.id == file);
        let first = firsts.next().map(|name| names.path(name));
        assert_eq!(first, Some([b"d/".repeat(999), b"d.x".to_vec()].concat()));
        assert!(firsts.next().is_none());
        let paths: Vec<Vec<u8>> = names.iter().map(|name| names.path(name)).collect();
        let parts = |path: &[u8]| path.split(|&byte| byte == b'/').count();
        let depths: Vec<usize> = paths.iter().map(|path| parts(path)).collect();
        let wanted: Vec<usize> = (1..=1000).chain((1..=1000).rev()).collect();
        assert_eq!(depths, wanted);
        Ok(())
    }
}
