// SPDX-License-Identifier: GPL-2.0

//! OCI image layouts whose layers are OverlayBD layers, made files of a stack.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use overlaybd::format::merge::MAX_LAYERS;
use overlaybd::format::num::to_u64;
use overlaybd::format::Blob;
use overlaybd::{FileBlob, LayerReader, Stack};
use serde::de::DeserializeOwned;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::bar::Bar;
use crate::chain::{Findings, Part};
use crate::config::{Config, Lower};
use crate::exit::{self, Failure};
use crate::json::{self, bad};
use crate::layers::warn;
use crate::output::{directory, rename_new_directory, set_mode, sync, sync_directory, umask};

/// Media types of indexes, of which other indexes may consist.
const INDEX_TYPES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
/// What an index is called in messages.
const INDEX: &str = "an image index";
/// Most images that are named where several are there.
const NAMED: usize = 20;
/// Where an index has the name of an image.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Names of annotations that only TurboOCI layers have.
const TURBO: [&str; 2] = ["overlaybd/turbo-oci", "overlaybd/fastoci"];

/// Says where something is, and what.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Deserialize)]
struct Platform {
    os: String,
    architecture: String,
    variant: Option<String>,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Manifest {
    layers: Vec<Descriptor>,
}

/// Which image of a layout is meant.
#[derive(Debug, Default, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "OCI images")]
pub(crate) struct Choice {
    /// Name or digest of the image, where the layout has several
    #[arg(long = "ref", value_name = "NAME")]
    name: Option<String>,

    /// OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT of the image, where the layout has several
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
}

/// Makes directory `out` of the image layout at `layout`: the layers' files, byte for byte, and a
/// `config.v1.json` that lists them. It is there complete or not at all.
pub(crate) fn convert(layout: &Path, choice: &Choice, out: &Path) -> Result<()> {
    if out.symlink_metadata().is_ok() {
        return Err(there(out));
    }
    let descriptor = choose(layout, choice)?;
    let manifest: Manifest = read_json(layout, &descriptor, "an image's manifest")?;
    let stack = open(layout, &descriptor, &manifest.layers)?;
    let parent = directory(out);
    let made = tempfile::Builder::new()
        .prefix(".obdsetup-")
        .tempdir_in(parent);
    let made = made.with_context(|| format!("{}: cannot make a directory", parent.display()))?;
    let context = || format!("{}: cannot complete the directory", out.display());
    File::open(made.path())
        .and_then(|made| set_mode(&made, 0o777 & !umask()))
        .with_context(context)?;
    // The snapshotter would look up relative names from wherever it was started.
    let place = parent.canonicalize().with_context(context)?;
    let place = place.join(out.file_name().unwrap_or_default());
    let Some(place) = place.to_str() else {
        let message = format!(
            "{}: a config.v1.json cannot name it, since it is not UTF-8: give another",
            place.display()
        );
        return Err(Failure::usage(message));
    };

    let files: Vec<&FileBlob> = stack
        .layers()
        .iter()
        .map(|l| &**l.payload().file())
        .collect();
    let bar = Bar::new("copying", files.iter().map(|file| file.size()).sum());
    let mut config = Config::default();
    for ((nth, layer), from) in manifest.layers.into_iter().enumerate().zip(files) {
        let name = format!("layer{nth}.obd");
        copy(from, &layer, &made.path().join(&name), &bar)?;
        config.lowers.push(Lower {
            file: Some(format!("{place}/{name}")),
            digest: Some(layer.digest),
            ..Lower::default()
        });
    }
    drop(bar);
    let mut text = serde_json::to_string_pretty(&config)?;
    text.push('\n');
    write(&made.path().join("config.v1.json"), text.as_bytes()).with_context(context)?;
    sync_directory(made.path()).with_context(context)?;
    crate::interrupt::check()?;
    match rename_new_directory(made.path(), out) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => return Err(there(out)),
        done => done.with_context(context)?,
    }
    // What was to be deleted isn't there any more under that name.
    let _ = made.keep();
    sync_directory(parent).with_context(context)
}

/// Whoever had something in that directory would not want it to be gone.
fn there(out: &Path) -> anyhow::Error {
    let message = format!("{}: exists already; remove it first", out.display());
    Failure::error(exit::BUSY, message)
}

/// An image of a layout, and its name.
struct Found {
    name: Option<String>,
    descriptor: Descriptor,
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

/// The one manifest that is meant.
fn choose(layout: &Path, choice: &Choice) -> Result<Descriptor> {
    let all = collect(layout)?;
    let mut fitting = all.iter().filter(|found| found.fits(choice));
    let what = match fitting.next().map(|found| &found.descriptor) {
        // An image may have several names.
        Some(first) if fitting.all(|other| other.descriptor.digest == first.digest) => {
            return Ok(first.clone());
        }
        Some(_) => "several images; --ref and --platform choose one",
        None if all.is_empty() => return Err(bad(layout, "has no images: incomplete copy?")),
        None => "no such image",
    };
    let names: Vec<String> = all.iter().take(NAMED).map(ToString::to_string).collect();
    let more = match all.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(", and {more} more"),
    };
    Err(Failure::usage(format!(
        "{}: {what}; there are: {}{more}",
        layout.display(),
        names.join(", ")
    )))
}

