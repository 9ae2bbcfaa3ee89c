// SPDX-License-Identifier: GPL-2.0

//! DAX: file systems map the memory of the devices below a target.
//!
//! The kernel stores the file and the offset of a mapped page in its `struct page`: see
//! `Documentation/dax.rst`. So each page may be at one place of one disk only. Pages may stay
//! mapped until the disk is closed, even if its table is destroyed. The target ensures that its own
//! table has each page only once. A [`Claim`] ensures the same across disks, and across the tables
//! of one disk.
//!
//! # Locks
//!
//! The mutex of [`Claims`] is held over both the search for other claims and the change that
//! depends on its result. It is the innermost lock: the holder takes no other lock, and allocates
//! nothing. It is taken by
//!
//! - constructors, with device-mapper's `type_lock` held, after the devices were opened
//!   (`dm_get_device` takes `table_devices_lock` and releases it),
//! - `preresume`, with device-mapper's `suspend_lock` held,
//! - destructors.
//!
//! References to disks and to the module are put without this mutex held. `map` and `direct_access`
//! don't take it.
//!
//! C headers: `include/linux/dax.h`, `include/linux/device-mapper.h`.

use core::ptr::NonNull;

use kernel::error::to_result;
use kernel::ffi;
use kernel::page::PAGE_SIZE;
use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::{new_mutex, Arc, Mutex};

use super::target::Live;
use super::{Device, DeviceId, DeviceName, Failure, Setup, Target};
use crate::sys;

/// Sectors in a page of memory.
pub(crate) const PAGE_SECTORS: u64 = PAGE_SIZE as u64 / 512;

/// Largest number of pages that one call of `direct_access` looks up: 2 MiB with pages of 4 KiB,
/// which is the largest mapping. The kernel may ask for all pages of a `read()` at once, and sets
/// no limit itself.
const MOST_PAGES: u64 = 512;

/// A contiguous range of the memory of a device.
pub(crate) struct Memory {
    /// The device.
    pub(crate) device: DeviceId,
    /// First sector.
    pub(crate) sector: u64,
    /// Number of sectors.
    pub(crate) sectors: u64,
}

/// Returns the memory of sector `sector` of a target, and of the sectors after it, as far as their
/// memory is contiguous and in the target. Returns `None` if the sector has no memory. The caller
/// uses at most `most` sectors. Must not sleep.
pub(crate) type Find<T> = fn(&T, sector: u64, most: u64) -> Option<Memory>;

/// The DAX functions of a target type.
pub(crate) struct Dax<T: Target> {
    /// Looks up memory.
    pub(crate) find: Find<T>,
    /// Returns the list of the claims of all targets with DAX, from the context that the targets
    /// share.
    pub(crate) claims: fn(Arc<T::Context>) -> Arc<Claims>,
}

/// A reference to the disk of a mapped device. While it exists, the `gendisk` isn't freed, even
/// after the disk was deleted.
///
/// # Invariants
///
/// This object owns the reference to the disk's device.
struct Disk(NonNull<sys::gendisk>);

// SAFETY: A reference to a device may be used and put from any thread.
unsafe impl Send for Disk {}

impl Disk {
    /// Gets the disk of the mapped device for which `setup` makes a target.
    fn of<C>(setup: &Setup<'_, C>) -> Result<Self> {
        let disk = NonNull::new(setup.disk()).ok_or(ENODEV)?;
        // SAFETY: The disk of a mapped device is valid while a constructor runs.
        unsafe { sys::obd_get_disk(disk.as_ptr()) };
        // INVARIANT: The reference was just got.
        Ok(Self(disk))
    }

    /// Returns how often the disk is open. An open that is still in progress may be missing from
    /// the count. Its file can map only pages of the table that is live now, or of a later one.
    fn openers(&self) -> u32 {
        // SAFETY: By the type invariant the disk is valid.
        unsafe { sys::obd_disk_openers(self.0.as_ptr()) }
    }
}

