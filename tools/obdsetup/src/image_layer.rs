// SPDX-License-Identifier: GPL-2.0

//! A layer of a disk image.

use std::path::Path;

use anyhow::{Context, Result};
use overlaybd::diff;
use overlaybd::format::num::{to_u64, to_usize};
use overlaybd::format::Blob;
use overlaybd::layer::Ident;
use overlaybd::lsmt_writer::{cut, LayerWriter};
use overlaybd::{FileBlob, LayerReader, Stack};
use uuid::Uuid;

use crate::bar::Bar;
use crate::exit::Failure;
use crate::layer_args::{uuid_text, IdentArgs};
use crate::layer_out::LayerOut;

/// Writes the layer of the image at `path` over the layers `base`, lowest first.
pub(crate) fn write(
    path: &Path,
    base: Vec<LayerReader>,
    options: diff::Options,
    names: &IdentArgs,
    output: LayerOut,
) -> Result<()> {
    let image = FileBlob::open(path, None)?;
    if image.size() == 0 {
        return Err(Failure::usage(format!("{}: empty", path.display())));
    }
    let base = match base.is_empty() {
        true => None,
        false => Some(Stack::with_size(base, image.size())?),
    };
    let runs = {
        let bar = Bar::new("comparing", image.size());
        let progress = |bytes| bar.advance(bytes);
        diff::runs(&image, base.as_ref(), options, &progress)
            .map_err(|error| error.in_file(path))?
    };
    let ident = ident(names, base.as_ref());
    let writer = LayerWriter::new(image.size(), ident, cut(runs))
        .with_context(|| format!("{}: cannot make the layer", output.path().display()))?;
    let read = |offset: u64, buf: &mut [u8]| {
        // Behind the end of the image, its last sector is filled up with zeros.
        let inside = image.size().saturating_sub(offset).min(to_u64(buf.len()));
        let (data, tail) = buf.split_at_mut(to_usize(inside));
        tail.fill(0);
        image
            .read_at(offset, data)
            .map_err(|error| error.in_file(path))
    };
    output.write(&writer, "writing", read)
}

/// What the layer says of itself: what is asked for; the parent is the layer below.
fn ident(args: &IdentArgs, base: Option<&Stack>) -> Ident {
    let below = base.and_then(|base| base.layers().last());
    let parent = below.map(|below| below.ident().uuid.clone());
    let parent = parent.filter(|uuid| Ident::is_known(uuid));
    let none = || uuid_text(Uuid::nil());
    Ident {
        uuid: args.uuid.map_or_else(none, uuid_text),
        parent: match args.parent_uuid {
            Some(uuid) => uuid_text(uuid),
            None => parent.unwrap_or_else(none),
        },
        user_tag: args.user_tag.clone().unwrap_or_default().into_bytes(),
    }
}