/// The manifests of the layout's index and of those in it, with the names of their images.
fn collect(layout: &Path) -> Result<Vec<Found>> {
    let path = layout.join("index.json");
    let index: Index = json::parse(&json::read(&path)?, &path, INDEX)?;
    let mut open = vec![(None, index)];
    let mut found = Vec::new();
    // Each index is read once: in indexes of the same index, few bytes would be endless work.
    let mut seen = HashSet::new();
    while let Some((name, index)) = open.pop() {
        for descriptor in index.manifests {
            let own = descriptor.annotations.get(REF_NAME).or(name.as_ref());
            let name = own.cloned();
            if INDEX_TYPES.contains(&descriptor.media_type.as_str()) {
                if seen.insert(descriptor.digest.clone()) {
                    crate::interrupt::check()?;
                    open.push((name, read_json(layout, &descriptor, INDEX)?));
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

/// The file of what `descriptor` describes, which is as long as that says.
fn blob(layout: &Path, descriptor: &Descriptor) -> Result<PathBuf> {
    let hex = descriptor.digest.strip_prefix("sha256:");
    // It becomes a part of a path.
    let hex = hex.filter(|hex| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()));
    let Some(hex) = hex else {
        let what = format!("digest {}: expected SHA-256", descriptor.digest);
        return Err(bad(layout, &what));
    };
    let path = layout.join("blobs/sha256").join(hex);
    let meta = path.metadata();
    let meta = meta.with_context(|| format!("{}: cannot read", path.display()))?;
    match meta.is_file() && meta.len() == descriptor.size {
        true => Ok(path),
        false => Err(differs(&path)),
    }
}

fn differs(path: &Path) -> anyhow::Error {
    bad(
        path,
        "is not what its digest and size say: incomplete copy?",
    )
}

fn read_json<T: DeserializeOwned>(layout: &Path, descriptor: &Descriptor, what: &str) -> Result<T> {
    let path = blob(layout, descriptor)?;
    let bytes = json::read(&path)?;
    if sha256(Sha256::new_with_prefix(&bytes)) != descriptor.digest {
        return Err(differs(&path));
    }
    json::parse(&bytes, &path, what)
}

/// The digest as descriptors have it.
fn sha256(hasher: Sha256) -> String {
    format!("sha256:{:x}", hasher.finalize())
}

/// Opens the layers of an image, and checks that they are OverlayBD layers and make a stack: before
/// gigabytes are copied.
fn open(layout: &Path, image: &Descriptor, layers: &[Descriptor]) -> Result<Stack> {
    if layers.is_empty() || layers.len() > MAX_LAYERS {
        let what = format!(
            "image {}: has {} layers, expected 1 to {MAX_LAYERS}",
            image.digest,
            layers.len()
        );
        return Err(bad(layout, &what));
    }
    let mut opened = Vec::new();
    for (nth, layer) in layers.iter().enumerate() {
        let is_turbo = |name: &String| TURBO.iter().any(|turbo| name.contains(turbo));
        if layer.annotations.keys().any(is_turbo) {
            return Err(Failure::usage(format!(
                "layer {nth}, {}, is a TurboOCI layer, which cannot be read",
                layer.digest
            )));
        }
        opened.push(
            LayerReader::open(&blob(layout, layer)?, None).map_err(|error| {
                let kind = match layer.media_type.as_str() {
                    "" => String::new(),
                    kind => format!(" but {kind}"),
                };
                let message = format!(
                    "layer {nth}, {}, is not an OverlayBD layer{kind} (an ordinary image must be \
                 converted to OverlayBD first): {}",
                    layer.digest,
                    error.cause()
                );
                Failure::error(exit::code(&error.into()), message)
            })?,
        );
    }
    // They are copied as they are; what opens them refuses what cannot be right.
    let found = Findings::of(&opened, Part::Whole);
    warn(&found.errors);
    warn(&found.warnings);
    Ok(Stack::new(opened)?)
}

/// Copies a layer and checks its digest.
fn copy(from: &FileBlob, layer: &Descriptor, to: &Path, bar: &Bar) -> Result<()> {
    let context = || format!("{}: cannot write", to.display());
    let mut output = File::create_new(to).with_context(context)?;
    let mut hasher = Sha256::new();
    let copied = from.stream(0, from.size(), &mut |piece| {
        hasher.update(piece);
        output.write_all(piece).map_err(|source| {
            overlaybd::Error::Io {
                what: "write",
                source,
            }
            .in_file(to)
        })?;
        bar.advance(to_u64(piece.len()))
    });
    copied.map_err(|error| error.in_file(from.path()))?;
    if sha256(hasher) != layer.digest {
        return Err(differs(from.path()));
    }
    sync(&output).with_context(context)
}

fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(bytes)?;
    sync(&file)
}
