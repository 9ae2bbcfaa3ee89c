// SPDX-License-Identifier: GPL-2.0

//! Ordinary images. Each layer, a tar, becomes an OverlayBD layer: the blocks in which the disk with this layer
//! differs from the disk of the layers below. With the same version of obdsetup, the same options and the same
//! `SOURCE_DATE_EPOCH`, an OverlayBD layer depends only on its tar and the tars below. So if images share layers,
//! the OverlayBD layers are the same, too.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use overlaybd::format::merge::MAX_LAYERS;
use overlaybd::format::num::to_u64;
use overlaybd::identity::Below;
use overlaybd::layer::Ident;
use overlaybd::wrap::Wrapping;
use overlaybd::{LayerReader, Stack};
use serde::Deserialize;
use serde_json::{json, Value};
use sha2::{Digest, Sha256};

use super::cache::{Cache, Key};
use super::job::Job;
use super::layout::{hash, is_hex, Found, Layout};
use super::spec::{
    describe, Descriptor, Manifest, Platform, CONFIG_TYPES, MANIFEST_TYPES, NAMES, TAR_TYPES,
};
use crate::files::json::{self, bad, MAX};
use crate::input::archive::{Archive, Compression};
use crate::make::layer_out::{derive, LayerOut};
use crate::make::made::Made;
use crate::make::mkfs;
use crate::terminal::bar::Bar;
use crate::terminal::exit::Failure;

/// Suffixes of the media types of layers, by compression.
const COMPRESSED: [&str; 4] = ["", "+gzip", "+zstd", ".gzip"];
/// Media types of foreign layers, which are not in the image: only their publisher distributes them.
const FOREIGN: [&str; 2] = [
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
];
/// The version of upstream's format for the annotation of a layer.
const VERSION: &str = "0.1.0";
/// Prefix of the names of annotations.
const ANNOTATION: &str = "containerd.io/snapshot/overlaybd/";

/// Name of a config in messages.
const DESCRIPTION: &str = "an image's description";
/// Largest number of JSON values in a config that is written again with other DiffIDs.
const VALUES: usize = 100_000;
/// Upper limit for the bytes that a new manifest has for each layer, and for everything except layers and
/// annotations together.
const LAYER: usize = 1024;

/// The digits of the nil UUID, in the place of a chain ID.
const NO_UUID: &str = "00000000000000000000000000000000";

/// The fields of an image's config that are used here.
#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    variant: Option<String>,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
}

/// Returns an error if a stack cannot have as many layers as the image, or if it has none.
pub(super) fn check_count(
    layout: &Layout,
    image: &Descriptor,
    layers: &[Descriptor],
) -> Result<()> {
    if (1..=MAX_LAYERS).contains(&layers.len()) {
        return Ok(());
    }
    let what = format!(
        "image {}: has {} layers, expected 1 to {MAX_LAYERS}",
        image.digest,
        layers.len()
    );
    Err(bad(layout.name(), &what))
}