impl PartialEq for Disk {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the reference is ours. A `Disk` is never dropped in atomic
        // context.
        unsafe { sys::obd_put_disk(self.0.as_ptr()) };
    }
}

/// A reference to this module, which keeps it loaded.
///
/// # Invariants
///
/// This object owns the reference.
struct ModuleReference(());

impl ModuleReference {
    /// Gets a reference.
    ///
    /// # Safety
    ///
    /// The caller runs with a reference to the module.
    unsafe fn new() -> Self {
        // SAFETY: The caller's promise.
        unsafe { sys::obd_module_get() };
        // INVARIANT: The reference was just got.
        Self(())
    }
}

impl Drop for ModuleReference {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the reference is ours. It is not the last one: only
        // constructors and `preresume` of targets drop it, and device-mapper has a reference for
        // the target's type then.
        unsafe { sys::obd_module_put() };
    }
}

/// Sectors of a DAX device that a target uses, counted from the start of the whole disk.
///
/// Recorded when the table is made: a partition may be resized while it is open.
#[derive(Clone, Copy)]
struct Range {
    /// Address of the DAX device, only for comparisons. While the table of a claim exists, its DAX
    /// devices do, too. A DAX device of a parked claim may have been freed, and a new DAX device
    /// may have its address. A table with the new one is then refused without need, until the disk
    /// of the claim is closed.
    dax: usize,
    first: u64,
    end: u64,
}

impl Range {
    /// Returns the range of all sectors of `device`.
    fn of(device: &Device) -> Result<Self, Failure> {
        let dax = device.dax().ok_or(NOT_DAX)?;
        let first = device.first_sector();
        let end = first.checked_add(device.sectors()).ok_or(EINVAL)?;
        Ok(Self {
            dax: dax.as_ptr().addr(),
            first,
            end,
        })
    }

    /// Returns whether the two ranges have a sector in common.
    fn overlaps(&self, other: &Self) -> bool {
        self.dax == other.dax && self.first < other.end && other.first < self.end
    }
}

/// The state of a claim.
enum State {
    /// Its table has not been live yet.
    Made,
    /// Its table exists, and pages of it may be mapped.
    Live,
    /// Its table was destroyed, but pages of it may still be mapped.
    Parked {
        // Keeps the module, and so the list of claims, while pages are mapped.
        _module: ModuleReference,
    },
}

/// A claim in the list.
struct Entry {
    id: u64,
    disk: Disk,
    ranges: Arc<KVec<Range>>,
    state: State,
}

impl Entry {
    /// Returns whether pages of the claim's table may be mapped.
    fn may_be_mapped(&self) -> bool {
        !matches!(self.state, State::Made)
    }

    /// Returns whether this claim forbids a new table of `disk` to use `ranges`. Two tables of one
    /// disk may have the same ranges while neither has been live, because [`Claim::begin`] allows
    /// mappings for only one of them.
    fn excludes(&self, disk: &Disk, ranges: &[Range]) -> bool {
        let overlap = |range| self.ranges.iter().any(|other| other.overlaps(range));
        (self.disk != *disk || self.may_be_mapped()) && ranges.iter().any(overlap)
    }
}

/// The list of claims.
struct List {
    entries: KVec<Entry>,
    next: u64,
}

/// The claims of all targets: the sectors of DAX devices that are in tables, or whose pages may be
/// mapped.
#[pin_data]
pub(crate) struct Claims {
    #[pin]
    list: Mutex<List>,
}

impl Claims {
    /// Makes an empty list.
    pub(crate) fn new() -> impl PinInit<Self> {
        let list = List {
            entries: KVec::new(),
            next: 0,
        };
        pin_init!(Self {
            list <- new_mutex!(list),
        })
    }

