// SPDX-License-Identifier: GPL-2.0

//! Counters with a `u64` for each CPU, so that CPUs don't contend for a cache line when they add.
//!
//! C header: `include/linux/percpu.h`.

use core::ptr::NonNull;

use kernel::prelude::*;

use crate::sys;

/// A counter. [`Self::add`] is cheap, and may be called in any context. [`Self::sum`] reads the
/// `u64` of every CPU.
///
/// # Invariants
///
/// The pointer refers to per-CPU memory with a `u64` for each CPU. This object owns the memory.
pub(crate) struct Counter(NonNull<u64>);

// SAFETY: Per-CPU memory may be used and freed by any thread.
unsafe impl Send for Counter {}
// SAFETY: Each CPU writes only its own `u64`, with an operation that an interrupt cannot split.
// `sum` loads each `u64` once.
unsafe impl Sync for Counter {}

impl Counter {
    /// Makes a counter with the value 0. May sleep: called by constructors only.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: This is process context without spinlocks, where sleeping is allowed: only
        // constructors call this function.
        let counter = unsafe { sys::obd_counter_alloc() };
        // INVARIANT: Just allocated.
        Ok(Self(NonNull::new(counter).ok_or(ENOMEM)?))
    }

    /// Adds `n` to the `u64` of this CPU.
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
        // SAFETY: By the type invariant this object owns the memory.
        unsafe { sys::free_percpu(self.0.as_ptr().cast()) };
    }
}
