// SPDX-License-Identifier: GPL-2.0

//! OCI image layouts: an index, and blobs that are named by their digests. Data of a blob gets into the result
//! only if the size and the digest of the blob are right.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result};
use overlaybd::format::num::to_u64;
use overlaybd::FileBlob;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::job::Choice;
use super::spec::{
    sha256, Descriptor, Index, Manifest, Platform, INDEX_TYPES, MAX_TEXT, NAMES, UNKNOWN,
};
use crate::files::json::{self, bad};
use crate::terminal::bar::Bar;
use crate::terminal::exit::Failure;

/// Name of an index in messages.
const INDEX: &str = "an image index";
/// Name of a manifest in messages.
const MANIFEST: &str = "an image's manifest";
/// Largest number of nested indexes. One that several names refer to counts once for each name.
const INDEXES: usize = 1000;
/// Largest number of entries, images or indexes, in all indexes together.
pub(super) const ENTRIES: usize = 10_000;
/// Largest number of images that a message lists.
const NAMED: usize = 20;
/// Number of bytes that are hashed at once.
const PIECE: usize = 256 << 10;

/// A layout.
pub(super) struct Layout {
    root: PathBuf,
    /// The archive from which the layout was unpacked, and the temporary directory with the layout, which is
    /// deleted when this is dropped.
    archive: Option<(PathBuf, TempDir)>,
    /// The index, if it was made from a `manifest.json`; otherwise, it is in a file.
    index: Option<Index>,
}

