// SPDX-License-Identifier: GPL-2.0

//! Block devices in sysfs, by their numbers `MAJOR:MINOR`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The directory of block devices by their numbers in sysfs.
const SYS: &str = "/sys/dev/block";

/// Returns a device number as sysfs has it.
pub(super) fn number_of(rdev: u64) -> String {
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

/// The devices that are over a block device, or over parts of it, by their numbers. These may be mapped devices or
/// others, such as RAID.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Users {
    /// Those over the block device itself.
    pub(super) own: BTreeSet<String>,
    /// Those over its partitions, or over the disk that it is a partition of.
    pub(super) others: BTreeSet<String>,
}

/// Returns the devices that are over block device `number`, its partitions, or its disk.
pub(super) fn users_of_any_part(number: &str) -> Users {
    users_at(&system(number))
}

/// As [`users_of_any_part`], for the device with the directory `device` in sysfs.
fn users_at(device: &Path) -> Users {
    let device = device.canonicalize().unwrap_or_else(|_| device.to_owned());
    let is_part = |path: &Path| path.join("partition").exists();
    let entries = fs::read_dir(&device).into_iter().flatten().flatten();
    let parts = entries
        .map(|entry| entry.path())
        .filter(|path| is_part(path));
    let disk = device.parent().filter(|_| is_part(&device));
    let others = parts.chain(disk.map(Path::to_owned));
    let over = |one: &Path| numbers_in(&one.join("holders"));
    Users {
        own: over(&device),
        others: others.flat_map(|one| over(&one)).collect(),
    }
}

/// Returns the kernel's name of block device `number`, or the number if there is no such device.
pub(super) fn name(number: &str) -> String {
    let device = system(number).canonicalize().unwrap_or_default();
    let name = device.file_name().map(|name| name.to_string_lossy());
    name.map_or_else(|| number.to_owned(), std::borrow::Cow::into_owned)
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

/// Returns the kernel's sequence number of the disk that block device `number` is, or is a partition of, and
/// the first sector of the partition. The sequence number is unique, even if a new disk gets the device
/// number of an old one.
pub(super) fn disk(number: &str) -> (String, String) {
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

#[cfg(test)]
mod tests {
    use super::{fs, users_at, Path};

    /// A disk with a logical volume over a partition, and a RAID over another one.
    #[test]
    fn users_of_parts() -> std::io::Result<()> {
        let sys = tempfile::tempdir()?;
        let file = |path: &Path, text: &str| {
            fs::create_dir_all(path.parent().unwrap_or(path))?;
            fs::write(path, text)
        };
        let disk = sys.path().join("sdb");
        let (one, two) = (disk.join("sdb1"), disk.join("sdb2"));
        file(&one.join("partition"), "1\n")?;
        file(&one.join("holders/dm-3/dev"), "253:3\n")?;
        file(&two.join("partition"), "2\n")?;
        file(&two.join("holders/md0/dev"), "9:0\n")?;
        fs::create_dir(disk.join("holders"))?;
        let users = users_at(&disk);
        assert!(users.own.is_empty());
        assert!(users.others.iter().eq(["253:3", "9:0"]));
        // The users of another partition exclude nobody.
        let users = users_at(&one);
        assert!(users.own.iter().eq(["253:3"]));
        assert!(users.others.is_empty());
        file(&disk.join("holders/dm-4/dev"), "253:4\n")?;
        assert!(users_at(&one).others.iter().eq(["253:4"]));
        assert!(users_at(&disk).own.iter().eq(["253:4"]));
        Ok(())
    }
}
