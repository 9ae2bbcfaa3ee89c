// SPDX-License-Identifier: GPL-2.0

//! Information about devices from sysfs, which needs neither root nor dmsetup.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};

use crate::devices::dm::backing::loop_file;
use crate::devices::dm::node;
use crate::devices::dm::stack::{part, Rank};

/// The kernel's suffix for the name of a deleted file.
const DELETED: &str = " (deleted)";

/// What sysfs shows of a stack.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Size of the disk in bytes, if it exists.
    pub(crate) size: Option<u64>,
    /// Number of devices below the disk.
    pub(crate) below: usize,
}

/// Returns the stacks, by name. `sys` is where sysfs is mounted.
pub(crate) fn stacks(sys: &Path) -> Result<BTreeMap<String, Seen>> {
    let mut stacks: BTreeMap<String, Seen> = BTreeMap::new();
    let block = sys.join("block");
    let entries = match fs::read_dir(&block) {
        // The kernel has no block device.
        Err(error) if error.kind() == ErrorKind::NotFound && sys.join("kernel").exists() => {
            return Ok(stacks)
        }
        entries => entries
            .with_context(|| format!("{}: cannot read; is /sys mounted?", block.display()))?,
    };
    for entry in entries {
        let device = entry.context("/sys/block: cannot read")?.path();
        let uuid = text(&device.join("dm/uuid")).unwrap_or_default();
        let Some((rank, name)) = part(&uuid) else {
            continue;
        };
        let stack = stacks.entry(name.to_owned()).or_default();
        if rank == Rank::Top {
            stack.size = number(&device.join("size")).map(|sectors| sectors.saturating_mul(512));
            stack.below = fs::read_dir(device.join("slaves")).map_or(0, Iterator::count);
        }
    }
    Ok(stacks)
}

/// Returns the name of the device with number `MAJOR:MINOR`: the file of a loop device, or the
/// device node.
pub(crate) fn name(sys: &Path, number: &str) -> String {
    if let Some(file) = loop_file(sys, number) {
        return file;
    }
    let device = sys.join("dev/block").join(number);
    if let Some(name) = text(&device.join("dm/name")) {
        return node(&name).display().to_string();
    }
    let path = fs::canonicalize(&device).ok();
    match path.as_deref().and_then(Path::file_name) {
        Some(name) => format!("/dev/{}", name.to_string_lossy()),
        None => number.to_owned(),
    }
}

/// Returns, if the file of a loop device is shorter than the device, the file's size in bytes and
/// the size when the device was made. `is_over` returns whether the device is over a file: in
/// another mount namespace or below another mount, the same name can be another file.
pub(crate) fn cut(
    sys: &Path,
    number: &str,
    is_over: &dyn Fn(&fs::Metadata) -> bool,
) -> Option<(u64, u64)> {
    let file = loop_file(sys, number).filter(|file| !file.ends_with(DELETED))?;
    let device = sys.join("dev/block").join(number);
    let size = number_of_bytes(&device)?;
    let there = fs::metadata(file).ok().filter(fs::Metadata::is_file)?;
    let is_cut = there.len() < size && is_over(&there);
    is_cut.then_some((there.len(), size))
}

/// Returns how many bytes of its file a loop device covers, from the start of the file.
fn number_of_bytes(device: &Path) -> Option<u64> {
    let offset = number(&device.join("loop/offset")).unwrap_or(0);
    let sectors = number(&device.join("size"))?;
    sectors.checked_mul(512)?.checked_add(offset)
}

fn text(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim_end_matches('\n').to_owned())
}

fn number(path: &Path) -> Option<u64> {
    text(path)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, text: &str) -> std::io::Result<()> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        fs::write(path, text)
    }

    #[test]
    fn what_is_there() -> Result<()> {
        let place = tempfile::tempdir()?;
        let sys = place.path();
        assert!(stacks(sys).is_err());
        fs::create_dir(sys.join("kernel"))?;
        assert_eq!(stacks(sys)?, BTreeMap::new());
        write(&sys.join("block/sda/size"), "8\n")?;
        assert_eq!(stacks(sys)?, BTreeMap::new());
        write(&sys.join("block/dm-0/dm/uuid"), "OVERLAYBD-LAYER-app-0\n")?;
        write(&sys.join("block/dm-1/dm/uuid"), "OVERLAYBD-LSMT-app\n")?;
        write(&sys.join("block/dm-1/size"), "16\n")?;
        write(&sys.join("block/dm-1/slaves/dm-0"), "")?;
        write(&sys.join("block/dm-2/dm/uuid"), "OVERLAYBD-BLOB-half-0\n")?;
        write(&sys.join("block/dm-3/dm/uuid"), "LVM-x\n")?;
        let app = Seen {
            size: Some(8192),
            below: 1,
        };
        let all = [("app", app), ("half", Seen::default())];
        assert_eq!(
            stacks(sys)?,
            all.map(|(name, seen)| (name.to_owned(), seen)).into()
        );

        let file = sys.join("a.obd");
        write(&file, "0123456789")?;
        let device = sys.join("dev/block/7:0");
        write(
            &device.join("loop/backing_file"),
            &format!("{}\n", file.display()),
        )?;
        write(&device.join("size"), "0\n")?;
        assert_eq!(name(sys, "7:0"), file.display().to_string());
        assert_eq!(cut(sys, "7:0", &|_| true), None);
        write(&device.join("size"), "2\n")?;
        assert_eq!(cut(sys, "7:0", &|_| true), Some((10, 1024)));
        assert_eq!(cut(sys, "7:0", &|_| false), None);
        write(&sys.join("dev/block/254:0/dm/name"), "vg-base\n")?;
        assert_eq!(name(sys, "254:0"), "/dev/mapper/vg-base");
        assert_eq!(name(sys, "8:0"), "8:0");
        Ok(())
    }
}
