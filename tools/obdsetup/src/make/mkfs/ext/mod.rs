// SPDX-License-Identifier: GPL-2.0

//! Makes ext2, ext3 and ext4 with mke2fs. mke2fs loses much: metadata of the root directory, fractions of
//! a second, times that need more than 32 bits, hard links to symbolic links. It writes extended attributes
//! in the order of the source. So mke2fs makes only names and content, and debugfs sets everything else.

mod entries;
mod script;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{anyhow, bail, Context, Result};
use tempfile::{NamedTempFile, TempDir};

use self::entries::{Entry, Geometry};
use self::script::Script;
use super::fit::{Places, CHANGED, ROUNDED};
use super::stage::Stage;
use super::tree::{show, Id, Kind, Name, Names, Tree, ROOT};
use super::{Options, Stamp};
use crate::files::place::temp_file;
use crate::program::{full, is_about_room, Program};
use crate::terminal::exit::{Failure, Lines};
use crate::terminal::{interrupt, warn};

/// Smallest size in bytes of an ext3 or ext4 file system with 4 KiB blocks that can have a journal: 2048 blocks.
const EXT_JOURNAL: u64 = 8 << 20;
/// What the programs are needed for.
const NEED: &str = "ext2, ext3 and ext4 file systems";
/// If names and values of a file's extended attributes have more bytes, they may not fit in an inode and a block of
/// 4 KiB.
const XATTRS: usize = 3800;
/// Bytes that a file system stores for an extended attribute besides its name and value.
const XATTR_ENTRY: usize = 16;
/// What mke2fs and debugfs say if the file system is too small.
const FULL: [&str; 4] = [
    "Could not allocate block",
    "Could not allocate inode",
    "Not enough space to build",
    "Illegal inode number while writing reserved inodes",
];
const TOO_SMALL: &str =
    "too small for these files: give a larger --size, or none, so that it is estimated";
/// Inode of the root directory.
const ROOT_INODE: u32 = 2;
/// Largest number of names of a file, as in the kernel (EXT4_LINK_MAX). An inode counts them in 16 bits.
const LINKS: u64 = 65_000;
/// Number of entries of a directory from which on a warning says that mke2fs is slow: for each new entry, it reads
/// the directory from its start.
const LARGE_DIRECTORY: usize = 10_000;
/// Largest size in bytes of a value that is in the command for debugfs, where each of these bytes takes the four
/// characters `\ooo`. A longer value goes to a file.
const LONG_VALUE: usize = 500;

/// Makes the file system of `tree` in a file of `size` bytes in `place`. `directory` is the source
/// of `tree`, if that is a directory.
pub(super) fn make(
    tree: &Tree,
    directory: Option<&Path>,
    options: &Options<'_>,
    size: u64,
    stamp: &Stamp,
    place: &Path,
) -> Result<NamedTempFile> {
    let names = tree.names();
    let links = check_links(&names)?;
    check_lost_found(tree)?;
    warn(slow_directory(tree, &names)?.as_slice());
    let image = temp_file(place)?;
    let work = tempfile::Builder::new()
        .prefix(".obdsetup-")
        .tempdir_in(place);
    let work = work.with_context(|| format!("{}: cannot make a directory", place.display()))?;
    let mke2fs = Mke2fs {
        options,
        size,
        stamp,
        image: image.path(),
        work: &work,
    };
    // Before 1.47.1, mke2fs always copies extended attributes. Then it gets a copy of the files without them.
    let direct = match directory {
        Some(directory) => mke2fs.run(directory, true)?,
        None => false,
    };
    if direct {
        // mke2fs has read the files itself.
        for name in names.iter().filter(|name| name.first) {
            interrupt::check()?;
            if let Kind::File(content) = &tree.node(name.id)?.kind {
                content.check_source()?;
            }
        }
    } else {
        let stage = Stage::new(tree, place)?;
        if !mke2fs.run(stage.path(), true)? {
            mke2fs.run(stage.path(), false)?;
        }
    }
    let mut mend = Mend {
        tree,
        names,
        links,
        inodes: HashMap::from([(ROOT, ROOT_INODE)]),
        others: Vec::new(),
        work: &work,
        values: 0,
        stamp,
        is_sized: options.size.is_some(),
    };
    let geometry = Geometry::read(image.as_file())?;
    mend.find_inodes(image.path())?;
    mend.all(image.path(), &geometry)?;
    mend.entries(&image, &geometry)?;
    Ok(image)
}

