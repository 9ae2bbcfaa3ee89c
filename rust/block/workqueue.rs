// SPDX-License-Identifier: GPL-2.0

//! A workqueue of the module's own, with a rescuer for when memory is short.
//!
//! C header: `include/linux/workqueue.h`.

use core::ptr::NonNull;

use kernel::prelude::*;

use crate::sys;

/// A workqueue that makes progress without memory.
///
/// # Invariants
///
/// The pointer is a valid workqueue, owned by this.
pub(crate) struct WorkQueue(NonNull<sys::workqueue_struct>);

// SAFETY: A workqueue is used from any thread.
unsafe impl Send for WorkQueue {}
// SAFETY: As above; queueing work is atomic.
unsafe impl Sync for WorkQueue {}

impl WorkQueue {
    /// Makes a workqueue with a name that `ps` shows.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(name: &CStr) -> Result<Self> {
        let flags = sys::wq_flags_WQ_MEM_RECLAIM | sys::wq_flags_WQ_UNBOUND;
        // SAFETY: `name` is a C string; it is copied.
        let wq = unsafe { sys::obd_alloc_workqueue(name.as_char_ptr(), flags) };
        // INVARIANT: A new workqueue, which nobody else has.
        Ok(Self(NonNull::new(wq).ok_or(ENOMEM)?))
    }

    /// Queues `work` on any CPU.
    ///
    /// # Safety
    ///
    /// `work` is initialised, isn't queued already, and stays valid until its function has begun.
    pub(crate) unsafe fn queue(&self, work: *mut sys::work_struct) {
        let cpu = sys::wq_misc_consts_WORK_CPU_UNBOUND as kernel::ffi::c_int;
        // SAFETY: The workqueue is valid by the type invariant, the work by the caller's promise.
        unsafe { sys::queue_work_on(cpu, self.0.as_ptr(), work) };
    }
}

impl Drop for WorkQueue {
    fn drop(&mut self) {
        // SAFETY: By the type invariant it is valid and ours. This waits for what is queued.
        unsafe { sys::destroy_workqueue(self.0.as_ptr()) };
    }
}
