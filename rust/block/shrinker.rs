// SPDX-License-Identifier: GPL-2.0

//! Shrinkers, which the kernel calls to free memory when memory is short.
//!
//! C header: `include/linux/shrinker.h`.

use core::ptr::NonNull;

use kernel::ffi;
use kernel::prelude::*;
use kernel::sync::Arc;

use crate::sys;

/// A cache that can free memory.
pub(crate) trait Shrink: Send + Sync + 'static {
    /// Returns the number of pages that could be freed.
    fn count(&self) -> usize;

    /// Frees about `target` pages without waiting. Returns the number of pages freed.
    fn scan(&self, target: usize) -> usize;
}

/// A registered shrinker for a cache. Dropping it unregisters the shrinker.
///
/// # Invariants
///
/// `raw` is a registered shrinker, owned by this object. Its private pointer points to the cache.
pub(crate) struct Shrinker<T: Shrink> {
    raw: NonNull<sys::shrinker>,
    _cache: Arc<T>,
}

// SAFETY: A shrinker may be freed from any thread, and the cache may be shared.
unsafe impl<T: Shrink> Send for Shrinker<T> {}
// SAFETY: There are no operations on a shared reference.
unsafe impl<T: Shrink> Sync for Shrinker<T> {}

impl<T: Shrink> Shrinker<T> {
    /// Registers a shrinker for `cache`.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(cache: Arc<T>) -> Result<Self> {
        // SAFETY: The format is a C string without arguments.
        let raw = unsafe { sys::shrinker_alloc(0, c"dm-overlaybd".as_char_ptr()) };
        let raw = NonNull::new(raw).ok_or(ENOMEM)?;
        // SAFETY: The shrinker is new, and only this function has a pointer to it.
        let fields = unsafe { &mut *raw.as_ptr() };
        fields.count_objects = Some(Self::count_objects);
        fields.scan_objects = Some(Self::scan_objects);
        fields.private_data = core::ptr::from_ref::<T>(&cache).cast_mut().cast();
        // SAFETY: All fields of the shrinker are set.
        unsafe { sys::shrinker_register(raw.as_ptr()) };
        // INVARIANT: Registered above, with the pointer of `cache`.
        Ok(Self { raw, _cache: cache })
    }

    /// # Safety
    ///
    /// `raw` is a registered shrinker of this type.
    unsafe fn cache<'a>(raw: *mut sys::shrinker) -> &'a T {
        // SAFETY: By the type invariant the pointer is that of the cache, which lives until the
        // shrinker is freed. Freeing waits for callbacks.
        unsafe { &*(*raw).private_data.cast() }
    }

    /// # Safety
    ///
    /// Only the kernel may call this, for a registered shrinker of this type.
    unsafe extern "C" fn count_objects(
        raw: *mut sys::shrinker,
        _control: *mut sys::shrink_control,
    ) -> ffi::c_ulong {
        // SAFETY: The caller's promise.
        unsafe { Self::cache(raw) }.count()
    }

    /// # Safety
    ///
    /// Only the kernel may call this, for a registered shrinker of this type.
    unsafe extern "C" fn scan_objects(
        raw: *mut sys::shrinker,
        control: *mut sys::shrink_control,
    ) -> ffi::c_ulong {
        // SAFETY: The caller's promise.
        let target = unsafe { (*control).nr_to_scan };
        // SAFETY: The caller's promise.
        unsafe { Self::cache(raw) }.scan(target)
    }
}

impl<T: Shrink> Drop for Shrinker<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant it is registered and ours. This waits for callbacks.
        unsafe { sys::shrinker_free(self.raw.as_ptr()) };
    }
}
