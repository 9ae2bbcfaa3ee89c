// SPDX-License-Identifier: GPL-2.0

//! Makes a layer from a disk image, or from a file system that is made meanwhile.

use std::path::Path;

use anyhow::Result;
use overlaybd::diff::Image;
use overlaybd::format::lsmt;
use overlaybd::format::num::{to_u64, to_usize};
use overlaybd::format::{Blob, SECTOR_SIZE};
use overlaybd::identity::{self, Below};
use overlaybd::lsmt_writer::{cut, Run};
use overlaybd::{coarsen, dax, diff, FileBlob, LayerReader, Stack};

use crate::make::layer_args::{IdentArgs, NewLayerArgs};
use crate::make::layer_out::{plan, LayerOut, Source};
use crate::make::mkfs::erofs::Fresh;
use crate::terminal::bar::Bar;
use crate::terminal::exit::Failure;
use crate::terminal::size;
use crate::terminal::warn;

/// If a layer for DAX has so many bytes of zeros, and they are more than half of its data, a warning says so.
const ZEROS: u64 = 16 << 20;

/// How an image is compared.
#[derive(clap::Args, Debug, Default, PartialEq, Eq)]
pub(crate) struct CompareArgs {
    /// Unit in which the image is compared with the layers below, and in which zeros are left out:
    /// a power of two from 512 to 1m (4k if not given; larger if the index of the layer would
    /// become too large)
    #[arg(long, value_name = "SIZE", value_parser = granule)]
    granularity: Option<u64>,
}

