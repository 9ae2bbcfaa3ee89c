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

use crate::exit::{self, Failure};
use crate::in_use::InUseArgs;
use crate::json::bad;
use crate::kind::Kind;
use crate::output::{directory, temp_file};
use crate::program::{self, Program};

/// qemu-img's name of the format of the files of a chain.
const QCOW2: &str = "qcow2";
/// Its name for the format of VMware.
const VMDK: &str = "vmdk";
/// What other files are of an image, in messages.
const BACKING: &str = "its backing file";
const DATA: &str = "a file with its data";
/// Its name for a raw disk.
const RAW: &str = "raw";

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
    let mut links: Vec<Link> = Vec::new();
    let top = program::path(path)?;
    let home = directory(&top);
    let home = home
        .canonicalize()
        .with_context(|| format!("{}: cannot read", home.display()))?;
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
        if rules.layers && links.len() == MAX_LAYERS {
            let what = format!("is number {MAX_LAYERS} of the chain, and has a backing file: a stack has {MAX_LAYERS} layers at most; --flatten makes one layer of all");
            return Err(refused(&name, &what));
        }
        in_use.check([path.as_path()])?;
        let check_part = |part: &str| -> Result<()> {
            let part = usable(&name, DATA, part, part)?;
            if !rules.outside {
                check_inside(&name, DATA, &part, &home)?;
            }
            in_use.check([part.as_path()])
        };
        // qemu-img opens the files that a vmdk image names, whatever they are. So this looks first.
        if format == VMDK {
            for part in vmdk::parts(&path)? {
                check_part(&part)?;
            }
        }
        let info = info(&path, &format)?;
        for part in info.parts(&path) {
            check_part(part)?;
        }
        info.check(&name, links.last().filter(|_| rules.layers))?;
        let next = info.backing(&name)?;
        if let Some((next, _)) = next.as_ref().filter(|_| !rules.outside) {
            check_inside(&name, BACKING, next, &home)?;
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

/// Checks that the file `other`, which is `what` of the image `name`, is in the directory `home` or below.
fn check_inside(name: &Path, what: &str, other: &Path, home: &Path) -> Result<()> {
    let place = other
        .canonicalize()
        .with_context(|| format!("{}: cannot read", other.display()))?;
    if place.starts_with(home) {
        return Ok(());
    }
    let what = format!(
        "{what}, {}, is outside {}: --allow-outside takes it, if you trust who made the image",
        place.display(),
        home.display()
    );
    Err(refused(name, &what))
}

/// Checks that `full` is the path of a file or block device that can be read: of `other`, which is `what` of
/// the image `name`. Returns the path.
fn usable(name: &Path, what: &str, other: &str, full: &str) -> Result<PathBuf> {
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
        let what = format!("{what}, {other}, is no file on this machine{or}");
        return Err(refused(name, &what));
    }
    let path = PathBuf::from(full);
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
    Ok(path)
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
            return has_data(part);
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
            crate::tell(&format!(
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
        names.filter(move |name| Path::new(name) != path)
    }

    /// Returns the backing file of the image `name`, and its format.
    fn backing(&self, name: &Path) -> Result<Option<(PathBuf, String)>> {
        let Some(backing) = &self.backing_filename else {
            return Ok(None);
        };
        let full = self.full_backing_filename.as_ref().unwrap_or(backing);
        // An absolute path, because qemu-img got an absolute path of the image.
        let path = usable(name, BACKING, backing, full)?;
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