/// Fills and completes the directory `made`: the layers, and the file that lists them or the OCI image layout.
pub(super) fn convert(
    job: &Job<'_>,
    layout: &Layout,
    image: &Found,
    manifest: &Manifest,
    mut made: Made,
) -> Result<()> {
    let name = layout.name();
    let layers = &manifest.layers;
    check_count(layout, &image.descriptor, layers)?;
    for (nth, layer) in layers.iter().enumerate() {
        let refuse = |what: String| {
            Failure::usage(format!(
                "{}: layer {nth}, {}, {what}",
                name.display(),
                layer.digest
            ))
        };
        check_foreign(&layer.media_type).map_err(refuse)?;
        // Check all layers first: converting them may take hours.
        layout.blob(layer)?;
        if layer.media_type.is_empty() {
            let what = format!(
                "layer {nth}, {}, is not an OverlayBD layer, and has no media type that says what it is",
                layer.digest
            );
            return Err(bad(name, &what));
        }
        check_type(&layer.media_type).map_err(refuse)?;
    }
    let Some(descriptor) = &manifest.config else {
        let what = format!(
            "image {}: no `config' in its manifest",
            image.descriptor.digest
        );
        return Err(bad(name, &what));
    };
    let (config_bytes, config_name) = layout.read(descriptor)?;
    let config: Config = json::parse(&config_bytes, &config_name, DESCRIPTION)?;
    let diff_ids = diff_ids(&config, layers.len()).map_err(|what| bad(&config_name, &what))?;
    if job.choice.oci {
        // Done only to find errors before the layers are made: it parses the whole config. The digests of the new
        // layers are as long as those here.
        describing(&config_bytes, &config_name, &config.rootfs.diff_ids)?;
        check_annotations(layout, image, manifest)?;
    }

    let mut wrapping = job.new.wrap.wrapping()?;
    wrapping.tar |= job.choice.oci;
    let maker = Maker {
        layout,
        wrapping,
        by_chain: job.choice.oci,
        allow_loss: job.allow_loss,
    };
    let cache = job.choice.cache.as_ref();
    let cache = cache
        .map(|place| Cache::open(place, maker.options()))
        .transpose()?;
    let mut chains: Vec<String> = Vec::new();
    let mut blobs: Vec<(String, u64)> = Vec::new();
    for (nth, (layer, diff_id)) in layers.iter().zip(&diff_ids).enumerate() {
        let chain = match chains.last() {
            Some(below) => format!(
                "{:x}",
                Sha256::digest(format!("sha256:{below} sha256:{diff_id}"))
            ),
            None => diff_id.clone(),
        };
        let to = made.next_layer();
        let key = Key {
            chain: &chain,
            below: blobs.last().map(|(digest, _)| digest.as_str()),
        };
        let taken = match &cache {
            Some(cache) => cache.take(&key, &to)?,
            None => None,
        };
        let digest = match taken {
            Some(digest) => digest,
            None => {
                maker
                    .layer(layer, diff_id, &chain, chains.last(), &made)
                    .with_context(|| format!("layer {nth}, {}", layer.digest))?;
                let bar = Bar::new("hashing", to.metadata()?.len());
                let digest = hash(&to, &bar)?;
                if let Some(cache) = &cache {
                    cache.keep(&key, &to, &digest)?;
                }
                digest
            }
        };
        chains.push(chain);
        blobs.push((digest.clone(), to.metadata()?.len()));
        made.add(Some(digest));
    }
    if !job.choice.oci {
        made.write("image.json", &config_bytes)?;
        return made.finish_config();
    }
    let platform = Platform {
        os: config.os,
        architecture: config.architecture,
        variant: config.variant,
    };
    let digests: Vec<String> = blobs.iter().map(|(digest, _)| digest.clone()).collect();
    let own = describing(&config_bytes, &config_name, &digests)?;
    layout_of(image, manifest, (descriptor, &own), platform, &blobs, made)
}

/// Returns the image's config with other DiffIDs. Messages call the config `name`.
fn describing(bytes: &[u8], name: &Path, diff_ids: &[String]) -> Result<Vec<u8>> {
    // An object of a few bytes takes hundreds in memory.
    if values(bytes) > VALUES {
        let what = format!("has more than {VALUES} values, too many for such a file");
        return Err(bad(name, &what));
    }
    let mut own: Value = json::parse(bytes, name, DESCRIPTION)?;
    match own.pointer_mut("/rootfs/diff_ids") {
        Some(ids) => *ids = json!(diff_ids),
        None => return Err(bad(name, &format!("not {DESCRIPTION}"))),
    }
    let bytes = serde_json::to_vec(&own)?;
    // It can be longer than the old config: for example, "1e5" becomes "100000.0".
    if to_u64(bytes.len()) > MAX {
        let what = format!(
            "as it is written for a registry, has more than {MAX} bytes, too many for such a file"
        );
        return Err(bad(name, &what));
    }
    Ok(bytes)
}