    /// Moves the entries to memory for at least `count` of them, unless other threads have added so
    /// many meanwhile that they don't fit: then the caller has to try again. Allocates without the
    /// lock, because a resume takes the lock while bios wait.
    fn reserve(&self, count: usize) -> Result<(), Failure> {
        let mut larger = KVec::with_capacity(count, GFP_KERNEL)?;
        let mut list = self.list.lock();
        if list.entries.len() < larger.capacity() {
            for entry in core::mem::take(&mut list.entries) {
                // Doesn't allocate: there is room.
                larger.push(entry, GFP_KERNEL)?;
            }
            list.entries = larger;
        }
        Ok(())
    }

    /// Removes the parked claims of disks that are closed.
    pub(super) fn sweep(&self) {
        loop {
            let closed = {
                let mut list = self.list.lock();
                let closed = |entry: &Entry| {
                    matches!(entry.state, State::Parked { .. }) && entry.disk.openers() == 0
                };
                match list.entries.iter().position(closed) {
                    Some(nth) => list.entries.remove(nth),
                    None => return,
                }
            };
            // Dropped without the lock held: this puts references.
            drop(closed);
        }
    }
}

/// The claim of a target on its lower devices. While it exists, tables with DAX of other mapped
/// devices must not use these devices. If pages may have been mapped, the claim outlives the table,
/// until the disk of the mapped device is closed.
pub(super) struct Claim {
    claims: Arc<Claims>,
    id: u64,
    name: DeviceName,
    /// The range of each lower device. Its index is the number in the device's [`DeviceId`].
    ranges: Arc<KVec<Range>>,
    /// Whether [`Claim::begin`] has allowed mappings.
    begun: Atomic<bool>,
    /// Whether a hole was reported in the log.
    told: Atomic<bool>,
}

impl Claim {
    /// Returns an error if the mapped device has a live table: pages of that table may be mapped.
    ///
    /// # Errors
    ///
    /// [`EBUSY`].
    pub(super) fn require_first_table<C>(setup: &Setup<'_, C>) -> Result<(), Failure> {
        // SAFETY: The disk of a mapped device is valid. Its capacity is above 0 while a table is
        // live, because no table is empty.
        if unsafe { sys::obd_get_capacity(setup.disk()) } != 0 {
            return Err(Failure::new(
                c"Device has a table, which lsmt-dax cannot replace",
                EBUSY,
            ));
        }
        Ok(())
    }

    /// Claims all devices that `setup` has opened.
    ///
    /// # Errors
    ///
    /// [`EBUSY`] if a device is claimed already or was opened twice, [`EINVAL`] if a device has no
    /// DAX, and [`ENOMEM`].
    pub(super) fn new<C>(setup: &Setup<'_, C>, claims: Arc<Claims>) -> Result<Self, Failure> {
        let mut ranges: KVec<Range> = KVec::with_capacity(setup.devices.len(), GFP_KERNEL)?;
        for device in &setup.devices {
            let range = Range::of(device)?;
            if ranges.iter().any(|other| range.overlaps(other)) {
                return Err(CLAIMED);
            }
            ranges.push(range, GFP_KERNEL)?;
        }
        let ranges = Arc::new(ranges, GFP_KERNEL)?;
        let disk = Disk::of(setup)?;
        claims.sweep();
        let id = loop {
            let more = {
                let mut list = claims.list.lock();
                let excludes = |entry: &Entry| entry.excludes(&disk, &ranges);
                if list.entries.iter().any(excludes) {
                    return Err(CLAIMED);
                }
                if list.entries.len() < list.entries.capacity() {
                    let id = list.next;
                    let entry = Entry {
                        id,
                        disk,
                        ranges: ranges.clone(),
                        state: State::Made,
                    };
                    // Doesn't allocate: there is room.
                    list.entries.push(entry, GFP_KERNEL)?;
                    // No overflow: one for each table that is made.
                    list.next = id.wrapping_add(1);
                    break id;
                }
                list.entries.len() + 1
            };
            claims.reserve(more)?;
        };
        Ok(Self {
            claims,
            id,
            name: setup.device_name(),
            ranges,
            begun: Atomic::new(false),
            told: Atomic::new(false),
        })
    }

