// SPDX-License-Identifier: GPL-2.0

//! Looks for anyone who may write to a file or block device while it is read.
//!
//! This checks mounts, loop devices over the file, the open files of processes, and the locks of QEMU. An
//! ordinary user can see only their own processes. No one can see other hosts, or mappings of a file that was
//! closed.

use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind};
use std::ops::BitOrAssign;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use rustix::fs::{major, makedev, minor, OFlags};

use crate::terminal::exit::{self, Failure};
use crate::terminal::interrupt;

/// How many times to look before a process counts as a writer, and the time in between.
const LOOKS: u32 = 10;
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);
/// How many times a device must be found claimed if it is unknown who has claimed it.
const CLAIMS: u32 = 20;

/// Arguments of all commands that read files or devices to which others may write.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct InUseArgs {
    /// Read a file or device that somebody has open for writing, or has mounted
    #[arg(long)]
    allow_in_use: bool,
}

impl InUseArgs {
    /// Returns an error if someone may write to one of `paths`, which this process will read. Ignores paths that
    /// don't exist or are neither a file nor a block device; the caller reports those.
    pub(crate) fn check<'a>(&self, paths: impl IntoIterator<Item = &'a Path>) -> Result<()> {
        self.look(paths, Claim::Try)
    }

    /// As [`Self::check`], for `paths` that device-mapper will read. Doesn't try to claim block devices:
    /// device-mapper does that, and trying would disturb another obdsetup that sets up the same device.
    pub(crate) fn check_below<'a>(&self, paths: impl IntoIterator<Item = &'a Path>) -> Result<()> {
        self.look(paths, Claim::LeaveToKernel)
    }

    fn look<'a>(&self, paths: impl IntoIterator<Item = &'a Path>, claim: Claim) -> Result<()> {
        if self.allow_in_use {
            return Ok(());
        }
        let targets: Vec<Target> = paths.into_iter().filter_map(Target::of).collect();
        match find_user(&targets, claim)? {
            None => Ok(()),
            Some(found) => Err(Failure::error(
                exit::BUSY,
                format!(
                    "{found}; wait until that is done, or read it all the same with --allow-in-use"
                ),
            )),
        }
    }
}

/// How to check whether a block device is claimed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Claim {
    /// Open it exclusively, which fails if someone has claimed it.
    Try,
    /// Don't check: the kernel claims the device when a table names it.
    LeaveToKernel,
}

/// Returns a description of who may write to one of `targets`; `None` if nobody is found.
fn find_user(targets: &[Target], claim: Claim) -> Result<Option<String>> {
    let loops = match targets.iter().any(|target| !target.is_device()) {
        true => writable_loops(Path::new("/sys")),
        false => Vec::new(),
    };
    // All files and devices to look for among the open files of processes, which are listed only once.
    let mut open = Vec::new();
    for target in targets {
        interrupt::check()?;
        if let Some(found) = target.user(claim)? {
            return Ok(Some(format!("{}: {found}", target.path.display())));
        }
        open.push(target.clone());
        let over = |found: &&Loop| found.file.metadata().is_ok_and(|meta| target.is(&meta));
        for found in loops.iter().filter(over) {
            let node = found.node.display();
            let said = format!(
                "{}: {node} is over it and can be written to",
                target.path.display()
            );
            let Some(device) = Target::of(&found.node) else {
                // Without a node, it is unknown whether the loop device is in use: assume that it is.
                return Ok(Some(said));
            };
            if device_user(&device, Claim::Try)?.is_some() {
                return Ok(Some(said));
            }
            open.push(Target {
                said: Some(said),
                ..device
            });
        }
    }
    open_for_long(&open)
}

/// A loop device that can be written to.
pub(crate) struct Loop {
    node: PathBuf,
    /// `MAJOR:MINOR`.
    pub(crate) number: String,
    /// The file below, with the kernel's name for it.
    pub(crate) file: PathBuf,
}

/// Returns the loop devices that can be written to. The many loop devices over layers are read-only. `sys` is
/// where sysfs is mounted.
pub(crate) fn writable_loops(sys: &Path) -> Vec<Loop> {
    let block = sys.join("block");
    let loops = names(&block).into_iter().filter_map(|name| {
        let system = block.join(&name);
        if !name.starts_with("loop") || is_read_only(&system) {
            return None;
        }
        let text = fs::read(system.join("loop/backing_file")).ok()?;
        let file = std::ffi::OsStr::from_bytes(text.trim_ascii_end());
        let number = fs::read_to_string(system.join("dev")).unwrap_or_default();
        Some(Loop {
            node: Path::new("/dev").join(&name),
            number: number.trim_end().to_owned(),
            file: file.into(),
        })
    });
    loops.collect()
}

