// SPDX-License-Identifier: GPL-2.0

//! Converts container images to files of a stack.
//!
//! - [`layout`]: reads an OCI image layout, and finds the image that is chosen. [`packed`] unpacks a layout
//!   from an archive.
//! - [`ready`]: converts images whose layers are OverlayBD layers already.
//! - [`image`]: converts ordinary images, whose layers are tars. [`cache`] keeps the layers that were made
//!   from them.
//!
//! The result is a [directory](crate::made), in one of two forms.

mod cache;
mod image;
mod layout;
mod packed;
mod ready;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use self::layout::Layout;
use crate::exit::Failure;
use crate::layer_args::NewLayerArgs;
use crate::made::Made;
use crate::output::directory;

/// Media types of indexes. An index may name other indexes.
const INDEX_TYPES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
/// Media types of manifests.
const MANIFEST_TYPES: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
/// Media types of the config of an image.
const CONFIG_TYPES: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];
/// Media types of a layer that is an uncompressed tar.
const TAR_TYPES: [&str; 2] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
];
/// Annotations with the name of an image in an index. Some tools write the whole name to the first one, and
/// only the tag to the other.
const NAMES: [&str; 2] = ["io.containerd.image.name", REF_NAME];
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// A descriptor: the type, digest and size of a blob.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    platform: Option<Platform>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    variant: Option<String>,
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    #[serde(default)]
    media_type: String,
    config: Option<Descriptor>,
    layers: Vec<Descriptor>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// Which image is meant, and what is made of it.
#[derive(Debug, Default, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Container images")]
pub(crate) struct Choice {
    /// Name or digest of the image, where there are several
    #[arg(long = "ref", value_name = "NAME")]
    name: Option<String>,

    /// OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT of the image, where there are several (that of
    /// this machine if not given)
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,

    /// Make an OCI image layout of OverlayBD layers, for a registry, in place of a config.v1.json
    #[arg(long)]
    oci: bool,

    /// Keep the layers that are made in this directory, and take those that are there
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
}

/// An image to be converted.
pub(crate) struct Job<'a> {
    /// A directory with a layout, or an archive of an image.
    pub(crate) input: &'a Path,
    pub(crate) choice: &'a Choice,
    pub(crate) new: &'a NewLayerArgs,
    /// Whether an option was given that applies only to layers that are made.
    pub(crate) shapes_layers: bool,
    pub(crate) allow_loss: bool,
    pub(crate) out: &'a Path,
}

/// Makes a directory from an image. It gets its name only when it is complete.
pub(crate) fn convert(job: &Job<'_>) -> Result<()> {
    let place = directory(job.out);
    let made = Made::new(job.out)?;
    let layout = match job.input.is_dir() {
        true => Layout::of(job.input),
        false => packed::unpack(job.input, place)?,
    };
    let (image, manifest) = layout.choose(job.choice)?;
    if ready::is_ready(&layout, &manifest) {
        if job.shapes_layers || job.choice.oci || job.choice.cache.is_some() {
            return Err(Failure::usage(format!(
                "{}: is an image whose layers are OverlayBD layers, which stay as they are: no \
                 wrapping, no --allow-loss, no --oci and no --cache is for it",
                job.input.display()
            )));
        }
        return ready::convert(&layout, &image, manifest, made);
    }
    image::convert(job, &layout, &image, &manifest, made)
}

/// Returns the digest in the form of a descriptor.
fn sha256(hasher: Sha256) -> String {
    format!("sha256:{:x}", hasher.finalize())
}

/// Returns the descriptor of these bytes.
fn describe(media_type: &str, bytes: &[u8]) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: sha256(Sha256::new_with_prefix(bytes)),
        size: overlaybd::format::num::to_u64(bytes.len()),
        ..Descriptor::default()
    }
}
