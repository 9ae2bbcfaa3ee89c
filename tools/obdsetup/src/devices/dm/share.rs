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
use rustix::io::{Errno, FdFlags};

use super::backing::{self, FileId};
use super::control::{Control, State};
use super::identity::{parse, Kind, Source, UUID_PREFIX};
use super::lock::{self, Lock};
use super::system::{below, number_of, system, users};
use crate::terminal::exit::{self, Failure};
use crate::terminal::interrupt;

/// Index of the word with the mode of the cache in the status of `zfile`.
const CACHE_MODE: usize = 12;
/// Prefix of the names of the files that record which modes obdsetup has set.
const MARK: &str = ".cache-";
/// Content of such a file after the mode was set.
const SET: &str = "all";
/// Largest number of changes of the mode of a cache, while other users come and go.
const LOOKS: u32 = 10;

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
            "device {name} has {size} sectors, but its layer has {sectors}: open with --private"
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

/// Returns the error for the shared device `name`, which is suspended although no obdsetup is making it.
pub(crate) fn suspended(name: &str) -> anyhow::Error {
    let message = format!(
        "device {name}, which other stacks use, is suspended: run `dmsetup resume {name}', or open \
         with --private"
    );
    Failure::error(exit::BUSY, message)
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
        // and deleted again immediately, because another device may get the number later.
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

/// Deletes the file [`mark`] of the device with `uuid`: the device is new, or obdsetup has not set its present mode.
pub(crate) fn forget_cache(uuid: &str) {
    let _ = fs::remove_file(mark(uuid));
}

/// Whether obdsetup has set the mode of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    /// obdsetup has not set it.
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

/// A shared zfile device. obdsetup sets the mode of its cache.
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
            crate::terminal::tell_error("warning: ", &error);
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
        Err(error) => return crate::terminal::tell_error("warning: ", &error),
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