/// Calls [`open_in_processes`] more than once, because a process that was just forked has all files of its
/// parent open until it runs another program.
fn open_for_long(targets: &[Target]) -> Result<Option<String>> {
    for _ in 1..LOOKS {
        match open_in_processes(targets)? {
            None => return Ok(None),
            Some(_) => std::thread::sleep(BETWEEN_LOOKS),
        }
        interrupt::check()?;
    }
    open_in_processes(targets)
}

impl BitOrAssign<&Self> for InUseArgs {
    fn bitor_assign(&mut self, other: &Self) {
        self.allow_in_use |= other.allow_in_use;
    }
}

/// A file or block device.
#[derive(Clone)]
struct Target {
    path: PathBuf,
    meta: Metadata,
    /// The description to return if a process has it open; `None` to describe the process.
    said: Option<String>,
}

impl Target {
    fn of(path: &Path) -> Option<Self> {
        let meta = path.metadata().ok()?;
        let kind = meta.file_type();
        (kind.is_file() || kind.is_block_device()).then(|| Self {
            path: path.to_owned(),
            meta,
            said: None,
        })
    }

    fn is_device(&self) -> bool {
        self.meta.file_type().is_block_device()
    }

    /// Returns whether `other` is the same file, or a node of the same device.
    fn is(&self, other: &Metadata) -> bool {
        match self.is_device() {
            true => other.file_type().is_block_device() && other.rdev() == self.meta.rdev(),
            false => (other.dev(), other.ino()) == (self.meta.dev(), self.meta.ino()),
        }
    }

    /// Returns a description of who may write to the target, as far as this can be found without looking at
    /// processes.
    fn user(&self, claim: Claim) -> Result<Option<String>> {
        if self.is_device() {
            return device_user(self, claim);
        }
        let said = || "a virtual machine may write to it".to_owned();
        Ok(self.is_locked_by_qemu().then(said))
    }

    /// Returns whether QEMU has locked a byte that means that it may write: see `block/file-posix.c` of QEMU.
    fn is_locked_by_qemu(&self) -> bool {
        let place = (self.meta.dev(), self.meta.ino());
        let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
        locks.lines().any(|line| qemu_writes(line, place))
    }
}

/// Returns whether a line of `/proc/locks` says that QEMU may write to the file with this device and inode.
fn qemu_writes(line: &str, (dev, ino): (u64, u64)) -> bool {
    const WRITE: u64 = 101;
    const RESIZE: u64 = 103;
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, "OFDLCK", _, _, _, file, first, last] = words.as_slice() else {
        return false;
    };
    let wanted = format!("{:02x}:{:02x}:{ino}", major(dev), minor(dev));
    let (Ok(first), Ok(last)) = (first.parse::<u64>(), last.parse::<u64>()) else {
        return false;
    };
    *file == wanted
        && [WRITE, RESIZE]
            .iter()
            .any(|byte| (first..=last).contains(byte))
}

/// Returns a description of who uses a block device and may write to it. Mounts of its partitions and devices
/// over these count, too.
fn device_user(device: &Target, claim: Claim) -> Result<Option<String>> {
    let rdev = device.meta.rdev();
    let system = system(rdev);
    if is_read_only(&system) {
        return Ok(None);
    }
    // A file system that is mounted read-only doesn't change. With `LeaveToKernel`, mounts aren't checked:
    // the kernel refuses a table over a mounted device, and the reason is reported then.
    let mounts = match claim {
        Claim::Try => mounts(rdev),
        Claim::LeaveToKernel => Vec::new(),
    };
    if let Some(mount) = mounts.iter().find(|mount| mount.writable) {
        return Ok(Some(format!("is mounted read-write on {}", mount.place)));
    }
    let holders: Vec<String> = with_partitions(&system)
        .iter()
        .flat_map(|part| names(&part.join("holders")))
        .collect();
    let writing = |name: &String| !is_read_only(&Path::new("/sys/block").join(name));
    if holders.iter().any(writing) {
        return Ok(Some("is in use".to_owned() + &by(&holders)));
    }
    if claim == Claim::LeaveToKernel || !mounts.is_empty() || !holders.is_empty() {
        return Ok(None);
    }
    // Programs that only examine the device claim it for a moment.
    for _ in 1..CLAIMS {
        if !is_claimed(&device.path) {
            return Ok(None);
        }
        interrupt::check()?;
        std::thread::sleep(BETWEEN_LOOKS);
    }
    Ok(is_claimed(&device.path).then(|| "is in use".to_owned()))
}

