// SPDX-License-Identifier: GPL-2.0

//! Layers on the command line: words that [`layer_name`] parses, or a `config.v1.json` that lists layers.

use std::ffi::OsString;
use std::fmt;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use clap::builder::{OsStringValueParser, TryMapValueParser, TypedValueParser, ValueParserFactory};
use overlaybd::format::merge::MAX_LAYERS;
use overlaybd::format::num::to_u64;
use overlaybd::format::{self, Fault};
use overlaybd::{FileBlob, LayerReader, Stack};

use crate::chain::{ChainArgs, Part};
use crate::exit::{self, Failure};
use crate::in_use::InUseArgs;
use crate::{config, interrupt, layer_name};

/// A layer that was named and is not open yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LayerArg {
    /// The file or block device.
    pub(crate) path: PathBuf,
    /// Size of the blob in bytes, if given.
    pub(crate) size: Option<u64>,
}

impl TryFrom<OsString> for LayerArg {
    type Error = String;

    fn try_from(word: OsString) -> Result<Self, String> {
        let (path, size) = layer_name::parse(word)?;
        Ok(Self { path, size })
    }
}

/// A parser for [`clap`] that calls a function.
type FnParser<T> = TryMapValueParser<OsStringValueParser, fn(OsString) -> Result<T, String>>;

impl ValueParserFactory for LayerArg {
    type Parser = FnParser<Self>;

    fn value_parser() -> FnParser<Self> {
        OsStringValueParser::new().try_map(Self::try_from)
    }
}

impl fmt::Display for LayerArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

impl LayerArg {
    /// Opens the file or device.
    pub(crate) fn open(&self) -> Result<Arc<FileBlob>> {
        interrupt::check()?;
        let file = FileBlob::open(&self.path, self.size).map_err(|error| self.explain(error))?;
        if self.size.is_some() && !self.is_device() {
            let message = format!("{self}: only a block device takes :size=BYTES");
            return Err(Failure::usage(message));
        }
        Ok(Arc::new(file))
    }

    /// Returns the error for a failed open, with a hint if the user may have meant a part of the name as a
    /// size.
    fn explain(&self, error: overlaybd::Error) -> anyhow::Error {
        let missing = error.io_kind() == Some(ErrorKind::NotFound) && self.size.is_none();
        match layer_name::suggest(&self.path).filter(|_| missing) {
            Some(word) => {
                let message = format!("{error}; if the end is a size, write {word}");
                Failure::error(exit::DEVICE, message)
            }
            None => error.into(),
        }
    }

    /// Opens the layer.
    fn open_layer(&self) -> Result<LayerReader> {
        Ok(LayerReader::from_file(self.open()?)?)
    }

    /// Returns whether it is a block device.
    pub(crate) fn is_device(&self) -> bool {
        std::fs::metadata(&self.path).is_ok_and(|meta| meta.file_type().is_block_device())
    }
}

/// Returns the layers that are named, lowest first. A `config.v1.json` is replaced by the layers that it
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

/// Opens layers, lowest first, to read their data. Returns an error if someone may write to them.
pub(crate) fn open_layers(args: &[LayerArg], in_use: &InUseArgs) -> Result<Vec<LayerReader>> {
    let layers = open_any(args)?;
    // Checked after opening, so that a layer that is missing or is no layer is reported as such.
    in_use.check(paths(&[args]))?;
    Ok(layers)
}

fn open_any(args: &[LayerArg]) -> Result<Vec<LayerReader>> {
    // Checked before hundreds of files are opened.
    if args.len() > MAX_LAYERS {
        let fault = format::Error::new(Fault::LsmtLayerCount, 0, to_u64(args.len()));
        return Err(overlaybd::Error::from(fault).into());
    }
    args.iter().map(LayerArg::open_layer).collect()
}

/// Opens one layer as [`open_layers`] does.
pub(crate) fn open_layer(arg: &LayerArg, in_use: &InUseArgs) -> Result<LayerReader> {
    let layer = arg.open_layer()?;
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

/// Opens all layers of a stack as [`open_stack`] does, for a table. Doesn't check who may write to them;
/// `open` does.
pub(crate) fn plan_stack(args: &[LayerArg], chain: &ChainArgs) -> Result<Stack> {
    let layers = open_any(args)?;
    chain.check(&layers, Part::Whole)?;
    Ok(Stack::new(layers)?)
}

/// Prints warnings.
pub(crate) fn warn(warnings: &[String]) {
    for warning in warnings {
        crate::tell(&format!("warning: {warning}"));
    }
}
