// SPDX-License-Identifier: GPL-2.0

//! Layers on the command line: words that [`layer_name`] parses, or a `config.v1.json` that lists layers.

use std::path::Path;

use anyhow::Result;
use overlaybd::format::merge::MAX_LAYERS;
use overlaybd::format::num::to_u64;
use overlaybd::format::{self, Fault};
use overlaybd::{LayerReader, Stack};

use super::chain::{ChainArgs, Part};
use super::config;
use super::layer_name::{LayerArg, Purpose};
use crate::files::in_use::InUseArgs;

/// Returns the layers that `args` name, lowest first. A `config.v1.json` is replaced by the layers that it
/// lists.
pub(crate) fn expand(args: &[LayerArg]) -> Result<Vec<LayerArg>> {
    let mut layers = Vec::new();
    for arg in args {
        match config::is_config(arg) {
            true => layers.extend(config::layers(&arg.path)?),
            false => layers.push(arg.clone()),
        }
    }
    Ok(layers)
}

/// Returns the paths of all layers in several lists.
pub(crate) fn paths<'a>(lists: &[&'a [LayerArg]]) -> Vec<&'a Path> {
    let layers = lists.iter().flat_map(|list| list.iter());
    layers.map(|layer| layer.path.as_path()).collect()
}

/// Opens layers, lowest first, to read their data. Returns an error if a layer is in use: see
/// [`InUseArgs::check`].
pub(crate) fn open_layers(args: &[LayerArg], in_use: &InUseArgs) -> Result<Vec<LayerReader>> {
    let layers = open_any(args, Purpose::Read)?;
    // Checked after opening, so that a missing file, or one that is no layer, gives the error for that.
    in_use.check(paths(&[args]))?;
    Ok(layers)
}

fn open_any(args: &[LayerArg], purpose: Purpose) -> Result<Vec<LayerReader>> {
    // Checked first, so that hundreds of files aren't opened in vain.
    if args.len() > MAX_LAYERS {
        let fault = format::Error::new(Fault::LsmtLayerCount, 0, to_u64(args.len()));
        return Err(overlaybd::Error::from(fault).into());
    }
    let layers = args.iter().map(|arg| arg.open_layer(purpose));
    layers.collect()
}

/// Opens one layer as [`open_layers`] does.
pub(crate) fn open_layer(arg: &LayerArg, in_use: &InUseArgs) -> Result<LayerReader> {
    let layer = arg.open_layer(Purpose::Read)?;
    in_use.check([arg.path.as_path()])?;
    Ok(layer)
}

/// Opens all layers of a stack, lowest first, to read their data. Checks that they fit on each other, and
/// merges them.
pub(crate) fn open_stack(
    args: &[LayerArg],
    chain: &ChainArgs,
    in_use: &InUseArgs,
) -> Result<Stack> {
    let layers = open_layers(args, in_use)?;
    chain.check(&layers, Part::Whole)?;
    Ok(Stack::new(layers)?)
}

/// Opens all layers of a stack as [`open_stack`] does, to compute the tables of its devices. Doesn't check
/// whether the layers are in use: the command `open` checks that.
pub(crate) fn plan_stack(args: &[LayerArg], chain: &ChainArgs) -> Result<Stack> {
    let layers = open_any(args, Purpose::Devices)?;
    chain.check(&layers, Part::Whole)?;
    Ok(Stack::new(layers)?)
}
