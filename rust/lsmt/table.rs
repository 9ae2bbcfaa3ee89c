// SPDX-License-Identifier: GPL-2.0

//! The table line and the status of an `lsmt` target.

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};

use super::{Lsmt, Tail};
use crate::block::memory;
use crate::compat;
use crate::dm::{
    self, Args, Bio, Claims, Dax, Device, DeviceId, Emit, Failure, Limits, Mapped, Setup,
    PAGE_SECTORS,
};
use crate::format::dax::{self, Place};
use crate::format::lsmt::{Layer, Segment};
use crate::format::merge::{self, Event, Extent, Index, MAX_LAYERS};
use crate::format::num::{to_u64, to_usize};
use crate::format::{tar, Blob, Error as FormatError, Fault, Window, SECTOR_SIZE};

/// Largest number of bytes that one device takes in the text for IMA.
const IMA_DEVICE: usize = ",device_255=1048575:1048575".len();

/// A layer while the target is constructed.
struct Opened {
    virtual_size: u64,
    segments: KVVec<Segment>,
}

impl core::ops::Deref for Opened {
    type Target = [Segment];

    fn deref(&self) -> &[Segment] {
        &self.segments
    }
}

impl<const DAX: bool> dm::Target for Lsmt<DAX> {
    type Context = Claims;

    const VERSION: [u32; 3] = [1, 1, 0];
    const NOWAIT: bool = true;
    const READ_FAILED: Option<fn(&Self)> = Some(Self::read_failed);
    const ALERT: &'static CStr = c"DM_LSMT_READ_ERROR";
    const DAX: Option<Dax<Self>> = if DAX {
        Some(Dax {
            find: Self::find_memory,
            claims: |context| context,
        })
    } else {
        None
    };

    fn new(setup: &mut Setup<'_, Claims>, mut args: Args<'_>) -> Result<Self, Failure> {
        setup.require_read_only()?;
        let legacy = setup.type_name() == super::LEGACY_NAME;
        let count = if legacy {
            args.len().div_ceil(2)
        } else {
            let count = args.required(c"Missing number of layers")?;
            dm::number(count).map_or(0, |count| count.try_into().unwrap_or(usize::MAX))
        };
        if count == 0 || count > MAX_LAYERS {
            return Err(FormatError::new(Fault::LsmtLayerCount, 0, to_u64(count)).into());
        }

        let mut blob_bytes = KVec::with_capacity(count, GFP_KERNEL)?;
        let mut layers = KVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            let path = args.required(c"Missing device")?;
            let bytes = dm::blob_bytes(&mut args)?;
            let device = setup.open(path)?;
            if DAX {
                setup.require_dax(device)?;
            }
            blob_bytes.push(bytes, GFP_KERNEL)?;
            let layer = open_layer(setup, device, bytes)?;
            if DAX {
                check_overlap(&layer)?;
            }
            layers.push(layer, GFP_KERNEL)?;
        }
        dm::option_count(&mut args)?;
        if args.len() > 0 {
            return Err(dm::UNKNOWN_OPTION);
        }

        let size = merge::virtual_size(layers.iter().map(|layer| layer.virtual_size))?;
        if setup.len() > merge::sectors(size) {
            return Err(Failure::new(c"Device is larger than its image", EINVAL));
        }
        let segments = merge_layers(&layers, setup.len())?;
        check_alignment(setup, &segments, count, size)?;
        if DAX {
            check_pages(setup, &segments, size)?;
        }
        let runs = |len| Ok(compat::zeroed(len, memory::LARGE)?);
        let index = Index::new(segments, runs, pause)?;
        Ok(Self {
            tail: read_tail(setup, &index, size)?,
            index,
            size,
            blob_bytes,
            legacy,
            failed: Atomic::new(0),
        })
    }

    fn map<'a>(&self, bio: Bio<'a, Self>) -> Mapped<'a> {
        self.map_read(bio)
    }

    fn info(&self, out: &mut Emit<'_>) {
        out.put(fmt!(
            "{} {} {} {} {}",
            self.blob_bytes.len(),
            self.index.segments().len(),
            self.size,
            self.index.memory(),
            self.failed.load(Relaxed),
        ));
    }

    fn table(&self, devices: &[Device], out: &mut Emit<'_>) {
        if !self.legacy {
            out.put(fmt!("{} ", self.blob_bytes.len()));
        }
        for (nth, (device, &bytes)) in devices.iter().zip(&self.blob_bytes).enumerate() {
            if nth > 0 {
                out.put(fmt!(" "));
            }
            dm::put_blob(out, device, bytes);
        }
    }

    fn ima(&self, devices: &[Device], out: &mut Emit<'_>) {
        out.put(fmt!(",layers={},size={}", devices.len(), self.size));
        // The topmost layer first: if there isn't room for all layers, the lowest ones are left out.
        for (nth, device) in devices.iter().enumerate().rev() {
            if out.room() < IMA_DEVICE {
                break;
            }
            out.put(fmt!(",device_{nth}={}", device.name()));
        }
    }

    fn limits(&self, _limits: &mut Limits<'_>) {
        // Nothing to do: reads are remapped to the devices unchanged, so the limits of the devices
        // apply.
    }
}

