// SPDX-License-Identifier: GPL-2.0

//! Unpacks archives of images: an OCI image layout in a tar, or the output of `docker save`. Writes the files
//! that are needed to a new layout. Never uses a name from the archive as a path.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use overlaybd::format::merge::MAX_LAYERS;
use overlaybd::format::num::to_u64;
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::image::check_count;
use super::job::Choice;
use super::layout::{is_hex, Layout, ENTRIES};
use super::spec::{
    describe, sha256, Descriptor, Index, Platform, CONFIG_TYPES, MANIFEST_TYPES, REF_NAME,
    TAR_TYPES,
};
use crate::files::json::{self, bad};
use crate::input::archive::{brief, Archive, Member, MemberKind};
use crate::terminal::exit;

/// Largest number of files of an archive that may belong to images. An image has a few for each layer.
const FILES: usize = 10_000;
/// Largest number of links that are followed for one name. Old versions of docker wrote a layer of several
/// images once, with links to it.
const LINKS: usize = 8;
/// Longest name of a file, and longest target of a link, that are kept in memory, in bytes. Tools write short ones.
const NAME: usize = 1024;
/// Largest number of bytes in all these names and targets. A compressed archive of a few thousand bytes can
/// have millions of bytes of names.
const NAMES: usize = 8 << 20;
/// Largest number of layers of all images in a `manifest.json`. A layer counts once for each image that has it.
const LAYERS: usize = 20_000;
/// The directory of the blobs in a layout.
const BLOBS: &str = "blobs/sha256/";
const WRITE: &str = "cannot write a temporary file with what is in the archive";
const NO_MANIFEST: &str =
    "has layers of an image, but no manifest.json: load it in docker, and save it again";

/// An image in a `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Returns an error if there are more images, tags or layers than real archives have. Called before manifests
/// are made, which can have hundreds of bytes for a tag or layer of one byte. An image with more layers than a
/// stack can have is no error here, because another image may be chosen.
fn check(images: &[Saved]) -> Result<(), String> {
    let entries = images.iter().map(|image| {
        let tags = image.repo_tags.as_ref().map_or(0, Vec::len);
        tags.max(1)
    });
    if entries.sum::<usize>() > ENTRIES {
        return Err(format!("has more than {ENTRIES} images and tags"));
    }
    let layers = images.iter().map(|image| image.layers.len());
    match layers.sum::<usize>() > LAYERS {
        true => Err(format!("has more than {LAYERS} layers in all its images")),
        false => Ok(()),
    }
}

/// Returns an error if all images have more layers than a stack can have.
fn check_layers(images: &[Saved]) -> Result<(), String> {
    match images.iter().map(|image| image.layers.len()).min() {
        Some(layers) if layers > MAX_LAYERS => {
            Err(format!("has {layers} layers, expected 1 to {MAX_LAYERS}"))
        }
        _ => Ok(()),
    }
}

/// A file of the archive that was stored as a blob.
#[derive(Clone)]
struct Stored {
    digest: String,
    size: u64,
}

/// An archive that is being unpacked: the files found, by their names.
struct Unpack<'a> {
    input: &'a Path,
    root: TempDir,
    files: BTreeMap<Vec<u8>, Stored>,
    links: BTreeMap<Vec<u8>, Target>,
    /// Number of bytes in the names and targets of all files and links, including those that later members
    /// replaced.
    names: usize,
}

/// What a link leads to.
enum Target {
    Name(Vec<u8>),
    /// The length in bytes of a name that is too long to be kept.
    Long(usize),
}

/// Unpacks the archive `input` to a layout in a temporary directory in `place`. Unpacking the layers may take long, so
/// errors that [`look`] and [`check_image`] find are returned before.
pub(super) fn unpack(input: &Path, place: &Path, choice: &Choice) -> Result<Layout> {
    let named = match look(input)? {
        Contents::Layout => {
            check_image(input, place, choice)?;
            HashSet::new()
        }
        Contents::Saved(named) => named,
    };
    let mut unpack = Unpack::new(input, place)?;
    let mut archive = Archive::again(input)?;
    while let Some(member) = archive.next()? {
        let path = &member.path;
        if path.len() <= NAME && (named.contains(path) || is_wanted(path)) {
            unpack.member(&member, &mut archive)?;
        }
    }
    // Newer versions of docker write both an index and a manifest.json. The index has more information.
    let saved = match unpack.place_index()? {
        true => None,
        false => Some(unpack.saved()?),
    };
    Ok(Layout::of_archive(input, unpack.root, saved))
}

