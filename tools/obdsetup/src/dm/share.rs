// SPDX-License-Identifier: GPL-2.0

//! Devices of layers that several stacks use: which layer a device is of, and holding it.
//!
//! A shared device belongs to a layer's file or block device, not to a stack. Its UUID is
//! `OVERLAYBD-<type>-<digits>`: 32 hexadecimal digits for the very file, its times, and its first and
//! last bytes, then 8 for the options that the device was made with. So opens that ask for other
//! options get another device. The name is for people, and means nothing.
//!
//! Nothing counts users but device-mapper. Before a table names a shared device, the device is held
//! open: one that is open cannot be removed, and its number cannot become that of another.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use overlaybd::format::Blob;
use overlaybd::Payload;
use rustix::io::{Errno, FdFlags};
use sha2::{Digest, Sha256};

use super::backing::{self, FileId};
use super::control::{Control, State};
use super::lock::{self, Lock};
use super::plan::{Place, UUID_PREFIX};
use crate::exit::{self, Failure};
use crate::interrupt;

/// Hexadecimal digits in a UUID for the layer, and for the options.
const LAYER_DIGITS: usize = 32;
const OPTION_DIGITS: usize = 8;
/// Those in a name, of both.
const NAME_DIGITS: (usize, usize) = (12, 4);
/// Longest part of a file's name in a device's name.
const LABEL: usize = 40;
/// Bytes at the begin and at the end of a blob that are a part of what it is known by: headers and
/// trailers, which have the checksum of an index.
const BEGIN: u64 = 4 << 10;
const END: u64 = 16 << 10;
/// The place of the mode of the cache in the status of `zfile`.
const CACHE_MODE: usize = 12;
/// What the names of files begin with that tell who has set a mode.
const MARK: &str = ".cache-";
/// What such a file has in it once the mode is set.
const SET: &str = "all";
/// How often the mode of a cache is changed at most, while others come and go.
const LOOKS: u32 = 10;
/// Where the kernel shows devices by their numbers.
const SYS: &str = "/sys/dev/block";

/// What a shared device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// A decompressed layer.
    Zfile,
    /// The file of a layer.
    Blob,
}

impl Kind {
    fn uuid_type(self) -> &'static str {
        match self {
            Self::Zfile => "LAYER-",
            Self::Blob => "BLOB-",
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::Zfile => "zfile",
            Self::Blob => "blob",
        }
    }
}

/// The file or block device of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// A part of its name.
    label: String,
    digits: String,
    /// The options of its loop device.
    loop_options: &'static str,
    /// What the kernel knows it by.
    pub(crate) source: Source,
}

/// What the kernel knows a file or a block device by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The file system's number and the inode.
    File { dev: u64, ino: u64 },
    /// The number of a block device.
    Device { rdev: u64 },
}

impl Identity {
    /// Returns what the file or device of `payload` is known by.
    pub(crate) fn of(payload: &Payload, place: Place, buffered: bool) -> Result<Self> {
        let blob = payload.file();
        let path = blob.path();
        let meta = blob.file().metadata();
        let meta = meta.with_context(|| path.display().to_string())?;
        let mut hash = Sha256::new();
        let mut add = |text: String| {
            hash.update(text.len().to_le_bytes());
            hash.update(text);
        };
        let source = match place {
            Place::File => {
                add(format!(
                    "file {} {} {} {}.{} {}.{}",
                    meta.dev(),
                    meta.ino(),
                    meta.size(),
                    meta.mtime(),
                    meta.mtime_nsec(),
                    meta.ctime(),
                    meta.ctime_nsec()
                ));
                Source::File {
                    dev: meta.dev(),
                    ino: meta.ino(),
                }
            }
            Place::WholeDevice | Place::PartOfDevice => {
                let rdev = meta.rdev();
                let (disk, start) = disk(&number_of(rdev));
                add(format!("device {rdev} {disk} {start} {place:?}"));
                Source::Device { rdev }
            }
        };
        let size = blob.size();
        add(size.to_string());
        for (start, len) in [(0, BEGIN), (size.saturating_sub(END), END)] {
            let len = usize::try_from(len.min(size - start))?;
            let mut bytes = vec![0; len];
            blob.read_at(start, &mut bytes)?;
            hash.update(bytes);
        }
        Ok(Self {
            label: label(path),
            digits: hex(&hash.finalize(), LAYER_DIGITS),
            loop_options: match (source, buffered) {
                (Source::File { .. }, false) => "direct",
                _ => "",
            },
            source,
        })
    }

