// SPDX-License-Identifier: GPL-2.0

//! Whether somebody can be seen who may write to a file or block device while it is read.
//!
//! Looks at mounts, at loop devices over the file, at the files that processes have open, and at the
//! locks of QEMU. An ordinary user sees its own processes only; nobody sees mappings of a file that
//! is closed already, and other hosts.

use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind};
use std::ops::BitOrAssign;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use rustix::fs::{major, minor, OFlags};

use crate::exit::{self, Failure};
use crate::interrupt;

/// How often to look before a process is taken for one that writes, and the time in between.
const LOOKS: u32 = 10;
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// What all commands have that read what others may write to.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct InUseArgs {
    /// Read a file or device that somebody has open for writing, or has mounted
    #[arg(long)]
    allow_in_use: bool,
}

impl InUseArgs {
    /// Fails where somebody can be seen who may write to one of `paths`. What isn't there, and what
    /// is neither a file nor a block device, is for others to tell.
    pub(crate) fn check<'a>(&self, paths: impl IntoIterator<Item = &'a Path>) -> Result<()> {
        if self.allow_in_use {
            return Ok(());
        }
        let targets = paths.into_iter().filter_map(Target::of);
        let targets: Vec<Target> = targets.collect();
        let found = match targets.iter().find_map(Target::user) {
            Some(found) => Some(found),
            None => open_for_long(&targets)?,
        };
        match found {
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

/// Looks at processes as [`open_in_processes`] does, more than once: a process that another has just
/// forked has all of its files open until it runs a program of its own.
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
struct Target {
    path: PathBuf,
    meta: Metadata,
}

impl Target {
    fn of(path: &Path) -> Option<Self> {
        let meta = path.metadata().ok()?;
        let kind = meta.file_type();
        (kind.is_file() || kind.is_block_device()).then(|| Self {
            path: path.to_owned(),
            meta,
        })
    }

    fn is_device(&self) -> bool {
        self.meta.file_type().is_block_device()
    }

    /// Whether `other` is the same file, or a node of the same device.
    fn is(&self, other: &Metadata) -> bool {
        match self.is_device() {
            true => other.file_type().is_block_device() && other.rdev() == self.meta.rdev(),
            false => (other.dev(), other.ino()) == (self.meta.dev(), self.meta.ino()),
        }
    }

    /// Looks at what isn't a process.
    fn user(&self) -> Option<String> {
        let path = self.path.display();
        if self.is_device() {
            return device_user(&self.path, self.meta.rdev()).map(|what| format!("{path}: {what}"));
        }
        if let Some(what) = self.loop_user() {
            return Some(format!("{path}: {what}"));
        }
        self.is_locked_by_qemu()
            .then(|| format!("{path}: a virtual machine may write to it"))
    }

    /// A loop device over the file that somebody may write to.
    fn loop_user(&self) -> Option<String> {
        for block in fs::read_dir("/sys/block").ok()?.flatten() {
            let Ok(text) = fs::read(block.path().join("loop/backing_file")) else {
                continue;
            };
            let backing = Path::new(std::ffi::OsStr::from_bytes(text.trim_ascii_end()));
            if !backing.metadata().is_ok_and(|meta| self.is(&meta)) {
                continue;
            }
            let node = Path::new("/dev").join(block.file_name());
            let what = match node.metadata() {
                Ok(meta) => device_user(&node, meta.rdev()).or_else(|| {
                    open_in_processes(&[Target {
                        path: node.clone(),
                        meta,
                    }])
                    .ok()?
                }),
                // Without a node, nobody knows.
                Err(_) => (!is_read_only(&block.path())).then(String::new),
            };
            if what.is_some() {
                let node = node.display();
                return Some(format!("{node} is over it and can be written to"));
            }
        }
        None
    }

    /// Whether QEMU has locked the byte that stands for writing: `block/file-posix.c` there.
    fn is_locked_by_qemu(&self) -> bool {
        let place = (self.meta.dev(), self.meta.ino());
        let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
        locks.lines().any(|line| qemu_writes(line, place))
    }
}

/// Whether a line of `/proc/locks` says that QEMU may write to the file with this device and inode.
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

/// What uses the block device at `path`, where that may write to it.
fn device_user(path: &Path, rdev: u64) -> Option<String> {
    let system = PathBuf::from(format!("/sys/dev/block/{}:{}", major(rdev), minor(rdev)));
    if is_read_only(&system) {
        return None;
    }
    let exclusive = File::options()
        .read(true)
        .custom_flags(OFlags::EXCL.bits() as i32)
        .open(path);
    match exclusive {
        // A file system that was mounted read-only doesn't change.
        Err(error) if error.kind() == ErrorKind::ResourceBusy => match mounts(rdev).as_slice() {
            [] => {
                let holders = names(&system.join("holders"));
                let writing = |name: &String| !is_read_only(&Path::new("/sys/block").join(name));
                match holders.is_empty() || holders.iter().any(writing) {
                    true => Some("is in use".to_owned() + &by(&holders)),
                    false => None,
                }
            }
            found => {
                let writable = found.iter().find(|mount| mount.writable);
                writable.map(|mount| format!("is mounted read-write on {}", mount.place))
            }
        },
        _ => None,
    }
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

/// The mounts of a block device that this process sees.
fn mounts(rdev: u64) -> Vec<Mount> {
    let wanted = format!("{}:{}", major(rdev), minor(rdev));
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
            // File systems on several devices have a number of their own.
            let is_source = || {
                let meta = Path::new(source).metadata();
                meta.is_ok_and(|meta| meta.file_type().is_block_device() && meta.rdev() == rdev)
            };
            (*device == wanted || is_source()).then(|| Mount {
                place: (*place).to_owned(),
                writable: options.split(',').any(|option| option == "rw"),
            })
        })
        .collect()
}

/// Looks for one of `targets` among what processes have open for writing.
fn open_in_processes(targets: &[Target]) -> Result<Option<String>> {
    if targets.is_empty() {
        return Ok(None);
    }
    let own = std::process::id().to_string();
    // Without /proc, nothing is seen.
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
        // Those of others can't be seen, and processes end while we look.
        let files = fs::read_dir(process.path().join("fd"));
        for file in files.into_iter().flatten().flatten() {
            let found = targets
                .iter()
                .find(|target| opens(&process.path(), &file.path(), target));
            if let Some(target) = found {
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

/// Whether a process has `target` open for writing with the descriptor that `file` is the link of.
fn opens(process: &Path, file: &Path, target: &Target) -> bool {
    // The mode of the link says what the file was opened for.
    let writes = |meta: Metadata| meta.mode() & 0o200 != 0;
    if !file.symlink_metadata().is_ok_and(writes) {
        return false;
    }
    // Before it is asked what the link leads to: a server that is gone would keep us.
    let likely = match target.is_device() {
        true => file.read_link().is_ok_and(|path| path.starts_with("/dev")),
        false => has_inode(process, file, target.meta.ino()).unwrap_or(true),
    };
    likely && file.metadata().is_ok_and(|meta| target.is(&meta))
}

/// Whether a descriptor is of a file with this inode; kernels before 5.14 don't tell.
fn has_inode(process: &Path, file: &Path, ino: u64) -> io::Result<bool> {
    let number = file.file_name().unwrap_or_default();
    let text = fs::read_to_string(process.join("fdinfo").join(number))?;
    let found = text.lines().find_map(|line| line.strip_prefix("ino:"));
    Ok(found.is_none_or(|found| found.trim() == ino.to_string()))
}

#[cfg(test)]
mod tests {
    use super::qemu_writes;

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
