// SPDX-License-Identifier: GPL-2.0

//! The memory that a read fills.
//!
//! With `O_DIRECT` the pages of a bio are mapped in user space, which may write to them at any
//! time. So no reference to them is ever made, and nothing is decided on what they hold. They are
//! written to in C: in Rust that would be a data race, which is undefined.
//!
//! C header: `include/linux/bvec.h`.

use core::marker::PhantomData;
use core::mem::MaybeUninit;
use core::ptr::NonNull;

use crate::sys;

/// A writable run of memory that others may read and change at any time.
///
/// # Invariants
///
/// `ptr` is valid for writes of `len` bytes for `'a`. Other than through volatile or C accesses
/// nobody relies on what is there.
pub(crate) struct Dest<'a> {
    ptr: NonNull<u8>,
    len: usize,
    _memory: PhantomData<&'a mut [u8]>,
}

impl<'a> Dest<'a> {
    /// The `len` bytes at `ptr`.
    ///
    /// # Safety
    ///
    /// They are valid for writes for `'a`, and Rust has no reference to them.
    pub(super) unsafe fn new(ptr: NonNull<u8>, len: usize) -> Self {
        // INVARIANT: By the safety requirement.
        Self {
            ptr,
            len,
            _memory: PhantomData,
        }
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where it starts; valid for writes of [`Dest::len`] bytes.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Its first `len` bytes; `None` where there are fewer.
    pub(crate) fn up_to(self, len: usize) -> Option<Self> {
        // INVARIANT: A part of it.
        (len <= self.len).then_some(Self { len, ..self })
    }

    /// Fills it from the start with `bytes`, or with as many of them as there is room for.
    pub(crate) fn copy_from(&self, bytes: &[u8]) {
        let len = bytes.len().min(self.len);
        // SAFETY: By the type invariant, and the slice, both are valid for `len` bytes; nobody
        // has a mutable reference to what a shared slice names, so they don't overlap. This is C,
        // where others may change the destination meanwhile.
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

/// A cursor over what is left to fill of a bio's memory.
///
/// # Invariants
///
/// `bio` is valid for `'a`, its vector of pages doesn't change, and `iter` is a position in it.
pub(crate) struct Pages<'a> {
    bio: NonNull<sys::bio>,
    iter: sys::bvec_iter,
    _bio: PhantomData<&'a mut sys::bio>,
}

impl<'a> Pages<'a> {
    /// A cursor at the start of what `bio` has still to fill.
    ///
    /// # Safety
    ///
    /// For `'a`, `bio` is a valid read that hasn't ended, and nobody changes its vector of pages.
    pub(crate) unsafe fn new(bio: NonNull<sys::bio>) -> Self {
        // INVARIANT: By the safety requirement.
        Self {
            bio,
            // SAFETY: The bio is valid.
            iter: unsafe { (*bio.as_ptr()).bi_iter },
            _bio: PhantomData,
        }
    }

    /// Bytes left to fill.
    pub(crate) fn left(&self) -> usize {
        self.iter.bi_size as usize
    }

    /// Length of the run from here that is contiguous in memory.
    pub(crate) fn run_len(&mut self) -> usize {
        self.run().map_or(0, |run| run.len)
    }

    /// Takes the next `len` bytes, if they are contiguous in memory.
    pub(crate) fn take(&mut self, len: usize) -> Option<Dest<'a>> {
        let dest = self.run()?;
        if dest.len < len {
            return None;
        }
        self.advance(len);
        // INVARIANT: A part of `dest`.
        Some(Dest { len, ..dest })
    }

    /// Copies `src` to the next bytes; what doesn't fit is left out.
    pub(crate) fn copy_from(&mut self, mut src: &[u8]) {
        while let Some(dest) = self.run() {
            let len = dest.len.min(src.len());
            if len == 0 {
                return;
            }
            let (now, later) = src.split_at(len);
            dest.copy_from(now);
            self.advance(len);
            src = later;
        }
    }

    /// Fills the next `len` bytes with zeros, or all that are left where there are fewer.
    pub(crate) fn zero(&mut self, mut len: usize) {
        while let Some(dest) = self.run() {
            let now = dest.len.min(len);
            if now == 0 {
                return;
            }
            // SAFETY: `dest` is valid for writes of `now` bytes. This is C, where others may change
            // them meanwhile.
            unsafe { sys::obd_memset(dest.as_ptr().cast(), 0, now) };
            self.advance(now);
            len -= now;
        }
    }

    /// The longest run from here that is contiguous in memory.
    fn run(&mut self) -> Option<Dest<'a>> {
        if self.iter.bi_size == 0 {
            return None;
        }
        // SAFETY: By the type invariant the bio is valid, so its vector is.
        let vecs = unsafe { (*self.bio.as_ptr()).bi_io_vec };
        // SAFETY: Bytes are left, so by the type invariant the position is within the vector.
        let mut vec = unsafe { sys::obd_mp_bvec_iter_bvec(vecs, &mut self.iter) };
        // SAFETY: `vec` is a part of the bio's memory; there is no high memory on 64 bits.
        let ptr = unsafe { sys::obd_bvec_virt(&mut vec) };
        // INVARIANT: A bio's memory may be written until it has ended.
        Some(Dest {
            ptr: NonNull::new(ptr.cast())?,
            len: vec.bv_len as usize,
            _memory: PhantomData,
        })
    }

    /// Steps over `len` bytes, at most what [`Pages::run`] gives.
    fn advance(&mut self, len: usize) {
        // Lossless: a run is at most `bi_size` long.
        let len = len as u32;
        // SAFETY: By the type invariant the bio is valid, and so many bytes are left.
        // INVARIANT: The position is in the vector, or nothing is left.
        unsafe { sys::obd_bio_advance_iter(self.bio.as_ptr(), &mut self.iter, len) };
    }
}
