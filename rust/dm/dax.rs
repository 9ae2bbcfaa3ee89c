// SPDX-License-Identifier: GPL-2.0

//! DAX: file systems that map the memory of the devices below a target.
//!
//! The kernel stores in the `struct page` of a mapped page which page of which file it is, see
//! `Documentation/dax.rst`. So a page must be at one place of one disk only, and the table of a disk
//! must not change while the disk is open. The target ensures the first for its disk, a [`Claim`]
//! for several disks, and [`Access`] the second.
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

/// Most pages that a target is asked for at once. The largest mapping, a PMD, has so many with
/// pages of 16 KiB.
const MOST_PAGES: u64 = 2048;

/// Where the memory of a sector is.
pub(crate) enum Memory {
    /// It is a contiguous range of a device.
    Device {
        /// The device.
        device: DeviceId,
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u64,
    },
    /// There is none: the sector reads as zeros.
    Zeros,
}

/// Returns the memory of sector `sector` of a target, with that of the sectors after it as far as it
/// is contiguous, at most `most` sectors in all. Must not sleep.
pub(crate) type Find<T> = fn(&T, sector: u64, most: u64) -> Memory;

/// Returns the mapped device of a target.
///
/// # Safety
///
/// `ti` is valid.
unsafe fn mapped_device(ti: NonNull<sys::dm_target>) -> *mut sys::mapped_device {
    // SAFETY: The caller's promise.
    let table = unsafe { (*ti.as_ptr()).table };
    // SAFETY: A target's table is valid.
    unsafe { sys::dm_table_get_md(table) }
}

/// Returns the disk of the mapped device of a target.
///
/// # Safety
///
/// `ti` is valid.
unsafe fn disk(ti: NonNull<sys::dm_target>) -> *mut sys::gendisk {
    // SAFETY: The caller's promise.
    let md = unsafe { mapped_device(ti) };
    // SAFETY: The mapped device of a target is valid.
    unsafe { sys::dm_disk(md) }
}

/// Returns how often the mapped device of a target is open.
///
/// # Safety
///
/// `ti` is valid.
unsafe fn openers(ti: NonNull<sys::dm_target>) -> u32 {
    // SAFETY: The caller's promise.
    let disk = unsafe { disk(ti) };
    // SAFETY: The disk of a mapped device is valid.
    unsafe { sys::obd_disk_openers(disk) }
}

/// Whether the memory below a target may be mapped.
///
/// Pages that were mapped with the previous table stay mapped while the device is open. So pages may
/// be mapped from the first resume on at which the device isn't open, or for the first table of a
/// device from the first resume on.
pub(super) struct Access {
    /// Whether the table replaces another one.
    reload: bool,
    /// Whether pages may be mapped.
    begun: Atomic<bool>,
}

impl Access {
    /// Makes the state of a new table. Fails if the device has a live table and is open.
    ///
    /// # Errors
    ///
    /// [`EBUSY`].
    pub(super) fn new<C>(setup: &Setup<'_, C>) -> Result<Self, Failure> {
        // SAFETY: By the type invariant of `setup` the target is valid.
        let disk = unsafe { disk(setup.target) };
        // SAFETY: The disk of a mapped device is valid.
        let reload = unsafe { sys::obd_get_capacity(disk) } != 0;
        // SAFETY: By the type invariant of `setup` the target is valid.
        if reload && unsafe { openers(setup.target) } != 0 {
            return Err(Failure::new(
                c"Device is open, so its DAX table cannot change",
                EBUSY,
            ));
        }
        Ok(Self {
            reload,
            begun: Atomic::new(false),
        })
    }

    /// Allows mappings. Fails if the device may have pages of the previous table mapped.
    ///
    /// # Errors
    ///
    /// [`EBUSY`].
    ///
    /// # Safety
    ///
    /// Called by device-mapper for the target `ti`, before it resumes the device.
    pub(super) unsafe fn begin(&self, ti: NonNull<sys::dm_target>) -> Result {
        // SAFETY: The caller's promise.
        if !self.has_begun() && self.reload && unsafe { openers(ti) } != 0 {
            // SAFETY: The caller's promise.
            let name = unsafe { DeviceName::of(ti.as_ptr()) };
            pr_err!(
                "{}: was opened after a DAX table was loaded: close it, then resume it\n",
                name.as_str()
            );
            return Err(EBUSY);
        }
        self.begun.store(true, Relaxed);
        Ok(())
    }

    /// Returns whether pages may be mapped.
    pub(super) fn has_begun(&self) -> bool {
        self.begun.load(Relaxed)
    }
}

