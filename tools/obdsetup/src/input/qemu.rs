// SPDX-License-Identifier: GPL-2.0

//! Reads and writes disk images of virtual machines with qemu-img(1).

mod truncated;
mod vmdk;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use overlaybd::format::merge::MAX_LAYERS;
use overlaybd::format::num::{to_u64, to_usize};
use overlaybd::format::Blob;
use overlaybd::FileBlob;
use serde::de::IgnoredAny;
use serde::Deserialize;
use tempfile::NamedTempFile;

use crate::files::in_use::InUseArgs;
use crate::files::json::bad;
use crate::files::place::{directory, temp_file};
use crate::input::kind::{self, Kind};
use crate::program::{self, Program};
use crate::terminal::exit::{self, is_full, Failure, Lines};
use crate::terminal::interrupt;

/// qemu-img's names of formats: the format in which this module writes images, the format of VMware, and a disk
/// without a format.
const QCOW2: &str = "qcow2";
const VMDK: &str = "vmdk";
const RAW: &str = "raw";
/// What messages call another file that belongs to an image.
const BACKING: &str = "its backing file";
const DATA: &str = "a file with its data";
/// The character that qemu-img prints for bytes that are not UTF-8.
const UNKNOWN: char = char::REPLACEMENT_CHARACTER;

/// The information from qemu-img on an image.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    virtual_size: u64,
    #[serde(default)]
    encrypted: bool,
    /// The name of the backing file, as it is in the image.
    backing_filename: Option<String>,
    /// The path of the backing file, which qemu-img computes from this name and the path of the image.
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
    /// The files with the data of a vmdk image. One of them may be the image itself.
    #[serde(default)]
    extents: Vec<Extent>,
}

#[derive(Debug, Deserialize)]
struct Extent {
    filename: String,
}

/// An image of a chain: the topmost image, its backing file, the backing file of that, and so on.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) path: PathBuf,
    /// The format of the image, as qemu-img calls it.
    format: String,
    /// Size of the virtual disk in bytes.
    size: u64,
    /// All files of the chain.
    files: Arc<BTreeSet<PathBuf>>,
}

impl Link {
    /// Returns all files of the chain.
    pub(crate) fn files(&self) -> Vec<&Path> {
        self.files.iter().map(PathBuf::as_path).collect()
    }

    /// Makes a temporary raw image, with holes, in the directory `place`: the disk that this image shows together
    /// with the images below it. Returns `None` if this image is raw, so that it can be read directly.
    pub(crate) fn read(&self, place: &Path) -> Result<Option<NamedTempFile>> {
        match self.format.as_str() {
            RAW => Ok(None),
            format => read(&self.path, &self.path, format, &self.files(), place).map(Some),
        }
    }
}

/// Makes a temporary raw image, with holes, in the directory `place` from the image at `path`, which has another format.
/// `name` is the name of the image in messages. `files` are all files that qemu-img reads for that.
pub(crate) fn read(
    path: &Path,
    name: &Path,
    format: &str,
    files: &[&Path],
    place: &Path,
) -> Result<NamedTempFile> {
    let from = program::path(path)?;
    let image = temp_file(place)?;
    let mut command = qemu_img(format);
    command.args(["convert", "-f", format, "-O", RAW]);
    command.arg(from).arg(image.path()).writes(image.path());
    let done = command.run().map_err(|error| match is_full(&error) {
        // Of the copy, not of the image.
        true => error,
        false => named(name, files, error),
    });
    done?.tell();
    if let Some(what) = kind::fault_of_copy(name, image.path())? {
        let what = format!(
            "its disk is too short: {what}: incomplete when the image was made? `qemu-img convert -O raw' makes a disk \
             of the image as it is, and `convert --from raw' takes that"
        );
        return Err(bad(name, &what));
    }
    Ok(image)
}

