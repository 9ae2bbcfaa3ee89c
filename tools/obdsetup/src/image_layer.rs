// SPDX-License-Identifier: GPL-2.0

//! A layer of a disk image.

use std::path::Path;

use anyhow::{Context, Result};
use overlaybd::diff::Image;
use overlaybd::format::lsmt;
use overlaybd::format::num::{to_u64, to_usize};
use overlaybd::format::Blob;
use overlaybd::identity::{self, Below};
use overlaybd::lsmt_writer::{cut, LayerWriter};
use overlaybd::{coarsen, dax, diff, FileBlob, LayerReader, Stack};

use crate::bar::Bar;
use crate::exit::Failure;
use crate::layer_args::{IdentArgs, NewLayerArgs};
use crate::layer_out::LayerOut;
use crate::layers::warn;
use crate::size;

/// How an image is compared.
#[derive(clap::Args, Debug, Default, PartialEq, Eq)]
pub(crate) struct CompareArgs {
    /// Compare and skip in units of this: a power of two from 512 to 1m (4k if not given; more where
    /// the index of the layer would become too large)
    #[arg(long, value_name = "SIZE", value_parser = granule)]
    granularity: Option<u64>,
}

impl CompareArgs {
    /// The options, `skip_zeros` being whether zeros stay out of the layer, unless it is for DAX.
    pub(crate) fn options(&self, skip_zeros: bool, new: &NewLayerArgs) -> Result<diff::Options> {
        let [page, ..] = dax::PAGE_SIZES;
        let granule = self.granularity.unwrap_or(page);
        let keep_zeros = new.wrap.dax;
        if keep_zeros && granule < page {
            return Err(Failure::usage(format!(
                "--granularity {granule}: a layer for DAX is made of pages of {page} bytes"
            )));
        }
        Ok(diff::Options {
            granule,
            skip_zeros: skip_zeros && !keep_zeros,
            keep_zeros,
        })
    }
}

fn granule(text: &str) -> Result<u64, String> {
    match size::parse(text)? {
        size if size.is_power_of_two() && (512..=coarsen::MAX_GRANULE).contains(&size) => Ok(size),
        _ => Err("a power of two from 512 to 1m".to_owned()),
    }
}

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
        return Err(Failure::usage(format!(
            "{}: the image is empty: incomplete copy?",
            path.display()
        )));
    }
    let base = match base.is_empty() {
        true => None,
        false => Some(Stack::with_size(base, image.size())?),
    };
    write_image(&image, base.as_ref(), options, names, output)
}

/// Writes the layer of `image` over the disk `base`.
pub(crate) fn write_image(
    image: &dyn Image,
    base: Option<&Stack>,
    mut options: diff::Options,
    names: &IdentArgs,
    output: LayerOut,
) -> Result<()> {
    let diff = loop {
        let bar = Bar::new("comparing", image.size());
        let progress = |bytes| bar.advance(bytes);
        let diff = diff::of(image, base, options, &progress)
            .map_err(|error| error.in_file(image.path()))?;
        match coarsen::granule(&diff.runs, options.granule, lsmt::MAX_ENTRIES) {
            Some(granule) if granule > options.granule => {
                drop(bar);
                warn(&[format!(
                    "{}: compared in units of {}: with {} the layer would have more than {} index \
                     entries",
                    output.path().display(),
                    size::show(granule),
                    size::show(options.granule),
                    lsmt::MAX_ENTRIES
                )]);
                options.granule = granule;
            }
            // Where nothing is coarse enough, the writer says so.
            _ => break diff,
        }
    };
    let top = base.and_then(|base| base.layers().last());
    let below = top.map_or(Below::Nothing, |top| Below::of(&top.ident().uuid));
    let ident = names.ident(below, |below| {
        let uuid = identity::uuid(image.size(), below, &diff.runs, &diff.pieces);
        Ok(uuid)
    })?;
    let writer = LayerWriter::new(image.size(), ident, cut(diff.runs))
        .with_context(|| format!("{}: cannot make the layer", output.path().display()))?;
    let read = |offset: u64, buf: &mut [u8]| {
        // Behind the end of the image, its last sector is filled up with zeros.
        let inside = image.size().saturating_sub(offset).min(to_u64(buf.len()));
        let (data, tail) = buf.split_at_mut(to_usize(inside));
        tail.fill(0);
        image
            .read_at(offset, data)
            .map_err(|error| error.in_file(image.path()))
    };
    output.write(writer, "writing", read)
}
