// SPDX-License-Identifier: GPL-2.0

//! Checks whether this process may use device-mapper and loop devices, and says what to do if it may not: the
//! messages of dmsetup would be about an incompatible libdevmapper. Makes nodes that are missing.

use std::fs::File;
use std::io::{Error, ErrorKind};
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::FileType;
use rustix::io::Errno;

use crate::terminal::exit::{self, Failure};

/// A part of the kernel to which commands are sent through a control device.
pub(super) struct Part {
    /// The control device.
    control: &'static str,
    /// The directory of the control device in sysfs.
    sys: &'static str,
    /// The number of the control device, `MAJOR:MINOR`, which is the same in all kernels.
    number: &'static str,
    /// The mode of the control device's node, as devtmpfs or udev sets it.
    mode: u32,
    /// Its name in messages.
    what: &'static str,
    /// The name of its module.
    module: &'static str,
}

pub(super) const DEVICE_MAPPER: Part = Part {
    control: "/dev/mapper/control",
    sys: "/sys/class/misc/device-mapper",
    number: "10:236",
    mode: 0o600,
    what: "device-mapper",
    module: "dm_mod",
};
pub(super) const LOOP: Part = Part {
    control: "/dev/loop-control",
    sys: "/sys/class/misc/loop-control",
    number: "10:237",
    mode: 0o660,
    what: "loop devices",
    module: "loop",
};

/// Exists if sysfs is mounted.
const SYS: &str = "/sys/class/misc";
/// The mode of the node of a block device.
const BLOCK: u32 = 0o660;
/// What to do if a device can't be opened.
const DENIED: &str =
    "permission denied: must be root, and in a container must be given this device";
/// What to do if the targets are missing. Appended to dmsetup's message.
const NO_MODULE: &str = "; the kernel module dm_overlaybd is not loaded: run `modprobe \
                         dm_overlaybd', or install the package dm-overlaybd-dkms";
/// What to do if the targets are missing, but the module is installed. Appended to dmsetup's message.
const NOT_LOADED: &str =
    "; the kernel module dm_overlaybd is installed, but not loaded: `modprobe \
                          dm_overlaybd' says why";

impl Part {
    /// Checks that this process can send commands. Makes the control device's node if that is missing.
    pub(super) fn check(&self) -> Result<()> {
        let control = self.control;
        let is_root = rustix::process::geteuid().is_root();
        let open = || File::options().read(true).write(true).open(control);
        let opened = match open() {
            Err(error) if error.kind() == ErrorKind::NotFound && is_root => {
                let made = self.make_control()?;
                let opened = open();
                if opened.is_err() {
                    made.undo();
                }
                opened
            }
            opened => opened,
        };
        match opened {
            Ok(_) => Ok(()),
            Err(error) => {
                let (code, message) = self.explain(&error);
                Err(Failure::error(code, format!("{control}: {message}")))
            }
        }
    }

    /// Makes the control device's node. If the module isn't loaded, the kernel loads it when the node is
    /// opened, as with the nodes of devtmpfs.
    fn make_control(&self) -> Result<MadeControl<'_>> {
        let path = Path::new(self.control);
        let number = std::fs::read_to_string(Path::new(self.sys).join("dev"));
        // An error is ignored: then the node can't be made, either.
        let directory = path.parent();
        let directory = directory.filter(|directory| std::fs::create_dir(directory).is_ok());
        let mut made = MadeControl {
            node: None,
            directory,
        };
        let character = FileType::CharacterDevice;
        match number {
            Ok(number) => {
                let done = make_node_with(self.control, character, &number, self.mode);
                if let Err(error) = done {
                    made.undo();
                    return Err(error);
                }
            }
            Err(_) => match make_node_with(self.control, character, self.number, self.mode) {
                Ok(true) => made.node = Some(path),
                Ok(false) => {}
                Err(error) => {
                    made.undo();
                    return Err(match Path::new(SYS).exists() {
                        true => Failure::error(exit::DEVICE, self.missing()),
                        false => error,
                    });
                }
            },
        }
        Ok(made)
    }

    fn missing(&self) -> String {
        let Self { what, module, .. } = self;
        format!("this kernel has no {what}: run `modprobe {module}'")
    }

    /// Returns the exit code and the message for an error of opening the control device.
    fn explain(&self, error: &Error) -> (u8, String) {
        match error.kind() {
            ErrorKind::NotFound | ErrorKind::PermissionDenied => {
                (exit::PERMISSION, DENIED.to_owned())
            }
            _ => match error.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::NODEV | Errno::NXIO) => (exit::DEVICE, self.missing()),
                _ => (exit::DEVICE, error.to_string()),
            },
        }
    }
}

/// What was made for a control device, and is removed after an error: the node, if the device isn't in sysfs, and the
/// directory of the node.
struct MadeControl<'a> {
    node: Option<&'a Path>,
    directory: Option<&'a Path>,
}

impl MadeControl<'_> {
    /// Removes them.
    fn undo(self) {
        // Errors are ignored: what is left does no harm.
        if let Some(node) = self.node {
            let _ = std::fs::remove_file(node);
        }
        if let Some(directory) = self.directory {
            // Fails if anything is in it.
            let _ = std::fs::remove_dir(directory);
        }
    }
}

