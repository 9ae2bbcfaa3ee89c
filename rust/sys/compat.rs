// SPDX-License-Identifier: GPL-2.0

//! What the kernels that we build for have in different ways. All of that is here.
//!
//! The oldest is 7.2. What a later one has is written once with what 7.2 has, if that does the
//! same: then nothing has to ask for the kernel's version. Otherwise `Kbuild` sets a `cfg`.
//!
//! - 7.3 has `Vec::zeroed`: [`zeroed`].
//! - 7.3 has `SpinLockIrq` with a `lock()` that counts: [`SpinLockIrq`].
//!
//! What no kernel has yet: names for all allocation flags ([`gfp`]).

#[cfg(obd_spinlock_irq)]
pub(crate) use kernel::sync::SpinLockIrq;

#[cfg(not(obd_spinlock_irq))]
pub(crate) use spinlock_irq::SpinLockIrq;

use kernel::alloc::flags::__GFP_ZERO;
use kernel::alloc::{AllocError, Allocator, Flags, Vec};
use kernel::prelude::*;

/// Allocation flags that the kernel crate has no names for.
pub(crate) const fn gfp(raw: super::gfp_t) -> Flags {
    // SAFETY: `Flags` is a number of this type in a structure of its own, without limits on its
    // value. Should its size differ, this does not compile.
    unsafe { core::mem::transmute(raw) }
}

/// A vector of `len` zeroes.
///
/// # Errors
///
/// [`AllocError`].
pub(crate) fn zeroed<T: Zeroable, A: Allocator>(
    len: usize,
    flags: Flags,
) -> Result<Vec<T, A>, AllocError> {
    let mut vec = Vec::with_capacity(len, flags | __GFP_ZERO)?;
    // SAFETY: The vector is empty and has room for `len` elements. They are zero bytes, which are
    // valid values, because of `__GFP_ZERO` and `T: Zeroable`.
    unsafe { vec.inc_len(len) };
    Ok(vec)
}

/// The kernel crate's `SpinLockIrq` for kernels that lack it.
#[cfg(not(obd_spinlock_irq))]
mod spinlock_irq {
    use kernel::bindings;
    use kernel::ffi;
    use kernel::sync::lock::{Backend, Lock};

    use crate::sys;

    /// A spinlock that is held with interrupts off. Each CPU counts those that it holds, so guards
    /// may be dropped in any order: the last one puts the state of interrupts back.
    pub(crate) type SpinLockIrq<T> = Lock<T, SpinLockIrqBackend>;

    /// The backend of a [`SpinLockIrq`].
    pub(crate) struct SpinLockIrqBackend;

    // SAFETY: The `spinlock_t` gives mutual exclusion; `relock` is the default one, which locks in
    // the same way.
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