/// What the caller makes of a chain, and which files the images may name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// Whether each image of the chain becomes a layer. Otherwise the whole chain becomes one layer.
    pub(crate) layers: bool,
    /// Whether the files that the images name may be outside the directory of the topmost image.
    pub(crate) outside: bool,
}

/// Returns the chain of the image at `path`, which has the format `format`. The first element is the lowest
/// image, which has no backing file; the last one is the image at `path`. Checks each image and all files that
/// it names: whoever wrote the image may have named any file of this machine.
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
    // All files that will be read. The search for processes that may write to them is slow if there are many
    // processes, so it is done once for all files. The error of this search takes precedence over an error of
    // `walk`, because qemu-img also fails if such a process has locked a file.
    let mut used = BTreeSet::new();
    let walked = walk(path, format, rules.layers, &home, &mut used);
    in_use.check(used.iter().map(PathBuf::as_path))?;
    let mut links = walked?;
    let files = Arc::new(used);
    for link in &mut links {
        link.files = Arc::clone(&files);
    }
    Ok(links)
}

/// Walks the chain for [`chain`], which sets `files` of all links. Adds the paths of all files that will be read to
/// `used`.
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
                "is its own backing file, directly or through others: the chain has no end",
            ));
        }
        if layers && links.len() == MAX_LAYERS {
            let what = format!(
                "is image {} of the chain, counted from the topmost one: a stack has {MAX_LAYERS} layers at most; \
                 --flatten makes one layer of all",
                MAX_LAYERS + 1
            );
            return Err(refused(&name, &what));
        }
        used.insert(path.clone());
        // qemu-img opens the files that a vmdk image names, even devices and FIFOs. So they are checked before
        // qemu-img is started.
        if format == VMDK {
            vmdk::check_descriptor(&path, &name)?;
            vmdk::each_part(&path, |part| {
                check_file(&name, DATA, part)?;
                home.check(&name, DATA, part)?;
                used.insert(part.to_owned());
                Ok(())
            })?;
        }
        let info = {
            let files: Vec<&Path> = used.iter().map(PathBuf::as_path).collect();
            info(&path, &name, &format, &files)?
        };
        let place = one_unknown(&directory(&path).to_string_lossy());
        for part in info.parts(&path) {
            interrupt::check()?;
            let part = one_unknown(part);
            // qemu-img puts the directory before a relative name; it is removed to get the name in the image. The
            // result is wrong if the image has an absolute name that begins with the directory. That is harmless:
            // `vmdk::each_part` has checked the file to which this name leads.
            let given = part.strip_prefix(&place);
            let given = given.and_then(|given| given.strip_prefix('/'));
            let part = local(&name, DATA, given.unwrap_or(&part), &part, &path)?;
            check_file(&name, DATA, &part)?;
            home.check(&name, DATA, &part)?;
            used.insert(part);
        }
        info.check(&name, links.last().filter(|_| layers))?;
        // A backing file without a disk is fine if the chain becomes one layer.
        if layers || links.is_empty() {
            info.check_size(&name, way_to_enlarge(&format))?;
        }
        truncated::check(&path, &name, &format, info.virtual_size)?;
        let next = info.backing(&name, &path)?;
        if let Some((next, _)) = &next {
            home.check(&name, BACKING, next)?;
        }
        links.push(Link {
            path,
            format,
            size: info.virtual_size,
            files: Arc::default(),
        });
        match next {
            Some((next, its_format)) => (name, format) = (next, its_format),
            None => break,
        }
    }
    links.reverse();
    Ok(links)
}

/// Where the other files that an image names may be.
enum Home {
    /// In this directory, or below it.
    Directory(PathBuf),
    /// Nowhere: the image is on a block device. In its directory are all other devices of this machine, too.
    Nowhere,
    Anywhere,
}