/// Returns the number of names of each node. Fails if a file has more than ext2, ext3 and ext4 can count.
fn check_links(names: &Names) -> Result<HashMap<Id, u64>> {
    let mut links: HashMap<Id, u64> = HashMap::new();
    for name in names.iter() {
        *links.entry(name.id).or_default() += 1;
    }
    let too_many = |name: &&Name| links.get(&name.id).is_some_and(|&count| count > LINKS);
    match names.iter().find(too_many) {
        Some(name) => Err(Failure::usage(format!(
            "{}: has {} names (hard links), and ext2, ext3 and ext4 allow {LINKS}: use --fs erofs, btrfs or squashfs",
            show(&names.path(name)),
            links.get(&name.id).copied().unwrap_or_default()
        ))),
        None => Ok(links),
    }
}

/// Checks that the tree has no other file in the place of the directory that mke2fs makes for e2fsck.
fn check_lost_found(tree: &Tree) -> Result<()> {
    const NAME: &[u8] = b"lost+found";
    let Kind::Directory(children) = &tree.node(ROOT)?.kind else {
        return Ok(());
    };
    let Some(&id) = children.get(NAME) else {
        return Ok(());
    };
    match tree.node(id)?.kind {
        Kind::Directory(_) => Ok(()),
        _ => Err(Failure::usage(format!(
            "{}: is no directory, and ext2, ext3 and ext4 need one of that name: use --fs erofs, btrfs or squashfs, or \
             rename the file",
            show(NAME)
        ))),
    }
}

/// Returns a warning that names the largest directory, if that is so large that mke2fs is slow.
fn slow_directory(tree: &Tree, names: &Names) -> Result<Option<String>> {
    let mut largest = (0, None);
    let root = std::iter::once((ROOT, None));
    for (id, name) in root.chain(names.iter().map(|name| (name.id, Some(name)))) {
        if let Kind::Directory(children) = &tree.node(id)?.kind {
            if children.len() > largest.0 {
                largest = (children.len(), name);
            }
        }
    }
    let (count, name) = largest;
    let path = name.map(|name| names.path(name)).unwrap_or_default();
    let text = format!(
        "{}: has {count} entries: mke2fs is slow with so many in one directory, and twice as many take four times as \
         long; --fs erofs, btrfs or squashfs is fast",
        show(&path)
    );
    Ok((count >= LARGE_DIRECTORY).then_some(text))
}

/// A call of mke2fs.
struct Mke2fs<'a> {
    options: &'a Options<'a>,
    size: u64,
    stamp: &'a Stamp,
    image: &'a Path,
    work: &'a TempDir,
}

