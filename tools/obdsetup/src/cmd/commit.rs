// SPDX-License-Identifier: GPL-2.0

//! `obdsetup commit`.

use std::path::PathBuf;

use anyhow::Result;
use overlaybd::format::num::to_u64;
use overlaybd::format::Blob;
use overlaybd::identity::{is_placed, Below};
use overlaybd::layer::Ident;
use overlaybd::lsmt_writer::{cut, join, Run};
use overlaybd::{flatten, LayerReader};
use uuid::Uuid;

use crate::files::in_use::InUseArgs;
use crate::input::layer_name::LayerArg;
use crate::input::layers::open_layer;
use crate::make::layer_args::{uuid_text, IdentArgs, NewLayerArgs};
use crate::make::layer_out::{derive, plan, LayerOut, Source};
use crate::terminal::bar::Bar;

/// Arguments of `commit`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup commit layer.lsmt layer.obd
      LZ4, 4k blocks
  obdsetup commit --algorithm zstd --block-size 64k --tar in.obd out.obd
  obdsetup commit --algorithm none layer.obd layer.lsmt              unwrap

The LSMT file inside is copied unchanged. With --compact, --dax or an identity, it is written again: \
its data in order and without gaps, and without data that the index doesn't use. Then a layer \
without a UUID gets one made from its content if its parent UUID is known, and a UUID that obdsetup \
has made changes if the parent UUID does.")]
pub(crate) struct Args {
    /// The layer, wrapped or not: a file or block device; NAME:size=BYTES if the blob is shorter than the
    /// device, or than the padded file
    #[arg(value_name = "IN")]
    input: LayerArg,

    /// The file to make
    #[arg(value_name = "OUT")]
    output: PathBuf,

    /// Write the LSMT file again, without data that its index doesn't use
    #[arg(long)]
    compact: bool,

    #[command(flatten)]
    in_use: InUseArgs,

    #[command(flatten)]
    new: NewLayerArgs,
}

/// Runs `commit`.
pub(crate) fn run(args: &Args) -> Result<()> {
    let layer = open_layer(&args.input, &args.in_use)?;
    let output = LayerOut::create(&args.output, &args.new, [args.input.path.as_path()])?;
    // A layer for DAX has its data at other places.
    if args.compact || args.new.wrap.dax || args.new.ident != IdentArgs::default() {
        return compact(&args.new, layer, output);
    }
    let payload = layer.payload();
    let bar = Bar::new("committing", payload.size());
    output.wrap(|sink| {
        payload
            .stream(0, payload.size(), &mut |piece| {
                sink(piece)?;
                bar.advance(to_u64(piece.len()))
            })
            .map_err(|error| error.in_file(&args.input.path))
    })
}

/// Writes the layer again, with its data in order and without data that the index doesn't use.
fn compact(args: &NewLayerArgs, layer: LayerReader, output: LayerOut) -> Result<()> {
    let new = &args.ident;
    let size = layer.lsmt().virtual_size();
    let old = layer.ident().clone();
    let input = layer.path().to_owned();
    let segments: Vec<Run> = layer
        .segments()
        .iter()
        .map(|segment| Run {
            offset: segment.offset(),
            length: segment.length(),
            zeroed: segment.zeroed(),
        })
        .collect();
    let disk = flatten::stack(vec![layer])?;
    let read = |offset: u64, buf: &mut [u8]| disk.read_at(offset, buf);
    let mut ident = new.ident(Below::of(&old.parent), |below| {
        let is_same = match below {
            Below::Layer(uuid) => uuid.eq_ignore_ascii_case(&old.parent),
            Below::Nothing | Below::Unknown => !Ident::is_known(&old.parent),
        };
        // A UUID that was made from the content and the place in a stack is kept only at the same place.
        if Ident::is_known(&old.uuid) && (is_same || !is_placed(&old.uuid)) {
            return Ok(old.uuid.clone());
        }
        // Without the place, a UUID can't be made from the content: two layers of a stack may have the same
        // content.
        if below == Below::Unknown {
            return Ok(uuid_text(Uuid::nil()));
        }
        derive(size, below, &join(&segments), read)
    })?;
    if let Some(note) = other_uuid(new, &old.uuid, &ident.uuid) {
        crate::terminal::tell(&format!(
            "note: {}: {note}, since its UUID depends on the layer below, which is another now: \
             layers that were made over {} cannot be used on it until `commit --parent-uuid' changes \
             them, too",
            output.path().display(),
            input.display()
        ));
    }
    if new.user_tag.is_none() {
        ident.user_tag = old.user_tag;
    }
    // Needed only if the layer has nearly the largest number of entries, and padding is added.
    let way_out =
        "leave it as it is, or `obdsetup export` the disk and `obdsetup create` a layer from it, \
                   with --base for the layers below: create compares in larger units if there are too many \
                   entries";
    let runs: Vec<Run> = match args.wrap.dax {
        // The segments of a long run may end within pages.
        true => cut(join(&segments), true).collect(),
        false => segments,
    };
    let writer = plan(output.path(), size, ident, runs, way_out)?;
    output.write(writer, "committing", Source::Layers(disk.layers()), read)
}

/// Returns a note if the UUID has changed and the user hasn't set it.
fn other_uuid(new: &IdentArgs, old: &str, now: &str) -> Option<String> {
    if new.uuid.is_some() || !Ident::is_known(old) || old.eq_ignore_ascii_case(now) {
        return None;
    }
    Some(match Ident::is_known(now) {
        true => format!("has UUID {now}, and no longer {old}"),
        false => format!("has no UUID, and had {old}"),
    })
}