impl Layout {
    /// Returns the layout in the directory `root`.
    pub(super) fn of(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            archive: None,
            index: None,
        }
    }

    /// Returns the layout in the temporary directory `root`, which was unpacked from `archive`. If `index` is
    /// `None`, the index is in the file `index.json`.
    pub(super) fn of_archive(archive: &Path, root: TempDir, index: Option<Index>) -> Self {
        Self {
            root: root.path().to_owned(),
            archive: Some((archive.to_owned(), root)),
            index,
        }
    }

    /// Returns the path of the layout for messages.
    pub(super) fn name(&self) -> &Path {
        match &self.archive {
            Some((archive, _)) => archive,
            None => &self.root,
        }
    }

    /// Returns the path of the file `name` in the layout, for messages.
    pub(super) fn shown(&self, name: &str) -> PathBuf {
        match &self.archive {
            Some((archive, _)) => format!("{}: {name}", archive.display()).into(),
            None => self.root.join(name),
        }
    }

    /// Returns the image that the user has chosen: its entry in the index, and its manifest.
    pub(super) fn choose(&self, choice: &Choice) -> Result<(Found, Manifest)> {
        let mut all = self.collect()?;
        let called: Vec<&Found> = all.iter().filter(|found| found.is_called(choice)).collect();
        if choice.platform.is_some() || !is_one(&called) {
            self.complete(&mut all, choice)?;
            all.retain(|found| !found.is_attestation());
        }
        let fits = |found: &&Found| found.is_called(choice) && found.is_for(choice);
        let mut fitting: Vec<&Found> = all.iter().filter(fits).collect();
        // If all images have the same name, and so are for several platforms, take the one for this machine.
        let same_name = fitting.iter().all(|found| {
            let first = fitting.first();
            first.is_some_and(|first| first.names == found.names)
        });
        if !is_one(&fitting) && same_name && choice.platform.is_none() {
            let here = fitting.iter().filter(|found| found.is_for_this_machine());
            let here: Vec<&Found> = here.copied().collect();
            if is_one(&here) {
                fitting = here;
            }
        }
        let what = match fitting.first() {
            Some(first) if is_one(&fitting) => {
                let manifest = self.read_json(&first.descriptor, MANIFEST)?;
                if choice.platform.is_some() {
                    self.check_platform(first, &manifest)?;
                }
                return Ok(((*first).clone(), manifest));
            }
            Some(_) => "several images; --ref and --platform choose one",
            None if all.is_empty() => {
                return Err(bad(self.name(), "has no images: incomplete copy?"))
            }
            None => "no such image",
        };
        let names: Vec<String> = all.iter().take(NAMED).map(ToString::to_string).collect();
        let more = match all.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(", and {more} more"),
        };
        Err(Failure::usage(format!(
            "{}: {what}; there are: {}{more}",
            self.name().display(),
            names.join(", ")
        )))
    }

    /// Returns the images in the layout's index and in nested indexes, with their names. Leaves attestations out.
    fn collect(&self) -> Result<Vec<Found>> {
        let index = match &self.index {
            Some(index) => index.clone(),
            None => {
                let shown = self.shown("index.json");
                let index = json::read(&self.root.join("index.json"), &shown)?;
                json::parse(&index, &shown, INDEX)?
            }
        };
        let mut entries = 0;
        let mut open = vec![(Vec::new(), self.entries(index, &mut entries)?)];
        let mut found = Vec::new();
        // The entries of an index are added only once for each name. Otherwise, a small file with many entries
        // for the same indexes could cause endless work.
        let mut seen = HashSet::new();
        // Each index is read only once. The size is a part of the key, so that an entry with a wrong size is an
        // error.
        let mut known: HashMap<(String, u64), Rc<[Found]>> = HashMap::new();
        while let Some((names, index)) = open.pop() {
            for image in index.iter() {
                let mut image = image.clone();
                if image.names.is_empty() {
                    image.names.clone_from(&names);
                }
                let descriptor = &image.descriptor;
                if INDEX_TYPES.contains(&descriptor.media_type.as_str()) {
                    let key = (descriptor.digest.clone(), descriptor.size);
                    if seen.insert((image.names.clone(), key.clone())) {
                        crate::terminal::interrupt::check()?;
                        if seen.len() > INDEXES {
                            return Err(self.too_many());
                        }
                        let index = match known.get(&key) {
                            Some(index) => {
                                self.count(index.len(), &mut entries)?;
                                Rc::clone(index)
                            }
                            None => {
                                let index = self.read_json(descriptor, INDEX)?;
                                let index = self.entries(index, &mut entries)?;
                                known.insert(key, Rc::clone(&index));
                                index
                            }
                        };
                        open.push((image.names, index));
                    }
                    continue;
                }
                if !image.is_attestation() {
                    found.push(image);
                }
            }
        }
        Ok(found)
    }

    /// Returns the entries of an index, and counts them in `entries`. Leaves out all annotations but the names:
    /// they may be long, and each reference to the index makes a copy of its entries.
    fn entries(&self, index: Index, entries: &mut usize) -> Result<Rc<[Found]>> {
        self.count(index.manifests.len(), entries)?;
        let all = index.manifests.into_iter().map(|mut descriptor| {
            if !descriptor.is_short() {
                let what = format!(
                    "has more than {MAX_TEXT} bytes in the name, digest, type or platform of an image"
                );
                return Err(bad(self.name(), &what));
            }
            let mut annotations = std::mem::take(&mut descriptor.annotations);
            let mut names: Vec<Option<String>> =
                NAMES.iter().map(|key| annotations.remove(*key)).collect();
            if names.iter().all(Option::is_none) {
                names.clear();
            }
            Ok(Found { names, descriptor })
        });
        all.collect()
    }

    /// Adds `more` to `entries`, the number of entries of all indexes. An error if there are too many.
    fn count(&self, more: usize, entries: &mut usize) -> Result<()> {
        *entries += more;
        match *entries > ENTRIES {
            true => Err(self.too_many()),
            false => Ok(()),
        }
    }

    fn too_many(&self) -> anyhow::Error {
        let what =
            format!("has more than {INDEXES} nested indexes, or {ENTRIES} entries in all of them");
        bad(self.name(), &what)
    }

    /// Sets the platform of each image that has the chosen name and no platform in the index. Reads it from the
    /// image's config.
    fn complete(&self, all: &mut [Found], choice: &Choice) -> Result<()> {
        // Each manifest and config is read only once: many entries may be for the same image. The size is a
        // part of the key, so that an entry with a wrong size gets no platform.
        let mut known: HashMap<(String, u64), Option<Platform>> = HashMap::new();
        for found in all.iter_mut().filter(|found| found.is_called(choice)) {
            if found.descriptor.platform.is_some() {
                continue;
            }
            crate::terminal::interrupt::check()?;
            let descriptor = &found.descriptor;
            let key = (descriptor.digest.clone(), descriptor.size);
            let platform = match known.get(&key) {
                Some(platform) => platform.clone(),
                None => {
                    // Errors are ignored here. They are reported later if this image is chosen.
                    let manifest: Option<Manifest> = self.read_json(descriptor, MANIFEST).ok();
                    let config = manifest.and_then(|manifest| manifest.config);
                    config.and_then(|config| {
                        let own = known.entry((config.digest.clone(), config.size));
                        own.or_insert_with(|| self.described(&config)).clone()
                    })
                }
            };
            known.insert(key, platform.clone());
            found.descriptor.platform = platform;
        }
        Ok(())
    }

    /// Returns the platform in an image's config; `None` if the config cannot be read or has none.
    fn described(&self, config: &Descriptor) -> Option<Platform> {
        let (bytes, _) = self.read(config).ok()?;
        let platform: Platform = serde_json::from_slice(&bytes).ok()?;
        Some(platform).filter(Platform::is_said)
    }

    /// Checks that an image's config has the same operating system and architecture as the index, if both have a
    /// platform.
    fn check_platform(&self, image: &Found, manifest: &Manifest) -> Result<()> {
        let config = manifest.config.as_ref();
        let own = config.and_then(|config| self.described(config));
        let (Some(own), Some(said)) = (own, &image.descriptor.platform) else {
            return Ok(());
        };
        if (&own.os, &own.architecture) == (&said.os, &said.architecture) {
            return Ok(());
        }
        let what = format!(
            "image {}: is for {said} as the index has it, and for {own} as its own description has it",
            image.descriptor.digest
        );
        Err(bad(self.name(), &what))
    }

    /// Returns the path of the blob that `descriptor` describes, and its name in the layout. Checks its length,
    /// but not its digest.
    pub(super) fn blob(&self, descriptor: &Descriptor) -> Result<(PathBuf, String)> {
        let hex = descriptor.digest.strip_prefix("sha256:");
        // Checked, because it becomes a part of a path.
        let hex = hex.filter(|hex| is_hex(hex.as_bytes()));
        let Some(hex) = hex else {
            let what = format!("digest {}: expected SHA-256", descriptor.digest);
            return Err(bad(self.name(), &what));
        };
        let name = format!("blobs/sha256/{hex}");
        let path = self.root.join(&name);
        let meta = path.metadata();
        let meta = meta.with_context(|| format!("{}: cannot read", self.shown(&name).display()))?;
        match meta.is_file() && meta.len() == descriptor.size {
            true => Ok((path, name)),
            false => Err(self.differs(&name)),
        }
    }

    /// Returns the error for a file that doesn't match its descriptor.
    pub(super) fn differs(&self, name: &str) -> anyhow::Error {
        bad(
            &self.shown(name),
            "is not what its digest and size say: incomplete copy?",
        )
    }

    /// Opens the blob that `descriptor` describes. Checks its length, but not its digest. Messages have the
    /// name that the user knows: for a blob from an archive, not the path of the temporary file.
    pub(super) fn open(&self, descriptor: &Descriptor) -> Result<FileBlob> {
        let (path, name) = self.blob(descriptor)?;
        let shown = self.shown(&name);
        let file = File::open(&path);
        let file = file.with_context(|| format!("{}: cannot read", shown.display()))?;
        Ok(FileBlob::from_file(file, &shown)?)
    }

    /// Reads the blob that `descriptor` describes, and checks its digest. Returns the bytes, and the name for
    /// messages.
    pub(super) fn read(&self, descriptor: &Descriptor) -> Result<(Vec<u8>, PathBuf)> {
        let (path, name) = self.blob(descriptor)?;
        let shown = self.shown(&name);
        let bytes = json::read(&path, &shown)?;
        match sha256(Sha256::new_with_prefix(&bytes)) == descriptor.digest {
            true => Ok((bytes, shown)),
            false => Err(self.differs(&name)),
        }
    }

    pub(super) fn read_json<T: DeserializeOwned>(
        &self,
        descriptor: &Descriptor,
        what: &str,
    ) -> Result<T> {
        let (bytes, path) = self.read(descriptor)?;
        json::parse(&bytes, &path, what)
    }

    /// Checks length and digest of a blob, which may be larger than memory. Returns its path, and its name in the
    /// layout.
    pub(super) fn checked(&self, descriptor: &Descriptor) -> Result<(PathBuf, String)> {
        let (path, name) = self.blob(descriptor)?;
        let bar = Bar::new("checking", descriptor.size);
        let digest = hash(&path, &bar).with_context(|| self.shown(&name).display().to_string())?;
        match digest == descriptor.digest {
            true => Ok((path, name)),
            false => Err(self.differs(&name)),
        }
    }
}