impl CompareArgs {
    /// Returns the options for the comparison. `skip_zeros` says whether to leave zeros out of a lowest layer; a
    /// layer for DAX keeps them.
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

/// Writes the layer for the image at `path` over the layers `base`, lowest first. `from` is what errors about the disk
/// are to name, since the image may be a temporary file.
pub(crate) fn write(
    path: &Path,
    base: Vec<LayerReader>,
    options: diff::Options,
    names: &IdentArgs,
    from: Source<'_>,
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
    write_image(&image, base.as_ref(), options, names, from, output)
}

/// Writes the layer for `image` over the disk `base`. `from` is as for [`write`].
pub(crate) fn write_image(
    image: &dyn Image,
    base: Option<&Stack>,
    options: diff::Options,
    names: &IdentArgs,
    from: Source<'_>,
    output: LayerOut,
) -> Result<()> {
    let diff = coarse_enough(options, output.path(), |options| {
        let bar = Bar::new("comparing", image.size());
        let progress = |bytes| bar.advance(bytes);
        let diff = diff::of(image, base, options, &progress)
            .map_err(|error| error.in_file(image.path()))?;
        Ok((diff.runs, (diff.pieces, diff.zeros)))
    })?;
    let (runs, (pieces, zeros)) = diff;
    warn(stored_zeros(&runs, zeros, image, from).as_slice());
    let top = base.and_then(|base| base.layers().last());
    let below = top.map_or(Below::Nothing, |top| Below::of(&top.ident().uuid));
    let ident = names.ident(below, |below| {
        Ok(identity::uuid(image.size(), below, &runs, &pieces))
    })?;
    let runs = cut(runs, options.keep_zeros);
    let writer = plan(output.path(), image.size(), ident, runs, SCATTERED)?;
    let read = |offset: u64, buf: &mut [u8]| {
        // If the image ends within a sector, zeros fill up this sector.
        let inside = image.size().saturating_sub(offset).min(to_u64(buf.len()));
        let (data, tail) = buf.split_at_mut(to_usize(inside));
        tail.fill(0);
        image
            .read_at(offset, data)
            .map_err(|error| error.in_file(image.path()))
    };
    output.write(writer, "writing", from, read)
}

/// Returns a warning if most of the data of a layer for DAX is zeros, where the disk below reads as zeros, too: the
/// image may have lost its holes. `runs` is what the layer has, and `zeros` is how many bytes of it are such zeros. Not
/// for a device, which has no holes, nor for a store of changes or a thin volume,
/// which has only what was written.
fn stored_zeros(runs: &[Run], zeros: u64, image: &dyn Image, from: Source<'_>) -> Option<String> {
    let path = match from {
        Source::Image(path) if path.is_file() && !image.shows_below() => path,
        _ => return None,
    };
    let runs = runs.iter().filter(|run| !run.zeroed);
    let data: u64 = runs.map(|run| run.length * SECTOR_SIZE).sum();
    (zeros >= ZEROS && zeros > data / 2).then(|| {
        format!(
            "{}: {} of the layer's {} of data are zeros for which the image has no hole, and --dax stores these: if \
             they are free blocks of a file system, mount it through a loop device and run fstrim(8), which makes \
             holes of them",
            path.display(),
            size::show(zeros),
            size::show(data)
        )
    })
}

/// Writes the layer for the new file system `fresh`.
pub(crate) fn write_fresh(
    fresh: &Fresh,
    options: diff::Options,
    names: &IdentArgs,
    output: LayerOut,
) -> Result<()> {
    let find = |options| Ok((fresh.runs(options)?, ()));
    let (runs, ()) = coarse_enough(options, output.path(), find)?;
    write_runs(fresh, runs, options, names, output)
}

/// Writes the layer that has `runs` of the new file system `fresh`.
fn write_runs(
    fresh: &Fresh,
    runs: Vec<Run>,
    options: diff::Options,
    names: &IdentArgs,
    output: LayerOut,
) -> Result<()> {
    let ident = names.ident(Below::Nothing, |below| {
        let content = fresh.content()?;
        Ok(identity::uuid_of_files(
            fresh.size(),
            below,
            &runs,
            &content,
        ))
    })?;
    let runs = cut(runs, options.keep_zeros);
    let writer = plan(output.path(), fresh.size(), ident, runs, SCATTERED)?;
    let end = writer.end();
    let mut reader = fresh.reader();
    // The library's errors cannot hold those of the reader.
    let mut failed = None;
    let read = |at: u64, buf: &mut [u8]| {
        let mut done = reader.read(at, buf);
        if at + to_u64(buf.len()) == end {
            done = done.and_then(|()| reader.finish());
        }
        done.map_err(|error| {
            failed = Some(error);
            overlaybd::Error::Interrupted
        })
    };
    let written = output.write(writer, "writing", Source::Files, read);
    match failed {
        Some(error) => Err(error),
        None => written,
    }
}

/// What to do if no unit of a comparison is large enough.
const SCATTERED: &str =
    "its data is too scattered, even in units of 1m: make the disk smaller, or bring its data \
                         together, with e4defrag(8) or by copying the files to a new file system";

/// Calls `find` with larger and larger units until the index of the layer `path` can hold the runs that it returns.
fn coarse_enough<T>(
    mut options: diff::Options,
    path: &Path,
    mut find: impl FnMut(diff::Options) -> Result<(Vec<Run>, T)>,
) -> Result<(Vec<Run>, T)> {
    loop {
        let found = find(options)?;
        match coarsen::granule(&found.0, options.granule, lsmt::MAX_ENTRIES) {
            Some(granule) if granule > options.granule => {
                warn(&[format!(
                    "{}: compared in units of {}: in units of {}, the layer would have more than \
                     {} index entries",
                    path.display(),
                    size::show(granule),
                    size::show(options.granule),
                    lsmt::MAX_ENTRIES
                )]);
                options.granule = granule;
            }
            // The units are large enough. If no unit is, the caller's plan of the layer is an error.
            _ => return Ok(found),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::path::Path;

    use clap::Parser;
    use overlaybd::format::num::to_u64;
    use overlaybd::LayerReader;

    use super::*;
    use crate::make::layer_args::NewLayerArgs;
    use crate::make::mkfs::{self, FileSystem, Files, New};
    use crate::tars::{member, tar};

    /// A disk with data in every second sector: more segments than an index can have. Its holes may read like the
    /// layers below.
    struct Comb {
        shows_below: bool,
    }

    const COMB: Comb = Comb { shows_below: false };

    const SECTORS: u64 = 2 * lsmt::MAX_ENTRIES + 4096;

    impl Blob for Comb {
        type Error = overlaybd::Error;

        fn size(&self) -> u64 {
            SECTORS * 512
        }

        fn read_at(&self, offset: u64, buf: &mut [u8]) -> overlaybd::Result<()> {
            for (nth, sector) in (offset / 512..).zip(buf.chunks_mut(512)) {
                sector.fill(u8::from(nth % 2 == 0));
            }
            Ok(())
        }

        fn stream(
            &self,
            offset: u64,
            len: u64,
            sink: &mut dyn FnMut(&[u8]) -> overlaybd::Result<()>,
        ) -> overlaybd::Result<()> {
            let mut piece = vec![0; to_usize(len)];
            self.read_at(offset, &mut piece)?;
            sink(&piece)
        }
    }

    impl Image for Comb {
        fn next_data(&self, offset: u64) -> Option<Range<u64>> {
            (offset < self.size()).then(|| offset..self.size())
        }

        fn shows_below(&self) -> bool {
            self.shows_below
        }

        fn path(&self) -> &Path {
            Path::new("comb")
        }
    }

    #[derive(Parser)]
    struct Words {
        #[command(flatten)]
        new: NewLayerArgs,
    }

    #[test]
    fn more_pieces_than_an_index_has_entries() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let new = Words::try_parse_from(["x"])?.new;
        let fine = diff::Options {
            granule: 512,
            skip_zeros: true,
            keep_zeros: false,
        };
        let path = dir.path().join("a");
        let output = LayerOut::create(&path, &new, [])?;
        write_image(&COMB, None, fine, &new.ident, Source::Files, output)?;
        let layer = LayerReader::open(&path, None)?;
        assert_eq!(layer.lsmt().virtual_size(), SECTORS * 512);
        // With units of two sectors, everything is data.
        assert!(to_u64(layer.segments().len()) < 200);
        let disk = Stack::new(vec![layer])?;
        let mut end = [0; 4096];
        disk.read_at(SECTORS * 512 - 4096, &mut end)?;
        let mut wanted = [7; 4096];
        COMB.read_at(0, &mut wanted)?;
        assert_eq!(end, wanted);
        Ok(())
    }

    #[test]
    fn files_that_may_have_lost_their_holes() -> Result<()> {
        let file = tempfile::NamedTempFile::new()?;
        let runs = [Run {
            offset: 0,
            length: 48 << 11,
            zeroed: false,
        }];
        let warns = |zeros, image: &Comb, path: &Path| {
            stored_zeros(&runs, zeros, image, Source::Image(path)).is_some()
        };
        assert!(warns(25 << 20, &COMB, file.path()));
        assert!(!warns(24 << 20, &COMB, file.path()));
        // A device, and a store of changes.
        assert!(!warns(25 << 20, &COMB, Path::new("/dev/null")));
        let store = Comb { shows_below: true };
        assert!(!warns(25 << 20, &store, file.path()));
        assert!(stored_zeros(&runs, 25 << 20, &COMB, Source::Files).is_none());
        Ok(())
    }

    /// The last file of a new erofs ends with zeros, which are not read for the layer: it is compared with the first
    /// reading nevertheless.
    #[test]
    fn a_last_file_that_changes() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let place = dir.path().canonicalize()?;
        let path = place.join("tar");
        let mut content = vec![7; 8192 + 500];
        content.resize(3 * 4096, 0);
        let bytes = tar(&[member("file", b'0', &content)]);
        let mut changed = bytes.clone();
        changed[512] = 8;
        let new = Words::try_parse_from(["x"])?.new;
        let fine = diff::Options {
            granule: 512,
            skip_zeros: true,
            keep_zeros: false,
        };
        let options = mkfs::Options {
            fs: FileSystem::Erofs,
            size: None,
            args: &[],
            allow_loss: false,
            keep_whiteouts: false,
            dax: false,
        };
        let layer = place.join("layer");
        // Changed before the comparison, which reads the files to leave out zeros; or after it.
        for early in [true, false] {
            std::fs::write(&path, &bytes)?;
            let made = mkfs::make(Files::Tar(&path), &options, &place)?;
            let New::Erofs(fresh) = made else {
                anyhow::bail!("a file system in a file");
            };
            let output = LayerOut::create(&layer, &new, [])?;
            let done = match early {
                true => {
                    std::fs::write(&path, &changed)?;
                    write_fresh(&fresh, fine, &new.ident, output)
                }
                false => {
                    let runs = fresh.runs(fine)?;
                    let end = runs.last().map(Run::end).unwrap_or_default();
                    assert_eq!(fresh.size() / SECTOR_SIZE - end, 7);
                    std::fs::write(&path, &changed)?;
                    write_runs(&fresh, runs, fine, &new.ident, output)
                }
            };
            let said = done.err().map(|error| error.to_string());
            let text = "was changed while it was read: try again when nobody changes it";
            assert_eq!(said, Some(format!("{}: {text}", path.display())));
            let mut names = Vec::new();
            for entry in std::fs::read_dir(&place)? {
                names.push(entry?.file_name());
            }
            assert_eq!(names, ["tar"], "{early}");
        }
        // Unchanged, it is a layer.
        std::fs::write(&path, &bytes)?;
        let output = LayerOut::create(&layer, &new, [])?;
        mkfs::make(Files::Tar(&path), &options, &place)?.write(fine, &new.ident, output)?;
        LayerReader::open(&layer, None)?;
        Ok(())
    }

    #[test]
    fn where_nothing_is_coarse_enough() -> Result<()> {
        let pieces = (0..=lsmt::MAX_ENTRIES).map(|nth| overlaybd::lsmt_writer::Run {
            offset: nth * 4096,
            length: 8,
            zeroed: false,
        });
        let ident = Words::try_parse_from(["x"])?
            .new
            .ident
            .ident(Below::Nothing, |_| Ok(String::new()))?;
        let size = (lsmt::MAX_ENTRIES + 1) * 4096 * 512;
        let error = plan(Path::new("out"), size, ident, pieces, "do without").err();
        let error = error.map(|error| error.to_string()).unwrap_or_default();
        assert!(error.starts_with("out: the layer would have 10"), "{error}");
        assert!(error.ends_with("more than 1000000: do without"), "{error}");
        Ok(())
    }
}
