// SPDX-License-Identifier: GPL-2.0

//! Differences between the kernels that the module is built for. All of them are handled here.
//!
//! The oldest kernel is 7.2. What only later kernels have is written here by means of what 7.2 has,
//! if possible, and used with all kernels, so that no code depends on the kernel's version. If that
//! isn't possible, `Kbuild` sets a `cfg`.
//!
//! - 7.3 has `Vec::zeroed`; here it is [`zeroed`].
//! - 7.3 has a `SpinLockIrq` whose `lock()` counts the locks that a CPU holds; here it is
//!   [`SpinLockIrq`].
//!
//! The kernel crate, of any version so far, lacks names for some allocation flags: see [`gfp`].

#[cfg(obd_spinlock_irq)]
pub(crate) use kernel::sync::SpinLockIrq;

#[cfg(not(obd_spinlock_irq))]
pub(crate) use spinlock_irq::SpinLockIrq;

use kernel::alloc::flags::__GFP_ZERO;
use kernel::alloc::{AllocError, Allocator, Flags, Vec};
use kernel::prelude::*;

/// Makes allocation flags that the kernel crate has no names for.
pub(crate) const fn gfp(raw: super::gfp_t) -> Flags {
    // SAFETY: `Flags` is a structure with one number of this type, which may have any value. If the
    // sizes of the two types differed, this would not compile.
    unsafe { core::mem::transmute(raw) }
}

/// Allocates a vector of `len` zeroed elements.
///
/// # Errors
///
/// [`AllocError`].
pub(crate) fn zeroed<T: Zeroable, A: Allocator>(
    len: usize,
    flags: Flags,
) -> Result<Vec<T, A>, AllocError> {
    let mut vec = Vec::with_capacity(len, flags | __GFP_ZERO)?;
    // SAFETY: The vector is empty and has room for `len` elements. Because of `__GFP_ZERO` their
    // bytes are zero, which is a valid value because of `T: Zeroable`.
    unsafe { vec.inc_len(len) };
    Ok(vec)
}

/// The kernel crate's `SpinLockIrq`, for kernels that lack it.
#[cfg(not(obd_spinlock_irq))]
mod spinlock_irq {
    use kernel::bindings;
    use kernel::ffi;
    use kernel::sync::lock::{Backend, Lock};

    use crate::sys;

    /// A spinlock that is held with interrupts off. Each CPU counts the locks of this kind that it
    /// holds, so guards may be dropped in any order: unlocking the last lock restores the interrupt
    /// state.
    pub(crate) type SpinLockIrq<T> = Lock<T, SpinLockIrqBackend>;

    /// The backend of a [`SpinLockIrq`].
    pub(crate) struct SpinLockIrqBackend;

    // SAFETY: The `spinlock_t` gives mutual exclusion. `relock` is the default one, which calls
    // `lock`.
    unsafe impl Backend for SpinLockIrqBackend {
        type State = bindings::spinlock_t;
        type GuardState = ();

        unsafe fn init(
            ptr: *mut Self::State,
            name: *const ffi::c_char,
            key: *mut bindings::lock_class_key,
        ) {
            // SAFETY: The caller's promise.
            unsafe { bindings::__spin_lock_init(ptr, name, key) }
        }

        unsafe fn lock(ptr: *mut Self::State) {
            // SAFETY: The caller's promise: the lock is initialised.
            unsafe { sys::obd_spin_lock_irq_disable(ptr) }
        }

        unsafe fn try_lock(ptr: *mut Self::State) -> Option<()> {
            // SAFETY: The caller's promise: the lock is initialised.
            unsafe { sys::obd_spin_trylock_irq_disable(ptr) }.then_some(())
        }

        unsafe fn unlock(ptr: *mut Self::State, _state: &()) {
            // SAFETY: The caller's promise: it owns the lock.
            unsafe { sys::obd_spin_unlock_irq_enable(ptr) }
        }

        unsafe fn assert_is_held(ptr: *mut Self::State) {
            // SAFETY: The caller's promise: the lock is initialised.
            unsafe { bindings::spin_assert_is_held(ptr) }
        }
    }
}
