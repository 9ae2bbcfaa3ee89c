// SPDX-License-Identifier: GPL-2.0

//! Shared devices: finds the device of a layer, and holds it.
//!
//! A shared device belongs to a layer's file or block device, not to a stack. Its UUID is
//! `OVERLAYBD-<type>-<digits>`: the layer's key, 32 hexadecimal digits that identify the file, its times, and
//! its first and last bytes, then 8 for the options of the device. So an `open` with other options gets
//! another device. The name is only for people.
//!
//! Only device-mapper counts users. A shared device is held open before a table names it. A device that is
//! open cannot be removed, and no other device can get its number.

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

/// Numbers of hexadecimal digits in a UUID: for the layer, and for the options.
const LAYER_DIGITS: usize = 32;
const OPTION_DIGITS: usize = 8;
/// Numbers of digits in a name, for the same.
const NAME_DIGITS: (usize, usize) = (12, 4);
/// Largest number of bytes of a file's name in a device's name.
const LABEL: usize = 40;
/// How many bytes at the beginning and at the end of a blob are hashed for the layer's key. They include
/// headers and trailers, which have the checksum of the index.
const BEGIN: u64 = 4 << 10;
const END: u64 = 16 << 10;
/// Index of the word with the mode of the cache in the status of `zfile`.
const CACHE_MODE: usize = 12;
/// Prefix of the names of the files that record which modes obdsetup has set.
const MARK: &str = ".cache-";
/// Content of such a file after the mode was set.
const SET: &str = "all";
/// Largest number of changes of the mode of a cache, while other users come and go.
const LOOKS: u32 = 10;
/// The directory of block devices by their numbers in sysfs.
const SYS: &str = "/sys/dev/block";

/// The kind of a shared device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// A zfile device: a decompressed layer.
    Zfile,
    /// A blob device: the file of a layer.
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

/// A layer's key: it identifies the file or block device of the layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// A part of the file's name.
    label: String,
    digits: String,
    /// The options of its loop device.
    loop_options: &'static str,
    /// How the kernel identifies the file or device.
    pub(crate) source: Source,
}

/// How the kernel identifies a file or a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The file system's number and the inode.
    File { dev: u64, ino: u64 },
    /// The number of a block device.
    Device { rdev: u64 },
}

impl Identity {
    /// Returns the key for the file or device of `payload`.
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

    /// Returns name and UUID of the device for this layer with `options` for its target.
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

/// Returns the last component of a path, with only the characters that a device's name may have, and
/// shortened.
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

/// Returns the kind of the shared device with `uuid`, and its layer's key; `None` for other devices.
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

/// Returns whether `uuid` is the UUID of a shared device.
pub(crate) fn is_shared(uuid: &str) -> bool {
    parse(uuid).is_some()
}

/// Returns the name of a device for the same layer as that with `uuid`, but with other options.
pub(crate) fn with_other_options<'a>(all: &'a [State], uuid: &str) -> Option<&'a str> {
    let wanted = parse(uuid)?;
    let other = |state: &&State| parse(&state.uuid) == Some(wanted) && state.uuid != uuid;
    all.iter().find(other).map(|state| state.name.as_str())
}

/// Takes the lock for the shared device with `uuid`. Only its holder may make the device, or assume that it
/// was left by a kill.
pub(crate) fn lock_device(uuid: &str) -> Result<Lock> {
    Lock::take(&format!(".{uuid}"))
}

/// As [`lock_device`], but returns `None` if another process holds the lock.
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

/// The result of trying to hold a device.
#[derive(Debug)]
pub(crate) enum Attempt {
    Held(Hold),
    /// The device exists, but has no table.
    Unfinished,
    /// The device is suspended, as while it is being made.
    Suspended,
    /// The device does not exist.
    Gone,
}

/// Holds the device with this state, which must have `sectors` sectors.
pub(crate) fn hold(state: &State, sectors: u64) -> Result<Attempt> {
    // A device without a table has neither a node nor a directory in sysfs.
    if !state.live {
        return Ok(Attempt::Unfinished);
    }
    let Some(file) = open(state)? else {
        return Ok(Attempt::Gone);
    };
    // Only from here on the device with this number can't change.
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
    // Programs that are started from now on inherit the open device, and hold it, too.
    rustix::io::fcntl_setfd(&file, FdFlags::empty())?;
    Ok(Attempt::Held(Hold {
        number: state.number.clone(),
        _file: file,
    }))
}

/// Returns the error for a device that is suspended, although no obdsetup is making it.
pub(crate) fn suspended(name: &str) -> anyhow::Error {
    let message = format!(
        "device {name}, which other stacks use, is suspended: run `dmsetup resume {name}', or open \
         with --private"
    );
    Failure::error(exit::BUSY, message)
}

/// Returns the kernel's sequence number of the disk that block device `number` is, or is a partition of, and
/// the first sector of the partition. The sequence number is unique, even if a new disk gets the device
/// number of an old one.
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

/// Opens a device by its number. Returns `None` if it was removed.
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
        // The node may be missing, for example in a container where nothing fills /dev. Then a node is made
        // and deleted again at once, because another device may get the number later.
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

