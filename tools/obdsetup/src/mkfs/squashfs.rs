// SPDX-License-Identifier: GPL-2.0

//! squashfs, made by mksquashfs of a tar: only there does the order depend on us, and any user can say
//! who owns what. Its root directory is told apart.

use std::fmt::Write as _;
use std::io::Seek;
use std::path::Path;

use anyhow::{Context, Result};
use tempfile::NamedTempFile;

use super::pax;
use super::tree::{Tree, ROOT};
use super::{tell_of_holes, Options, Stamp};
use crate::output::temp_file;
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
        // "/" x name=0xVALUE, with quotes for what is special in the name
        let mut text = String::from("/ x ");
        text += &String::from_utf8_lossy(name);
        text += "=0x";
        for byte in value {
            // Writing to a string doesn't fail.
            let _ = write!(text, "{byte:02x}");
        }
        command.arg("-p").arg(text);
    }
    command.arg("-mkfs-time").arg(stamp.time.to_string());
    command.args(options.args);
    let mut tar = tempfile::tempfile_in(place).context("cannot make a temporary file")?;
    pax::write(tree, pax::Reader::Mksquashfs, std::io::BufWriter::new(&tar))?;
    tar.rewind()?;
    command.input(tar).writes(image.path()).run()?.tell();
    Ok(image)
}