impl Mke2fs<'_> {
    /// Runs mke2fs on `directory`. With `no_xattrs`, mke2fs ignores extended attributes; returns `false` if
    /// this version cannot.
    fn run(&self, directory: &Path, no_xattrs: bool) -> Result<bool> {
        let file = std::fs::File::create(self.image)?;
        let sized = file.set_len(self.size);
        sized.with_context(|| {
            format!(
                "cannot make a file of {}",
                crate::terminal::size::show(self.size)
            )
        })?;
        let mut command = Program::new(self.options.fs.program(), NEED);
        command
            .args(["-q", "-F", "-U"])
            .arg(self.stamp.uuid.to_string());
        let mut extended = vec![OsString::from(format!("hash_seed={}", self.stamp.seed))];
        if no_xattrs {
            extended.push("no_copy_xattrs".into());
        }
        // Below 512 MiB, the default is 1 KiB. A page of a file can then be in four places, and in as many
        // compressed blocks.
        if self.size >= EXT_JOURNAL || self.options.dax {
            command.args(["-b", "4096"]);
        }
        // Times with 34 bits and nanoseconds need more than the original 128 bytes.
        command.args(["-I", "256"]);
        // mke2fs uses only the last -E option, so all are joined into one.
        let mut args = self.options.args.iter();
        while let Some(arg) = args.next() {
            match arg.as_bytes().strip_prefix(b"-E") {
                Some(b"") => extended.extend(args.next().cloned()),
                Some(text) => extended.push(OsStr::from_bytes(text).to_owned()),
                None => {
                    command.arg(arg);
                }
            }
        }
        command.arg("-E").arg(extended.join(OsStr::new(",")));
        command.arg("-d").arg(directory).arg(self.image);
        self.stamp.give_to_e2fsprogs(&mut command, self.work);
        match command.writes(self.image).run() {
            Err(error) if no_xattrs && format!("{error:#}").contains("no_copy_xattrs") => Ok(false),
            done => {
                done.map_err(|error| self.too_small(error))?.tell();
                Ok(true)
            }
        }
    }

    /// Says of a failure of mke2fs what to do if the size that the user gave is too small.
    fn too_small(&self, error: anyhow::Error) -> anyhow::Error {
        let lines = error.downcast_ref::<Lines>();
        let lines = lines.map_or(&[] as &[String], |failed| failed.lines.as_slice());
        let is_full = lines.iter().any(|line| is_full(line));
        match self.options.size.is_some() && is_full {
            true => error.context(TOO_SMALL),
            false => error,
        }
    }
}

/// Returns whether `line`, which mke2fs or debugfs has printed, says that the file system is too small.
fn is_full(line: &str) -> bool {
    FULL.iter().any(|sign| line.contains(sign))
}

/// The files with times that inodes of 128 bytes cannot hold.
#[derive(Default)]
struct Coarse {
    /// Those with fractions of a second.
    fractions: Places,
    /// Those with times after 2038-01-19.
    late: Places,
}

impl Coarse {
    /// Returns the warnings.
    fn warnings(&self) -> Vec<String> {
        let fractions = self
            .fractions
            .text(ROUNDED)
            .map(|files| format!("fractions of a second in times: {files}"));
        let late = self
            .late
            .text(CHANGED)
            .map(|files| format!("times after 2038-01-19: {files}"));
        let all = fractions.into_iter().chain(late);
        all.map(|what| format!("inodes of 128 bytes cannot hold {what}"))
            .collect()
    }
}

/// Sets with debugfs what mke2fs doesn't.
struct Mend<'a> {
    tree: &'a Tree,
    names: Names,
    /// Number of names of each node.
    links: HashMap<Id, u64>,
    /// The inode of a node.
    inodes: HashMap<Id, u32>,
    /// Additional inodes that mke2fs made for a node with several names: index of the name, and inode.
    others: Vec<(usize, u32)>,
    work: &'a TempDir,
    /// Number of files in `work` with values of extended attributes.
    values: usize,
    stamp: &'a Stamp,
    /// Whether the user has given the size of the file system.
    is_sized: bool,
}

