// SPDX-License-Identifier: GPL-2.0

//! Reads JSON files that other programs wrote.

use std::path::Path;

use anyhow::Result;
use overlaybd::format::num::to_usize;
use overlaybd::format::Blob;
use overlaybd::{Error, FileBlob};
use serde::de::DeserializeOwned;

use crate::terminal::exit::{self, Failure};

/// Largest size of a file in bytes: the limit that registries have for a manifest.
pub(crate) const MAX: u64 = 4 << 20;

/// Reads the file at `path`. Messages call it `shown`.
pub(crate) fn read(path: &Path, shown: &Path) -> Result<Vec<u8>> {
    let file = FileBlob::open(path, None).map_err(|error| match error {
        Error::InFile { source, .. } => source.in_file(shown),
        other => other,
    })?;
    if file.size() > MAX {
        return Err(too_large(shown));
    }
    let mut bytes = vec![0; to_usize(file.size())];
    file.read_at(0, &mut bytes)
        .map_err(|error| error.in_file(shown))?;
    Ok(bytes)
}

/// Parses the bytes of the file at `path`. Messages call the content `what`.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8], path: &Path, what: &str) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| bad(path, &format!("not {what}: {error}")))
}

/// Returns the error for a file of more than [`MAX`] bytes.
pub(crate) fn too_large(path: &Path) -> anyhow::Error {
    let what = format!("has more than {MAX} bytes, too many for such a file");
    bad(path, &what)
}

/// Returns the error for a file with wrong content.
pub(crate) fn bad(path: &Path, what: &str) -> anyhow::Error {
    Failure::error(exit::BAD_IMAGE, format!("{}: {what}", path.display()))
}