    /// Allows mappings, unless pages of another table of the mapped device may be mapped. This is
    /// the case if both tables were loaded before either was live, and the other one became live
    /// first. Then bios work, but mappings fail until the mapped device is suspended and resumed
    /// while nobody has it open.
    ///
    /// Called each time before device-mapper resumes the mapped device.
    pub(super) fn begin(&self) {
        if self.has_begun() {
            return;
        }
        self.claims.sweep();
        let begun = {
            let mut list = self.claims.list.lock();
            let entries = &mut list.entries;
            let is_mine = |entry: &Entry| entry.id == self.id;
            let Some(nth) = entries.iter().position(is_mine) else {
                return;
            };
            let before = |mine: &Entry| {
                let other = |other: &Entry| {
                    other.id != mine.id && other.disk == mine.disk && other.may_be_mapped()
                };
                entries.iter().any(other)
            };
            let begun = !entries.get(nth).is_some_and(before);
            if let (true, Some(mine)) = (begun, entries.get_mut(nth)) {
                mine.state = State::Live;
            }
            begun
        };
        if !begun {
            pr_warn!(
                "{}: has no DAX, since it had another DAX table: unmount it, then suspend and resume it\n",
                self.name.as_str()
            );
        }
        self.begun.store(begun, Relaxed);
    }

    /// Returns whether [`Claim::begin`] has allowed mappings.
    fn has_begun(&self) -> bool {
        self.begun.load(Relaxed)
    }

    /// Logs that page `page` is in a hole, once for each target. If several CPUs find a first hole
    /// at the same time, each may log one.
    fn tell_hole(&self, page: u64) {
        if !self.told.load(Relaxed) {
            self.told.store(true, Relaxed);
            pr_warn!(
                "{}: page {page} is in no layer, so it cannot be mapped: was the image made with --dax?\n",
                self.name.as_str()
            );
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let removed = {
            let mut list = self.claims.list.lock();
            let entries = &mut list.entries;
            let is_mine = |entry: &Entry| entry.id == self.id;
            let Some(nth) = entries.iter().position(is_mine) else {
                return;
            };
            match entries.get_mut(nth) {
                Some(mine) if mine.may_be_mapped() && mine.disk.openers() != 0 => {
                    mine.state = State::Parked {
                        // SAFETY: This runs in the destructor of a target, and device-mapper has a
                        // reference to the module for the target's type.
                        _module: unsafe { ModuleReference::new() },
                    };
                    None
                }
                _ => entries.remove(nth).ok(),
            }
        };
        if removed.is_none() {
            pr_warn!(
                "{}: lost its DAX table while it is open: its layers stay claimed until it is closed\n",
                self.name.as_str()
            );
        }
    }
}

/// Looks up page `page` of a mapped device for the `direct_access` function of a target. Stores its
/// address in `kaddr` and its page frame number in `pfn`. Returns the number of contiguous pages
/// that begin with it, at most `pages`.
///
/// # Errors
///
/// [`EIO`] if there is no page, or if pages must not be mapped; errors of the lower device.
///
/// # Safety
///
/// Called by device-mapper for the target `live`, whose table isn't destroyed during the call.
/// `kaddr` and `pfn` are null or valid for a write.
pub(super) unsafe fn direct_access<T: Target>(
    live: &Live<T>,
    page: u64,
    pages: ffi::c_long,
    kaddr: *mut *mut ffi::c_void,
    pfn: *mut ffi::c_ulong,
) -> Result<ffi::c_long> {
    let find = T::DAX.ok_or(EIO)?.find;
    let claim = live.claim().filter(|claim| claim.has_begun()).ok_or(EIO)?;
    // A target with DAX is alone in its table, so it begins at sector 0 of the disk.
    let sector = page.checked_mul(PAGE_SECTORS).ok_or(EIO)?;
    let most = u64::try_from(pages)?.min(MOST_PAGES) * PAGE_SECTORS;
    let Some(memory) = find(live.target(), sector, most) else {
        claim.tell_hole(page);
        return Err(EIO);
    };
    let device = live.device(memory.device).ok_or(EIO)?;
    let range = claim.ranges.get(usize::from(memory.device.0)).ok_or(EIO)?;
    let sectors = memory.sectors.min(most);
    let start = range.first.checked_add(memory.sector).ok_or(EIO)?;
    let inside = start
        .checked_add(sectors)
        .is_some_and(|end| end <= range.end);
    if !inside || start % PAGE_SECTORS != 0 || sectors < PAGE_SECTORS {
        return Err(EIO);
    }
    let dax = device.dax().ok_or(EIO)?;
    // SAFETY: The device is open, so the DAX device is valid. The check above ensures that the
    // pages are within the range that was claimed. The pointers are valid by the caller's promise.
    let found = unsafe {
        sys::obd_dax_direct_access(
            dax.as_ptr(),
            (start / PAGE_SECTORS) as ffi::c_ulong,
            (sectors / PAGE_SECTORS) as ffi::c_long,
            kaddr,
            pfn,
        )
    };
    if found < 0 {
        to_result(found as ffi::c_int)?;
    }
    Ok(found)
}

/// The error for a device without DAX.
const NOT_DAX: Failure = Failure::new(c"Device has no DAX", EINVAL);

/// The error for a device that is claimed.
const CLAIMED: Failure = Failure::new(c"Device is in a DAX table already", EBUSY);

impl<C> Setup<'_, C> {
    /// Returns the disk of the mapped device.
    fn disk(&self) -> *mut sys::gendisk {
        // SAFETY: By the type invariant the target is valid.
        let table = unsafe { (*self.target.as_ptr()).table };
        // SAFETY: A target's table is valid.
        let md = unsafe { sys::dm_table_get_md(table) };
        // SAFETY: The mapped device of a target is valid.
        unsafe { sys::dm_disk(md) }
    }