impl Mend<'_> {
    /// Finds the inodes of all nodes, one level of directories at a time.
    fn find_inodes(&mut self, image: &Path) -> Result<()> {
        let mut by_name: HashMap<(Id, &[u8]), usize> = HashMap::new();
        for (nth, name) in self.names.iter().enumerate() {
            by_name.insert((name.parent, name.last()), nth);
        }
        let mut found = vec![false; self.names.len()];
        let mut directories = vec![(ROOT_INODE, ROOT)];
        while !directories.is_empty() {
            let ids: HashMap<u32, Id> = directories.drain(..).collect();
            let mut script = self.script()?;
            let mut inodes: Vec<_> = ids.keys().collect();
            inodes.sort_unstable();
            for inode in inodes {
                script.line(format!("ls -l <{inode}>").as_bytes())?;
            }
            script.finish()?;
            let mut command = Program::new("debugfs", NEED);
            command.arg("-f").arg(self.script_path()).arg(image);
            let mut listed: Vec<(Id, Vec<u8>, u32)> = Vec::new();
            let mut current = None;
            let _ = command.each_line(|line| {
                if let Some(inode) = line.strip_prefix("debugfs: ls -l <") {
                    let inode = inode.strip_suffix('>').and_then(|inode| inode.parse().ok());
                    current = inode.and_then(|inode: u32| ids.get(&inode).copied());
                } else if let (Some(id), Some((name, inode))) = (current, entry(line)) {
                    listed.push((id, name, inode));
                }
            })?;
            for (parent, name, inode) in listed {
                let Some(&nth) = by_name.get(&(parent, name.as_slice())) else {
                    continue;
                };
                let Some(name) = self.names.get(nth) else {
                    continue;
                };
                if let Some(found) = found.get_mut(nth) {
                    *found = true;
                }
                let first = *self.inodes.entry(name.id).or_insert(inode);
                if first != inode {
                    self.others.push((nth, inode));
                }
                if matches!(self.tree.node(name.id)?.kind, Kind::Directory(_)) {
                    directories.push((inode, name.id));
                }
            }
        }
        match found
            .iter()
            .zip(self.names.iter())
            .find(|(&found, _)| !found)
        {
            Some((_, name)) => bail!(
                "{}: is missing in the file system that mke2fs made",
                show(&self.names.path(name))
            ),
            None => Ok(()),
        }
    }

    fn script_path(&self) -> PathBuf {
        self.work.path().join("script")
    }

    fn script(&self) -> Result<Script> {
        Script::new(&self.script_path())
    }

    /// Writes the commands that set all metadata of the file system in `image`, and runs debugfs with them.
    fn all(&mut self, image: &Path, geometry: &Geometry) -> Result<()> {
        let mut script = self.script()?;
        self.kinds(&mut script)?;
        let mut coarse = Coarse::default();
        let mut lost = (geometry.inode_size() <= 128).then_some(&mut coarse);
        self.node(&mut script, ROOT, b"", &mut lost)?;
        for nth in 0..self.names.len() {
            let Some(name) = self.names.get(nth).filter(|name| name.first) else {
                continue;
            };
            let (id, path) = (name.id, self.names.path(name));
            self.node(&mut script, id, &path, &mut lost)?;
        }
        warn(&coarse.warnings());
        script.finish()?;
        let mut command = Program::new("debugfs", NEED);
        command
            .arg("-w")
            .arg("-f")
            .arg(self.script_path())
            .arg(image);
        self.stamp.give_to_e2fsprogs(&mut command, self.work);
        // With -f, debugfs exits with 0 even if a command failed. So each line that it prints on standard error,
        // except its banner, is taken for an error; the commands and their output are on standard output. If a
        // new version has another banner, this fails, and no metadata is lost silently.
        let said = command.writes(image).run()?;
        let mut errors = said
            .lines()
            .iter()
            .filter(|line| !line.starts_with("debugfs 1."));
        match errors.next() {
            Some(error) => {
                // The disk with the image is full. If the image itself is, debugfs says something else.
                if is_about_room(error) {
                    let lines = vec![error.clone()];
                    return Err(full("debugfs failed".to_owned(), lines).into());
                }
                let failed = anyhow!("debugfs failed: {error}");
                if !is_full(error) {
                    self.fits(error, geometry.block())?;
                } else if self.is_sized {
                    return Err(failed.context(TOO_SMALL));
                }
                Err(failed)
            }
            None => Ok(()),
        }
    }

    /// If `error`, a message of debugfs, says that the extended attributes of a file are too many for it, returns an
    /// error that names the file whose extended attributes need most: debugfs names none. Otherwise, returns `Ok`. The
    /// file system has blocks of `block` bytes.
    fn fits(&self, error: &str, block: u64) -> Result<()> {
        if !error.contains("ea_set") {
            return Ok(());
        }
        let mut widest = (0, 0, None, None);
        let root = std::iter::once((ROOT, None));
        let names = self.names.iter();
        for (id, name) in root.chain(names.map(|name| (name.id, Some(name)))) {
            let xattrs = &self.tree.node(id)?.meta.xattrs;
            let size = |(name, value): (&Vec<u8>, &Vec<u8>)| name.len() + value.len();
            let sum: usize = xattrs.iter().map(size).sum();
            let need = sum + xattrs.len() * XATTR_ENTRY;
            if need > widest.0 {
                let largest = xattrs.iter().max_by_key(|(_, value)| value.len());
                widest = (need, sum, largest.map(|(xattr, _)| xattr), name);
            }
        }
        let (_, sum, Some(xattr), name) = widest else {
            return Ok(());
        };
        let is_small = sum <= XATTRS;
        if is_small && !error.contains("Insufficient space") {
            return Ok(());
        }
        let path = name.map(|name| self.names.path(name)).unwrap_or_default();
        let file = format!(
            "{}: extended attribute {}",
            show(&path),
            String::from_utf8_lossy(xattr)
        );
        Err(Failure::usage(match is_small && block < 4096 {
            true => format!(
                "{file}: with the others of the file, {sum} bytes are more than an ext4 with blocks of {block} bytes \
                 can hold: use --mkfs-arg=-b4096, or --fs erofs"
            ),
            false => format!(
                "{file}: with the others of the file, {sum} bytes are more than ext4 can hold: use --fs erofs"
            ),
        }))
    }

    /// Writes commands that remove the additional inodes of files with several names, and set the link counts
    /// and device numbers.
    fn kinds(&self, script: &mut Script) -> Result<()> {
        for &(nth, inode) in &self.others {
            let name = self.names.get(nth).context("no such name")?;
            let count = self.links.get(&name.id).copied().unwrap_or(1);
            script.line(format!("kill_file <{inode}>").as_bytes())?;
            script.line(format!("clri <{inode}>").as_bytes())?;
            let first = self.inode(name.id)?;
            script.line(format!("sif <{first}> links_count {count}").as_bytes())?;
        }
        for name in self.names.iter().filter(|name| name.first) {
            if let Some(device) = self.tree.node(name.id)?.device() {
                let inode = self.inode(name.id)?;
                let (old, new) = device_words(device);
                script.line(format!("sif <{inode}> block[0] {old}").as_bytes())?;
                script.line(format!("sif <{inode}> block[1] {new}").as_bytes())?;
            }
        }
        Ok(())
    }

    /// Sets inode and type in the directory entries of devices, sockets and additional names, which mke2fs
    /// may have written with another inode or the type of a fifo.
    fn entries(&self, image: &NamedTempFile, geometry: &Geometry) -> Result<()> {
        let mut wanted: BTreeMap<u32, HashMap<&[u8], Entry>> = BTreeMap::new();
        let others = self.others.iter().map(|&(nth, _)| nth);
        let others: HashSet<usize> = others.collect();
        for (nth, name) in self.names.iter().enumerate() {
            let node = self.tree.node(name.id)?;
            let socket = matches!(node.kind, Kind::Socket);
            if node.device().is_some() || socket || others.contains(&nth) {
                let entry = Entry {
                    inode: self.inode(name.id)?,
                    mode: node.st_mode(),
                };
                let directory = wanted.entry(self.inode(name.parent)?).or_default();
                directory.insert(name.last(), entry);
            }
        }
        let mut script = self.script()?;
        for inode in wanted.keys() {
            script.line(format!("blocks <{inode}>").as_bytes())?;
        }
        script.finish()?;
        let mut command = Program::new("debugfs", NEED);
        command.arg("-f").arg(self.script_path()).arg(image.path());
        let mut blocks: HashMap<u32, Vec<u64>> = HashMap::new();
        let mut current = None;
        let _ = command.each_line(|line| {
            if let Some(inode) = line.strip_prefix("debugfs: blocks <") {
                current = inode.strip_suffix('>').and_then(|inode| inode.parse().ok());
            } else if let Some(inode) = current {
                let numbers = line
                    .split_whitespace()
                    .filter_map(|word| word.parse::<u64>().ok());
                blocks.entry(inode).or_default().extend(numbers);
            }
        })?;
        for (inode, names) in &wanted {
            let blocks = blocks.get(inode).map(Vec::as_slice).unwrap_or_default();
            geometry.change(image.as_file(), *inode, blocks, names)?;
        }
        Ok(())
    }

    fn inode(&self, id: Id) -> Result<u32> {
        let inode = self.inodes.get(&id).copied();
        inode.context("a file has no inode")
    }

    /// Writes commands for the metadata of one node. `coarse` is `Some` if inodes have 128 bytes: the node is added
    /// to it if its time needs more.
    fn node(
        &mut self,
        script: &mut Script,
        id: Id,
        path: &[u8],
        coarse: &mut Option<&mut Coarse>,
    ) -> Result<()> {
        let inode = self.inode(id)?;
        let node = self.tree.node(id)?;
        let meta = &node.meta;
        for (name, value) in &meta.xattrs {
            let place = || format!("{}: extended attribute", show(path));
            let name = quote(name).with_context(place)?;
            let command = if value.len() > LONG_VALUE {
                let file = format!("value{}", self.values);
                self.values += 1;
                std::fs::write(self.work.path().join(&file), value).with_context(place)?;
                let file = self.work.path().join(file);
                let file = quote(file.as_os_str().as_bytes()).with_context(place)?;
                let inode = format!(" <{inode}> ");
                [b"ea_set -f ", file.as_slice(), inode.as_bytes(), &name].concat()
            } else {
                let (start, value) = (format!("ea_set <{inode}> "), escape(value));
                [start.as_bytes(), name.as_slice(), b" ", value.as_bytes()].concat()
            };
            script.line(&command).with_context(place)?;
        }
        script.line(format!("sif <{inode}> mode {}", node.st_mode()).as_bytes())?;
        script.line(format!("sif <{inode}> uid {}", meta.uid).as_bytes())?;
        script.line(format!("sif <{inode}> gid {}", meta.gid).as_bytes())?;
        let mut seconds = meta.mtime.seconds;
        let large = coarse.is_none();
        if let Some(coarse) = coarse {
            if meta.mtime.nanoseconds != 0 {
                coarse.fractions.add(path);
            }
            // `fit` has changed the times that are too early.
            let last = i64::from(i32::MAX);
            if seconds > last {
                coarse.late.add(path);
                seconds = last;
            }
        }
        // `low` is signed. Two bits of the field `_hi` count how often 2^32 seconds are added to it.
        let low = i32::from_le_bytes(low_half(seconds));
        let around = (seconds - i64::from(low)) >> 32;
        let extra = (i64::from(meta.mtime.nanoseconds) << 2) | (around & 3);
        for field in ["atime", "ctime", "mtime", "crtime"] {
            let low = u32::from_le_bytes(low_half(seconds));
            if large || field != "crtime" {
                script.line(format!("sif <{inode}> {field}_lo {low}").as_bytes())?;
            }
            if large {
                script.line(format!("sif <{inode}> {field}_hi {extra}").as_bytes())?;
            }
        }
        Ok(())
    }
}

