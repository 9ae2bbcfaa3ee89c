// SPDX-License-Identifier: GPL-2.0

//! Directories of files, and temporary files in them.

use std::path::Path;

use anyhow::{Context, Result};
use tempfile::NamedTempFile;

use crate::terminal::exit::is_full;

/// Makes a temporary file in `directory`. Dropping it deletes the file.
pub(crate) fn temp_file(directory: &Path) -> Result<NamedTempFile> {
    tempfile::Builder::new()
        .prefix(".obdsetup-")
        .tempfile_in(directory)
        .with_context(|| format!("{}: cannot make a file", directory.display()))
}

/// Says of an error that there is no room, in which directory.
pub(crate) fn name_full(directory: &Path, error: anyhow::Error) -> anyhow::Error {
    match is_full(&error) {
        true => error.context(format!(
            "{}: no room for the output, or for temporary files, which are made beside it",
            directory.display()
        )),
        false => error,
    }
}

/// Returns the directory that `path` is in.
pub(crate) fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
