// SPDX-License-Identifier: GPL-2.0

//! Makes erofs with mkfs.erofs from a tar: with a tar, obdsetup determines the order, and any user
//! can set owners.

use std::path::Path;

use anyhow::Result;
use tempfile::NamedTempFile;

use crate::files::place::temp_file;
use crate::make::mkfs::pax;
use crate::make::mkfs::tree::Tree;
use crate::make::mkfs::{tell_of_holes, Options, Stamp};
use crate::program::Program;

/// Makes the file system of `tree` in a file in `place`.
pub(super) fn make(
    tree: &Tree,
    options: &Options<'_>,
    stamp: &Stamp,
    place: &Path,
) -> Result<NamedTempFile> {
    tell_of_holes(
        tree,
        options.fs,
        "time and as much space for temporary files",
    )?;
    let image = temp_file(place)?;
    let tar = temp_file(place)?;
    pax::write(
        tree,
        pax::Reader::MkfsErofs,
        std::io::BufWriter::new(tar.as_file()),
    )?;
    let mut command = Program::new(options.fs.program(), "erofs file systems with --mkfs-arg");
    command.needs_version("--version", (1, 8));
    command.args(["--tar=f", "--quiet", "--mkfs-time", "-T"]);
    command.arg(stamp.time.to_string());
    command.arg("-U").arg(stamp.uuid.to_string());
    command.args(options.args);
    if options.dax {
        // Whether there is inline data, the superblock doesn't show. The last argument counts.
        command.arg("-Enoinline_data");
    }
    command.arg(image.path()).arg(tar.path());
    command.writes(image.path()).run()?.tell();
    Ok(image)
}