fn low_half(seconds: i64) -> [u8; 4] {
    let [a, b, c, d, ..] = seconds.to_le_bytes();
    [a, b, c, d]
}

/// Returns the first two block numbers in the inode of a device: the old form of the device number in the
/// first one if major and minor are below 256, otherwise the new form in the second one.
fn device_words(device: super::tree::Device) -> (u32, u32) {
    let super::tree::Device { major, minor } = device;
    match major < 256 && minor < 256 {
        true => ((major << 8) | minor, 0),
        false => (0, (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)),
    }
}

/// Returns name and inode from a line of debugfs's `ls -l`. The line has inode, mode, kind, owner, group, size,
/// date, time, and after one blank the name, in which backslashes and bytes other than printable ASCII are
/// `\xHH`.
fn entry(line: &str) -> Option<(Vec<u8>, u32)> {
    let mut rest = line;
    let mut inode = None;
    for _ in 0..8 {
        let (word, after) = rest.trim_start().split_once(' ')?;
        inode = inode.or(Some(word));
        rest = after;
    }
    let mut bytes = Vec::new();
    while let Some((plain, escaped)) = rest.split_once("\\x") {
        bytes.extend_from_slice(plain.as_bytes());
        bytes.push(u8::from_str_radix(escaped.get(..2)?, 16).ok()?);
        rest = escaped.get(2..)?;
    }
    bytes.extend_from_slice(rest.as_bytes());
    Some((bytes, inode?.parse().ok()?))
}

