// SPDX-License-Identifier: GPL-2.0

//! Reads and writes disk images of virtual machines with qemu-img(1).

mod vmdk;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use overlaybd::format::merge::MAX_LAYERS;
use serde::de::IgnoredAny;
use serde::Deserialize;
use tempfile::NamedTempFile;

use crate::files::in_use::InUseArgs;
use crate::files::json::bad;
use crate::files::place::{directory, temp_file};
use crate::input::kind::Kind;
use crate::program::{self, Program};
use crate::terminal::exit::{self, Failure};

/// qemu-img's name of the format of the files of a chain.
const QCOW2: &str = "qcow2";
/// Its name for the format of VMware.
const VMDK: &str = "vmdk";
/// What other files are of an image, in messages.
const BACKING: &str = "its backing file";
const DATA: &str = "a file with its data";
/// Its name for a raw disk.
const RAW: &str = "raw";
/// The character that qemu-img prints for bytes that are not UTF-8.
const UNKNOWN: char = char::REPLACEMENT_CHARACTER;

/// The information from qemu-img on an image.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    virtual_size: u64,
    #[serde(default)]
    encrypted: bool,
    /// The backing file as named in the image.
    backing_filename: Option<String>,
    /// The path of the backing file.
    full_backing_filename: Option<String>,
    backing_filename_format: Option<String>,
    #[serde(default)]
    snapshots: Vec<IgnoredAny>,
    #[serde(default)]
    format_specific: FormatSpecific,
}

#[derive(Debug, Default, Deserialize)]
struct FormatSpecific {
    #[serde(default)]
    data: Data,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Data {
    #[serde(default)]
    corrupt: bool,
    /// The file with the data, if the data isn't in the image.
    data_file: Option<String>,
    /// The files with the data of a vmdk image, which may be the image itself.
    #[serde(default)]
    extents: Vec<Extent>,
}

#[derive(Debug, Deserialize)]
struct Extent {
    filename: String,
}

/// A file of a chain.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) path: PathBuf,
    /// qemu-img's name of its format.
    format: String,
    /// Bytes of the disk.
    size: u64,
}

impl Link {
    /// Makes a raw image, with holes, of the disk that this file and the files below it show. Returns `None`
    /// if the file is a raw image itself.
    pub(crate) fn read(&self, place: &Path) -> Result<Option<NamedTempFile>> {
        match self.format.as_str() {
            RAW => Ok(None),
            format => read(&self.path, format, place).map(Some),
        }
    }
}

/// Makes a raw image, with holes, from an image in another format.
pub(crate) fn read(path: &Path, format: &str, place: &Path) -> Result<NamedTempFile> {
    let from = program::path(path)?;
    let image = temp_file(place)?;
    let mut command = qemu_img(format);
    command.args(["convert", "-f", format, "-O", RAW]);
    command.arg(from).arg(image.path()).writes(image.path());
    command.run()?.tell();
    Ok(image)
}

/// What a chain may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// Whether each of its files becomes a layer, not all of them one.
    pub(crate) layers: bool,
    /// Whether its files may be outside the directory of the topmost one.
    pub(crate) outside: bool,
}

/// Returns the chain of the image at `path`, which has this format, lowest first: the image, its backing file,
/// the backing file of that, and so on. Checks each of them, and the other files that it names: whoever wrote
/// the image may have named any file of this machine.
pub(crate) fn chain(
    path: &Path,
    format: &str,
    in_use: &InUseArgs,
    rules: Rules,
) -> Result<Vec<Link>> {
    let home = match rules.outside {
        true => Home::Anywhere,
        false => Home::of(path)?,
    };
    // All files to read. The processes that may write to one are looked for once, which takes a while where
    // there are many. That comes before an error of qemu-img, which may be of their locks.
    let mut used = BTreeSet::new();
    let walked = walk(path, format, rules.layers, &home, &mut used);
    in_use.check(used.iter().map(PathBuf::as_path))?;
    walked
}