/// Returns whether all of these are one image, which may have several names. Returns `false` for none.
fn is_one(images: &[&Found]) -> bool {
    match images {
        [first, others @ ..] => {
            let same = |other: &&Found| other.descriptor.digest == first.descriptor.digest;
            others.iter().all(same)
        }
        [] => false,
    }
}

/// Returns the digest of a file. Advances `bar` by the bytes read.
pub(super) fn hash(path: &Path, bar: &Bar) -> Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut piece = vec![0; PIECE];
    loop {
        let read = file.read(&mut piece)?;
        if read == 0 {
            return Ok(sha256(hasher));
        }
        hasher.update(piece.get(..read).unwrap_or_default());
        bar.advance(to_u64(read))?;
    }
}

/// Returns whether `text` is a SHA-256 as in a descriptor, without the prefix: 64 digits, lower case.
pub(super) fn is_hex(text: &[u8]) -> bool {
    let is_digit = |byte: &u8| byte.is_ascii_digit() || matches!(byte, b'a'..=b'f');
    text.len() == 64 && text.iter().all(is_digit)
}

/// An image in a layout, and its names.
#[derive(Clone)]
pub(super) struct Found {
    /// The values of the annotations [`NAMES`], in that order; empty if the image has no name.
    pub(super) names: Vec<Option<String>>,
    pub(super) descriptor: Descriptor,
}

