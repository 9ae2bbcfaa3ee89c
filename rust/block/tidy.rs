// SPDX-License-Identifier: GPL-2.0

//! A function that runs every few seconds, as long as it has something to do.
//!
//! C header: `include/linux/workqueue.h`.

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::Arc;
use kernel::types::Opaque;

use crate::sys;

/// Least number of seconds from arming to a call, and between two calls. The timer is deferrable: a
/// call may come later if the CPU is idle.
const SECONDS: u32 = 5;

/// An object that must be tidied from time to time.
pub(crate) trait Tidy: Send + Sync + 'static {
    /// Frees what is no longer needed. Returns whether to call this again after [`SECONDS`]. Called
    /// in process context.
    fn tidy(&self) -> bool;
}

/// Calls [`Tidy::tidy`] every few seconds while armed. Dropping it stops the calls.
///
/// # Invariants
///
/// `work` is initialised, and its function is [`Self::work_fn`].
#[repr(C)]
#[pin_data(PinnedDrop)]
pub(crate) struct Tidier<T: Tidy> {
    #[pin]
    work: Opaque<sys::delayed_work>,
    armed: Atomic<bool>,
    what: Arc<T>,
}

// SAFETY: A work item may be used from any thread, and so may `what`.
unsafe impl<T: Tidy> Send for Tidier<T> {}
// SAFETY: As above.
unsafe impl<T: Tidy> Sync for Tidier<T> {}

impl<T: Tidy> Tidier<T> {
    /// Makes a tidier for `what`. The tidier isn't [armed](Self::arm) yet.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(what: Arc<T>) -> Result<Pin<KBox<Self>>> {
        KBox::pin_init(
            pin_init!(Self {
                // SAFETY: The slot is memory for a work item.
                work <- Opaque::ffi_init(|slot| unsafe {
                    sys::obd_init_delayed_work(slot, Some(Self::work_fn))
                }),
                armed: Atomic::new(false),
                what,
            }),
            GFP_KERNEL,
        )
    }

    /// Arms the tidier: it calls [`Tidy::tidy`] after at least [`SECONDS`] seconds, and again as
    /// long as that returns true. Cheap if the tidier is armed already: this does not postpone the
    /// next call. May be called in any context but NMI.
    ///
    /// A later call of [`Tidy::tidy`] sees what the caller has done before while it held a lock that
    /// [`Tidy::tidy`] takes, too.
    pub(crate) fn arm(&self) {
        // Two threads may both get here: queueing work that is already queued does nothing.
        if !self.armed.load(Relaxed) {
            self.armed.store(true, Relaxed);
            self.schedule();
        }
    }

    fn schedule(&self) {
        // SAFETY: By the type invariant the work item is initialised. Dropping `self` cancels it,
        // and waits for its function if that runs.
        unsafe { sys::obd_schedule_delayed_work(self.work.get(), SECONDS) };
    }

    /// The function of the work item.
    ///
    /// # Safety
    ///
    /// `work` is the work item in a [`Tidier`], which isn't dropped while this runs.
    unsafe extern "C" fn work_fn(work: *mut sys::work_struct) {
        // SAFETY: The work item is the first field of the delayed work, which is the first field of
        // the tidier. The tidier is valid: dropping it waits for this function.
        let this = unsafe { &*work.cast::<Self>() };
        // Cleared before the call, so that a thread that arms the tidier from now on causes another
        // call. A thread that found `armed` set before now has queued nothing, and relies on this
        // call.
        this.armed.store(false, Relaxed);
        if this.what.tidy() {
            this.arm();
        }
    }
}

#[pinned_drop]
impl<T: Tidy> PinnedDrop for Tidier<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant the work item is initialised. This cancels it, waits for
        // its function if that runs, and prevents the function from queueing it again.
        unsafe { sys::cancel_delayed_work_sync(self.work.get()) };
    }
}