impl Home {
    /// Returns where the other files of the image at `path` may be unless the user permits more: in the
    /// directory of the image, or nowhere if the image is on a block device.
    fn of(path: &Path) -> Result<Self> {
        let path = program::path(path)?;
        let meta = path.metadata();
        let meta = meta.with_context(|| format!("{}: cannot read", path.display()))?;
        Ok(match meta.file_type().is_block_device() {
            true => Self::Nowhere,
            // `program::path` has resolved all symbolic links.
            false => Self::Directory(directory(&path).to_owned()),
        })
    }

    /// Checks that the file `other`, which the image `name` names, is in a permitted place. `what` is [`BACKING`] or
    /// [`DATA`].
    fn check(&self, name: &Path, what: &str, other: &Path) -> Result<()> {
        let (home, outside) = match self {
            Self::Anywhere => return Ok(()),
            Self::Directory(home) => (Some(home), format!("outside {}", home.display())),
            Self::Nowhere => (None, "not on the block device of the image".to_owned()),
        };
        let place = other
            .canonicalize()
            .with_context(|| format!("{}: cannot read", other.display()))?;
        if home.is_some_and(|home| place.starts_with(home)) {
            return Ok(());
        }
        let what = format!(
            "{what}, {}, is {outside}: --allow-outside permits that, if you trust who made the image",
            place.display()
        );
        Err(refused(name, &what))
    }
}

/// Replaces several [`UNKNOWN`] in a row in a name by one: for the same bytes, qemu-img and Rust may write this
/// character a different number of times.
fn one_unknown(name: &str) -> String {
    let mut one = String::with_capacity(name.len());
    for c in name.chars() {
        if c != UNKNOWN || !one.ends_with(UNKNOWN) {
            one.push(c);
        }
    }
    one
}

/// Returns the path of a file that the image `name` names. `what` is [`BACKING`] or [`DATA`]. `given` is the name
/// of the file as stored in the image, and `full` is the path of the file as qemu-img prints it, with [`UNKNOWN`]
/// in place of bytes that are not UTF-8. `image` is the absolute path of the image.
fn local(name: &Path, what: &str, given: &str, full: &str, image: &Path) -> Result<PathBuf> {
    // By this rule, qemu-img recognises a name with a protocol.
    let is_remote = full
        .split('/')
        .next()
        .is_some_and(|start| start.contains(':'));
    if is_remote {
        let why = match given.split(':').next() {
            Some("json") => "is described with options of QEMU, and obdsetup takes only the name of a file",
            Some("file") => "is named with file: in front, and obdsetup takes only the name itself",
            _ => "is no file on this machine, or has a colon in its name and no directory in front of it",
        };
        let or = match what {
            BACKING => ": `qemu-img rebase -u' changes the name in the image",
            _ => "",
        };
        return Err(refused(name, &format!("{what}, {given}, {why}{or}")));
    }
    if given.contains(UNKNOWN) {
        let what = format!(
            "{what}, {given}, has a name that is not UTF-8, or has the character U+FFFD: rename the file, and \
             put the new name into the image"
        );
        return Err(refused(name, &what));
    }
    // `given` has only UTF-8. So the other bytes are in the name of the image's directory, which `image` has exactly.
    Ok(match full.contains(UNKNOWN) {
        true => directory(image).join(given),
        false => PathBuf::from(full),
    })
}

/// Checks that the file `path` of the image `name` exists, and is a regular file or a block device. `what` is
/// [`BACKING`] or [`DATA`].
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