/// Returns the number of values in all objects and arrays of a JSON text. An empty object or array counts as if
/// it had one value.
fn values(bytes: &[u8]) -> usize {
    let mut count = 0;
    let mut is_text = false;
    let mut is_escaped = false;
    for byte in bytes {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if is_text => is_escaped = true,
            b'"' => is_text = !is_text,
            b'{' | b'[' | b',' if !is_text => count += 1,
            _ => {}
        }
    }
    count
}

/// Returns an error if the manifest's annotations are too long for the new manifest.
fn check_annotations(layout: &Layout, image: &Found, manifest: &Manifest) -> Result<()> {
    let bytes = serde_json::to_vec(&manifest.annotations)?.len();
    let bytes = to_u64(bytes + (manifest.layers.len() + 1) * LAYER);
    if bytes <= MAX {
        return Ok(());
    }
    let what = format!(
        "image {}: its manifest, as it is written for a registry, has more than {MAX} bytes, too \
         many for such a file",
        image.descriptor.digest
    );
    Err(bad(layout.name(), &what))
}

/// Returns an error if the media type is that of a foreign layer.
fn check_foreign(media_type: &str) -> Result<(), String> {
    match is_one_of(&FOREIGN, media_type) {
        true => Err(format!(
            "is {media_type}: a foreign layer, which only its publisher distributes: it is not in \
             the image, and cannot be converted"
        )),
        false => Ok(()),
    }
}

/// Returns an error if the media type is not that of a tar.
fn check_type(media_type: &str) -> Result<(), String> {
    match is_one_of(&TAR_TYPES, media_type) {
        true => Ok(()),
        false => Err(format!(
            "is {media_type:?}: expected a tar, alone or compressed with gzip or zstd, or an \
             OverlayBD layer"
        )),
    }
}

/// Returns whether a media type is one of `types`, compressed or not.
fn is_one_of(types: &[&str], media_type: &str) -> bool {
    types.iter().any(|start| {
        let end = media_type.strip_prefix(start);
        end.is_some_and(|end| COMPRESSED.contains(&end))
    })
}

/// Returns the hexadecimal digits of the DiffIDs, of which there must be one for each of `layers` layers.
fn diff_ids(config: &Config, layers: usize) -> Result<Vec<String>, String> {
    let ids = &config.rootfs.diff_ids;
    if ids.len() != layers {
        return Err(format!(
            "rootfs.diff_ids: {} for {layers} layers",
            ids.len()
        ));
    }
    let hex = ids.iter().map(|id| {
        let hex = id.strip_prefix("sha256:");
        let hex = hex.filter(|hex| is_hex(hex.as_bytes()));
        let hex = hex.ok_or_else(|| format!("rootfs.diff_ids: {id:?}: expected SHA-256"));
        hex.map(ToOwned::to_owned)
    });
    hex.collect()
}

/// Makes the layers of an image, all with the same options.
struct Maker<'a> {
    layout: &'a Layout,
    wrapping: Wrapping,
    /// Whether the UUIDs of layers are made from chain IDs, as containerd's converter does; otherwise, from their
    /// content.
    by_chain: bool,
    allow_loss: bool,
}

