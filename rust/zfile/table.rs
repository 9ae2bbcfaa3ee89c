// SPDX-License-Identifier: GPL-2.0

//! The table line of a `zfile` target, and its status.

use kernel::prelude::*;
use kernel::sync::atomic::Relaxed;

use super::cache::Cache;
use super::{io, Mode, Modes, Shared, Stats, Zfile};
use crate::block::{memory, quota, Pool};
use crate::codec::crc32c;
use crate::compat;
use crate::dm::{self, Args, Bio, Deferred, Device, Emit, Failure, Limits, Mapped, Setup};
use crate::format::num::to_usize;
use crate::format::zfile::{Geometry, JumpTable};
use crate::format::{merge, tar, Blob, Error as FormatError, Fault, Window};

/// Largest value of `cache_blocks`.
const MAX_CACHE_BLOCKS: u64 = 1 << 24;

/// The optional parameters of a table line.
#[derive(Default)]
struct Options {
    cache_blocks: Option<usize>,
    mode: Mode,
    panic_on_corruption: bool,
}

impl dm::Target for Zfile {
    type Context = Shared;

    const VERSION: [u32; 3] = [1, 1, 0];
    const NOWAIT: bool = true;
    const ALERT: &'static CStr = c"DM_ZFILE_CORRUPT_BLOCK";
    const PER_BIO_DATA: usize = dm::frame_size::<Self>();
    const MESSAGE: Option<dm::Message<Self>> = Some(Zfile::handle_message);

    fn new(setup: &mut Setup<'_, Shared>, mut args: Args<'_>) -> Result<Self, Failure> {
        setup.require_read_only()?;
        let path = args.required(c"Missing device")?;
        let blob_bytes = dm::blob_bytes(&mut args)?;
        let options = parse_options(&mut args)?;

        let device = setup.open(path)?;
        let blob = dm::MetaReader::new(setup.device(device)?, blob_bytes)?;
        let payload = tar::payload(&blob)?.unwrap_or(tar::Payload {
            start: 0,
            len: blob.size(),
        });
        let file = Window::new(&blob, payload.start, payload.len)?;
        let geometry =
            Geometry::read(&file, crc32c)?.ok_or(FormatError::new(Fault::ZfileMagic, 0, 0))?;
        if setup.len() > merge::sectors(geometry.size()) {
            return Err(Failure::new(c"Device is larger than its image", EINVAL));
        }

        let shape = geometry.table_shape();
        let mut bases: KVVec<_> = compat::zeroed(shape.bases, memory::LARGE)?;
        let mut deltas: KVVec<_> = compat::zeroed(shape.deltas, memory::LARGE)?;
        geometry.read_index(&file, crc32c, &mut bases, &mut deltas)?;

        let device_block = u64::from(setup.device(device)?.logical_block_size());
        setup.set_used(device, payload.start + payload.len);
        let contexts = setup.context().contexts(geometry.algorithm())?;
        let shared = setup.context();
        let part = match options.cache_blocks {
            Some(0) => None,
            _ => Some(Cache::part(&shared.cache, geometry.blocks())?),
        };
        Ok(Self {
            contexts,
            shared,
            part,
            modes: Modes::new(options.mode),
            cache_blocks: options.cache_blocks,
            panic_on_corruption: options.panic_on_corruption,
            geometry,
            table: JumpTable::new(&geometry, bases, deltas),
            start: payload.start,
            device_block,
            blob_bytes,
            spares: dm::Spares::new(io::spare_len(&geometry, device_block))?,
            stats: Stats::new()?,
        })
    }

