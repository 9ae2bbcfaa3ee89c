// SPDX-License-Identifier: GPL-2.0

//! `obdsetup dump`.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use overlaybd::format::num::{to_u64, to_usize};
use overlaybd::format::Blob;
use overlaybd::{Error, Payload};
use rustix::fs::OFlags;

use crate::bar::Bar;
use crate::exit::Failure;
use crate::layers::{open_stack, LayerArg};
use crate::output::Output;
use crate::size;

/// Bytes that are read at once.
const PIECE: u64 = 1 << 20;
/// Bytes of zeros that become a hole.
const HOLE: usize = 4096;

/// Arguments of `dump`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup dump base.obd app.obd -o disk.raw --sparse
  obdsetup dump layer.obd --offset 1m --length 4k | xxd
  obdsetup dump --zfile compressed.zf -o original

Reads as the kernel would, but needs no kernel module. Every block that is read is checked.")]
pub(crate) struct Args {
    /// Layers, lowest first, or DEVICE:BYTES
    #[arg(required = true, value_name = "LAYER")]
    layers: Vec<LayerArg>,

    /// Where to write; `-` is standard output
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    output: PathBuf,

    /// First byte
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    offset: u64,

    /// How many bytes; up to the end if not given
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    length: Option<u64>,

    /// Leave holes where there are zeros
    #[arg(long)]
    sparse: bool,

    /// The content of a ZFile, whatever it is
    #[arg(long)]
    zfile: bool,

    /// Up to the end of the last sector, as the block device has it
    #[arg(long)]
    whole_sectors: bool,

    /// Replace a file that exists
    #[arg(short, long)]
    force: bool,
}

/// Something to be dumped.
trait Source {
    fn read(&self, offset: u64, buf: &mut [u8]) -> overlaybd::Result<()>;
    /// First byte at or behind `offset` that may not be zero.
    fn next_data(&self, offset: u64, end: u64) -> Option<u64>;
}

impl Source for overlaybd::Stack {
    fn read(&self, offset: u64, buf: &mut [u8]) -> overlaybd::Result<()> {
        self.read_at(offset, buf)
    }

    fn next_data(&self, offset: u64, end: u64) -> Option<u64> {
        overlaybd::Stack::next_data(self, offset, end)
    }
}

/// The content of a ZFile; behind its end, zeros up to a whole sector.
struct Content(Payload);

impl Source for Content {
    fn read(&self, offset: u64, buf: &mut [u8]) -> overlaybd::Result<()> {
        let inside = self.0.size().saturating_sub(offset).min(to_u64(buf.len()));
        let (data, tail) = buf.split_at_mut(to_usize(inside));
        tail.fill(0);
        self.0.read_at(offset, data)
    }

    fn next_data(&self, offset: u64, end: u64) -> Option<u64> {
        Some(offset).filter(|&offset| offset < end)
    }
}

/// Runs `dump`.
pub(crate) fn run(args: &Args) -> Result<()> {
    let (source, size): (Box<dyn Source>, u64) = if args.zfile {
        let [layer] = args.layers.as_slice() else {
            return Err(Failure::usage("--zfile takes one file"));
        };
        let payload = Payload::open(Arc::new(layer.open()?))?;
        if payload.zfile().is_none() {
            return Err(Failure::error(
                crate::exit::BAD_IMAGE,
                format!("{layer}: not a ZFile"),
            ));
        }
        let size = payload.size();
        (Box::new(Content(payload)), size)
    } else {
        let stack = open_stack(&args.layers)?;
        let size = stack.virtual_size();
        (Box::new(stack), size)
    };
    let size = if args.whole_sectors {
        size.next_multiple_of(512)
    } else {
        size
    };
    let length = args.length.unwrap_or(size.saturating_sub(args.offset));
    let end = args.offset.checked_add(length).filter(|&end| end <= size);
    let end = end.ok_or_else(|| {
        Failure::usage(format!(
            "--offset {} and --length {length} reach behind the end at {size}",
            args.offset
        ))
    })?;

    let write = |out: &mut dyn Out, sparse| copy(source.as_ref(), args.offset, end, out, sparse);
    if args.output.as_os_str() == "-" {
        let mut out = Stream(io::stdout().lock());
        write(&mut out, false)?;
        // At the end of the process nobody would hear of an error.
        return Ok(out.0.flush()?);
    }
    if let Some(mut file) = open_device(args)? {
        // There, a hole would show what was there before.
        write(&mut file, false)?;
        let synced = file.sync_all().or_else(|error| match error.kind() {
            // What is no disk has nothing to write back.
            io::ErrorKind::InvalidInput => Ok(()),
            _ => Err(error),
        });
        return synced.with_context(|| args.output.display().to_string());
    }
    let mut output = Output::create(
        &args.output,
        args.force,
        args.layers.iter().map(|layer| layer.path.as_path()),
    )?;
    write(output.file(), args.sparse)?;
    output.file().set_len(length)?;
    output.commit()
}