/// Checks the image that `choice` means, in the archive `input`, which is an OCI image layout. Unpacks only files that
/// begin as JSON does, to a temporary directory in `place`: indexes, manifests and configs, no layers. If more is
/// needed, the error is reported when all is unpacked.
fn check_image(input: &Path, place: &Path, choice: &Choice) -> Result<()> {
    let mut unpack = Unpack::new(input, place)?;
    let mut archive = Archive::again(input)?;
    while let Some(member) = archive.next()? {
        let path = &member.path;
        let is_small = matches!(member.kind, MemberKind::File) && member.size <= json::MAX;
        if is_small && path.len() <= NAME && is_wanted(path) {
            let stored = unpack.store_json(&member, &mut archive)?;
            if let Some(stored) = stored {
                unpack.add_file(path, stored)?;
            }
        }
    }
    if !unpack.place_index()? {
        return Ok(());
    }
    let layout = Layout::of_archive(input, unpack.root, None);
    match layout.choose(choice) {
        Ok((image, manifest)) => check_count(&layout, &image.descriptor, &manifest.layers),
        // There is no such image, or there are several.
        Err(error) if exit::code(&error) == exit::USAGE => Err(error),
        Err(_) => Ok(()),
    }
}

/// What an archive is.
enum Contents {
    /// An OCI image layout, with a `manifest.json` that cannot be used, or without one.
    Layout,
    /// The output of `docker save`, perhaps also an OCI image layout: the names of the files that its `manifest.json`
    /// lists.
    Saved(HashSet<Vec<u8>>),
}

/// Looks for the files that say what images are in the archive `input`: `manifest.json`, or `oci-layout` and
/// `index.json`. Tools use arbitrary names for the layers that a `manifest.json` lists. An error if there is neither it
/// nor an index, or if there is no index, which would be read instead, and `manifest.json` cannot be parsed, lists too
/// much, or has only images with more layers than a stack can have. Reads the archive up to `manifest.json`, which is
/// usually at the end, or to the end, so the caller must read the archive again.
fn look(input: &Path) -> Result<Contents> {
    let mut archive = Archive::again(input)?;
    let shown = PathBuf::from(format!("{}: manifest.json", input.display()));
    let (mut is_layout, mut has_index) = (false, false);
    // What is wrong with `manifest.json`. Counts only if there is no index, which may follow.
    let mut wrong = None;
    while let Some(member) = archive.next()? {
        let is_file = matches!(member.kind, MemberKind::File);
        match member.path.as_slice() {
            b"oci-layout" => is_layout = is_file,
            b"index.json" => has_index = is_file,
            _ => {}
        }
        if member.path != b"manifest.json" || !is_file {
            continue;
        }
        if member.size > json::MAX {
            wrong = Some(json::too_large(&shown));
            continue;
        }
        let mut bytes = Vec::new();
        archive.content(&member, |_, piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })?;
        let images = parse(&bytes, &shown).and_then(|images| {
            let checked = check_layers(&images).and_then(|()| check(&images));
            checked.map_err(|what| bad(&shown, &what))?;
            Ok(images)
        });
        match images {
            Ok(images) => {
                let names = images.into_iter().flat_map(|image| {
                    let layers = image.layers.into_iter();
                    layers.chain([image.config]).map(String::into_bytes)
                });
                return Ok(Contents::Saved(names.collect()));
            }
            Err(error) => wrong = Some(error),
        }
    }
    match wrong {
        _ if is_layout && has_index => Ok(Contents::Layout),
        Some(error) => Err(error),
        None => Err(bad(input, NO_MANIFEST)),
    }
}

/// Returns the images that a `manifest.json`, which messages call `shown`, lists in `bytes`.
fn parse(bytes: &[u8], shown: &Path) -> Result<Vec<Saved>> {
    json::parse(bytes, shown, "what `docker save' writes")
}

