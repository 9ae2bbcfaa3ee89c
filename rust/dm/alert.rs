// SPDX-License-Identifier: GPL-2.0

//! Reports corrupt blocks in the kernel log, with a rate limit. The first fault of a target, a
//! corrupt block or a failed read, also causes a device-mapper event, for which `dmsetup wait`
//! waits, and a uevent.
//!
//! A fault may be found in any context, but events must be sent in process context. A work item on
//! a workqueue of the kernel sends them, not a worker of the target: sending takes mutexes of
//! device-mapper and allocates memory, and the target's workers must wait for neither.
//!
//! C headers: `include/linux/device-mapper.h`, `include/linux/ratelimit.h`.

use core::ptr::NonNull;

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::types::Opaque;

use super::DeviceName;
use crate::sys;

/// Value of [`Alerts::first`] before the first fault.
const NONE: u64 = u64::MAX;

/// Reports the faults of a target. `limit` is the rate limit of the log.
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
    variable: &'static CStr,
    first: Atomic<u64>,
}

// SAFETY: Work items and rate limits may be used from any thread, and so may the fields that are
// read through `target`.
unsafe impl Send for Alerts {}
// SAFETY: As above.
unsafe impl Sync for Alerts {}

impl Alerts {
    /// Makes the object that reports the faults of `target`. The uevent for the first fault has a
    /// variable named `variable`.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    ///
    /// # Safety
    ///
    /// `target` is valid until the returned object is dropped.
    pub(super) unsafe fn new(
        target: NonNull<sys::dm_target>,
        variable: &'static CStr,
    ) -> Result<Pin<KBox<Self>>> {
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
                variable,
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
        self.raise(block);
    }

    /// Causes the events if this is the target's first fault. `value` is the value of the uevent's
    /// variable; it must be less than `u64::MAX`. May be called in any context.
    pub(super) fn raise(&self, value: u64) {
        if self.first.load(Relaxed) == NONE && self.first.cmpxchg(NONE, value, Relaxed).is_ok() {
            // SAFETY: By the type invariant the work is initialised. It isn't freed while it is
            // queued or runs: `drop` cancels it, and waits for it.
            unsafe { sys::obd_schedule_work(self.work.get()) };
        }
    }

    /// Panics because of a corrupt block. May be called in any context.
    pub(super) fn panic(&self) -> ! {
        let name = self.name.as_c_str().as_char_ptr();
        // SAFETY: The format has one argument, which is a C string.
        unsafe { sys::panic(c"dm_overlaybd: %s: corrupt block".as_char_ptr(), name) }
    }

    /// Logs the name of the mapped device, because users know its name and not its number. Reads
    /// the name now, because it may have changed since the table was loaded. Must be called in
    /// process context, with a valid `device`.
    fn log_name(&self, device: *mut sys::mapped_device) {
        let mut name = [0u8; sys::OBD_DM_NAME_LEN];
        let text = name.as_mut_ptr().cast();
        // SAFETY: The device is valid, and the array has room for a name. This is process context,
        // without locks.
        if unsafe { sys::dm_copy_name_and_uuid(device, text, core::ptr::null_mut()) } != 0 {
            return;
        }
        if let Ok(name) = CStr::from_bytes_until_nul(&name) {
            // Bytes that can't be printed are escaped.
            pr_err!("{}: the first fault of device {name}\n", self.name.as_str());
        }
    }

    /// The function of the work item: logs the name of the device, and sends the uevent and the
    /// device-mapper event of the first fault. Called in process context.
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
        // SAFETY: The table is valid, and so is its device as long as the table is.
        let device = unsafe { sys::dm_table_get_md(table) };
        this.log_name(device);
        // SAFETY: The device is valid.
        let disk = unsafe { sys::dm_disk(device) };
        let variable = this.variable.as_char_ptr();
        // SAFETY: A mapped device has a disk, which is valid as long as the mapped device is. The
        // variable is a C string.
        unsafe { sys::obd_alert_uevent(disk, variable, this.first.load(Relaxed)) };
        // SAFETY: The table is valid. This is process context.
        unsafe { sys::dm_table_event(table) };
    }
}

#[pinned_drop]
impl PinnedDrop for Alerts {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant the work is initialised. This cancels events that aren't
        // sent yet, and waits until those that are being sent have been sent.
        unsafe { sys::cancel_work_sync(self.work.get()) };
    }
}
