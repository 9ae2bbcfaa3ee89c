// SPDX-License-Identifier: GPL-2.0

//! Images whose layers are OverlayBD layers. The layers are copied unchanged.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use overlaybd::format::num::to_u64;
use overlaybd::format::Blob;
use overlaybd::{FileBlob, LayerReader, Stack};
use sha2::{Digest, Sha256};

use super::image::check_count;
use super::layout::{Found, Layout};
use super::spec::{sha256, Descriptor, Manifest};
use crate::input::chain::{Findings, Part};
use crate::make::made::Made;
use crate::make::output::sync;
use crate::terminal::bar::Bar;
use crate::terminal::exit::{self, Failure};
use crate::terminal::warn;

/// Annotations that only TurboOCI layers have.
const TURBO: [&str; 2] = ["overlaybd/turbo-oci", "overlaybd/fastoci"];
/// Prefix of the annotations that only OverlayBD layers have.
const ANNOTATION: &str = "containerd.io/snapshot/overlaybd/";

/// Returns whether the image's layers are OverlayBD layers: by the annotations, or because the lowest layer
/// is one.
pub(super) fn is_ready(layout: &Layout, manifest: &Manifest) -> bool {
    let is_said = |layer: &Descriptor| {
        let mut names = layer.annotations.keys();
        names.any(|name| {
            name.starts_with(ANNOTATION) || TURBO.iter().any(|turbo| name.contains(turbo))
        })
    };
    let is_one = |layer: &Descriptor| {
        let file = layout.open(layer);
        file.is_ok_and(|file| LayerReader::from_file(Arc::new(file)).is_ok())
    };
    manifest.layers.iter().any(is_said) || manifest.layers.first().is_some_and(is_one)
}

/// Fills and completes the directory `made`: the layers, and the file that lists them.
pub(super) fn convert(
    layout: &Layout,
    image: &Found,
    manifest: Manifest,
    mut made: Made,
) -> Result<()> {
    let stack = open(layout, &image.descriptor, &manifest.layers)?;
    // Read before gigabytes are copied: an error should not come after that.
    let config = manifest.config.as_ref();
    let config = config.map(|config| layout.read(config)).transpose()?;
    let files: Vec<&FileBlob> = stack
        .layers()
        .iter()
        .map(|l| &**l.payload().file())
        .collect();
    let bar = Bar::new("copying", files.iter().map(|file| file.size()).sum());
    for (layer, from) in manifest.layers.into_iter().zip(files) {
        let to = made.next_layer();
        let shown = made.shown(to.file_name().unwrap_or_default());
        copy(layout, from, &layer, (&to, &shown), &bar)?;
        made.add(Some(layer.digest));
    }
    drop(bar);
    if let Some((config, _)) = config {
        made.write("image.json", &config)?;
    }
    made.finish_config()
}

/// Opens the layers of an image, and checks that they are OverlayBD layers that a stack can have. Warns if they
/// don't fit on each other. Called before gigabytes are copied.
fn open(layout: &Layout, image: &Descriptor, layers: &[Descriptor]) -> Result<Stack> {
    check_count(layout, image, layers)?;
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
            LayerReader::from_file(Arc::new(layout.open(layer)?)).map_err(|error| {
                let kind = match layer.media_type.as_str() {
                    "" => String::new(),
                    kind => format!(" but {kind}"),
                };
                let message = format!(
                    "layer {nth}, {}, is not an OverlayBD layer{kind}, although annotations or \
                     the lowest layer show that the image has such layers: {}",
                    layer.digest,
                    error.cause()
                );
                Failure::error(exit::code(&error.into()), message)
            })?,
        );
    }
    // Errors of the stack are only warnings here: the layers are copied unchanged, and commands that open them
    // refuse a wrong stack.
    let found = Findings::of(&opened, Part::Whole);
    warn(&found.errors);
    warn(&found.warnings);
    Ok(Stack::new(opened)?)
}

/// Copies the layer `from` to the new file `to`, which messages call `shown`. Checks the digest, and syncs the
/// file.
fn copy(
    layout: &Layout,
    from: &FileBlob,
    layer: &Descriptor,
    (to, shown): (&Path, &Path),
    bar: &Bar,
) -> Result<()> {
    let context = || format!("{}: cannot write", shown.display());
    let mut output = File::create_new(to).with_context(context)?;
    let mut hasher = Sha256::new();
    let copied = from.stream(0, from.size(), &mut |piece| {
        hasher.update(piece);
        output.write_all(piece).map_err(|source| {
            overlaybd::Error::Io {
                what: "write",
                source,
            }
            .in_file(shown)
        })?;
        bar.advance(to_u64(piece.len()))
    });
    copied.map_err(|error| error.in_file(from.path()))?;
    if sha256(hasher) != layer.digest {
        return Err(layout.differs(&layout.blob(layer)?.1));
    }
    sync(&output).with_context(context)
}