impl Maker<'_> {
    /// Returns everything on which the bytes of a layer depend, except the tars, as a text for [`Cache::open`].
    fn options(&self) -> String {
        let Self {
            wrapping,
            by_chain,
            allow_loss,
            ..
        } = self;
        format!(
            "{} erofs {wrapping:?} {by_chain} {allow_loss} {:?}",
            env!("CARGO_PKG_VERSION"),
            std::env::var_os("SOURCE_DATE_EPOCH")
        )
    }

    /// Makes the next layer of `made` from the tar `layer`. `chain` is the chain ID of this tar and those
    /// below, `below` that of the tars below without this one; `None` for the lowest layer. Checks the digest
    /// and the DiffID of the tar.
    fn layer(
        &self,
        layer: &Descriptor,
        diff_id: &str,
        chain: &str,
        below: Option<&String>,
        made: &Made,
    ) -> Result<()> {
        let (path, name) = self.layout.checked(layer)?;
        let shown = self.layout.shown(&name);
        let mut archive = Archive::layer(&path, &shown, true)?;
        let readable = [None, Some(Compression::Gzip), Some(Compression::Zstd)];
        if let Some(other) = archive
            .compression()
            .filter(|how| !readable.contains(&Some(*how)))
        {
            return Err(Failure::usage(format!(
                "{}: compressed with {}: in a layer, expected gzip or zstd",
                shown.display(),
                other.name()
            )));
        }
        let stack = open(&made.layers())?;
        let top = stack.as_ref().and_then(|stack| stack.layers().last());
        let below_uuid = top.map(|top| top.ident().uuid.clone());
        let delta = mkfs::apply(
            &mut archive,
            &shown,
            stack,
            chain,
            self.allow_loss,
            made.path(),
        )?;
        if archive.diff_id() != diff_id {
            let what =
                format!("decompressed, it is not {diff_id}, the DiffID in the image's description");
            return Err(bad(&shown, &what));
        }
        let output = LayerOut::with(&made.next_layer(), self.wrapping)?;
        if self.by_chain {
            let ident = Ident {
                uuid: chain_uuid(chain),
                parent: chain_uuid(below.map_or(NO_UUID, String::as_str)),
                user_tag: Vec::new(),
            };
            return delta.write(ident, output);
        }
        let place = below_uuid.as_deref().map_or(Below::Nothing, Below::of);
        let ident = Ident {
            uuid: derive(delta.size, place, &delta.runs, |at, buf| {
                delta.read(at, buf)
            })?,
            parent: below_uuid.unwrap_or_else(|| chain_uuid(NO_UUID)),
            user_tag: Vec::new(),
        };
        delta.write(ident, output)
    }
}

/// Opens the layers in these files, lowest first.
fn open(files: &[PathBuf]) -> Result<Option<Stack>> {
    if files.is_empty() {
        return Ok(None);
    }
    let layers = files.iter().map(|file| LayerReader::open(file, None));
    let layers = layers.collect::<overlaybd::Result<Vec<_>>>()?;
    Ok(Some(Stack::new(layers)?))
}

/// Returns the UUID that containerd's converter makes from a chain ID: its first 32 digits.
fn chain_uuid(chain: &str) -> String {
    let mut text = String::new();
    for (nth, digit) in chain.chars().take(32).enumerate() {
        if matches!(nth, 8 | 12 | 16 | 20) {
            text.push('-');
        }
        text.push(digit.to_ascii_uppercase());
    }
    text
}

