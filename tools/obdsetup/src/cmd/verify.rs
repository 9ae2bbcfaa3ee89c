// SPDX-License-Identifier: GPL-2.0

//! `obdsetup verify`.

use anyhow::Result;
use overlaybd::format::num::to_u64;
use overlaybd::layer::Ident;
use overlaybd::{LayerReader, Stack};
use serde::Serialize;

use crate::files::in_use::InUseArgs;
use crate::input::chain::{ChainArgs, Findings, Part};
use crate::input::layer_name::LayerArg;
use crate::input::layers::{expand, open_layers};
use crate::terminal::bar::Bar;
use crate::terminal::exit::{self, Failure};
use crate::terminal::plain;
use crate::terminal::warn;
use crate::terminal::{print, print_json};

/// Largest number of corrupt blocks that are listed.
const NAMED: usize = 100;

/// Arguments of `verify`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup verify base.obd app.obd        a stack, lowest layer first
  obdsetup verify --json layer.obd
  obdsetup verify --dax padded.lsmt:size=32833536
      a file that was padded, to be a pmem device of a guest

Reads all of every layer. The exit code is 3 if a layer is malformed or corrupt, or if a layer does \
not belong on the one below it, by their UUIDs. Many tools write no UUIDs: then the order of the \
layers cannot be checked. A single layer is checked without the layers below it.")]
pub(crate) struct Args {
    /// Layers, lowest first: files or block devices; NAME:size=BYTES if the blob is shorter than the device, or
    /// than the padded file; or a config.v1.json that lists layers
    #[arg(required = true, value_name = "LAYER")]
    layers: Vec<LayerArg>,

    /// Print JSON
    #[arg(long)]
    json: bool,

    /// Check that `open --dax' can use each layer, too
    #[arg(long)]
    dax: bool,

    #[command(flatten)]
    in_use: InUseArgs,

    #[command(flatten)]
    chain: ChainArgs,
}

#[derive(Serialize)]
struct Report {
    ok: bool,
    virtual_size: u64,
    merged_segments: u64,
    layers: Vec<Layer>,
    chain_errors: Vec<String>,
    warnings: Vec<String>,
}

#[derive(Serialize)]
struct Layer {
    path: String,
    blocks: u64,
    corrupt_blocks: u64,
    errors: Vec<String>,
}

/// Runs `verify`.
pub(crate) fn run(args: &Args) -> Result<()> {
    let opened = open_layers(&expand(&args.layers)?, &args.in_use)?;
    let mut found = match opened.as_slice() {
        [single] => alone(single),
        several => Findings::of(several, Part::Whole),
    };
    args.chain.apply(&mut found);
    // Without --dax, nothing says that a layer does not fit.
    let fit = match args.dax {
        true => found.add_dax(&opened)?,
        false => Vec::new(),
    };
    let stack = Stack::new(opened)?;
    let layers = check(&stack)?;
    let report = Report {
        ok: found.errors.is_empty()
            && found.misfits.is_empty()
            && layers.iter().all(|layer| layer.corrupt_blocks == 0),
        virtual_size: stack.virtual_size(),
        merged_segments: to_u64(stack.merged().len()),
        layers,
        chain_errors: [found.errors.as_slice(), &found.misfits].concat(),
        warnings: found.warnings.clone(),
    };
    warn(&report.warnings);
    if args.json {
        print_json(&report)?;
    } else {
        for (nth, layer) in report.layers.iter().enumerate() {
            let verdict = match layer.corrupt_blocks {
                0 if fit.get(nth) == Some(&false) => "no error, but not for DAX".to_owned(),
                0 => "ok".to_owned(),
                n => format!("{n} of {} blocks are corrupt", layer.blocks),
            };
            let path = plain(&layer.path);
            print(&format!("{path}: {verdict}\n"))?;
            for error in &layer.errors {
                print(&format!("{path}: {error}\n"))?;
            }
        }
        for error in &report.chain_errors {
            print(&format!("{}\n", plain(error)))?;
        }
    }
    match report.layers.iter().find(|layer| layer.corrupt_blocks > 0) {
        None => found.into_error(true).map_or(Ok(()), Err),
        Some(layer) => Err(Failure::error(
            exit::BAD_IMAGE,
            format!(
                "{}: {}",
                layer.path,
                layer.errors.first().map_or("corrupt", String::as_str)
            ),
        )),
    }
}

/// Returns the findings for a single layer, which may be an upper one.
fn alone(layer: &LayerReader) -> Findings {
    let mut found = Findings::default();
    let parent = &layer.ident().parent;
    if Ident::is_known(parent) {
        found.warnings.push(format!(
            "{}: was made over a layer with UUID {parent}, which is not checked",
            layer.path().display()
        ));
    }
    found
}

fn check(stack: &Stack) -> Result<Vec<Layer>> {
    let total = stack.layers().iter().map(|layer| layer.verify_len()).sum();
    let bar = Bar::new("verifying", total);
    stack
        .layers()
        .iter()
        .map(|layer| {
            let bad = layer.verify(&|bytes| bar.advance(bytes))?;
            let zfile = layer.payload().zfile();
            Ok(Layer {
                path: layer.path().display().to_string(),
                blocks: zfile.map_or(0, |zfile| zfile.geometry().blocks()),
                corrupt_blocks: to_u64(bad.len()),
                errors: bad.iter().take(NAMED).map(ToString::to_string).collect(),
            })
        })
        .collect()
}
