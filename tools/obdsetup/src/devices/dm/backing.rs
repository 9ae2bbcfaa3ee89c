// SPDX-License-Identifier: GPL-2.0

//! Attaches files to loop devices that the kernel detaches when device-mapper closes them. The devices are
//! read-only, except that of the store of a writable disk.
//!
//! A loop device must not be detached before device-mapper has opened it. Otherwise, no one could attach a
//! file to this loop device any more, although the kernel would offer it as free again and again. So programs
//! that obdsetup starts inherit the open loop devices, and keep them open until they end, even if obdsetup
//! itself is killed.
//!
//! One system call attaches the file to a loop device, and another one sets the flag that makes the kernel
//! detach it. An obdsetup that is killed in between leaves the device attached. So there is a note on the
//! device in the lock, and the next obdsetup that takes the lock detaches the device.

use std::fs::{File, Metadata};
use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use loopdev::{LoopControl, LoopDevice};
use rustix::fs::MemfdFlags;
use rustix::io::FdFlags;

use super::access::{self, denied, make_node};
use super::lock::Lock;
use crate::program::Program;

/// Largest number of attempts to get a loop device. One fails if another process takes the free device first.
const TRIES: u32 = 100;
/// All numbers of loop devices are smaller than this one.
const NUMBERS: u32 = 1 << 20;
/// First word of the note on a loop device that is about to get its file.
const NOTE: &str = "loop";

/// Whether a loop device can be written to. Its file must be open in the same mode.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    ReadOnly,
    Writable,
}

impl Mode {
    /// Returns what losetup(8) shows in its column `RO`.
    fn column(self) -> &'static str {
        match self {
            Self::ReadOnly => "1",
            Self::Writable => "0",
        }
    }
}

/// A block device that a table may name. If it is a loop device, the kernel detaches it when this is dropped
/// and no one else has it open.
pub(crate) struct Backing {
    /// `MAJOR:MINOR`.
    pub(crate) number: String,
    _device: Option<File>,
}

impl Backing {
    /// Wraps the block device that `file` describes.
    pub(crate) fn device(file: &Metadata) -> Self {
        let rdev = file.rdev();
        Self {
            number: format!("{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev)),
            _device: None,
        }
    }

    /// Attaches `file` to a loop device. With `direct`, its I/O bypasses the page cache if the file system
    /// supports that, because the devices above cache the decompressed data.
    pub(crate) fn file(file: &File, direct: bool, lock: &Lock) -> Result<Self> {
        Self::over(file, Mode::ReadOnly, direct, lock)
    }

    /// As [`Self::file`], for a file that is written to.
    pub(crate) fn writable(file: &File, direct: bool, lock: &Lock) -> Result<Self> {
        Self::over(file, Mode::Writable, direct, lock)
    }

    fn over(file: &File, mode: Mode, direct: bool, lock: &Lock) -> Result<Self> {
        let device = Attached::new(file, mode, lock)?;
        if direct {
            // Ignored, because not every file system supports it.
            let _ = device.0.set_direct_io(true);
        }
        Self::of_loop(&device)
    }

    /// Attaches a file in memory with these bytes to a loop device.
    pub(crate) fn bytes(bytes: &[u8], lock: &Lock) -> Result<Self> {
        let memory = rustix::fs::memfd_create("obdsetup-tail", MemfdFlags::CLOEXEC)
            .context("cannot make a file in memory")?;
        let mut file = File::from(memory);
        file.write_all(bytes)
            .context("cannot write to a file in memory")?;
        // Opened read-only, because the loop device gets the mode of the open file.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = File::open(path).context("cannot open a file in memory")?;
        Self::of_loop(&Attached::new(&file, Mode::ReadOnly, lock)?)
    }

    fn of_loop(device: &Attached) -> Result<Self> {
        let Attached(device, path) = device;
        let (major, minor) = (device.major()?, device.minor()?);
        let file = File::open(path).with_context(|| path.display().to_string())?;
        // Programs that are started from now on inherit the open device.
        rustix::io::fcntl_setfd(&file, FdFlags::empty())?;
        Ok(Self {
            number: format!("{major}:{minor}"),
            _device: Some(file),
        })
    }
}

/// Returns the file behind the loop device with number `MAJOR:MINOR`; `None` if the device is no loop device.
/// `sys` is where sysfs is mounted.
pub(crate) fn loop_file(sys: &Path, number: &str) -> Option<String> {
    let path = sys.join("dev/block").join(number).join("loop/backing_file");
    let bytes = std::fs::read(path).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    Some(text.strip_suffix('\n').unwrap_or(&text).to_owned())
}

/// Returns whether `file` is the file behind the loop device with number `MAJOR:MINOR`; `None` if that is
/// unknown. Uses losetup(8), because the kernel shows the file's device and inode only through an ioctl(2).
pub(crate) fn is_over(sys: &Path, number: &str, file: &FileId) -> Option<bool> {
    let device = sys.join("dev/block").join(number).canonicalize().ok()?;
    let node = Path::new("/dev").join(device.file_name()?);
    if !node.exists() {
        make_block_node(&node, number).ok()?;
    }
    let words = columns(&node, "BACK-INO,BACK-MAJ:MIN")?;
    Some(words == [file.ino.as_str(), &file.dev])
}

/// Identifies a file as losetup(8) does: the inode, and `MAJOR:MINOR` of its file system.
pub(crate) struct FileId {
    ino: String,
    dev: String,
}

impl FileId {
    pub(crate) fn new(dev: u64, ino: u64) -> Self {
        let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
        Self {
            ino: ino.to_string(),
            dev: format!("{major}:{minor}"),
        }
    }