/// Makes an OCI image layout from the layers in `made`, in the form that containerd's converter writes, and
/// completes the directory. `config` describes the old config, `own` is the new one; `layers` has the digest
/// and the size of each layer.
fn layout_of(
    image: &Found,
    manifest: &Manifest,
    (config, own): (&Descriptor, &[u8]),
    platform: Platform,
    layers: &[(String, u64)],
    made: Made,
) -> Result<()> {
    let types = (
        &manifest.media_type,
        &image.descriptor.media_type,
        &config.media_type,
    );
    let is_docker = *types.0 == MANIFEST_TYPES[1]
        || *types.1 == MANIFEST_TYPES[1]
        || *types.2 == CONFIG_TYPES[1];
    let [manifest_type, config_type, layer_type] = match is_docker {
        true => [MANIFEST_TYPES[1], CONFIG_TYPES[1], TAR_TYPES[1]],
        false => [MANIFEST_TYPES[0], CONFIG_TYPES[0], TAR_TYPES[0]],
    };
    made.directory("blobs/sha256")?;
    let mut descriptors = Vec::new();
    for ((digest, size), from) in layers.iter().zip(made.layers()) {
        let to = made.path().join(blob_name(digest));
        std::fs::rename(&from, &to).with_context(|| {
            format!(
                "{}: cannot rename it",
                made.shown(blob_name(digest)).display()
            )
        })?;
        let note = |name: &str, value: String| (format!("{ANNOTATION}{name}"), value);
        let annotations = [
            note("version", VERSION.to_owned()),
            note("blob-digest", digest.clone()),
            note("blob-size", size.to_string()),
            note("blob-fs-type", "erofs".to_owned()),
        ];
        descriptors.push(Descriptor {
            media_type: layer_type.to_owned(),
            digest: digest.clone(),
            size: *size,
            platform: None,
            annotations: annotations.into_iter().collect(),
        });
    }
    let write = |media_type: &str, bytes: &[u8]| -> Result<Descriptor> {
        let descriptor = describe(media_type, bytes);
        made.write(&blob_name(&descriptor.digest), bytes)?;
        Ok(descriptor)
    };
    let config = write(config_type, own)?;
    let mut value = json!({
        "schemaVersion": 2,
        "mediaType": manifest_type,
        "config": config,
        "layers": descriptors,
    });
    if !manifest.annotations.is_empty() {
        if let Some(object) = value.as_object_mut() {
            object.insert("annotations".to_owned(), json!(manifest.annotations));
        }
    }
    let mut entry = write(manifest_type, &serde_json::to_vec(&value)?)?;
    entry.platform = Some(platform).filter(Platform::is_for_index);
    for (key, name) in NAMES.iter().zip(&image.names) {
        if let Some(name) = name {
            entry.annotations.insert((*key).to_owned(), name.clone());
        }
    }
    let index = json!({
        "schemaVersion": 2,
        "mediaType": super::spec::INDEX_TYPES[0],
        "manifests": [entry],
    });
    made.write("index.json", &serde_json::to_vec(&index)?)?;
    made.write("oci-layout", b"{\"imageLayoutVersion\":\"1.0.0\"}")?;
    made.sync("blobs/sha256")?;
    made.sync("blobs")?;
    made.finish()
}

fn blob_name(digest: &str) -> String {
    let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
    Path::new("blobs/sha256")
        .join(hex)
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::{chain_uuid, check_foreign, check_type, values};

    #[test]
    fn uuids() {
        let chain = "a3ed95caeb02ffe68cdd9fd84406680ae93d633cb16422d00e8a7c22955b46d4";
        assert_eq!(chain_uuid(chain), "A3ED95CA-EB02-FFE6-8CDD-9FD84406680A");
    }

    #[test]
    fn values_without_those_in_texts() {
        for (text, count) in [
            (r#"{"a":[1,2],"b":{}}"#, 5),
            (r#"{"a,[{":",,,"}"#, 1),
            (r#"["\",","\\",","]"#, 3),
            (r#"["a\\\",",1]"#, 2),
        ] {
            assert_eq!(values(text.as_bytes()), count, "{text}");
        }
    }

    #[test]
    fn media_types() {
        for good in [
            "application/vnd.oci.image.layer.v1.tar",
            "application/vnd.oci.image.layer.v1.tar+gzip",
            "application/vnd.oci.image.layer.v1.tar+zstd",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            "application/vnd.docker.image.rootfs.diff.tar",
        ] {
            assert_eq!(check_type(good), Ok(()), "{good}");
            assert_eq!(check_foreign(good), Ok(()), "{good}");
        }
        let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
        assert!(check_foreign(foreign).is_err());
        for bad in [
            "application/vnd.oci.image.layer.v1.tar+encrypted",
            "text/plain",
        ] {
            assert!(check_type(bad).is_err(), "{bad}");
        }
    }
}