    /// Returns name and UUID of the device of this layer with `options` for its target.
    pub(crate) fn device(&self, kind: Kind, options: &[String]) -> (String, String) {
        let words: Vec<&str> = options.iter().flat_map(|o| o.split_whitespace()).collect();
        let text = format!("{} {}", self.loop_options, words.join(" "));
        let options = hex(&Sha256::digest(text), OPTION_DIGITS);
        let part = |text: &str, len| text.chars().take(len).collect::<String>();
        let (layer, short) = NAME_DIGITS;
        (
            format!(
                "{}-{}{}-{}",
                self.label,
                part(&self.digits, layer),
                part(&options, short),
                kind.suffix()
            ),
            format!("{UUID_PREFIX}{}{}{options}", kind.uuid_type(), self.digits),
        )
    }
}

/// Returns the last part of a file's name, as far as a device may be called so.
fn label(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let plain = |c: char| match c.is_ascii_alphanumeric() || "#+-.:=@_".contains(c) {
        true => c,
        false => '_',
    };
    let name: String = name.chars().map(plain).take(LABEL).collect();
    match name.strip_prefix(['.', '-']) {
        Some(rest) => format!("_{rest}"),
        None if name.is_empty() => "layer".to_owned(),
        None => name,
    }
}

fn hex(bytes: &[u8], digits: usize) -> String {
    let halves = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    let all = halves.filter_map(|half| char::from_digit(half.into(), 16));
    all.take(digits).collect()
}

/// Returns what kind of shared device has `uuid`, and the digits of its layer; nothing for others.
pub(crate) fn parse(uuid: &str) -> Option<(Kind, &str)> {
    let rest = uuid.strip_prefix(UUID_PREFIX)?;
    let kinds = [Kind::Zfile, Kind::Blob].into_iter();
    let (kind, digits) = kinds
        .filter_map(|kind| Some((kind, rest.strip_prefix(kind.uuid_type())?)))
        .next()?;
    let is_digit = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    let right = digits.len() == LAYER_DIGITS + OPTION_DIGITS && digits.chars().all(is_digit);
    Some((kind, digits.get(..LAYER_DIGITS)?)).filter(|_| right)
}

/// Whether `uuid` is that of a shared device.
pub(crate) fn is_shared(uuid: &str) -> bool {
    parse(uuid).is_some()
}

/// Returns the name of a device that is of the same layer as the one with `uuid`, with other options.
pub(crate) fn with_other_options<'a>(all: &'a [State], uuid: &str) -> Option<&'a str> {
    let wanted = parse(uuid)?;
    let other = |state: &&State| parse(&state.uuid) == Some(wanted) && state.uuid != uuid;
    all.iter().find(other).map(|state| state.name.as_str())
}

/// Takes the lock for the shared device with `uuid`. The one who holds it is the only one to make the
/// device, or to take it for what a kill has left.
pub(crate) fn lock_device(uuid: &str) -> Result<Lock> {
    Lock::take(&format!(".{uuid}"))
}

/// [`lock_device`], or nothing where another holds it.
pub(crate) fn try_lock(uuid: &str) -> Option<Lock> {
    Lock::try_to_take(&format!(".{uuid}"))
}

/// A shared device that is held open.
#[derive(Debug)]
pub(crate) struct Hold {
    /// `MAJOR:MINOR`.
    pub(crate) number: String,
    _file: File,
}

/// What trying to hold a device led to.
#[derive(Debug)]
pub(crate) enum Attempt {
    Held(Hold),
    /// It is there without its table.
    Unfinished,
    /// Reads of it wait, as those of one that is just being made.
    Suspended,
    /// It is not there.
    Gone,
}