    pub(crate) fn of(file: &Metadata) -> Self {
        Self::new(file.dev(), file.ino())
    }
}

/// Returns what losetup(8) shows for loop device `node` in these columns; `None` if it fails.
fn columns(node: &Path, columns: &str) -> Option<Vec<String>> {
    let mut program = Program::new("losetup", "the files of loop devices");
    program.args(["--list", "--raw", "--noheadings"]);
    program.args(["--output", columns]).arg(node);
    let mut text = String::new();
    let done = program.end(|line| text.push_str(line)).ok()?;
    let is_told = done.status.success() && done.said.lines().is_empty();
    is_told
        .then(|| words(&text))
        .filter(|words| !words.is_empty())
}

/// Returns the words of a line of losetup(8). Before util-linux 2.39.3, losetup pads numbers with blanks, and
/// prints each blank as `\x20`.
fn words(line: &str) -> Vec<String> {
    let line = line.replace("\\x20", " ");
    line.split_whitespace().map(str::to_owned).collect()
}

/// Detaches the loop device that the last holder of `lock` has left because it was killed.
pub(super) fn clear_left(lock: &Lock) {
    let note = lock.note().unwrap_or_default();
    let words: Vec<&str> = note.split_whitespace().collect();
    let [NOTE, number, ino, dev, read_only] = words[..] else {
        return;
    };
    if let Ok(number) = number.parse() {
        let path = node(number);
        // If another program uses this number now, it is usually for another file. The only device that could
        // be detached by mistake is one that was attached to the same file after the kill, in the same mode
        // and without the flag.
        let left = columns(Path::new(&path), "BACK-INO,BACK-MAJ:MIN,AUTOCLEAR,RO");
        if left.is_some_and(|words| words == [ino, dev, "0", read_only]) {
            // If someone has opened it meanwhile, the kernel detaches it when it is closed.
            let _ = open(number).map(|device| device.detach());
        }
    }
    lock.set_note("");
}

/// Opens the block device `number`, `MAJOR:MINOR`, for writing. Makes its node if that is missing.
pub(crate) fn open_by_number(number: &str) -> Result<File> {
    let device = super::system::system(number);
    let device = device
        .canonicalize()
        .with_context(|| device.display().to_string())?;
    let path = Path::new("/dev").join(device.file_name().unwrap_or_default());
    if !path.exists() {
        make_block_node(&path, number)?;
    }
    let file = File::options().read(true).write(true).open(&path);
    file.with_context(|| path.display().to_string())
}

/// Makes the node of the block device `number`, `MAJOR:MINOR`, at `path`, if it is missing.
pub(super) fn make_block_node(path: &Path, number: &str) -> Result<()> {
    make_node(&path.display().to_string(), number)
}

/// A loop device with its file attached, and the path of its node.
struct Attached(LoopDevice, PathBuf);

impl Attached {
    /// Attaches `file` to a free loop device.
    fn new(file: &File, mode: Mode, lock: &Lock) -> Result<Self> {
        let control = control()?;
        let mut last = None;
        for _ in 0..TRIES {
            let (device, number) = free(&control)?;
            if let Some(attached) = Self::attach(device, number, file, mode, lock)? {
                return Ok(attached);
            }
            if last == Some(number) {
                // The kernel lists this number as free, but another process is about to use it. Take another
                // one.
                return Self::above(&control, number, file, mode, lock);
            }
            last = Some(number);
        }
        bail!("cannot attach a loop device: other programs took each free one first: try again")
    }

