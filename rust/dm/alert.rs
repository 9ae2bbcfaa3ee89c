// SPDX-License-Identifier: GPL-2.0

//! Reports corrupt blocks in the kernel's log, as far as a rate limit allows. The first corrupt
//! block of a target also causes a device-mapper event, for which `dmsetup wait` waits, and a
//! uevent.
//!
//! A block may be found corrupt in any context, but events are sent in process context. A work item
//! on the system's workqueue sends them, not a worker of the target: sending takes a mutex of
//! device-mapper and allocates memory, and the target's workers must not wait for either.
//!
//! C headers: `include/linux/device-mapper.h`, `include/linux/ratelimit.h`.

use core::ptr::NonNull;

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::types::Opaque;

use super::DeviceName;
use crate::sys;

/// Value of [`Alerts::first`] before the first corrupt block.
const NONE: u64 = u64::MAX;

/// Reports the corrupt blocks of a target. `limit` is the rate limit of the log.
///
/// # Invariants
///
/// `limit` and `work` are initialised. `target` is valid for as long as this object is.
#[repr(C)]
#[pin_data(PinnedDrop)]
pub(crate) struct Alerts {
    #[pin]
    work: Opaque<sys::work_struct>,
    #[pin]
    limit: Opaque<sys::ratelimit_state>,
    target: NonNull<sys::dm_target>,
    name: DeviceName,
    first: Atomic<u64>,
}

// SAFETY: Work items and rate limits may be used from any thread, and so may the fields that are
// read through `target`.
unsafe impl Send for Alerts {}
// SAFETY: As above.
unsafe impl Sync for Alerts {}

impl Alerts {
    /// Makes the object that reports the corrupt blocks of `target`.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    ///
    /// # Safety
    ///
    /// `target` is valid until the returned object is dropped.
    pub(super) unsafe fn new(target: NonNull<sys::dm_target>) -> Result<Pin<KBox<Self>>> {
        // SAFETY: The caller's promise.
        let name = unsafe { DeviceName::of(target.as_ptr()) };
        // INVARIANT: Both are initialised here; the target is valid by the safety requirement.
        KBox::pin_init(
            pin_init!(Self {
                // SAFETY: The slot is memory for a work item.
                work <- Opaque::ffi_init(|slot| unsafe {
                    sys::obd_init_work(slot, Some(Self::work_fn))
                }),
                // SAFETY: The slot is memory for a rate limit.
                limit <- Opaque::ffi_init(|slot| unsafe { sys::obd_ratelimit_default_init(slot) }),
                target,
                name,
                first: Atomic::new(NONE),
            }),
            GFP_KERNEL,
        )
    }

    /// Reports that block `block` is corrupt. May be called in any context.
    pub(crate) fn corrupt(&self, block: u64) {
        let name = self.name.as_c_str().as_char_ptr();
        // SAFETY: By the type invariant the rate limit is initialised. The name is a C string.
        if unsafe { sys::___ratelimit(self.limit.get(), name) } != 0 {
            // SAFETY: By the type invariant the target is valid.
            let target_type = unsafe { super::setup::type_name(self.target.as_ptr()) };
            pr_err!(
                "{}: {}: block {block} is corrupt\n",
                self.name.as_str(),
                target_type.to_str().unwrap_or("-")
            );
        }
        if self.first.load(Relaxed) == NONE && self.first.cmpxchg(NONE, block, Relaxed).is_ok() {
            // SAFETY: By the type invariant the work is initialised. It isn't freed while it is
            // queued or runs: `drop` cancels it, and waits for it.
            unsafe { sys::obd_schedule_work(self.work.get()) };
        }
    }

    /// Makes the kernel panic because of a corrupt block. May be called in any context.
    pub(super) fn panic(&self) -> ! {
        let name = self.name.as_c_str().as_char_ptr();
        // SAFETY: The format has one argument, which is a C string.
        unsafe { sys::panic(c"dm_overlaybd: %s: corrupt block".as_char_ptr(), name) }
    }

    /// The function of the work item: sends the uevent and the device-mapper event of the first
    /// corrupt block. Called in process context.
    ///
    /// # Safety
    ///
    /// `work` is the work item in an [`Alerts`], which isn't dropped while this runs.
    unsafe extern "C" fn work_fn(work: *mut sys::work_struct) {
        // SAFETY: The work is the first field. The object is valid: dropping it waits for this
        // function.
        let this = unsafe { &*work.cast::<Self>() };
        // SAFETY: By the type invariant the target is valid, and so is its table.
        let table = unsafe { (*this.target.as_ptr()).table };
        // SAFETY: A table's device is valid as long as the table is.
        let disk = unsafe { sys::dm_disk(sys::dm_table_get_md(table)) };
        // SAFETY: A mapped device has a disk, which is valid as long as the mapped device is.
        unsafe { sys::obd_corrupt_uevent(disk, this.first.load(Relaxed)) };
        // SAFETY: The table is valid. This is process context.
        unsafe { sys::dm_table_event(table) };
    }
}

#[pinned_drop]
impl PinnedDrop for Alerts {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant the work is initialised. This cancels events that aren't
        // sent yet, and waits for those that are just being sent.
        unsafe { sys::cancel_work_sync(self.work.get()) };
    }
}
