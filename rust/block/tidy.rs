// SPDX-License-Identifier: GPL-2.0

//! Something that is done every few seconds, for as long as there is something to do.
//!
//! C header: `include/linux/workqueue.h`.

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::Arc;
use kernel::types::Opaque;

use crate::sys;

/// Seconds between two times.
const SECONDS: u32 = 5;

/// What wants tidying.
pub(crate) trait Tidy: Send + Sync + 'static {
    /// Tidies up, in process context. Returns whether it is to be called again.
    fn tidy(&self) -> bool;
}

/// Calls [`Tidy::tidy`] from time to time, until this is dropped.
///
/// # Invariants
///
/// `work` is initialised, and has [`Self::work_fn`] run with this.
#[repr(C)]
#[pin_data(PinnedDrop)]
pub(crate) struct Tidier<T: Tidy> {
    #[pin]
    work: Opaque<sys::delayed_work>,
    armed: Atomic<bool>,
    what: Arc<T>,
}

// SAFETY: Works are used from any thread, and so is `what`.
unsafe impl<T: Tidy> Send for Tidier<T> {}
// SAFETY: As above.
unsafe impl<T: Tidy> Sync for Tidier<T> {}

impl<T: Tidy> Tidier<T> {
    /// Makes what is going to tidy `what`, once it was [asked](Self::arm).
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

    /// Has it tidied in some seconds, and on. Cheap where it has been asked already; in any context.
    pub(crate) fn arm(&self) {
        if !self.armed.load(Relaxed) {
            self.armed.store(true, Relaxed);
            self.schedule();
        }
    }

    fn schedule(&self) {
        // SAFETY: By the type invariant the work is initialised; it is waited for before it goes.
        unsafe { sys::obd_schedule_delayed_work(self.work.get(), SECONDS) };
    }

    /// Tidies.
    ///
    /// # Safety
    ///
    /// `work` is that of a [`Tidier`], which waits for it before it goes.
    unsafe extern "C" fn work_fn(work: *mut sys::work_struct) {
        // SAFETY: The work is the first field of a delayed work, which is the first field.
        let this = unsafe { &*work.cast::<Self>() };
        // Before it is looked whether there is something: who arms it meanwhile has it run again.
        this.armed.store(false, Relaxed);
        if this.what.tidy() {
            this.arm();
        }
    }
}

#[pinned_drop]
impl<T: Tidy> PinnedDrop for Tidier<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant the work is initialised. This waits for it; it may queue
        // itself meanwhile, which this prevents.
        unsafe { sys::cancel_delayed_work_sync(self.work.get()) };
    }
}