    /// Checks that a device can be a layer with DAX.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] for a device without DAX, and for a mapped device, since two mapped devices may
    /// have the same memory. [`EBUSY`] if the DAX device has a holder: a file system that handles
    /// failures of the memory.
    pub(crate) fn require_dax(&self, id: DeviceId) -> Result<(), Failure> {
        let device = self.device(id)?;
        // SAFETY: The disk of a mapped device is valid.
        let failure = if device.major() == unsafe { (*self.disk()).major } {
            Failure::new(c"DAX layers must not be on mapped devices", EINVAL)
        } else if let Some(dax) = device.dax() {
            // SAFETY: The device is open, so the DAX device is valid.
            if unsafe { sys::obd_dax_holder(dax.as_ptr()) }.is_null() {
                return Ok(());
            }
            Failure::new(c"DAX memory of the device has a holder", EBUSY)
        } else {
            NOT_DAX
        };
        pr_err!(
            "{}: cannot have {} as a layer\n",
            self.device_name().as_str(),
            device.name()
        );
        Err(failure)
    }
}

impl Device {
    /// Returns the DAX device of the block device. A partition that isn't aligned to pages has
    /// none.
    fn dax(&self) -> Option<NonNull<sys::dax_device>> {
        // SAFETY: By the type invariant the device is valid; device-mapper doesn't change it.
        NonNull::new(unsafe { (*self.as_ptr()).dax_dev })
    }

    /// Returns the first sector of the device on the whole disk. It doesn't change while the device
    /// is open.
    fn first_sector(&self) -> u64 {
        // SAFETY: By the type invariant the device is open.
        unsafe { sys::obd_get_start_sect(self.bdev()) }
    }

    /// Returns the major number of the disk. All mapped devices have the same major number.
    fn major(&self) -> ffi::c_int {
        // SAFETY: By the type invariant the device is open.
        let disk = unsafe { (*self.bdev()).bd_disk };
        // SAFETY: An open device has a disk.
        unsafe { (*disk).major }
    }
}
