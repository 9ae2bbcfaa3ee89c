// SPDX-License-Identifier: GPL-2.0

//! Reads a directory tree.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{anyhow, bail, Context, Result};
use overlaybd::format::num::{to_u64, to_usize};
use overlaybd::parallel;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::limits;
use super::state::{open_directory, FileState};
use super::tree::{
    Content, ContentMaker, Device, Id, Kind, Meta, Node, Source, Time, Tree, Unread, FILES_AT_ONCE,
    ROOT,
};
use super::witness::BLOCK;
use crate::input::archive::{brief, is_whiteout};
use crate::terminal::bar::Bar;
use crate::terminal::exit::Failure;
use crate::terminal::interrupt;

/// Number of bytes read at once: a multiple of the block size, and few enough to stay in the cache of a CPU.
const PIECE: u64 = 128 << 10;

/// Reads the directory `root`. The name of a whiteout is an error, unless `keep_whiteouts` is set.
pub(super) fn read(root: &Path, keep_whiteouts: bool) -> Result<Tree> {
    let (_, mut meta) = look(root)?;
    meta.unread.extend(flags_of_directory(root));
    possible(root, limits::xattrs(&meta))?;
    let mut tree = Tree::new(meta);
    let mut linked: HashMap<(u64, u64), Id> = HashMap::new();
    let mut files: Vec<(Id, PathBuf, Metadata)> = Vec::new();
    let mut left = vec![(ROOT, root.to_owned())];
    while let Some((parent, directory)) = left.pop() {
        let context = || format!("{}: cannot read the directory", directory.display());
        for entry in std::fs::read_dir(&directory).with_context(context)? {
            interrupt::check()?;
            let name = entry.with_context(context)?.file_name();
            let path = directory.join(&name);
            if !keep_whiteouts && is_whiteout(name.as_bytes()) {
                return Err(Failure::usage(format!(
                    "{}: a name with which a layer of a container image hides files of the layers below: \
                     convert the whole image, put its layers on each other with `obdsetup apply`, or take such \
                     names for files with --keep-whiteouts",
                    brief(path.as_os_str().as_bytes())
                )));
            }
            let (status, mut meta) = look(&path)?;
            if status.is_dir() {
                meta.unread.extend(flags_of_directory(&path));
            }
            let inside = path.strip_prefix(root).unwrap_or(&path);
            possible(&path, limits::path(inside.as_os_str().as_bytes()))?;
            let place = (status.dev(), status.ino());
            let again = match status.nlink() {
                2.. if !status.is_dir() => linked.get(&place),
                _ => None,
            };
            let id = match again {
                Some(&id) => id,
                None => {
                    let kind = kind(&path, &status)?;
                    let node = Node { meta, kind };
                    possible(&path, limits::node(&node))?;
                    let id = tree.add(node);
                    linked.insert(place, id);
                    if status.is_dir() {
                        left.push((id, path));
                    } else if status.is_file() {
                        files.push((id, path, status));
                    }
                    id
                }
            };
            tree.link(parent, name.into_vec(), id)?;
        }
    }
    let stored = |(_, _, status): &(_, _, Metadata)| status.len().min(status.blocks() * 512);
    let bar = Bar::new("reading", files.iter().map(stored).sum());
    let contents = parallel::map(
        files.into_iter(),
        FILES_AT_ONCE,
        Vec::new,
        |buffer, (id, path, status)| {
            Ok::<_, anyhow::Error>((id, content(path, &status, buffer, &bar)?))
        },
    );
    for found in contents {
        let (id, (content, flags)) = found?;
        let node = tree.node_mut(id)?;
        node.meta.unread.extend(flags);
        node.kind = Kind::File(content);
    }
    Ok(tree)
}

/// Adds the path of the file to the error of a check in [`limits`].
fn possible(path: &Path, result: Result<(), String>) -> Result<()> {
    result.map_err(|what| anyhow!("{}: {what}", path.display()))
}

/// Returns the metadata of a file, in the system's form and in that of the tree, without its flags.
fn look(path: &Path) -> Result<(Metadata, Meta)> {
    let status = path.symlink_metadata();
    let status = status.map_err(|error| unseen(path, error))?;
    let nanoseconds = u32::try_from(status.mtime_nsec()).unwrap_or_default();
    let meta = Meta {
        mode: status.mode() & 0o7777,
        uid: status.uid(),
        gid: status.gid(),
        mtime: Time {
            seconds: status.mtime(),
            nanoseconds,
        },
        xattrs: xattrs(path)
            .with_context(|| format!("{}: cannot read extended attributes", path.display()))?,
        unread: Vec::new(),
    };
    Ok((status, meta))
}

/// Returns the error for a file whose metadata cannot be read: `error`, or that its path is too long for Linux.
fn unseen(path: &Path, error: io::Error) -> anyhow::Error {
    let bytes = path.as_os_str().as_bytes();
    match bytes.len() > limits::PATH {
        true => Failure::usage(format!(
            "{}: a path of more than {} bytes, which Linux does not accept: move the directory, or \
             bind-mount it, to a place with a shorter path",
            brief(bytes),
            limits::PATH
        )),
        false => anyhow::Error::from(error)
            .context(format!("{}: cannot read the metadata", path.display())),
    }
}