/// Holds the device that `state` tells of, which is to have `sectors`.
pub(crate) fn hold(state: &State, sectors: u64) -> Result<Attempt> {
    // Without a table, a device has neither node nor directory.
    if !state.live {
        return Ok(Attempt::Unfinished);
    }
    let Some(file) = open(state)? else {
        return Ok(Attempt::Gone);
    };
    // Only now it is sure what has this number.
    let system = system(&state.number);
    let text = |name: &str| fs::read_to_string(system.join(name)).unwrap_or_default();
    if text("dm/uuid").trim_end() != state.uuid {
        return Ok(Attempt::Gone);
    }
    let size = text("size").trim_end().parse::<u64>().unwrap_or(0);
    if size == 0 {
        return Ok(Attempt::Unfinished);
    }
    let name = &state.name;
    if size != sectors {
        let message = format!(
            "device {name} has {size} sectors, and the layer that it is of has {sectors}: open with \
             --private"
        );
        return Err(Failure::error(exit::BUSY, message));
    }
    if text("dm/suspended").trim_end() == "1" {
        return Ok(Attempt::Suspended);
    }
    // Programs that are started from now on hold it, too.
    rustix::io::fcntl_setfd(&file, FdFlags::empty())?;
    Ok(Attempt::Held(Hold {
        number: state.number.clone(),
        _file: file,
    }))
}

/// The error where device `name` is suspended, and nobody is about to change that.
pub(crate) fn suspended(name: &str) -> anyhow::Error {
    let message = format!(
        "device {name}, which other stacks use, is suspended: run `dmsetup resume {name}', or open \
         with --private"
    );
    Failure::error(exit::BUSY, message)
}

/// Returns the kernel's sequence number of the disk that block device `number` is or is a partition of,
/// and the partition's first sector. Each disk has a sequence number of its own, also one that gets the
/// number of another.
fn disk(number: &str) -> (String, String) {
    let device = system(number);
    let text = |path: &Path| {
        let text = fs::read_to_string(path).unwrap_or_default();
        text.trim_end().to_owned()
    };
    let whole = match device.join("partition").exists() {
        true => device
            .canonicalize()
            .ok()
            .and_then(|path| path.parent().map(Path::to_owned)),
        false => None,
    };
    let whole = whole.unwrap_or_else(|| device.clone());
    (text(&whole.join("diskseq")), text(&device.join("start")))
}

/// Opens a device by its number; nothing where it is gone.
fn open(state: &State) -> Result<Option<File>> {
    let Some((_, minor)) = state.number.split_once(':') else {
        return Ok(None);
    };
    let by_number = PathBuf::from(format!("/dev/dm-{minor}"));
    let mut paths = vec![by_number.clone(), super::node(&state.name)];
    let mut made = false;
    for _ in 0..2 {
        for path in &paths {
            let opened = File::open(path);
            if made {
                let _ = fs::remove_file(path);
            }
            let file = match opened {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) if is_gone(&error) => return Ok(None),
                opened => opened.with_context(|| path.display().to_string())?,
            };
            let meta = file.metadata()?;
            if number_of(meta.rdev()) == state.number {
                return Ok(Some(file));
            }
        }
        if !system(&state.number).exists() {
            return Ok(None);
        }
        // As in a container whose /dev nobody fills. There the node goes again at once: the number may be
        // another device's later.
        made = !by_number.exists();
        backing::make_block_node(&by_number, &state.number)?;
        paths.truncate(1);
    }
    Ok(None)
}

fn is_gone(error: &std::io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::NXIO | Errno::NODEV))
}

fn number_of(rdev: u64) -> String {
    format!("{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev))
}

/// Returns the number of the device with `uuid`, where it has a table.
pub(crate) fn number_of_uuid(uuid: &str) -> Option<String> {
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let device = entries.map(|entry| entry.path()).find(|device| {
        let text = fs::read_to_string(device.join("dm/uuid"));
        text.is_ok_and(|text| text.trim_end() == uuid)
    });
    let number = fs::read_to_string(device?.join("dev")).ok()?;
    Some(number.trim_end().to_owned())
}

/// Returns the directory of the device with number `MAJOR:MINOR`.
pub(crate) fn system(number: &str) -> PathBuf {
    Path::new(SYS).join(number)
}

/// Returns the numbers of the devices in a directory of links to devices.
fn numbers_in(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| fs::read_to_string(entry.path().join("dev")).ok())
        .map(|text| text.trim_end().to_owned())
        .collect()
}

/// Returns the numbers of the mapped devices whose tables name device `number`.
pub(crate) fn users(number: &str) -> BTreeSet<String> {
    numbers_in(&system(number).join("holders"))
}

/// Returns the numbers of the devices that the table of device `number` names.
pub(crate) fn lower(number: &str) -> BTreeSet<String> {
    numbers_in(&system(number).join("slaves"))
}

