// SPDX-License-Identifier: GPL-2.0

//! Counters for each CPU, so that CPUs that count don't wait for one another's cache lines.
//!
//! C header: `include/linux/percpu.h`.

use core::ptr::NonNull;

use kernel::prelude::*;

use crate::sys;

/// A counter. Counting is cheap, and works in any context; reading adds up what all CPUs have
/// counted.
///
/// # Invariants
///
/// Is per-CPU memory for a number on each CPU, owned by this.
pub(crate) struct Counter(NonNull<u64>);

// SAFETY: Per-CPU memory may be used and freed by any thread.
unsafe impl Send for Counter {}
// SAFETY: Each CPU writes to its own number only, and reading takes each with one load.
unsafe impl Sync for Counter {}

impl Counter {
    /// A counter that is 0.
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

    /// Adds `n`.
    pub(crate) fn add(&self, n: u64) {
        // SAFETY: By the type invariant.
        unsafe { sys::obd_counter_add(self.0.as_ptr(), n) }
    }

    /// What all CPUs have counted.
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