/// Quotes a word for debugfs: the name of an extended attribute, or the path of a file with a value. An error if the
/// word has a newline, a carriage return or a zero byte, which debugfs cannot handle.
fn quote(bytes: &[u8]) -> Result<Vec<u8>> {
    if bytes.iter().any(|byte| matches!(byte, b'\n' | b'\r' | 0)) {
        return Err(Failure::usage(script::LINE_BREAK));
    }
    let mut quoted = vec![b'"'];
    for &byte in bytes {
        if byte == b'"' {
            quoted.push(b'"');
        }
        quoted.push(byte);
    }
    quoted.push(b'"');
    Ok(quoted)
}

/// Returns a value for debugfs: each byte as `\ooo`.
fn escape(value: &[u8]) -> String {
    let mut text = String::with_capacity(value.len() * 4 + 2);
    text.push('"');
    for byte in value {
        // Writing to a string doesn't fail.
        let _ = write!(text, "\\{byte:03o}");
    }
    text.push('"');
    text
}

#[cfg(test)]
mod tests {
    use super::{
        check_links, device_words, entry, escape, quote, slow_directory, LARGE_DIRECTORY, LINKS,
    };
    use crate::make::mkfs::tree::{Content, Device, Kind, Meta, Node, Tree, ROOT};

    fn add(tree: &mut Tree, kind: Kind) -> usize {
        let meta = Meta::default();
        tree.add(Node { meta, kind })
    }