/// Walks the chain for [`chain`]. Adds the paths of its files to `used`.
fn walk(
    path: &Path,
    format: &str,
    layers: bool,
    home: &Home,
    used: &mut BTreeSet<PathBuf>,
) -> Result<Vec<Link>> {
    let mut links: Vec<Link> = Vec::new();
    let mut seen = BTreeSet::new();
    // The path as the user or the image named it, for messages.
    let mut name = path.to_owned();
    let mut format = format.to_owned();
    loop {
        let path = program::path(&name)?;
        let meta = path.metadata();
        let meta = meta.with_context(|| format!("{}: cannot read", name.display()))?;
        if !seen.insert((meta.dev(), meta.ino())) {
            return Err(bad(
                &name,
                "is its own backing file, by way of others or at once: the chain has no end",
            ));
        }
        if layers && links.len() == MAX_LAYERS {
            let what = format!("is number {MAX_LAYERS} of the chain, and has a backing file: a stack has {MAX_LAYERS} layers at most; --flatten makes one layer of all");
            return Err(refused(&name, &what));
        }
        used.insert(path.clone());
        // qemu-img opens the files that a vmdk image names, whatever they are. So this looks first.
        if format == VMDK {
            vmdk::each_part(&path, |part| {
                check_file(&name, DATA, part)?;
                home.check(&name, DATA, part)?;
                used.insert(part.to_owned());
                Ok(())
            })?;
        }
        let info = info(&path, &format)?;
        for part in info.parts(&path) {
            let place = directory(&path).to_string_lossy();
            // If a name of the image begins so itself, the first look has found where it leads.
            let given = part.strip_prefix(&*place);
            let given = given.and_then(|given| given.strip_prefix('/'));
            let part = local(&name, DATA, given.unwrap_or(part), part, &path)?;
            check_file(&name, DATA, &part)?;
            home.check(&name, DATA, &part)?;
            used.insert(part);
        }
        info.check(&name, links.last().filter(|_| layers))?;
        let next = info.backing(&name, &path)?;
        if let Some((next, _)) = &next {
            home.check(&name, BACKING, next)?;
        }
        links.push(Link {
            path,
            format,
            size: info.virtual_size,
        });
        match next {
            Some((next, its_format)) => (name, format) = (next, its_format),
            None => break,
        }
    }
    links.reverse();
    Ok(links)
}

/// Where the other files of an image may be.
enum Home {
    /// In this directory, or below it.
    Directory(PathBuf),
    /// Nowhere: the image is on a block device, in whose directory is any device of this machine.
    Nowhere,
    Anywhere,
}

impl Home {
    /// Returns the directory that the image at `path` is in.
    fn of(path: &Path) -> Result<Self> {
        let path = program::path(path)?;
        let meta = path.metadata();
        let meta = meta.with_context(|| format!("{}: cannot read", path.display()))?;
        Ok(match meta.file_type().is_block_device() {
            true => Self::Nowhere,
            // The path has no links.
            false => Self::Directory(directory(&path).to_owned()),
        })
    }

    /// Checks that the file `other`, which is `what` of the image `name`, may be where it is.
    fn check(&self, name: &Path, what: &str, other: &Path) -> Result<()> {
        let (home, outside) = match self {
            Self::Anywhere => return Ok(()),
            Self::Directory(home) => (Some(home), home.display().to_string()),
            Self::Nowhere => (None, "the block device that the image is on".to_owned()),
        };
        let place = other
            .canonicalize()
            .with_context(|| format!("{}: cannot read", other.display()))?;
        if home.is_some_and(|home| place.starts_with(home)) {
            return Ok(());
        }
        let what = format!(
            "{what}, {}, is outside {outside}: --allow-outside takes it, if you trust who made the image",
            place.display()
        );
        Err(refused(name, &what))
    }
}

/// Returns the path of `given`, which is `what` of the image `name`, at `image`. qemu-img says that its path is
/// `full`, in which [`UNKNOWN`] stands for bytes that are not UTF-8.
fn local(name: &Path, what: &str, given: &str, full: &str, image: &Path) -> Result<PathBuf> {
    // qemu-img's rule to recognise a protocol.
    let is_remote = full
        .split('/')
        .next()
        .is_some_and(|start| start.contains(':'));
    if is_remote {
        let or = match what {
            BACKING => ": `qemu-img rebase' gives it another, or none",
            _ => "",
        };
        let what = format!("{what}, {given}, is no file on this machine{or}");
        return Err(refused(name, &what));
    }
    if given.contains(UNKNOWN) {
        let what = format!(
            "{what}, {given}, has a name that is not UTF-8, or has the character U+FFFD: rename the file, and \
             name it so in the image"
        );
        return Err(refused(name, &what));
    }
    // Only the name of the directory may have such bytes now, and that is known.
    Ok(match full.contains(UNKNOWN) {
        true => directory(image).join(given),
        false => PathBuf::from(full),
    })
}

