// SPDX-License-Identifier: GPL-2.0

//! Counters with a number for each CPU, so that CPUs that count don't share a cache line.
//!
//! C header: `include/linux/percpu.h`.

use core::ptr::NonNull;

use kernel::prelude::*;

use crate::sys;

/// A counter. Adding is cheap, and may be done in any context. Reading adds up the numbers of all
/// CPUs.
///
/// # Invariants
///
/// The pointer is per-CPU memory for a `u64` on each CPU, owned by this.
pub(crate) struct Counter(NonNull<u64>);

// SAFETY: Per-CPU memory may be used and freed by any thread.
unsafe impl Send for Counter {}
// SAFETY: Each CPU writes only its own number, and reading loads each number once.
unsafe impl Sync for Counter {}

impl Counter {
    /// Makes a counter with the value 0. May sleep.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: May sleep, as constructors may.
        let counter = unsafe { sys::obd_counter_alloc() };
        // INVARIANT: Just allocated.
        Ok(Self(NonNull::new(counter).ok_or(ENOMEM)?))
    }

    /// Adds `n` to the number of this CPU.
    pub(crate) fn add(&self, n: u64) {
        // SAFETY: By the type invariant.
        unsafe { sys::obd_counter_add(self.0.as_ptr(), n) }
    }

    /// Returns the sum over all CPUs.
    pub(crate) fn sum(&self) -> u64 {
        // SAFETY: By the type invariant.
        unsafe { sys::obd_counter_sum(self.0.as_ptr()) }
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        // SAFETY: By the type invariant it is ours to free.
        unsafe { sys::free_percpu(self.0.as_ptr().cast()) };
    }
}