    #[test]
    fn files_with_too_many_names() -> anyhow::Result<()> {
        let mut tree = Tree::new(Meta::default());
        let file = add(&mut tree, Kind::File(Content::in_place(0)));
        for nth in 0..LINKS {
            tree.link(ROOT, format!("{nth:05}").into(), file)?;
        }
        let links = check_links(&tree.names())?;
        assert_eq!(links.get(&file), Some(&LINKS));
        tree.link(ROOT, b"one more".to_vec(), file)?;
        let error = check_links(&tree.names()).err();
        let error = error.map(|error| error.to_string()).unwrap_or_default();
        assert!(
            error.starts_with("./00000: has 65001 names (hard links)"),
            "{error}"
        );
        Ok(())
    }

    #[test]
    fn directories_that_take_long() -> anyhow::Result<()> {
        let mut tree = Tree::new(Meta::default());
        let directory = add(&mut tree, Kind::Directory(Default::default()));
        tree.link(ROOT, b"large".to_vec(), directory)?;
        let said = |tree: &Tree| slow_directory(tree, &tree.names());
        for nth in 0..LARGE_DIRECTORY {
            if nth % 1000 == 999 {
                assert_eq!(said(&tree)?, None);
            }
            let file = add(&mut tree, Kind::Fifo);
            tree.link(directory, format!("{nth}").into(), file)?;
        }
        let text = said(&tree)?.unwrap_or_default();
        assert!(text.starts_with("./large: has 10000 entries: "), "{text}");
        Ok(())
    }

    #[test]
    fn lines_and_arguments_of_debugfs() {
        let line = |name: &str| {
            let text = "     12  100644 (1)      0      0       5 26-Nov-2026 10:31 ";
            entry(&format!("{text}{name}"))
        };
        assert_eq!(line(" a b "), Some((b" a b ".to_vec(), 12)));
        assert_eq!(line("."), Some((b".".to_vec(), 12)));
        assert_eq!(line("\\x0a\\x5cx"), Some((b"\n\\x".to_vec(), 12)));
        assert_eq!(entry("debugfs: ls"), None);
        assert_eq!(quote(b"a \"b").ok(), Some(b"\"a \"\"b\"".to_vec()));
        assert!(quote(b"a\nb").is_err());
        assert_eq!(escape(b"a\0"), "\"\\141\\000\"");
    }

    #[test]
    fn devices() {
        let words = |major, minor| device_words(Device { major, minor });
        assert_eq!(words(1, 3), (0x103, 0));
        assert_eq!(words(259, 1), (0, 0x10301));
        assert_eq!(words(4095, 1_048_575), (0, 0xffff_ffff));
    }
}
