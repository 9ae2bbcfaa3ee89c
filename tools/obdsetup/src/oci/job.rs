// SPDX-License-Identifier: GPL-2.0

//! What is asked for: an image, and what is made of it.

use std::path::{Path, PathBuf};

use crate::make::layer_args::NewLayerArgs;

/// Which image is meant, and what is made of it.
#[derive(Debug, Default, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Container images")]
pub(crate) struct Choice {
    /// Name or digest of the image, where there are several
    #[arg(long = "ref", value_name = "NAME")]
    pub(super) name: Option<String>,

    /// OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT of the image, where there are several (that of
    /// this machine if not given)
    #[arg(long, value_name = "PLATFORM")]
    pub(super) platform: Option<String>,

    /// Make an OCI image layout of OverlayBD layers, for a registry, in place of a config.v1.json
    #[arg(long)]
    pub(super) oci: bool,

    /// Keep the layers that are made in this directory, and take those that are there
    #[arg(long, value_name = "DIR")]
    pub(super) cache: Option<PathBuf>,
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