    fn map<'a>(&self, bio: Bio<'a, Self>) -> Mapped<'a> {
        self.map_read(bio)
    }

    fn info(&self, out: &mut Emit<'_>) {
        let (geometry, stats) = (&self.geometry, &self.stats);
        let corrupt = stats.corrupt.load(Relaxed);
        let state = if corrupt == 0 { 'V' } else { 'C' };
        out.put(fmt!(
            "{} {} {} {} {} {} {} {} {} {} {} {} {} {} {}",
            state,
            geometry.algorithm().name(),
            geometry.block_size(),
            geometry.blocks(),
            self.table.memory(),
            stats.reads.sum(),
            stats.read_bytes.sum(),
            stats.blocks.sum(),
            stats.read_errors.load(Relaxed),
            corrupt,
            self.part.as_ref().map_or(0, |part| part.len()),
            stats.cache_hits.sum(),
            self.modes.get().word(),
            quota::used(),
            quota::limit(),
        ));
    }

    fn table(&self, devices: &[Device], out: &mut Emit<'_>) {
        if let Some(device) = devices.first() {
            dm::put_blob(out, device, self.blob_bytes);
        }
        // Prints the current mode, even if a message has set it, so that a table which is loaded
        // again keeps the mode.
        let mode = self.modes.get();
        let words = 2 * usize::from(self.cache_blocks.is_some())
            + usize::from(mode != Mode::Parts)
            + usize::from(self.panic_on_corruption);
        if words > 0 {
            out.put(fmt!(" {words}"));
        }
        if let Some(blocks) = self.cache_blocks {
            out.put(fmt!(" cache_blocks {blocks}"));
        }
        if mode != Mode::Parts {
            out.put(fmt!(" cache_{}", mode.word()));
        }
        if self.panic_on_corruption {
            out.put(fmt!(" panic_on_corruption"));
        }
    }

    fn ima(&self, devices: &[Device], out: &mut Emit<'_>) {
        if let Some(device) = devices.first() {
            out.put(fmt!(",device={}", device.name()));
        }
        let crc = if self.geometry.has_crc() { 'y' } else { 'n' };
        out.put(fmt!(
            ",algorithm={},block_size={},blocks={},size={},crc={}",
            self.geometry.algorithm().name(),
            self.geometry.block_size(),
            self.geometry.blocks(),
            self.geometry.size(),
            crc,
        ));
    }

    fn limits(&self, limits: &mut Limits<'_>) {
        // For a read of a part of a block, the whole block is decompressed to other memory, so
        // reads may start at any sector.
        limits.set_logical_block_size(512);
        limits.set_preferred(self.geometry.block_size(), io::MAX_REQUEST);
        limits.clear_poll();
    }
}

impl Zfile {
    /// Handles the message `cache all|parts|none|default|auto`. `default` and `auto` restore the
    /// mode of the table line.
    fn handle_message(&self, mut args: Args<'_>) -> Result<(), Failure> {
        let mode = match (args.next(), args.next(), args.next()) {
            (Some(what), Some(word), None) if what == c"cache" => {
                if word == c"default" || word == c"auto" {
                    Some(self.modes.own)
                } else {
                    Mode::from_word(word)
                }
            }
            _ => None,
        };
        let mode = mode.ok_or(Failure::new(c"Unrecognized message", EINVAL))?;
        self.modes.set(mode);
        Ok(())
    }
}

/// Sets the mode that an option of the table line asks for. Fails if another option has set another
/// mode.
fn set_mode(mode: &mut Mode, wanted: Mode) -> Result<(), Failure> {
    if *mode != Mode::Parts && *mode != wanted {
        return Err(Failure::new(
            c"cache_all and cache_none exclude each other",
            EINVAL,
        ));
    }
    *mode = wanted;
    Ok(())
}

/// Parses the optional parameters.
fn parse_options(args: &mut Args<'_>) -> Result<Options, Failure> {
    dm::option_count(args)?;
    let mut options = Options::default();
    while let Some(option) = args.next() {
        if option == c"cache_all" {
            set_mode(&mut options.mode, Mode::All)?;
        } else if option == c"cache_none" {
            set_mode(&mut options.mode, Mode::None)?;
        } else if option == c"panic_on_corruption" {
            options.panic_on_corruption = true;
        } else if option == c"cache_blocks" {
            let blocks = args.next().and_then(dm::number);
            let blocks = blocks.filter(|&blocks| blocks <= MAX_CACHE_BLOCKS);
            let blocks = blocks.ok_or(Failure::new(c"Invalid number of cache blocks", EINVAL))?;
            options.cache_blocks = Some(to_usize(blocks));
        } else {
            return Err(dm::UNKNOWN_OPTION);
        }
    }
    Ok(options)
}

impl Deferred for Zfile {
    type Request = io::Request;

    fn spares(&self) -> &dm::Spares<Self> {
        &self.spares
    }

    fn pool(&self) -> &Pool {
        &self.shared.pool
    }
}
