// SPDX-License-Identifier: GPL-2.0

//! A bio that device-mapper passes to a target.
//!
//! C headers: `include/linux/bio.h`, `include/linux/device-mapper.h`.

use core::marker::PhantomData;
use core::ptr::NonNull;

use super::target::Live;
use super::{Deferred, DeviceId, Io, Target};
use crate::block::{Pages, Status};
use crate::sys;

/// A read that hasn't ended and that the map function of its target owns. All its sectors belong to
/// this target. Only reads are mapped: targets are read-only.
///
/// # Invariants
///
/// `bio` is a valid read that device-mapper cloned for this target. This object owns it.
pub(crate) struct Bio<'a, T: Target> {
    bio: NonNull<sys::bio>,
    live: &'a Live<T>,
}

/// The result of mapping a [`Bio`]: what a map function returns.
pub(crate) struct Mapped<'a> {
    code: u32,
    /// Ties the result to its call of the map function: it can't be kept or sent to another thread.
    _bio: PhantomData<*mut &'a ()>,
}

impl Mapped<'_> {
    /// Device-mapper ends the bio with `BLK_STS_IOERR`.
    pub(super) const KILL: Self = Self::new(sys::DM_MAPIO_KILL);

    const fn new(code: u32) -> Self {
        Self {
            code,
            _bio: PhantomData,
        }
    }

    /// Returns the value that the map function returns to device-mapper.
    pub(super) fn code(self) -> kernel::ffi::c_int {
        self.code as kernel::ffi::c_int
    }
}

impl<'a, T: Target> Bio<'a, T> {
    /// Wraps a bio. Returns `None` if it isn't a read.
    ///
    /// # Safety
    ///
    /// Device-mapper has passed `bio` to the map function of the target `live`. No one else uses
    /// it.
    pub(super) unsafe fn new(bio: NonNull<sys::bio>, live: &'a Live<T>) -> Option<Self> {
        // SAFETY: The bio is valid.
        let op = unsafe { (*bio.as_ptr()).bi_opf } & sys::OBD_REQ_OP_MASK;
        // INVARIANT: By the safety requirement, and it is a read.
        (op == sys::req_op_REQ_OP_READ).then_some(Self { bio, live })
    }

    /// Returns the bio's fields.
    fn fields(&self) -> &sys::bio {
        // SAFETY: By the type invariant it is valid, and only we change it.
        unsafe { self.bio.as_ref() }
    }

    /// Returns the first sector, from the start of the target.
    pub(crate) fn sector(&self) -> u64 {
        // Doesn't wrap: device-mapper never passes a target a sector before its begin.
        self.fields()
            .bi_iter
            .bi_sector
            .wrapping_sub(self.live.begin())
    }

    /// Returns the length in sectors.
    pub(crate) fn sectors(&self) -> u64 {
        u64::from(self.fields().bi_iter.bi_size >> 9)
    }

    /// Cuts the bio to its first `sectors` sectors. Device-mapper calls the map function again for
    /// the rest. Does nothing if `sectors` is 0, or not less than the length of the bio.
    pub(crate) fn accept_partial(&mut self, sectors: u64) {
        if sectors == 0 || sectors >= self.sectors() {
            return;
        }
        // SAFETY: The bio is a read within its map function, and longer than `sectors`. The cast
        // loses nothing: a bio has fewer than 2^23 sectors.
        unsafe { sys::dm_accept_partial_bio(self.bio.as_ptr(), sectors as u32) };
    }

    /// Redirects the bio to sector `sector` of a device: device-mapper submits it after the map
    /// function has returned. Refuses the bio if the target has no such device.
    pub(crate) fn remap(self, device: DeviceId, sector: u64) -> Mapped<'a> {
        let Some(device) = self.live.device(device) else {
            return self.refuse();
        };
        // SAFETY: By the type invariant the bio is ours, and the device is open.
        unsafe { sys::obd_bio_set_dev(self.bio.as_ptr(), device.bdev()) };
        // SAFETY: The bio is ours.
        unsafe { (*self.bio.as_ptr()).bi_iter.bi_sector = sector };
        Mapped::new(sys::DM_MAPIO_REMAPPED)
    }

    /// Fills the bio with zeros and ends it.
    pub(crate) fn zero(self) -> Mapped<'a> {
        // SAFETY: By the type invariant the bio is ours.
        unsafe { sys::zero_fill_bio(self.bio.as_ptr()) };
        self.end()
    }

    /// Returns the memory to fill.
    pub(crate) fn pages(&self) -> Pages<'_> {
        // SAFETY: By the type invariant the bio is a read that hasn't ended, and it doesn't end
        // while `self` is borrowed.
        unsafe { Pages::new(self.bio) }
    }

    /// Ends the bio with success. The caller has filled its memory.
    pub(crate) fn end(self) -> Mapped<'a> {
        // SAFETY: By the type invariant the bio is ours.
        unsafe { sys::obd_flush_dcache_bio(self.bio.as_ptr()) };
        // SAFETY: By the type invariant the bio is ours.
        unsafe { (*self.bio.as_ptr()).bi_status = Status::raw(Ok(())) };
        // SAFETY: The bio is ours and hasn't ended.
        unsafe { sys::bio_endio(self.bio.as_ptr()) };
        Mapped::new(sys::DM_MAPIO_SUBMITTED)
    }

    /// Lets device-mapper end the bio with `BLK_STS_IOERR`.
    pub(crate) fn refuse(self) -> Mapped<'a> {
        Mapped::KILL
    }
}

impl<'a, T: Deferred> Bio<'a, T> {
    /// Takes the bio over from device-mapper as an [`Io`], which must be ended later. `request` is
    /// the target's own data for it, kept in the frame.
    pub(crate) fn begin(self, request: T::Request) -> (Io<T>, Mapped<'a>) {
        const { assert!(T::PER_BIO_DATA == super::frame_size::<T>()) };
        // SAFETY: By the type invariant the bio is ours and of this target, whose per-bio data has
        // the size of a `Frame`, as was just checked. The value returned tells device-mapper that
        // we keep the bio.
        let io = unsafe { Io::new(self.bio, NonNull::from(self.live), request) };
        (io, Mapped::new(sys::DM_MAPIO_SUBMITTED))
    }
}