/// Checks that the image at `path`, which has the format `format`, needs no other file. The image is a temporary
/// file, decompressed from the file `name`: relative names in it would lead from the wrong directory.
pub(crate) fn check_alone(path: &Path, name: &Path, format: &str) -> Result<()> {
    let path = program::path(path)?;
    let has_data = |other: &str| {
        let what = format!(
            "is compressed, and has its data in another file, {other}: decompress the image where this name leads \
             to that file"
        );
        Err(refused(name, &what))
    };
    if format == VMDK {
        vmdk::check_descriptor(&path, name)?;
        if let Some(part) = vmdk::named(&path)?.first() {
            return has_data(&part.name.to_string_lossy());
        }
    }
    let info = info(&path, name, format, &[&path])?;
    info.check(name, None)?;
    info.check_size(name, MAKE_AGAIN)?;
    if let Some(part) = info.parts(&path).next() {
        return has_data(part);
    }
    match &info.backing_filename {
        None => truncated::check(&path, name, format, info.virtual_size),
        Some(backing) => {
            let what = format!(
                "is compressed, and has a backing file, {backing}: decompress the image where this name leads to \
                 that file"
            );
            Err(refused(name, &what))
        }
    }
}

impl Info {
    /// Checks that a layer can be made from the image `name`. `above` is the image that has `name` as its backing
    /// file; `None` if there is no such image, or if the images don't become separate layers.
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
                "is marked as corrupt: `qemu-img check' says what is wrong, and `qemu-img check -r all' repairs \
                 what it can",
            ));
        }
        if let Some(data) = &self.format_specific.data.data_file {
            let what = format!(
                "has its data in another file, {data}: `qemu-img convert -O qcow2' makes an image that has its \
                 data itself"
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
                "note: {}: has {} internal snapshots, which are left out: the layer has the present state of the \
                 disk",
                name.display(),
                self.snapshots.len()
            ));
        }
        Ok(())
    }

    /// Checks that the image `name` has a disk. `advice` is what to do if it has none.
    fn check_size(&self, name: &Path, advice: &str) -> Result<()> {
        if self.virtual_size == 0 {
            let what = format!("is for a disk of 0 bytes: no layer can be made of that; {advice}");
            return Err(refused(name, &what));
        }
        Ok(())
    }

    /// Returns the paths, as qemu-img prints them, of the files with the data of the image at `path`, without the
    /// image itself.
    fn parts<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = &'a str> {
        let extents = self.format_specific.data.extents.iter();
        let names = extents.map(|extent| extent.filename.as_str());
        let itself = one_unknown(&path.to_string_lossy());
        names.filter(move |name| one_unknown(name) != itself)
    }

    /// Returns the path and the format of the backing file of the image `name`; `None` if it has none. `image`
    /// is the absolute path of the image.
    fn backing(&self, name: &Path, image: &Path) -> Result<Option<(PathBuf, String)>> {
        let Some(backing) = &self.backing_filename else {
            return Ok(None);
        };
        let full = self.full_backing_filename.as_ref().unwrap_or(backing);
        // `full` is absolute, because qemu-img got an absolute path of the image.
        let path = local(name, BACKING, backing, full, image)?;
        check_file(name, BACKING, &path)?;
        let Some(format) = &self.backing_filename_format else {
            let what = format!(
                "does not say which format its backing file, {}, has, and a guess may be wrong: `qemu-img rebase \
                 -u -F FORMAT -b NAME IMAGE' puts the format into the image",
                path.display()
            );
            return Err(refused(name, &what));
        };
        if format != RAW && !Kind::is_for_qemu(format) {
            let what = format!(
                "its backing file, {}, has the format {format}, of which obdsetup makes no layers: `qemu-img \
                 convert -O qcow2' makes one qcow2 of the image and its backing files",
                path.display()
            );
            return Err(refused(name, &what));
        }
        Ok(Some((path, format.clone())))
    }
}

/// What to do if qemu-img cannot make the disk of an image larger.
const MAKE_AGAIN: &str = "make the image again";

/// Returns how to make the disk of an image larger. QEMU can do that only in some formats.
fn way_to_enlarge(format: &str) -> &'static str {
    match format {
        QCOW2 | "qed" => "`qemu-img resize' makes the disk larger",
        RAW => "`qemu-img resize -f raw' makes the disk larger",
        _ => MAKE_AGAIN,
    }
}