/// Opens the output where it is a device, which can't be complete or absent as a file is: a disk
/// must be meant to be overwritten, in use by nobody, and none of the layers.
fn open_device(args: &Args) -> Result<Option<File>> {
    let context = || args.output.display().to_string();
    let Ok(meta) = std::fs::metadata(&args.output) else {
        return Ok(None);
    };
    let is_disk = meta.file_type().is_block_device();
    if !is_disk && !meta.file_type().is_char_device() {
        return Ok(None);
    }
    let mut options = File::options();
    options.write(true);
    if is_disk {
        if !args.force {
            return Err(Failure::usage(format!(
                "{}: a disk is overwritten with --force only",
                args.output.display()
            )));
        }
        options.custom_flags(OFlags::EXCL.bits() as i32);
    }
    let file = options.open(&args.output).with_context(context)?;
    let opened = file.metadata().with_context(context)?;
    for layer in &args.layers {
        let input = std::fs::metadata(&layer.path).with_context(|| layer.to_string())?;
        if input.file_type().is_block_device() && input.rdev() == opened.rdev() {
            return Err(Failure::usage(format!("{layer}: is the output as well")));
        }
    }
    Ok(Some(file))
}

/// Where a dump goes.
trait Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Leaves `len` bytes as zeros.
    fn skip(&mut self, len: u64) -> io::Result<()>;
}

impl Out for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn skip(&mut self, len: u64) -> io::Result<()> {
        let by = i64::try_from(len).map_err(|_| io::ErrorKind::FileTooLarge)?;
        self.seek(SeekFrom::Current(by)).map(|_| ())
    }
}

/// What cannot seek.
struct Stream<W>(W);

impl<W: Write> Out for Stream<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn skip(&mut self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

fn copy(source: &dyn Source, start: u64, end: u64, out: &mut dyn Out, sparse: bool) -> Result<()> {
    let wrote = |result: io::Result<()>| {
        result.map_err(|source| Error::Io {
            what: "write",
            source,
        })
    };
    let bar = Bar::new("reading", end - start);
    let mut buffer = vec![0; to_usize(PIECE)];
    let mut at = start;
    while at < end {
        if sparse {
            let next = source.next_data(at, end).unwrap_or(end);
            if next > at {
                wrote(out.skip(next - at))?;
                bar.advance(next - at)?;
                at = next;
                continue;
            }
        }
        let take = (end - at).min(PIECE);
        let piece = buffer.get_mut(..to_usize(take)).unwrap_or_default();
        source.read(at, piece)?;
        if sparse {
            for chunk in piece.chunks(HOLE) {
                wrote(match chunk.iter().all(|&byte| byte == 0) {
                    true => out.skip(to_u64(chunk.len())),
                    false => out.write(chunk),
                })?;
            }
        } else {
            wrote(out.write(piece))?;
        }
        bar.advance(take)?;
        at += take;
    }
    Ok(())
}
