// SPDX-License-Identifier: GPL-2.0

//! Tells of corrupt blocks: in the kernel's log, and for the first one by an event of device-mapper
//! and a uevent.
//!
//! A block may be found corrupt in any context, but events are sent in process context. A work item
//! on a workqueue of the kernel sends them, not a worker of the target: sending takes a mutex of
//! device-mapper and allocates memory, and the target's workers must not wait for either.
//!
//! C headers: `include/linux/device-mapper.h`, `include/linux/ratelimit.h`.

use core::ptr::NonNull;

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::types::Opaque;

use super::DeviceName;
use crate::sys;

/// What [`Alerts::first`] is while no corrupt block was seen.
const NONE: u64 = u64::MAX;

/// Tells of the corrupt blocks of a target.
///
/// # Invariants
///
/// `limit` and `work` are initialised. `target` is valid for as long as this is.
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

// SAFETY: Works and limits are used from any thread, and so is what the target's pointer is for.
unsafe impl Send for Alerts {}
// SAFETY: As above.
unsafe impl Sync for Alerts {}

impl Alerts {
    /// Makes what tells of the blocks of `target`.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    ///
    /// # Safety
    ///
    /// `target` is valid until this is dropped.
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
                // SAFETY: The slot is memory for a limit.
                limit <- Opaque::ffi_init(|slot| unsafe { sys::obd_ratelimit_default_init(slot) }),
                target,
                name,
                first: Atomic::new(NONE),
            }),
            GFP_KERNEL,
        )
    }

    /// Tells of a corrupt block, in any context.
    pub(crate) fn corrupt(&self, block: u64) {
        let name = self.name.as_c_str().as_char_ptr();
        // SAFETY: By the type invariant the limit is initialised. The name is a C string.
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
            // SAFETY: By the type invariant the work is initialised; it is waited for before it goes.
            unsafe { sys::obd_schedule_work(self.work.get()) };
        }
    }

    /// Panics, in any context.
    pub(super) fn panic(&self) -> ! {
        let name = self.name.as_c_str().as_char_ptr();
        // SAFETY: The format has one argument, which is a C string.
        unsafe { sys::panic(c"dm_overlaybd: %s: corrupt block".as_char_ptr(), name) }
    }

    /// Sends the events.
    ///
    /// # Safety
    ///
    /// `work` is that of an [`Alerts`], which waits for it before it goes.
    unsafe extern "C" fn work_fn(work: *mut sys::work_struct) {
        // SAFETY: The work is the first field.
        let this = unsafe { &*work.cast::<Self>() };
        // SAFETY: By the type invariant the target is valid, and so is its table.
        let table = unsafe { (*this.target.as_ptr()).table };
        // SAFETY: A table's device is valid as long as the table is.
        let disk = unsafe { sys::dm_disk(sys::dm_table_get_md(table)) };
        // SAFETY: A mapped device has a disk, which is valid as long as it is.
        unsafe { sys::obd_corrupt_uevent(disk, this.first.load(Relaxed)) };
        // SAFETY: The table is valid. This is process context.
        unsafe { sys::dm_table_event(table) };
    }
}

#[pinned_drop]
impl PinnedDrop for Alerts {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant the work is initialised. This waits for it.
        unsafe { sys::cancel_work_sync(self.work.get()) };
    }
}
