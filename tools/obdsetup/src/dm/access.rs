// SPDX-License-Identifier: GPL-2.0

//! Checks whether this process may use device-mapper, and says what to do if it may not. dmsetup's own
//! message would be about an incompatible libdevmapper.

use std::fs::File;
use std::io::{Error, ErrorKind};

use anyhow::Result;

use crate::exit::{self, Failure};

/// The device to which device-mapper's commands are sent.
const CONTROL: &str = "/dev/mapper/control";
/// What to do if the targets are missing. Appended to dmsetup's message.
pub(super) const NO_MODULE: &str = "; the kernel module dm_overlaybd is not loaded: run `modprobe \
                                    dm_overlaybd', or install the package dm-overlaybd-dkms";

/// Checks that this process can send commands to device-mapper.
pub(super) fn check() -> Result<()> {
    let opened = File::options().read(true).write(true).open(CONTROL);
    let is_root = rustix::process::geteuid().is_root();
    match opened.err().and_then(|error| explain(&error, is_root)) {
        Some((code, message)) => Err(Failure::error(code, format!("{CONTROL}: {message}"))),
        None => Ok(()),
    }
}

/// Returns the exit code and the message for an error of opening [`CONTROL`]. `is_root` says whether the user
/// is root.
fn explain(error: &Error, is_root: bool) -> Option<(u8, String)> {
    let what = match error.kind() {
        // No error: dmsetup makes the node if it can.
        ErrorKind::NotFound if is_root => return None,
        ErrorKind::NotFound | ErrorKind::PermissionDenied => {
            return Some((
                exit::PERMISSION,
                "permission denied: must be root, and in a container must be given this device"
                    .to_owned(),
            ))
        }
        _ => match error
            .raw_os_error()
            .map(rustix::io::Errno::from_raw_os_error)
        {
            Some(rustix::io::Errno::NODEV | rustix::io::Errno::NXIO) => {
                "this kernel has no device-mapper: run `modprobe dm_mod'".to_owned()
            }
            _ => error.to_string(),
        },
    };
    Some((exit::DEVICE, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_do() {
        let said = |errno| {
            let error = Error::from_raw_os_error(errno);
            explain(&error, true).unwrap_or((0, "dmsetup".to_owned()))
        };
        let (code, text) = said(13);
        assert!(code == 2 && text.contains("must be root"), "{text}");
        let (code, text) = said(19);
        assert!(code == 4 && text.contains("modprobe dm_mod"), "{text}");
        assert_eq!(said(2).1, "dmsetup");
        assert_eq!(said(5).0, 4);
        // For other users, a missing node doesn't change the message.
        let missing = Error::from_raw_os_error(2);
        assert_eq!(explain(&missing, false), Some(said(13)));
    }
}