impl Found {
    /// Returns the names of the image, in the order of [`NAMES`]: the whole name first.
    fn names(&self) -> impl Iterator<Item = &String> {
        self.names.iter().flatten()
    }

    /// Returns whether the image has the chosen name or digest. Any image has it if none was chosen.
    fn is_called(&self, choice: &Choice) -> bool {
        let digest = &self.descriptor.digest;
        let named = choice.name.as_ref();
        named.is_none_or(|name| self.names().any(|own| own == name) || name == digest)
    }

    /// Returns whether the image is for the chosen platform. Any image is if none was chosen.
    fn is_for(&self, choice: &Choice) -> bool {
        let platform = self.descriptor.platform.as_ref().map(ToString::to_string);
        let platform = platform.unwrap_or_default();
        choice.platform.as_ref().is_none_or(|wanted| {
            let variant = platform.strip_prefix(wanted.as_str());
            variant.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    }

    /// Returns whether this is an attestation, which an index lists like an image, with the operating system
    /// [`UNKNOWN`].
    fn is_attestation(&self) -> bool {
        let platform = self.descriptor.platform.as_ref();
        platform.is_some_and(|platform| platform.os == UNKNOWN)
    }

    /// Returns whether the image is for Linux and the architecture of this machine.
    fn is_for_this_machine(&self) -> bool {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "x86" => "386",
            "aarch64" => "arm64",
            "loongarch64" => "loong64",
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            "powerpc64" => "ppc64",
            other => other,
        };
        let platform = self.descriptor.platform.as_ref();
        let here =
            |platform: &Platform| platform.os == "linux" && platform.architecture == architecture;
        platform.is_some_and(here)
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(name) = self.names().next() {
            write!(f, "{name} ")?;
        }
        if let Some(platform) = &self.descriptor.platform {
            write!(f, "{platform} ")?;
        }
        f.write_str(&self.descriptor.digest)
    }
}
