// SPDX-License-Identifier: GPL-2.0

//! OCI image layouts whose layers are OverlayBD layers, made files of a stack.

use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use overlaybd::format::num::to_u64;
use overlaybd::Stack;
use rustix::fs::{renameat_with, RenameFlags, CWD};
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::bar::Bar;
use crate::config::{Config, Lower};
use crate::exit::{self, Failure};
use crate::output::{directory, umask};

/// Most bytes of an index or manifest, so that nonsense isn't read in full.
const MAX_JSON: u64 = 4 << 20;
/// Deepest that an index may be in another one.
const MAX_DEPTH: u32 = 4;
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
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "OCI images")]
pub(crate) struct Choice {
    /// Name of the image, where the layout has several
    #[arg(long = "ref", value_name = "NAME")]
    name: Option<String>,

    /// OS/ARCHITECTURE of the image, where the layout has several
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
}

/// Makes directory `out` of the image layout at `layout`: the layers' files, byte for byte, and a
/// `config.v1.json` that lists them. It is there complete or not at all.
pub(crate) fn convert(layout: &Path, choice: &Choice, out: &Path) -> Result<()> {
    if out.symlink_metadata().is_ok() {
        return Err(there(out));
    }
    let manifest: Manifest = read_json(layout, &choose(layout, choice)?)?;
    let parent = directory(out);
    let made = tempfile::Builder::new()
        .prefix(".obdsetup-")
        .tempdir_in(parent);
    let made = made.with_context(|| format!("{}: cannot make a directory", parent.display()))?;
    let context = || format!("{}: cannot complete the directory", out.display());
    std::fs::set_permissions(made.path(), Permissions::from_mode(0o777 & !umask()))
        .with_context(context)?;
    // The snapshotter would look up relative names from wherever it was started.
    let place = parent.canonicalize().with_context(context)?;
    let place = place.join(out.file_name().unwrap_or_default());

    let bar = Bar::new(
        "copying",
        manifest.layers.iter().map(|layer| layer.size).sum(),
    );
    let mut files = Vec::new();
    let mut config = Config::default();
    for (nth, layer) in manifest.layers.iter().enumerate() {
        let is_turbo = |name: &String| TURBO.iter().any(|turbo| name.contains(turbo));
        if layer.annotations.keys().any(is_turbo) {
            return Err(Failure::usage(format!(
                "layer {nth}, {}, is a TurboOCI layer, which cannot be read",
                layer.digest
            )));
        }
        let name = format!("layer{nth}.obd");
        let file = made.path().join(&name);
        copy(&blob(layout, layer)?, layer, &file, &bar)?;
        files.push(file);
        config.lowers.push(Lower {
            file: Some(place.join(&name).to_string_lossy().into_owned()),
            digest: Some(layer.digest.clone()),
            ..Lower::default()
        });
    }
    drop(bar);
    check(&files, &manifest)?;
    let mut text = serde_json::to_string_pretty(&config)?;
    text.push('\n');
    write(&made.path().join("config.v1.json"), text.as_bytes()).with_context(context)?;
    File::open(made.path())
        .and_then(|made| made.sync_all())
        .with_context(context)?;
    crate::interrupt::check()?;
    match renameat_with(CWD, made.path(), CWD, out, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Err(there(out)),
        Err(error) => return Err(std::io::Error::from(error)).with_context(context),
    }
    // What was to be deleted isn't there any more under that name.
    let _ = made.keep();
    File::open(parent)
        .and_then(|parent| parent.sync_all())
        .with_context(context)
}

/// Whoever had something in that directory would not want it to be gone.
fn there(out: &Path) -> anyhow::Error {
    let message = format!("{}: exists already; remove it first", out.display());
    Failure::error(exit::BUSY, message)
}

/// The one manifest that is meant.
fn choose(layout: &Path, choice: &Choice) -> Result<Descriptor> {
    let path = layout.join("index.json");
    let index: Index = parse(&read_file(&path)?, &path)?;
    let mut found = Vec::new();
    collect(layout, index, None, 0, &mut found)?;
    let fits = |(name, descriptor): &(Option<String>, Descriptor)| {
        let name_fits = choice.name.is_none() || choice.name == *name;
        let platform = descriptor.platform.as_ref().map(platform_text);
        name_fits && (choice.platform.is_none() || choice.platform == platform)
    };
    let all: Vec<String> = found
        .iter()
        .map(|(name, descriptor)| {
            let platform = descriptor.platform.as_ref().map(platform_text);
            [name.clone(), platform, Some(descriptor.digest.clone())]
                .into_iter()
                .flatten()
                .collect::<Vec<_>>()
                .join(" ")
        })
        .collect();
    found.retain(fits);
    match found.pop() {
        Some((_, descriptor)) if found.is_empty() => Ok(descriptor),
        chosen => {
            let what = match chosen {
                Some(_) => "several images; --ref and --platform choose one",
                None => "no such image",
            };
            Err(Failure::usage(format!(
                "{}: {what}; there are: {}",
                layout.display(),
                all.join(", ")
            )))
        }
    }
}