/// Returns the error for `error`, of opening or making a device.
pub(super) fn denied(error: Error) -> anyhow::Error {
    match error.kind() {
        ErrorKind::PermissionDenied => Failure::error(exit::PERMISSION, DENIED),
        _ => error.into(),
    }
}

/// Returns what to do if the kernel doesn't have `target`. Appended to dmsetup's message.
pub(super) fn no_target(target: &str) -> String {
    if !matches!(target, "zfile" | "lsmt" | "lsmt-dax") {
        return format!("; the kernel has no target {target}: run `modprobe dm_{target}'");
    }
    if Path::new("/sys/module/dm_overlaybd").exists() {
        return format!(
            "; the dm_overlaybd that is loaded has no target {target}: another version?"
        );
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let modules = Path::new("/lib/modules").join(release.trim());
    let list = std::fs::read_to_string(modules.join("modules.dep")).unwrap_or_default();
    match has_module(&list) {
        true => NOT_LOADED.to_owned(),
        false => NO_MODULE.to_owned(),
    }
}

/// Returns whether a modules.dep has the module dm_overlaybd.
fn has_module(list: &str) -> bool {
    list.lines().any(|line| {
        let file = line.split(':').next().unwrap_or_default();
        let name = file.rsplit('/').next().unwrap_or_default();
        name.starts_with("dm_overlaybd.ko")
    })
}

/// Makes the node at `path` of the block device `number`, `MAJOR:MINOR`, as devtmpfs or udev would.
pub(super) fn make_node(path: &str, number: &str) -> Result<()> {
    make_node_with(path, FileType::BlockDevice, number, BLOCK).map(drop)
}

/// Makes the node at `path` of the device `number`, `MAJOR:MINOR`. Returns whether it was missing.
fn make_node_with(path: &str, kind: FileType, number: &str, mode: u32) -> Result<bool> {
    let number = number.trim();
    let (major, minor) = number.split_once(':').unwrap_or_default();
    let device = rustix::fs::makedev(major.parse()?, minor.parse()?);
    let made = rustix::fs::mknodat(
        rustix::fs::CWD,
        path,
        kind,
        rustix::fs::Mode::from_raw_mode(mode),
        device,
    );
    match made {
        Ok(()) => Ok(true),
        // Another process has made it meanwhile.
        Err(Errno::EXIST) => Ok(false),
        Err(error) => {
            let letter = match kind {
                FileType::CharacterDevice => 'c',
                _ => 'b',
            };
            let context = format!(
                "{path} is missing, and cannot be made (mknod {path} {letter} {major} {minor})"
            );
            Err(Error::from(error)).context(context)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_do() {
        let said = |errno| DEVICE_MAPPER.explain(&Error::from_raw_os_error(errno));
        let (code, text) = said(13);
        assert!(code == 2 && text.contains("must be root"), "{text}");
        let (code, text) = said(19);
        assert!(code == 4 && text.contains("modprobe dm_mod"), "{text}");
        assert_eq!(said(5).0, 4);
        // Only users other than root get this error.
        assert_eq!(said(2), said(13));
        let (code, text) = LOOP.explain(&Error::from_raw_os_error(19));
        assert_eq!(code, 4);
        assert_eq!(text, "this kernel has no loop devices: run `modprobe loop'");
    }

    #[test]
    fn targets() {
        let said = no_target("snapshot");
        assert!(said.ends_with("no target snapshot: run `modprobe dm_snapshot'"));
        let said = no_target("lsmt-dax");
        let wanted = match Path::new("/sys/module/dm_overlaybd").exists() {
            true => "; the dm_overlaybd that is loaded has no target lsmt-dax: another version?",
            false => "modprobe dm_overlaybd",
        };
        assert!(said.contains(wanted), "{said}");
    }

    #[test]
    fn what_is_made_in_vain() -> std::io::Result<()> {
        let dir = tempfile::tempdir()?;
        let (directory, node) = (dir.path().join("mapper"), dir.path().join("mapper/control"));
        std::fs::create_dir(&directory)?;
        std::fs::write(&node, "")?;
        let undo = |node| {
            let directory = Some(directory.as_path());
            MadeControl { node, directory }.undo();
        };
        undo(None);
        assert!(node.exists());
        undo(Some(&node));
        assert!(!directory.exists());
        // Not a number.
        std::fs::write(dir.path().join("dev"), "x")?;
        let text = |path: &Path| -> &'static str { path.to_string_lossy().into_owned().leak() };
        let part = Part {
            control: text(&node),
            sys: text(dir.path()),
            ..DEVICE_MAPPER
        };
        assert!(part.make_control().is_err());
        assert!(!directory.exists());
        Ok(())
    }

    #[test]
    fn files_of_the_module() {
        assert!(has_module(
            "a.ko:\nupdates/dkms/dm_overlaybd.ko.xz: kernel/drivers/md/dm-mod.ko.xz"
        ));
        assert!(!has_module(
            "extra/not_dm_overlaybd.ko:\nb.ko: extra/dm_overlaybd.ko\n"
        ));
    }
}
