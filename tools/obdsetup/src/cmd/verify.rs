// SPDX-License-Identifier: GPL-2.0

//! `obdsetup verify`.

use anyhow::Result;
use overlaybd::format::num::to_u64;
use overlaybd::Stack;
use serde::Serialize;

use super::{print, print_json};
use crate::bar::Bar;
use crate::exit::{self, Failure};
use crate::layers::{chain_warnings, expand, open_stack, warn, LayerArg};
use crate::plain;

/// Most corrupt blocks that are named.
const NAMED: usize = 100;

/// Arguments of `verify`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup verify base.obd app.obd        a stack, lowest layer first
  obdsetup verify --json layer.obd

Reads all of every layer. Exit code 3 says that one is malformed or corrupt. A parent UUID that is
not that of the layer below is a warning: many tools write none.")]
pub(crate) struct Args {
    /// Layers, lowest first, DEVICE:size=BYTES, or a config.v1.json that lists them
    #[arg(required = true, value_name = "LAYER")]
    layers: Vec<LayerArg>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    ok: bool,
    virtual_size: u64,
    merged_segments: u64,
    layers: Vec<Layer>,
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
    let stack = open_stack(&expand(&args.layers)?)?;
    let layers = check(&stack)?;
    let report = Report {
        ok: layers.iter().all(|layer| layer.corrupt_blocks == 0),
        virtual_size: stack.virtual_size(),
        merged_segments: to_u64(stack.merged().len()),
        layers,
        warnings: chain_warnings(stack.layers()),
    };
    warn(&report.warnings);
    if args.json {
        print_json(&report)?;
    } else {
        for layer in &report.layers {
            let verdict = match layer.corrupt_blocks {
                0 => "ok".to_owned(),
                n => format!("{n} of {} blocks are corrupt", layer.blocks),
            };
            let path = plain(&layer.path);
            print(&format!("{path}: {verdict}\n"))?;
            for error in &layer.errors {
                print(&format!("{path}: {error}\n"))?;
            }
        }
    }
    match report.layers.iter().find(|layer| layer.corrupt_blocks > 0) {
        None => Ok(()),
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
