// SPDX-License-Identifier: GPL-2.0

//! Files as read-only loop devices, which vanish when device-mapper lets go of them.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use loopdev::{LoopControl, LoopDevice};
use rustix::fs::MemfdFlags;

/// How often another process may take the free loop device first.
const TRIES: u32 = 100;

/// A block device that a table may name. A loop device is gone when this is dropped and nobody
/// else has it open.
pub(crate) struct Backing {
    /// `MAJOR:MINOR`.
    pub(crate) number: String,
    _device: Option<LoopDevice>,
}

impl Backing {
    /// The block device at `path`.
    pub(crate) fn device(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).with_context(|| path.display().to_string())?;
        let rdev = meta.rdev();
        Ok(Self {
            number: format!("{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev)),
            _device: None,
        })
    }

    /// A loop device over `file`. With `direct`, past the page cache where its file system can do
    /// that: what is above caches what it decompressed.
    pub(crate) fn file(file: &File, direct: bool) -> Result<Self> {
        let device = attach(file)?;
        if direct {
            // Not every file system can.
            let _ = device.set_direct_io(true);
        }
        Self::of_loop(device)
    }

    /// A loop device over `bytes`, which are in memory: nothing is left of them on any disk.
    pub(crate) fn bytes(bytes: &[u8]) -> Result<Self> {
        let memory = rustix::fs::memfd_create("obdsetup-tail", MemfdFlags::CLOEXEC)
            .context("cannot make a file in memory")?;
        let mut file = File::from(memory);
        file.write_all(bytes)
            .context("cannot write to a file in memory")?;
        // A loop device is as read-only as the file that it is made of.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = File::open(path).context("cannot open a file in memory")?;
        Self::of_loop(attach(&file)?)
    }

    fn of_loop(device: LoopDevice) -> Result<Self> {
        let (major, minor) = (device.major()?, device.minor()?);
        Ok(Self {
            number: format!("{major}:{minor}"),
            _device: Some(device),
        })
    }
}

/// The file behind the loop device with number `MAJOR:MINOR`, where it is one. `sys` is where sysfs
/// is mounted.
pub(crate) fn loop_file(sys: &Path, number: &str) -> Option<String> {
    let path = sys.join("dev/block").join(number).join("loop/backing_file");
    let bytes = std::fs::read(path).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    Some(text.strip_suffix('\n').unwrap_or(&text).to_owned())
}

/// Attaches `file` to a free loop device.
fn attach(file: &File) -> Result<LoopDevice> {
    let control = LoopControl::open().context("cannot open /dev/loop-control (modprobe loop?)")?;
    let mut tries = 0;
    loop {
        let device = control.next_free().context("cannot get a loop device")?;
        let attached = device
            .with()
            .read_only(true)
            .autoclear(true)
            .attach_fd(file.as_fd().as_raw_fd());
        match attached {
            Ok(()) => return Ok(device),
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy && tries < TRIES => {
                tries += 1;
            }
            Err(error) => return Err(error).context("cannot attach a loop device"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::loop_file;

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
}
