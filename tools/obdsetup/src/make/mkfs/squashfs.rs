// SPDX-License-Identifier: GPL-2.0

//! Makes squashfs with mksquashfs from a tar: with a tar, obdsetup determines the order, and any
//! user can set owners. Options of mksquashfs give it the metadata of the root directory.

use std::ffi::OsString;
use std::io::Seek;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use anyhow::{Context, Result};
use tempfile::NamedTempFile;

use super::pax;
use super::tree::{Tree, ROOT};
use super::{tell_of_holes, Options, Stamp};
use crate::files::place::temp_file;
use crate::program::Program;

/// Makes the file system of `tree` in a file in `place`.
pub(super) fn make(
    tree: &Tree,
    options: &Options<'_>,
    stamp: &Stamp,
    place: &Path,
) -> Result<NamedTempFile> {
    tell_of_holes(tree, options.fs, "time")?;
    let image = temp_file(place)?;
    let mut command = Program::new(options.fs.program(), "squashfs file systems");
    // The first version that has -root-time, and sets extended attributes with -p.
    command.needs_version("-version", (4, 6));
    command.arg("-").arg(image.path());
    command.args(["-tar", "-noappend", "-quiet", "-no-progress", "-xattrs"]);
    let root = tree.node(ROOT)?;
    let meta = &root.meta;
    command.arg("-root-mode").arg(format!("{:o}", meta.mode));
    command.arg("-root-uid").arg(meta.uid.to_string());
    command.arg("-root-gid").arg(meta.gid.to_string());
    command
        .arg("-root-time")
        .arg(meta.mtime.seconds.to_string());
    for (name, value) in &meta.xattrs {
        // Not in hexadecimal: mksquashfs 4.6.1 corrupts its memory if a value has more than a few bytes.
        let value = base64(value);
        let text = [b"/ x ", name.as_slice(), b"=0s", value.as_bytes()].concat();
        command.arg("-p").arg(OsString::from_vec(text));
    }
    command.arg("-mkfs-time").arg(stamp.time.to_string());
    command.args(options.args);
    let mut tar = tempfile::tempfile_in(place).context("cannot make a temporary file")?;
    pax::write(tree, pax::Reader::Mksquashfs, std::io::BufWriter::new(&tar))?;
    tar.rewind()?;
    command.input(tar).writes(image.path()).run()?.tell();
    Ok(image)
}

/// Encodes bytes in base64.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let mut bits = 0;
        for nth in 0..3 {
            bits = (bits << 8) | u32::from(group.get(nth).copied().unwrap_or_default());
        }
        for nth in 0..4 {
            let digit = (bits >> (18 - 6 * nth)) % 64;
            let digit = usize::try_from(digit)
                .ok()
                .and_then(|digit| DIGITS.get(digit));
            text.push(match digit {
                Some(&digit) if nth <= group.len() => char::from(digit),
                _ => '=',
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn digits() {
        assert_eq!(base64(b""), "");
        assert_eq!(base64(b"f"), "Zg==");
        assert_eq!(base64(b"fo"), "Zm8=");
        assert_eq!(base64(b"foo"), "Zm9v");
        assert_eq!(base64(b"\xff\xfe\0\x01"), "//4AAQ==");
    }
}
