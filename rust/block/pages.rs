// SPDX-License-Identifier: GPL-2.0

//! The memory of a bio that a read fills.
//!
//! With `O_DIRECT` the pages of a bio are mapped in user space, which may write to them at any
//! time. So Rust code never makes a reference to these pages, and never bases a decision on their
//! content. Only C code writes to them: in Rust that would be a data race, which is undefined
//! behaviour.
//!
//! C header: `include/linux/bvec.h`.

use core::marker::PhantomData;
use core::mem::MaybeUninit;
use core::ptr::NonNull;

use crate::sys;

/// Contiguous writable memory that user space may read and change at any time.
///
/// # Invariants
///
/// `ptr` is valid for writes of `len` bytes for `'a`. During that time, only C code accesses these
/// bytes.
pub(crate) struct Dest<'a> {
    ptr: NonNull<u8>,
    len: usize,
    _memory: PhantomData<&'a mut [u8]>,
}

impl<'a> Dest<'a> {
    /// Wraps the `len` bytes at `ptr`.
    ///
    /// # Safety
    ///
    /// These bytes are valid for writes for `'a`, and Rust has no reference to them.
    pub(super) unsafe fn new(ptr: NonNull<u8>, len: usize) -> Self {
        // INVARIANT: By the safety requirement.
        Self {
            ptr,
            len,
            _memory: PhantomData,
        }
    }

    /// Returns the length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Returns the address of the first byte, which is valid for writes of [`Dest::len`] bytes.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Returns the first `len` bytes; `None` if there are fewer.
    pub(crate) fn up_to(self, len: usize) -> Option<Self> {
        // INVARIANT: A part of `self`.
        (len <= self.len).then_some(Self { len, ..self })
    }

    /// Copies `bytes` to the start of the memory, as many as fit.
    pub(crate) fn copy_from(&self, bytes: &[u8]) {
        let len = bytes.len().min(self.len);
        // SAFETY: By the type invariant, and since `bytes` is a slice, both are valid for `len`
        // bytes. They don't overlap, as no mutable reference exists to the bytes of a shared slice.
        // C code may write to memory that user space changes at the same time.
        unsafe { sys::obd_memcpy(self.ptr.as_ptr().cast(), bytes.as_ptr().cast(), len) };
    }
}

impl<'a> From<&'a mut [u8]> for Dest<'a> {
    fn from(memory: &'a mut [u8]) -> Self {
        // INVARIANT: A mutable slice is valid for writes for its lifetime.
        Self {
            len: memory.len(),
            ptr: NonNull::from(memory).cast(),
            _memory: PhantomData,
        }
    }
}

impl<'a> From<&'a mut [MaybeUninit<u8>]> for Dest<'a> {
    fn from(memory: &'a mut [MaybeUninit<u8>]) -> Self {
        // INVARIANT: A mutable slice is valid for writes for its lifetime.
        Self {
            len: memory.len(),
            ptr: NonNull::from(memory).cast(),
            _memory: PhantomData,
        }
    }
}

/// A cursor over the memory of a bio that is left to fill.
///
/// # Invariants
///
/// - `bio` is valid for `'a`, its vector of pages doesn't change, and `iter` is a position in it.
/// - `run` is valid for writes of `run_left` bytes for `'a`: the contiguous memory at the cursor. If
///   it isn't empty, it ends where `iter` is. During `'a`, only C code accesses these bytes.
pub(crate) struct Pages<'a> {
    bio: NonNull<sys::bio>,
    iter: sys::bvec_iter,
    run: NonNull<u8>,
    run_left: usize,
    _bio: PhantomData<&'a mut sys::bio>,
}

impl<'a> Pages<'a> {
    /// Makes a cursor at the start of the memory that `bio` has left to fill.
    ///
    /// # Safety
    ///
    /// For `'a`, `bio` is a valid read that hasn't ended, and its vector of pages doesn't change.
    pub(crate) unsafe fn new(bio: NonNull<sys::bio>) -> Self {
        // INVARIANT: By the safety requirement; `run` is empty.
        Self {
            bio,
            // SAFETY: The bio is valid.
            iter: unsafe { (*bio.as_ptr()).bi_iter },
            run: NonNull::dangling(),
            run_left: 0,
            _bio: PhantomData,
        }
    }