/// Returns whether someone has claimed the block device at `path`.
fn is_claimed(path: &Path) -> bool {
    let claim = File::options()
        .read(true)
        .custom_flags(OFlags::EXCL.bits() as i32)
        .open(path);
    claim.is_err_and(|error| error.kind() == ErrorKind::ResourceBusy)
}

/// Returns where the block device with number `MAJOR:MINOR` or one of its partitions is mounted in the mount
/// namespace of this process.
pub(crate) fn mounted_on(number: &str) -> Option<String> {
    let (major, minor) = number.split_once(':')?;
    let rdev = makedev(major.parse().ok()?, minor.parse().ok()?);
    mounts(rdev).into_iter().next().map(|mount| mount.place)
}

/// Returns the directory of a block device in sysfs.
fn system(rdev: u64) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", major(rdev), minor(rdev)))
}

/// Returns the directory of a block device in sysfs, and those of its partitions.
fn with_partitions(system: &Path) -> Vec<PathBuf> {
    let entries = names(system).into_iter().map(|name| system.join(name));
    let partitions = entries.filter(|path| path.join("partition").exists());
    std::iter::once(system.to_owned())
        .chain(partitions)
        .collect()
}

fn by(holders: &[String]) -> String {
    match holders {
        [] => String::new(),
        holders => format!(" by {}", holders.join(", ")),
    }
}

fn is_read_only(system: &Path) -> bool {
    fs::read(system.join("ro")).is_ok_and(|text| text.trim_ascii() == b"1")
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// A mount of a block device.
struct Mount {
    place: String,
    writable: bool,
}

/// Returns the mounts of a block device and of its partitions in the mount namespace of this process.
fn mounts(rdev: u64) -> Vec<Mount> {
    let number = |system: &PathBuf| {
        let text = fs::read_to_string(system.join("dev")).ok()?;
        Some(text.trim_end().to_owned())
    };
    let wanted: Vec<String> = with_partitions(&system(rdev))
        .iter()
        .filter_map(number)
        .collect();
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let (mount, super_block) = line.split_once(" - ")?;
            let mount: Vec<&str> = mount.split(' ').collect();
            let [_, _, device, _, place, ..] = mount.as_slice() else {
                return None;
            };
            let super_block: Vec<&str> = super_block.split(' ').collect();
            let [_, source, options, ..] = super_block.as_slice() else {
                return None;
            };
            // A file system on several devices shows its own device number.
            let is_source = || {
                let meta = Path::new(source).metadata();
                meta.is_ok_and(|meta| {
                    let (major, minor) = (major(meta.rdev()), minor(meta.rdev()));
                    meta.file_type().is_block_device()
                        && wanted.contains(&format!("{major}:{minor}"))
                })
            };
            (wanted.iter().any(|wanted| wanted == device) || is_source()).then(|| Mount {
                place: (*place).to_owned(),
                writable: options.split(',').any(|option| option == "rw"),
            })
        })
        .collect()
}

/// Looks for one of `targets` among the files that processes have open for writing. Returns a description.
fn open_in_processes(targets: &[Target]) -> Result<Option<String>> {
    if targets.is_empty() {
        return Ok(None);
    }
    let own = std::process::id().to_string();
    // Without /proc, nothing is found.
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        interrupt::check()?;
        let name = process.file_name();
        let Some(pid) = name
            .to_str()
            .filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
        else {
            continue;
        };
        if pid == own {
            continue;
        }
        // This fails for processes of other users, and for processes that end meanwhile.
        let files = fs::read_dir(process.path().join("fd"));
        for file in files.into_iter().flatten().flatten() {
            let Some(opened) = Opened::of(&process.path(), &file.path()) else {
                continue;
            };
            if let Some(target) = targets.iter().find(|target| opened.is(target)) {
                if target.said.is_some() {
                    return Ok(target.said.clone());
                }
                let program = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                return Ok(Some(format!(
                    "{}: process {pid} ({}) has it open for writing",
                    target.path.display(),
                    program.trim_end()
                )));
            }
        }
    }
    Ok(None)
}