/// Returns the numbers of all devices below device `number`.
pub(crate) fn below(number: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut next = vec![number.to_owned()];
    while let Some(number) = next.pop() {
        for lower in lower(&number) {
            if found.insert(lower.clone()) {
                next.push(lower);
            }
        }
    }
    found
}

/// Checks that the devices with the numbers `held` are over what they should be over.
pub(crate) fn verify(held: &[(&str, &str, Source)]) -> Result<()> {
    for &(name, number, source) in held {
        let below = below(number);
        let right = match source {
            Source::Device { rdev } => Some(below.contains(&number_of(rdev))),
            Source::File { dev, ino } => is_over_file(&below, dev, ino),
        };
        let what = match right {
            Some(true) => continue,
            Some(false) => "is over another file or device",
            None => "nothing tells which file it is over",
        };
        let message =
            format!("device {name} has the UUID of a layer, and {what}: open with --private");
        return Err(Failure::error(exit::BUSY, message));
    }
    Ok(())
}

/// Returns whether one of the devices with the numbers `below` is a loop device over all of a file;
/// nothing where that cannot be told.
fn is_over_file(below: &BTreeSet<String>, dev: u64, ino: u64) -> Option<bool> {
    let sys = Path::new("/sys");
    let id = FileId::new(dev, ino);
    let mut told = true;
    for number in below {
        let Some(path) = backing::loop_file(sys, number) else {
            continue;
        };
        let place = system(number).join("loop");
        let is_zero = |name: &str| {
            let text = fs::read_to_string(place.join(name));
            text.is_ok_and(|text| text.trim_end() == "0")
        };
        if !is_zero("offset") || !is_zero("sizelimit") {
            continue;
        }
        // This takes no other program. Where another file has the name by now, or another mount is
        // there, losetup tells.
        let is_named = |meta: fs::Metadata| meta.dev() == dev && meta.ino() == ino;
        if fs::metadata(path).is_ok_and(is_named) {
            return Some(true);
        }
        match backing::is_over(sys, number, &id) {
            Some(true) => return Some(true),
            Some(false) => {}
            None => told = false,
        }
    }
    told.then_some(false)
}

/// What tells that the mode of the cache of the device with `uuid` was set here, and by nobody else.
fn mark(uuid: &str) -> PathBuf {
    lock::place().join(format!("{MARK}{uuid}"))
}

/// Forgets what was known of the cache of a device that is new.
pub(crate) fn forget_cache(uuid: &str) {
    let _ = fs::remove_file(mark(uuid));
}

/// Whether the mode of a cache was set here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    /// No.
    None,
    /// It was about to be, by an obdsetup that may have been killed.
    Begun,
    Set,
}

impl Mark {
    fn of(uuid: &str) -> Self {
        match fs::read(mark(uuid)) {
            Ok(text) if text == SET.as_bytes() => Self::Set,
            Ok(_) => Self::Begun,
            Err(_) => Self::None,
        }
    }

    /// Returns the message for a cache that is in `mode`, whether it is used by several stacks or not;
    /// nothing where the mode stays.
    fn message(self, shared: bool, mode: &str) -> Option<&'static str> {
        match (shared, self, mode) {
            (true, Self::None | Self::Begun, "parts") => Some("cache all"),
            (false, Self::Set | Self::Begun, "all") => Some("cache auto"),
            _ => None,
        }
    }
}

/// A shared zfile device, for its cache.
struct Cached {
    number: String,
    name: String,
    uuid: String,
}

impl Cached {
    /// Returns the device with the number `number`, where it is a zfile.
    fn of(number: &str) -> Option<Self> {
        let text = |name: &str| {
            let text = fs::read_to_string(system(number).join("dm").join(name));
            text.map(|text| text.trim_end().to_owned()).ok()
        };
        let (name, uuid) = (text("name")?, text("uuid")?);
        let number = number.to_owned();
        let is_zfile = parse(&uuid).is_some_and(|(kind, _)| kind == Kind::Zfile);
        is_zfile.then_some(Self { number, name, uuid })
    }

    /// Whether several tables name it.
    fn is_shared(&self) -> bool {
        users(&self.number).len() > 1
    }

    /// Whether the mode of its cache, which is marked as `mark`, may be wrong.
    fn is_wrong(&self, mark: Mark) -> bool {
        match mark {
            Mark::None => self.is_shared(),
            Mark::Begun => true,
            Mark::Set => !self.is_shared(),
        }
    }
}