/// Reads a layer's index. In the result, each `moffset` is a sector of the lower device.
fn open_layer(
    setup: &mut Setup<'_, Claims>,
    device: DeviceId,
    bytes: Option<u64>,
) -> Result<Opened, Failure> {
    let blob = dm::MetaReader::new(setup.device(device)?, bytes)?;
    let payload = tar::payload(&blob)?.unwrap_or(tar::Payload {
        start: 0,
        len: blob.size(),
    });
    let file = Window::new(&blob, payload.start, payload.len)?;
    let layer = Layer::read(&file)?;
    let entries = to_usize(layer.entries());
    let mut segments = KVVec::with_capacity(entries, memory::LARGE)?;
    let start = payload.start / SECTOR_SIZE;
    layer.read_index(&file, |segment| {
        let segment = segment
            .shifted(start)
            .ok_or(Failure::new(c"LSMT entry maps outside of the data", EINVAL))?;
        Ok(segments.push(segment, GFP_KERNEL)?)
    })?;
    setup.set_used(device, payload.start + payload.len);
    Ok(Opened {
        virtual_size: layer.virtual_size(),
        segments,
    })
}

/// Lets other tasks run. Returns an error if the current task was killed.
fn pause() -> Result<(), Failure> {
    dm::cond_resched();
    dm::check_killed()
}

/// Merges the layers' segments that are below sector `limit`.
fn merge_layers(layers: &[Opened], limit: u64) -> Result<KVVec<Segment>, Failure> {
    let mut heap = KVec::from_elem(Event::default(), layers.len(), GFP_KERNEL)?;
    let mut cursors = KVec::from_elem(0, layers.len(), GFP_KERNEL)?;
    // The first merge only counts the segments. An array that grows would need up to twice the
    // memory.
    let mut count = 0;
    let mut counter = |_| {
        count += 1;
        Ok(())
    };
    merge::merge(layers, limit, &mut heap, &mut cursors, &mut counter, pause)?;
    let mut merged = KVVec::with_capacity(count, memory::LARGE)?;
    let mut push = |segment| Ok(merged.push(segment, GFP_KERNEL)?);
    merge::merge(layers, limit, &mut heap, &mut cursors, &mut push, pause)?;
    Ok(merged)
}

/// Checks that a read of whole logical blocks of the mapped device is a read of whole logical
/// blocks of the lower device after it is remapped.
fn check_alignment(
    setup: &Setup<'_, Claims>,
    segments: &[Segment],
    layers: usize,
    size: u64,
) -> Result<(), Failure> {
    let mut block = SECTOR_SIZE;
    for nth in 0..layers {
        let id = DeviceId::nth(u8::try_from(nth).map_err(|_| EINVAL)?);
        block = block.max(setup.device(id)?.logical_block_size().into());
    }
    let mask = block / SECTOR_SIZE - 1;
    let mut all = alignment(segments)?;
    // If the disk ends within a sector, reads of that sector are answered from memory. Reads that
    // are remapped end where that sector starts, so its start must be aligned, too.
    let end = size / SECTOR_SIZE;
    if size % SECTOR_SIZE != 0 && setup.len() > end {
        all |= end;
    }
    if all & mask != 0 {
        return Err(Failure::new(
            c"Layers are not aligned to the blocks of their devices",
            EINVAL,
        ));
    }
    Ok(())
}

/// Returns the bitwise or of all offsets, lengths and starts of data, as [`dax::alignment`] does.
/// Calls [`pause`] regularly.
fn alignment(segments: &[Segment]) -> Result<u64, Failure> {
    let mut all = 0;
    for part in segments.chunks(1 << 16) {
        pause()?;
        all |= dax::alignment(part);
    }
    Ok(all)
}

/// Checks that each page of the disk is one page of a layer, or is in a hole.
fn check_pages(setup: &Setup<'_, Claims>, segments: &[Segment], size: u64) -> Result<(), Failure> {
    let mask = PAGE_SECTORS - 1;
    if setup.len() & mask != 0 || size % (PAGE_SECTORS * SECTOR_SIZE) != 0 {
        return Err(Failure::new(c"Disk is not aligned to pages", EINVAL));
    }
    if alignment(segments)? & mask != 0 {
        return Err(Failure::new(c"Layers are not aligned to pages", EINVAL));
    }
    Ok(())
}

/// Checks that no two segments of a layer have data in common. Segments that other layers hide are
/// checked, too: to check only visible ones, a copy of the merged index would have to be sorted.
fn check_overlap(layer: &Opened) -> Result<(), Failure> {
    let mut places = KVVec::with_capacity(layer.segments.len(), memory::LARGE)?;
    for place in layer.segments.iter().filter_map(Place::of) {
        places.push(place, GFP_KERNEL)?;
    }
    match dax::overlap(&mut places, pause)? {
        None => Ok(()),
        Some(_) => Err(Failure::new(
            c"Segments of a layer have the same data",
            EINVAL,
        )),
    }
}

/// Reads the last sector of the disk, if the disk, of `size` bytes, ends within that sector.
fn read_tail(
    setup: &Setup<'_, Claims>,
    index: &Index<KVVec<Segment>, KVVec<u32>>,
    size: u64,
) -> Result<Option<Tail>, Failure> {
    let (sector, inside) = (size / SECTOR_SIZE, size % SECTOR_SIZE);
    if inside == 0 {
        return Ok(None);
    }
    let mut bytes = [0; 512];
    if let Extent::Data {
        layer, sector: at, ..
    } = index.lookup(sector)
    {
        let blob = dm::MetaReader::new(setup.device(DeviceId::nth(layer))?, None)?;
        let (inside, _) = bytes.split_at_mut(inside as usize);
        blob.read_at(at * SECTOR_SIZE, inside)?;
    }
    Ok(Some(Tail { sector, bytes }))
}
