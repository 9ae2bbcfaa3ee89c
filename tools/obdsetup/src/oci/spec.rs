// SPDX-License-Identifier: GPL-2.0

//! Names and structures of the OCI image specification, and of docker's older formats.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Media types of indexes. An index may name other indexes.
pub(super) const INDEX_TYPES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
/// Media types of manifests.
pub(super) const MANIFEST_TYPES: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
/// Media types of the config of an image.
pub(super) const CONFIG_TYPES: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];
/// Media types of a layer that is an uncompressed tar.
pub(super) const TAR_TYPES: [&str; 2] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
];
/// Annotations with the name of an image, in an index. Some tools write the whole name to the first one, and only
/// the tag to the second one.
pub(super) const NAMES: [&str; 2] = ["io.containerd.image.name", REF_NAME];
pub(super) const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// A descriptor: the type, digest and size of a blob.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) digest: String,
    pub(super) size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) platform: Option<Platform>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) annotations: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct Platform {
    #[serde(default)]
    pub(super) os: String,
    #[serde(default)]
    pub(super) architecture: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) variant: Option<String>,
}

/// The operating system of an attestation, which an index lists like an image.
pub(super) const UNKNOWN: &str = "unknown";
/// Largest length in bytes of a name, digest, type or platform in an index. Each image of a nested index can get a
/// copy of the name of that index, so a small file could take much memory.
pub(super) const MAX_TEXT: usize = 1024;

impl Platform {
    /// Returns whether operating system and architecture are given, and no text is longer than [`MAX_TEXT`].
    pub(super) fn is_said(&self) -> bool {
        !self.os.is_empty() && !self.architecture.is_empty() && self.is_short()
    }

    /// Returns whether an image can have this platform in an index: with the operating system [`UNKNOWN`], the
    /// image would be taken for an attestation.
    pub(super) fn is_for_index(&self) -> bool {
        self.is_said() && self.os != UNKNOWN
    }

    fn is_short(&self) -> bool {
        let variant = self.variant.as_deref().unwrap_or_default();
        let all = [&self.os, &self.architecture, variant];
        all.iter().all(|text| text.len() <= MAX_TEXT)
    }
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

#[derive(Clone, Deserialize)]
pub(super) struct Index {
    pub(super) manifests: Vec<Descriptor>,
}

impl Descriptor {
    /// Returns whether no text is longer than [`MAX_TEXT`]. Of the annotations, only names are checked.
    pub(super) fn is_short(&self) -> bool {
        let names = NAMES.iter().filter_map(|key| self.annotations.get(*key));
        let mut all = names.chain([&self.media_type, &self.digest]);
        all.all(|text| text.len() <= MAX_TEXT)
            && self.platform.as_ref().is_none_or(Platform::is_short)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Manifest {
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) config: Option<Descriptor>,
    pub(super) layers: Vec<Descriptor>,
    #[serde(default)]
    pub(super) annotations: BTreeMap<String, String>,
}

/// Returns the digest in the form of a descriptor: `sha256:` and 64 hexadecimal digits.
pub(super) fn sha256(hasher: Sha256) -> String {
    format!("sha256:{:x}", hasher.finalize())
}

/// Returns the descriptor of these bytes.
pub(super) fn describe(media_type: &str, bytes: &[u8]) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: sha256(Sha256::new_with_prefix(bytes)),
        size: overlaybd::format::num::to_u64(bytes.len()),
        ..Descriptor::default()
    }
}