/// Returns the information from qemu-img on the image at `path`, which is absolute. Messages call it `name`.
/// qemu-img reads only the header of the image, and opens the other files with its data. `files` has all of these.
fn info(path: &Path, name: &Path, format: &str, files: &[&Path]) -> Result<Info> {
    let mut text = String::new();
    let mut command = qemu_img(format);
    command.args(["info", "--output=json", "-f", format]);
    let said = command.arg(path).each_line(|line| {
        text.push_str(line);
        text.push('\n');
    });
    said.map_err(|error| named(name, files, error))?.tell();
    serde_json::from_str(&text).with_context(|| {
        format!(
            "{}: cannot understand what `qemu-img info' prints",
            name.display()
        )
    })
}

/// Makes the qcow2 image `to`, with holes, from the raw image `from`.
pub(crate) fn write(from: &Path, to: &Path) -> Result<()> {
    let mut command = qemu_img(QCOW2);
    command.args(["convert", "-f", RAW, "-O", QCOW2]);
    command.arg(from).arg(to).writes(to);
    let done = command.run().map_err(not_written);
    done.map(|said| said.tell())
}

/// Makes the qcow2 image `to`. Its backing file is the qcow2 image `below`, and it has the differences between
/// `below` and the raw image `from`. `from` is an absolute path; `below` is the name of a file in the directory
/// of `to`.
pub(crate) fn write_over(from: &Path, below: &OsStr, to: &Path) -> Result<()> {
    // create: makes an empty image with the backing file `from`. rebase: makes `below` the backing file, and
    // copies the differences to the image, with zeros as data. convert: replaces clusters of zeros by marks
    // without data.
    let difference = temp_file(directory(to))?;
    let run = |args: &[&OsStr]| {
        let mut command = qemu_img(QCOW2);
        command.args(args).writes(difference.path()).writes(to);
        let done = command.run().map_err(not_written);
        done.map(|said| said.tell())
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

/// Returns the program qemu-img, which is not started yet. If it is missing, the message names `format`.
fn qemu_img(format: &str) -> Program {
    let mut program = Program::new("qemu-img", format!("{format} images"));
    // It opens all extents of a vmdk at once.
    program.opens_many_files();
    program
}

/// Returns the error with the name of the image, which qemu-img doesn't print if it cannot read the data, and of
/// which it prints the path if the image is a temporary file. The exit code says whose fault it is. `files` are the
/// files that qemu-img has read.
fn named(name: &Path, files: &[&Path], mut error: anyhow::Error) -> anyhow::Error {
    let Some(said) = error.downcast_mut::<Lines>() else {
        return error;
    };
    let cause = Cause::of(said.status, &said.lines);
    said.code = match cause {
        Cause::Code(code) => code,
        Cause::Image => exit::BAD_IMAGE,
        Cause::ImageOrDevice => match files.iter().try_for_each(|file| read_all(file)) {
            Ok(()) => exit::BAD_IMAGE,
            Err(error) if exit::code(&error) == exit::INTERRUPTED => return error,
            Err(_) => exit::DEVICE,
        },
        Cause::Output => {
            said.code = exit::DEVICE;
            return error.context("cannot write a temporary file");
        }
        Cause::ManyFiles => {
            said.code = exit::USAGE;
            return error.context(format!(
                "{}: has more files than a program may have open: raise the limit, `ulimit -n'",
                name.display()
            ));
        }
    };
    error.context(format!("{}: cannot read", name.display()))
}

/// Returns the error of qemu-img, which was to make an image of files that obdsetup has made, with the exit code for
/// the cause. None is the fault of an image.
fn not_written(mut error: anyhow::Error) -> anyhow::Error {
    if is_full(&error) {
        return error;
    }
    if let Some(said) = error.downcast_mut::<Lines>() {
        said.code = match Cause::of(said.status, &said.lines) {
            Cause::Code(code) => code,
            Cause::Output | Cause::ImageOrDevice => exit::DEVICE,
            Cause::Image | Cause::ManyFiles => exit::USAGE,
        };
    }
    error
}

/// Why qemu-img has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// Neither the image nor the output. The exit code says what.
    Code(u8),
    /// The image.
    Image,
    /// The image, or the device that it is on: qemu-img prints the same for both.
    ImageOrDevice,
    /// The output cannot be written.
    Output,
    /// It may not have as many files open as the image has.
    ManyFiles,
}

impl Cause {
    /// Returns the cause of a failure of qemu-img with this exit status, and with these lines. qemu-img itself has one
    /// exit status for all failures.
    fn of(status: Option<i32>, lines: &[String]) -> Self {
        const CAUSES: &[(&str, Cause)] = &[
            ("error while writing", Cause::Output),
            ("Permission denied", Cause::Code(exit::PERMISSION)),
            ("Operation not permitted", Cause::Code(exit::PERMISSION)),
            // The image is locked by another process.
            ("Failed to get ", Cause::Code(exit::BUSY)),
            ("Device or resource busy", Cause::Code(exit::BUSY)),
            ("Too many open files", Cause::ManyFiles),
            // This qemu-img was built without the format.
            ("Unknown driver", Cause::Code(exit::USAGE)),
            // Such as: 'file' driver requires 'x' to be a regular file.
            ("driver requires", Cause::Code(exit::USAGE)),
            // It is too old.
            ("unrecognized option", Cause::Code(exit::USAGE)),
            ("Cannot allocate memory", Cause::Code(exit::USAGE)),
            ("Resource temporarily unavailable", Cause::Code(exit::USAGE)),
            // The file or the device is gone, or a server of files.
            ("No such file", Cause::Code(exit::DEVICE)),
            ("No such device", Cause::Code(exit::DEVICE)),
            ("No medium found", Cause::Code(exit::DEVICE)),
            ("Stale file handle", Cause::Code(exit::DEVICE)),
            ("Transport endpoint", Cause::Code(exit::DEVICE)),
            ("Connection timed out", Cause::Code(exit::DEVICE)),
            ("Host is down", Cause::Code(exit::DEVICE)),
            ("Remote I/O error", Cause::Code(exit::DEVICE)),
            ("Software caused connection", Cause::Code(exit::DEVICE)),
            // Of compressed data that is damaged, too.
            ("Input/output error", Cause::ImageOrDevice),
            // What some file systems say of their own damage.
            ("Structure needs cleaning", Cause::ImageOrDevice),
            ("Bad message", Cause::ImageOrDevice),
        ];
        // A signal, a bug, or a program that cannot be started, for example because a library is missing.
        if status != Some(1) || lines.is_empty() {
            return Self::Code(exit::USAGE);
        }
        let says = |text: &str| lines.iter().any(|line| line.contains(text));
        let found = CAUSES.iter().find(|(text, _)| says(text));
        found.map_or(Self::Image, |(_, cause)| *cause)
    }
}

/// Reads all data of the file at `path`, to find out whether that is possible.
fn read_all(path: &Path) -> Result<()> {
    /// Number of bytes that are read at once.
    const PIECE: usize = 1 << 20;
    let file = FileBlob::open(path, None)?;
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while let Some(data) = file.next_data(at) {
        at = data.start;
        while at < data.end {
            interrupt::check()?;
            let len = to_usize((data.end - at).min(to_u64(PIECE)));
            let piece = piece.get_mut(..len).unwrap_or_default();
            file.read_at(at, piece)?;
            at += to_u64(len);
        }
    }
    Ok(())
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
        // For an image on a block device, other devices are refused, too.
        let said = said(&Home::Nowhere, "/dev/null");
        assert!(said.contains("is not on the block device"), "{said}");
        Ok(())
    }

    #[test]
    fn failures_of_qemu_img() {
        let cause = |status, line: &str| Cause::of(status, &[line.to_owned()]);
        for (line, wanted) in [
            (
                "Could not open 'x': Image is not in qcow2 format",
                Cause::Image,
            ),
            (
                "error while reading at byte 0: Invalid argument",
                Cause::Image,
            ),
            (
                "error while reading at byte 0: Input/output error",
                Cause::ImageOrDevice,
            ),
            (
                "error while writing at byte 0: Input/output error",
                Cause::Output,
            ),
            (
                "Could not open 'x': Permission denied",
                Cause::Code(exit::PERMISSION),
            ),
            (
                "Failed to get shared \"write\" lock",
                Cause::Code(exit::BUSY),
            ),
            (
                "Could not open 'x': Unknown driver 'qed'",
                Cause::Code(exit::USAGE),
            ),
            (
                "'file' driver requires '/dev/x' to be a regular file",
                Cause::Code(exit::USAGE),
            ),
            (
                "Could not open '/x/3': Too many open files",
                Cause::ManyFiles,
            ),
            (
                "error while reading at byte 0: Stale file handle",
                Cause::Code(exit::DEVICE),
            ),
            (
                "Could not open '/x': No such file or directory",
                Cause::Code(exit::DEVICE),
            ),
        ] {
            assert_eq!(cause(Some(1), line), wanted, "{line}");
            for status in [None, Some(127)] {
                assert_eq!(cause(status, line), Cause::Code(exit::USAGE), "{line}");
            }
        }
        assert_eq!(Cause::of(Some(1), &[]), Cause::Code(exit::USAGE));
    }

    #[test]
    fn files_that_can_be_read() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("file");
        std::fs::write(&path, vec![1_u8; (2 << 20) + 7])?;
        read_all(&path)?;
        std::fs::remove_file(&path)?;
        let error = read_all(&path).err();
        assert_eq!(error.map(|error| exit::code(&error)), Some(exit::DEVICE));
        Ok(())
    }

    #[test]
    fn names_that_are_not_utf8() {
        use std::os::unix::ffi::OsStrExt;

        let image = Path::new(OsStr::from_bytes(b"/d\xff/image"));
        let name = Path::new("image");
        let path = |given: &str, full: &str| local(name, BACKING, given, full, image).ok();
        // qemu-img prints U+FFFD for the byte 0xff in the name of this directory.
        let wanted = Path::new(OsStr::from_bytes(b"/d\xff/x"));
        assert_eq!(path("x", "/d\u{fffd}/x").as_deref(), Some(wanted));
        assert_eq!(path("/a/x", "/a/x").as_deref(), Some(Path::new("/a/x")));
        assert_eq!(path("x\u{fffd}", "/a/x\u{fffd}"), None);
        // An absolute name in the image, in which a directory has U+FFFD in its name.
        assert_eq!(path("/d\u{fffd}/x", "/d\u{fffd}/x"), None);
        assert_eq!(path("nbd:x", "nbd:x"), None);
    }

    #[test]
    fn numbers_of_unknown_characters() -> Result<()> {
        use std::os::unix::ffi::OsStrExt;

        // Half of a UTF-16 surrogate pair: qemu-img prints U+FFFD once, Rust three times.
        let image = Path::new(OsStr::from_bytes(b"/d\xed\xa0\x80/image"));
        assert_eq!(image.to_string_lossy(), "/d\u{fffd}\u{fffd}\u{fffd}/image");
        let info: Info = serde_json::from_str(
            r#"{"virtual-size": 1, "format-specific": {"data": {"extents": [
                {"filename": "/d\ufffd/image"}, {"filename": "/d\ufffd/x"}]}}}"#,
        )?;
        assert_eq!(info.parts(image).collect::<Vec<_>>(), ["/d\u{fffd}/x"]);
        assert_eq!(
            one_unknown("\u{fffd}\u{fffd}a\u{fffd}"),
            "\u{fffd}a\u{fffd}"
        );
        Ok(())
    }
}
