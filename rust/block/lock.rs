// SPDX-License-Identifier: GPL-2.0

//! A spinlock that is taken in process context and in the completion of bios alike.
//!
//! The kernel crate's spinlocks leave interrupts as they are, or want proof that they are off. Bios
//! end in any context, so this one saves and restores their state.
//!
//! C header: `include/linux/spinlock.h`.

use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};

use kernel::prelude::*;
use kernel::sync::LockClassKey;
use kernel::types::{NotThreadSafe, Opaque};

use crate::sys;

/// A value behind a spinlock with interrupts off.
///
/// # Invariants
///
/// `lock` is an initialised spinlock; `data` is only touched by who holds it.
#[pin_data]
pub(crate) struct Lock<T> {
    #[pin]
    lock: Opaque<sys::spinlock_t>,
    data: UnsafeCell<T>,
}

// SAFETY: Moving the lock moves the value, which may be sent.
unsafe impl<T: Send> Send for Lock<T> {}
// SAFETY: By the type invariant only one thread at a time touches the value.
unsafe impl<T: Send> Sync for Lock<T> {}

impl<T> Lock<T> {
    /// Makes a lock around `data`.
    pub(crate) fn new(
        data: T,
        name: &'static CStr,
        key: Pin<&'static LockClassKey>,
    ) -> impl PinInit<Self> {
        // INVARIANT: `lock` is initialised here.
        pin_init!(Self {
            lock <- Opaque::ffi_init(|slot| {
                // SAFETY: `slot` is memory for a spinlock, and name and key live for ever.
                unsafe { sys::__spin_lock_init(slot, name.as_char_ptr(), key.as_ptr()) }
            }),
            data: UnsafeCell::new(data),
        })
    }

    /// Takes the lock, with interrupts off until the guard is dropped.
    pub(crate) fn lock(&self) -> Guard<'_, T> {
        // SAFETY: By the type invariant the lock is initialised.
        let flags = unsafe { sys::obd_spin_lock_irqsave(self.lock.get()) };
        // INVARIANT: Just taken.
        Guard {
            lock: self,
            flags,
            _here: NotThreadSafe,
        }
    }
}

/// A held [`Lock`]. Guards are dropped in the reverse order of taking them, on the same CPU, since
/// each puts the state of interrupts back.
///
/// # Invariants
///
/// The lock is held, and `flags` is what taking it gave.
pub(crate) struct Guard<'a, T> {
    lock: &'a Lock<T>,
    flags: usize,
    _here: NotThreadSafe,
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: By the type invariant the lock is held.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: By the type invariant the lock is held, and this is the only guard.
        unsafe { &mut *self.lock.data.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the lock is held with these flags.
        unsafe { sys::obd_spin_unlock_irqrestore(self.lock.lock.get(), self.flags) };
    }
}
