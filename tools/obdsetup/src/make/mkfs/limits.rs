// SPDX-License-Identifier: GPL-2.0

//! Limits that Linux has for files. A tar can exceed them. Some file systems have lower limits, which the
//! code or the program that makes them checks.

use super::tree::{Kind, Meta, Node};
use crate::input::archive::brief;

/// Longest name of a file or extended attribute, in bytes.
pub(super) const NAME: usize = 255;
/// Longest path, or target of a symbolic link, in bytes.
pub(super) const PATH: usize = 4095;
/// Longest value of an extended attribute, in bytes.
const VALUE: usize = 65_536;
/// Largest major and minor numbers of devices.
const DEVICE: (u32, u32) = (4095, 1_048_575);
/// Prefixes of the names of extended attributes: none of them is a name by itself.
const PREFIXES: [&[u8]; 5] = [b"user.", b"trusted.", b"security.", b"system.", b"btrfs."];

/// Checks a path relative to the root directory of the tree. The error says which limit it exceeds.
pub(super) fn path(path: &[u8]) -> Result<(), String> {
    if path.len() > PATH {
        let len = path.len();
        return Err(format!("a path of {len} bytes, more than {PATH}"));
    }
    let mut parts = path.split(|&byte| byte == b'/');
    match parts.find(|part| part.len() > NAME) {
        Some(part) => Err(format!(
            "a name of {} bytes in the path, more than {NAME}",
            part.len()
        )),
        None => Ok(()),
    }
}

/// Checks extended attributes, size, link target and device number of a file. The error says which limit it
/// exceeds.
pub(super) fn node(node: &Node) -> Result<(), String> {
    xattrs(&node.meta)?;
    match &node.kind {
        Kind::File(content) if i64::try_from(content.size).is_err() => {
            let size = content.size;
            Err(format!("a size of {size} bytes, more than {}", i64::MAX))
        }
        Kind::Symlink(target) => link(target),
        Kind::CharDevice(device) | Kind::BlockDevice(device) => {
            let (major, minor) = (device.major, device.minor);
            match major <= DEVICE.0 && minor <= DEVICE.1 {
                true => Ok(()),
                false => Err(format!(
                    "device number {major}:{minor}, more than {}:{}",
                    DEVICE.0, DEVICE.1
                )),
            }
        }
        _ => Ok(()),
    }
}

fn link(target: &[u8]) -> Result<(), String> {
    match target.len() {
        0 => Err("a symbolic link without a target".to_owned()),
        len if len > PATH => Err(format!(
            "a symbolic link to a path of {len} bytes, more than {PATH}"
        )),
        _ if target.contains(&0) => {
            Err("a zero byte in the target of the symbolic link, which no path can have".to_owned())
        }
        _ => Ok(()),
    }
}

/// Checks names and values of extended attributes. The error says which limit they exceed.
pub(super) fn xattrs(meta: &Meta) -> Result<(), String> {
    for (name, value) in &meta.xattrs {
        let bad = |what: String| Err(format!("extended attribute {:?}: {what}", brief(name)));
        if name.is_empty() || PREFIXES.contains(&name.as_slice()) {
            return bad("its name is empty".to_owned());
        }
        if name.len() > NAME {
            return bad(format!("a name of {} bytes, more than {NAME}", name.len()));
        }
        if name.contains(&0) {
            return bad("its name has a zero byte, which no name can have".to_owned());
        }
        if value.len() > VALUE {
            return bad(format!(
                "a value of {} bytes, more than {VALUE}",
                value.len()
            ));
        }
    }
    Ok(())
}
