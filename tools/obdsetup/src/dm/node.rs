// SPDX-License-Identifier: GPL-2.0

//! Nodes in `/dev/mapper`. udev makes them; where none runs, or `DM_DISABLE_UDEV` says to do
//! without, we do, as libdm does.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{makedev, mknodat, FileType, Mode, CWD};

/// Where the nodes are.
const DIRECTORY: &str = "/dev/mapper";

/// The node of device `name`.
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

/// Whether udev looks after the nodes.
fn udev() -> bool {
    let disabled = std::env::var_os("DM_DISABLE_UDEV").is_some_and(|value| value != "0");
    !disabled && Path::new("/run/udev/control").exists()
}

/// Makes sure that the node of device `name` is there.
pub(crate) fn ensure(name: &str, major: u32, minor: u32) -> Result<()> {
    let path = path(name);
    let wanted = makedev(major, minor);
    let context = || format!("cannot make {}", path.display());
    match std::fs::metadata(&path) {
        Ok(meta) if meta.file_type().is_block_device() && meta.rdev() == wanted => return Ok(()),
        _ if udev() => return Ok(()),
        _ => {}
    }
    std::fs::create_dir_all(DIRECTORY).with_context(context)?;
    remove_file(&path).with_context(context)?;
    let mode = Mode::RUSR | Mode::WUSR;
    mknodat(CWD, &path, FileType::BlockDevice, mode, wanted).with_context(context)
}

/// Removes the node of device `name`, which is gone.
pub(crate) fn remove(name: &str) {
    if !udev() {
        // A stale node does no harm: `ensure` replaces it.
        let _ = remove_file(&path(name));
    }
}

fn remove_file(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
