// SPDX-License-Identifier: GPL-2.0

//! OCI image layouts: an index, and blobs by their digests. Nothing in one is used before its size and
//! digest are checked.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use overlaybd::format::num::to_u64;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::{sha256, Choice, Descriptor, Index, Manifest, Platform, INDEX_TYPES, REF_NAME};
use crate::bar::Bar;
use crate::exit::Failure;
use crate::json::{self, bad};

/// What an index is called in messages.
const INDEX: &str = "an image index";
/// Most indexes that are read.
const INDEXES: usize = 1000;
/// Most images and indexes that they may name.
const ENTRIES: usize = 10_000;
/// Most images that are named where several are there.
const NAMED: usize = 20;
/// Bytes that are hashed at once.
const PIECE: usize = 256 << 10;

/// A layout.
pub(super) struct Layout {
    root: PathBuf,
    /// The archive that it was made of, and the directory that is gone when this is dropped.
    archive: Option<(PathBuf, TempDir)>,
}

impl Layout {
    /// The layout in the directory `root`.
    pub(super) fn of(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            archive: None,
        }
    }

    /// The layout in the directory `root`, made of `archive`.
    pub(super) fn of_archive(archive: &Path, root: TempDir) -> Self {
        Self {
            root: root.path().to_owned(),
            archive: Some((archive.to_owned(), root)),
        }
    }

    /// What messages call it.
    pub(super) fn name(&self) -> &Path {
        match &self.archive {
            Some((archive, _)) => archive,
            None => &self.root,
        }
    }

    /// What messages call a file in it.
    pub(super) fn shown(&self, name: &str) -> PathBuf {
        match &self.archive {
            Some((archive, _)) => format!("{}: {name}", archive.display()).into(),
            None => self.root.join(name),
        }
    }

    /// The one image that is meant: what the index says of it, and its manifest.
    pub(super) fn choose(&self, choice: &Choice) -> Result<(Found, Manifest)> {
        let all = self.collect()?;
        let mut fitting: Vec<&Found> = all.iter().filter(|found| found.fits(choice)).collect();
        let one = |fitting: &[&Found]| match fitting {
            // An image may have several names.
            [first, others @ ..] => {
                let same = |other: &&Found| other.descriptor.digest == first.descriptor.digest;
                others.iter().all(same)
            }
            [] => false,
        };
        // Of one image for several machines, that for this one is meant.
        let same_name = fitting.iter().all(|found| {
            let first = fitting.first();
            first.is_some_and(|first| first.name == found.name)
        });
        if !one(&fitting) && same_name && choice.platform.is_none() {
            let here = fitting.iter().filter(|found| found.is_for_this_machine());
            let here: Vec<&Found> = here.copied().collect();
            if one(&here) {
                fitting = here;
            }
        }
        let what = match fitting.first() {
            Some(first) if one(&fitting) => {
                let manifest = self.read_json(&first.descriptor, "an image's manifest")?;
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

    /// The manifests of the layout's index and of those in it, with the names of their images.
    fn collect(&self) -> Result<Vec<Found>> {
        let path = self.root.join("index.json");
        let index = json::read(&path)?;
        let index: Index = json::parse(&index, &self.shown("index.json"), INDEX)?;
        let mut entries = index.manifests.len();
        let mut open = vec![(None, index)];
        let mut found = Vec::new();
        // Each index is read once for each name, and not endlessly: in indexes of the same index, few
        // bytes would be endless work.
        let mut seen = HashSet::new();
        while let Some((name, index)) = open.pop() {
            for descriptor in index.manifests {
                let own = descriptor.annotations.get(REF_NAME).or(name.as_ref());
                let name = own.cloned();
                if INDEX_TYPES.contains(&descriptor.media_type.as_str()) {
                    if seen.insert((name.clone(), descriptor.digest.clone())) {
                        crate::interrupt::check()?;
                        let index: Index = self.read_json(&descriptor, INDEX)?;
                        entries += index.manifests.len();
                        if seen.len() > INDEXES || entries > ENTRIES {
                            let what = format!(
                                "has more than {INDEXES} indexes in indexes, or {ENTRIES} images"
                            );
                            return Err(bad(self.name(), &what));
                        }
                        open.push((name, index));
                    }
                    continue;
                }
                // Attestations stand among the images as those of an unknown system.
                if descriptor.platform.as_ref().map(|p| p.os.as_str()) != Some("unknown") {
                    found.push(Found { name, descriptor });
                }
            }
        }
        Ok(found)
    }

    /// The file of what `descriptor` describes, which is as long as that says, and its name.
    pub(super) fn blob(&self, descriptor: &Descriptor) -> Result<(PathBuf, String)> {
        let hex = descriptor.digest.strip_prefix("sha256:");
        // It becomes a part of a path.
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

    /// A file isn't what its descriptor says.
    pub(super) fn differs(&self, name: &str) -> anyhow::Error {
        bad(
            &self.shown(name),
            "is not what its digest and size say: incomplete copy?",
        )
    }

    /// Reads the blob that `descriptor` describes.
    pub(super) fn read(&self, descriptor: &Descriptor) -> Result<(Vec<u8>, PathBuf)> {
        let (path, name) = self.blob(descriptor)?;
        let bytes = json::read(&path)?;
        match sha256(Sha256::new_with_prefix(&bytes)) == descriptor.digest {
            true => Ok((bytes, self.shown(&name))),
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

    /// Checks a blob that is too large to be in memory. Returns its file, and its name.
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

/// The digest of a file.
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

/// Whether it is a SHA-256 as a descriptor has it.
pub(super) fn is_hex(text: &[u8]) -> bool {
    let is_digit = |byte: &u8| byte.is_ascii_digit() || matches!(byte, b'a'..=b'f');
    text.len() == 64 && text.iter().all(is_digit)
}

/// An image of a layout, and its name.
#[derive(Clone)]
pub(super) struct Found {
    pub(super) name: Option<String>,
    pub(super) descriptor: Descriptor,
}

impl Found {
    fn fits(&self, choice: &Choice) -> bool {
        let digest = &self.descriptor.digest;
        let named = choice.name.as_ref();
        let platform = self.platform().unwrap_or_default();
        named.is_none_or(|name| Some(name) == self.name.as_ref() || name == digest)
            && choice.platform.as_ref().is_none_or(|wanted| {
                let variant = platform.strip_prefix(wanted.as_str());
                variant.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            })
    }

    /// Whether it is said to run here.
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

    fn platform(&self) -> Option<String> {
        let platform = self.descriptor.platform.as_ref()?;
        let variant = platform.variant.iter().map(|variant| format!("/{variant}"));
        let variant: String = variant.collect();
        Some(format!(
            "{}/{}{variant}",
            platform.os, platform.architecture
        ))
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for word in self.name.iter().chain(&self.platform()) {
            write!(f, "{word} ")?;
        }
        f.write_str(&self.descriptor.digest)
    }
}