/// Checks that `path`, which is `what` of the image `name`, is a file or block device that can be read.
fn check_file(name: &Path, what: &str, path: &Path) -> Result<()> {
    let meta = path.metadata();
    if meta
        .as_ref()
        .is_err_and(|error| error.kind() == ErrorKind::NotFound)
    {
        let or = match what {
            BACKING => ", or `qemu-img rebase -u' names another place",
            _ => "",
        };
        let message = format!(
            "{}: {what}, {}, is missing: copy it there{or}",
            name.display(),
            path.display()
        );
        return Err(Failure::error(exit::DEVICE, message));
    }
    let kind = meta.with_context(|| format!("{}: cannot read", path.display()))?;
    if !kind.is_file() && !kind.file_type().is_block_device() {
        let what = format!(
            "{what}, {}, is neither a file nor a block device",
            path.display()
        );
        return Err(refused(name, &what));
    }
    Ok(())
}

/// Checks that the image at `path`, which has this format and was decompressed from the file `name`, needs no
/// other file: a relative path would be relative to another directory.
pub(crate) fn check_alone(path: &Path, name: &Path, format: &str) -> Result<()> {
    let path = program::path(path)?;
    let has_data = |other: &str| {
        let what = format!(
            "is compressed, and has its data in another file, {other}: decompress it, where that is found"
        );
        Err(refused(name, &what))
    };
    if format == VMDK {
        if let Some(part) = vmdk::named(&path)?.first() {
            return has_data(&part.name.to_string_lossy());
        }
    }
    let info = info(&path, format)?;
    info.check(name, None)?;
    if let Some(part) = info.parts(&path).next() {
        return has_data(part);
    }
    match &info.backing_filename {
        None => Ok(()),
        Some(backing) => {
            let what = format!(
                "is compressed, and has a backing file, {backing}: decompress it, where that is found"
            );
            Err(refused(name, &what))
        }
    }
}

impl Info {
    /// Checks that a layer can be made from the image `name`. `above` is the image whose backing file it is.
    fn check(&self, name: &Path, above: Option<&Link>) -> Result<()> {
        if self.encrypted {
            return Err(refused(
                name,
                "is encrypted, and obdsetup asks for no key: `qemu-img convert' with the key makes an image \
                 without encryption",
            ));
        }
        if self.format_specific.data.corrupt {
            return Err(bad(
                name,
                "is marked as corrupt: `qemu-img check' says what is wrong, and -r all repairs what it can",
            ));
        }
        if let Some(data) = &self.format_specific.data.data_file {
            let what = format!(
                "has its data in another file, {data}: `qemu-img convert -O qcow2' makes an image that has all"
            );
            return Err(refused(name, &what));
        }
        if let Some(above) = above.filter(|above| above.size < self.virtual_size) {
            let what = format!(
                "is for a disk of {} bytes, and its backing file, {}, has a larger disk, of {} bytes: a layer \
                 cannot cut off the end; --flatten makes one layer of all",
                above.size,
                name.display(),
                self.virtual_size
            );
            return Err(refused(&above.path, &what));
        }
        if !self.snapshots.is_empty() {
            crate::terminal::tell(&format!(
                "note: {}: has {} internal snapshots, which are left out: the layer is of its present state",
                name.display(),
                self.snapshots.len()
            ));
        }
        Ok(())
    }

    /// Returns the paths of the files with the data of the image at `path`, except itself.
    fn parts<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = &'a str> {
        let extents = self.format_specific.data.extents.iter();
        let names = extents.map(|extent| extent.filename.as_str());
        let itself = path.to_string_lossy();
        names.filter(move |name| *name != itself)
    }

    /// Returns the backing file of the image `name`, at `image`, and its format.
    fn backing(&self, name: &Path, image: &Path) -> Result<Option<(PathBuf, String)>> {
        let Some(backing) = &self.backing_filename else {
            return Ok(None);
        };
        let full = self.full_backing_filename.as_ref().unwrap_or(backing);
        // An absolute path, because qemu-img got an absolute path of the image.
        let path = local(name, BACKING, backing, full, image)?;
        check_file(name, BACKING, &path)?;
        let Some(format) = &self.backing_filename_format else {
            let what = format!(
                "does not say which format its backing file, {}, has, and a guess may be wrong: `qemu-img rebase \
                 -u -F FORMAT -b NAME' notes it",
                path.display()
            );
            return Err(refused(name, &what));
        };
        if format != RAW && !Kind::is_for_qemu(format) {
            let what = format!(
                "its backing file, {}, has the format {format}, of which obdsetup makes no layers: `qemu-img \
                 convert -O qcow2' makes a qcow2 of the whole",
                path.display()
            );
            return Err(refused(name, &what));
        }
        Ok(Some((path, format.clone())))
    }
}