    /// Returns the number of bytes left to fill.
    #[inline]
    pub(crate) fn left(&self) -> usize {
        self.run_left + self.iter.bi_size as usize
    }

    /// Returns the length in bytes of the contiguous memory at the cursor; 0 at the end.
    #[inline]
    pub(crate) fn run_len(&mut self) -> usize {
        while self.run_left == 0 && self.iter.bi_size > 0 {
            self.next_run();
        }
        self.run_left
    }

    /// Returns the next `len` bytes and advances the cursor; `None` if they aren't contiguous.
    #[inline]
    pub(crate) fn take(&mut self, len: usize) -> Option<Dest<'a>> {
        if self.run_len() < len {
            return None;
        }
        let ptr = self.run;
        // SAFETY: `run` has at least `len` bytes, as was just checked.
        self.run = unsafe { ptr.add(len) };
        // INVARIANT: The rest of `run`.
        self.run_left -= len;
        // INVARIANT: By the type invariant; the cursor doesn't give these bytes to anyone else.
        Some(Dest {
            ptr,
            len,
            _memory: PhantomData,
        })
    }

    /// Copies `src` to the next bytes, as many as fit, and advances the cursor.
    pub(crate) fn copy_from(&mut self, mut src: &[u8]) {
        while let Some(dest) = self.take_up_to(src.len()) {
            let (now, later) = src.split_at(dest.len);
            dest.copy_from(now);
            src = later;
        }
    }

    /// Fills the next `len` bytes with zeros, or all that are left if these are fewer. Advances the
    /// cursor.
    pub(crate) fn zero(&mut self, mut len: usize) {
        while let Some(dest) = self.take_up_to(len) {
            // SAFETY: `dest` is valid for writes of its length. C code may write to memory that
            // user space changes at the same time.
            unsafe { sys::obd_memset(dest.as_ptr().cast(), 0, dest.len) };
            len -= dest.len;
        }
    }

    /// Returns the longest contiguous memory at the cursor, at most `most` bytes of it, and advances
    /// the cursor. Returns `None` at the end, and if `most` is 0.
    fn take_up_to(&mut self, most: usize) -> Option<Dest<'a>> {
        let len = most.min(self.run_len());
        if len == 0 {
            return None;
        }
        self.take(len)
    }

    /// Sets `run` to the contiguous memory at `iter`, which may be empty, and advances `iter`. Called
    /// if `run` is empty and `iter` isn't at the end.
    fn next_run(&mut self) {
        // SAFETY: By the type invariant the bio is valid, and so is its vector.
        let vecs = unsafe { (*self.bio.as_ptr()).bi_io_vec };
        // SAFETY: Bytes are left, so by the type invariant the position is within the vector.
        let mut vec = unsafe { sys::obd_mp_bvec_iter_bvec(vecs, &mut self.iter) };
        // SAFETY: `vec` is a part of the bio's memory; there is no high memory on 64 bits.
        let ptr = unsafe { sys::obd_bvec_virt(&mut vec) };
        // SAFETY: By the type invariant the bio is valid. `vec` is the rest of one entry of its
        // vector, and has at most as many bytes as are left.
        // INVARIANT: The position is in the vector, or nothing is left.
        unsafe { sys::obd_bio_advance_iter_single(self.bio.as_ptr(), &mut self.iter, vec.bv_len) };
        // INVARIANT: A bio's memory may be written until it has ended. It ends where `iter` is now.
        // No page is at address 0.
        (self.run, self.run_left) = match NonNull::new(ptr.cast()) {
            Some(run) => (run, vec.bv_len as usize),
            None => (NonNull::dangling(), 0),
        };
    }
}