/// Returns the number of the device with `uuid`; `None` if there is none with a table.
pub(crate) fn number_of_uuid(uuid: &str) -> Option<String> {
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let device = entries.map(|entry| entry.path()).find(|device| {
        let text = fs::read_to_string(device.join("dm/uuid"));
        text.is_ok_and(|text| text.trim_end() == uuid)
    });
    let number = fs::read_to_string(device?.join("dev")).ok()?;
    Some(number.trim_end().to_owned())
}

/// Returns the directory in sysfs of the device with number `MAJOR:MINOR`.
pub(crate) fn system(number: &str) -> PathBuf {
    Path::new(SYS).join(number)
}

/// Returns the numbers of the devices to which the links in `directory` lead.
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

/// Checks that each device in `held` (name, number, source) is over its source.
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

/// Returns whether one of the devices with the numbers `below` is a loop device over all of the file; `None`
/// if that is unknown.
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
        // First compare by name, which needs no other program. The name may lead to another file now, or be
        // under another mount; then ask losetup.
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

/// Returns the path of the file that records that obdsetup has set the mode of the cache of the device with
/// `uuid`.
fn mark(uuid: &str) -> PathBuf {
    lock::place().join(format!("{MARK}{uuid}"))
}

/// Deletes that file: the device is new, or its mode isn't one that obdsetup has set.
pub(crate) fn forget_cache(uuid: &str) {
    let _ = fs::remove_file(mark(uuid));
}

/// Whether obdsetup has set the mode of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    /// It has not.
    None,
    /// An obdsetup was about to set it, and may have been killed.
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

    /// Returns the message to send for a cache in `mode`; `None` if the mode stays. `shared` says whether
    /// several tables name the device.
    fn message(self, shared: bool, mode: &str) -> Option<&'static str> {
        match (shared, self, mode) {
            (true, Self::None | Self::Begun, "parts") => Some("cache all"),
            (false, Self::Set | Self::Begun, "all") => Some("cache auto"),
            _ => None,
        }
    }
}

/// A shared zfile device whose cache is set.
struct Cached {
    number: String,
    name: String,
    uuid: String,
}

impl Cached {
    /// Returns the device with the number `number`; `None` if it isn't a shared zfile device.
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

    /// Returns whether several tables name it.
    fn is_shared(&self) -> bool {
        users(&self.number).len() > 1
    }

    /// Returns whether the mode of its cache may be wrong, given its `mark`.
    fn is_wrong(&self, mark: Mark) -> bool {
        match mark {
            Mark::None => self.is_shared(),
            Mark::Begun => true,
            Mark::Set => !self.is_shared(),
        }
    }
}

/// Sets the modes of the caches of the shared devices with the numbers `numbers`. Devices that several tables
/// name cache all reads, so that one stack can use blocks that another has read. Other devices have the mode
/// of their tables; by default they cache only what the page cache above doesn't. A mode that someone else
/// has set stays. Errors are only reported, because the stacks work anyway.
pub(crate) fn set_caches(control: &Control, numbers: &BTreeSet<String>) {
    let devices = numbers.iter().filter_map(|number| Cached::of(number));
    let wrong: Vec<Cached> = devices
        .filter(|device| device.is_wrong(Mark::of(&device.uuid)))
        .collect();
    if wrong.is_empty() {
        return;
    }
    // With one dmsetup for all, because each start takes time.
    let names: Vec<&str> = wrong.iter().map(|device| &*device.name).collect();
    let mut modes = control.status_words(&names, CACHE_MODE);
    for device in &wrong {
        if let Err(error) = set_cache(control, device, modes.remove(&device.name)) {
            crate::tell(&format!("warning: {}", crate::message(&error)));
        }
    }
}

/// Sets the mode of the cache of one device. `mode` is the mode a moment ago, if known.
fn set_cache(control: &Control, device: &Cached, mut mode: Option<String>) -> Result<()> {
    let Cached { number, name, uuid } = device;
    // Users may come and go meanwhile, so check again until the mode is right.
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
        // A module that doesn't know the message yet doesn't report the mode, either. If another obdsetup has
        // set the mode since it was read, there is a mark.
        let Some(mode) = mode.take().or_else(now) else {
            return Ok(());
        };
        let message = is.message(shared, &mode);
        if message.is_none() && shared && is != Mark::Begun {
            // Someone else has set the mode.
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
                // The device may have been removed meanwhile.
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

/// Removes the locks that processes have left that were killed, and the marks of devices that no longer
/// exist. If the devices can't be listed, this is only reported: it costs a few bytes in `/run`.
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

/// Returns the UUID in the name of a mark; `None` for other files.
fn marked(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()?.strip_prefix(MARK)
}

/// Shared devices that nothing uses: no table names them, and no one has them open.
#[derive(Default)]
pub(crate) struct Left {
    /// Their names, upper ones first.
    pub(crate) names: Vec<String>,
    /// Their locks.
    pub(crate) locks: Vec<Lock>,
    /// Those without a table.
    unfinished: Vec<State>,
    /// Whether there are more, whose locks other processes hold.
    pub(crate) others: bool,
}

/// As [`left`], without the devices that an obdsetup with another `/run` is making. Those have no table yet,
/// and get one soon. `all` are all devices.
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

/// Returns the shared devices that nothing uses, for example because obdsetup was killed. `all` are all
/// devices.
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
            // Another obdsetup may be making it.
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
        // Only the words matter, not how they are split over the options.
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