fn platform_text(platform: &Platform) -> String {
    format!("{}/{}", platform.os, platform.architecture)
}

/// Adds the manifests of `index` and of those in it, with the names of their images.
fn collect(
    layout: &Path,
    index: Index,
    name: Option<&str>,
    depth: u32,
    found: &mut Vec<(Option<String>, Descriptor)>,
) -> Result<()> {
    for descriptor in index.manifests {
        let own = descriptor.annotations.get(REF_NAME).map(String::as_str);
        let name = own.or(name).map(str::to_owned);
        if descriptor.media_type.contains("index") || descriptor.media_type.contains("list") {
            if depth < MAX_DEPTH {
                let inner = read_json(layout, &descriptor)?;
                collect(layout, inner, name.as_deref(), depth + 1, found)?;
            }
            continue;
        }
        // Attestations stand among the images as those of an unknown system.
        let is_image = descriptor.platform.as_ref().map(|p| p.os.as_str()) != Some("unknown");
        if is_image {
            found.push((name, descriptor));
        }
    }
    Ok(())
}

/// The file of what `descriptor` describes.
fn blob(layout: &Path, descriptor: &Descriptor) -> Result<PathBuf> {
    let hex = descriptor.digest.strip_prefix("sha256:");
    // It becomes a part of a path.
    let hex = hex.filter(|hex| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()));
    match hex {
        Some(hex) => Ok(layout.join("blobs/sha256").join(hex)),
        None => Err(bad(
            layout,
            &format!("digest {}: expected SHA-256", descriptor.digest),
        )),
    }
}

fn bad(path: &Path, what: &str) -> anyhow::Error {
    Failure::error(exit::BAD_IMAGE, format!("{}: {what}", path.display()))
}

fn read_json<T: DeserializeOwned>(layout: &Path, descriptor: &Descriptor) -> Result<T> {
    let path = blob(layout, descriptor)?;
    let bytes = read_file(&path)?;
    if sha256(Sha256::new_with_prefix(&bytes)) != descriptor.digest {
        return Err(bad(&path, "is not what its digest says"));
    }
    parse(&bytes, &path)
}

fn parse<T: DeserializeOwned>(bytes: &[u8], path: &Path) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| bad(path, &error.to_string()))
}

fn read_file(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_JSON).read_to_end(&mut bytes))
        .with_context(|| format!("{}: cannot read", path.display()))?;
    Ok(bytes)
}

/// The digest as descriptors have it.
fn sha256(hasher: Sha256) -> String {
    format!("sha256:{:x}", hasher.finalize())
}

/// Copies a layer and checks its size and digest.
fn copy(from: &Path, layer: &Descriptor, to: &Path, bar: &Bar) -> Result<()> {
    let context = || format!("{}: cannot copy", from.display());
    let mut input = File::open(from).with_context(context)?;
    let mut output = File::create_new(to).with_context(context)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        let len = input.read(&mut buffer).with_context(context)?;
        let piece = buffer.get(..len).unwrap_or_default();
        if piece.is_empty() {
            break;
        }
        hasher.update(piece);
        output.write_all(piece).with_context(context)?;
        size += to_u64(len);
        bar.advance(to_u64(len))?;
    }
    if size != layer.size || sha256(hasher) != layer.digest {
        return Err(bad(from, "is not what its digest and size say"));
    }
    output.sync_all().with_context(context)
}

/// Checks that the layers are OverlayBD layers and make a stack.
fn check(files: &[PathBuf], manifest: &Manifest) -> Result<()> {
    let mut layers = Vec::new();
    for ((nth, file), layer) in files.iter().enumerate().zip(&manifest.layers) {
        let opened = overlaybd::LayerReader::open(file, None);
        layers.push(opened.map_err(|error| {
            let message = format!(
                "layer {nth}, {}, is not an OverlayBD layer (an ordinary image must be converted \
                 to OverlayBD first): {}",
                layer.digest,
                error.cause()
            );
            Failure::error(exit::code(&error.into()), message)
        })?);
    }
    Stack::new(layers)?;
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}
