// SPDX-License-Identifier: GPL-2.0

//! The options of a conversion: the image, and the form of the result.

use std::path::{Path, PathBuf};

use crate::make::layer_args::NewLayerArgs;

/// Which image is converted, and the form of the result.
#[derive(Debug, Default, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Container images")]
pub(crate) struct Choice {
    /// Name or digest of the image, if there are several
    #[arg(long = "ref", value_name = "NAME")]
    pub(super) name: Option<String>,

    /// OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT of the image, if there are several (if not given,
    /// the image for this machine)
    #[arg(long, value_name = "PLATFORM")]
    pub(super) platform: Option<String>,

    /// Make an OCI image layout of OverlayBD layers, for a registry, instead of a config.v1.json
    #[arg(long)]
    pub(super) oci: bool,

    /// Directory with layers of earlier conversions: reuse them, and add the new ones
    #[arg(long, value_name = "DIR")]
    pub(super) cache: Option<PathBuf>,
}

/// An image to be converted.
pub(crate) struct Job<'a> {
    /// A directory with an OCI image layout, or an archive of an image.
    pub(crate) input: &'a Path,
    pub(crate) choice: &'a Choice,
    pub(crate) new: &'a NewLayerArgs,
    /// Whether an option was given that applies only to new layers, not to copied ones.
    pub(crate) shapes_layers: bool,
    /// Whether data that the file system cannot store may be left out.
    pub(crate) allow_loss: bool,
    /// The directory to make.
    pub(crate) out: &'a Path,
}