    /// Attaches `file` to a free loop device with a higher number than `taken`.
    fn above(
        control: &LoopControl,
        taken: u32,
        file: &File,
        mode: Mode,
        lock: &Lock,
    ) -> Result<Self> {
        let mut tries = 0;
        for number in taken + 1..NUMBERS {
            if Path::new(SYS).join(format!("loop{number}/loop")).exists() {
                continue;
            }
            let device = match control.add(number) {
                Err(error) if is_there_already(&error) => open(number)?,
                Err(error) => {
                    let context = format!("cannot make {}", node(number));
                    return Err(denied(error)).context(context);
                }
                Ok(device) => device,
            };
            if let Some(attached) = Self::attach(device, number, file, mode, lock)? {
                return Ok(attached);
            }
            tries += 1;
            if tries == TRIES {
                break;
            }
        }
        bail!(
            "cannot attach a loop device: {TRIES} above {} are in use",
            node(taken)
        )
    }

    /// Attaches `file` to `device`. Returns `None` if another process uses the device.
    fn attach(
        device: LoopDevice,
        number: u32,
        file: &File,
        mode: Mode,
        lock: &Lock,
    ) -> Result<Option<Self>> {
        let with = device.with().read_only(mode == Mode::ReadOnly);
        let with = with.autoclear(true);
        let is = FileId::of(&file.metadata()?);
        let column = mode.column();
        lock.set_note(&format!("{NOTE} {number} {} {} {column}", is.ino, is.dev));
        let attached = with.attach_fd(file.as_fd().as_raw_fd());
        lock.set_note("");
        match attached {
            Ok(()) => Ok(Some(Self(device, node(number).into()))),
            Err(error) if error.kind() == ErrorKind::ResourceBusy => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot attach {}", node(number))),
        }
    }
}

/// The directory of block devices in sysfs.
const SYS: &str = "/sys/block";

fn node(number: u32) -> String {
    format!("/dev/loop{number}")
}

/// Returns whether the device exists already. If its node is missing, the error is `NotFound`.
fn is_there_already(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::NotFound)
}

/// Opens the control device of loop devices.
fn control() -> Result<LoopControl> {
    access::LOOP.check()?;
    LoopControl::open().context("/dev/loop-control")
}

/// Returns a loop device that is free according to the kernel, and its number.
fn free(control: &LoopControl) -> Result<(LoopDevice, u32)> {
    match control.next_free() {
        Ok(device) => {
            let minor = device.minor().context("cannot get a loop device")?;
            // The path always has the number of the device. The minor number is the same only if loop devices
            // have no partitions, which is the default.
            let number = device.path().and_then(|path| number_of(&path));
            Ok((device, number.unwrap_or(minor)))
        }
        // The kernel has a free device, but its node is missing.
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let number = (0..NUMBERS).find(|number| {
                let device = Path::new(SYS).join(format!("loop{number}"));
                device.exists() && !device.join("loop").exists()
            });
            let number = number.context("cannot get a loop device")?;
            Ok((open(number)?, number))
        }
        Err(error) => Err(denied(error)).context("cannot get a loop device"),
    }
}

/// Returns the number in a name such as `/dev/loop7`.
fn number_of(path: &Path) -> Option<u32> {
    path.file_name()?
        .to_str()?
        .strip_prefix("loop")?
        .parse()
        .ok()
}

/// Opens a loop device that exists. Makes its node if that is missing.
fn open(number: u32) -> Result<LoopDevice> {
    let path = node(number);
    if !Path::new(&path).exists() {
        let device = Path::new(SYS).join(format!("loop{number}/dev"));
        let device = std::fs::read_to_string(&device)
            .with_context(|| format!("{}: cannot read", device.display()))?;
        make_node(&path, &device)?;
    }
    LoopDevice::open(&path).map_err(denied).context(path)
}

#[cfg(test)]
mod tests {
    use super::{loop_file, words};
    use std::path::Path;

    #[test]
    fn files_of_loop_devices() -> std::io::Result<()> {
        let sys = tempfile::tempdir()?;
        let dir = sys.path().join("dev/block/7:3/loop");
        std::fs::create_dir_all(&dir)?;
        std::fs::write(dir.join("backing_file"), "/srv/a layer.obd\n")?;
        let file = loop_file(sys.path(), "7:3");
        assert_eq!(file.as_deref(), Some("/srv/a layer.obd"));
        assert_eq!(loop_file(sys.path(), "254:0"), None);
        Ok(())
    }

    #[test]
    fn lines_of_losetup() {
        assert_eq!(words("5242881 0:41"), ["5242881", "0:41"]);
        let padded = r"\x20\x20\x20\x20\x20123 \x20\x200:41\x20 0 1";
        assert_eq!(words(padded), ["123", "0:41", "0", "1"]);
    }

    #[test]
    fn numbers_of_loop_devices() {
        assert_eq!(super::number_of(Path::new("/dev/loop12")), Some(12));
        assert_eq!(super::number_of(Path::new("/dev/sda")), None);
    }
}
