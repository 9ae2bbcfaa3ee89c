// SPDX-License-Identifier: GPL-2.0

//! Directories that get their names only when they are complete.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::ops::Deref;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::files::place::directory;
use crate::input::config::{Config, Lower};
use crate::make::output::{
    check_dash, rename_new_directory, set_mode, sync, sync_directory, umask,
};
use crate::terminal::exit::{self, Failure};

/// A directory that is being made. Dropping this deletes it.
pub(crate) struct NewDirectory {
    made: TempDir,
    out: PathBuf,
}

impl NewDirectory {
    /// Begins the directory `out`. An error if anything exists there.
    pub(crate) fn new(out: &Path) -> Result<Self> {
        check_dash(out)?;
        // A name may end with a slash or `/.`, to which nothing can be renamed.
        let out: &Path = &out.components().collect::<PathBuf>();
        if out.symlink_metadata().is_ok() {
            return Err(there(out));
        }
        let parent = directory(out);
        let made = tempfile::Builder::new()
            .prefix(".obdsetup-")
            .tempdir_in(parent);
        let made =
            made.with_context(|| format!("{}: cannot make a directory", parent.display()))?;
        File::open(made.path())
            .and_then(|made| set_mode(&made, 0o777 & !umask()))
            .with_context(|| cannot(out))?;
        Ok(Self {
            made,
            out: out.to_owned(),
        })
    }

    /// Returns the temporary path of the directory, which is valid until [`Self::finish`].
    pub(crate) fn path(&self) -> &Path {
        self.made.path()
    }

    /// Returns the final path of the file `name` in the directory, for messages.
    pub(crate) fn shown(&self, name: impl AsRef<Path>) -> PathBuf {
        self.out.join(name)
    }

    /// Writes and syncs a new file in the directory.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let write = || {
            let mut file = File::create_new(self.path().join(name))?;
            file.write_all(bytes)?;
            sync(&file)
        };
        write().with_context(|| cannot(&self.out))
    }

    /// Makes a subdirectory, and its missing parents.
    pub(crate) fn directory(&self, name: &str) -> Result<()> {
        let made = std::fs::create_dir_all(self.path().join(name));
        made.with_context(|| cannot(&self.out))
    }

    /// Syncs the file or subdirectory `name`.
    pub(crate) fn sync(&self, name: &str) -> Result<()> {
        sync_directory(&self.path().join(name)).with_context(|| cannot(&self.out))
    }

    /// Completes the directory: syncs it, then renames it.
    pub(crate) fn finish(self) -> Result<()> {
        let Self { made, out } = self;
        let context = || cannot(&out);
        sync_directory(made.path()).with_context(context)?;
        crate::terminal::interrupt::check()?;
        match rename_new_directory(made.path(), &out) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => return Err(there(&out)),
            done => done.with_context(context)?,
        }
        // The temporary directory was renamed, so there is nothing to delete.
        let _ = made.keep();
        sync_directory(directory(&out)).with_context(context)
    }
}

/// A new directory with layers, and with a file that lists them.
pub(crate) struct Made {
    directory: NewDirectory,
    /// The final path of the directory, absolute, if the file lists the layers by it.
    place: Option<String>,
    config: Config,
}

impl Deref for Made {
    type Target = NewDirectory;

    fn deref(&self) -> &NewDirectory {
        &self.directory
    }
}

impl Made {
    /// Begins the directory `out`, which gets no list of its layers.
    pub(crate) fn without_list(out: &Path) -> Result<Self> {
        Ok(Self {
            directory: NewDirectory::new(out)?,
            place: None,
            config: Config::default(),
        })
    }

    /// Begins the directory `out`.
    pub(crate) fn new(out: &Path) -> Result<Self> {
        let made = NewDirectory::new(out)?;
        // The list needs absolute paths, because the snapshotter would look up relative ones from its working
        // directory.
        let place = directory(out).canonicalize();
        let place = place.with_context(|| cannot(out))?;
        let place = place.join(out.file_name().unwrap_or_default());
        let Some(place) = place.to_str() else {
            let message = format!(
                "{}: not UTF-8, so a config.v1.json cannot contain it: give another path",
                place.display()
            );
            return Err(Failure::usage(message));
        };
        Ok(Self {
            directory: made,
            place: Some(place.to_owned()),
            config: Config::default(),
        })
    }

    /// Returns the path for the file of the next layer.
    pub(crate) fn next_layer(&self) -> PathBuf {
        self.path().join(layer_name(self.config.lowers.len()))
    }

    /// Returns the paths of the files of the layers that were made, lowest first.
    pub(crate) fn layers(&self) -> Vec<PathBuf> {
        let count = self.config.lowers.len();
        (0..count)
            .map(|nth| self.path().join(layer_name(nth)))
            .collect()
    }

    /// Adds the next layer, whose file is complete, to the list. `digest` is the digest of the file as a
    /// registry's blob, `None` if it isn't known.
    pub(crate) fn add(&mut self, digest: Option<String>) {
        let name = layer_name(self.config.lowers.len());
        self.config.lowers.push(Lower {
            file: self.place.as_ref().map(|place| format!("{place}/{name}")),
            digest,
            ..Lower::default()
        });
    }

    /// Writes the list of the layers, `config.v1.json`, and completes the directory.
    pub(crate) fn finish_config(self) -> Result<()> {
        let mut text = serde_json::to_string_pretty(&self.config)?;
        text.push('\n');
        self.write("config.v1.json", text.as_bytes())?;
        self.finish()
    }

    /// Completes the directory, without a list of the layers.
    pub(crate) fn finish(self) -> Result<()> {
        self.directory.finish()
    }
}

fn layer_name(nth: usize) -> String {
    format!("layer{nth}.obd")
}

fn cannot(out: &Path) -> String {
    format!("{}: cannot complete the directory", out.display())
}

/// Returns the error for an `out` that exists. An existing directory is never replaced, because other files may
/// be in it.
fn there(out: &Path) -> anyhow::Error {
    let message = format!("{}: exists already; remove it first", out.display());
    Failure::error(exit::BUSY, message)
}
