// SPDX-License-Identifier: GPL-2.0

//! The status of an I/O that has ended.
//!
//! C header: `include/linux/blk_types.h`.

use crate::sys;

/// A block status other than `BLK_STS_OK`.
///
/// # Invariants
///
/// The value isn't `BLK_STS_OK`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Status(sys::blk_status_t);

impl Status {
    /// `BLK_STS_IOERR`.
    pub(crate) const IO_ERROR: Self = Self(sys::OBD_BLK_STS_IOERR);
    /// `BLK_STS_AGAIN`: a read with `REQ_NOWAIT` would have to wait.
    pub(crate) const AGAIN: Self = Self(sys::OBD_BLK_STS_AGAIN);

    /// Converts the status of a bio that has ended; `Ok` for `BLK_STS_OK`.
    pub(crate) fn check(raw: sys::blk_status_t) -> Result<(), Self> {
        match u32::from(raw) {
            sys::BLK_STS_OK => Ok(()),
            // INVARIANT: It isn't `BLK_STS_OK`.
            _ => Err(Self(raw)),
        }
    }

    /// Returns the raw status for a result.
    pub(crate) fn raw(result: Result<(), Self>) -> sys::blk_status_t {
        match result {
            Ok(()) => sys::BLK_STS_OK as sys::blk_status_t,
            Err(status) => status.0,
        }
    }

    /// Returns whether the request caused the error, and not the storage: the request would have
    /// had to wait, or the device does not support it.
    pub(crate) fn is_of_request(self) -> bool {
        matches!(
            self.0,
            sys::OBD_BLK_STS_AGAIN | sys::OBD_BLK_STS_INVAL | sys::OBD_BLK_STS_NOTSUPP
        )
    }

    /// Returns the error number, above 0.
    pub(crate) fn errno(self) -> u64 {
        // SAFETY: Any status may be passed.
        let errno = unsafe { sys::blk_status_to_errno(self.0) };
        u64::from(errno.unsigned_abs())
    }
}