/// A file that a process has open for writing, with what is needed to compare it with many targets.
struct Opened {
    /// The link of the file descriptor in `/proc`.
    link: PathBuf,
    is_below_dev: bool,
    /// Number of the inode; `None` on kernels before 5.14, which don't show it.
    inode: Option<String>,
}

impl Opened {
    /// Looks at a file descriptor of a process. Returns `None` if it isn't open for writing.
    fn of(process: &Path, link: &Path) -> Option<Self> {
        // The mode of the link says how the file was opened.
        let meta = link.symlink_metadata().ok()?;
        (meta.mode() & 0o200 != 0).then(|| Self {
            link: link.to_owned(),
            is_below_dev: link.read_link().is_ok_and(|path| path.starts_with("/dev")),
            inode: inode(process, link).ok().flatten(),
        })
    }

    fn is(&self, target: &Target) -> bool {
        // Checked before following the link, which would hang if the file is on a network file system whose
        // server is gone.
        let likely = match (target.is_device(), &self.inode) {
            (true, _) => self.is_below_dev,
            (false, Some(inode)) => *inode == target.meta.ino().to_string(),
            (false, None) => true,
        };
        likely && self.link.metadata().is_ok_and(|meta| target.is(&meta))
    }
}

/// Returns the number of the inode that a process has open with a file descriptor, `file` in its `/proc/PID/fd`.
/// Returns `None` on kernels before 5.14.
fn inode(process: &Path, file: &Path) -> io::Result<Option<String>> {
    let number = file.file_name().unwrap_or_default();
    let text = fs::read_to_string(process.join("fdinfo").join(number))?;
    let found = text.lines().find_map(|line| line.strip_prefix("ino:"));
    Ok(found.map(|found| found.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io;
    use std::path::Path;

    use super::{qemu_writes, with_partitions, writable_loops};

    /// Read-only loop devices don't count, even if a process has their node open for writing, as an obdsetup
    /// that attaches one has.
    #[test]
    fn loops_that_can_be_written_to() -> io::Result<()> {
        let sys = tempfile::tempdir()?;
        let sys = sys.path();
        for (name, read_only) in [("loop0", "1\n"), ("loop1", "0\n"), ("loop2", "1\n")] {
            let device = sys.join("block").join(name);
            fs::create_dir_all(device.join("loop"))?;
            fs::write(device.join("ro"), read_only)?;
            fs::write(device.join("loop/backing_file"), format!("/a b/{name}\n"))?;
        }
        // A loop device without a file, and a device that is no loop device.
        fs::create_dir_all(sys.join("block/loop3"))?;
        fs::create_dir_all(sys.join("block/sda"))?;
        let found = writable_loops(sys);
        let found: Vec<_> = found
            .iter()
            .map(|found| (&*found.node, &*found.file))
            .collect();
        assert_eq!(found, [(Path::new("/dev/loop1"), Path::new("/a b/loop1"))]);
        Ok(())
    }

    #[test]
    fn partitions() -> io::Result<()> {
        let sys = tempfile::tempdir()?;
        let disk = sys.path();
        for name in ["vda1", "vda2", "holders"] {
            fs::create_dir(disk.join(name))?;
        }
        fs::write(disk.join("vda2/partition"), "2\n")?;
        assert_eq!(with_partitions(disk), [disk.to_owned(), disk.join("vda2")]);
        Ok(())
    }

    #[test]
    fn locks_of_qemu() {
        let place = (rustix::fs::makedev(8, 17), 1234);
        for (line, wanted) in [
            ("1: OFDLCK ADVISORY  READ -1 08:11:1234 101 101", true),
            ("1: OFDLCK ADVISORY  READ -1 08:11:1234 100 103", true),
            ("1: OFDLCK ADVISORY  READ -1 08:11:1234 100 100", false),
            ("1: OFDLCK ADVISORY  READ -1 08:11:1234 201 201", false),
            ("1: OFDLCK ADVISORY  READ -1 08:11:1235 101 101", false),
            ("1: OFDLCK ADVISORY  READ -1 08:12:1234 101 101", false),
            ("1: POSIX  ADVISORY  WRITE 77 08:11:1234 101 101", false),
            ("1: -> OFDLCK ADVISORY  READ -1 08:11:1234 101 101", false),
            ("", false),
        ] {
            assert_eq!(qemu_writes(line, place), wanted, "{line}");
        }
    }
}