fn kind(path: &Path, status: &Metadata) -> Result<Kind> {
    let file_type = status.file_type();
    let number = status.rdev();
    let device = Device {
        major: rustix::fs::major(number),
        minor: rustix::fs::minor(number),
    };
    Ok(match file_type {
        kind if kind.is_dir() => Kind::Directory(BTreeMap::new()),
        // The content is read later.
        kind if kind.is_file() => {
            let source = Source::Path(path.to_owned(), Box::new(FileState::of(status)));
            Kind::File(ContentMaker::default().finish(0, source)?)
        }
        kind if kind.is_symlink() => {
            let target = std::fs::read_link(path);
            let target = target.with_context(|| format!("{}: cannot read", path.display()))?;
            Kind::Symlink(target.into_os_string().into_vec())
        }
        kind if kind.is_char_device() => Kind::CharDevice(device),
        kind if kind.is_block_device() => Kind::BlockDevice(device),
        kind if kind.is_fifo() => Kind::Fifo,
        kind if kind.is_socket() => Kind::Socket,
        _ => bail!(
            "{}: a file of a kind that obdsetup does not know",
            path.display()
        ),
    })
}

/// Calls `get` with larger and larger buffers, up to 1 MiB, until the result fits.
fn grow(get: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> rustix::io::Result<Vec<u8>> {
    let mut buffer = vec![0; 256];
    loop {
        match get(&mut buffer) {
            Ok(len) => {
                buffer.truncate(len);
                return Ok(buffer);
            }
            Err(Errno::RANGE) if buffer.len() < 1 << 20 => buffer.resize(buffer.len() * 4, 0),
            Err(error) => return Err(error),
        }
    }
}

fn xattrs(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let list = match grow(|buffer| rustix::fs::llistxattr(path, buffer)) {
        Err(Errno::NOTSUP) => return Ok(BTreeMap::new()),
        list => list?,
    };
    let mut xattrs = BTreeMap::new();
    for name in list
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
    {
        let key = OsString::from_vec(name.to_vec());
        match grow(|buffer| rustix::fs::lgetxattr(path, key.as_bytes(), buffer)) {
            // Removed since it was listed; or listed but unreadable, as on some network file
            // systems.
            Err(Errno::NODATA | Errno::NOTSUP) => {}
            value => {
                xattrs.insert(name.to_vec(), value?);
            }
        }
    }
    Ok(xattrs)
}

/// Returns the flags of an open file or directory; `None` if it has none, or its file system doesn't support
/// them.
fn flags(file: &File) -> Option<Unread> {
    let flags = rustix::fs::ioctl_getflags(file).ok()?;
    (!flags.is_empty()).then_some(Unread::Flags(flags))
}

/// As [`flags`], for the directory at `path`.
fn flags_of_directory(path: &Path) -> Option<Unread> {
    // If the directory can't be opened, reading it will fail later.
    flags(&open_directory(path).ok()?)
}

/// Reads a file whose metadata is `status`, by way of `buffer`. Returns its content, and its flags.
fn content(
    path: PathBuf,
    status: &Metadata,
    buffer: &mut Vec<u8>,
    bar: &Bar,
) -> Result<(Content, Option<Unread>)> {
    let context = || format!("{}: cannot read, or it changed", path.display());
    let (file, state) = FileState::of(status).open(&path, context)?;
    let size = state.size;
    let mut maker = ContentMaker::of_others()?;
    if to_u64(buffer.len()) < size.min(PIECE) {
        buffer.resize(to_usize(size.min(PIECE)), 0);
    }
    let mut at = 0;
    while let Some((start, end)) = next_data(&file, at, size).with_context(context)? {
        at = start;
        while at < end {
            let take = (end - at).min(PIECE);
            let piece = buffer.get_mut(..to_usize(take)).unwrap_or_default();
            file.read_exact_at(piece, at).with_context(context)?;
            for (block, offset) in piece.chunks(to_usize(BLOCK)).zip((at..).step_by(4096)) {
                maker.block(offset, block, offset)?;
            }
            bar.advance(take)?;
            at += take;
        }
    }
    let content = maker.finish(size, Source::Path(path, Box::new(state)))?;
    Ok((content, flags(&file)))
}

/// Returns start and end of the next data at or after `at`, which must be at the start of a block, or `None`
/// if there is none before `size`. Rounded to whole blocks, but the end is not after `size`.
fn next_data(file: &File, at: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= size {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        // The file system doesn't report holes.
        Err(Errno::INVAL | Errno::NOTSUP) => return Ok(Some((at, size))),
        Err(error) => return Err(error.into()),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    let start = start - start % BLOCK;
    let end = end.next_multiple_of(BLOCK).min(size);
    // Never before `at`, up to which the file was read.
    Ok((start.max(at) < end).then_some((start.max(at), end)))
}
