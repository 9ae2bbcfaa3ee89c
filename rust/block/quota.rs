// SPDX-License-Identifier: GPL-2.0

//! The memory that the cache uses, and the limit of that, both in bytes. In sysfs they are the
//! parameters `cache_bytes` and `cache_limit_bytes` of the module.
//!
//! C header: `include/dm_overlaybd.h`.

use crate::format::num::to_usize;
use crate::sys;

/// Sets the limit to its default if the user has set none, or 0. Called when the module is loaded.
pub(crate) fn init() {
    // SAFETY: Called once, in process context.
    unsafe { sys::obd_cache_init() }
}

/// Returns the limit of the cache in bytes.
pub(crate) fn limit() -> usize {
    // SAFETY: Only reads a number.
    to_usize(unsafe { sys::obd_cache_limit() })
}

/// Returns the bytes of memory that the cache uses.
pub(crate) fn used() -> usize {
    // SAFETY: Only reads a number.
    to_usize(unsafe { sys::obd_cache_bytes() })
}

/// Adds `bytes` bytes, which the cache has allocated, to `cache_bytes`.
pub(crate) fn add(bytes: usize) {
    // SAFETY: Only changes a number. Lossless: no machine has 2^63 bytes of memory.
    unsafe { sys::obd_cache_add(bytes as i64) }
}

/// Subtracts `bytes` bytes, which the cache has freed, from `cache_bytes`.
pub(crate) fn sub(bytes: usize) {
    // SAFETY: As above.
    unsafe { sys::obd_cache_add(-(bytes as i64)) }
}