/// Returns whether a file with this name may be a part of an image.
fn is_wanted(path: &[u8]) -> bool {
    let slashes = path.iter().filter(|&&byte| byte == b'/').count();
    match path.strip_prefix(BLOBS.as_bytes()) {
        Some(hex) => is_hex(hex),
        None => {
            path == b"oci-layout"
                || slashes == 0 && path.ends_with(b".json")
                || slashes < 2 && path.ends_with(b".tar")
        }
    }
}

impl<'a> Unpack<'a> {
    /// Begins to unpack the archive `input` to a temporary directory in `place`.
    fn new(input: &'a Path, place: &Path) -> Result<Self> {
        let root = tempfile::Builder::new()
            .prefix(".obdsetup-")
            .tempdir_in(place);
        let root = root.with_context(|| format!("{}: cannot make a directory", place.display()))?;
        std::fs::create_dir_all(root.path().join(BLOBS)).context(WRITE)?;
        Ok(Self {
            input,
            root,
            files: BTreeMap::new(),
            links: BTreeMap::new(),
            names: 0,
        })
    }

    /// Puts the index in its place, if the archive is an OCI image layout. Returns whether it is one.
    fn place_index(&self) -> Result<bool> {
        let index = self.files.get(b"index.json".as_slice());
        let is_layout = self.files.contains_key(b"oci-layout".as_slice());
        let Some(index) = index.filter(|_| is_layout) else {
            return Ok(false);
        };
        let to = self.root.path().join("index.json");
        std::fs::copy(self.path(index), to).context(WRITE)?;
        Ok(true)
    }

    fn bad(&self, what: &str) -> anyhow::Error {
        bad(self.input, what)
    }

    /// Returns the name of a file of the archive for messages.
    fn shown(&self, name: &str) -> PathBuf {
        let name = brief(name.as_bytes());
        format!("{}: {name}", self.input.display()).into()
    }

    fn path(&self, stored: &Stored) -> PathBuf {
        let hex = stored.digest.strip_prefix("sha256:").unwrap_or_default();
        self.root.path().join(BLOBS).join(hex)
    }

