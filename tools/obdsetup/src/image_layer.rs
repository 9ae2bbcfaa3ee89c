// SPDX-License-Identifier: GPL-2.0

//! A layer of a disk image.

use std::path::Path;

use anyhow::{Context, Result};
use overlaybd::format::lsmt;
use overlaybd::format::num::{to_u64, to_usize};
use overlaybd::format::Blob;
use overlaybd::layer::Ident;
use overlaybd::lsmt_writer::{cut, LayerWriter};
use overlaybd::{coarsen, diff, FileBlob, LayerReader, Stack};
use uuid::Uuid;

use crate::bar::Bar;
use crate::exit::Failure;
use crate::layer_args::{uuid_text, IdentArgs};
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
    /// The options, `skip_zeros` being whether zeros stay out of the layer.
    pub(crate) fn options(&self, skip_zeros: bool) -> diff::Options {
        diff::Options {
            granule: self.granularity.unwrap_or(4096),
            skip_zeros,
        }
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
        return Err(Failure::usage(format!("{}: empty", path.display())));
    }
    let base = match base.is_empty() {
        true => None,
        false => Some(Stack::with_size(base, image.size())?),
    };
    let mut options = options;
    let runs = loop {
        let bar = Bar::new("comparing", image.size());
        let progress = |bytes| bar.advance(bytes);
        let runs = diff::runs(&image, base.as_ref(), options, &progress)
            .map_err(|error| error.in_file(path))?;
        match coarsen::granule(&runs, options.granule, lsmt::MAX_ENTRIES) {
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
            _ => break runs,
        }
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