/// Returns the information from qemu-img on the image at `path`, which is absolute. qemu-img reads only the
/// head of the image.
fn info(path: &Path, format: &str) -> Result<Info> {
    let mut text = String::new();
    let mut command = qemu_img(format);
    command.args(["info", "--output=json", "-f", format]);
    let said = command.arg(path).each_line(|line| {
        text.push_str(line);
        text.push('\n');
    })?;
    said.tell();
    serde_json::from_str(&text)
        .with_context(|| format!("{}: cannot read what qemu-img tells of it", path.display()))
}

/// Makes the qcow2 image `to`, with holes, from the raw image `from`.
pub(crate) fn write(from: &Path, to: &Path) -> Result<()> {
    let mut command = qemu_img(QCOW2);
    command.args(["convert", "-f", RAW, "-O", QCOW2]);
    command.arg(from).arg(to).writes(to);
    command.run().map(|said| said.tell())
}

/// Makes the qcow2 image `to` from the differences between the raw image `from`, an absolute path, and the
/// qcow2 image `below`, which becomes its backing file. `below` is in the same directory as `to`.
pub(crate) fn write_over(from: &Path, below: &OsStr, to: &Path) -> Result<()> {
    // First makes an empty image over `from`. The rebase to `below` adds the differences, but with zeros as
    // data. The conversion then makes an image without data for zeros.
    let difference = temp_file(directory(to))?;
    let run = |args: &[&OsStr]| {
        let mut command = qemu_img(QCOW2);
        command.args(args).writes(difference.path()).writes(to);
        command.run().map(|said| said.tell())
    };
    let (difference, qcow2) = (difference.path().as_os_str(), OsStr::new(QCOW2));
    let word = OsStr::new;
    let from = from.as_os_str();
    run(&[
        word("create"),
        word("-q"),
        word("-f"),
        qcow2,
        word("-F"),
        word(RAW),
        word("-b"),
        from,
        difference,
    ])?;
    run(&[
        word("rebase"),
        word("-f"),
        qcow2,
        word("-F"),
        qcow2,
        word("-b"),
        below,
        difference,
    ])?;
    run(&[
        word("convert"),
        word("-f"),
        qcow2,
        word("-O"),
        qcow2,
        word("-F"),
        qcow2,
        word("-B"),
        below,
        difference,
        to.as_os_str(),
    ])
}

/// Returns the program qemu-img, not started, for images of this format.
fn qemu_img(format: &str) -> Program {
    Program::new("qemu-img", format!("{format} images"))
}

fn refused(path: &Path, what: &str) -> anyhow::Error {
    Failure::usage(format!("{}: {what}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn homes() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let image = dir.path().join("image");
        std::fs::write(&image, "")?;
        let home = Home::of(&image)?;
        home.check(&image, DATA, &image)?;
        let said = |home: &Home, other: &str| {
            let error = home.check(&image, DATA, Path::new(other)).err();
            error.map_or_else(String::new, |error| error.to_string())
        };
        assert!(said(&home, "/dev/null").contains("/dev/null, is outside "));
        assert_eq!(said(&Home::Anywhere, "/dev/null"), "");
        // Not even what is beside it.
        let said = said(&Home::Nowhere, "/dev/null");
        assert!(said.contains("is outside the block device"), "{said}");
        Ok(())
    }

    #[test]
    fn names_that_are_no_text() {
        use std::os::unix::ffi::OsStrExt;

        let image = Path::new(OsStr::from_bytes(b"/d\xff/image"));
        let name = Path::new("image");
        let path = |given: &str, full: &str| local(name, BACKING, given, full, image).ok();
        // qemu-img prints the name of the directory like this.
        let wanted = Path::new(OsStr::from_bytes(b"/d\xff/x"));
        assert_eq!(path("x", "/d\u{fffd}/x").as_deref(), Some(wanted));
        assert_eq!(path("/a/x", "/a/x").as_deref(), Some(Path::new("/a/x")));
        assert_eq!(path("x\u{fffd}", "/a/x\u{fffd}"), None);
        // Of another directory, which has this name.
        assert_eq!(path("/d\u{fffd}/x", "/d\u{fffd}/x"), None);
        assert_eq!(path("nbd:x", "nbd:x"), None);
    }
}
