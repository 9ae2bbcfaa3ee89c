// SPDX-License-Identifier: GPL-2.0

//! Checks whether this process may use device-mapper and loop devices, and says what to do if it may not: the
//! messages of dmsetup would be about an incompatible libdevmapper. Makes nodes that are missing.

use std::fs::File;
use std::io::{Error, ErrorKind};
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::FileType;
use rustix::io::Errno;

use crate::exit::{self, Failure};

/// A part of the kernel to which commands are sent through a control device.
pub(super) struct Part {
    /// The control device.
    control: &'static str,
    /// The directory of the control device in sysfs.
    sys: &'static str,
    what: &'static str,
    /// The module that it is in.
    module: &'static str,
}

pub(super) const DEVICE_MAPPER: Part = Part {
    control: "/dev/mapper/control",
    sys: "/sys/class/misc/device-mapper",
    what: "device-mapper",
    module: "dm_mod",
};
pub(super) const LOOP: Part = Part {
    control: "/dev/loop-control",
    sys: "/sys/class/misc/loop-control",
    what: "loop devices",
    module: "loop",
};

/// Exists if sysfs is mounted.
const SYS: &str = "/sys/class/misc";
/// What to do if a device can't be opened.
const DENIED: &str =
    "permission denied: must be root, and in a container must be given this device";
/// What to do if the targets are missing. Appended to dmsetup's message.
const NO_MODULE: &str = "; the kernel module dm_overlaybd is not loaded: run `modprobe \
                         dm_overlaybd', or install the package dm-overlaybd-dkms";
/// The same if the module's file is there.
const NOT_LOADED: &str =
    "; the kernel module dm_overlaybd is installed, but not loaded: `modprobe \
                          dm_overlaybd' says why";
/// The same if the module is loaded.
const OLDER_MODULE: &str =
    "; the kernel module dm_overlaybd that is loaded is an older one: it has no target";

impl Part {
    /// Checks that this process can send commands. Makes the control device's node if that is missing.
    pub(super) fn check(&self) -> Result<()> {
        let control = self.control;
        let is_root = rustix::process::geteuid().is_root();
        let open = || File::options().read(true).write(true).open(control);
        let opened = match open() {
            Err(error) if error.kind() == ErrorKind::NotFound && is_root => {
                if !self.make_control()? {
                    return Ok(());
                }
                open()
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

    /// Makes the control device's node. Returns false if its number is unknown because sysfs isn't mounted.
    fn make_control(&self) -> Result<bool> {
        match std::fs::read_to_string(Path::new(self.sys).join("dev")) {
            Ok(number) => {
                if let Some(parent) = Path::new(self.control).parent() {
                    // Ignored: then the node can't be made, either.
                    let _ = std::fs::create_dir(parent);
                }
                make_node(self.control, FileType::CharacterDevice, &number).map(|()| true)
            }
            Err(_) if Path::new(SYS).exists() => Err(Failure::error(exit::DEVICE, self.missing())),
            Err(_) => Ok(false),
        }
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
        return format!("{OLDER_MODULE} {target}");
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let modules = Path::new("/lib/modules").join(release.trim());
    let list = std::fs::read_to_string(modules.join("modules.dep")).unwrap_or_default();
    match has_module(&list) {
        true => NOT_LOADED.to_owned(),
        false => NO_MODULE.to_owned(),
    }
}

/// Returns whether a list of modules, a modules.dep, has ours.
fn has_module(list: &str) -> bool {
    list.lines().any(|line| {
        let file = line.split(':').next().unwrap_or_default();
        let name = file.rsplit('/').next().unwrap_or_default();
        name.starts_with("dm_overlaybd.ko")
    })
}

/// Makes the node at `path` of the device `number`, `MAJOR:MINOR`, as devtmpfs or udev would.
pub(super) fn make_node(path: &str, kind: FileType, number: &str) -> Result<()> {
    let number = number.trim();
    let (major, minor) = number.split_once(':').unwrap_or_default();
    let device = rustix::fs::makedev(major.parse()?, minor.parse()?);
    let made = rustix::fs::mknodat(
        rustix::fs::CWD,
        path,
        kind,
        rustix::fs::Mode::from_raw_mode(0o660),
        device,
    );
    match made {
        // Another process may have made it meanwhile.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
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
        // Said to other users only.
        assert_eq!(said(2), said(13));
        let (code, text) = LOOP.explain(&Error::from_raw_os_error(19));
        assert_eq!(code, 4);
        assert_eq!(text, "this kernel has no loop devices: run `modprobe loop'");
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