    fn member(&mut self, member: &Member, archive: &mut Archive) -> Result<()> {
        let path = member.path.as_slice();
        self.replace(path)?;
        match &member.kind {
            MemberKind::File => {
                let stored = self.store(member, archive)?;
                self.insert(path, stored)?;
            }
            MemberKind::HardLink(target) => self.link(path, target.clone())?,
            MemberKind::Symlink(target) => {
                if let Some(target) = relative(path, target) {
                    self.link(path, target)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Adds the file `path` of the archive, which was stored as a blob.
    fn add_file(&mut self, path: &[u8], stored: Stored) -> Result<()> {
        self.replace(path)?;
        self.insert(path, stored)
    }

    /// Forgets the earlier file or link `path`, before one that replaces it. An error if there are too many files.
    fn replace(&mut self, path: &[u8]) -> Result<()> {
        if self.files.len() + self.links.len() >= FILES {
            let what = format!("has more than {FILES} files that may be parts of an image");
            return Err(self.bad(&what));
        }
        self.count(path.len())?;
        self.files.remove(path);
        self.links.remove(path);
        Ok(())
    }

    /// Notes the file `path` of the archive. An error if it is a blob whose digest is another one.
    fn insert(&mut self, path: &[u8], stored: Stored) -> Result<()> {
        let hex = path.strip_prefix(BLOBS.as_bytes());
        if let Some(hex) = hex.filter(|hex| is_hex(hex)) {
            if stored.digest.as_bytes().strip_prefix(b"sha256:") != Some(hex) {
                let what = format!("{}: is not what its digest says", brief(path));
                return Err(self.bad(&what));
            }
        }
        self.files.insert(path.to_vec(), stored);
        Ok(())
    }

    fn link(&mut self, path: &[u8], target: Vec<u8>) -> Result<()> {
        let target = match target.len() {
            len if len > NAME => Target::Long(len),
            len => {
                self.count(len)?;
                Target::Name(target)
            }
        };
        self.links.insert(path.to_vec(), target);
        Ok(())
    }

    /// Counts a name of `len` bytes that is kept. An error if all names together are too long.
    fn count(&mut self, len: usize) -> Result<()> {
        self.names = self.names.saturating_add(len);
        if self.names > NAMES {
            let what = format!(
                "has more than {NAMES} bytes in the names of files that may be parts of an image"
            );
            return Err(self.bad(&what));
        }
        Ok(())
    }

    /// Stores a file of the archive as a blob. An error if the file has holes.
    fn store(&self, member: &Member, archive: &mut Archive) -> Result<Stored> {
        let blobs = self.root.path().join(BLOBS);
        let file = tempfile::NamedTempFile::new_in(&blobs).context(WRITE)?;
        let mut hasher = Sha256::new();
        let mut out = BufWriter::new(file.as_file());
        let mut size = 0;
        archive.content(member, |offset, piece| {
            if offset != size {
                let name = brief(&member.path);
                return Err(self.bad(&format!("{name}: is stored with holes")));
            }
            hasher.update(piece);
            out.write_all(piece).context(WRITE)?;
            size += to_u64(piece.len());
            Ok(())
        })?;
        out.flush().context(WRITE)?;
        drop(out);
        if size != member.size {
            let name = brief(&member.path);
            return Err(self.bad(&format!("{name}: is stored with holes")));
        }
        let stored = Stored {
            digest: sha256(hasher),
            size,
        };
        let to = self.path(&stored);
        file.persist(to)
            .map_err(|error| error.error)
            .context(WRITE)?;
        Ok(stored)
    }

    /// Stores a file of the archive, of at most [`json::MAX`] bytes, as a blob if it begins as a JSON object does.
    /// Otherwise, or if it has holes, returns `None`.
    fn store_json(&self, member: &Member, archive: &mut Archive) -> Result<Option<Stored>> {
        let begins = |bytes: &[u8]| {
            bytes
                .trim_ascii_start()
                .first()
                .is_none_or(|&byte| byte == b'{')
        };
        let mut bytes = Vec::new();
        archive.content(member, |offset, piece| {
            if offset == to_u64(bytes.len()) && begins(&bytes) {
                bytes.extend_from_slice(piece);
            }
            Ok(())
        })?;
        if !begins(&bytes) || to_u64(bytes.len()) != member.size {
            return Ok(None);
        }
        let stored = Stored {
            digest: sha256(Sha256::new_with_prefix(&bytes)),
            size: member.size,
        };
        std::fs::write(self.path(&stored), &bytes).context(WRITE)?;
        Ok(Some(stored))
    }

    /// Returns the file with this name in the archive. Follows links.
    fn find(&self, name: &str) -> Result<&Stored> {
        let mut name = name.as_bytes();
        if name.len() > NAME {
            let len = name.len();
            let what = format!(
                "{}: has a name of {len} bytes, more than {NAME}",
                brief(name)
            );
            return Err(self.bad(&what));
        }
        for _ in 0..LINKS {
            if let Some(stored) = self.files.get(name) {
                return Ok(stored);
            }
            match self.links.get(name) {
                Some(Target::Name(target)) => name = target,
                Some(Target::Long(len)) => {
                    let name = brief(name);
                    let what = format!("{name}: leads to a name of {len} bytes, more than {NAME}");
                    return Err(self.bad(&what));
                }
                None => break,
            }
        }
        let what = format!("{}, which manifest.json names, is missing", brief(name));
        Err(self.bad(&what))
    }

    fn read(&self, name: &str) -> Result<(Vec<u8>, Stored)> {
        let stored = self.find(name)?;
        let bytes = json::read(&self.path(stored), &self.shown(name))?;
        Ok((bytes, stored.clone()))
    }

    fn add(&self, bytes: &[u8], media_type: &str) -> Result<Descriptor> {
        let descriptor = describe(media_type, bytes);
        let stored = Stored {
            digest: descriptor.digest.clone(),
            size: descriptor.size,
        };
        std::fs::write(self.path(&stored), bytes).context(WRITE)?;
        Ok(descriptor)
    }

    /// Makes manifests from the output of `docker save`. Returns their index, which is not limited to the size
    /// of an index in a file.
    fn saved(&self) -> Result<Index> {
        if !self.files.contains_key(b"manifest.json".as_slice()) {
            return Err(self.bad(NO_MANIFEST));
        }
        let (bytes, _) = self.read("manifest.json")?;
        let shown = self.shown("manifest.json");
        let images = parse(&bytes, &shown)?;
        check(&images).map_err(|what| bad(&shown, &what))?;
        let mut manifests = Vec::new();
        // Each config is read only once: many images may name the same one.
        let mut platforms: HashMap<String, Option<Platform>> = HashMap::new();
        for image in images {
            crate::terminal::interrupt::check()?;
            let stored = self.find(&image.config)?;
            let stem = image.config.rsplit('/').next().unwrap_or_default();
            let stem = stem.strip_suffix(".json").unwrap_or(stem);
            let stem = stem.strip_prefix("sha256:").unwrap_or(stem);
            let own = stored.digest.strip_prefix("sha256:").unwrap_or_default();
            if is_hex(stem.as_bytes()) && stem != own {
                let name = brief(image.config.as_bytes());
                return Err(self.bad(&format!("{name}: is not what its digest says")));
            }
            let platform = match platforms.get(&stored.digest) {
                Some(platform) => platform.clone(),
                None => {
                    let platform = self.platform(&image.config)?;
                    platforms.insert(stored.digest.clone(), platform.clone());
                    platform
                }
            };
            let described = |media_type: &str, stored: &Stored| Descriptor {
                media_type: media_type.to_owned(),
                digest: stored.digest.clone(),
                size: stored.size,
                ..Descriptor::default()
            };
            let layers = image.layers.iter();
            let layers = layers.map(|name| Ok(described(DOCKER_TAR, self.find(name)?)));
            let manifest = json!({
                "schemaVersion": 2,
                "mediaType": DOCKER_MANIFEST,
                "config": described(DOCKER_CONFIG, stored),
                "layers": layers.collect::<Result<Vec<_>>>()?,
            });
            let mut manifest = self.add(&serde_json::to_vec(&manifest)?, DOCKER_MANIFEST)?;
            manifest.platform = platform;
            let tags = image.repo_tags.unwrap_or_default();
            for tag in &tags {
                let mut named = manifest.clone();
                named.annotations.insert(REF_NAME.to_owned(), tag.clone());
                manifests.push(named);
            }
            if tags.is_empty() {
                manifests.push(manifest);
            }
        }
        Ok(Index { manifests })
    }

    /// Returns the platform in the config with this name; `None` if an index cannot have this platform.
    fn platform(&self, config: &str) -> Result<Option<Platform>> {
        let (bytes, _) = self.read(config)?;
        let shown = self.shown(config);
        let platform: Platform = json::parse(&bytes, &shown, "an image's description")?;
        Ok(Some(platform).filter(Platform::is_for_index))
    }
}

const DOCKER_MANIFEST: &str = MANIFEST_TYPES[1];
const DOCKER_CONFIG: &str = CONFIG_TYPES[1];
const DOCKER_TAR: &str = TAR_TYPES[1];

/// Returns the name in the archive to which the symbolic link `path` leads; `None` if it leads out of the archive.
fn relative(path: &[u8], target: &[u8]) -> Option<Vec<u8>> {
    let mut parts: Vec<&[u8]> = path.split(|&byte| byte == b'/').collect();
    parts.pop();
    if target.starts_with(b"/") {
        return None;
    }
    for part in target.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join(&b'/'))
}

#[cfg(test)]
mod tests {
    use super::{is_wanted, relative};

    #[test]
    fn names() {
        assert_eq!(
            relative(b"a/layer.tar", b"../b/layer.tar"),
            Some(b"b/layer.tar".to_vec())
        );
        assert_eq!(relative(b"a/layer.tar", b"../../b"), None);
        assert_eq!(relative(b"a", b"/etc/passwd"), None);
        let hex = "0123456789abcdef".repeat(4);
        assert!(is_wanted(format!("blobs/sha256/{hex}").as_bytes()));
        assert!(!is_wanted(b"blobs/sha256/0123"));
        assert!(is_wanted(b"a/layer.tar") && is_wanted(b"manifest.json"));
        assert!(!is_wanted(b"a/b/layer.tar") && !is_wanted(b"a/x.json"));
    }
}