/// Looks up page `page` of a mapped device for the `direct_access` function of a target: stores its
/// address in `kaddr`, its page frame number in `pfn`, and returns the number of contiguous pages
/// from it on, `pages` at most.
///
/// # Errors
///
/// [`EIO`] if `pfn` isn't null and there is no page, and the errors of the device below.
///
/// # Safety
///
/// Called by device-mapper for the target `live`; its table isn't destroyed during the call. `kaddr`
/// and `pfn` are null or valid for a write.
pub(super) unsafe fn direct_access<T: Target>(
    live: &Live<T>,
    page: u64,
    pages: ffi::c_long,
    kaddr: *mut *mut ffi::c_void,
    pfn: *mut ffi::c_ulong,
) -> Result<ffi::c_long> {
    let find = T::DAX.ok_or(EOPNOTSUPP)?;
    let pages = u64::try_from(pages)?.min(MOST_PAGES);
    let sector = page
        .checked_mul(PAGE_SECTORS)
        .and_then(|sector| sector.checked_sub(live.begin()))
        .ok_or(EIO)?;
    let most = pages * PAGE_SECTORS;
    let (device, first, sectors) = match find(live.target(), sector, most) {
        Memory::Device {
            device,
            sector,
            sectors,
        } => (live.device(device).ok_or(EIO)?, sector, sectors.min(most)),
        // The kernel's zero page may be read, but must not be mapped: fs/dax.c would write to its
        // struct page.
        Memory::Zeros if pfn.is_null() => {
            // SAFETY: The zero page has an address, and is never freed.
            let zeros = unsafe { sys::obd_zero_page() };
            if !kaddr.is_null() {
                // SAFETY: The caller's promise.
                unsafe { *kaddr = zeros };
            }
            return Ok(1);
        }
        Memory::Zeros => return Err(EIO),
    };
    let inside = first
        .checked_add(sectors)
        .is_some_and(|end| end <= device.sectors());
    let start = device.first_sector().checked_add(first).ok_or(EIO)?;
    if !inside || start % PAGE_SECTORS != 0 || sectors < PAGE_SECTORS {
        return Err(EIO);
    }
    let dax = device.dax().ok_or(EOPNOTSUPP)?;
    // SAFETY: The device is open, so the DAX device is valid; the pages are within the device, as
    // was just checked. The caller's promise for the pointers.
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

/// Sectors of a DAX device, counted from the start of the whole disk, that a target uses.
///
/// The addresses identify objects that exist at least as long as this. They are only compared.
struct Taken {
    dax: usize,
    first: u64,
    end: u64,
    target: usize,
    table: usize,
    mapped: usize,
}

impl Taken {
    /// Returns whether both have a page in common, unless one is of a table that replaces the
    /// other's.
    fn collides(&self, other: &Self) -> bool {
        let overlap = self.dax == other.dax && self.first < other.end && other.first < self.end;
        overlap && (self.mapped != other.mapped || self.table == other.table)
    }
}

/// The sectors of DAX devices that are in tables.
#[pin_data]
pub(crate) struct Claims {
    #[pin]
    taken: Mutex<KVec<Taken>>,
}

impl Claims {
    /// Makes an empty list.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            taken <- new_mutex!(KVec::new()),
        })
    }
}

/// The claim of a target on its devices, until this is dropped: no other table may use them, except
/// one that replaces the target's.
pub(crate) struct Claim {
    claims: Arc<Claims>,
    target: usize,
}

impl Claim {
    /// Claims all devices that `setup` has opened.
    ///
    /// # Errors
    ///
    /// [`EBUSY`] if a device is claimed already or was opened twice, [`EINVAL`] if one has no DAX, and
    /// [`ENOMEM`].
    pub(crate) fn new<C>(setup: &Setup<'_, C>, claims: Arc<Claims>) -> Result<Self, Failure> {
        let ti = setup.target;
        // SAFETY: By the type invariant of `setup` the target is valid.
        let table = unsafe { (*ti.as_ptr()).table };
        // SAFETY: As above.
        let mapped = unsafe { mapped_device(ti) };
        // Dropped if a device fails: releases those before it.
        let claim = Self {
            claims,
            target: ti.as_ptr().addr(),
        };
        for device in &setup.devices {
            let dax = device.dax().ok_or(NOT_DAX)?;
            let first = device.first_sector();
            let wanted = Taken {
                dax: dax.as_ptr().addr(),
                first,
                // No overflow: a partition ends where the disk does, at most.
                end: first + device.sectors(),
                target: claim.target,
                table: table.addr(),
                mapped: mapped.addr(),
            };
            let mut taken = claim.claims.taken.lock();
            if taken.iter().any(|other| other.collides(&wanted)) {
                return Err(Failure::new(c"Device is in a DAX table already", EBUSY));
            }
            taken.push(wanted, GFP_KERNEL)?;
        }
        Ok(claim)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut taken = self.claims.taken.lock();
        taken.retain(|taken| taken.target != self.target);
    }
}

/// The failure of a device without DAX.
const NOT_DAX: Failure = Failure::new(c"Device has no DAX", EINVAL);

impl<C> Setup<'_, C> {
    /// Checks that a device has DAX, and memory of its own.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] for a device without DAX, and for a mapped device: two of them may have the same
    /// memory.
    pub(crate) fn require_dax(&self, id: DeviceId) -> Result<(), Failure> {
        let device = self.device(id)?;
        // SAFETY: By the type invariant the target is valid.
        let disk = unsafe { disk(self.target) };
        // SAFETY: The disk of a mapped device is valid.
        if device.major() == unsafe { (*disk).major } {
            return Err(Failure::new(
                c"DAX layers must not be on mapped devices",
                EINVAL,
            ));
        }
        device.dax().map(|_| ()).ok_or(NOT_DAX)
    }

    /// Returns the first sector of the target in its mapped device.
    pub(crate) fn begin(&self) -> u64 {
        // SAFETY: By the type invariant the target is valid.
        unsafe { (*self.target.as_ptr()).begin }
    }
}

impl Device {
    /// Returns its DAX device. A partition that isn't aligned to pages has none.
    fn dax(&self) -> Option<NonNull<sys::dax_device>> {
        // SAFETY: By the type invariant the device is valid; device-mapper doesn't change it.
        NonNull::new(unsafe { (*self.as_ptr()).dax_dev })
    }

    /// Returns its first sector on the whole disk.
    fn first_sector(&self) -> u64 {
        // SAFETY: By the type invariant the device is open.
        unsafe { sys::obd_get_start_sect(self.bdev()) }
    }

    /// Returns the major number of its disk. All mapped devices have the same one.
    fn major(&self) -> ffi::c_int {
        // SAFETY: By the type invariant the device is open.
        let disk = unsafe { (*self.bdev()).bd_disk };
        // SAFETY: An open device has a disk.
        unsafe { (*disk).major }
    }
}
