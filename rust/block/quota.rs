// SPDX-License-Identifier: GPL-2.0

//! How much memory the cache has, and may have. Both are parameters of the module in sysfs:
//! `cache_bytes` and `cache_limit_bytes`.
//!
//! C header: `include/dm_overlaybd.h`.

use crate::format::num::to_usize;
use crate::sys;

/// Chooses the limit where it wasn't given. Called when the module is loaded.
pub(crate) fn init() {
    // SAFETY: Called once, in process context.
    unsafe { sys::obd_cache_init() }
}

/// Bytes that the cache may have.
pub(crate) fn limit() -> usize {
    // SAFETY: Only reads a number.
    to_usize(unsafe { sys::obd_cache_limit() })
}

/// Bytes that the cache has.
pub(crate) fn used() -> usize {
    // SAFETY: Only reads a number.
    to_usize(unsafe { sys::obd_cache_bytes() })
}

/// Counts `bytes` that the cache has got.
pub(crate) fn add(bytes: usize) {
    // SAFETY: Only changes a number. Lossless: no memory is as large.
    unsafe { sys::obd_cache_add(bytes as i64) }
}

/// Counts `bytes` that the cache has given back.
pub(crate) fn sub(bytes: usize) {
    // SAFETY: As above.
    unsafe { sys::obd_cache_add(-(bytes as i64)) }
}