/// Sets how the caches of the shared devices with the numbers `numbers` are used: those that several
/// tables name keep all blocks, since what one stack has read others get from there; others keep what
/// the page caches above don't, as their tables say. Where somebody else has set the mode, it stays.
/// What goes wrong is told: the stacks work all the same.
pub(crate) fn set_caches(control: &Control, numbers: &BTreeSet<String>) {
    let devices = numbers.iter().filter_map(|number| Cached::of(number));
    let wrong: Vec<Cached> = devices
        .filter(|device| device.is_wrong(Mark::of(&device.uuid)))
        .collect();
    if wrong.is_empty() {
        return;
    }
    // With one dmsetup: each start of it costs.
    let names: Vec<&str> = wrong.iter().map(|device| &*device.name).collect();
    let mut modes = control.status_words(&names, CACHE_MODE);
    for device in &wrong {
        if let Err(error) = set_cache(control, device, modes.remove(&device.name)) {
            crate::tell(&format!("warning: {}", crate::message(&error)));
        }
    }
}

/// Sets how the cache of one device is used. `mode` is what it was a moment ago, where that is known.
fn set_cache(control: &Control, device: &Cached, mut mode: Option<String>) -> Result<()> {
    let Cached { number, name, uuid } = device;
    // Others come and go meanwhile: the last one to look finds it right.
    for _ in 0..LOOKS {
        if !device.is_wrong(Mark::of(uuid)) {
            break;
        }
        let lock = lock_device(uuid)?;
        let (shared, is) = (device.is_shared(), Mark::of(uuid));
        let now = || {
            control
                .status_words(&[name.as_str()], CACHE_MODE)
                .remove(name)
        };
        // A module that is older than the message doesn't tell. Another obdsetup that has set the mode since
        // it was read has left a mark.
        let Some(mode) = mode.take().or_else(now) else {
            return Ok(());
        };
        let message = is.message(shared, &mode);
        if message.is_none() && shared && is != Mark::Begun {
            // Somebody else has set it.
            return Ok(());
        }
        let path = mark(uuid);
        if shared && fs::write(&path, "").is_err() {
            return Ok(());
        }
        if let Some(message) = message {
            let sent = control.run(&["message", name, "0", message]);
            if let Err(error) = sent {
                forget_cache(uuid);
                // It may just have been removed.
                return match system(number).exists() {
                    true => Err(error),
                    false => Ok(()),
                };
            }
        }
        match shared {
            true => fs::write(&path, SET)?,
            false => forget_cache(uuid),
        }
        drop(lock);
    }
    Ok(())
}

/// Removes the locks that kills have left, and what was known of devices that are gone. What goes wrong is
/// told: it costs a few bytes in `/run`.
pub(crate) fn clear_left(control: &Control) {
    Lock::clear_left(&format!(".{UUID_PREFIX}"));
    let marks: Vec<PathBuf> = fs::read_dir(lock::place())
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| marked(path).is_some())
        .collect();
    if marks.is_empty() {
        return;
    }
    let all = match control.states() {
        Ok(all) => all,
        Err(error) => return crate::tell(&format!("warning: {}", crate::message(&error))),
    };
    for path in marks {
        if !all.iter().any(|state| marked(&path) == Some(&state.uuid)) {
            let _ = fs::remove_file(path);
        }
    }
}

/// Returns the UUID of the device that the file `path` tells of.
fn marked(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()?.strip_prefix(MARK)
}

/// Shared devices that no table names and nobody has open.
#[derive(Default)]
pub(crate) struct Left {
    /// Their names, the upper ones first.
    pub(crate) names: Vec<String>,
    /// Their locks.
    pub(crate) locks: Vec<Lock>,
    /// Those of them that have no table.
    unfinished: Vec<State>,
    /// Whether there are more of them, whose locks others hold.
    pub(crate) others: bool,
}

/// [`left`], but for devices that an obdsetup with another `/run` is just making: those have no table, and
/// that changes soon. `all` are the devices.
pub(crate) fn left_for_long(control: &Control, all: &[State]) -> Result<Left> {
    let mut left = left(all);
    if left.unfinished.is_empty() {
        return Ok(left);
    }
    let end = Instant::now() + super::QUIET;
    while Instant::now() < end {
        interrupt::check()?;
        sleep(Duration::from_millis(100));
    }
    let now = control.states()?;
    let changed = left.unfinished.iter().filter(|state| !now.contains(state));
    let changed: Vec<&String> = changed.map(|state| &state.name).collect();
    left.names.retain(|name| !changed.contains(&name));
    Ok(left)
}

