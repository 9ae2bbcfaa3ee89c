// SPDX-License-Identifier: GPL-2.0

//! A directory with layers of earlier conversions. The name of a file has two parts: a hash of everything that the
//! layer depends on, and the digest of the file.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use super::layout::{hash, is_hex};
use crate::files::place::temp_file;
use crate::make::output::{set_mode, sync, sync_directory, umask};
use crate::terminal::bar::Bar;
use crate::terminal::warn;

/// Suffix of the names of files.
const SUFFIX: &str = ".obd";

/// The input of a layer.
pub(super) struct Key<'a> {
    /// The chain ID of its tar and the tars below.
    pub(super) chain: &'a str,
    /// The digest of the layer below. The layer fits only on this one: another version of obdsetup, or other
    /// options, may make a different layer from the same tars.
    pub(super) below: Option<&'a str>,
}

/// The cache, for layers that are made with certain options.
pub(super) struct Cache {
    place: PathBuf,
    options: String,
}

impl Cache {
    /// Opens the cache in the directory `place`, for layers that are made with these options. Makes the
    /// directory if it is missing.
    pub(super) fn open(place: &Path, options: String) -> Result<Self> {
        fs::create_dir_all(place)
            .with_context(|| format!("{}: cannot make a directory", place.display()))?;
        Ok(Self {
            place: place.to_owned(),
            options,
        })
    }

    /// Returns the first part of the file name of a layer, with the separator.
    fn key(&self, of: &Key<'_>) -> String {
        let below = of.below.unwrap_or("nothing");
        let text = format!(
            "obdsetup image layer 2\n{}\n{below}\n{}\n",
            of.chain, self.options
        );
        format!("{:x}-", Sha256::digest(text))
    }

    /// Copies a layer from the cache to the new file `to`, and syncs that. Returns the digest of the layer;
    /// `None` if the cache doesn't have it. Warns about a damaged file in the cache, and ignores it.
    pub(super) fn take(&self, of: &Key<'_>, to: &Path) -> Result<Option<String>> {
        let context = || format!("{}: cannot read", self.place.display());
        let key = self.key(of);
        for entry in fs::read_dir(&self.place).with_context(context)? {
            let entry = entry.with_context(context)?;
            let name = entry.file_name();
            let name = name.to_str().and_then(|name| name.strip_prefix(&key));
            let hex = name.and_then(|name| name.strip_suffix(SUFFIX));
            let Some(hex) = hex.filter(|hex| is_hex(hex.as_bytes())) else {
                continue;
            };
            let from = entry.path();
            let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
            let copied = match is_file {
                true => fs::copy(&from, to).and_then(|_| fs::File::open(to)),
                false => Err(ErrorKind::InvalidInput.into()),
            };
            let copied = match copied {
                Ok(copied) => copied,
                // If all of `from` can be read, the failure was in writing.
                Err(error) if is_file && is_readable(&from)? => {
                    return Err(error).with_context(|| format!("{}: cannot write", to.display()));
                }
                Err(_) => {
                    warn(&[format!(
                        "{}: cannot read it: the layer is made again",
                        from.display()
                    )]);
                    let _ = fs::remove_file(to);
                    continue;
                }
            };
            let bar = Bar::new("checking", copied.metadata()?.len());
            let digest = hash(to, &bar)?;
            if digest.strip_prefix("sha256:") != Some(hex) {
                warn(&[format!(
                    "{}: does not match the digest in its name: the layer is made again",
                    from.display()
                )]);
                fs::remove_file(to)?;
                continue;
            }
            set_mode(&copied, 0o666 & !umask())?;
            sync(&copied)?;
            return Ok(Some(digest));
        }
        Ok(None)
    }

    /// Copies the layer in the file `from`, which has this digest, to the cache.
    pub(super) fn keep(&self, of: &Key<'_>, from: &Path, digest: &str) -> Result<()> {
        let hex = digest.strip_prefix("sha256:").unwrap_or_default();
        let to = self.place.join(format!("{}{hex}{SUFFIX}", self.key(of)));
        let context = || format!("{}: cannot complete the file", to.display());
        let file = temp_file(&self.place)?;
        fs::copy(from, file.path()).with_context(context)?;
        sync(file.as_file()).with_context(context)?;
        file.persist(&to)
            .map_err(|error| error.error)
            .with_context(context)?;
        sync_directory(&self.place).with_context(context)
    }
}

/// Returns whether all of a file can be read. Reads it to its end.
///
/// # Errors
///
/// If a signal has asked to stop.
fn is_readable(path: &Path) -> Result<bool> {
    let len = path.metadata().map_or(0, |meta| meta.len());
    let read = hash(path, &Bar::new("checking", len));
    crate::terminal::interrupt::check()?;
    Ok(read.is_ok())
}

#[cfg(test)]
mod tests {
    use super::{Cache, Key};

    /// A full disk at the destination is not reported as a damaged cache.
    #[test]
    fn where_nothing_can_be_written() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let cache = Cache::open(&dir.path().join("cache"), String::new())?;
        let key = Key {
            chain: "",
            below: None,
        };
        let layer = dir.path().join("layer");
        std::fs::write(&layer, b"content")?;
        let hex = "0".repeat(64);
        cache.keep(&key, &layer, &format!("sha256:{hex}"))?;
        let full = dir.path().join("full");
        std::os::unix::fs::symlink("/dev/full", &full)?;
        let error = cache.take(&key, &full).map_err(|error| error.to_string());
        assert_eq!(error, Err(format!("{}: cannot write", full.display())));
        Ok(())
    }
}
