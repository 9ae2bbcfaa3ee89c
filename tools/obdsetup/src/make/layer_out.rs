// SPDX-License-Identifier: GPL-2.0

//! Writes a new layer to its file.

use std::fmt::Display;
use std::path::Path;

use anyhow::Result;
use overlaybd::dax::{self, Misfit, Misfits};
use overlaybd::format::SECTOR_SIZE;
use overlaybd::identity::{self, Below, Pieces};
use overlaybd::layer::Ident;
use overlaybd::lsmt_writer::{LayerWriter, Run};
use overlaybd::wrap::{self, Wrapping};
use overlaybd::zfile_writer::Sink;
use overlaybd::LayerReader;

use crate::make::layer_args::NewLayerArgs;
use crate::make::output::Output;
use crate::terminal::bar::Bar;
use crate::terminal::exit::Failure;
use crate::terminal::interrupt;

/// What a layer is made of, to be named in errors.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// A disk image.
    Image(&'a Path),
    /// Layers, lowest first.
    Layers(&'a [LayerReader]),
    /// Files, of which obdsetup has made the disk.
    Files,
}

/// The file of a new layer.
pub(crate) struct LayerOut {
    output: Output,
    wrapping: Wrapping,
    /// Whether the layer is for DAX.
    dax: bool,
}

impl LayerOut {
    /// Begins the file `path`, which must not be one of `inputs`.
    pub(crate) fn create<'a>(
        path: &Path,
        args: &NewLayerArgs,
        inputs: impl IntoIterator<Item = &'a Path>,
    ) -> Result<Self> {
        Ok(Self {
            wrapping: args.wrap.wrapping()?,
            dax: args.wrap.dax,
            output: Output::create(path, args.force, inputs)?,
        })
    }

    /// Begins the new file `path` with this wrapping. An error if the file exists.
    pub(crate) fn with(path: &Path, wrapping: Wrapping) -> Result<Self> {
        Ok(Self {
            wrapping,
            dax: false,
            output: Output::create(path, false, [])?,
        })
    }

    /// Returns `writer`, changed to write a layer for DAX. Returns an error that names the image or layer in `from` if
    /// file systems could not map the layer.
    fn for_dax(&self, writer: LayerWriter, from: Source<'_>) -> Result<LayerWriter> {
        let [page, ..] = dax::PAGE_SIZES;
        let found = dax::disk_misfits(writer.entries(), writer.virtual_size(), page);
        let Some(misfits) = found.first() else {
            return Ok(writer.with_data_at(dax::DATA_START)?);
        };
        let text = |path: &Path, what: &dyn Display| format!("{}: {what}", path.display());
        let of_layer = match (from, misfits.first) {
            (Source::Layers(layers), Misfit::Size(size)) => {
                let mut layers = layers.iter();
                let layer = layers.rfind(|layer| layer.lsmt().virtual_size() == size);
                layer.map(|layer| text(&layer.path(), &misfits.first))
            }
            (Source::Layers(layers), Misfit::Alignment(segment)) => {
                // A segment of the new layer begins and ends where segments of the layers do, and no layer above these
                // hides that. So the topmost layer counts.
                let is_odd = |sector: u64| sector * SECTOR_SIZE % page != 0;
                let odd = Some(segment.offset()).filter(|&start| is_odd(start));
                let odd = odd.unwrap_or(segment.end());
                layers.iter().rev().find_map(|layer| {
                    let mut segments = layer.segments().iter();
                    let own = segments.find(|own| own.offset() == odd || own.end() == odd)?;
                    let first = Misfit::Alignment(*own);
                    Some(text(&layer.path(), &Misfits { first, ..*misfits }))
                })
            }
            (Source::Layers(_), _) => None,
            (Source::Image(image), _) => Some(text(image, misfits)),
            (Source::Files, _) => None,
        };
        let message = of_layer.unwrap_or_else(|| text(self.path(), misfits));
        Err(Failure::usage(message))
    }

    /// Returns the final path of the file.
    pub(crate) fn path(&self) -> &Path {
        self.output.path()
    }

    /// Writes the layer that `writer` has planned, and completes the file. `what` names the work in the progress
    /// bar. `from` is what the layer is made of. `read` fills a buffer with the bytes of the disk from an offset on.
    pub(crate) fn write(
        self,
        mut writer: LayerWriter,
        what: &'static str,
        from: Source<'_>,
        read: impl FnMut(u64, &mut [u8]) -> overlaybd::Result<()>,
    ) -> Result<()> {
        if self.dax {
            writer = self.for_dax(writer, from)?;
        }
        let bar = Bar::new(what, writer.data_len());
        self.wrap(|sink| writer.write(read, sink, &|bytes| bar.advance(bytes)))
    }

    /// Writes the LSMT file whose bytes `produce` passes to its sink, with the wrapping, and completes the file.
    pub(crate) fn wrap(
        mut self,
        produce: impl FnOnce(Sink<'_>) -> overlaybd::Result<()>,
    ) -> Result<()> {
        let path = self.output.path().to_owned();
        let here = |error: overlaybd::Error| error.in_file(&path);
        wrap::write(
            self.output.file(),
            self.wrapping,
            &interrupt::check,
            |sink| {
                // Errors of the sink get the path of this file. Other errors of `produce` are about an
                // input.
                produce(&mut |bytes| sink(bytes).map_err(here))
            },
        )
        .map_err(here)?;
        self.output.commit()
    }
}

/// Plans the layer of `runs` for the file `path`. `way_out` is the advice at the end of the message that the layer
/// would have too many segments.
///
/// # Errors
///
/// As [`LayerWriter::new`], with `path`.
pub(crate) fn plan(
    path: &Path,
    virtual_size: u64,
    ident: Ident,
    runs: impl IntoIterator<Item = Run>,
    way_out: &str,
) -> Result<LayerWriter> {
    LayerWriter::new(virtual_size, ident, runs).map_err(|error| match error {
        overlaybd::Error::TooFragmented { .. } => {
            Failure::usage(format!("{}: {error}: {way_out}", path.display()))
        }
        error => {
            anyhow::Error::from(error).context(format!("{}: cannot make the layer", path.display()))
        }
    })
}

/// Returns the UUID that a layer of `runs` gets from its content. The runs must be ascending, and adjacent ones
/// joined. `read` fills a buffer with the bytes of the disk from an offset on.
pub(crate) fn derive(
    virtual_size: u64,
    below: Below<'_>,
    runs: &[Run],
    read: impl Fn(u64, &mut [u8]) -> overlaybd::Result<()> + Sync,
) -> Result<String> {
    let sectors: u64 = runs
        .iter()
        .filter(|run| !run.zeroed)
        .map(|run| run.length)
        .sum();
    let bar = Bar::new("hashing", sectors * SECTOR_SIZE);
    let pieces = Pieces::of(runs, read, &|bytes| bar.advance(bytes))?;
    Ok(identity::uuid(virtual_size, below, runs, &pieces))
}