/// Returns the shared devices that nothing uses, as a kill leaves them. `all` are the devices.
pub(crate) fn left(all: &[State]) -> Left {
    let mut left = Left::default();
    let mut gone = BTreeSet::new();
    for wanted in [Kind::Zfile, Kind::Blob] {
        for state in all {
            if parse(&state.uuid).is_none_or(|(kind, _)| kind != wanted) {
                continue;
            }
            let users = users(&state.number);
            let idle = match users.is_empty() {
                true => state.open_count == 0,
                false => users.is_subset(&gone),
            };
            if !idle {
                continue;
            }
            // Another may just be making it.
            let Some(lock) = try_lock(&state.uuid) else {
                left.others = true;
                continue;
            };
            if !state.live {
                left.unfinished.push(state.clone());
            }
            gone.insert(state.number.clone());
            left.names.push(state.name.clone());
            left.locks.push(lock);
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(digits: char) -> Identity {
        Identity {
            label: "base.obd".to_owned(),
            digits: std::iter::repeat_n(digits, LAYER_DIGITS).collect(),
            loop_options: "direct",
            source: Source::Device { rdev: 0 },
        }
    }

    #[test]
    fn names_and_uuids() {
        let options = |words: &[&str]| {
            words
                .iter()
                .map(|&word| word.to_owned())
                .collect::<Vec<_>>()
        };
        let (name, uuid) = identity('a').device(Kind::Zfile, &[]);
        assert_eq!(parse(&uuid), Some((Kind::Zfile, &*"a".repeat(32))));
        assert!(
            name.starts_with("base.obd-aaaaaaaaaaaa") && name.ends_with("-zfile"),
            "{name}"
        );
        assert!(crate::dm::plan::check_name(&name).is_ok());
        // Words count, not how they were given.
        let (_, one) = identity('a').device(Kind::Zfile, &options(&["cache_blocks 64"]));
        let (_, two) = identity('a').device(Kind::Zfile, &options(&["cache_blocks", "64"]));
        assert_eq!(one, two);
        assert_ne!(one, uuid);
        let (_, blob) = identity('a').device(Kind::Blob, &[]);
        assert!(blob != uuid && is_shared(&blob));
        let state = |uuid: &str| State {
            name: uuid.to_owned(),
            uuid: uuid.to_owned(),
            ..State::default()
        };
        let all = [state(&blob), state(&uuid), state(&one)];
        assert_eq!(with_other_options(&all, &one), Some(&*uuid));
        assert_eq!(with_other_options(&all[..2], &uuid), None);
        let (_, other) = identity('b').device(Kind::Zfile, &[]);
        assert_eq!(with_other_options(&all, &other), None);
    }

    #[test]
    fn other_uuids() {
        let digits = "0123456789abcdef0123456789abcdef01234567";
        assert!(is_shared(&format!("OVERLAYBD-BLOB-{digits}")));
        for uuid in [
            "",
            "OVERLAYBD-LAYER-base",
            "OVERLAYBD-LAYER-app-0",
            "OVERLAYBD-LSMT-0123456789abcdef0123456789abcdef01234567",
            "OVERLAYBD-LAYER-0123456789ABCDEF0123456789ABCDEF01234567",
            "OVERLAYBD-LAYER-0123456789abcdef0123456789abcdef0123456",
            "OVERLAYBD-LAYER-0123456789abcdef0123456789abcdef0123456\u{e9}",
        ] {
            assert!(!is_shared(uuid), "{uuid}");
        }
    }

    #[test]
    fn labels() {
        for (path, wanted) in [
            ("/srv/base.obd", "base.obd"),
            ("/srv/.hidden", "_hidden"),
            ("/srv/-x", "_x"),
            ("/srv/a b;c,\\\u{e9}", "a_b_c___"),
            ("/", "layer"),
        ] {
            assert_eq!(label(Path::new(path)), wanted);
        }
        let long = format!("/{}", "x".repeat(300));
        assert_eq!(label(Path::new(&long)).len(), LABEL);
    }
}
